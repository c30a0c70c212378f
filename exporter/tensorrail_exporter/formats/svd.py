r"""Low-rank matrices (Denton et al. 2014; the spatial split of convolutions Jaderberg et al. 2014).

A linear weight (O, I) is the matrix itself. The axes of a kernel are divided between the two factors: the first j of them
(J = k_1⋯k_j taps) go with the inputs, the others (L taps) with the outputs,

.. math:: M_{(o, l), (i, j)} = W_{o, i, j, l} ≈ U V, \quad U ∈ R^{O·L × r}, \; V ∈ R^{r × I·J}.

The modes (O·L, I·J) define the split: (O·Kw, I·Kh) runs as Kh×1 → 1×Kw, (O, I·K) as Kh×Kw → 1×1, (O·K, I) as
1×1 → Kh×Kw. The truncated SVD is the best approximation of that rank (Eckart and Young 1936).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import tensorly as tl

from tensorrail_exporter.formats.contraction import ArrayT, Chain, LayerSpec, Op, Step, as_layer, permute
from tensorrail_exporter.formats.modes import LETTERS, Equation, require_merge, require_ranks
from tensorrail_exporter.formats.truncation import backend_of, truncated_svd
from tensorrail_runtime.errors import PlanError


def merges(op: Op) -> tuple[str, ...]:
    """Return `sides`: two factors leave nothing to merge."""
    return ("sides",)


def default_modes(shape: Sequence[int]) -> tuple[int, ...]:
    """Return (O, I) for a matrix, and the split after the first spatial axis for a kernel."""
    return (shape[0] * math.prod(shape[3:]), shape[1] * math.prod(shape[2:3]))


def splits(shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return the modes of every division of the kernel's axes: (O·K, I) first, (O, I·K) last; only (O, I) for a single tap."""
    o, i, kernel = shape[0], shape[1], tuple(shape[2:])
    places = range(len(kernel) + 1) if math.prod(kernel) > 1 else (len(kernel),)
    return tuple((o * math.prod(kernel[j:]), i * math.prod(kernel[:j])) for j in places)


def matrix(weight: ArrayT, modes: Sequence[int]) -> ArrayT:
    """Return the matrix (O·L, I·J) that is truncated."""
    j = _split(tuple(weight.shape), modes)
    axes = (0, *range(2 + j, len(weight.shape)), 1, *range(2, 2 + j))
    return permute(weight, axes).reshape(tuple(modes))


def uniform(shape: Sequence[int], modes: Sequence[int], rank: int) -> tuple[int, ...]:
    """Return (rank,)."""
    return (rank,)


def clamp(shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """Return the rank, at most the smaller side of the matrix."""
    _require(ranks)
    return (min(ranks[0], *modes),)


def validate(shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> None:
    """Raise `PlanError` unless the modes split the weight into two factors and there is one rank."""
    _split(shape, modes)
    _require(ranks)


def decompose(weight: ArrayT, modes: Sequence[int], ranks: Sequence[int]) -> list[ArrayT]:
    """Return U·√S (O·L, r) and √S·V (r, I·J): both factors carry the root of the singular values."""
    shape = tuple(weight.shape)
    validate(shape, modes, ranks)
    with backend_of(weight):
        u, s, v = truncated_svd(matrix(weight, modes), clamp(shape, modes, ranks)[0])
        root = tl.sqrt(s)
        return [u * root, root[:, None] * v]


def reconstruct(cores: Sequence[ArrayT], shape: Sequence[int], modes: Sequence[int]) -> ArrayT:
    """Return the dense weight (O, I, *K) or (O, I) that the two factors represent."""
    j = _split(shape, modes)
    kernel = tuple(shape[2:])
    full = (cores[0] @ cores[1]).reshape(shape[0], *kernel[j:], shape[1], *kernel[:j])
    behind = len(kernel) - j
    return permute(full, (0, 1 + behind, *range(2 + behind, 2 + len(kernel)), *range(1, 1 + behind)))


def core_shapes(shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return (O·L, r) and (r, I·J), with the rank clamped."""
    validate(shape, modes, ranks)
    (rank,) = clamp(shape, modes, ranks)
    return ((modes[0], rank), (rank, modes[1]))


def rank_axes(shape: Sequence[int], modes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return the rank's axis in each factor."""
    return ((1,), (0,))


def equation(shape: Sequence[int], modes: Sequence[int]) -> Equation:
    """Return the einsum of the two factors: outputs with the later kernel axes, inputs with the earlier ones."""
    j = _split(shape, modes)
    kernel = LETTERS[3 : 3 + len(shape) - 2]
    return Equation(("a" + kernel[j:] + "c", "cb" + kernel[:j]), "ab" + kernel, tuple(shape), "b")


def contraction(cores: Sequence[ArrayT], layer: LayerSpec, modes: Sequence[int], merge: str) -> tuple[Step, ...]:
    """Return two convolutions, each with the stride, pads and dilation of its own axes, or two matrix products."""
    require_merge(merge, merges(layer.op), "svd")
    if layer.op != "conv":
        chain = Chain(layer)
        chain.apply(cores[1], (1,))
        chain.apply(cores[0], (0,))
        return chain.steps
    j = _split(layer.shape, modes)
    rank = cores[1].shape[0]
    nd = layer.spatial
    # Along an axis with one tap, a stride costs less if it comes early, and that of a transposed convolution if it comes late.
    inner = [not layer.transposed if layer.kernel[axis] == 1 else axis < j for axis in range(nd)]
    first = cores[1].reshape(rank, layer.shape[1], *(k if axis < j else 1 for axis, k in enumerate(layer.kernel)))
    outer = (layer.shape[0], *layer.kernel[j:], rank)
    second = permute(cores[0].reshape(outer), (0, len(outer) - 1, *range(1, len(outer) - 1)))
    second = second.reshape(layer.shape[0], rank, *(1 if axis < j else k for axis, k in enumerate(layer.kernel)))
    return (as_layer(first, (1,), layer, used=inner), as_layer(second, (0,), layer, used=[not axis for axis in inner]))


def _split(shape: Sequence[int], modes: Sequence[int]) -> int:
    """Return how many kernel axes go with the inputs; raise `PlanError` if the modes are not such a split."""
    kernel = tuple(shape[2:])
    choices = {(shape[0] * math.prod(kernel[j:]), shape[1] * math.prod(kernel[:j])): j for j in range(len(kernel) + 1)}
    try:
        return choices[tuple(modes)]  # type: ignore[index] # any number of modes: others than two are not found
    except KeyError:
        known = " or ".join(str(list(choice)) for choice in choices)
        raise PlanError(f"modes {list(modes)} do not split a weight of shape {list(shape)} in two: expected {known}") from None


def _require(ranks: Sequence[int]) -> None:
    require_ranks(ranks, 1, "svd: the rank of the matrix")
