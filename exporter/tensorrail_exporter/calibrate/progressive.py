"""Runs a network on the calibration inputs while its layers are replaced one after the other.

No node runs twice on the same inputs. The tensors that later nodes still need are kept. The nodes between these tensors and the
next layer form a small model, which computes the inputs of that layer.

Three kinds of nodes run again whenever they are needed: nodes that depend on constants only; nodes after a layer that is not
replaced yet, for example if a later node shares its weight; and nodes whose output is not an array, such as a sequence.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
from onnx import helper, numpy_helper

from tensorrail_exporter.graphs.io import export_graph, save_model
from tensorrail_exporter.graphs.parts import Network, reads_of, written_nodes
from tensorrail_exporter.rewrite.biases import add_bias
from tensorrail_exporter.rewrite.resolve import ResolvedPlan
from tensorrail_exporter.rewrite.sites import walk
from tensorrail_runtime.errors import GraphError
from tensorrail_runtime.sessions.session import Session, open_session, run
from tensorrail_runtime.sessions.side_by_side import side_by_side
from tensorrail_runtime.sessions.values import TYPES

_MEMORY = 2**29  # bytes of tensors that are kept in memory; further ones are kept in files
_SMALL = 2**16  # bytes; smaller tensors always stay in memory

Feeds = Sequence[Mapping[str, np.ndarray]]


class ProgressiveNetwork:
    """A network that starts dense, and whose layers get new weights by `replace`.

    Args:
        resolved: the plan in the dense model; it is not changed.
        inputs: the input tensors of each layer to be fitted, by layer name in the order of the graph.
        feeds: batches of the network's inputs by name.
        settings: how the network runs.
        folder: an empty folder for models and for tensors that do not fit into memory.

    Raises:
        GraphError: a tensor is not in the graph.

    """

    def __init__(
        self, resolved: ResolvedPlan, inputs: Mapping[str, Sequence[str]], feeds: Feeds, settings: Session, folder: Path
    ) -> None:
        self.feeds, self.settings, self.folder = feeds, replace(settings, linger=False), folder
        self.inputs = {name: tuple(dict.fromkeys(tensors)) for name, tensors in inputs.items()}
        self.steps = {name: step for step, name in enumerate(inputs)}
        self.tensors = tuple(dict.fromkeys(tensor for tensors in self.inputs.values() for tensor in tensors))
        self.plan = _showing(resolved, self.tensors)
        self.network = Network(export_graph(self.plan.graph, resolved.model))
        self.written: dict[int, onnx.NodeProto] = {}
        self.places: dict[int, int] = {}
        place = -1
        # The graph was exported in the order of its nodes, so both can be walked together.
        for (graph, node), proto in zip(walk(self.plan.graph), written_nodes(self.network.graph), strict=True):
            place += graph is self.plan.graph
            self.written[id(node)], self.places[id(node)] = proto, place
        self.pending = Counter(place for name in self.plan.layers for place in self._places_of(name))
        self.fixed = made_of_constants(self.network)
        self.no_arrays: set[str] = set()
        self.last_use = self._last_use()
        self.last_input = {tensor: self.steps[name] for name, tensors in self.inputs.items() for tensor in tensors}
        self.done: set[int] = set()
        self.kept = KeptTensors(folder)

    def dense(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield the inputs of all layers in the dense network, by tensor name, batch by batch."""
        computed = [name for name in self.tensors if name in self.network.makers]
        session = self._open(self.network.above(computed), computed)
        yield from side_by_side(lambda batch: self._values(session, self.tensors, batch), len(self.feeds), self.settings)

    def inputs_of(self, layer: str) -> Iterator[dict[str, np.ndarray]]:
        """Yield the current inputs of a layer by tensor name, batch by batch.

        Call it once per layer, in the order of `inputs`, and consume all batches.
        """
        names, step = self.inputs[layer], self.steps[layer]
        computed = [name for name in names if name in self.network.makers and name not in self.kept]
        session, run_now, keep = self._segment(computed, step)
        for values in side_by_side(lambda batch: self._values(session, (*names, *keep), batch), len(self.feeds), self.settings):
            yield {name: values[name] for name in names}
            for name in keep:
                self.kept.put(name, values[name])
        self.done |= run_now
        for name in [name for name in self.kept if not self._is_read_after(name, step)]:
            self.kept.drop(name)

    def replace(self, name: str, weight: np.ndarray, bias: np.ndarray | None = None) -> None:
        """Set the weight (O, I, *K) of a layer, gates in torch's order, and add a vector (O,) to its bias."""
        layer = self.plan.layers[name]
        sites = [site for site in layer.sites if id(site.node) in self.written]  # unused nodes are not exported
        for site in sites:
            layer.rule.replace_weight(site.node, weight.astype(layer.dtype), site.names.unique(f"{name}/dense"))
            self._write(site.node)
        if bias is not None and sites:
            self._write(add_bias(layer, bias))
        self.pending.subtract(self._places_of(name))

    def _write(self, node: gs.Node) -> None:
        """Copy the changed inputs of a node to the network."""
        proto, place = self.written[id(node)], self.places[id(node)]
        old_inputs = set(proto.input)
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and tensor.name not in old_inputs:
                self.network.constants[tensor.name] = numpy_helper.from_array(np.asarray(tensor.values), tensor.name)
        del proto.input[:]
        proto.input.extend(tensor.name for tensor in node.inputs)
        self.network.reads[place] = reads_of(self.network.nodes[place])

    def _segment(self, computed: Sequence[str], step: int) -> tuple[ort.InferenceSession | None, set[int], list[str]]:
        """Return a session that computes some tensors, the nodes that need not run again, and the outputs of them to keep."""
        while True:
            places = self.network.above(computed, self.kept)
            final = self._final(places)
            run_now = {
                place
                for place in final - self.fixed
                if not any(name in self.no_arrays for name in self.network.nodes[place].output)
            }
            outputs = [name for place in sorted(run_now) for name in self.network.nodes[place].output if name]
            keep = [name for name in outputs if self._is_read_after(name, step, run_now)]
            session = self._open(places, list(dict.fromkeys((*computed, *keep))))
            types = {} if session is None else {entry.name: entry.type for entry in session.get_outputs()}
            no_arrays = {name for name in keep if types[name] not in TYPES}
            if not no_arrays:
                return session, run_now, keep
            self.no_arrays |= no_arrays

    def _final(self, places: set[int]) -> set[int]:
        """Return the nodes whose outputs do not depend on a layer that is still to be replaced."""
        final: set[int] = set()
        for place in sorted(places):
            makers = {self.network.makers.get(name) for name in self.network.reads[place] if name not in self.kept}
            if not self.pending[place] and makers - {None} <= final:
                final.add(place)
        return final

    def _is_read_after(self, name: str, step: int, run_now: Collection[int] = ()) -> bool:
        """Return whether a tensor is an input of a later layer, or of a node that will run for a later layer."""
        if self.last_input.get(name, -1) > step:
            return True
        readers = (place for place in self.network.readers.get(name, ()) if place not in self.done and place not in run_now)
        return any(self.last_use.get(place, -1) > step for place in readers)

    def _open(self, places: set[int], outputs: list[str]) -> ort.InferenceSession | None:
        """Return a session that runs some nodes; None if there are none."""
        if not places:
            return None
        computed = {name for place in places for name in self.network.nodes[place].output}
        read = dict.fromkeys(name for place in sorted(places) for name in sorted(self.network.reads[place]))
        outside = [name for name in read if name not in computed and not self.network.is_stored(name)]
        inputs = [self.network.inputs[name] if name in self.network.inputs else self.kept.entry(name) for name in outside]
        path = self.folder / "part.onnx"
        save_model(self.network.part(places, inputs, outputs), path)
        return open_session(path, settings=self.settings)

    def _values(self, session: ort.InferenceSession | None, names: Iterable[str], batch: int) -> dict[str, np.ndarray]:
        """Return tensors of one batch: outputs of a session, kept tensors and inputs of the network."""
        feed = self.feeds[batch]
        values: dict[str, np.ndarray] = {}
        if session is not None:
            read = [entry.name for entry in session.get_inputs()]
            kept = {name: self.kept.get(name, batch) for name in read if name in self.kept}
            values = run(session, kept | {name: feed[name] for name in read if name in feed and name not in kept})
        for name in names:
            if name not in values:
                values[name] = self.kept.get(name, batch) if name in self.kept else feed[name]
        return values

    def _places_of(self, name: str) -> set[int]:
        """Return the indices of the nodes that are the layer, or hold it in a body."""
        nodes = [id(site.node) for site in self.plan.layers[name].sites]
        return {self.places[node] for node in nodes if node in self.places}

    def _last_use(self) -> dict[int, int]:
        """Return, for every node that a layer's inputs depend on, the step of the last such layer."""
        last: dict[int, int] = {}
        for name in reversed(self.inputs):
            waiting = list(self.inputs[name])
            while waiting:
                place = self.network.makers.get(waiting.pop())
                if place is not None and place not in last:
                    last[place] = self.steps[name]
                    waiting.extend(self.network.reads[place])
        return last


def made_of_constants(network: Network) -> set[int]:
    """Return the indices of the nodes that depend on constants only."""
    fixed: set[int] = set()
    for place, reads in enumerate(network.reads):
        makers = [network.makers.get(name) for name in reads if not network.is_stored(name)]
        if all(maker in fixed for maker in makers) and not network.nodes[place].op_type.startswith("Random"):
            fixed.add(place)
    return fixed


class KeptTensors:
    """Stores tensors by name, one array per batch: in memory up to a total size, then in files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.arrays: dict[str, list[np.ndarray]] = {}
        self.files: dict[str, list[Path]] = {}
        self.bytes = 0
        self.count = 0

    def __contains__(self, name: object) -> bool:
        return name in self.arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def put(self, name: str, array: np.ndarray) -> None:
        """Store the next batch of a tensor."""
        if array.nbytes > _SMALL and self.bytes + array.nbytes > _MEMORY:
            path = self.folder / f"{self.count}.npy"
            self.count += 1
            np.save(path, array)
            array = np.load(path, mmap_mode="r")
            self.files.setdefault(name, []).append(path)
        else:
            self.bytes += array.nbytes
        self.arrays.setdefault(name, []).append(array)

    def get(self, name: str, batch: int) -> np.ndarray:
        """Return one batch of a tensor."""
        array = self.arrays[name][batch]
        # Pages of a mapped file would stay in memory.
        return np.load(array.filename) if isinstance(array, np.memmap) and array.filename else np.asarray(array)

    def drop(self, name: str) -> None:
        """Delete a tensor."""
        self.bytes -= sum(array.nbytes for array in self.arrays.pop(name) if not isinstance(array, np.memmap))
        for path in self.files.pop(name, ()):
            with contextlib.suppress(OSError):  # Windows cannot delete a file that is still mapped; the folder is deleted later
                path.unlink()

    def entry(self, name: str) -> onnx.ValueInfoProto:
        """Return the declaration of a tensor as a model input; axes that differ between batches are dynamic."""
        arrays = self.arrays[name]
        sizes = zip(*(array.shape for array in arrays), strict=True)
        axes = [lengths[0] if len(set(lengths)) == 1 else None for lengths in sizes]
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(arrays[0].dtype), axes)


def _showing(resolved: ResolvedPlan, tensors: Iterable[str]) -> ResolvedPlan:
    """Return a copy whose graph has some tensors as further outputs, so that the nodes before them are exported.

    Raises `GraphError` if a tensor is not in the graph.
    """
    plan = resolved.copy()
    tensor_by_name = plan.graph.tensors()
    for name in tensors:
        if name not in tensor_by_name:
            raise GraphError(f"tensor {name!r} is not in the graph: expected the input or output of one of its nodes")
        ends = (*plan.graph.inputs, *plan.graph.outputs)
        if isinstance(tensor_by_name[name], gs.Variable) and not any(tensor_by_name[name] is end for end in ends):
            plan.graph.outputs.append(tensor_by_name[name])
    return plan
