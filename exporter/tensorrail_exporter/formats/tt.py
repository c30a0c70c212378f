r"""Separable tensor train (Oseledets 2011; for convolutions Yin et al., CVPR 2021).

A kernel :math:`W ∈ R^{O×I×K_h×K_w}` is read as (O, K, I), K = K_h·K_w, and reshaped to modes
:math:`(o_1, …, o_m, K, i_1, …, i_n)`; a linear weight (O, I) to :math:`(o_1, …, o_m, i_1, …, i_n)`. Then

.. math:: W(o_1, …, i_n) = G_1(o_1) G_2(o_2) … G_d(i_n), \quad G_k ∈ R^{r_{k-1} × n_k × r_k}, \; r_0 = r_d = 1.

The first and the last modes touch only one side of the layer, so it runs as 1×1 → K_h×K_w → 1×1 (stride, pads and
dilation in the middle), or as two matrix products for a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import tensorly as tl
from tensorly.decomposition import tensor_train

from tensorrail_exporter.contraction import Array, Conv, LayerSpec, MatMul, Reshape, Step, pointwise
from tensorrail_exporter.errors import PlanError
from tensorrail_exporter.truncation import backend_of, truncated_svd

MERGES: tuple[str, ...] = ("sides", "none")


def default_modes(shape: Sequence[int]) -> tuple[int, ...]:
    """Return (O, K, I) for a convolution and (O, I) for a linear layer: one mode a side."""
    if len(shape) == 2:
        return tuple(shape)
    return (shape[0], math.prod(shape[2:]), shape[1])


def clamp(modes: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """Return the ranks lowered to the largest that exist: r_k ≤ r_{k-1} n_k from the left, r_{k-1} ≤ n_k r_k from the right."""
    _require_counts(modes, ranks)
    clamped = [max(1, rank) for rank in ranks]
    clamped[0] = clamped[-1] = 1
    for k, mode in enumerate(modes):
        clamped[k + 1] = min(clamped[k + 1], clamped[k] * mode)
    for k in range(len(modes) - 1, -1, -1):
        clamped[k] = min(clamped[k], clamped[k + 1] * modes[k])
    return tuple(clamped)


def validate(shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> None:
    """Raise `PlanError` unless the modes multiply up to the shape and the ranks start and end with 1 and are positive."""
    split(shape, modes)
    _require_counts(modes, ranks)
    if ranks[0] != 1 or ranks[-1] != 1:
        raise PlanError(f"tt ranks start and end with 1, and came as {list(ranks)}; for a ring of cores use format tr")
    if min(ranks) < 1:
        raise PlanError(f"ranks are 1 or larger, and came as {list(ranks)}")


def split(shape: Sequence[int], modes: Sequence[int]) -> int:
    """Return how many of the modes belong to the output side; `PlanError` when the modes do not fit the shape."""
    out, inputs, kernel = shape[0], shape[1], tuple(shape[2:])
    taps = math.prod(kernel)
    for count in range(1, len(modes)):
        rest = list(modes[count:])
        if kernel and rest.pop(0) != taps:
            continue
        if rest and math.prod(modes[:count]) == out and math.prod(rest) == inputs:
            return count
    middle = f", then {taps} (the kernel's {'×'.join(map(str, kernel))}), then" if kernel else ", then"
    raise PlanError(
        f"modes {list(modes)} do not fit a weight of shape {list(shape)}: expected modes whose product is {out}"
        f"{middle} modes whose product is {inputs}; try {list(default_modes(shape))}"
    )


def decompose(weight: Array, modes: Sequence[int], ranks: Sequence[int]) -> list[Array]:
    """Return the cores G_k (r_{k-1}, n_k, r_k) by TT-SVD, with the ranks clamped to those that exist.

    The error is at most sqrt(d - 1) times that of the best tensor of these ranks (Oseledets 2011, Corollary 2.4).
    """
    validate(tuple(weight.shape), modes, ranks)
    feasible = clamp(modes, ranks)
    with backend_of(weight):
        tensor = _unfold(weight).reshape(tuple(modes))
        return list(tensor_train(tensor, list(feasible), svd=truncated_svd).factors)


def reconstruct(cores: Sequence[Array], shape: Sequence[int]) -> Array:
    """Return the dense weight (O, I, *K) or (O, I) of the cores."""
    split(shape, [core.shape[1] for core in cores])
    with backend_of(cores[0]):
        return _fold(tl.tt_to_tensor(list(cores)), tuple(shape))


def project(weight: Array, modes: Sequence[int], ranks: Sequence[int]) -> Array:
    """Return the weight that the TT-SVD of these ranks keeps."""
    return reconstruct(decompose(weight, modes, ranks), tuple(weight.shape))


def core_shapes(shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return (r_{k-1}, n_k, r_k) for every core, the ranks clamped."""
    validate(shape, modes, ranks)
    feasible = clamp(modes, ranks)
    return tuple((feasible[k], mode, feasible[k + 1]) for k, mode in enumerate(modes))


def contraction(cores: Sequence[Array], layer: LayerSpec, merge: str = "sides") -> tuple[Step, ...]:
    """Return the steps of the layer.

    `merge="sides"` multiplies the cores of each side together first: three convolutions or two matrix products.
    `merge="none"` contracts core by core: fewer stored bytes, more kernels.
    """
    if merge not in MERGES:
        raise PlanError(f"unknown merge {merge!r} for format tt: expected one of {', '.join(MERGES)}")
    m = split(layer.shape, [core.shape[1] for core in cores])
    return _convolution(cores, m, layer, merge) if layer.op == "conv" else _linear(cores, m, layer, merge)


def _convolution(cores: Sequence[Array], m: int, layer: LayerSpec, merge: str) -> tuple[Step, ...]:
    kernel = cores[m]  # (r_m, K, r_{m+1})
    if merge == "sides" and kernel.shape[1] == 1:
        return _pointwise_layer(cores, m, layer)
    nd = layer.spatial
    weight = _moveaxis_last_to_second(kernel.reshape(kernel.shape[0], *layer.kernel, kernel.shape[2]))
    middle = Conv(weight, (m,), layer.stride, layer.pads, layer.dilation, auto_pad=layer.auto_pad)
    if merge == "sides":
        outer, inner = _merge_output(cores[:m]), _merge_input(cores[m + 1 :])
        first = pointwise(inner, tuple(range(m + 1, len(cores))), nd)
        return (first, middle, pointwise(outer, tuple(range(m)), nd))
    return (*_conv_input_chain(cores, m, nd), middle, *_conv_output_chain(cores, m, nd))


def _pointwise_layer(cores: Sequence[Array], m: int, layer: LayerSpec) -> tuple[Step, ...]:
    """A 1×1 kernel has nothing to slide: its core joins the side with the smaller rank, and two convolutions remain."""
    outer, inner = _merge_output(cores[:m]), _merge_input(cores[m + 1 :])
    kernel = cores[m][:, 0, :]  # (r_m, r_{m+1})
    left, right = tuple(range(m)), tuple(range(m + 1, len(cores)))
    if kernel.shape[0] <= kernel.shape[1]:
        inner, right = kernel @ inner, (m, *right)
    else:
        outer, left = outer @ kernel, (*left, m)
    first = Conv(inner.reshape(*inner.shape, *layer.kernel), right, layer.stride, layer.pads, layer.dilation, 1, layer.auto_pad)
    return (first, pointwise(outer, left, layer.spatial))


def _conv_input_chain(cores: Sequence[Array], m: int, nd: int) -> list[Step]:
    """Contract the input modes from the last one on, the others folded into the batch."""
    steps: list[Step] = []
    carried = 1  # the rank that has come from the right so far
    for k in range(len(cores) - 1, m, -1):
        rank, mode, _ = cores[k].shape
        if k > m + 1 or steps:
            steps.append(Reshape((-1, mode * carried, *(0,) * nd)))
        steps.append(pointwise(cores[k].reshape(rank, mode * carried), (k,), nd))
        carried = rank
    return steps


def _conv_output_chain(cores: Sequence[Array], m: int, nd: int) -> list[Step]:
    """Make the output modes from the last one on, those already made folded into the first spatial axis."""
    steps: list[Step] = []
    for k in range(m - 1, -1, -1):
        left, mode, right = cores[k].shape
        if steps:
            steps.append(Reshape((0, right, -1, *(0,) * (nd - 1))))
        steps.append(pointwise(cores[k].reshape(left * mode, right), (k,), nd))
    if m > 1:
        out = math.prod(core.shape[1] for core in cores[:m])
        steps.append(Reshape((0, out, -1, *(0,) * (nd - 1))))
    return steps


def _linear(cores: Sequence[Array], m: int, layer: LayerSpec, merge: str) -> tuple[Step, ...]:
    if merge == "sides":
        outer, inner = _merge_output(cores[:m]), _merge_input(cores[m:])
        return (MatMul(inner.T, tuple(range(m, len(cores)))), MatMul(outer.T, tuple(range(m))))
    lead = (0,) * layer.lead
    steps: list[Step] = []
    carried = 1
    for k in range(len(cores) - 1, m - 1, -1):
        rank, mode, _ = cores[k].shape
        if len(cores) - m > 1:
            steps.append(Reshape((*lead, -1, mode * carried)))
        steps.append(MatMul(cores[k].reshape(rank, mode * carried).T, (k,)))
        carried = rank
    if len(cores) - m > 1:
        steps.append(Reshape((*lead, carried)))
    for k in range(m - 1, -1, -1):
        left, mode, right = cores[k].shape
        matrix = cores[k].reshape(left * mode, right)
        if k == m - 1:
            steps.append(MatMul(matrix.T, (k,)))
        else:
            steps += [Reshape((*lead, right, -1)), MatMul(matrix, (k,), side="left")]
    if m > 1:
        steps.append(Reshape((*lead, layer.shape[0])))
    return tuple(steps)


def _merge_output(cores: Sequence[Array]) -> Array:
    """Return (O, r): the product of G_1 … G_m, (1, o_1, r_1) … (r_{m-1}, o_m, r_m)."""
    merged = cores[0].reshape(-1, cores[0].shape[2])
    for core in cores[1:]:
        merged = (merged @ core.reshape(core.shape[0], -1)).reshape(-1, core.shape[2])
    return merged


def _merge_input(cores: Sequence[Array]) -> Array:
    """Return (r, I): the product of the cores (r, i_1, r') … (r'', i_n, 1)."""
    merged = cores[-1].reshape(cores[-1].shape[0], -1)
    for core in reversed(cores[:-1]):
        merged = (core.reshape(-1, core.shape[2]) @ merged).reshape(core.shape[0], -1)
    return merged


def _unfold(weight: Array) -> Array:
    """Return (O, *K, I) from (O, I, *K); a linear weight stays as it is."""
    axes = (0, *range(2, len(weight.shape)), 1)
    return weight if len(weight.shape) == 2 else tl.transpose(weight, axes)


def _fold(tensor: Array, shape: tuple[int, ...]) -> Array:
    """Return (O, I, *K) from the full tensor of modes: the inverse of reshaping `_unfold`."""
    if len(shape) == 2:
        return tensor.reshape(shape)
    return _moveaxis_last_to_second(tensor.reshape(shape[0], *shape[2:], shape[1]))


def _moveaxis_last_to_second(array: Array) -> Array:
    """Return (a, z, b, …) from (a, b, …, z), for NumPy and torch alike."""
    for axis in range(array.ndim - 1, 1, -1):
        array = array.swapaxes(axis, axis - 1)
    return array


def _require_counts(modes: Sequence[int], ranks: Sequence[int]) -> None:
    if len(ranks) != len(modes) + 1:
        raise PlanError(
            f"{len(modes)} modes need {len(modes) + 1} tt ranks (r_0 … r_{len(modes)}), and {len(ranks)} came: {list(ranks)}"
        )
