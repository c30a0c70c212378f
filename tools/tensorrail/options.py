"""The settings that all verbs share: one bundle, so that a function takes few arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tensorrail_runtime.feeds.rules import InputRules
from tensorrail_runtime.measure.timing import Conditions, Timing
from tensorrail_runtime.progress import Progress, silent
from tensorrail_runtime.sessions.session import Session

if TYPE_CHECKING:
    from tensorrail_exporter.search.guard import Guard
    from tensorrail_exporter.search.targets import Search


@dataclass(frozen=True)
class Fit:
    """How cores are fitted to calibration inputs."""

    seconds: float | None = None
    """Time limit in seconds for fitting cores in torch, block by block and then all together; 0: no such fit; default: 120
    where torch is installed, else 0."""
    samples: int | None = None
    """Calibration samples that are used at most; default: 512 for `compress`, 128 for `plan`."""


@dataclass(frozen=True)
class Options:
    """How a verb does its work; what is left out has the verb's own default."""

    session: Session = field(default_factory=Session)
    """How models run: provider, threads and what the provider offers."""
    timing: Timing | None = None
    """Batch size and shapes, and how long latency is measured."""
    search: Search | None = None
    """How a plan is searched for."""
    fit: Fit = field(default_factory=Fit)
    """How cores are fitted to calibration inputs."""
    guard: Guard | None = None
    """How closely the outputs of a compressed model must agree with the dense model's, on inputs that are held out."""
    progress: Progress = silent
    """Told how far the work is: `progress(stage, share, detail)`."""
    inputs: InputRules = field(default_factory=InputRules)
    """Which inputs are constants or states, or have their samples along another axis than the first."""
    precision: str | Sequence[str] | None = None
    """Precision of a planned or compressed model: `fp32`, `fp16` or `int8`. For `compress` also several, or `auto`, for fp32,
    int8, and fp16 where the provider computes in it: the one that meets the target with the least loss. Default: that of the
    plan, if one is given, else `fp32`."""
    front: bool = False
    """Whether `compress` walks targets from a speed-up of 1.2 to what can be reached, and measures all of these models in
    interleaved runs; default False."""
    contrib: bool = True
    """Whether `export` and `compress` may write operators of com.microsoft, which ONNX Runtime alone has. With False, fused
    attention becomes operators of ONNX, also in the dense model that `compress` compares with; default True."""

    @property
    def precisions(self) -> tuple[str, ...]:
        """The names of the precisions that are asked for; empty: none."""
        return (self.precision,) if isinstance(self.precision, str) else tuple(self.precision or ())

    def conditions(self, timing: Timing) -> Conditions:
        """Return what models are measured under, with this timing where none was given."""
        return Conditions(self.timing or timing, self.session, self.progress)
