r"""Canonical polyadic (Lebedev et al., ICLR 2015): a sum of R components over the modes of `tt`.

.. math:: W(o_1, …, i_n) = \sum_{r=1}^{R} A_1(o_1, r) ⋯ A_d(i_n, r).

A convolution runs as 1×1 → depthwise K_h×K_w on R channels → 1×1, a linear layer as two products over R.

The best CP approximation may not exist: components then grow without bound and cancel each other, and cannot be trained or
rounded afterwards. Alternating least squares therefore runs with a ridge, which is increased until no component is larger
than `BOUND` times the weight. If no ridge is large enough, the decomposition raises an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import tensorly as tl
from tensorly.decomposition import parafac

from tensorrail_exporter.formats.contraction import ArrayT, Chain, LayerSpec, Op, Step
from tensorrail_exporter.formats.modes import (
    Equation,
    Part,
    fold,
    parts_of,
    require_merge,
    require_ranks,
    side_letters,
    split,
    unfold,
)
from tensorrail_exporter.formats.modes import default_modes as default_modes
from tensorrail_exporter.formats.truncation import backend_of, double, like, truncated_svd
from tensorrail_runtime.errors import PlanError

BOUND = 10.0
"""The largest norm of one component, as a multiple of the weight's norm."""

_RIDGES = (1e-8, 1e-4, 1e-3, 1e-2)  # as shares of the squared norm of a column of a balanced factor
_SWEEPS = 50
_TOLERANCE = 1e-5


def merges(op: Op) -> tuple[str, ...]:
    """Return `sides` (merge the factors of each side), `output` or `input` (of that side only) and `none`."""
    return ("sides", "output", "input", "none")


def uniform(shape: Sequence[int], modes: Sequence[int], rank: int) -> tuple[int, ...]:
    """Return (rank,)."""
    return (rank,)


def clamp(shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """Return the number of components, at most the product of all modes except the largest: enough for every tensor."""
    _require(ranks)
    return (min(ranks[0], math.prod(modes) // max(modes)),)


def validate(shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> None:
    """Raise `PlanError` unless the products of the modes match the shape and there is one rank."""
    split(shape, modes)
    _require(ranks)


def decompose(weight: ArrayT, modes: Sequence[int], ranks: Sequence[int]) -> list[ArrayT]:
    """Return the factors (n_k, R) with balanced norms; raise `PlanError` if no ridge keeps the components bounded."""
    shape = tuple(weight.shape)
    validate(shape, modes, ranks)
    (rank,) = clamp(shape, modes, ranks)
    with backend_of(weight):
        tensor = double(unfold(weight, modes))
        scale = float(tl.norm(tensor))
        if scale == 0.0:
            return [like(weight, tl.zeros((mode, rank), **tl.context(tensor))) for mode in modes]
        for ridge in _RIDGES:
            factors = _als(tensor / scale, rank, ridge)
            if _largest(factors) <= BOUND:
                root = scale ** (1 / len(modes))
                return [like(weight, factor * root) for factor in factors]
    raise PlanError(
        f"cp with {rank} components diverges on a weight of shape {list(shape)}: components larger than {BOUND:g} times "
        f"the weight's norm cancel each other; lower the rank, or use tucker or tt"
    )


def reconstruct(cores: Sequence[ArrayT], shape: Sequence[int], modes: Sequence[int]) -> ArrayT:
    """Return the dense weight (O, I, *K) or (O, I) that the factors represent."""
    m = split(shape, modes)
    left, right = _khatri_rao(parts_of(cores)[:m]).core, _khatri_rao(parts_of(cores)[m:]).core
    return fold((left @ right.T).reshape(tuple(modes)), shape)


def core_shapes(shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return (n_k, R) for every mode, with the rank clamped."""
    validate(shape, modes, ranks)
    (rank,) = clamp(shape, modes, ranks)
    return tuple((mode, rank) for mode in modes)


def rank_axes(shape: Sequence[int], modes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return axis 1 of every factor."""
    return ((1,),) * len(modes)


def equation(shape: Sequence[int], modes: Sequence[int]) -> Equation:
    """Return the einsum of the factors, which share one letter for the components."""
    letters, free, plain = side_letters(shape, modes)
    return replace(plain, cores=tuple(letter + free[0] for letter in letters))


def contraction(cores: Sequence[ArrayT], layer: LayerSpec, modes: Sequence[int], merge: str) -> tuple[Step, ...]:
    """Return the steps of the layer: from the input to R channels, the kernel on each channel, R channels to the output.

    Without merging, the first input mode makes the R channels and every further one is contracted within its channel.
    """
    require_merge(merge, merges(layer.op), "cp")
    m = split(layer.shape, modes)
    parts = parts_of(cores)
    conv = layer.op == "conv"
    outs, ins = parts[:m], parts[m + conv :]
    if merge in ("sides", "output"):
        outs = [_khatri_rao(outs)]
    if merge in ("sides", "input"):
        ins = [_khatri_rao(ins)]
    single = conv and math.prod(layer.kernel) == 1
    if single:  # the core of a kernel with one tap is one number per channel
        ins[0] = Part(ins[0].core * parts[m].core, (m, *ins[0].cores))
    chain = Chain(layer)
    rank = cores[0].shape[1]
    after = layer.shape[1]
    for index, part in enumerate(ins):
        mode = part.core.shape[0]
        after //= mode
        if index == 0:
            chain.apply(part.core.T, part.cores, after=after, strided=single and len(ins) == 1)
        else:
            chain.grouped(part.core.T.reshape(rank, 1, mode), part.cores, after=after, strided=single and index == len(ins) - 1)
    if conv and not single:
        chain.window(parts[m].core.T.reshape(rank, 1, *layer.kernel), (m,), groups=rank)
    after = 1
    for part in reversed(outs[1:]):
        chain.grouped(part.core.T.reshape(rank, part.core.shape[0], 1), part.cores, after=after)
        after *= part.core.shape[0]
    chain.apply(outs[0].core, outs[0].cores, after=after)
    return chain.steps


def _als(tensor: ArrayT, rank: int, ridge: float) -> list[ArrayT]:
    """Return factors with balanced column norms by alternating least squares with a ridge; `tensor` has norm 1."""
    _, factors = parafac(
        tensor, rank, n_iter_max=_SWEEPS, init="svd", svd=truncated_svd, tol=_TOLERANCE, l2_reg=ridge, random_state=0
    )
    norms = [tl.sqrt(tl.sum(factor * factor, axis=0)) for factor in factors]
    product = norms[0]
    for norm in norms[1:]:
        product = product * norm
    target = product ** (1 / len(factors))
    return [factor * (target / tl.clip(norm, 1e-300, None)) for factor, norm in zip(factors, norms, strict=True)]


def _largest(factors: Sequence[ArrayT]) -> float:
    """Return the largest norm of one component, infinity if it is not a finite number."""
    columns = factors[0] * factors[0]
    sizes = tl.sum(columns, axis=0)
    for factor in factors[1:]:
        sizes = sizes * tl.sum(factor * factor, axis=0)
    largest = float(tl.max(sizes)) ** 0.5
    return largest if math.isfinite(largest) else math.inf


def _khatri_rao(parts: Sequence[Part[ArrayT]]) -> Part[ArrayT]:
    """Merge the factors (n_1, R), (n_2, R) … into one (n_1n_2…, R), column by column."""
    merged = parts[0]
    for part in parts[1:]:
        product = (merged.core[:, None, :] * part.core[None, :, :]).reshape(-1, merged.core.shape[1])
        merged = Part(product, (*merged.cores, *part.cores))
    return merged


def _require(ranks: Sequence[int]) -> None:
    require_ranks(ranks, 1, "cp: the number of components")
