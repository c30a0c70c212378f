r"""TT-matrix (Oseledets 2010; Novikov et al. 2015), for matrices: a tensor train over pairs of output and input modes.

.. math:: W_{(o_1 … o_d), (i_1 … i_d)} = G_1(o_1, i_1) ⋯ G_d(o_d, i_d), \quad G_k ∈ R^{r_{k-1} × o_k × i_k × r_k}.

The modes are (o_1, …, o_d, i_1, …, i_d), the ranks r_0 = 1 … r_d = 1. No low rank separates input and output, so the format
helps with a single token, or to save bytes; with many tokens a train with separate sides (`tt`) is faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tensorly.decomposition import tensor_train

from tensorrail_exporter.formats import tt
from tensorrail_exporter.formats.contraction import ArrayT, Chain, LayerSpec, Op, Step, permute
from tensorrail_exporter.formats.modes import LETTERS, Equation, Part, joined, parts_of, require_merge, require_ranks
from tensorrail_exporter.formats.truncation import backend_of, truncated_svd
from tensorrail_runtime.errors import PlanError


def merges(op: Op) -> tuple[str, ...]:
    """Return `halves` (merge each half of the cores), `tail` (merge the second half only) and `none`."""
    return ("halves", "tail", "none")


def default_modes(shape: Sequence[int]) -> tuple[int, ...]:
    """Return two modes per side, as close to each other as the divisors allow."""
    return (*_near(shape[0]), *_near(shape[1]))


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
    if len(modes) % 2 or not d or min(modes) < 1 or (math.prod(modes[:d]), math.prod(modes[d:])) != tuple(shape):
        raise PlanError(
            f"modes {list(modes)} do not fit a weight of shape {list(shape)}: expected equally many output and "
            f"input modes, with products {shape[0]} and {shape[1]}; try {list(default_modes(shape))}"
        )
    _require(modes, ranks)


def decompose(weight: ArrayT, modes: Sequence[int], ranks: Sequence[int]) -> list[ArrayT]:
    """Return the cores G_k (r_{k-1}, o_k, i_k, r_k) by TT-SVD over the paired modes."""
    shape = tuple(weight.shape)
    validate(shape, modes, ranks)
    d = len(modes) // 2
    pairs = [axis for k in range(d) for axis in (k, d + k)]
    with backend_of(weight):
        tensor = permute(weight.reshape(tuple(modes)), tuple(pairs)).reshape(_pairs(modes))
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
    if not half or rank * (before + behind) > before * behind:
        return _joined(parts).core.reshape(tuple(shape))
    left, right = _joined(parts[:half]).core[0], _joined(parts[half:]).core[..., 0]  # (o′, i′, r), (r, o″, i″)
    # One product per pair of outputs (o′, o″) puts every value in its place without a transposition. torch copies the factors
    # for each of them, but they are smaller than the product here.
    return (left[:, None] @ permute(right, (1, 0, 2))[None]).reshape(tuple(shape))


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
    """Return one product per core, from last to first: (…, i_k, r_k, o_{k+1}…) → (…, r_{k-1}, o_k, o_{k+1}…)."""
    require_merge(merge, merges(layer.op), "ttm")
    parts = parts_of(cores)
    half = len(parts) // 2
    if merge != "none" and len(parts) > 2:
        parts = [*([_joined(parts[:half])] if merge == "halves" else parts[:half]), _joined(parts[half:])]
    chain = Chain(layer)
    before, after = layer.shape[1], 1
    for part in reversed(parts):
        left, out, inputs, right = part.core.shape
        before //= inputs
        matrix = part.core.reshape(left * out, inputs * right)
        chain.apply(matrix, part.cores, before=before, after=after)
        after *= out
    return chain.steps


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


def _near(size: int) -> tuple[int, int]:
    """Return the two divisors of `size` that are closest to its square root, the larger one first."""
    small = next(k for k in range(math.isqrt(size), 0, -1) if size % k == 0)
    return (size // small, small)


def _require(modes: Sequence[int], ranks: Sequence[int]) -> None:
    d = len(modes) // 2
    require_ranks(ranks, d + 1, f"ttm: r_0 … r_{d} for {d} pairs of modes")
    if ranks[0] != 1 or ranks[-1] != 1:
        raise PlanError(f"expected ttm ranks that start and end with 1, got {list(ranks)}")
