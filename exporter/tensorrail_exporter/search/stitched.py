"""The network with other weights in some of its layers, whose outputs are computed again and again.

Weights and biases of the layers are inputs of the graph, so that no model is written or loaded to try another weight. For a
change in one layer, only what lies behind it runs, from activations of the dense network that are kept. Layers are visited in
the order of the graph, and each node in front of a layer runs once in all.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
from onnx import helper

from tensorrail_exporter.calibrate.progressive import KeptTensors, made_of_constants
from tensorrail_exporter.graphs.io import export_graph, save_model
from tensorrail_exporter.graphs.parts import Network
from tensorrail_exporter.rewrite.biases import add_bias, bias_scale, takes_bias
from tensorrail_exporter.rewrite.resolve import ResolvedLayer, ResolvedPlan
from tensorrail_exporter.search.divergence import Outputs
from tensorrail_runtime.sessions.session import Session, open_session, run
from tensorrail_runtime.sessions.side_by_side import side_by_side

Feeds = Sequence[Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Change:
    """Another weight of a layer.

    Attributes:
        weight: the weight (O, I, *K), gates in torch's order.
        bias: a vector (O,) to add to the bias; it is left out where the layer takes none.

    """

    weight: np.ndarray
    bias: np.ndarray | None = None


class StitchedNetwork:
    """A network whose planned layers take other weights.

    Args:
        resolved: the plan in the dense model; it is not changed.
        feeds: batches of the network's inputs by name.
        settings: how the network runs.
        folder: an empty folder for models and for tensors that do not fit into memory.

    Attributes:
        layers: names of the layers that can be changed, in the order of the graph: those outside of the bodies of nodes.

    """

    def __init__(self, resolved: ResolvedPlan, feeds: Feeds, settings: Session, folder: Path) -> None:
        self.feeds, self.settings, self.folder = feeds, replace(settings, linger=False), folder
        work = resolved.copy()
        self._resolved = {layer.plan.name: layer for layer in work.in_graph_order if _in_main_graph(layer, work.graph)}
        self._weights: dict[str, list[str]] = {}  # the constants of each layer, one per node
        self._biases: dict[str, str] = {}
        self._scales: dict[str, float] = {}  # of a vector that is added to a bias
        for name, layer in self._resolved.items():
            self._weights[name] = [site.names.unique(f"{name}/weight") for site in layer.sites]
            for site, constant in zip(layer.sites, self._weights[name], strict=True):
                layer.rule.replace_weight(site.node, np.asarray(layer.weight, layer.dtype), constant)
            if takes_bias(layer):
                node = add_bias(layer, np.zeros(layer.spec.shape[0]))
                self._scales[name] = bias_scale(node)
                self._biases[name] = next(t.name for t in node.inputs if t.name.startswith(f"{name}/bias"))
        self.network = Network(export_graph(work.graph, resolved.model))
        self.outputs = [value.name for value in self.network.graph.output]
        self._needed = self.network.above(self.outputs)
        used = {name for place in self._needed for name in self.network.reads[place]}
        self._places: dict[str, int] = {}
        for name, constants in self._weights.items():
            readers = [place for constant in constants for place in self.network.readers.get(constant, ()) if constant in used]
            if readers:
                self._places[name] = min(readers)
        self.layers = tuple(sorted(self._places, key=lambda name: self._places[name]))
        self._fixed = made_of_constants(self.network)
        self._kept = KeptTensors(folder)
        self._at = 0
        self._from_inputs = False  # whether a tensor between the layers is no array, so that the whole network runs
        self._whole: ort.InferenceSession | None = None
        self._behind: tuple[str, ort.InferenceSession] | None = None  # the layer that was changed last, and what runs for it

    def dense(self) -> Outputs:
        """Return the outputs of the dense network: one list per output, with one array per batch."""
        return self.timed_dense()[0]

    def timed_dense(self) -> tuple[Outputs, float]:
        """Return the same, and the seconds of the runs."""
        session = self._session(self._needed, (), self.outputs)
        began = time.monotonic()
        return self._gather(session, {}, self.outputs), time.monotonic() - began

    def with_changes(self, changes: Mapping[str, Change], batches: int | None = None) -> Outputs:
        """Return the outputs with any number of changed layers, by name; the others stay dense.

        Args:
            changes: the changes by layer name.
            batches: the number of batches to run, from the first; default: all.

        """
        if self._whole is None:
            self._whole = self._session(self._needed, self.layers, self.outputs)
        values: dict[str, np.ndarray] = {}
        for name in self.layers:
            values |= self._values(name, changes.get(name))
        return self._gather(self._whole, values, self.outputs, batches)

    def with_each(self, layer: str, changes: Sequence[Change], batches: int | None = None) -> list[Outputs]:
        """Return the outputs with each of some changes of one layer.

        Args:
            layer: the layer; call it in the order of `layers`.
            changes: the changes to try.
            batches: the number of batches to run, from the first; default: all.

        """
        if self._behind is None or self._behind[0] != layer:
            self._advance(self._places[layer])
            nodes = self.network.above(self.outputs, self._kept)
            self._behind = layer, self._session(nodes, (layer,), self.outputs)
        session = self._behind[1]
        return [self._gather(session, self._values(layer, change), self.outputs, batches) for change in changes]

    def _values(self, name: str, change: Change | None) -> dict[str, np.ndarray]:
        """Return the constants of a layer by their names."""
        layer = self._resolved[name]
        weight = layer.weight if change is None else change.weight
        values = {}
        for site, constant in enumerate(self._weights[name]):
            values[constant] = layer.stored(weight, site)
        if name in self._biases:
            values[self._biases[name]] = self._biased(name, None if change is None else change.bias)
        return values

    def _biased(self, name: str, bias: np.ndarray | None) -> np.ndarray:
        """Return the layer's bias with a vector added, as the graph stores it."""
        constant = self._biases[name]
        dense = onnx.numpy_helper.to_array(self.network.constants[constant])
        if bias is None:
            return dense
        return np.asarray(dense + self._scales[name] * bias, dense.dtype)

    def _advance(self, place: int) -> None:
        """Keep what the nodes from `place` on read of those before it."""
        if self._from_inputs:
            return
        frontier = [
            name
            for before in sorted(self._needed - self._fixed)
            if before < place
            for name in self.network.nodes[before].output
            if name in self.outputs or any(p >= place and p in self._needed for p in self.network.readers.get(name, ()))
        ]
        missing = [name for name in frontier if name not in self._kept]
        if missing:
            session = self._session(self.network.above(missing, self._kept), (), missing)
            values = list(self._runs(session, {}, len(self.feeds)))
            if not all(isinstance(value, np.ndarray) for batch in values for value in batch.values()):
                self._from_inputs = True
                for name in list(self._kept):
                    self._kept.drop(name)
                return
            for name in missing:
                for batch in values:
                    self._kept.put(name, batch[name])
        for name in [name for name in self._kept if name not in frontier]:
            self._kept.drop(name)

    def _session(self, places: Collection[int], changed: Sequence[str], outputs: Sequence[str]) -> ort.InferenceSession:
        """Return a session that runs some nodes, with the weights of some layers as inputs."""
        constants = [name for layer in changed for name in (*self._weights[layer], self._biases.get(layer, ""))]
        made = {name for place in places for name in self.network.nodes[place].output}
        read = dict.fromkeys([*(name for place in sorted(places) for name in sorted(self.network.reads[place])), *outputs])
        inputs = [
            self.network.inputs[name] if name in self.network.inputs else self._kept.entry(name)
            for name in read
            if name not in made and not self.network.is_stored(name)
        ]
        held = {name: self.network.constants[name] for name in constants if name in read and name in self.network.constants}
        inputs += [helper.make_tensor_value_info(name, tensor.data_type, tensor.dims) for name, tensor in held.items()]
        for name in held:
            del self.network.constants[name]
        computed = [name for name in outputs if name in made]
        part = self.network.part(places, inputs, computed)
        self.network.constants.update(held)
        path = self.folder / "stitched.onnx"
        save_model(part, path)
        return open_session(path, settings=self.settings)

    def _runs(
        self, session: ort.InferenceSession, values: Mapping[str, np.ndarray], batches: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yield the outputs of a session for each of the first batches."""
        return side_by_side(lambda batch: run(session, self._feed(session, values, batch)), batches, self.settings)

    def _feed(self, session: ort.InferenceSession, values: Mapping[str, np.ndarray], batch: int) -> dict[str, np.ndarray]:
        names = [entry.name for entry in session.get_inputs()]
        feed = self.feeds[batch]
        return {
            name: values[name] if name in values else self._kept.get(name, batch) if name in self._kept else feed[name]
            for name in names
        }

    def _gather(
        self,
        session: ort.InferenceSession,
        values: Mapping[str, np.ndarray],
        names: Sequence[str],
        batches: int | None = None,
    ) -> Outputs:
        gathered: Outputs = [[] for _ in names]
        for batch, results in enumerate(self._runs(session, values, len(self.feeds) if batches is None else batches)):
            for k, name in enumerate(names):
                if name in results:
                    gathered[k].append(results[name])
                elif name in self._kept:
                    gathered[k].append(self._kept.get(name, batch))
                elif name in self.network.constants:
                    gathered[k].append(onnx.numpy_helper.to_array(self.network.constants[name]))
                else:
                    gathered[k].append(np.asarray(self.feeds[batch][name]))
        return gathered


def _in_main_graph(layer: ResolvedLayer, graph: gs.Graph) -> bool:
    return all(site.graph is graph for site in layer.sites)
