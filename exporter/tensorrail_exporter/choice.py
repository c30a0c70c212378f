"""Chooses one of several models that were measured in interleaved runs.

Models are chosen by inputs that cores were not fitted to and ranges not taken from; where there are too few to hold any out,
the report says so. The held-out inputs decide nothing: what is measured on them is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tensorrail_exporter.compressed import Point, Ratios
from tensorrail_exporter.search.fastest_agreeing import agrees
from tensorrail_exporter.search.guard import Guard
from tensorrail_exporter.search.targets import is_met, nearness
from tensorrail_runtime.measure.agreement import Agreement


@dataclass(frozen=True)
class Wanted:
    """What a model must be like."""

    targets: Mapping[str, float] = field(default_factory=dict)
    """Reduction factors by target name."""
    guard: Guard = field(default_factory=Guard)
    """How closely its outputs must agree with the dense model's."""
    max_loss: float | None = None
    """Limit on its loss; default: none."""
    fastest: bool = False
    """Whether the fastest model within the limits is wanted, and not the one that meets the targets with the least loss."""

    def accepts(self, loss: float | None, agreement: Agreement | None) -> bool:
        """Return whether loss and agreement keep the limits, as far as they are known.

        The agreement must keep them by a margin, so that it probably does on other inputs.
        """
        if self.max_loss is not None and loss is not None and loss > self.max_loss:
            return False
        return agreement is None or agrees(agreement, self.guard)

    def met_by(self, point: Point) -> bool:
        """Return whether a model meets the targets within the limits."""
        return meets(point, self.targets) and self.accepts(point.loss, point.chosen)


def best(points: Sequence[Point], wanted: Wanted) -> int:
    """Return the place of the best model.

    It is the one that meets the targets with the least loss, or the fastest one within the limits. With a target on latency,
    those that are measured to be faster than the dense model come first; otherwise speed only decides between equal losses.
    Where none meets the targets, it is the one that keeps the limits and comes nearest to the targets; where none keeps the
    limits, the one that comes nearest to them.

    Args:
        points: the models.
        wanted: what a model must be like.

    """

    def rank(point: Point) -> tuple[float, ...]:
        accepted = wanted.accepts(point.loss, point.chosen)
        reached = meets(point, wanted.targets)
        faster = point.ratios.latency_low > 1.0
        if wanted.fastest:
            return accepted, reached, faster, point.ratios.latency if accepted else _closeness(point, wanted)
        if reached:
            return True, accepted, faster and "latency" in wanted.targets, -(point.loss or 0.0), faster
        return False, accepted, False, nearness({name: _reached(point, name) for name in wanted.targets}, wanted.targets)

    return max(range(len(points)), key=lambda k: rank(points[k]))


def meets(point: Point, targets: Mapping[str, float]) -> bool:
    """Return whether a model meets all targets; if its times are unstable, the lower end of the interval counts."""
    return all(is_met(_reached(point, name), value) for name, value in targets.items())


def _closeness(point: Point, wanted: Wanted) -> float:
    """Return a number that rises as a model comes nearer to the limits."""
    if wanted.max_loss is not None:
        return -(point.loss or 0.0)
    if point.chosen is None:
        return 0.0
    return -point.chosen.difference if point.chosen.agreement is None else point.chosen.agreement


def _reached(point: Point, target: str) -> float:
    ratios: Ratios = point.ratios
    return float(ratios.latency_low if target == "latency" and point.unstable else getattr(ratios, target))
