"""The modes of a weight, (O, I, *K) reshaped to (o₁ … oₘ, K, i₁ … iₙ), and the merging of neighbouring cores.

All formats with separate output and input modes use this layout. K is the product of the kernel's axes; the weight (O, I)
of a linear or recurrent layer has no K.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

from tensorrail_exporter.formats.contraction import ArrayT, permute
from tensorrail_runtime.errors import PlanError

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def default_modes(shape: Sequence[int]) -> tuple[int, ...]:
    """Return (O, K, I) for a convolution and (O, I) for a linear layer: one mode per side."""
    if len(shape) == 2:
        return tuple(shape)
    return (shape[0], math.prod(shape[2:]), shape[1])


@dataclass(frozen=True)
class Equation:
    """The einsum that multiplies cores to a weight.

    A core whose number of axes differs from its number of letters is reshaped to the letters; at most one of them then has
    a size that is not in `axes`.

    Attributes:
        cores: subscripts of every core.
        weight: subscripts of the weight.
        axes: sizes of the letters of the weight; their product is that of (O, I, *K), in this order. A table may have padding
            before its I entries.
        inputs: the letters that belong to I.

    """

    cores: tuple[str, ...]
    weight: str
    axes: tuple[int, ...]
    inputs: str


def side_letters(shape: Sequence[int], modes: Sequence[int]) -> tuple[list[str], str, Equation]:
    """Return one letter per mode (o₁ … oₘ, K, i₁ … iₙ), the letters left for ranks, and the equation without its cores."""
    m = split(shape, modes)
    letters, free = list(LETTERS[: len(modes)]), LETTERS[len(modes) :]
    conv = len(shape) > 2
    outs, taps, ins = letters[:m], letters[m : m + conv], letters[m + conv :]
    sizes = (*modes[:m], *modes[m + conv :], *modes[m : m + conv])
    return letters, free, Equation((), "".join([*outs, *ins, *taps]), sizes, "".join(ins))


def split(shape: Sequence[int], modes: Sequence[int]) -> int:
    """Return how many modes belong to the output side; raise `PlanError` if the modes do not fit the shape."""
    out, inputs, kernel = shape[0], shape[1], tuple(shape[2:])
    taps = math.prod(kernel)
    for count in range(1, len(modes)):
        input_modes = list(modes[count:])
        if kernel and input_modes.pop(0) != taps:
            continue
        if input_modes and min(modes) > 0 and math.prod(modes[:count]) == out and math.prod(input_modes) == inputs:
            return count
    middle = f", then {taps} (the kernel's {'×'.join(map(str, kernel))}), then" if kernel else ", then"
    raise PlanError(
        f"modes {list(modes)} do not fit a weight of shape {list(shape)}: expected modes whose product is {out}"
        f"{middle} modes whose product is {inputs}; try {list(default_modes(shape))}"
    )


def unfold(weight: ArrayT, modes: Sequence[int]) -> ArrayT:
    """Reshape a weight (O, I, *K) to a tensor with one axis per mode."""
    if len(weight.shape) > 2:
        weight = permute(weight, (0, *range(2, len(weight.shape)), 1))
    return weight.reshape(tuple(modes))


def fold(tensor: ArrayT, shape: Sequence[int]) -> ArrayT:
    """Reshape a tensor with one axis per mode to the weight (O, I, *K) of this shape."""
    if len(shape) == 2:
        return tensor.reshape(tuple(shape))
    return kernel_last(tensor.reshape(shape[0], *shape[2:], shape[1]))


def kernel_last(array: ArrayT) -> ArrayT:
    """Permute an array (a, *K, z) to (a, z, *K)."""
    last = len(array.shape) - 1
    return permute(array, (0, last, *range(1, last)))


def require_ranks(ranks: Sequence[int], count: int, what: str) -> None:
    """Raise `PlanError` unless there are `count` ranks of 1 or larger; `what` says in the message which ranks they are."""
    if len(ranks) != count:
        raise PlanError(f"expected {count} ranks ({what}), got {len(ranks)}: {list(ranks)}")
    if min(ranks) < 1:
        raise PlanError(f"expected ranks of 1 or larger, got {list(ranks)}")


def require_merge(merge: str, merges: Sequence[str], name: str) -> None:
    """Raise `PlanError` if `merge` is not among the merges of the format `name`."""
    if merge not in merges:
        raise PlanError(f"unknown merge {merge!r} for format {name}: expected one of {', '.join(merges)}")


@dataclass(frozen=True)
class Part(Generic[ArrayT]):
    """One core, such as (r, n, r'), or several neighbouring cores merged into one.

    Attributes:
        core: the array.
        cores: indices of the stored cores that it contains.

    """

    core: ArrayT
    cores: tuple[int, ...]


def parts_of(cores: Sequence[ArrayT]) -> list[Part[ArrayT]]:
    """Return one part per core."""
    return [Part(core, (index,)) for index, core in enumerate(cores)]


def joined(parts: Sequence[Part[ArrayT]]) -> Part[ArrayT]:
    """Merge neighbouring cores (r, n₁, r₁), (r₁, n₂, r₂) … into one (r, n₁n₂…, r'), starting at the end that costs less."""
    merged = list(parts)
    while len(merged) > 1:
        first = merged[0].core.shape[0] <= merged[-1].core.shape[2]
        place = 0 if first else len(merged) - 2
        left, right = merged[place], merged[place + 1]
        (r, n, _), (s, k, t) = left.core.shape, right.core.shape
        product = (left.core.reshape(r * n, s) @ right.core.reshape(s, k * t)).reshape(r, n * k, t)
        merged[place : place + 2] = [Part(product, (*left.cores, *right.cores))]
    return merged[0]
