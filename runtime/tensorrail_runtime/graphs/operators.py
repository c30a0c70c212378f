"""Counts the MACs of ONNX operators, and lists the operators that have none.

Element-wise, pooling, normalising and data-moving operators have no MACs in this convention.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx

from tensorrail_runtime.sessions.kernels import CONTRIB as CONTRIB

Shape = tuple[int, ...]
CountMacs = Callable[[onnx.NodeProto, list[Shape], Shape], int]
"""Counts the MACs of a node from the shapes of its operands and of its output."""

DOMAINS = ("", "ai.onnx", CONTRIB)  # other domains use the same names for other operators

# fmt: off
NO_MACS = frozenset((
    "Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh", "AveragePool",
    "BatchNormalization", "Bernoulli", "BitCast", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor",
    "BlackmanWindow", "Cast",
    "CastLike", "Ceil", "Celu", "CenterCropPad", "Clip", "Col2Im", "Compress", "Concat", "ConcatFromSequence", "Constant",
    "ConstantOfShape", "Cos", "Cosh", "CumProd", "CumSum", "DepthToSpace", "DequantizeLinear", "Div", "Dropout",
    "DynamicQuantizeLinear", "Elu", "Equal", "Erf", "Exp", "Expand", "EyeLike", "Flatten", "Floor", "Gather",
    "GatherElements", "GatherND", "Gelu", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "Greater", "GreaterOrEqual",
    "GridSample", "GroupNormalization", "HammingWindow", "HannWindow", "HardSigmoid", "HardSwish", "Hardmax", "Identity",
    "InstanceNormalization", "IsInf", "IsNaN", "LRN", "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log",
    "LogSoftmax", "LpNormalization", "LpPool", "Max", "MaxPool", "MaxRoiPool", "MaxUnpool", "Mean",
    "MeanVarianceNormalization", "Min", "Mish", "Mod", "Mul", "Multinomial", "Neg", "NonMaxSuppression", "NonZero", "Not",
    "OneHot", "Optional", "OptionalGetElement", "OptionalHasElement", "Or", "PRelu", "Pad", "Pow", "QuantizeLinear",
    "RMSNormalization", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Range", "Reciprocal",
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Resize", "ReverseSequence", "RoiAlign", "RotaryEmbedding", "Round",
    "Scatter", "ScatterElements", "ScatterND", "Selu", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase",
    "SequenceInsert", "SequenceLength", "Shape", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Size", "Slice", "Softmax",
    "SoftmaxCrossEntropyLoss", "Softplus", "Softsign", "SpaceToDepth", "Split", "SplitToSequence", "Sqrt", "Squeeze", "Sub",
    "Sum", "Swish", "Tan", "Tanh", "TensorScatter", "ThresholdedRelu", "Tile", "TopK", "Transpose", "Trilu", "Unique",
    "Unsqueeze", "Upsample", "Where", "Xor",
))

CONTRIB_NO_MACS = frozenset((  # of com.microsoft: ONNX Runtime's optimizer and quantizer create them
    "BiasAdd", "BiasDropout", "BiasGelu", "BiasSoftmax", "BiasSplitGelu", "CropAndResize", "DequantizeLinear",
    "EmbedLayerNormalization", "ExpandDims", "FastGelu", "GatherND", "Gelu", "GroupNorm", "LayerNormalization", "NhwcMaxPool",
    "QLinearAdd", "QLinearAveragePool", "QLinearConcat", "QLinearGlobalAveragePool", "QLinearLeakyRelu", "QLinearMul",
    "QLinearReduceMean", "QLinearSigmoid", "QLinearSoftmax", "QLinearWhere", "QuantizeLinear", "QuickGelu", "Range",
    "RotaryEmbedding", "SimplifiedLayerNormalization", "SkipGroupNorm", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization", "Trilu", "Unique",
))
# fmt: on


def constant_tensor(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """Return the value of a Constant node as a tensor, however it is stored; None for another node or a sparse value."""
    tensor: onnx.TensorProto
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx") or not node.output:
        return None
    for attribute in node.attribute:
        if attribute.name == "value":
            tensor = attribute.t
            return tensor
        if attribute.name in _PLAIN:
            values = np.asarray(onnx.helper.get_attribute_value(attribute), _PLAIN[attribute.name])
            tensor = onnx.numpy_helper.from_array(values, node.output[0])
            return tensor
    return None


_PLAIN = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
    "value_string": object,
    "value_strings": object,
}
"""The attributes of a Constant that hold numbers or text in place of a tensor, and NumPy's type of these."""


def operands_of(node: onnx.NodeProto) -> list[str]:
    """Return the names of the tensors that a node multiplies; for an attention, empty names for those that it does not have."""
    if node.op_type in CONTRIB_MACS:
        return [node.input[index] if index < len(node.input) else "" for index in _ATTENDED[node.op_type]]
    indices = range(len(node.input)) if node.op_type == "Einsum" else _OPERANDS.get(node.op_type, (0, 1))
    return [node.input[index] for index in indices]


def macs_function(node: onnx.NodeProto) -> CountMacs | None:
    """Return what counts the MACs of a node; None if nothing does."""
    if node.domain == CONTRIB and node.op_type in CONTRIB_MACS:
        return CONTRIB_MACS[node.op_type]
    return MACS.get(node.op_type) if node.domain in DOMAINS else None


def _conv(_: onnx.NodeProto, operands: list[Shape], out: Shape) -> int:
    return math.prod(out) * math.prod(operands[1][1:])  # weight (O, I / group, *K)


def _conv_transpose(_: onnx.NodeProto, operands: list[Shape], __: Shape) -> int:
    # Each input value is multiplied once with each entry of its slice of the weight (I, O / group, *K).
    return math.prod(operands[0]) * math.prod(operands[1][1:])


def _gemm(node: onnx.NodeProto, operands: list[Shape], out: Shape) -> int:
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return math.prod(out) * operands[0][0 if transposed else 1]


def _matmul(node: onnx.NodeProto, operands: list[Shape], out: Shape) -> int:
    flags = {attribute.name for attribute in node.attribute if attribute.i}  # of a FusedMatMul
    shape = operands[0]
    if "transBatchA" in flags and len(shape) > 2:  # (M, batch, K) is read as (batch, M, K)
        shape = (*shape[1:-1], shape[0], shape[-1])
    return math.prod(out) * shape[-2 if "transA" in flags else -1]


def _recurrent(node: onnx.NodeProto, operands: list[Shape], _: Shape) -> int:
    (steps, batch, __), (directions, rows, inputs) = operands  # X (T, B, I), W (directions, gates · H, I), R (…, gates · H, H)
    hidden = rows // {"LSTM": 4, "GRU": 3, "RNN": 1}[node.op_type]
    return steps * batch * directions * rows * (inputs + hidden)


def _einsum(node: onnx.NodeProto, operands: list[Shape], __: Shape) -> int:
    """Count the MACs of contracting two operands at a time, from the left, as ONNX Runtime does.

    An axis that only one operand has is summed first.
    """
    equation = next(attribute.s.decode() for attribute in node.attribute if attribute.name == "equation").replace(" ", "")
    left, arrow, right = equation.partition("->")
    sizes: dict[str, int] = {}
    terms = []
    for term, shape in zip(left.split(","), operands, strict=True):
        rest = len(shape) - len(term.replace("...", ""))
        before, _, after = term.partition("...")
        labels = [*before, *(f"...{k}" for k in range(rest, 0, -1)), *after]  # the axes of ... are aligned on the right
        for label, size in zip(labels, shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
        terms.append(set(labels))
    output_labels = right if arrow else [label for label in sizes if left.count(label) == 1]
    out = {label for label in sizes if label in output_labels or label.startswith("...")}
    macs, contracted = 0, terms[0]
    for number, term in enumerate(terms[1:], 1):
        needed = out.union(*terms[number + 1 :])  # labels of the output and of later operands
        contracted = (contracted & (needed | term)) | (term & (needed | contracted))
        macs += math.prod(sizes[label] for label in contracted)
        contracted &= needed
    return macs


def _attention(node: onnx.NodeProto, operands: list[Shape], _: Shape) -> int:
    """Count the product that makes query, key and value, and those of the attention itself."""
    data, weight, past = operands  # (B, S, I), (I, Q + K + V), (2, B, N, P, D)
    given = next((tuple(one.ints) for one in node.attribute if one.name == "qkv_hidden_sizes"), ())
    query, _key, value = given or (weight[1] // 3,) * 3
    total = data[1] + (past[3] if past else 0)
    return math.prod(data[:2]) * (math.prod(weight) + total * int(query + value))


def _multi_head_attention(_: onnx.NodeProto, operands: list[Shape], out: Shape) -> int:
    """Count QKᵀ and the product with V; the three may be packed in one tensor, or have the heads before the tokens."""
    query, key, past = operands  # (B, S, Q) or (B, S, N, 3, D); (B, T, Q), (B, T, N, 2, D) or (B, N, T, D); (B, N, P, D)
    width = query[2] * query[4] if len(query) > 3 else query[2]
    total = (key[2] if len(key) == 4 else key[1]) if key else query[1]
    return math.prod(query[:2]) * (total + (past[2] if past else 0)) * (width + out[2])


_OPERANDS = {"QLinearConv": (0, 3), "QLinearMatMul": (0, 3)}  # the two factors, where they are not the first two inputs
_ATTENDED = {"Attention": (0, 1, 4), "MultiHeadAttention": (0, 1, 6)}  # what MACs are counted by, with the past

MACS = {
    "Conv": _conv,
    "ConvInteger": _conv,
    "ConvTranspose": _conv_transpose,
    "DynamicQuantizeMatMul": _matmul,
    "Einsum": _einsum,
    "FusedConv": _conv,
    "FusedGemm": _gemm,
    "FusedMatMul": _matmul,
    "Gemm": _gemm,
    "GRU": _recurrent,
    "LSTM": _recurrent,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "MatMulIntegerToFloat": _matmul,
    "QLinearConv": _conv,
    "QLinearMatMul": _matmul,
    "RNN": _recurrent,
}

CONTRIB_MACS = {"Attention": _attention, "MultiHeadAttention": _multi_head_attention}
"""The same of operators of com.microsoft whose names mean something else in ONNX, or nothing."""
