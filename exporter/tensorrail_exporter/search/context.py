"""Small models in which a layer is timed: several copies of it, each followed by what usually follows in a network.

ONNX Runtime's CPU convolutions compute blocks of channels, and the conversion to and from that layout is paid at the ends of
a chain, not in every layer. A layer is therefore never timed alone. Its copies form a chain, in which the output of one is
the input of the next; if the layer changes the shape, they stand side by side behind a common 1×1 convolution. The time of
one copy follows from the difference between several copies and one, in which the cost of the ends and of the call cancels.
Every copy has its own weights, so that a cache holds no larger share of them than in a network. A Pad node before a convolution
stands before every copy as well: ONNX Runtime computes both as one, which takes longer than the convolution of padded data.
An Attention of com.microsoft is timed whole: its product and the attention behind it, which its factored forms have as well.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tensorrail_exporter.formats.contraction import runs_in_scan
from tensorrail_exporter.graphs.io import export_graph, import_graph
from tensorrail_exporter.plans.padding import pad_ranks
from tensorrail_exporter.rewrite.sites import NamedLayers
from tensorrail_exporter.rewrite.survey import DenseLayer
from tensorrail_exporter.search.options import Option
from tensorrail_runtime.errors import GraphError

_COPIES = 4
_LENGTHS = 4  # index of the input of LSTM and GRU with the lengths of the sequences
_MASK = 3  # index of the input of Attention with the mask
_HEAVY = 200_000_000  # MACs of one copy, beside which the ends and the call cost little
_MEMORY = 384 * 2**20  # bytes of the weights of all copies together, at most


def copies_of(layer: DenseLayer) -> int:
    """Return the number of copies to time: 4, or fewer if the weights are very large; 2 if one alone takes long."""
    copies = _COPIES if layer.node_macs <= _HEAVY else 2
    return max(1, min(copies, _MEMORY // max(1, layer.bytes)))


def dense_context(layer: DenseLayer, copies: int) -> onnx.ModelProto:
    """Return a model of several copies of a dense layer with random weights.

    Args:
        layer: the layer, with the shapes of its input and output.
        copies: number of copies, 1 or more.

    Raises:
        GraphError: the shape of the layer's input or output is unknown, as in the body of a node.

    """
    if layer.inputs[layer.data] is None or layer.output is None:
        raise GraphError(
            f"layer {layer.name}: cannot be timed, because the shape of its input {layer.input_name!r} or of its output "
            "is unknown; give the graph's inputs their shapes, or leave the layer dense"
        )
    rng = np.random.default_rng(0)
    writer = _Writer(layer, rng)
    chained = layer.source == layer.output and not layer.side_by_side
    source = "x" if layer.first or layer.spec.op != "conv" else writer.entry("x")
    ends = []
    for copy in range(copies):
        out = writer.copy(copy, source)
        ends.append(out)
        if chained:
            source = out
    return writer.model(ends[-1:] if chained else ends)


def factored_context(layer: DenseLayer, dense: onnx.ModelProto, option: Option) -> onnx.ModelProto:
    """Return the model of `dense_context` with every copy factorized.

    Args:
        layer: the layer.
        dense: the model that `dense_context` returned for it.
        option: the form of the layer. The cores are random, which does not change the time.

    """
    rng = np.random.default_rng(0)
    graph = import_graph(dense)
    for node in graph.nodes:
        for tensor in node.outputs:
            tensor.dtype = layer.dtype  # shape inference does not set it, but a rule may need it
    named = NamedLayers(graph)
    for node in [node for node in graph.nodes if node.name.startswith("copy")]:
        plan = option.plan(node.inputs[2].name if layer.spec.state_products else node.name)
        rule, sites = named.find(plan.name)
        spec = replace(rule.layer(sites[0].node), scan=layer.spec.scan)
        cores = [_random(rng, shape, layer.dtype) for shape in plan.core_shapes(spec.shape, spec.groups)]
        steps = plan.contraction(pad_ranks(plan, cores, spec.shape, option.block, spec.groups), spec)
        rule.rewrite(replace(sites[0], scan=runs_in_scan(steps, spec)), steps, plan.name)
    return export_graph(graph, dense)


class _Writer:
    """Builds the model of `dense_context`."""

    def __init__(self, layer: DenseLayer, rng: np.random.Generator) -> None:
        self.layer, self.rng = layer, rng
        self.kind = helper.np_dtype_to_tensor_dtype(layer.dtype)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    def entry(self, source: str) -> str:
        """Add a 1×1 convolution, which brings the data into the layout that they have inside a network."""
        shape = self.layer.inputs[self.layer.data]
        channels = shape[1] if shape else 1
        self._constant("entry/weight", (channels, channels, *(1,) * self.layer.spec.spatial))
        self.nodes.append(helper.make_node("Conv", [source, "entry/weight"], ["entry"], "entry"))
        self.nodes.append(helper.make_node("Relu", ["entry"], ["entered"], "entry_relu"))
        return "entered"

    def copy(self, index: int, source: str) -> str:
        """Add one copy of the layer, for a convolution with a Relu behind it, and return the name of its output."""
        layer = self.layer
        names = []
        if layer.padding:
            source = self._padded(index, source)
        for place, shape in enumerate(layer.inputs):
            if place == layer.data:
                names.append(source)
            elif shape is None:
                names.append("")
            else:
                names.append(f"copy{index}/input{place}")
                self._operand(names[-1], place, shape)
        while names and not names[-1]:
            names.pop()
        out = f"out{index}"
        self.nodes.append(helper.make_node(layer.op, names, [out], f"copy{index}", domain=layer.domain))
        self.nodes[-1].attribute.extend(helper.make_attribute(key, value) for key, value in layer.attrs.items())
        if layer.spec.op != "conv":
            return out
        self.nodes.append(helper.make_node("Relu", [out], [f"relu{index}"], f"relu{index}"))
        return f"relu{index}"

    def _padded(self, index: int, source: str) -> str:
        pads = f"pad{index}/pads"
        self.constants.append(numpy_helper.from_array(np.array(self.layer.padding, np.int64), pads))
        self.nodes.append(helper.make_node("Pad", [source, pads], [f"pad{index}"], f"pad{index}"))
        return f"pad{index}"

    def model(self, ends: list[str]) -> onnx.ModelProto:
        """Return the model, whose output is the sum of these tensors."""
        layer = self.layer
        out = ends[0]
        if len(ends) > 1:
            out = "sum"
            self.nodes.append(helper.make_node("Sum", ends, [out], "sum"))
        graph = helper.make_graph(
            self.nodes,
            "context",
            [helper.make_tensor_value_info("x", TensorProto.INT64 if layer.spec.gathers else self.kind, layer.source)],
            [helper.make_tensor_value_info(out, self.kind, layer.output)],
            self.constants,
        )
        opsets = [helper.make_opsetid("", layer.opset)]
        if layer.domain:  # onnx does not infer the shapes behind it
            between = sorted({name for node in self.nodes for name in node.input if name.startswith("out")} - {out})
            graph.value_info.extend(helper.make_tensor_value_info(name, self.kind, layer.output) for name in between)
            opsets.append(helper.make_opsetid(layer.domain, 1))
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)

    def _operand(self, name: str, place: int, shape: tuple[int, ...]) -> None:
        """Add a constant for another input than the data: random values, lengths of the whole sequence, a mask of ones."""
        data = self.layer.inputs[self.layer.data]
        if data is not None and self.layer.op in ("LSTM", "GRU") and place == _LENGTHS:
            self.constants.append(numpy_helper.from_array(np.full(shape, data[0], np.int32), name))
        elif data is not None and self.layer.op == "Attention" and place == _MASK:
            full = data[1] if len(shape) == 1 else 1  # lengths, or which tokens count
            self.constants.append(numpy_helper.from_array(np.full(shape, full, np.int32), name))
        else:
            self._constant(name, shape)

    def _constant(self, name: str, shape: tuple[int, ...]) -> None:
        self.constants.append(numpy_helper.from_array(_random(self.rng, shape, self.layer.dtype), name))


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return random weights with which values neither grow nor vanish along a chain: denormal numbers would be slow."""
    scale = np.float32((2 / max(1, math.prod(shape[1:]))) ** 0.5)
    values: np.ndarray = (rng.standard_normal(shape, np.float32) * scale).astype(dtype)
    return values
