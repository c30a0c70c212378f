r"""Tensor ring (Zhao et al. 2016): a tensor train whose ends are connected by a rank r₀ = r_d, over the modes of `tt`.

.. math:: W(o_1, …, i_n) = \operatorname{tr}\bigl(G_1(o_1) G_2(o_2) … G_d(i_n)\bigr), \quad G_k ∈ R^{r_{k-1} × n_k × r_k}.

The output cores together map (r₀, r_m) to O, the input cores map I to (r₀, r_{m'}). A convolution runs as
1×1 → K_h×K_w in r₀ groups with the same kernel → 1×1, a linear layer as two matrix products over the rank r₀·r_m.

The one-shot SVD makes most of its error at the first cut. Here it is only the starting point of alternating least squares,
where each step is the exact minimum over one core, so the result is never worse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tensorly as tl
from tensorly.decomposition import tensor_ring, tensor_train

from tensorrail_exporter.formats import tt
from tensorrail_exporter.formats.contraction import ArrayT, Chain, LayerSpec, Op, Step, permute
from tensorrail_exporter.formats.modes import (
    Equation,
    Part,
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
from tensorrail_exporter.formats.truncation import backend_of, double, like, truncated_svd
from tensorrail_runtime.errors import PlanError

_SWEEPS = 20
_PROGRESS = 1e-3  # share of the error: the sweeps end after one that gains less
_DAMPING = 0.1  # penalty as a share of the squared error, for cores as large as those of the one-shot ring
_RIDGE = 1e-12  # share of the Gram matrix's mean eigenvalue: keeps a rank-deficient core solvable


def merges(op: Op) -> tuple[str, ...]:
    """Return `sides` (grouped kernel) and `fold` (ring rank in the batch) for convolutions, else `sides` and `output`."""
    return ("sides", "fold") if op == "conv" else ("sides", "output")


def uniform(shape: Sequence[int], modes: Sequence[int], rank: int) -> tuple[int, ...]:
    """Return (rank, …, rank)."""
    return (rank,) * (len(modes) + 1)


def clamp(shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """Return the ranks, lowered where they are of no use: a rank is at most its neighbour times the mode between them.

    A cut through the ring crosses two ranks, so a rank may be larger than that of a train at the same place, but not larger
    than the largest rank of a train over these modes.
    """
    _require(modes, ranks)
    d = len(modes)
    largest = max(min(math.prod(modes[:k]), math.prod(modes[k:])) for k in range(d))
    ring = [min(rank, largest) for rank in ranks[:d]]
    while True:
        before = list(ring)
        for k in range(d):
            ring[k] = min(ring[k], ring[k - 1] * modes[k - 1], ring[(k + 1) % d] * modes[k])
        if ring == before:
            return (*ring, ring[0])


def validate(shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> None:
    """Raise `PlanError` unless the products of the modes match the shape and the ring is closed: r_0 = r_d."""
    split(shape, modes)
    _require(modes, ranks)


def decompose(weight: ArrayT, modes: Sequence[int], ranks: Sequence[int]) -> list[ArrayT]:
    """Return the cores G_k (r_{k-1}, n_k, r_k): the one-shot ring SVD, refined by alternating least squares.

    The relative error is at most that of the one-shot SVD, for which TensorLy's `tensor_ring` is used if the ranks allow it.
    """
    shape = tuple(weight.shape)
    validate(shape, modes, ranks)
    ring = clamp(shape, modes, ranks)
    with backend_of(weight):
        tensor = unfold(weight, modes)
        if len(modes) == 2:
            return one_shot(tensor, ring)
        tensor = double(tensor)
        return [like(weight, core) for core in _refine(tensor, one_shot(tensor, ring))]


def reconstruct(cores: Sequence[ArrayT], shape: Sequence[int], modes: Sequence[int]) -> ArrayT:
    """Return the dense weight (O, I, *K) or (O, I) that the cores represent."""
    split(shape, modes)
    first = cores[0].shape[0]
    out = joined(parts_of(cores[:-1])).core  # (r_0, N, r)
    r, n, s = out.shape
    left = permute(out, (1, 0, 2)).reshape(n, r * s)
    last = permute(cores[-1], (2, 0, 1)).reshape(first * s, -1)
    return fold((left @ last).reshape(tuple(modes)), shape)


def core_shapes(shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return (r_{k-1}, n_k, r_k) for every core, with the ranks clamped."""
    validate(shape, modes, ranks)
    ring = clamp(shape, modes, ranks)
    return tuple((ring[k], mode, ring[k + 1]) for k, mode in enumerate(modes))


def rank_axes(shape: Sequence[int], modes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return the axes of `tt`: the rank that closes the ring is a number of groups, not of channels, and is not padded."""
    return tt.rank_axes(shape, modes)


def equation(shape: Sequence[int], modes: Sequence[int]) -> Equation:
    """Return the einsum of the ring: neighbouring cores share a rank, and so do the last and the first."""
    letters, free, plain = side_letters(shape, modes)
    count = len(letters)
    return replace(plain, cores=tuple(free[k] + letter + free[(k + 1) % count] for k, letter in enumerate(letters)))


def contraction(cores: Sequence[ArrayT], layer: LayerSpec, modes: Sequence[int], merge: str) -> tuple[Step, ...]:
    """Return the steps of the layer: the input to the ring's ranks, the kernel in r_0 groups, the ranks to the output."""
    require_merge(merge, merges(layer.op), "tr")
    m = split(layer.shape, modes)
    parts = parts_of(cores)
    conv = layer.op == "conv"
    out = joined(parts[:m])  # (r_0, O, r_m)
    ring, _, bond = out.core.shape
    chain = Chain(layer)
    ins = parts[m + conv :]
    single = conv and math.prod(layer.kernel) == 1
    if merge != "output":
        inner = joined([parts[m], *ins] if single else ins)  # (r, I, r_0)
        r, inputs, _ = inner.core.shape
        if conv:  # channels (r_0, r): the groups of the kernel
            chain.apply(permute(inner.core, (2, 0, 1)).reshape(ring * r, inputs), inner.cores, strided=single)
        else:
            chain.apply(permute(inner.core, (0, 2, 1)).reshape(r * ring, inputs), inner.cores)
    else:
        _input_chain(chain, ins, layer.shape[1])
    if conv and not single:
        left, _, right = parts[m].core.shape
        kernel = kernel_last(parts[m].core.reshape(left, *layer.kernel, right))
        if merge == "fold":
            chain.window(kernel, (m,), fold=ring)
        else:
            chain.window(_tiled(kernel, ring), (m,), groups=ring)
    axes = (1, 0, 2) if conv else (1, 2, 0)  # to (O, r_0, r_m), or (O, r_m, r_0) behind a linear chain
    chain.apply(permute(out.core, axes).reshape(layer.shape[0], ring * bond), out.cores)
    return chain.steps


def one_shot(tensor: ArrayT, ring: Sequence[int]) -> list[ArrayT]:
    """Return the ring cores of a tensor by successive SVDs (Zhao et al. 2016, Algorithm 1).

    The first cut needs r_k·r_{k+1} singular vectors. If no mode has that many, a train of the same ranks is computed, and
    the rest of the ring's cores is filled with small random values for the refinement. It must run inside `backend_of`.

    Args:
        tensor: array with one axis per mode.
        ring: ranks r_0 … r_d with r_0 = r_d, clamped.

    """
    modes = tuple(tensor.shape)
    if len(modes) == 2:  # a matrix of rank r_0·r_1: its singular vectors are the optimum
        u, s, v = truncated_svd(tensor, ring[0] * ring[1])
        cores = [tl.zeros((mode, ring[0] * ring[1]), **tl.context(tensor)) for mode in modes]
        cores[0][:, : len(s)], cores[1][:, : len(s)] = u * tl.sqrt(s), tl.transpose(v) * tl.sqrt(s)
        left, right = (core.reshape(-1, ring[0], ring[1]) for core in cores)
        return [permute(left, (1, 0, 2)), permute(right, (2, 0, 1))]
    for k, mode in enumerate(modes):
        if ring[k] * ring[k + 1] <= min(mode, math.prod(modes) // mode):
            cores = list(tensor_ring(tensor, list(ring), mode=k, svd=truncated_svd).factors)
            if all(core.shape == (ring[j], n, ring[j + 1]) for j, (core, n) in enumerate(zip(cores, modes, strict=True))):
                return cores
    train = tensor_train(tensor, list(tt.clamp((), modes, (1, *ring[1:-1], 1))), svd=truncated_svd).factors
    noise = np.random.default_rng(0)
    cores = []
    for k, (core, mode) in enumerate(zip(train, modes, strict=True)):
        scale = 1e-2 * float(tl.norm(core)) / math.sqrt(math.prod(core.shape))
        values = scale * noise.standard_normal((ring[k], mode, ring[k + 1]))
        wide = tl.tensor(values, **tl.context(tensor))
        wide[: core.shape[0], :, : core.shape[2]] = core
        cores.append(wide)
    return cores


def error(tensor: ArrayT, cores: Sequence[ArrayT]) -> float:
    """Return the relative error ‖tensor − ring(cores)‖ / ‖tensor‖."""
    modes = tuple(tensor.shape)
    full = reconstruct(cores, (modes[0], math.prod(modes[1:])), (modes[0], *modes[1:])).reshape(modes)
    return float(tl.norm(tensor - full)) / (float(tl.norm(tensor)) or 1.0)


def _refine(tensor: ArrayT, cores: list[ArrayT]) -> list[ArrayT]:
    """Return the cores after damped alternating least squares, which never increases the error.

    The set of rings with given ranks is not closed: without damping, cores grow without bound and cancel each other, and
    such cores do not train. The penalty on large cores is a share of the remaining error, so that it vanishes with the
    error, and all cores are kept at the same norm.
    """
    cores = balanced(cores)
    least, damping = error(tensor, cores), _DAMPING
    size = sum(float(tl.norm(core)) ** 2 for core in cores) or 1.0
    square = float(tl.norm(tensor)) ** 2
    for _ in range(_SWEEPS):
        candidate = list(cores)
        for k in range(len(candidate)):
            candidate[k] = _solve(tensor, candidate, k, damping * least**2 * square / size)
        candidate = balanced(candidate)
        candidate_error = error(tensor, candidate)
        if candidate_error < least:
            progress = least - candidate_error > _PROGRESS * least
            cores, least = candidate, candidate_error
            if not progress or candidate_error < _RIDGE**0.5:
                break
        else:
            damping /= 10
            if damping < _DAMPING / 1e3:
                break
    return cores


def balanced(cores: Sequence[ArrayT]) -> list[ArrayT]:
    """Return cores of the same ring that all have the same Frobenius norm."""
    norms = [float(tl.norm(core)) for core in cores]
    if not all(norms):
        return list(cores)
    mean = math.exp(sum(map(math.log, norms)) / len(norms))
    return [core * (mean / norm) for core, norm in zip(cores, norms, strict=True)]


def _solve(tensor: ArrayT, cores: Sequence[ArrayT], k: int, damping: float) -> ArrayT:
    """Return core k that minimizes the squared error plus `damping` times its squared norm, with the other cores fixed."""
    d = len(cores)
    others = joined(parts_of([cores[(k + 1 + j) % d] for j in range(d - 1)])).core  # (r_k, N, r_{k-1})
    right, count, left = others.shape
    rotated = permute(tensor, tuple((k + j) % d for j in range(d))).reshape(tensor.shape[k], count)
    design = permute(others, (1, 2, 0)).reshape(count, left * right)
    gram = design.T @ design
    ridge = damping + (_RIDGE * float(tl.trace(gram)) / (left * right) or 1.0)
    gram = gram + ridge * tl.eye(left * right, **tl.context(gram))
    solved: ArrayT = tl.solve(gram, (rotated @ design).T)  # (left·right, n_k)
    return permute(solved.reshape(left, right, tensor.shape[k]), (0, 2, 1))


def _input_chain(chain: Chain, ins: Sequence[Part[ArrayT]], inputs: int) -> None:
    """Contract the input of a linear layer core by core, starting from the last, to (r_m, r_0)."""
    ring = ins[-1].core.shape[2]
    before = inputs
    for index, part in enumerate(reversed(ins)):
        left, mode, right = part.core.shape
        before //= mode
        if index == 0:  # (before, i) → (before, r, r_0)
            chain.apply(permute(part.core, (0, 2, 1)).reshape(left * ring, mode), part.cores, before=before)
        else:
            chain.apply(part.core.reshape(left, mode * right), part.cores, before=before, after=ring)


def _tiled(kernel: ArrayT, groups: int) -> ArrayT:
    """Return a kernel (O, C, *K) repeated for each group, (groups·O, C, *K)."""
    shape = (groups, *kernel.shape)
    either: Any = kernel[None]  # the libraries have no common name for a view that repeats its values
    repeated: Any = either.expand(shape) if hasattr(either, "expand") else np.broadcast_to(either, shape)
    tiled: ArrayT = repeated.reshape(groups * kernel.shape[0], *kernel.shape[1:])
    return tiled


def _require(modes: Sequence[int], ranks: Sequence[int]) -> None:
    require_ranks(ranks, len(modes) + 1, f"tr: r_0 … r_{len(modes)} for {len(modes)} modes")
    if ranks[0] != ranks[-1]:
        raise PlanError(f"expected tr ranks whose first and last are equal, r_0 = r_d, got {list(ranks)}")
