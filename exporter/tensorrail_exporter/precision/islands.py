"""Finds layers that run faster in fp32 within a network in int8, with the conversions at both ends of them.

Not every layer gains from int8: a convolution of three channels, or one between operators that stay in fp32, may take longer
with its conversions than in fp32. What a border between both costs depends on the size of the tensor, on what ONNX Runtime
fuses across it, and on whether the next layer is in int8 as well. So nothing is predicted here: runs of consecutive layers are
put into fp32, halves of the network first, then quarters, and so on, and each network is timed interleaved with the one before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import onnx

from tensorrail_exporter.precision.spared import Layer, split_evenly
from tensorrail_runtime.errors import GraphError
from tensorrail_runtime.measure.latency import Ratio
from tensorrail_runtime.progress import Progress, silent

_PARTS = (2, 4, 8, 16)  # of the layers, one round each
_SECONDS = 60.0  # after which no further network is tried
_TOGETHER = 4  # networks that are timed with the one before, interleaved: more would take time as the square of their number
_WORTH = 1.02  # times faster, at least: a change for less may be one of the machine
_STAGE = "looking for layers that are faster in fp32"

Converter = Callable[[Sequence[str]], onnx.ModelProto]
"""Returns the network in int8 but for these nodes."""

Timer = Callable[[Sequence[onnx.ModelProto]], Sequence[Ratio]]
"""Returns how many times faster each network but the first is than the first one."""


def fastest_islands(
    layers: Sequence[Layer],
    start: Sequence[str],
    convert: Converter,
    timer: Timer,
    progress: Progress = silent,
) -> tuple[str, ...]:
    """Return the nodes that stay in fp32 in the network that is measured to be fastest.

    Args:
        layers: the nodes that may stay in fp32, in the order of the graph.
        start: those that stay in fp32 in any case.
        convert: returns the network in int8 but for these nodes; raises `GraphError` if nothing is left in int8.
        timer: times networks in interleaved runs.
        progress: told how far the search is.

    Returns:
        The names of `start` and of those that were added, sorted; `start` if no layers are faster in fp32.

    """
    names, fixed, end = frozenset(start), frozenset(start), time.monotonic() + _SECONDS
    for number, count in enumerate(_PARTS if layers else ()):
        progress(_STAGE, number / len(_PARTS), f"{len(names) - len(fixed)} found")
        parts = [frozenset(layer.name for layer in part) - fixed for part in split_evenly(layers, count)]
        changes = [part - names for part in parts] + [part & names for part in parts]  # into fp32, and back into int8
        single = _timed(names, [names ^ change for change in dict.fromkeys(changes) if change], convert, timer, end)
        winners = sorted((other for other in single if single[other] >= _WORTH), key=lambda other: -single[other])
        # What helps alone may not help together, so the first of them, the first two, and so on, are timed again.
        together = [_all_changes(names, winners[: n + 1]) for n in range(len(winners))]
        again = _timed(names, together, convert, timer, end) or {other: single[other] for other in winners}
        best = max(again, key=lambda other: again[other], default=names)
        if again.get(best, 0.0) >= _WORTH:
            names = best
        if time.monotonic() > end or count >= len(layers):
            break
    progress(_STAGE, 1.0, f"{len(names) - len(fixed)} found")
    return tuple(sorted(names))


def _all_changes(names: frozenset[str], others: Sequence[frozenset[str]]) -> frozenset[str]:
    """Return the nodes with the changes from `names` to each of the others."""
    changed = frozenset(name for other in others for name in names ^ other)
    return names ^ changed


def _timed(
    names: frozenset[str], others: Sequence[frozenset[str]], convert: Converter, timer: Timer, end: float
) -> dict[frozenset[str], float]:
    """Return how many times faster networks with other nodes in fp32 are than that of `names`; 0 where that is not certain.

    Networks are left out in which nothing is in int8, or that are not reached before the end.
    """
    ratios: dict[frozenset[str], float] = {}
    for begin in range(0, len(others), _TOGETHER):
        made = {}
        for other in others[begin : begin + _TOGETHER]:
            if time.monotonic() > end:
                break
            with suppress(GraphError):
                made[other] = convert(sorted(other))
        if made:
            timed = timer([convert(sorted(names)), *made.values()])
            ratios |= {other: ratio.value if ratio.low > 1.0 else 0.0 for other, ratio in zip(made, timed, strict=True)}
    return ratios
