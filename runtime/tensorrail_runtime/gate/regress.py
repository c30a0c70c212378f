"""The regression gate: properties that do not vary are compared with hard limits, times by a statistical test.

Times are measured in several fresh processes, since they differ between processes (the place of the weights in memory is one
reason). If the baseline's model is available, both models run in turns in every process, and only their ratio counts. Else the
times are compared with the recorded ones, so that changes of the machine since then count as well.

The check fails if both are true: the one-sided Mann-Whitney test on block medians (Mann and Whitney 1947) says that the model
is slower, and the estimated slow-down is more than half of `max_slowdown`. If the estimate is precise enough, a true slow-down
of `max_slowdown` lies well above that threshold, and a model that is not slower lies well below. On a busy machine, processes
are therefore added, two at a time, until the standard error is a tenth of `max_slowdown` or four times the processes have run.
This rule looks only at the spread of the ratios, never at their value, so it does not bias the result. `benchmarks/gate.py`
measures how often the check is wrong.
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
from tensorrail_runtime.measure.timing import Timing
from tensorrail_runtime.records import Record, first_problem
from tensorrail_runtime.sessions.fresh import fresh
from tensorrail_runtime.sessions.inputs import Shapes
from tensorrail_runtime.sessions.machine import Machine, machine
from tensorrail_runtime.sessions.session import Session
from tensorrail_runtime.tables import Part, PrintedRecord, Table

__all__ = ["Baseline", "Data", "Effort", "Facts", "Finding", "Limits", "Verdict", "check", "compare_times", "record"]

_BLOCKS = 8  # blocks of each process, of which medians are taken
_ALPHA = 0.01  # significance level
_PRECISION = 10  # max_slowdown divided by the standard error that is small enough
_MOST = 4  # times the requested processes, on a busy machine


Times = Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Field(min_length=_BLOCKS)]
"""The times of one process, in milliseconds."""


class Baseline(PrintedRecord):
    """The recorded properties and times of a model, for comparison with later models.

    Attributes:
        version: the version of the file format.
        model: the path of the model, relative to the folder of the baseline.
        provider: the provider of the recording: "cpu", "cuda" or "tensorrt".
        threads: the number of intra-op threads, 0 for ONNX Runtime's choice.
        batch: the size of dynamic axes that `shapes` does not set.
        shapes: the given shapes of inputs, by name.
        machine: the machine of the recording.
        facts: the properties that do not vary between runs.
        processes: the times of each process, in milliseconds.

    """

    version: Literal[3] = 3
    model: str
    provider: str
    threads: int = Field(ge=0)
    batch: int = Field(ge=1)
    shapes: dict[str, tuple[Annotated[int, Field(ge=1)], ...]]
    machine: Machine
    facts: Facts
    processes: Annotated[tuple[Times, ...], Field(min_length=1)]

    def shown(self) -> tuple[Part, ...]:
        """Return one line: the model and its median time."""
        times = sorted(time for process in self.processes for time in process)
        return (f"{self.model}, batch {self.batch}: p50 {times[len(times) // 2]:.4f} ms of {len(times)} runs",)

    @classmethod
    def load(cls, path: Path | str) -> Baseline:
        """Read a baseline from a file; raises `ModelError` for a file that is not one."""
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror or error}): expected a baseline") from None
        except (ValidationError, UnicodeDecodeError) as error:
            problem = (
                first_problem(error)
                if isinstance(error, ValidationError)
                else "it is not a text file; give the JSON file that `regress record` wrote"
            )
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
        """Raise `ModelError` for options that differ from the recorded ones: a model is measured with the recorded ones."""
        if shapes and {name: tuple(shape) for name, shape in shapes.items()} != self.shapes:
            raise ModelError(
                f"the baseline of {self.model} was recorded with shapes {_shown(self.shapes)}, got {_shown(shapes)}: "
                "omit the shapes, or record the baseline again"
            )
        for name, requested in (("provider", provider), ("threads", threads), ("batch", batch)):
            recorded = getattr(self, name)
            if requested not in (None, recorded):
                raise ModelError(
                    f"the baseline of {self.model} was recorded with {name} {recorded}, got {name} {requested}: "
                    "omit it, or record the baseline again"
                )

    def require_data(self, data: Data | None) -> None:
        """Raise `ModelError` for data other than those of the baseline's score, and if only one side has a score."""
        facts, baseline = self.facts, f"the baseline of {self.model}"
        if data is None:
            if facts.score is not None:
                raise ModelError(
                    f"{baseline} contains a score ({facts.metric}), got no data: give the data that it was recorded with"
                )
        elif facts.score is None:
            raise ModelError(f"{baseline} contains no score: record it with data, or give no data here")
        elif data[2] != facts.metric:
            raise ModelError(f"{baseline} contains a {facts.metric} score, got metric {data[2]}: give metric {facts.metric}")
        elif facts.data and facts.data != sha256_of_data(data):
            raise ModelError(f"{baseline} contains a score on different data: pass the same data, or record the baseline again")


class Verdict(PrintedRecord):
    """The result of a check.

    Attributes:
        model: the name of the checked model.
        timing: the times; None for a model that fails before it is timed, since it does not run on the baseline's inputs.
        findings: one result per property.
        machine: the machine of the check.
        recorded_on: the machine of the recorded times that the check used; None if both models ran here, in turns.

    """

    model: str
    timing: TimeChange | None
    findings: tuple[Finding, ...]
    machine: Machine
    recorded_on: Machine | None = None

    @property
    def holds(self) -> bool:
        """Whether every property is within its limit."""
        return all(finding.holds for finding in self.findings)

    @property
    def reason(self) -> str:
        """One line with the properties outside their limits, or "no regression"."""
        failed = [f"{f.name} {f.measured} (baseline {f.baseline}, limit {f.limit})" for f in self.findings if not f.holds]
        return f"{self.model}: " + ("; ".join(failed) if failed else "no regression")

    def shown(self) -> tuple[Part, ...]:
        """Return the table of findings, the warning where there is one, and the reason."""
        rows = [(f.name, f.baseline, f.measured, f.limit, "yes" if f.holds else "NO") for f in self.findings]
        table = Table(f"{self.model}, {self.how}", ("quantity", "baseline", "measured", "limit", "holds"), rows)
        return (table, *((f"warning: {self.warning}",) if self.warning else ()), self.reason)

    @property
    def interleaved(self) -> bool:
        """Whether both models were timed here, in turns."""
        return self.timing is not None and self.recorded_on is None

    @property
    def how(self) -> str:
        """With which times the measured ones were compared, as text."""
        return "against recorded times" if self.recorded_on else "interleaved with the baseline's model"

    @property
    def warning(self) -> str:
        """Why the times may differ for reasons other than the model; empty if both models ran here."""
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


class TimeChange(Record):
    """The slow-down of a model as a share (0.05 is 5 % more time), with its 95 % interval over processes and its p-value."""

    slowdown: float
    low: float
    high: float
    p_value: float
    p50_ms: float
    baseline_p50_ms: float


class Effort(Record):
    """How much is measured: the number of fresh processes (up to four times as many on a busy machine), and seconds in each."""

    processes: int = Field(default=6, ge=2)  # even numbers are best: each model is loaded first in half of the processes
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
    """Measure a model and write its baseline.

    Args:
        path: the ONNX file.
        out: the JSON file to write, in an existing folder.
        settings: the options of the session; only provider and threads are recorded.
        batch: the size of dynamic axes that `shapes` does not set.
        shapes: shapes of inputs, by name.
        effort: how many processes to run, and for how long.
        data: inputs, labels and metric for a score.
        on_process: called after each process with the share of the processes that have ended.

    Returns:
        The baseline.

    Raises:
        ModelError: the model cannot be run, or `out` is not a JSON file in an existing folder.

    """
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
    """Compare a model with a baseline, or with another model.

    Both models run on inputs of the same shapes, those of the baseline's model. A model that takes other inputs, does not run
    on them or gives NaN fails without being timed.

    Args:
        reference: a baseline, its file, or another model (a file that ends in .onnx), which is then measured as well.
        path: the ONNX file of the model to check.
        limits: the limits for the differences.
        effort: how many processes to run, and for how long.
        settings: the options of the session; with a baseline, its provider and threads.
        batch: the size of dynamic axes that `shapes` does not set, 1 by default; with a baseline, its batch.
        shapes: shapes of inputs, by name; with a baseline, its shapes.
        data: inputs, labels and metric of a score; with a baseline, the data that it was recorded with.
        on_process: called after each process with the share of the processes that have ended.

    Returns:
        One finding per property, and the times.

    Raises:
        ModelError: a file is neither a baseline nor a model, the options differ from the recorded ones, or a score cannot be
            compared since one side has none or it is of another metric or other data.

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
    failed = interface_of(path, settings, before)
    if failed is None:
        try:
            after = facts_of(path, settings, 1, data, shapes)  # `shapes` contains the batch
        except ModelError as error:
            failed = Finding(name="run", baseline="runs", measured=str(error), limit="runs", holds=False)
    if failed is not None:
        return Verdict(model=Path(path).name, timing=None, findings=(failed,), machine=machine(gpu=settings.on_gpu))
    paths = [path] if other is None else [other, path]
    runs = _measure(paths, settings, 1, shapes, effort, on_process, limits.max_slowdown / _PRECISION)
    new = [run.latencies[-1].samples for run in runs]
    if other is not None:
        old: Sequence[Sequence[float]] = [run.latencies[0].samples for run in runs]
    elif recorded is not None:
        old = recorded.processes
    slowdown, low, high, p = compare_times(old, new, paired=other is not None)
    threshold = limits.max_slowdown / 2
    latency = Finding(
        name="latency",
        baseline=f"{np.median(np.concatenate(old)):.4f} ms",
        measured=f"{slowdown:+.1%} [{low:+.1%}, {high:+.1%}], p = {p:.2g}",
        limit=f"detects slow-downs of {limits.max_slowdown:.1%} or more; fails above {threshold:+.1%} at p < {_ALPHA}",
        holds=not (slowdown > threshold and p < _ALPHA),
    )
    timing = TimeChange(
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
        findings=(latency, *held(before, after, limits, settings.provider)),
        machine=runs[0].machine,
        recorded_on=recorded.machine if recorded is not None and other is None else None,
    )


def compare_times(
    old: Sequence[Sequence[float]], new: Sequence[Sequence[float]], *, paired: bool
) -> tuple[float, float, float, float]:
    """Estimate the slow-down of a model, and test whether it is slower.

    If both models ran in turns in each process, the ratio of each process is one estimate, and its block medians are divided
    by its old median, which removes what both models have in common. The times of the two runs of a cycle are then summed: a
    model runs after itself in one of them and after the other model in the next. The slow-down is the median over processes,
    and its interval is Student's for the logarithms over processes (Welch's if the models ran in separate processes).

    Args:
        old: the times of the baseline's model, one list per process.
        new: the times of the checked model, one list per process.
        paired: whether both models ran in turns in each process.

    Returns:
        The slow-down as a share, the two ends of its 95 % interval, and the one-sided p-value of no slow-down.

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
        interval = stats.ttest_rel(logs[1], logs[0]).confidence_interval()
    else:
        value = float(np.exp(np.median(logs[1]) - np.median(logs[0]))) - 1
        interval = stats.ttest_ind(logs[1], logs[0], equal_var=False).confidence_interval()
    low, high = (float(np.exp(bound)) - 1 if np.isfinite(bound) else value for bound in (interval.low, interval.high))
    return value, low, high, p


def time_here(request: dict[str, object]) -> str:
    """Time the models of a request in turns, in this process, and return the report as JSON; `_measure` calls it."""
    settings = Session(**request["settings"])  # type: ignore[arg-type] # made by `asdict` in `_measure`
    paths, batch, shapes, seconds = (request[name] for name in ("paths", "batch", "shapes", "seconds"))
    timing = Timing(batch, shapes, seconds, warmup=0.1)  # type: ignore[arg-type] # the request is JSON
    return bench(paths, timing, settings).model_dump_json()  # type: ignore[arg-type] # likewise


def _measure(
    paths: Sequence[Path | str],
    settings: Session,
    batch: int,
    shapes: Shapes,
    effort: Effort,
    on_process: Callable[[float], None],
    precision: float | None = None,
) -> list[LatencyReport]:
    """Time the models in fresh processes; with a precision, until the standard error of the estimate is at most that."""
    reports: list[LatencyReport] = []
    while len(reports) < effort.processes or (
        precision is not None
        and len(reports) < _MOST * effort.processes
        and (len(reports) % 2 or _standard_error(reports) > precision)
    ):
        number = len(reports)
        # Every second process loads the other model first, since the first loaded model gets the better place in memory.
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
    """Return the standard error of the median over processes: of the ratio of two models, or of one model's relative time."""
    models = len(reports[0].latencies)
    times = np.array([[np.median(cycles(latency.samples, models)) for latency in report.latencies] for report in reports])
    values = times[:, -1] / (times[:, 0] if times.shape[1] > 1 else np.median(times))
    # 1.4826: the standard deviation of a normal distribution over its median absolute deviation. 1.2533 = √(π / 2): the
    # standard error of a median over that of a mean.
    deviation = 1.4826 * np.median(np.abs(values - np.median(values)))
    return float(1.2533 * deviation / np.sqrt(len(values)))


def _blocks(times: np.ndarray) -> np.ndarray:
    """Return the medians of eight consecutive blocks; the first blocks get one more time each if there is a remainder."""
    size, longer = divmod(len(times), _BLOCKS)
    cut = longer * (size + 1)
    blocks = times[:cut].reshape(longer, size + 1), times[cut:].reshape(_BLOCKS - longer, size)
    return np.concatenate([np.median(block, axis=1) for block in blocks])


def _at_hand(baseline: Baseline, file: Path) -> Path | None:
    """Return the path of the baseline's model if it is where it was recorded and unchanged, else None."""
    path = file.parent / baseline.model
    try:
        return path if path.is_file() and sha256_of(path) == baseline.facts.sha256 else None
    except ModelError:  # its external data are missing
        return None


def _shown(shapes: Shapes) -> str:
    return ", ".join(f"{name}={','.join(map(str, shape))}" for name, shape in shapes.items()) or "none"
