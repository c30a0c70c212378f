"""Lists the layers of a graph that can be factored, with their shapes at one batch size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from tensorrail_exporter.formats.contraction import LayerSpec
from tensorrail_exporter.formats.width import with_inputs
from tensorrail_exporter.graphs.fold import constant_value, is_standard
from tensorrail_exporter.graphs.io import import_graph, inferred_shapes, unknown_axes
from tensorrail_exporter.rewrite.channels import channels_of
from tensorrail_exporter.rewrite.rules import Rule
from tensorrail_exporter.rewrite.rules.emit import Site
from tensorrail_exporter.rewrite.rules.scan import holds_scan, why_no_scan
from tensorrail_exporter.rewrite.sites import NamedLayers
from tensorrail_runtime.errors import GraphError
from tensorrail_runtime.graphs.files import descendants
from tensorrail_runtime.graphs.shapes import bind_shapes, seen_shapes, seen_tensors
from tensorrail_runtime.sessions.inputs import Shapes
from tensorrail_runtime.sessions.values import Values


@dataclass(frozen=True, eq=False)
class DenseLayer:
    """One dense layer. `inputs` are the shapes of the node's inputs, None for an input that is absent or of unknown shape."""

    name: str
    op: str
    spec: LayerSpec
    nodes: int  # number of nodes that share the weight; all are rewritten together
    attrs: Mapping[str, object]
    inputs: tuple[tuple[int, ...] | None, ...]
    output: tuple[int, ...] | None  # for a recurrent node the sequence of outputs, even if it is not used
    data: int  # index of the input that is the activation
    dtype: np.dtype
    opset: int
    first: bool  # whether it reads an input of the graph, whose memory layout the caller chooses
    macs: int  # of all its nodes, at the batch size of the survey
    input_name: str
    output_names: tuple[str, ...]  # the first one of each node
    padding: tuple[int, ...] = ()  # pads of a Pad node before a convolution, which ONNX Runtime computes within it; () for none
    makers: tuple[DenseLayer, ...] = ()  # the layers before that make its channels, where nothing else reads these
    side_by_side: bool = False  # whether copies are timed side by side even where they could form a chain
    domain: str = ""  # of the operator; empty for one of ONNX's own
    in_body: bool = False  # whether a node is in the body of an If, Loop or Scan: how often it runs is not known, nor `output`

    @property
    def source(self) -> tuple[int, ...] | None:
        """The shape of the data, before the padding."""
        shape = self.inputs[self.data]
        if shape is None or not self.padding:
            return shape
        rank = len(shape)
        return tuple(size - self.padding[axis] - self.padding[rank + axis] for axis, size in enumerate(shape))

    def with_inputs(self, count: int) -> DenseLayer:
        """Return the layer with another number of input channels; its copies are timed side by side."""
        weight, data = (1, 1) if self.spec.op == "conv" else (_features(self.op, self.attrs, False), -1)
        inputs = list(self.inputs)
        inputs[0], inputs[1] = _resized(inputs[0], data, count), _resized(inputs[1], weight, count)
        spec = with_inputs(self.spec, count)
        fewer = replace(self, spec=spec, inputs=tuple(inputs), macs=self.macs * count // self.spec.shape[1], makers=())
        return replace(fewer, side_by_side=fewer.source == fewer.output)

    def with_outputs(self, count: int) -> DenseLayer:
        """Return the layer with another number of output channels; its copies are timed side by side."""
        weight, out = (0, 1) if self.spec.op == "conv" else (_features(self.op, self.attrs, True), -1)
        weight = 1 if self.spec.transposed else weight
        inputs = [*self.inputs[:1], _resized(self.inputs[1], weight, count), *self.inputs[2:]]
        if len(inputs) > 2 and inputs[2] and inputs[2][-1] == self.spec.shape[0]:
            inputs[2] = _resized(inputs[2], -1, count)
        spec = replace(self.spec, shape=(count, *self.spec.shape[1:]))
        output, macs = _resized(self.output, out, count), self.macs * count // self.spec.shape[0]
        fewer = replace(self, spec=spec, inputs=tuple(inputs), output=output, macs=macs, makers=())
        return replace(fewer, side_by_side=fewer.source == fewer.output)

    @property
    def params(self) -> int:
        """Number of values in the weight."""
        return self.spec.params

    @property
    def bytes(self) -> int:
        """Bytes of all inputs of one node but the data, such as both weights of an LSTM."""
        others = (shape for place, shape in enumerate(self.inputs) if place != self.data and shape is not None)
        return self.dtype.itemsize * sum(map(math.prod, others))

    @property
    def node_macs(self) -> int:
        """MACs of one node, of an LSTM or GRU with those of its other weight."""
        macs = self.macs // max(1, self.nodes)
        if self.spec.op != "recurrent":
            return macs
        weights = sum(math.prod(shape) for shape in self.inputs[1:3] if shape is not None)
        return macs * weights // max(1, self.spec.params)

    def describe(self) -> str:
        """Return a short description, such as `Conv 3×3 64→128 /2 on 56×56`."""
        kernel = f" {'×'.join(map(str, self.spec.kernel))}" if self.spec.kernel else ""
        stride = f" /{max(self.spec.stride)}" if self.spec.stride and max(self.spec.stride) > 1 else ""
        size = f" on {'×'.join(map(str, self.spec.size))}" if any(self.spec.size) else ""
        groups = f" in {self.spec.groups} groups" if self.spec.groups > 1 else ""
        loop = " recurrence" if self.spec.state_products else ""
        return f"{self.op}{loop}{kernel} {self.spec.inputs}→{self.spec.shape[0]}{groups}{stride}{size}"

    @property
    def signature(self) -> dict[str, object]:
        """Everything that the layer's time depends on: layers with equal signatures are timed once."""
        others: dict[str, object] = {"padding": list(self.padding)} if self.padding else {}
        others |= {"side_by_side": True} if self.side_by_side else {}
        others |= {"domain": self.domain} if self.domain else {}
        # A recurrent weight has other forms than the input weight of the same node.
        others |= {"recurrence": True} if self.spec.state_products else {}
        return {
            "op": self.op,
            "attrs": {key: _plain(value) for key, value in sorted(self.attrs.items())},
            "inputs": [list(shape) if shape is not None else None for shape in self.inputs],
            "data": self.data,
            "dtype": str(self.dtype),
            "first": self.first,
            **others,
        }


def survey(
    model: onnx.ModelProto,
    batch: int = 1,
    shapes: Shapes | None = None,
    *,
    scan: bool = True,
    values: Values | None = None,
) -> tuple[DenseLayer, ...]:
    """Return the layers of a graph that can be factored, in the order of the graph.

    A layer that cannot be rewritten is left out, such as one that shares its weight with a depthwise convolution.

    Args:
        model: the dense graph; it is not changed.
        batch: size of the dynamic axes of inputs without an entry in `shapes`; default 1.
        shapes: shapes of inputs by name.
        scan: whether recurrent layers may run as a Scan; False for a GPU, default True.
        values: known values of inputs by name, where a shape can only be found by a run; default: random ones.

    Returns:
        The layers, with shapes and MACs at this batch size.

    Raises:
        ModelError: `shapes` names an input that the model does not have.

    """
    bound = onnx.ModelProto()
    bound.CopyFrom(model)
    bind_shapes(bound, batch, shapes or {})
    if unknown_axes(bound):  # such as those of tensors behind an operator that onnx does not know, and in bodies that read them
        bound.graph.value_info.extend(
            onnx.helper.make_tensor_value_info(name, kind, shape)
            for name, (kind, shape) in seen_tensors(bound, batch, shapes, values).items()
            if kind and name not in {value.name for value in (*bound.graph.input, *bound.graph.output)}
        )
    graph = import_graph(bound)
    _complete(graph, inferred_shapes(bound, data_prop=True))
    named = NamedLayers(graph)
    layers = named.rewritable()
    if any(_shape(node.inputs[0]) is None or _output(node) is None for node in layers.values()):
        _complete(graph, seen_shapes(bound, batch, shapes, values))  # such as the shapes after computed initial states
        layers = named.rewritable()
    found: list[tuple[DenseLayer, Site]] = []
    for name in layers:
        try:
            rule, sites = named.find(name)
        except GraphError:
            continue
        layer = dense_layer(name, graph, rule, sites)
        if not (scan and holds_scan(model)):
            if layer.spec.state_products:
                continue  # its cores would run in a Scan
            layer = replace(layer, spec=replace(layer.spec, scan=False))
        found.append((layer, sites[0]))
    return _with_makers(found)


def _with_makers(found: Sequence[tuple[DenseLayer, Site]]) -> tuple[DenseLayer, ...]:
    """Return the layers, each with those that make its channels where these may be fewer: single nodes of known shapes."""
    by_node = {id(site.node): layer for layer, site in found if layer.nodes == 1 and layer.output and layer.inputs[0]}
    layers = []
    for layer, site in found:
        narrow = id(site.node) in by_node and not (layer.spec.transposed or layer.spec.op == "recurrent")
        channels = channels_of(site) if narrow else None
        makers = [] if channels is None else [by_node.get(id(node)) for node in channels.makers]
        known = tuple(maker for maker in makers if maker is not None)
        layers.append(replace(layer, makers=known) if known and len(known) == len(makers) else layer)
    return tuple(layers)


def _features(op: str, attrs: Mapping[str, object], outputs: bool) -> int:
    """Return the axis of the outputs or inputs in the weight of a Gemm or a MatMul, counted from the end."""
    stored_first = bool(op == "Gemm" and attrs.get("transB", 0))
    return -2 if stored_first == outputs else -1


def _resized(shape: tuple[int, ...] | None, axis: int, size: int) -> tuple[int, ...] | None:
    """Return a shape with another size of one axis."""
    if shape is None:
        return None
    sizes = list(shape)
    sizes[axis] = size
    return tuple(sizes)


@dataclass(frozen=True)
class LeftOut:
    """A node with a weight that cannot be factored, and why."""

    name: str
    op: str
    params: int
    reason: str


def left_out(
    model: onnx.ModelProto, layers: Sequence[DenseLayer], *, scan: bool = True
) -> tuple[tuple[DenseLayer, ...], tuple[LeftOut, ...]]:
    """Return the layers that can be rewritten in a graph as it is, and what has weights and cannot.

    Args:
        model: the graph that a plan will be carried out in; it is not changed.
        layers: the layers of `survey`, whose shapes at one batch size say more than the graph itself.
        scan: as for `survey`.

    """
    named = NamedLayers(import_graph(model))
    known = {layer.name for layer in layers}
    others = [row for row in (LeftOut(*row) for row in named.refused()) if row.name not in known]
    listed = known | {row.name for row in others}
    unlisted = {name: node.op for name, node in named.rewritable().items() if name not in listed}
    kept, refused = [], []
    for layer in layers:  # last, since `find` folds weights in the graph
        try:
            named.find(layer.name)
            kept.append(layer)
        except GraphError as error:
            refused.append(LeftOut(layer.name, layer.op, layer.params, _reason(layer.name, error)))
    others += [_left_out(name, op, named, why_no_scan(model, scan)) for name, op in unlisted.items()]
    return tuple(kept), (*refused, *others)


def _left_out(name: str, op: str, named: NamedLayers, no_scan: str) -> LeftOut:
    """Return the row of a layer that could be rewritten, but that `survey` does not list; `no_scan` is why there is no Scan."""
    try:
        rule, sites = named.find(name)
    except GraphError as error:  # such as one whose name is that of two weights
        return LeftOut(name, op, 0, _reason(name, error))
    spec = rule.layer(sites[0].node)
    unknown = "the shape of its data is not known: give the shapes of the inputs"
    return LeftOut(name, op, spec.params, no_scan if spec.state_products and no_scan else unknown)


def _reason(name: str, error: GraphError) -> str:
    return str(error).removeprefix(f"layer {name}: ").removeprefix("cannot be rewritten: ")


def with_known_axes(
    model: onnx.ModelProto, batch: int = 1, shapes: Shapes | None = None, values: Values | None = None
) -> onnx.ModelProto:
    """Return the model with the number of axes of every tensor, also where onnx cannot infer it.

    A product whose data have an unknown number of axes cannot be rewritten, nor an attention with such a mask. The numbers are
    those of two runs of the model, of which one has a larger batch: an operator such as Squeeze may remove an axis of size 1.
    They are stored as shapes without sizes.

    Args:
        model: the model; it is not changed.
        batch: size of the dynamic axes of inputs without an entry in `shapes`; default 1.
        shapes: shapes of inputs by name.
        values: known values of inputs by name; other inputs are random.

    Returns:
        A copy with these shapes; the model itself if nothing is unknown or it does not run.

    Raises:
        ModelError: `shapes` names an input that the model does not have.

    """
    unknown = unknown_axes(model)
    nodes = (node for graph in (model.graph, *descendants(model.graph)) for node in graph.node)
    if not unknown or not any(node.op_type in ("Attention", "MatMul") for node in nodes):
        return model
    given = shapes or {}
    larger = {name: (shape[0] + 1, *shape[1:]) for name, shape in given.items() if len(shape) and name in _with_batch(model)}
    seen = _seen(model, batch, given, values)
    again = _seen(model, batch + 1, {**given, **larger}, values) or seen
    same = {name: seen[name] for name in unknown if name in seen and len(seen[name][1]) == len(again.get(name, seen[name])[1])}
    known = [
        onnx.helper.make_tensor_value_info(name, kind, [None] * len(shape)) for name, (kind, shape) in same.items() if kind
    ]
    if not known:
        return model
    completed = onnx.ModelProto()
    completed.CopyFrom(model)
    replaced = {value.name for value in known}
    others = [value for value in model.graph.value_info if value.name not in replaced]
    del completed.graph.value_info[:]
    completed.graph.value_info.extend([*others, *known])
    return completed


def _with_batch(model: onnx.ModelProto) -> set[str]:
    """Return the inputs whose first axis is dynamic."""
    axes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    return {name for name, own in axes.items() if own and not own[0].HasField("dim_value")}


def _seen(model: onnx.ModelProto, batch: int, shapes: Shapes, values: Values | None) -> dict[str, tuple[int, tuple[int, ...]]]:
    bound = onnx.ModelProto()
    bound.CopyFrom(model)
    return seen_tensors(bind_shapes(bound, batch, shapes), batch, shapes, values)


def _complete(graph: gs.Graph, known: Mapping[str, Sequence[int | str]]) -> None:
    """Set the known shapes of tensors whose shape is missing or incomplete."""
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable) and tensor.name in known and _shape(tensor) is None:
            tensor.shape = list(known[tensor.name])


def dense_layer(name: str, graph: gs.Graph, rule: Rule, sites: Sequence[Site]) -> DenseLayer:
    """Return the layer of some nodes that share a weight: described by the first node, with the MACs of all of them."""
    node = sites[0].node
    weight = rule.weight_input(node)
    data = 1 - weight if node.op in ("MatMul", "Gather") else 0
    pad, padding = _padding(node) if node.op == "Conv" else (None, ())
    source = node.inputs[data] if pad is None else pad.inputs[0]
    in_body = any(site.graph is not graph for site in sites)
    return DenseLayer(
        name=name,
        op=node.op,
        spec=rule.layer(node),
        nodes=len(sites),
        attrs={key: value for key, value in node.attrs.items() if not isinstance(value, gs.Graph)},
        inputs=tuple(None if tensor.is_empty() else _shape(tensor) for tensor in node.inputs),
        output=None if in_body else _output(node),
        data=data,
        dtype=np.dtype(node.inputs[weight].dtype),
        opset=graph.opset,
        first=any(source is tensor for tensor in graph.inputs),
        macs=sum(_macs(site.node, rule.layer(site.node)) for site in sites),
        input_name=node.inputs[data].name,
        output_names=tuple(next(t.name for t in site.node.outputs if not t.is_empty()) for site in sites),
        padding=padding,
        domain="" if is_standard(node) else node.domain,
        in_body=in_body,
    )


def _padding(conv: gs.Node) -> tuple[gs.Node | None, tuple[int, ...]]:
    """Return the Pad node before a convolution that ONNX Runtime computes within it, and its pads; None, () if there is none.

    It pads spatial axes with zeros, and nothing else reads its output.
    """
    data = conv.inputs[0]
    pad = data.inputs[0] if len(data.inputs) == 1 else None
    if (
        pad is None
        or pad.op != "Pad"
        or len(data.outputs) != 1
        or conv.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    ):
        return None, ()
    pads, value, axes = (_constant(pad, place) for place in (1, 2, 3))
    zeros = len(pad.inputs) < 3 or pad.inputs[2].is_empty() or (value is not None and not value.any())
    plain = pad.attrs.get("mode", "constant") == "constant" and zeros and axes is None and len(pad.inputs) < 4
    if (
        pads is None
        or not plain
        or pads.shape != (2 * len(conv.inputs[1].shape or ()),)
        or pads.min(initial=0) < 0
        or pads[[0, 1, len(pads) // 2, len(pads) // 2 + 1]].any()
    ):
        return None, ()
    return pad, tuple(int(size) for size in pads)


def _constant(node: gs.Node, place: int) -> np.ndarray | None:
    """Return the value of an input, if it is a constant."""
    if place >= len(node.inputs):
        return None
    return constant_value(node.inputs[place])


def _macs(node: gs.Node, spec: LayerSpec) -> int:
    """Return the MACs of the node; 0 if the shape of its data is not known."""
    if node.op in ("LSTM", "GRU"):
        shape = _shape(node.inputs[0])
        return 0 if shape is None else shape[0] * shape[1] * spec.params
    shape = _shape(node.outputs[0])
    if shape is None:
        return 0
    if spec.gathers:
        return 0
    if spec.transposed or node.op == "Attention":  # of an attention only the product that makes query, key and value
        source = _shape(node.inputs[0])
        return 0 if source is None else math.prod(source) * spec.params // spec.shape[1]
    return math.prod(shape) * (math.prod(spec.shape[1:]) if spec.op == "conv" else spec.shape[1])


def _output(node: gs.Node) -> tuple[int, ...] | None:
    """Return the shape of the node's first output, also if only the last state of a recurrent layer is used."""
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
        return [_plain(item) for item in value]
    return value
