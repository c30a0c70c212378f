"""The ONNX operators for layers: convolutions, pooling, normalization, LSTM and GRU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tensorrail_exporter.rewrite.rules.recurrent import TORCH_FROM_ONNX
from tensorrail_trainer.fit.node import Inputs, Node

Outputs = tuple[Tensor, ...]

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOL: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE_POOL: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def convolution(node: Node, inputs: Inputs) -> Outputs:
    """Conv: (B, I, *S) with a kernel (O, I / groups, *K)."""
    x, weight, bias = _filled(inputs, 3)
    nd = x.dim() - 2
    stride, dilation = node.get("strides", [1] * nd), node.get("dilations", [1] * nd)
    begins, ends = _pads(node, x.shape[2:], weight.shape[2:], stride, dilation)
    if begins != ends:
        x, begins = _padded(x, begins, ends), [0] * nd
    return (_CONV[nd](x, weight, bias, stride, begins, dilation, node.get("group", 1)),)


def transposed_convolution(node: Node, inputs: Inputs) -> Outputs:
    """ConvTranspose: (B, I, *S) with a kernel (I, O / groups, *K); unequal pads are removed from the output."""
    x, weight, bias = _filled(inputs, 3)
    nd = x.dim() - 2
    stride, dilation = node.get("strides", [1] * nd), node.get("dilations", [1] * nd)
    output_padding, group = node.get("output_padding", [0] * nd), node.get("group", 1)
    begins, ends = _pads(node, x.shape[2:], weight.shape[2:], stride, dilation)
    if begins == ends:
        return (_CONV_TRANSPOSE[nd](x, weight, bias, stride, begins, output_padding, group, dilation),)
    y = _CONV_TRANSPOSE[nd](x, weight, bias, stride, 0, output_padding, group, dilation)
    return (_padded(y, [-pad for pad in begins], [-pad for pad in ends]),)


def max_pool(node: Node, inputs: Inputs) -> Outputs:
    """MaxPool, without indices."""
    x = inputs[0]
    nd = x.dim() - 2
    kernel, stride = node.attributes["kernel_shape"], node.get("strides", [1] * nd)
    dilation = node.get("dilations", [1] * nd)
    begins, ends = _pads(node, x.shape[2:], kernel, stride, dilation)
    if _torch_pads(node, begins, ends, kernel):
        return (_MAX_POOL[nd](x, kernel, stride, begins, dilation),)
    last = _last(node, x, kernel, stride, dilation, begins, ends)
    return (_MAX_POOL[nd](_padded(x, begins, last, -math.inf), kernel, stride, 0, dilation),)


def average_pool(node: Node, inputs: Inputs) -> Outputs:
    """AveragePool, without dilation.

    The sum of a window is divided by the number of its elements in the image, and with `count_include_pad` also in the padding,
    but not in the extension that `ceil_mode` adds.
    """
    x = inputs[0]
    nd = x.dim() - 2
    kernel, stride = node.attributes["kernel_shape"], node.get("strides", [1] * nd)
    include = bool(node.get("count_include_pad", 0))
    begins, ends = _pads(node, x.shape[2:], kernel, stride, [1] * nd)
    if _torch_pads(node, begins, ends, kernel):
        return (_AVERAGE_POOL[nd](x, kernel, stride, begins, False, include),)
    last = _last(node, x, kernel, stride, [1] * nd, begins, ends)
    ones = torch.ones_like(x[:1, :1])
    if include:
        ones = _padded(_padded(ones, begins, ends, 1.0), [0] * nd, [a - b for a, b in zip(last, ends, strict=True)])
    else:
        ones = _padded(ones, begins, last)
    return (_AVERAGE_POOL[nd](_padded(x, begins, last), kernel, stride) / _AVERAGE_POOL[nd](ones, kernel, stride),)


def global_average_pool(node: Node, inputs: Inputs) -> Outputs:
    """GlobalAveragePool: (B, C, *S) → (B, C, 1, …)."""
    return (inputs[0].mean(tuple(range(2, inputs[0].dim())), keepdim=True),)


def global_max_pool(node: Node, inputs: Inputs) -> Outputs:
    """GlobalMaxPool: (B, C, *S) → (B, C, 1, …)."""
    return (inputs[0].amax(tuple(range(2, inputs[0].dim())), keepdim=True),)


def batch_normalization(node: Node, inputs: Inputs) -> Outputs:
    """BatchNormalization with the stored statistics."""
    x, scale, bias, mean, variance = inputs
    return (F.batch_norm(x, mean, variance, scale, bias, False, 0.0, node.get("epsilon", 1e-5)),)


def layer_normalization(node: Node, inputs: Inputs) -> Outputs:
    """LayerNormalization over the axes from `axis` on."""
    x, scale, bias = _filled(inputs, 3)
    shape = list(x.shape[node.get("axis", -1) :])
    epsilon = node.get("epsilon", 1e-5)
    if list(scale.shape) == shape and (bias is None or list(bias.shape) == shape):
        return (F.layer_norm(x, shape, scale, bias, epsilon),)
    y = F.layer_norm(x, shape, None, None, epsilon) * scale
    return (y if bias is None else y + bias,)


def local_response_normalization(node: Node, inputs: Inputs) -> Outputs:
    """LRN over an odd number of channels, as in AlexNet."""
    size, alpha, beta = node.attributes["size"], node.get("alpha", 1e-4), node.get("beta", 0.75)
    return (F.local_response_norm(inputs[0], size, alpha, beta, node.get("bias", 1.0)),)


def instance_normalization(node: Node, inputs: Inputs) -> Outputs:
    """InstanceNormalization: each channel of each sample is normalized."""
    x, scale, bias = inputs
    return (F.instance_norm(x, weight=scale, bias=bias, eps=node.get("epsilon", 1e-5)),)


def lstm(node: Node, inputs: Inputs) -> Outputs:
    """LSTM: X (T, B, I) → Y (T, directions, B, H), Y_h and Y_c (directions, B, H).

    torch.lstm is called in training mode, which cuDNN requires for gradients; dropout is 0.
    """
    x, weight, recurrent, bias, _, h, c = _filled(inputs, 7)
    zeros = x.new_zeros(weight.shape[0], x.shape[1], recurrent.shape[2])
    states = [zeros if state is None else state for state in (h, c)]
    reverse = node.get("direction", "forward") == "reverse"
    flat = _flat_weights(node.op, weight, recurrent, bias)
    x = x.flip(0) if reverse else x
    y, h, c = torch.lstm(x, states, flat, bias is not None, 1, 0.0, True, len(weight) == 2, False)
    return _by_direction(y, len(weight), reverse), h, c


def gru(node: Node, inputs: Inputs) -> Outputs:
    """GRU: X (T, B, I) → Y (T, directions, B, H) and Y_h (directions, B, H)."""
    x, weight, recurrent, bias, _, h = _filled(inputs, 6)
    h = x.new_zeros(weight.shape[0], x.shape[1], recurrent.shape[2]) if h is None else h
    reverse = node.get("direction", "forward") == "reverse"
    if not node.get("linear_before_reset", 0):
        bias = weight.new_zeros(len(weight), 2 * weight.shape[1]) if bias is None else bias
        backwards = [reverse] if len(weight) == 1 else [False, True]
        runs = [_gru_reset_first(x, *values) for values in zip(weight, recurrent, bias, h, backwards, strict=True)]
        ys, hs = zip(*runs, strict=True)
        return torch.stack(ys, 1), torch.stack(hs)
    flat = _flat_weights(node.op, weight, recurrent, bias)
    x = x.flip(0) if reverse else x
    y, h = torch.gru(x, h, flat, bias is not None, 1, 0.0, True, len(weight) == 2, False)
    return _by_direction(y, len(weight), reverse), h


def _gru_reset_first(
    x: Tensor, weight: Tensor, recurrent: Tensor, bias: Tensor, h: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Run one direction of a GRU that resets the state before the recurrent product, a variant that torch does not have.

    hₜ = (1 − z) ∘ tanh(W x + R (r ∘ hₜ₋₁) + b) + z ∘ hₜ₋₁, with the gates z, r, h in ONNX's order.
    """
    size = recurrent.shape[1]
    own, state_bias = bias.chunk(2)
    projected = x @ weight.T + own + state_bias
    gates, candidate = recurrent[: 2 * size], recurrent[2 * size :]
    ys: list[Tensor] = []
    steps = projected.flip(0) if reverse else projected
    for step in steps.unbind(0):
        z, r = torch.sigmoid(step[:, : 2 * size] + h @ gates.T).chunk(2, 1)
        h = (1 - z) * torch.tanh(step[:, 2 * size :] + (r * h) @ candidate.T) + z * h
        ys.append(h)
    y = torch.stack(ys)
    return (y.flip(0) if reverse else y), h


def _flat_weights(op: str, weight: Tensor, recurrent: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Convert ONNX's weights (directions, gates · H, …) to torch's list of weights, one direction after another."""
    flat: list[Tensor] = []
    for direction in range(len(weight)):
        values = [weight[direction], recurrent[direction], *([] if bias is None else bias[direction].chunk(2))]
        for value in values:
            gates = value.reshape(len(TORCH_FROM_ONNX[op]), -1, *value.shape[1:])
            flat.append(gates[list(TORCH_FROM_ONNX[op])].reshape(value.shape))
    return flat


def _by_direction(y: Tensor, directions: int, reverse: bool) -> Tensor:
    y = y.reshape(*y.shape[:2], directions, -1).transpose(1, 2)  # (T, B, directions · H) → (T, directions, B, H)
    return y.flip(0) if reverse else y


def _filled(inputs: Inputs, count: int) -> tuple[Any, ...]:
    return tuple(inputs[index] if index < len(inputs) else None for index in range(count))


def _pads(
    node: Node, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return the padding before and after each spatial axis, with `auto_pad` resolved for this size."""
    nd = len(size)
    auto = node.get("auto_pad", "NOTSET")
    if not auto.startswith("SAME"):
        pads = node.get("pads", [0] * (2 * nd)) if auto != "VALID" else [0] * (2 * nd)
        return pads[:nd], pads[nd:]
    axes = zip(size, kernel, stride, dilation, strict=True)
    totals = [max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0) for n, k, s, d in axes]
    smaller, larger = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return (smaller, larger) if auto == "SAME_UPPER" else (larger, smaller)


def _torch_pads(node: Node, begins: list[int], ends: list[int], kernel: Sequence[int]) -> bool:
    """Return whether torch's pooling functions support the padding of the node."""
    return begins == ends and not node.get("ceil_mode", 0) and all(2 * b <= k for b, k in zip(begins, kernel, strict=True))


def _last(
    node: Node,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    begins: Sequence[int],
    ends: Sequence[int],
) -> list[int]:
    """Return the padding after each axis for the right number of windows; `ceil_mode` adds one that starts inside the input."""
    last = []
    for n, k, s, d, begin, end in zip(x.shape[2:], kernel, stride, dilation, begins, ends, strict=True):
        window = d * (k - 1) + 1
        span = n + begin + end - window
        count = span // s + 1
        if node.get("ceil_mode", 0):
            count = -(-span // s) + 1
            count -= (count - 1) * s >= n + begin
        last.append((count - 1) * s + window - n - begin)
    return last


def _padded(x: Tensor, begins: Sequence[int], ends: Sequence[int], value: float = 0.0) -> Tensor:
    amounts = [amount for begin, end in zip(reversed(begins), reversed(ends), strict=True) for amount in (begin, end)]
    return F.pad(x, amounts, value=value)
