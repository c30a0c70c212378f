r"""TT-matrix (Oseledets 2010; Novikov et al. 2015), for matrices: a tensor train over pairs of output and input modes.

.. math:: W_{(o_1 … o_d), (i_1 … i_d)} = G_1(o_1, i_1) ⋯ G_d(o_d, i_d), \quad G_k ∈ R^{r_{k-1} × o_k × i_k × r_k}.

The modes are (o_1, …, o_d, i_1, …, i_d), the ranks r_0 = 1 … r_d = 1. No low rank separates input and output, so the format
helps with a single token, or to save bytes; with many tokens a train with separate sides (`tt`) is faster.

The entries of an embedding are split in the same way (Khrulkov et al. 2019; Hrinchuk et al., Findings of EMNLP 2020; Yin et al.
2021): an index becomes one index per mode, each of them chooses a matrix of its core, and the row is the product of these
matrices. The product of the modes of entries may be larger than their number, which may have no divisors. The table then has
rows of padding before its first entry. They belong to the first mode, which is as small as it can be, and are not read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import tensorly as tl
from tensorly.decomposition import tensor_train

from tensorrail_exporter.formats import tt
from tensorrail_exporter.formats.contraction import (
    ArrayT,
    Chain,
    Gather,
    GatherMatMul,
    LayerSpec,
    Op,
    Reshape,
    SplitIndex,
    Step,
    permute,
)
from tensorrail_exporter.formats.modes import LETTERS, Equation, Part, joined, parts_of, require_merge, require_ranks
from tensorrail_exporter.formats.truncation import backend_of, double, like, truncated_svd
from tensorrail_runtime.errors import PlanError

_UNEQUAL = 1.4  # times that a mode of entries may differ from the root of their number, for less padding
_SEEN = 1e-4  # share of a direction that rows must have outside of the padding to be continued along it


def merges(op: Op) -> tuple[str, ...]:
    """Return `halves` (merge each half of the cores), `tail` (merge the second half only) and `none`."""
    return ("halves", "tail", "none")


def default_modes(shape: Sequence[int]) -> tuple[int, ...]:
    """Return two modes per side, as close to each other as the divisors allow."""
    return (*_near(shape[0]), *_near(shape[1]))


def table_modes(shape: Sequence[int], count: int = 2) -> tuple[int, ...]:
    """Return the modes for a table (features, entries), those of each side of similar size.

    Args:
        shape: (features, entries).
        count: number of modes per side, 2 or 3; default 2.

    Returns:
        Modes of the features, whose product is their number, then modes of the entries, with the least padding.

    """
    features, entries = shape
    inner = min(
        product(_around(entries, count), repeat=count - 1),
        key=lambda tail: (-(-entries // math.prod(tail)) * math.prod(tail), max(-(-entries // math.prod(tail)), *tail)),
    )
    outs: tuple[int, ...] = ()
    for left in range(count, 1, -1):
        outs = (*outs, _divisor(features, features ** (1 / left)))
        features //= outs[-1]
    return (*outs, features, -(-entries // math.prod(inner)), *inner)


def uniform(shape: Sequence[int], modes: Sequence[int], rank: int) -> tuple[int, ...]:
    """Return (1, rank, …, rank, 1)."""
    return tt.uniform(shape, _pairs(modes), rank)


def clamp(shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """Return the ranks, lowered to the largest of a train over the paired modes o_k·i_k."""
    _require(modes, ranks)
    return tt.clamp(shape, _pairs(modes), ranks)


def validate(shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> None:
    """Raise `PlanError` unless the weight is a matrix and the output and input modes match its two sides."""
    if len(shape) != 2:
        raise PlanError(f"format ttm expects a matrix, got a weight of shape {list(shape)}; for a convolution use tt or tr")
    d = len(modes) // 2
    if len(modes) % 2 or not d or min(modes) < 1 or math.prod(modes[:d]) != shape[0] or not _holds(modes[d:], shape[1]):
        raise PlanError(
            f"modes {list(modes)} do not fit a weight of shape {list(shape)}: expected equally many output and "
            f"input modes, with products {shape[0]} and {shape[1]}; try {list(default_modes(shape))}, or for an embedding "
            f"{list(table_modes(shape))}"
        )
    _require(modes, ranks)


def padding(shape: Sequence[int], modes: Sequence[int]) -> int:
    """Return how many rows a table has before its first entry; 0 for other layers."""
    return math.prod(modes[len(modes) // 2 :]) - shape[1]


def paired(weight: ArrayT, modes: Sequence[int]) -> ArrayT:
    """Return a weight (O, I) as the tensor (o_1·i_1, …, o_d·i_d), with zeros as the padding of a table."""
    missing, d = padding(weight.shape, modes), len(modes) // 2
    with backend_of(weight):
        if missing:
            weight = tl.concatenate([tl.zeros((weight.shape[0], missing), **tl.context(weight)), weight], axis=1)
    return permute(weight.reshape(tuple(modes)), tuple(axis for k in range(d) for axis in (k, d + k))).reshape(_pairs(modes))


def unpaired(tensor: ArrayT, shape: Sequence[int], modes: Sequence[int]) -> ArrayT:
    """Return the weight (O, I) of a tensor (o_1·i_1, …, o_d·i_d), without padding."""
    d = len(modes) // 2
    sizes = tuple(size for k in range(d) for size in (modes[k], modes[d + k]))
    weight = permute(tensor.reshape(sizes), (*range(0, 2 * d, 2), *range(1, 2 * d, 2)))
    return weight.reshape(shape[0], -1)[:, padding(shape, modes) :]


def decompose(weight: ArrayT, modes: Sequence[int], ranks: Sequence[int]) -> list[ArrayT]:
    """Return the cores G_k (r_{k-1}, o_k, i_k, r_k) by TT-SVD over the paired modes."""
    shape = tuple(weight.shape)
    validate(shape, modes, ranks)
    d = len(modes) // 2
    with backend_of(weight):
        tensor = paired(weight, modes)
        if padding(shape, modes):
            tensor = _filled(tensor, padding(shape, modes), modes, clamp(shape, modes, ranks))
        if d == 1:  # with one pair of modes the core is the matrix itself
            cores = [tensor.reshape(1, -1, 1)]
        else:
            cores = tensor_train(tensor, list(clamp(shape, modes, ranks)), svd=truncated_svd).factors
    return [core.reshape(core.shape[0], modes[k], modes[d + k], core.shape[2]) for k, core in enumerate(cores)]


def reconstruct(cores: Sequence[ArrayT], shape: Sequence[int], modes: Sequence[int]) -> ArrayT:
    """Return the dense weight (O, I) that the cores represent."""
    parts = parts_of(cores)
    half = len(parts) // 2
    rank = parts[half].core.shape[0]
    before, behind = (math.prod(part.core.shape[2] for part in side) for side in (parts[:half], parts[half:]))
    whole = (shape[0], before * behind)
    if not half or rank * (before + behind) > before * behind:
        return _joined(parts).core.reshape(whole)[:, padding(shape, modes) :]
    left, right = _joined(parts[:half]).core[0], _joined(parts[half:]).core[..., 0]  # (o′, i′, r), (r, o″, i″)
    # One product per pair of outputs (o′, o″) puts every value in its place without a transposition. torch copies the factors
    # for each of them, but they are smaller than the product here.
    return (left[:, None] @ permute(right, (1, 0, 2))[None]).reshape(whole)[:, padding(shape, modes) :]


def core_shapes(shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return (r_{k-1}, o_k, i_k, r_k) for every core, with the ranks clamped."""
    validate(shape, modes, ranks)
    feasible, d = clamp(shape, modes, ranks), len(modes) // 2
    return tuple((feasible[k], modes[k], modes[d + k], feasible[k + 1]) for k in range(d))


def rank_axes(shape: Sequence[int], modes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return (3), (0, 3), …, (0): every rank except the two ends of the train."""
    return tuple(tuple(3 if axis == 2 else axis for axis in axes) for axes in tt.rank_axes(shape, _pairs(modes)))


def equation(shape: Sequence[int], modes: Sequence[int]) -> Equation:
    """Return the einsum of the train of paired modes; the ranks of size 1 at the ends have no letter."""
    d = len(modes) // 2
    outs, ins, ranks = LETTERS[:d], LETTERS[d : 2 * d], ["", *LETTERS[2 * d : 3 * d - 1], ""]
    return Equation(tuple(ranks[k] + outs[k] + ins[k] + ranks[k + 1] for k in range(d)), outs + ins, tuple(modes), ins)


def contraction(cores: Sequence[ArrayT], layer: LayerSpec, modes: Sequence[int], merge: str) -> tuple[Step, ...]:
    """Return one product per core, from last to first: (…, i_k, r_k, o_{k+1}…) → (…, r_{k-1}, o_k, o_{k+1}…).

    In an embedding, the index of the mode i_k chooses the matrix (r_{k-1}·o_k, r_k) of the product.
    """
    require_merge(merge, merges(layer.op), "ttm")
    if padding(layer.shape, modes) and not layer.gathers:
        raise PlanError(
            f"modes {list(modes)} of format ttm give more than {layer.shape[1]} inputs, which only the entries of an embedding "
            f"may; try {list(default_modes(layer.shape))}"
        )
    parts = parts_of(cores)
    half = len(parts) // 2
    if merge != "none" and len(parts) > 2:
        parts = [*([_joined(parts[:half])] if merge == "halves" else parts[:half]), _joined(parts[half:])]
    if layer.gathers and len(parts) > 1:
        return _rows(parts, layer)
    chain = Chain(layer)
    before, after = layer.shape[1], 1
    for part in reversed(parts):
        left, out, inputs, right = part.core.shape
        before //= inputs
        matrix = part.core.reshape(left * out, inputs * right)
        chain.apply(matrix, part.cores, before=before, after=after)
        after *= out
    return chain.steps


def _rows(parts: Sequence[Part[ArrayT]], layer: LayerSpec) -> tuple[Step, ...]:
    """Return the steps of an embedding with several modes: (…, r_k, o_{k+1}…) → (…, r_{k-1}, o_k, o_{k+1}…)."""
    sizes = tuple(part.core.shape[2] for part in parts)
    steps: list[Step] = [SplitIndex(sizes, math.prod(sizes) - layer.shape[1])]
    lead, features = (0,) * layer.lead, 1
    for part in reversed(parts):
        left, out, entries, right = part.core.shape
        stack = permute(part.core, (2, 0, 1, 3))
        if part is parts[-1]:
            steps.append(Gather(stack.reshape(entries, left, out), part.cores))
        else:
            steps.append(GatherMatMul(stack.reshape(entries, left * out, right), part.cores))
            steps.append(Reshape((*lead, *((left,) if part is not parts[0] else ()), out * features)))
        features *= out
    return tuple(steps)


def _filled(tensor: ArrayT, missing: int, modes: Sequence[int], ranks: Sequence[int]) -> ArrayT:
    """Return a table of paired modes with values in place of its padding.

    The padding is free. It is chosen so that a table which has these ranks keeps them, and is decomposed exactly: the rows of
    the unfolding behind the first mode are continued within the space of those without padding.
    """
    d = len(modes) // 2
    cut = next(k for k, size in enumerate(modes[d:], start=1) if size > 1)  # behind the first mode with several entries
    slices = tensor.reshape(math.prod(modes[:cut]), modes[d + cut - 1], -1)
    before = np.arange(math.prod(modes[d + cut :])) < missing
    of_columns = paired(np.tile(before, (math.prod(modes[cut:d]), 1)), (*modes[cut:d], *modes[d + cut :])).reshape(-1)
    unseen, seen = np.flatnonzero(of_columns), np.flatnonzero(~of_columns)
    _, _, rows = truncated_svd(slices[:, 1:].reshape(-1, len(of_columns)), ranks[cut])
    known = double(rows[:, seen])
    values, vectors = tl.eigh(known @ known.T)
    inverse = (vectors * ((values > _SEEN) / tl.clip(values, _SEEN, None))) @ vectors.T
    slices[:, 0, unseen] = like(tensor, double(slices[:, 0, seen]) @ known.T @ inverse @ double(rows[:, unseen]))
    return slices.reshape(tensor.shape)


def _joined(parts: Sequence[Part[ArrayT]]) -> Part[ArrayT]:
    """Merge neighbouring cores (r, o, i, r') into one, with all output modes before the input modes."""
    train = joined([Part(part.core.reshape(part.core.shape[0], -1, part.core.shape[3]), part.cores) for part in parts])
    left, _, right = train.core.shape
    sizes = [size for part in parts for size in part.core.shape[1:3]]
    d = len(parts)
    axes = (0, *(1 + 2 * k for k in range(d)), *(2 + 2 * k for k in range(d)), 1 + 2 * d)
    core = permute(train.core.reshape(left, *sizes, right), axes)
    return Part(core.reshape(left, math.prod(sizes[::2]), math.prod(sizes[1::2]), right), train.cores)


def _pairs(modes: Sequence[int]) -> tuple[int, ...]:
    d = len(modes) // 2
    return tuple(modes[k] * modes[d + k] for k in range(d))


def _holds(modes: Sequence[int], entries: int) -> bool:
    """Return whether modes give all entries, with padding in the first mode alone, which is as small as it can be."""
    most = math.prod(modes)
    first = next((size for size in modes if size > 1), 1)
    return entries <= most < entries + most // first


def _around(size: int, count: int) -> range:
    """Return the sizes around the root of a number of entries, for one of `count` modes."""
    root = size ** (1 / count)
    return range(max(1, round(root / _UNEQUAL)), round(root * _UNEQUAL) + 1)


def _divisor(size: int, near: float) -> int:
    """Return the divisor of a size with the smallest ratio to another number; the smaller one of two."""
    return min((k for k in range(1, size + 1) if size % k == 0), key=lambda k: (round(max(k / near, near / k), 9), k))


def _near(size: int) -> tuple[int, int]:
    """Return the two divisors of `size` that are closest to its square root, the larger one first."""
    small = next(k for k in range(math.isqrt(size), 0, -1) if size % k == 0)
    return (size // small, small)


def _require(modes: Sequence[int], ranks: Sequence[int]) -> None:
    d = len(modes) // 2
    require_ranks(ranks, d + 1, f"ttm: r_0 … r_{d} for {d} pairs of modes")
    if ranks[0] != 1 or ranks[-1] != 1:
        raise PlanError(f"expected ttm ranks that start and end with 1, got {list(ranks)}")
