r"""Fewer channels: a layer reads k of its I inputs, with a weight that makes up for the others.

.. math:: W ≈ V S, \quad V ∈ R^{O × k × K}, \quad S ∈ \{0, 1\}^{k × I},

where each row of S selects one channel. The selection is no kernel of its own: where nothing but functions of single channels
lies between two layers, the layer before does not compute the other channels (`rewrite.channels`). Elsewhere it runs as a
product. For the weight alone, the best k channels are those with the largest norms; with the inputs, see `calibrate.channels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import tensorly as tl

from tensorrail_exporter.formats.contraction import (
    Array,
    ArrayT,
    Chain,
    LayerSpec,
    MatMul,
    Op,
    Reshape,
    SplitIndex,
    Step,
    as_layer,
    describe_step,
    permute,
)
from tensorrail_exporter.formats.modes import LETTERS, Equation, require_merge, require_ranks
from tensorrail_exporter.formats.truncation import backend_of
from tensorrail_runtime.errors import PlanError


def merges(op: Op) -> tuple[str, ...]:
    """Return `channels`: there is nothing to merge."""
    return ("channels",)


def default_modes(shape: Sequence[int]) -> tuple[int, ...]:
    """Return (I,)."""
    return (shape[1],)


def uniform(shape: Sequence[int], modes: Sequence[int], rank: int) -> tuple[int, ...]:
    """Return (rank,): the number of channels."""
    return (rank,)


def clamp(shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """Return the number of channels, at most I."""
    _require(ranks)
    return (min(ranks[0], shape[1]),)


def validate(shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> None:
    """Raise `PlanError` unless the only mode is I and there is one rank."""
    if tuple(modes) != (shape[1],):
        raise PlanError(f"modes {list(modes)} do not fit a weight of shape {list(shape)}: expected [{shape[1]}], its inputs")
    _require(ranks)


def decompose(weight: ArrayT, modes: Sequence[int], ranks: Sequence[int]) -> list[ArrayT]:
    """Return the weight of the k channels with the largest norms (O, k, *K), and their selection (k, I)."""
    shape = tuple(weight.shape)
    validate(shape, modes, ranks)
    (count,) = clamp(shape, modes, ranks)
    with backend_of(weight):
        squares = tl.sum(tl.reshape(tl.moveaxis(weight, 1, 0), (shape[1], -1)) ** 2, axis=1)
        kept = sorted(int(channel) for channel in tl.argsort(squares, axis=0)[shape[1] - count :])
        selection = tl.eye(shape[1], **tl.context(weight))[kept]
        return [weight[:, kept], selection]


def reconstruct(cores: Sequence[ArrayT], shape: Sequence[int], modes: Sequence[int]) -> ArrayT:
    """Return the dense weight (O, I, *K) or (O, I), which is zero for the channels that are not read."""
    nd = len(shape) - 2
    product = permute(cores[0], (0, *range(2, 2 + nd), 1)) @ cores[1]
    return permute(product, (0, 1 + nd, *range(1, 1 + nd)))


def core_shapes(shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return (O, k, *K) and (k, I)."""
    validate(shape, modes, ranks)
    (count,) = clamp(shape, modes, ranks)
    return ((shape[0], count, *shape[2:]), (count, shape[1]))


def rank_axes(shape: Sequence[int], modes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return no axes: a channel of zeros would be computed by the layer before."""
    return ((), ())


def equation(shape: Sequence[int], modes: Sequence[int]) -> Equation:
    """Return the einsum of the weight and the selection."""
    kernel = LETTERS[3 : 3 + len(shape) - 2]
    return Equation(("ac" + kernel, "cb"), "ab" + kernel, tuple(shape), "b")


def contraction(cores: Sequence[ArrayT], layer: LayerSpec, modes: Sequence[int], merge: str) -> tuple[Step, ...]:
    """Return two steps: the selection as a product, and the layer with k inputs."""
    require_merge(merge, merges(layer.op), "width")
    if layer.op != "conv":
        chain = Chain(layer)
        chain.apply(cores[1], (1,))
        chain.apply(cores[0], (0,))
        return chain.steps
    selection = cores[1].reshape(*cores[1].shape, *(1,) * layer.spatial)
    first = as_layer(selection, (1,), layer, used=(False,) * layer.spatial)
    return (first, as_layer(cores[0], (0,), layer))


def selected(selection: Array) -> np.ndarray | None:
    """Return the channels (k,) that a matrix (k, I) selects; None if it does anything else."""
    matrix = np.asarray(selection)
    places = np.argmax(matrix, axis=1)
    ones = np.zeros_like(matrix)
    ones[np.arange(len(matrix)), places] = 1
    return places if np.array_equal(matrix, ones) and len(set(places.tolist())) == len(places) else None


def with_inputs(layer: LayerSpec, count: int) -> LayerSpec:
    """Return the layer with another number of inputs."""
    return replace(layer, shape=(layer.shape[0], count, *layer.shape[2:]))


def describe_narrow(steps: Sequence[Step], layer: LayerSpec) -> str:
    """Return the step of a layer that reads few channels in words, such as `40 of 64 channels: conv 3×3 40→64`."""
    (step,) = steps
    inputs = 0 if isinstance(step, Reshape | SplitIndex) else step.weight.shape[0 if isinstance(step, MatMul) else 1]
    return f"{inputs} of {layer.shape[1]} channels: {describe_step(step)}"


def _require(ranks: Sequence[int]) -> None:
    require_ranks(ranks, 1, "width: the number of channels that are read")
