"""The targets of a plan, and the settings of the search."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from tensorrail_exporter.plans.plan import Precision
from tensorrail_exporter.search.guard import Guard
from tensorrail_runtime.errors import PlanError
from tensorrail_runtime.sessions.halves import computes_in_fp16
from tensorrail_runtime.sessions.session import Session

AUTO = "auto"  # fp32, int8, and fp16 where the provider computes in it

TARGETS = ("latency", "flops", "params", "bytes")

_GAIN = 0.95
_CHECKED = 10.0  # seconds for timing the chosen network, at most
_MET = 0.99  # measured times vary: a network that reaches this share of a target meets it


def is_met(reached: float, target: float) -> bool:
    """Return whether a target is met, within 1 %.

    Args:
        reached: the reduction factor of the network against the dense one, such as 1.99.
        target: the reduction factor to reach, such as 2.0.

    Returns:
        Whether `reached` is at least 0.99 times `target`.

    """
    return reached >= _MET * target


def nearness(reached: Mapping[str, float], targets: Mapping[str, float]) -> float:
    """Return the share of a target that is reached, for the target with the smallest share; 1 without targets."""
    return min((reached[name] / target for name, target in targets.items()), default=1.0)


def precisions_of(asked: Sequence[str], settings: Session) -> tuple[Precision, ...]:
    """Return the precisions that are planned for what was asked, fp32 first.

    Args:
        asked: names of precisions, or `auto`: fp32, int8, and fp16 where the provider computes in it.
        settings: how the networks will run.

    Raises:
        PlanError: a name is unknown, or there is none.

    """
    known = get_args(Precision)
    for name in asked or [""]:
        if name not in (*known, AUTO):
            raise PlanError(f"precision: expected {', '.join((*known, AUTO))}, got {name!r}")
    chosen = {*asked}
    if AUTO in chosen:
        chosen |= {"fp32", "int8"} | ({"fp16"} if computes_in_fp16(settings) else set())
    return tuple(precision for precision in known if precision in chosen)


@dataclass(frozen=True)
class Search:
    """How the plan of a network is searched for."""

    formats: tuple[str, ...] = ("auto",)
    """Formats to choose from; default `auto`: those that are usually fastest for the layer."""
    grid: int = 0
    """Ranks are multiples of it; default 0: the number of channels that the provider's kernels compute at once."""
    keep: tuple[str, ...] = ()
    """Name patterns (`*`, `?`) of layers that stay dense; default: none."""
    max_loss: float | None = None
    """Limit on the loss: with calibration inputs the measured loss of the whole network, else the sum over layers. The fastest
    network within it is looked for, with or without targets; default: no limit."""
    guard: Guard | None = None
    """Limits on how far outputs may be from the dense network's: find the fastest network within them, on calibration inputs
    that cores were not fitted to; default: none, so the least loss is looked for."""
    joint: bool | None = None
    """Whether layers that read the same input become one, such as query, key and value of attention; default None: where the
    network is measured to be faster for it."""
    heads: int | tuple[int, int] | None = None
    """The number of values that each attention head gets, or two: between query and key, and between value and output. All
    pairs of layers that allow it get it before layers are replaced; default None: heads stay as they are."""
    allow_slower: bool = False
    """Also rewrite layers that are not 5 % faster than the dense layer, for targets on size; default False."""
    seconds: float = 60.0
    """Time limit in seconds for timing layers that are not in the latency table yet, of which a quarter is used where neither
    `latency` is a target nor loss or agreement are limited; default 60."""
    improve_seconds: float = 20.0
    """Time limit in seconds for the local search around the chosen network, which needs calibration inputs and has no effect
    with `max_loss`; default 20."""
    check_seconds: float | None = None
    """Seconds for timing the chosen network, half of it where neither `latency` is a target nor loss or agreement are limited;
    default: 10, or `seconds` if these are fewer."""
    cache: Path | None = None
    """Folder of latency tables; default $TENSORRAIL_CACHE, else `tensorrail` in $XDG_CACHE_HOME or ~/.cache."""
    precision: Precision = "fp32"
    """The precision that the network will run in: layers and networks are timed in it, and targets count from the dense
    network in fp32; default fp32."""
    also: tuple[str, ...] = ()
    """Further precisions, `fp16` or `int8`, in which `compress` also writes the model; default: none."""
    metric: str | None = None
    """A score of each sample, as `top1`, `top5` or `module:function` of (outputs, labels), whose fall is the loss; it needs
    calibration inputs with labels. Default: none, so the loss is how far outputs move."""

    @property
    def timed_for(self) -> float:
        """Seconds for timing the chosen network."""
        return min(_CHECKED, self.seconds) if self.check_seconds is None else self.check_seconds

    @property
    def gain(self) -> float:
        """The largest share of its dense time that a rewritten layer may take."""
        return math.inf if self.allow_slower else _GAIN

    def keeps(self, name: str) -> bool:
        """Return whether the layer of this name stays dense because of `keep`."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.keep)

    def check(self, targets: Mapping[str, float]) -> None:
        """Check the targets and the limit on the loss.

        Args:
            targets: reduction factors by target name.

        Raises:
            PlanError: there is neither a target nor a limit, a name is unknown, or a value is out of range.
            UsageError: a limit on the agreement is out of range.

        """
        if self.max_loss is not None and not 0 < self.max_loss < math.inf:
            raise PlanError(f"max_loss: expected a positive number, got {self.max_loss:g}")
        if self.grid < 0:
            raise PlanError(f"grid: expected a multiple for ranks, or 0, got {self.grid}")
        if self.heads is not None and min(self.heads if isinstance(self.heads, tuple) else (self.heads,)) < 1:
            raise PlanError(f"heads: expected a positive number of values, or two, got {self.heads}")
        if self.precision not in get_args(Precision):
            raise PlanError(f"precision: a plan is for one of {', '.join(get_args(Precision))}, got {self.precision!r}")
        if self.guard is not None:
            self.guard.check()
            if self.max_loss is not None:
                raise PlanError("expected a limit on the loss or on the agreement of the outputs, got both: leave one out")
        if not targets and self.max_loss is None and self.guard is None:
            raise PlanError(
                f"expected a target, such as {', '.join(f'{name}=2.0' for name in TARGETS)}, or a max_loss; got neither"
            )
        for name, value in targets.items():
            if name not in TARGETS:
                raise PlanError(f"unknown target {name!r}: expected one of {', '.join(TARGETS)}")
            if not isinstance(value, int | float) or not 1.0 < value < 1e4:
                raise PlanError(f"target {name}: expected a reduction factor between 1 and 10000, such as 2.0, got {value!r}")
