"""Finds the layers that must stay in fp32 so that a network in fp16 or int8 is accurate enough, and no more than these.

Most of what a lower precision loses is often lost in a few layers: the first, the last, one with outliers. Consecutive layers
are spared together, because every border between precisions costs a conversion. Each group is tried alone first; then groups
are spared in the order of what they win for the multiply-accumulates that then run in fp32, until the network is good enough;
at last each half of a spared group is converted again if the network stays good enough without it.

Source for leaving the most sensitive layers in a higher precision, layer by layer: Nagel et al., *A White Paper on Neural
Network Quantization*, arXiv:2106.08295, section 3.6.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import onnx

from tensorrail_runtime.errors import GraphError
from tensorrail_runtime.progress import Progress, silent

_GROUPS = 8  # of consecutive layers that are tried at first
_TRIES = 32  # networks that are converted and run at most
_SECONDS = 120.0  # after which no further network is tried
_STAGE = "looking for layers to keep in fp32"

Judge = Callable[[onnx.ModelProto], tuple[float, bool]]
"""Returns the loss of a network, and whether it is accurate enough."""


@dataclass(frozen=True)
class Spared:
    """A converted network with some layers in fp32."""

    model: onnx.ModelProto
    """The network."""
    spared: tuple[str, ...]
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


def with_spared_layers(
    layers: Sequence[Layer],
    convert: Callable[[Sequence[str]], onnx.ModelProto],
    judge: Judge,
    in_fp32: onnx.ModelProto,
    progress: Progress = silent,
) -> Spared:
    """Return the converted network, with as few layers in fp32 as make it accurate enough.

    Args:
        layers: the nodes that may stay in fp32, in the order of the graph.
        convert: returns the network converted but for these nodes; raises `GraphError` if nothing is left to convert.
        judge: measures it, on inputs that ranges were not taken from; if there are too few for that, on the same ones, and
            fewer layers may be spared than other inputs need.
        in_fp32: the network in fp32; if it is not accurate enough either, no layers are spared.
        progress: told how many networks were tried.

    Returns:
        The network; all of it converted where no layers help.

    """
    plain = convert(())
    loss, good = judge(plain)
    if good or not layers or not judge(in_fp32)[1]:
        return Spared(plain, (), good)
    tried = _Tried(convert, judge, progress)
    tried.seen[()] = loss, good
    found: list[tuple[float, tuple[Layer, ...]]] = []
    for group in split_evenly(layers, _GROUPS):
        if tried.late:
            break
        gain = loss - tried(_names(group))[0]
        if gain > 0:
            found.append((gain / max(1, sum(layer.macs for layer in group)), group))
    spared: list[Layer] = []
    for _, group in sorted(found, key=lambda pair: -pair[0]):
        more, good = tried(_names([*spared, *group]))
        if more < loss or good:
            spared, loss = [*spared, *group], more
        if good or tried.late:
            break
    if not good:
        return Spared(plain, (), good=False)
    names = _names(_without_needless(layers, spared, tried))
    return Spared(convert(names), names, good=True)


class _Tried:
    """Networks by the nodes that stay in fp32, each of which is converted and run once.

    One that cannot be converted, because nothing in it would be, is not accurate enough.
    """

    def __init__(self, convert: Callable[[Sequence[str]], onnx.ModelProto], judge: Judge, progress: Progress) -> None:
        self.convert, self.judge, self.progress = convert, judge, progress
        self.seen: dict[tuple[str, ...], tuple[float, bool]] = {}
        self._end = time.monotonic() + _SECONDS

    @property
    def late(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() > self._end

    @property
    def full(self) -> bool:
        """Whether no further network may be tried."""
        return self.late or len(self.seen) >= _TRIES

    def __call__(self, names: tuple[str, ...]) -> tuple[float, bool]:
        if names not in self.seen:
            self.progress(_STAGE, min(1.0, len(self.seen) / _TRIES), f"{len(names)} layers")
            try:
                converted = self.convert(names)
            except GraphError:
                self.seen[names] = math.inf, False
            else:
                self.seen[names] = self.judge(converted)
        return self.seen[names]


def _without_needless(layers: Sequence[Layer], spared: Sequence[Layer], tried: _Tried) -> list[Layer]:
    """Return the spared layers without those that need not be: halves of what is consecutive, then halves of these."""
    parts = _consecutive(layers, spared)
    while parts and not tried.full:
        part = parts.pop(0)
        rest = [layer for layer in spared if layer not in part]
        if tried(_names(rest))[1]:
            spared = rest
        elif len(part) > 1:
            parts += split_evenly(part, 2)
    return list(spared)


def _consecutive(layers: Sequence[Layer], spared: Sequence[Layer]) -> list[tuple[Layer, ...]]:
    """Return halves of the runs of layers that are spared, which follow each other in the graph."""
    runs: list[list[Layer]] = [[]]
    for layer in layers:
        if layer in spared:
            runs[-1].append(layer)
        elif runs[-1]:
            runs.append([])
    return [half for run in runs if run for half in split_evenly(run, 2)]


def split_evenly(layers: Sequence[Layer], count: int) -> list[tuple[Layer, ...]]:
    """Return the layers in so many groups of nearly equal size, none of them empty."""
    count = min(count, len(layers))
    ends = [round(k * len(layers) / count) for k in range(count + 1)]
    return [tuple(layers[a:b]) for a, b in pairwise(ends)]


def _names(layers: Sequence[Layer]) -> tuple[str, ...]:
    return tuple(sorted(layer.name for layer in layers))
