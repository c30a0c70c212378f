"""Every layer of a graph that could be factored, with the shapes that it meets at one batch size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from tensorrail_exporter.formats.contraction import LayerSpec
from tensorrail_exporter.graphs.io import import_graph, inferred_shapes
from tensorrail_exporter.rewrite.rules import Rule
from tensorrail_exporter.rewrite.rules.emit import Site
from tensorrail_exporter.rewrite.rules.scan import holds_scan
from tensorrail_exporter.rewrite.sites import NamedLayers
from tensorrail_runtime.errors import GraphError
from tensorrail_runtime.graphs.cost import bind_shapes, seen_shapes
from tensorrail_runtime.sessions.inputs import Shapes


@dataclass(frozen=True, eq=False)
class DenseLayer:
    """One dense layer. `inputs` are the shapes of the node's inputs, None where there is none or it is not known."""

    name: str
    op: str
    spec: LayerSpec
    nodes: int  # how many nodes share the weight: all are rewritten together
    attrs: Mapping[str, object]
    inputs: tuple[tuple[int, ...] | None, ...]
    output: tuple[int, ...] | None  # of a recurrent node its sequence of outputs, whether or not that is used
    data: int  # which of the inputs is the activation
    dtype: np.dtype
    opset: int
    first: bool  # whether it reads an input of the graph: its data then arrive in the caller's layout
    macs: int  # of all its nodes, at this batch size
    input_name: str
    output_name: str

    @property
    def params(self) -> int:
        """Number of values in the weight."""
        return self.spec.params

    @property
    def bytes(self) -> int:
        """Bytes of the weight."""
        return self.spec.params * self.dtype.itemsize

    def describe(self) -> str:
        """Return one word a dimension, such as `Conv 3×3 64→128 /2 on 56×56`."""
        kernel = f" {'×'.join(map(str, self.spec.kernel))}" if self.spec.kernel else ""
        stride = f" /{max(self.spec.stride)}" if self.spec.stride and max(self.spec.stride) > 1 else ""
        size = f" on {'×'.join(map(str, self.spec.size))}" if any(self.spec.size) else ""
        return f"{self.op}{kernel} {self.spec.shape[1]}→{self.spec.shape[0]}{stride}{size}"

    @property
    def signature(self) -> dict[str, object]:
        """What the layer's time depends on, and its name does not: layers of equal signature are measured once."""
        return {
            "op": self.op,
            "attrs": {key: _plain(value) for key, value in sorted(self.attrs.items())},
            "inputs": [list(shape) if shape is not None else None for shape in self.inputs],
            "data": self.data,
            "dtype": str(self.dtype),
            "first": self.first,
        }


def survey(
    model: onnx.ModelProto, batch: int = 1, shapes: Shapes | None = None, *, scan: bool = True
) -> tuple[DenseLayer, ...]:
    """Return the layers of a graph that a plan may name, in the graph's order, at one batch size.

    Dynamic axes are `shapes`' or else `batch`. Without `scan` no layer's loop may become a Scan, as for a GPU. A layer that
    cannot be rewritten, such as one whose weight a grouped convolution uses as well, is left out. Raises `ModelError` for a
    shape of an input that is not there.
    """
    bound = onnx.ModelProto()
    bound.CopyFrom(model)
    graph = import_graph(bind_shapes(bound, batch, shapes or {}))
    _complete(graph, inferred_shapes(bound, data_prop=True))
    named = NamedLayers(graph)
    layers = named.rewritable()
    if any(_shape(node.inputs[0]) is None or _output(node) is None for node in layers.values()):
        _complete(graph, seen_shapes(bound, batch, shapes))  # such as those behind computed initial states
        layers = named.rewritable()
    found = []
    for name in layers:
        try:
            rule, sites = named.find(name)
        except GraphError:
            continue
        found.append(dense_layer(name, graph, rule, sites))
    return tuple(found if scan and holds_scan(model) else (replace(one, spec=replace(one.spec, scan=False)) for one in found))


def _complete(graph: gs.Graph, known: Mapping[str, Sequence[int | str]]) -> None:
    """Give tensors whose shape is not known in full the one that is."""
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable) and tensor.name in known and _shape(tensor) is None:
            tensor.shape = list(known[tensor.name])


def dense_layer(name: str, graph: gs.Graph, rule: Rule, sites: Sequence[Site]) -> DenseLayer:
    """Return one layer as its first node shows it; its MACs are those of all of them."""
    node = sites[0].node
    weight = rule.weight_input(node)
    data = 1 - weight if node.op == "MatMul" else 0
    return DenseLayer(
        name=name,
        op=node.op,
        spec=rule.layer(node),
        nodes=len(sites),
        attrs={key: value for key, value in node.attrs.items() if not isinstance(value, gs.Graph)},
        inputs=tuple(None if tensor.is_empty() else _shape(tensor) for tensor in node.inputs),
        output=_output(node),
        data=data,
        dtype=np.dtype(node.inputs[weight].dtype),
        opset=graph.opset,
        first=any(node.inputs[data] is tensor for tensor in graph.inputs),
        macs=sum(_macs(site.node, rule.layer(site.node)) for site in sites),
        input_name=node.inputs[data].name,
        output_name=next(tensor.name for tensor in node.outputs if not tensor.is_empty()),
    )


def _macs(node: gs.Node, spec: LayerSpec) -> int:
    """Return multiply-accumulates of the node's weight on the data that it meets; 0 where their shape is not known."""
    if node.op in ("LSTM", "GRU"):
        shape = _shape(node.inputs[0])
        return 0 if shape is None else shape[0] * shape[1] * spec.params
    shape = _shape(node.outputs[0])
    if shape is None:
        return 0
    return math.prod(shape) * (math.prod(spec.shape[1:]) if spec.op == "conv" else spec.shape[1])


def _output(node: gs.Node) -> tuple[int, ...] | None:
    """Return the shape of the node's first output, also where only the last state of a recurrent layer is used."""
    if node.op not in ("LSTM", "GRU") or not node.outputs[0].is_empty():
        return _shape(node.outputs[0])
    data, recurrent = _shape(node.inputs[0]), _shape(node.inputs[2])
    if data is None or recurrent is None:
        return None
    directions, _, hidden = recurrent  # R (directions, gates · hidden, hidden)
    return (*data[:2], directions, hidden) if node.attrs.get("layout", 0) else (data[0], directions, data[1], hidden)


def _shape(tensor: gs.Tensor) -> tuple[int, ...] | None:
    axes = tensor.shape
    if axes is None or not all(isinstance(axis, int | np.integer) and axis >= 0 for axis in axes):
        return None
    return tuple(int(axis) for axis in axes)


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value
