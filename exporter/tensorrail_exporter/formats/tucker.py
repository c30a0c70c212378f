r"""Tucker (De Lathauwer et al. 2000; for convolutions Tucker-2, Kim et al., ICLR 2016).

The modes are those of `tt`. Every mode except the kernel's has a factor:

.. math:: W = C ×_{o_1} A_1 … ×_{i_n} B_n, \quad A_j ∈ R^{o_j × p_j}, \; B_j ∈ R^{i_j × q_j}.

A convolution runs as 1×1 → K_h×K_w → 1×1. The cores are stored as A_1 … A_m, C, B_1 … B_n, the ranks as p_1 … p_m, q_1 … q_n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import tensorly as tl
from tensorly.decomposition import partial_tucker

from tensorrail_exporter.formats.contraction import ArrayT, Chain, LayerSpec, Op, Step
from tensorrail_exporter.formats.modes import (
    Equation,
    Part,
    fold,
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

_SWEEPS = 10  # iterations of HOOI, the higher-order orthogonal iteration


def merges(op: Op) -> tuple[str, ...]:
    """Return `sides` (merge the factors of each side), `output` or `input` (of that side only) and `none`."""
    return ("sides", "output", "input", "none")


def uniform(shape: Sequence[int], modes: Sequence[int], rank: int) -> tuple[int, ...]:
    """Return (rank, …, rank), one for each mode except the kernel's."""
    return (rank,) * len(_ranked(shape, modes))


def clamp(shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """Return the ranks, each at most its mode and at most the product of all other ranks and the taps."""
    _require(shape, modes, ranks)
    taps = math.prod(shape[2:])
    clamped = [min(rank, modes[mode]) for rank, mode in zip(ranks, _ranked(shape, modes), strict=True)]
    for k in [*range(len(clamped))] * 2:
        clamped[k] = min(clamped[k], taps * math.prod(clamped[:k] + clamped[k + 1 :]))
    return tuple(clamped)


def validate(shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> None:
    """Raise `PlanError` unless the products of the modes match the shape and every mode except the kernel's has a rank."""
    split(shape, modes)
    _require(shape, modes, ranks)


def decompose(weight: ArrayT, modes: Sequence[int], ranks: Sequence[int]) -> list[ArrayT]:
    """Return A_1 … A_m, C, B_1 … B_n by higher-order orthogonal iteration, starting from the higher-order SVD."""
    shape = tuple(weight.shape)
    validate(shape, modes, ranks)
    m = split(shape, modes)
    with backend_of(weight):
        tensor = unfold(weight, modes)
        if float(tl.norm(tensor)) == 0.0:  # TensorLy divides by the norm to measure progress
            return [tl.zeros(size, **tl.context(tensor)) for size in core_shapes(shape, modes, ranks)]
        (core, factors), _ = partial_tucker(
            tensor,
            rank=list(clamp(shape, modes, ranks)),
            modes=list(_ranked(shape, modes)),
            n_iter_max=_SWEEPS,
            svd=truncated_svd,
        )
    return [*factors[:m], core, *factors[m:]]


def reconstruct(cores: Sequence[ArrayT], shape: Sequence[int], modes: Sequence[int]) -> ArrayT:
    """Return the dense weight (O, I, *K) or (O, I) that the cores represent."""
    m = split(shape, modes)
    with backend_of(cores[0]):
        factors = [*cores[:m], *cores[m + 1 :]]
        tensor: ArrayT = tl.tenalg.multi_mode_dot(cores[m], factors, modes=list(_ranked(shape, modes)))
    return fold(tensor, shape)


def core_shapes(shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return (o_j, p_j) for the output's factors, (p…, K, q…) for the core, (i_j, q_j) for the input's factors."""
    validate(shape, modes, ranks)
    m = split(shape, modes)
    feasible = clamp(shape, modes, ranks)
    factors = [(modes[mode], rank) for mode, rank in zip(_ranked(shape, modes), feasible, strict=True)]
    taps = (math.prod(shape[2:]),) if len(shape) > 2 else ()
    return (*factors[:m], (*feasible[:m], *taps, *feasible[m:]), *factors[m:])


def rank_axes(shape: Sequence[int], modes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return axis 1 of every factor, and all axes of the core except the taps."""
    m, ranked = split(shape, modes), _ranked(shape, modes)
    return (*[(1,)] * m, ranked, *[(1,)] * (len(ranked) - m))


def equation(shape: Sequence[int], modes: Sequence[int]) -> Equation:
    """Return the einsum of the core with one factor on each axis except the taps."""
    letters, free, plain = side_letters(shape, modes)
    m, ranked = split(shape, modes), _ranked(shape, modes)
    core = "".join(free[k] if k in ranked else letter for k, letter in enumerate(letters))
    factors = [letters[k] + free[k] for k in ranked]
    return replace(plain, cores=(*factors[:m], core, *factors[m:]))


def contraction(cores: Sequence[ArrayT], layer: LayerSpec, modes: Sequence[int], merge: str) -> tuple[Step, ...]:
    """Return the steps of the layer: the input's factors, the core, the output's factors.

    If the kernel has a single tap, the core is merged into a merged side, the one that leaves the smaller rank in between.
    """
    require_merge(merge, merges(layer.op), "tucker")
    m = split(layer.shape, modes)
    parts = parts_of(cores)
    outs, core, ins = parts[:m], parts[m], parts[m + 1 :]
    if merge in ("sides", "output"):
        outs = [_kronecker(outs)]
    if merge in ("sides", "input"):
        ins = [_kronecker(ins)]
    conv = layer.op == "conv"
    single = math.prod(layer.kernel) == 1
    wide = math.prod(cores[m].shape[:m])
    chain = Chain(layer)
    if single:
        matrix = core.core.reshape(wide, -1)
        narrow = math.prod(matrix.shape) // wide
        if wide <= narrow and len(ins) == 1:
            ins, middle = [Part(ins[0].core @ matrix.T, (*core.cores, *ins[0].cores))], None
        elif len(outs) == 1:
            outs, middle = [Part(outs[0].core @ matrix, (*outs[0].cores, *core.cores))], None
        else:
            middle = matrix
    before, after, strided = layer.shape[1], 1, conv and single
    for part in reversed(ins):
        mode, rank = part.core.shape
        before //= mode
        chain.apply(part.core.T, part.cores, before=before, after=after, strided=strided)
        after, strided = after * rank, False
    if conv and not single:
        shape = (wide, *layer.kernel, after)
        chain.window(kernel_last(core.core.reshape(shape)), core.cores)
    elif middle is not None:
        chain.apply(middle, core.cores)
    before, after = math.prod([part.core.shape[1] for part in outs]), 1
    for part in reversed(outs):
        mode, rank = part.core.shape
        before //= rank
        chain.apply(part.core, part.cores, before=before, after=after)
        after *= mode
    return chain.steps


def _kronecker(parts: Sequence[Part[ArrayT]]) -> Part[ArrayT]:
    """Merge the factors (n_1, r_1), (n_2, r_2) … of one side into one (n_1n_2…, r_1r_2…)."""
    merged = parts[0]
    for part in parts[1:]:
        (n, r), (k, s) = merged.core.shape, part.core.shape
        product = merged.core[:, None, :, None] * part.core[None, :, None, :]
        merged = Part(product.reshape(n * k, r * s), (*merged.cores, *part.cores))
    return merged


def _ranked(shape: Sequence[int], modes: Sequence[int]) -> tuple[int, ...]:
    """Return the indices of the modes that have a factor: all except the kernel's."""
    m = split(shape, modes)
    return tuple(k for k in range(len(modes)) if len(shape) == 2 or k != m)


def _require(shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> None:
    require_ranks(ranks, len(_ranked(shape, modes)), "tucker: one for each mode except the kernel's")
