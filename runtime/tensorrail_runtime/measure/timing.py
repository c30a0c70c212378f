"""How models are timed: one bundle for everything that measures latency."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tensorrail_runtime.errors import UsageError
from tensorrail_runtime.progress import Progress, silent
from tensorrail_runtime.sessions.inputs import Shapes
from tensorrail_runtime.sessions.session import Session
from tensorrail_runtime.sessions.values import Values

_SECONDS = 10.0  # of measuring, where no other time is asked for


@dataclass(frozen=True)
class Timing:
    """How long, on what inputs and where models are timed."""

    batch: int = 1
    """Size of the dynamic axes that `shapes` does not give."""
    shapes: Shapes = field(default_factory=dict)
    """Shapes of inputs by name; default: those in the graph."""
    seconds: float | None = None
    """Seconds of measuring, all models together; default: 10, or for the regression gate 1 in each process."""
    warmup: float = 0.2
    """Seconds of running the models before the measurement."""
    processes: int = 0
    """Fresh processes to time in, so that the interval covers what they differ by; 0: this process alone."""
    io_binding: bool = False
    """Keep inputs and outputs on the device, and leave their transfer out of the times."""
    seed: int = 0
    """Seed of the random inputs."""
    values: Values = field(default_factory=dict, compare=False)  # arrays have no truth value when compared
    """Known values of inputs by name, cut or repeated to the shapes that are timed; other inputs are random."""

    def __post_init__(self) -> None:
        """Raise `UsageError` for a number out of its range."""
        if self.batch < 1:
            raise UsageError(f"batch: expected 1 or more samples, got {self.batch}")
        if self.processes < 0:
            raise UsageError(f"processes: expected 0 or more fresh processes, got {self.processes}")
        for name, seconds in (("seconds", self.seconds), ("warmup", self.warmup)):
            if seconds is not None and not 0 <= seconds < math.inf:
                raise UsageError(f"{name}: expected 0 or more seconds, got {seconds:g}")

    @property
    def duration(self) -> float:
        """Seconds of measuring: `seconds`, or 10 if there are none."""
        return _SECONDS if self.seconds is None else self.seconds


@dataclass(frozen=True)
class Conditions:
    """What a model is measured under, where a measurement is one step of a longer piece of work."""

    timing: Timing = field(default_factory=Timing)
    """How latency is measured."""
    settings: Session = field(default_factory=Session)
    """How the models run."""
    progress: Progress = silent
    """Told about the stages of the work."""
