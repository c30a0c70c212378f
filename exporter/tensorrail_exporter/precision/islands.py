"""Finds the layers that must stay in fp32 so that a network in int8 is accurate enough, and no more than these.

Most of what int8 loses is often lost in a few layers: the first, the last, one with outliers. Consecutive layers are put back
to fp32 together, because every border between int8 and fp32 costs a conversion. Each group is tried alone first; then groups
are kept in the order of what they win for the multiply-accumulates that they take out of int8, until the network is good
enough; at last each half of a kept group is put into int8 again if the network stays good enough without it.

The idea that few layers matter is old; measuring it layer by layer on the network's outputs is done, for example, in
"A White Paper on Neural Network Quantization" (Nagel et al., arXiv:2106.08295, section 3.6, debugging).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import onnx

_GROUPS = 8  # of consecutive layers that are tried at first
_TRIES = 32  # networks that are converted and run at most

Judge = Callable[[onnx.ModelProto], tuple[float, bool]]
"""Returns the loss of a network, and whether it is accurate enough."""


@dataclass(frozen=True)
class Islands:
    """A network in int8 with some layers in fp32."""

    model: onnx.ModelProto
    """The network."""
    kept: tuple[str, ...]
    """The nodes that stay in fp32."""
    good: bool
    """Whether it is accurate enough."""


@dataclass(frozen=True)
class Layer:
    """A node that may stay in fp32."""

    name: str
    """The node's name."""
    macs: int
    """Its multiply-accumulates, which take longer in fp32."""


def with_islands(layers: Sequence[Layer], convert: Callable[[Sequence[str]], onnx.ModelProto], judge: Judge) -> Islands:
    """Return the network in int8, with as few layers in fp32 as make it accurate enough.

    Args:
        layers: the nodes that may stay in fp32, in the order of the graph.
        convert: returns the network in int8 but for these nodes.
        judge: measures it, on inputs that ranges were not taken from.

    Returns:
        The network; if none was found that is accurate enough, the one with the least loss that was tried.

    """
    tried = _Tried(convert, judge)
    loss, good = tried(())
    if good or not layers:
        return tried.best(())
    found: list[tuple[float, tuple[Layer, ...]]] = []
    for group in _split(layers, _GROUPS):
        gain = loss - tried(_names(group))[0]
        if gain > 0:
            found.append((gain / max(1, sum(layer.macs for layer in group)), group))
    kept: list[Layer] = []
    for _, group in sorted(found, key=lambda pair: -pair[0]):
        more, good = tried(_names([*kept, *group]))
        if more < loss or good:
            kept, loss = [*kept, *group], more
        if good:
            break
    if not good:
        return tried.best(min(tried.seen, key=lambda names: tried.seen[names][0]))
    return tried.best(_names(_without_needless(layers, kept, tried)))


class _Tried:
    """Networks by the nodes that stay in fp32, each of which is converted and run once."""

    def __init__(self, convert: Callable[[Sequence[str]], onnx.ModelProto], judge: Judge) -> None:
        self.convert, self.judge = convert, judge
        self.seen: dict[tuple[str, ...], tuple[float, bool]] = {}

    @property
    def full(self) -> bool:
        """Whether no further network may be tried."""
        return len(self.seen) >= _TRIES

    def __call__(self, names: tuple[str, ...]) -> tuple[float, bool]:
        if names not in self.seen:
            self.seen[names] = self.judge(self.convert(names))
        return self.seen[names]

    def best(self, names: tuple[str, ...]) -> Islands:
        return Islands(self.convert(names), names, self(names)[1])


def _without_needless(layers: Sequence[Layer], kept: Sequence[Layer], tried: _Tried) -> list[Layer]:
    """Return the kept layers without those that need not be: halves of what is consecutive, then halves of these."""
    parts = _consecutive(layers, kept)
    while parts and not tried.full:
        part = parts.pop(0)
        rest = [layer for layer in kept if layer not in part]
        if tried(_names(rest))[1]:
            kept = rest
        elif len(part) > 1:
            parts += _split(part, 2)
    return list(kept)


def _consecutive(layers: Sequence[Layer], kept: Sequence[Layer]) -> list[tuple[Layer, ...]]:
    """Return halves of the runs of layers that are kept, which follow each other in the graph."""
    runs: list[list[Layer]] = [[]]
    for layer in layers:
        if layer in kept:
            runs[-1].append(layer)
        elif runs[-1]:
            runs.append([])
    return [half for run in runs if run for half in _split(run, 2)]


def _split(layers: Sequence[Layer], count: int) -> list[tuple[Layer, ...]]:
    """Return the layers in so many groups of nearly equal size, none of them empty."""
    count = min(count, len(layers))
    ends = [round(k * len(layers) / count) for k in range(count + 1)]
    return [tuple(layers[a:b]) for a, b in pairwise(ends)]


def _names(layers: Sequence[Layer]) -> tuple[str, ...]:
    return tuple(sorted(layer.name for layer in layers))
