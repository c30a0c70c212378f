"""What a graph costs on paper: parameters, MACs, FLOPs and bytes, from its shapes. FLOPs = 2 × MACs.

Only products are counted: Conv, ConvTranspose, Gemm, MatMul, and those of LSTM, GRU and RNN at every time step. Element-wise,
pooling, normalising and data-moving operators have no MACs in this convention; any operator that is neither is listed in
`uncounted`, never taken for zero in silence.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx

from tensorrail_runtime.records import Record
from tensorrail_runtime.session import ModelError

_NO_MACS = frozenset(
    {
        "Abs",
        "Add",
        "And",
        "ArgMax",
        "ArgMin",
        "AveragePool",
        "BatchNormalization",
        "Cast",
        "CastLike",
        "Ceil",
        "Clip",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Cos",
        "DequantizeLinear",
        "Div",
        "Dropout",
        "Elu",
        "Equal",
        "Erf",
        "Exp",
        "Expand",
        "Flatten",
        "Floor",
        "Gather",
        "Gelu",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "Greater",
        "GroupNormalization",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "InstanceNormalization",
        "LayerNormalization",
        "LeakyRelu",
        "Less",
        "Log",
        "LogSoftmax",
        "Max",
        "MaxPool",
        "Min",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Pad",
        "Pow",
        "PRelu",
        "QuantizeLinear",
        "Range",
        "Reciprocal",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceSum",
        "Relu",
        "Reshape",
        "Resize",
        "RMSNormalization",
        "Round",
        "Selu",
        "Shape",
        "Sigmoid",
        "Sign",
        "Sin",
        "Slice",
        "Softmax",
        "Softplus",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Sum",
        "Tanh",
        "Tile",
        "Transpose",
        "Unsqueeze",
        "Where",
    }
)


class NodeCost(Record):
    """One node that multiplies."""

    name: str
    op: str
    weight: str  # the constant operand's name; empty when both are computed
    input: tuple[int, ...]
    output: tuple[int, ...]
    params: int
    macs: int

    @property
    def flops(self) -> int:
        """2 × MACs."""
        return 2 * self.macs


class GraphCost(Record):
    """A whole graph at one batch size."""

    model: str
    batch: int
    params: int  # values in floating-point initializers, each counted once
    bytes: int  # of the file on disk
    macs: int
    nodes: int
    layers: tuple[NodeCost, ...]
    uncounted: tuple[str, ...]

    @property
    def flops(self) -> int:
        """2 × MACs."""
        return 2 * self.macs


def cost(path: Path | str, batch: int = 1) -> GraphCost:
    """Return the cost of a model, every dynamic axis set to `batch`; `ModelError` when shapes cannot be inferred."""
    path = Path(path)
    try:
        model = onnx.load(path)
        bound = _bind(model, batch)
        inferred = onnx.shape_inference.infer_shapes(bound, strict_mode=True, data_prop=True)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error}): expected an ONNX model") from None
    except Exception as error:  # noqa: BLE001 - protobuf and onnx raise unrelated classes
        raise ModelError(f"{path}: not an ONNX model whose shapes can be inferred ({str(error).splitlines()[0]})") from None
    shapes = _shapes(inferred.graph)
    constants = {tensor.name: tensor for tensor in inferred.graph.initializer}
    layers, uncounted = [], set()
    for node in inferred.graph.node:
        if node.op_type in _MACS:
            layers.append(_node(node, shapes, constants, path))
        elif node.op_type not in _NO_MACS:
            uncounted.add(node.op_type)
    floating = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)
    return GraphCost(
        model=path.name,
        batch=batch,
        params=sum(math.prod(t.dims) for t in constants.values() if t.data_type in floating),
        bytes=path.stat().st_size,
        macs=sum(layer.macs for layer in layers),
        nodes=len(inferred.graph.node),
        layers=tuple(layers),
        uncounted=tuple(sorted(uncounted)),
    )


def _node(
    node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]], constants: dict[str, onnx.TensorProto], path: Path
) -> NodeCost:
    needed = [*node.input[:2], *node.output[:1]] if node.output[0] else [*node.input[:2]]
    for name in needed:
        if name not in shapes:
            raise ModelError(f"{path}: the shape of {name!r} at node {node.name or node.op_type!r} cannot be inferred")
    a, b, *rest = (shapes[name] for name in needed)
    out = rest[0] if rest else ()
    weight = next((name for name in node.input[:2] if name in constants), "")
    return NodeCost(
        name=node.name,
        op=node.op_type,
        weight=weight,
        input=a,
        output=out,
        params=sum(math.prod(constants[name].dims) for name in _weights(node) if name in constants),
        macs=_MACS[node.op_type](node, a, b, out),
    )


def _conv(node: onnx.NodeProto, a: tuple[int, ...], b: tuple[int, ...], out: tuple[int, ...]) -> int:
    return math.prod(out) * math.prod(b[1:])  # weight (O, I / group, *K)


def _conv_transpose(node: onnx.NodeProto, a: tuple[int, ...], b: tuple[int, ...], out: tuple[int, ...]) -> int:
    return math.prod(a) * math.prod(b[1:])  # weight (I, O / group, *K), every input value meets it once


def _gemm(node: onnx.NodeProto, a: tuple[int, ...], b: tuple[int, ...], out: tuple[int, ...]) -> int:
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return math.prod(out) * a[0 if transposed else 1]


def _matmul(node: onnx.NodeProto, a: tuple[int, ...], b: tuple[int, ...], out: tuple[int, ...]) -> int:
    return math.prod(out) * a[-1]


def _recurrent(node: onnx.NodeProto, a: tuple[int, ...], b: tuple[int, ...], out: tuple[int, ...]) -> int:
    directions, rows, inputs = b  # X (T, B, I), W (directions, gates · H, I), R (directions, gates · H, H)
    hidden = rows // {"LSTM": 4, "GRU": 3, "RNN": 1}[node.op_type]
    return a[0] * a[1] * directions * rows * (inputs + hidden)


def _weights(node: onnx.NodeProto) -> list[str]:
    """Return the operands that may be weights: both of a product, W and R of a recurrent layer."""
    return list(node.input[1:3] if node.op_type in ("LSTM", "GRU", "RNN") else node.input[:2])


_MACS = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "GRU": _recurrent,
    "LSTM": _recurrent,
    "MatMul": _matmul,
    "RNN": _recurrent,
}


def _bind(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """Set every dynamic axis of the inputs to `batch` and forget the shapes that were stored for another batch."""
    del model.graph.value_info[:]
    names = {tensor.name for tensor in model.graph.initializer}
    for value in [v for v in model.graph.input if v.name not in names]:
        for axis in value.type.tensor_type.shape.dim:
            if not axis.HasField("dim_value"):
                axis.dim_value = batch
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    return model


def _shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        axes = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(axis.HasField("dim_value") for axis in axes):
            shapes[value.name] = tuple(int(np.int64(axis.dim_value)) for axis in axes)
    return shapes
