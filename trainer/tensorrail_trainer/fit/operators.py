"""The ONNX operators that the fit supports, each as a torch function, in the dictionary `OPERATORS`.

A function takes a node, for its attributes and opset, and the inputs of the node, and returns its outputs. Other operators, and
the variants that `tensorrail_trainer.fit.limits` excludes, raise an error when a graph is read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tensorrail_trainer.fit import layers as layers
from tensorrail_trainer.fit.layers import Outputs
from tensorrail_trainer.fit.node import DTYPES, Inputs, Node

Operator = Callable[[Node, Inputs], Outputs]

_SELU = (1.6732632423543772, 1.0507009873554805)  # default alpha and gamma: Klambauer et al., NIPS 2017


def _each(function: Callable[..., Any]) -> Operator:
    """Return an operator without attributes, which applies a function to all inputs."""
    return lambda node, inputs: (function(*inputs),)


def _fold(function: Callable[[Any, Any], Any]) -> Operator:
    """Return an operator with any number of inputs, which are combined by a function of two."""
    return lambda node, inputs: (functools.reduce(function, inputs),)


def _reduce(function: Callable[..., Tensor]) -> Operator:
    def run(node: Node, inputs: Inputs) -> Outputs:
        x, axes = inputs[0], node.integers(inputs, 1, "axes")
        if not axes and node.get("noop_with_empty_axes", 0):
            return (x,)
        return (function(x, axes or list(range(x.dim())), bool(node.get("keepdims", 1))),)

    return run


def _softmax(function: Callable[..., Tensor]) -> Operator:
    def run(node: Node, inputs: Inputs) -> Outputs:
        x = inputs[0]
        if node.opset >= 13:
            return (function(x, node.get("axis", -1)),)
        rows = _flat(x, node.get("axis", 1))  # before opset 13 softmax applies to all axes from `axis` on
        return (function(rows, 1).reshape(x.shape),)

    return run


def _flat(x: Tensor, axis: int) -> Tensor:
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _clip(node: Node, inputs: Inputs) -> Outputs:
    low, high = node.scalar(inputs, 1, "min"), node.scalar(inputs, 2, "max")
    return (inputs[0] if low is None and high is None else torch.clamp(inputs[0], low, high),)


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, slope * x, x)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _power(node: Node, inputs: Inputs) -> Outputs:
    return (torch.pow(inputs[0], node.scalar(inputs, 1)).to(inputs[0].dtype),)


def _gemm(node: Node, inputs: Inputs) -> Outputs:
    a, b, c = inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    a = a.T if node.get("transA", 0) else a
    if node.get("transB", 0) and alpha == 1.0 and (c is None or (beta == 1.0 and c.dim() == 1)):
        return (F.linear(a, b, c),)
    b = b.T if node.get("transB", 0) else b
    return ((a @ b) * alpha if c is None else torch.addmm(c, a, b, beta=beta, alpha=alpha),)


def _flatten(node: Node, inputs: Inputs) -> Outputs:
    return (_flat(inputs[0], node.get("axis", 1)),)


def _reshape(node: Node, inputs: Inputs) -> Outputs:
    x, shape = inputs[0], node.integers(inputs, 1, "shape") or []
    if not node.get("allowzero", 0):
        shape = [x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
    return (x.reshape(shape),)


def _squeeze(node: Node, inputs: Inputs) -> Outputs:
    axes = node.integers(inputs, 1, "axes")
    return (inputs[0].squeeze() if axes is None else inputs[0].squeeze(tuple(axes)),)


def _unsqueeze(node: Node, inputs: Inputs) -> Outputs:
    x, axes = inputs[0], node.integers(inputs, 1, "axes") or []
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return (x,)


def _transpose(node: Node, inputs: Inputs) -> Outputs:
    return (inputs[0].permute(node.get("perm", list(reversed(range(inputs[0].dim()))))),)


def _concat(node: Node, inputs: Inputs) -> Outputs:
    return (torch.cat(list(inputs), node.get("axis", 1)),)


def _split(node: Node, inputs: Inputs) -> Outputs:
    x, axis, count = inputs[0], node.get("axis", 0), len(node.outputs)
    sizes = node.integers(inputs, 1, "split")
    if sizes is None:
        size = -(-x.shape[axis] // count)  # the last part may be smaller
        sizes = [size] * (count - 1) + [x.shape[axis] - size * (count - 1)]
    return tuple(torch.split(x, sizes, axis))


def _slice(node: Node, inputs: Inputs) -> Outputs:
    x = inputs[0]
    starts, ends = node.integers(inputs, 1, "starts") or [], node.integers(inputs, 2, "ends") or []
    axes = node.integers(inputs, 3, "axes") or list(range(len(starts)))
    steps = node.integers(inputs, 4) or [1] * len(starts)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        indices = range(x.shape[axis])[start:end:step]
        if step == 1:
            x = x.narrow(axis, min(indices.start, x.shape[axis]), len(indices))
        else:
            x = x.index_select(axis, torch.tensor(list(indices), dtype=torch.int64, device=x.device))
    return (x,)


def _gather(node: Node, inputs: Inputs) -> Outputs:
    x, indices = inputs
    axis = node.get("axis", 0) % x.dim()
    constant = node.constants.get(1)
    if isinstance(constant, int):
        return (x.select(axis, constant),)
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    rows = x.index_select(axis, indices.reshape(-1))
    return (rows.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])),)


def _expand(node: Node, inputs: Inputs) -> Outputs:
    x = inputs[0]
    return (x.expand(torch.broadcast_shapes(x.shape, node.integers(inputs, 1) or [])),)


def _constant(node: Node, inputs: Inputs) -> Outputs:
    if "value" in node.attributes:
        return (node.attributes["value"],)
    ((name, value),) = node.attributes.items()
    return (torch.tensor(value, dtype=torch.float32 if "float" in name else torch.int64),)


def _constant_of_shape(node: Node, inputs: Inputs) -> Outputs:
    value = node.get("value", torch.zeros(1)).reshape(())
    return (value.to(inputs[0].device).expand(node.integers(inputs, 0) or []),)


def _eye_like(node: Node, inputs: Inputs) -> Outputs:
    x = inputs[0]
    rows, columns = x.shape
    dtype = node.get("dtype")
    ones = torch.ones(rows, columns, dtype=x.dtype if dtype is None else DTYPES[dtype], device=x.device)
    return (ones.triu(node.get("k", 0)).tril(node.get("k", 0)),)


def _shape(node: Node, inputs: Inputs) -> Outputs:
    sizes = list(inputs[0].shape)[node.get("start", 0) : node.get("end")]
    return (torch.tensor(sizes, dtype=torch.int64, device=inputs[0].device),)


def _range(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype, device=start.device)


def _pad(node: Node, inputs: Inputs) -> Outputs:
    x, pads = inputs[0], node.integers(inputs, 1, "pads") or []
    axes = node.integers(inputs, 3) or list(range(len(pads) // 2))
    begins, ends = [0] * x.dim(), [0] * x.dim()
    for k, axis in enumerate(axes):
        begins[axis], ends[axis] = pads[k], pads[len(axes) + k]
    mode = node.get("mode", "constant")
    if mode == "constant":
        value = node.scalar(inputs, 2, "value")
        amounts = [amount for axis in reversed(range(x.dim())) for amount in (begins[axis], ends[axis])]
        return (F.pad(x, amounts, value=float(value if value is not None else 0.0)),)
    for axis, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        if begin or end:
            x = x.index_select(axis, _border(x.shape[axis], begin, end, mode).to(x.device))
    return (x,)


def _border(size: int, begin: int, end: int, mode: str) -> Tensor:
    """Return the indices that padding repeats: of the border (edge), mirrored at it (reflect), or of the other side (wrap)."""
    indices = torch.arange(-begin, size + end)
    match mode:
        case "edge":
            return indices.clamp(0, size - 1)
        case "reflect":
            last = max(size - 1, 1)
            return last - (indices.abs() % (2 * last) - last).abs()
        case _:
            return indices % size


def _dropout(node: Node, inputs: Inputs) -> Outputs:
    return inputs[0], torch.ones_like(inputs[0], dtype=torch.bool)


OPERATORS: dict[str, Operator] = {
    "Abs": _each(torch.abs),
    "Add": _each(torch.add),
    "And": _each(torch.logical_and),
    "AveragePool": layers.average_pool,
    "BatchNormalization": layers.batch_normalization,
    "Cast": lambda node, inputs: (inputs[0].to(DTYPES[node.attributes["to"]]),),
    "CastLike": _each(lambda x, like: x.to(like.dtype)),
    "Clip": _clip,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Conv": layers.convolution,
    "ConvTranspose": layers.transposed_convolution,
    "Div": _each(_divide),
    "Dropout": _dropout,
    "Elu": lambda node, inputs: (F.elu(inputs[0], node.get("alpha", 1.0)),),
    "Equal": _each(torch.eq),
    "Erf": _each(torch.erf),
    "Exp": _each(torch.exp),
    "Expand": _expand,
    "EyeLike": _eye_like,
    "Flatten": _flatten,
    "GRU": layers.gru,
    "Gather": _gather,
    "Gelu": lambda node, inputs: (F.gelu(inputs[0], approximate=node.get("approximate", "none")),),
    "Gemm": _gemm,
    "GlobalAveragePool": layers.global_average_pool,
    "GlobalMaxPool": layers.global_max_pool,
    "Greater": _each(torch.gt),
    "HardSigmoid": lambda node, inputs: (torch.clamp(inputs[0] * node.get("alpha", 0.2) + node.get("beta", 0.5), 0.0, 1.0),),
    "HardSwish": _each(F.hardswish),
    "Identity": _each(lambda x: x),
    "InstanceNormalization": layers.instance_normalization,
    "LRN": layers.local_response_normalization,
    "LSTM": layers.lstm,
    "LayerNormalization": layers.layer_normalization,
    "LeakyRelu": lambda node, inputs: (F.leaky_relu(inputs[0], node.get("alpha", 0.01)),),
    "Less": _each(torch.lt),
    "Log": _each(torch.log),
    "LogSoftmax": _softmax(torch.log_softmax),
    "MatMul": _each(torch.matmul),
    "Max": _fold(torch.maximum),
    "MaxPool": layers.max_pool,
    "Min": _fold(torch.minimum),
    "Mish": _each(F.mish),
    "Mod": lambda node, inputs: ((torch.fmod if node.get("fmod", 0) else torch.remainder)(*inputs),),
    "Mul": _each(torch.mul),
    "Neg": _each(torch.neg),
    "Not": _each(torch.logical_not),
    "Or": _each(torch.logical_or),
    "PRelu": _each(_prelu),
    "Pad": _pad,
    "Pow": _power,
    "Range": _each(_range),
    "Reciprocal": _each(torch.reciprocal),
    "ReduceL1": _reduce(lambda x, axes, keep: torch.linalg.vector_norm(x, 1, axes, keep)),
    "ReduceL2": _reduce(lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep)),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceSum": _reduce(torch.sum),
    "Relu": _each(torch.relu),
    "Reshape": _reshape,
    "Selu": lambda node, inputs: (node.get("gamma", _SELU[1]) * F.elu(inputs[0], node.get("alpha", _SELU[0])),),
    "Shape": _shape,
    "Sigmoid": _each(torch.sigmoid),
    "Slice": _slice,
    "Softmax": _softmax(torch.softmax),
    "Softplus": _each(F.softplus),
    "Split": _split,
    "Sqrt": _each(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _each(torch.sub),
    "Sum": _fold(torch.add),
    "Tanh": _each(torch.tanh),
    "Tile": lambda node, inputs: (inputs[0].repeat(node.integers(inputs, 1)),),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _each(torch.where),
}
