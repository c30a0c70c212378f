"""A latency regression gate: what does not vary is held to hard limits, time to a test that knows its own noise.

Each measurement is taken in several fresh processes, since a process has luck of its own (where its weights lie). When the
baseline's model is at hand, both models run in turns in every process, and only their ratio counts; else the times are held
against the recorded ones, which also see all that has changed in the machine since.

An alarm needs both: the one-sided Mann-Whitney test on block medians (Mann and Whitney 1947) says that the model is slower,
and the estimated slow-down is at least half of the size to be found. A true slow-down of the full size then lies well above
that threshold and none lies well below, once the estimate is narrow: on a busy machine processes are added, two by two, until
its standard error is a tenth of that size or four times the processes have run. The rule looks at the spread alone, never at
the difference, so it favours neither answer. `benchmarks/gate.py` measures how often either goes wrong.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, ValidationError

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.gate.checks import Data, Facts, Finding, Limits, facts_of, held, interface_of, sha256_of_data
from tensorrail_runtime.graphs.files import sha256_of
from tensorrail_runtime.measure.latency import LatencyReport, bench, cycles
from tensorrail_runtime.records import Record, first_problem
from tensorrail_runtime.sessions.fresh import fresh
from tensorrail_runtime.sessions.inputs import Shapes
from tensorrail_runtime.sessions.machine import Machine, machine
from tensorrail_runtime.sessions.session import Session

__all__ = ["Baseline", "Data", "Effort", "Facts", "Finding", "Limits", "Verdict", "check", "compare_times", "record"]

_BLOCKS = 8  # medians taken of each process
_ALPHA = 0.01
_PRECISION = 10  # the slow-down to be found, over the standard error that is good enough
_MOST = 4  # times the processes asked for, on a noisy machine


Times = Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Field(min_length=_BLOCKS)]
"""Milliseconds of one process."""


class Baseline(Record):
    """A model's facts and times, to hold later ones against."""

    version: Literal[3] = 3
    model: str  # relative to the baseline's own folder
    provider: str
    threads: int = Field(ge=0)
    batch: int = Field(ge=1)
    shapes: dict[str, tuple[Annotated[int, Field(ge=1)], ...]]  # of inputs, as asked for
    machine: Machine
    facts: Facts
    processes: Annotated[tuple[Times, ...], Field(min_length=1)]

    @classmethod
    def load(cls, path: Path | str) -> Baseline:
        """Read a baseline; `ModelError` names what is wrong with the file."""
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror or error}): expected a baseline") from None
        except (ValidationError, UnicodeDecodeError) as error:
            problem = first_problem(error) if isinstance(error, ValidationError) else "not a text file"
            if isinstance(error, ValidationError) and error.errors()[0]["loc"] == ("version",):
                problem += "; it was recorded by another version of tensorrail: record it again"
            raise ModelError(f"{path}: not a baseline: {problem}") from None

    def require(
        self,
        *,
        provider: str | None = None,
        threads: int | None = None,
        batch: int | None = None,
        shapes: Shapes | None = None,
    ) -> None:
        """Raise `ModelError` where something else is asked for than was recorded, which is what a model is measured with."""
        if shapes and {name: tuple(shape) for name, shape in shapes.items()} != self.shapes:
            raise ModelError(
                f"the baseline of {self.model} was recorded with shapes {_shown(self.shapes)}, got {_shown(shapes)}: "
                "omit --shape, or record the baseline again"
            )
        for name, asked in (("provider", provider), ("threads", threads), ("batch", batch)):
            own = getattr(self, name)
            if asked not in (None, own):
                raise ModelError(
                    f"the baseline of {self.model} was recorded with {name} {own}, got --{name} {asked}: "
                    "omit the option, or record the baseline again"
                )

    def require_data(self, data: Data | None) -> None:
        """Raise `ModelError` for data that the baseline's score cannot be compared on, and where only one side has a score."""
        facts, what = self.facts, f"the baseline of {self.model}"
        if data is None:
            if facts.score is not None:
                raise ModelError(
                    f"{what} contains a score ({facts.metric}), got no data: pass the data of its recording, --data FILE"
                )
        elif facts.score is None:
            raise ModelError(f"{what} contains no score: record it with --data, or omit --data here")
        elif data[2] != facts.metric:
            raise ModelError(f"{what} contains a {facts.metric} score, got metric {data[2]}: pass --metric {facts.metric}")
        elif facts.data and facts.data != sha256_of_data(data):
            raise ModelError(f"{what} contains a score on different data: pass the same data, or record the baseline again")


class Verdict(Record):
    """What a check found."""

    model: str
    timing: Timing | None  # None for a model that does not run on what the baseline's ran on: it fell short before
    findings: tuple[Finding, ...]
    machine: Machine
    recorded_on: Machine | None = None  # where the times that count were recorded, unless both ran here, in turns

    @property
    def holds(self) -> bool:
        """Whether everything is within its limit."""
        return all(finding.holds for finding in self.findings)

    @property
    def reason(self) -> str:
        """One line: what falls short, or that nothing does."""
        short = [f"{f.name} {f.measured} (baseline {f.baseline}, limit {f.limit})" for f in self.findings if not f.holds]
        return f"{self.model}: " + ("; ".join(short) if short else "no regression")

    @property
    def interleaved(self) -> bool:
        """Whether the times that count were taken here, in turns."""
        return self.timing is not None and self.recorded_on is None

    @property
    def how(self) -> str:
        """What the times were held against."""
        return "against recorded times" if self.recorded_on else "interleaved with the baseline's model"

    @property
    def warning(self) -> str:
        """Why times may differ for another reason than the model; empty where both ran here."""
        if self.recorded_on is None:
            return ""
        then, now = (
            (m.processor, f"{m.cores} cores", f"ONNX Runtime {m.onnxruntime}") for m in (self.recorded_on, self.machine)
        )
        if then != now:
            return (
                f"compared with times of another machine ({', '.join(then)}), measured on {', '.join(now)}: "
                "record the baseline again on this machine"
            )
        return (
            "compared with recorded times, so changes of the machine since then count as well: "
            "keep the baseline's model file where it was recorded"
        )


class Timing(Record):
    """How a model's time differs. `slowdown` is a share: 0.05 is five percent more, with its 95 % interval over processes."""

    slowdown: float
    low: float
    high: float
    p_value: float
    p50_ms: float
    baseline_p50_ms: float


class Effort(Record):
    """How much is measured: fresh processes, and seconds of timing in each; up to four times the processes when it is noisy."""

    processes: int = Field(default=6, ge=2)  # an even number: each model is loaded first in half of them
    seconds: float = Field(default=1.0, gt=0)


def record(
    path: Path | str,
    out: Path | str,
    *,
    settings: Session | None = None,
    batch: int = 1,
    shapes: Shapes | None = None,
    effort: Effort | None = None,
    data: Data | None = None,
    on_process: Callable[[float], None] = lambda _: None,
) -> Baseline:
    """Measure a model and write its baseline to `out`; `shapes` are of inputs whose dynamic axes are not all the batch."""
    settings, shapes = settings or Session(), shapes or {}
    if Path(out).suffix == ".onnx" or not Path(out).parent.is_dir():
        raise ModelError(f"{out}: expected a JSON file in an existing folder, such as baseline.json")
    facts = facts_of(path, settings, batch, data, shapes)
    runs = _measure([path], settings, batch, shapes, effort or Effort(), on_process)
    baseline = Baseline(
        model=Path(os.path.relpath(path, Path(out).parent)).as_posix(),
        provider=settings.provider,
        threads=settings.threads,
        batch=batch,
        shapes={name: tuple(shape) for name, shape in shapes.items()},
        machine=runs[0].machine,
        facts=facts,
        processes=tuple(report.latencies[0].samples for report in runs),
    )
    baseline.save(out)
    return baseline


def check(
    reference: Baseline | Path | str,
    path: Path | str,
    *,
    limits: Limits | None = None,
    effort: Effort | None = None,
    settings: Session | None = None,
    batch: int | None = None,
    shapes: Shapes | None = None,
    data: Data | None = None,
    on_process: Callable[[float], None] = lambda _: None,
) -> Verdict:
    """Hold a model against a baseline file, or against another model on the spot (`reference` ends in .onnx).

    With a baseline, provider, threads, batch and shapes are the recorded ones; a batch is 1 otherwise. Both models run on
    inputs of the same shapes, those of the baseline's model; one that takes others, does not run on them or gives NaN falls
    short. Raises `ModelError` for files that are neither, for another provider, thread count, batch or shape than the recorded
    one, and for a score that only one side has or that is of another metric or other data.
    """
    limits, effort = limits or Limits(), effort or Effort()
    other: Path | None = None
    recorded: Baseline | None = None
    if isinstance(reference, Baseline) or Path(reference).suffix != ".onnx":
        recorded = reference if isinstance(reference, Baseline) else Baseline.load(reference)
        if settings is not None:
            recorded.require(provider=settings.provider, threads=settings.threads)
        recorded.require(batch=batch, shapes=shapes)
        recorded.require_data(data)
        settings = Session(provider=recorded.provider, threads=recorded.threads)
        batch, shapes = recorded.batch, recorded.shapes
        other = None if isinstance(reference, Baseline) else _at_hand(recorded, Path(reference))
        before = recorded.facts
    else:
        settings, batch, other = settings or Session(), batch or 1, Path(reference)
        before = facts_of(other, settings, batch, data, shapes)
    shapes = {name: tensor.at(batch, (shapes or {}).get(name)) for name, tensor in before.inputs.items()}
    short = interface_of(path, settings, before)
    if short is None:
        try:
            after = facts_of(path, settings, 1, data, shapes)  # the shapes hold the batch
        except ModelError as error:
            short = Finding(name="run", baseline="runs", measured=str(error), limit="runs", holds=False)
    if short is not None:
        return Verdict(model=Path(path).name, timing=None, findings=(short,), machine=machine(gpu=settings.on_gpu))
    paths = [path] if other is None else [other, path]
    runs = _measure(paths, settings, 1, shapes, effort, on_process, limits.max_slowdown / _PRECISION)
    new = [run.latencies[-1].samples for run in runs]
    if other is not None:
        old: Sequence[Sequence[float]] = [run.latencies[0].samples for run in runs]
    elif recorded is not None:
        old = recorded.processes
    slowdown, low, high, p = compare_times(old, new, paired=other is not None)
    least = limits.max_slowdown / 2
    slower = Finding(
        name="latency",
        baseline=f"{np.median(np.concatenate(old)):.4f} ms",
        measured=f"{slowdown:+.1%} [{low:+.1%}, {high:+.1%}], p = {p:.2g}",
        limit=f"detects slow-downs of {limits.max_slowdown:.1%} or more; fails above {least:+.1%} at p < {_ALPHA}",
        holds=not (slowdown > least and p < _ALPHA),
    )
    timing = Timing(
        slowdown=slowdown,
        low=low,
        high=high,
        p_value=p,
        p50_ms=float(np.median(np.concatenate(new))),
        baseline_p50_ms=float(np.median(np.concatenate(old))),
    )
    return Verdict(
        model=Path(path).name,
        timing=timing,
        findings=(slower, *held(before, after, limits, settings.provider)),
        machine=runs[0].machine,
        recorded_on=recorded.machine if recorded is not None and other is None else None,
    )


def compare_times(
    old: Sequence[Sequence[float]], new: Sequence[Sequence[float]], *, paired: bool
) -> tuple[float, float, float, float]:
    """Return the slow-down of `new` over `old` as a share, its 95 % interval, and the one-sided p-value of none.

    One list of times a process. `paired` processes ran both in turns: there each process's ratio is its own estimate, and
    its blocks are divided by its old median, so that what is common to both falls out; and two runs of a cycle are one time,
    since a model runs after itself in one of them and after the other in the next. The slow-down is the median over processes,
    the interval Student's of logarithms over them (Welch's where they ran apart).
    """
    from scipy import stats

    sides = [[cycles(times, 2 if paired else 1) for times in side] for side in (old, new)]
    medians = [np.array([np.median(times) for times in side]) for side in sides]
    unit = medians[0] if paired else np.full(max(map(len, sides)), np.median(medians[0]))
    blocks = [np.concatenate([_blocks(times) / unit[k] for k, times in enumerate(side)]) for side in sides]
    p = float(stats.mannwhitneyu(blocks[1], blocks[0], alternative="greater").pvalue)
    logs = [np.log(values) for values in medians]
    if paired:
        value = float(np.exp(np.median(logs[1] - logs[0]))) - 1
        found = stats.ttest_rel(logs[1], logs[0]).confidence_interval()
    else:
        value = float(np.exp(np.median(logs[1]) - np.median(logs[0]))) - 1
        found = stats.ttest_ind(logs[1], logs[0], equal_var=False).confidence_interval()
    low, high = (float(np.exp(bound)) - 1 if np.isfinite(bound) else value for bound in (found.low, found.high))
    return value, low, high, p


def time_here(request: dict[str, object]) -> str:
    """Time the models of a request in this process, in turns, and return the report as JSON."""
    settings = Session(**request["settings"])  # type: ignore[arg-type] # made by `asdict` in `_measure`
    paths, batch, shapes, seconds = (request[name] for name in ("paths", "batch", "shapes", "seconds"))
    report = bench(paths, settings=settings, batch=batch, shapes=shapes, seconds=seconds, warmup=0.1)  # type: ignore[arg-type]
    return report.model_dump_json()


def _measure(
    paths: Sequence[Path | str],
    settings: Session,
    batch: int,
    shapes: Shapes,
    effort: Effort,
    on_process: Callable[[float], None],
    precision: float | None = None,
) -> list[LatencyReport]:
    """Time the models in fresh processes; with a precision, until the estimate's standard error is that narrow."""
    reports: list[LatencyReport] = []
    while len(reports) < effort.processes or (
        precision is not None
        and len(reports) < _MOST * effort.processes
        and (len(reports) % 2 or _standard_error(reports) > precision)
    ):
        number = len(reports)
        # every second process loads the other one first: the first model loaded has the better place in memory
        order = list(paths) if number % 2 == 0 else list(reversed(paths))
        request = {
            "paths": [str(p) for p in order],
            "settings": asdict(settings),
            "batch": batch,
            "shapes": {name: list(shape) for name, shape in shapes.items()},
            "seconds": effort.seconds,
        }
        report = LatencyReport.model_validate_json(fresh("tensorrail_runtime.gate.regress:time_here", request))
        reports.append(report.model_copy(update={"latencies": report.latencies[:: 1 if order == list(paths) else -1]}))
        on_process(min(1.0, len(reports) / effort.processes))
    return reports


def _standard_error(reports: Sequence[LatencyReport]) -> float:
    """Return the standard error of the median over processes, of the models' ratio or of the one model's relative time."""
    models = len(reports[0].latencies)
    times = np.array([[np.median(cycles(latency.samples, models)) for latency in report.latencies] for report in reports])
    values = times[:, -1] / (times[:, 0] if times.shape[1] > 1 else np.median(times))
    deviation = 1.4826 * np.median(np.abs(values - np.median(values)))  # of a normal distribution with that median deviation
    return float(1.2533 * deviation / np.sqrt(len(values)))


def _blocks(times: np.ndarray) -> np.ndarray:
    """Return the medians of eight parts in a row, the first ones longer by one time where the times do not divide by eight."""
    size, longer = divmod(len(times), _BLOCKS)
    cut = longer * (size + 1)
    parts = times[:cut].reshape(longer, size + 1), times[cut:].reshape(_BLOCKS - longer, size)
    return np.concatenate([np.median(part, axis=1) for part in parts])


def _at_hand(baseline: Baseline, file: Path) -> Path | None:
    """Return the baseline's own model when it still lies where it was recorded, unchanged."""
    path = file.parent / baseline.model
    try:
        return path if path.is_file() and sha256_of(path) == baseline.facts.sha256 else None
    except ModelError:  # its external data are gone
        return None


def _shown(shapes: Shapes) -> str:
    return ", ".join(f"{name}={','.join(map(str, shape))}" for name, shape in shapes.items()) or "none"
