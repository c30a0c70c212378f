"""What a plan should reach, and how it is searched for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tensorrail_runtime.errors import PlanError

TARGETS = ("latency", "flops", "params", "bytes")

_GAIN = 0.95
_MET = 0.99  # measured times vary: a network that reaches this share of a target meets it


def is_met(reached: float, target: float) -> bool:
    """Return whether a target is met: the one definition, for plans and for compressed models.

    Args:
        reached: how many times less the network takes than the dense one, such as 1.99.
        target: how many times less it should take, such as 2.0.

    """
    return reached >= _MET * target


@dataclass(frozen=True)
class Search:
    """How the plan of a network is searched for."""

    formats: tuple[str, ...] = ("auto",)
    """Formats to choose from; `auto`: those that are usually fastest for the layer."""
    grid: int = 0
    """Ranks are multiples of it; 0: the number of channels that the provider's kernels compute at once."""
    keep: tuple[str, ...] = ()
    """Patterns (`*`, `?`) of layers that stay dense."""
    max_loss: float | None = None
    """The fastest network within this sum of losses, in place of targets or together with them."""
    allow_slower: bool = False
    """For a target on size: also rewrite layers that are not 5 % faster than the dense layer."""
    seconds: float = 150.0
    """Seconds of timing layers that are not in the latency table yet."""
    check_seconds: float = 10.0
    """Seconds of timing the chosen network."""
    cache: Path | None = None
    """Folder of latency tables; default $TENSORRAIL_CACHE, else ~/.cache/tensorrail."""

    also: tuple[str, ...] = ()
    """Precisions, `fp16` or `int8`, that `compress` writes the model in as well."""

    @property
    def gain(self) -> float:
        """The largest share of its dense time that a rewritten layer may take."""
        return math.inf if self.allow_slower else _GAIN

    def check(self, targets: Mapping[str, float]) -> None:
        """Raise `PlanError` for a target that does not exist or cannot be a target, and where there is none."""
        if self.max_loss is not None and not self.max_loss > 0:
            raise PlanError(f"max_loss: expected a positive number, got {self.max_loss:g}")
        if not targets and self.max_loss is None:
            raise PlanError(
                f"expected a target, such as {', '.join(f'{name}=2.0' for name in TARGETS)}, or a max_loss; got none"
            )
        for name, value in targets.items():
            if name not in TARGETS:
                raise PlanError(f"unknown target {name!r}: expected one of {', '.join(TARGETS)}")
            if not 1.0 < value < 1e4:
                raise PlanError(f"target {name}: expected a reduction factor between 1 and 10000, such as 2.0, got {value:g}")
