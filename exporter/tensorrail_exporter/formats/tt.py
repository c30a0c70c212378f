r"""Separable tensor train (Oseledets 2011; for convolutions Yin et al., CVPR 2021).

A kernel :math:`W ∈ R^{O×I×K_h×K_w}` is viewed as (O, K, I), K = K_h·K_w, and reshaped to modes
:math:`(o_1, …, o_m, K, i_1, …, i_n)`; a linear weight (O, I) to :math:`(o_1, …, o_m, i_1, …, i_n)`. Then

.. math:: W(o_1, …, i_n) = G_1(o_1) G_2(o_2) … G_d(i_n), \quad G_k ∈ R^{r_{k-1} × n_k × r_k}, \; r_0 = r_d = 1.

The first modes belong to the output only, the last ones to the input only. A convolution therefore runs as
1×1 → K_h×K_w → 1×1 (stride, pads and dilation in the middle), a linear layer as two matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import tensorly as tl
from tensorly.decomposition import tensor_train

from tensorrail_exporter.formats.contraction import ArrayT, Chain, LayerSpec, Op, Step
from tensorrail_exporter.formats.modes import (
    Equation,
    fold,
    joined,
    kernel_last,
    parts_of,
    require_merge,
    require_ranks,
    side_letters,
    split,
    unfold,
)
from tensorrail_exporter.formats.modes import default_modes as default_modes
from tensorrail_exporter.formats.truncation import backend_of, truncated_svd
from tensorrail_runtime.errors import PlanError


def merges(op: Op) -> tuple[str, ...]:
    """Return `sides` (merge the cores of each side), `output` or `input` (of that side only) and `none`."""
    return ("sides", "output", "input", "none")


def uniform(shape: Sequence[int], modes: Sequence[int], rank: int) -> tuple[int, ...]:
    """Return (1, rank, …, rank, 1)."""
    return (1, *[rank] * (len(modes) - 1), 1)


def clamp(shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """Return the ranks, lowered to the largest that exist: r_k ≤ r_{k-1} n_k and r_{k-1} ≤ n_k r_k."""
    _require(modes, ranks)
    clamped = list(ranks)
    for k, mode in enumerate(modes):
        clamped[k + 1] = min(clamped[k + 1], clamped[k] * mode)
    for k in range(len(modes) - 1, -1, -1):
        clamped[k] = min(clamped[k], clamped[k + 1] * modes[k])
    return tuple(clamped)


def validate(shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> None:
    """Raise `PlanError` unless the products of the modes match the shape and the ranks are positive, first and last 1."""
    split(shape, modes)
    _require(modes, ranks)


def decompose(weight: ArrayT, modes: Sequence[int], ranks: Sequence[int]) -> list[ArrayT]:
    """Return the cores G_k (r_{k-1}, n_k, r_k) by TT-SVD, with the ranks clamped.

    The error is at most sqrt(d - 1) times that of the best tensor of these ranks (Oseledets 2011, Corollary 2.4).
    """
    shape = tuple(weight.shape)
    validate(shape, modes, ranks)
    with backend_of(weight):
        return list(tensor_train(unfold(weight, modes), list(clamp(shape, modes, ranks)), svd=truncated_svd).factors)


def reconstruct(cores: Sequence[ArrayT], shape: Sequence[int], modes: Sequence[int]) -> ArrayT:
    """Return the dense weight (O, I, *K) or (O, I) that the cores represent."""
    split(shape, modes)
    with backend_of(cores[0]):
        tensor: ArrayT = tl.tt_to_tensor(list(cores))
    return fold(tensor, shape)


def core_shapes(shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return (r_{k-1}, n_k, r_k) for every core, with the ranks clamped."""
    validate(shape, modes, ranks)
    feasible = clamp(shape, modes, ranks)
    return tuple((feasible[k], mode, feasible[k + 1]) for k, mode in enumerate(modes))


def rank_axes(shape: Sequence[int], modes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return (2), (0, 2), …, (0): every rank except the two ends of the train."""
    last = len(modes) - 1
    return tuple(
        tuple(axis for axis in (0, 2) if not ((k == 0 and axis == 0) or (k == last and axis == 2))) for k in range(last + 1)
    )


def equation(shape: Sequence[int], modes: Sequence[int]) -> Equation:
    """Return the einsum of the train: neighbouring cores share a rank; the ranks of size 1 at the ends have no letter."""
    letters, free, plain = side_letters(shape, modes)
    ranks = ["", *free[1 : len(letters)], ""]
    return replace(plain, cores=tuple(ranks[k] + letter + ranks[k + 1] for k, letter in enumerate(letters)))


def contraction(cores: Sequence[ArrayT], layer: LayerSpec, modes: Sequence[int], merge: str) -> tuple[Step, ...]:
    """Return the steps of the layer: the input cores from last to first, the kernel, the output cores from last to first.

    With both sides merged these are three convolutions, two if the kernel has a single tap, or two matrix products.
    """
    require_merge(merge, merges(layer.op), "tt")
    m = split(layer.shape, modes)
    parts = parts_of(cores)
    conv = layer.op == "conv"
    outs, ins = parts[:m], parts[m + conv :]
    if merge in ("sides", "output"):
        outs = [joined(outs)]
    if merge in ("sides", "input"):
        ins = [joined(ins)]
    single = conv and math.prod(layer.kernel) == 1
    if single:  # a kernel with one tap: merge its core into the side with the smaller rank
        left, _, right = parts[m].core.shape
        if left <= right:
            ins[0] = joined([parts[m], ins[0]])
        else:
            outs[-1] = joined([outs[-1], parts[m]])
    chain = Chain(layer)
    before = layer.shape[1]
    for index, part in enumerate(reversed(ins)):
        left, mode, right = part.core.shape
        before //= mode
        chain.apply(part.core.reshape(left, mode * right), part.cores, before=before, strided=single and index == 0)
    if conv and not single:
        left, _, right = parts[m].core.shape
        chain.window(kernel_last(parts[m].core.reshape(left, *layer.kernel, right)), (m,))
    after = 1
    for part in reversed(outs):
        left, mode, right = part.core.shape
        chain.apply(part.core.reshape(left * mode, right), part.cores, after=after)
        after *= mode
    return chain.steps


def _require(modes: Sequence[int], ranks: Sequence[int]) -> None:
    require_ranks(ranks, len(modes) + 1, f"tt: r_0 … r_{len(modes)} for {len(modes)} modes")
    if ranks[0] != 1 or ranks[-1] != 1:
        raise PlanError(f"expected tt ranks that start and end with 1, got {list(ranks)}; for a ring of cores use format tr")
