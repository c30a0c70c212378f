"""The regression gate: properties that do not vary are compared with hard limits, times by a statistical test.

Times are measured in several fresh processes, since they differ between processes (the place of the weights in memory is one
reason). If the baseline's model is available, both models run interleaved in every process, and only their ratio counts. Else
the times are compared with the recorded ones, so that changes of the machine since then count as well.

The check fails if both are true: a one-sided test says that the model is slower (on block medians if both models run
interleaved, else on the medians of processes, see `compare_times`), and the estimated slow-down is more than half of
`max_slowdown`. If the estimate is precise enough, a true slow-down of `max_slowdown` lies well above that threshold, and a
model that is not slower lies well below. On a busy machine, processes are therefore added, two at a time, until the standard
error is a tenth of `max_slowdown` or four times the processes have run; if it is still larger, the verdict says so. This rule
looks only at the spread of the ratios, never at their value, so it does not bias the result. `benchmarks/gate.py` measures how
often the check of two interleaved models is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from tensorrail_runtime.errors import MetricError, ModelError, UsageError
from tensorrail_runtime.feeds.loading import known_values, load_batches
from tensorrail_runtime.feeds.rules import InputRules
from tensorrail_runtime.gate.checks import Facts, Finding, Limits, facts_of, held, interface_of, sha256_of_data
from tensorrail_runtime.gate.times import (
    BLOCKS,
    PRECISION,
    TimeChange,
    imprecision,
    latency_finding,
    needs_more,
    time_change,
)
from tensorrail_runtime.graphs.constants import file_fault
from tensorrail_runtime.graphs.files import sha256_of
from tensorrail_runtime.measure.accuracy import Labelled, metric_of
from tensorrail_runtime.measure.latency import LatencyReport, fresh_report
from tensorrail_runtime.measure.parity import require_comparable
from tensorrail_runtime.measure.timing import Conditions, Timing
from tensorrail_runtime.records import first_problem
from tensorrail_runtime.sessions.inputs import Shapes, random_inputs
from tensorrail_runtime.sessions.machine import Machine, machine
from tensorrail_runtime.sessions.session import Session, open_session
from tensorrail_runtime.tables import Part, PrintedRecord, Table

__all__ = ["TIMING", "Baseline", "Facts", "Finding", "Limits", "Verdict", "check", "record"]

TIMING = Timing(seconds=1.0, processes=6)
"""How long models are timed by default. Even numbers of processes are best: each model is loaded first in half of them."""

_LEAST_PROCESSES = 2
_WARMUP = 0.1  # seconds of each process
_SETTINGS = "a baseline holds the provider and the number of threads of a session, and no other settings: leave these out"


Times = Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Field(min_length=BLOCKS)]
"""The times of one process, in milliseconds."""


Number = bool | int | float
Constant = Number | tuple[Number, ...]
"""The value of a constant input; a tuple is repeated to the shape of the input."""


class Baseline(PrintedRecord):
    """The recorded properties and times of a model, for comparison with later models.

    Attributes:
        version: the version of the file format.
        model: the path of the model, relative to the folder of the baseline.
        provider: the provider of the recording: "cpu", "cuda" or "tensorrt".
        threads: the number of intra-op threads, 0 for ONNX Runtime's choice.
        batch: the size of dynamic axes that `shapes` does not set.
        shapes: the given shapes of inputs, by name.
        constants: the inputs that are the same in every run, by name.
        batch_axes: the axis of the samples of inputs, where it was given.
        states: the output of the step before for each state.
        on_data: whether the model ran on the first labelled inputs, not on random ones, for its outputs and times.
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
    constants: dict[str, Constant] = Field(default_factory=dict)
    batch_axes: dict[str, Annotated[int, Field(ge=0)] | None] = Field(default_factory=dict)
    states: dict[str, str] = Field(default_factory=dict)
    on_data: bool = False
    machine: Machine
    facts: Facts
    processes: Annotated[tuple[Times, ...], Field(min_length=1)]

    @property
    def rules(self) -> InputRules:
        """What the model's inputs are."""
        return InputRules(self.constants, self.batch_axes, self.states)

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
        rules: InputRules | None = None,
    ) -> None:
        """Raise `ModelError` for options that differ from the recorded ones: a model is measured with the recorded ones."""
        if rules is not None and rules != InputRules() and _recordable(rules) != _recordable(self.rules):
            raise ModelError(
                f"the baseline of {self.model} was recorded with inputs {_recordable(self.rules)}, got {_recordable(rules)}: "
                "omit the rules of inputs, or record the baseline again"
            )
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

    def require_data(self, data: Labelled | None) -> None:
        """Raise `ModelError` for data other than those of the baseline's score, and if only one side has a score."""
        facts, baseline = self.facts, f"the baseline of {self.model}"
        if data is None:
            if facts.score is not None:
                raise ModelError(
                    f"{baseline} contains a score ({facts.metric}), got no data: give the data that it was recorded with"
                )
        elif facts.score is None:
            raise ModelError(f"{baseline} contains no score: record it with data, or give no data here")
        elif data.metric != facts.metric:
            raise ModelError(
                f"{baseline} contains a {facts.metric} score, got metric {data.metric}: give metric {facts.metric}"
            )
        elif facts.data and facts.data != sha256_of_data(data):
            raise ModelError(f"{baseline} contains a score on different data: pass the same data, or record the baseline again")


class Verdict(PrintedRecord):
    """The result of a check.

    Attributes:
        model: the name of the checked model.
        timing: the times; None for a model that fails before it is timed, since it does not run on the baseline's inputs.
        findings: one result per property.
        machine: the machine of the check.
        recorded_on: the machine of the recorded times that the check used; None if both models ran here, in interleaved runs.
        noise: what makes the times uncertain, such as a busy machine, or a GPU that does not run all nodes; empty for nothing.

    """

    model: str
    timing: TimeChange | None
    findings: tuple[Finding, ...]
    machine: Machine
    recorded_on: Machine | None = None
    noise: tuple[str, ...] = ()

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
        """Return the table of findings, the warnings where there are some, and the reason."""
        rows = [(f.name, f.baseline, f.measured, f.limit, "yes" if f.holds else "NO") for f in self.findings]
        table = Table(f"{self.model}, {self.how}", ("quantity", "baseline", "measured", "limit", "holds"), rows)
        return (table, *(f"warning: {warning}" for warning in self.warnings), self.reason)

    @property
    def interleaved(self) -> bool:
        """Whether both models were timed here, in interleaved runs."""
        return self.timing is not None and self.recorded_on is None

    @property
    def how(self) -> str:
        """With which times the measured ones were compared, as text."""
        if self.timing is None:
            return "not timed"
        return "against recorded times" if self.recorded_on else "interleaved with the baseline's model"

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why the times are uncertain, or may differ for reasons other than the model."""
        return (*((self._of_record(),) if self.recorded_on else ()), *self.noise)

    def _of_record(self) -> str:
        """Return a warning on times that were recorded before."""
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


def record(
    path: Path | str,
    out: Path | str,
    *,
    conditions: Conditions | None = None,
    data: Labelled | None = None,
    rules: InputRules | None = None,
    again: bool = False,
) -> Baseline:
    """Measure a model and write its baseline.

    Args:
        path: the ONNX file.
        out: the JSON file to write, in an existing folder.
        conditions: how the model runs and is timed: batch size, shapes, fresh processes (6 by default) and seconds in each (1
            by default). Of a session, provider and threads are recorded; others have their defaults.
        data: labelled inputs for a score.
        rules: which inputs are constants or states, or have their samples along another axis than the first; default: none.
            They are recorded; constants must be numbers.
        again: whether a baseline that `out` already holds gives provider, threads, batch size, shapes and rules, where others
            than the defaults are not given; default False.

    Returns:
        The baseline.

    Raises:
        ModelError: the model cannot be run, `out` is not a JSON file in an existing folder, or with `again` not a baseline.
        UsageError: fewer than two processes, no seconds to time in, or a session with other settings than provider and threads.

    """
    if again and Path(out).is_file():
        conditions, rules = _as_before(Path(out), conditions, rules, data)
    conditions = checked(conditions)
    timing, settings = conditions.timing, conditions.settings
    if not settings.is_plain:
        raise UsageError(_SETTINGS)
    if timing.values:
        raise UsageError("a baseline keeps no values of inputs, so that checks would run on others: give constants or data")
    if Path(out).suffix == ".onnx" or not Path(out).parent.is_dir():
        raise ModelError(f"{out}: expected a JSON file in an existing folder, such as baseline.json")
    rules = rules or InputRules()
    recorded = _recordable(rules)
    timing = with_values(timing, path, settings, rules, data)
    drawn = random_inputs(open_session(path, settings=settings.exact), timing.batch, shapes=timing.shapes, values=timing.values)
    require_comparable(path, drawn, settings.exact)
    facts = facts_of(path, settings, timing.batch, _ruled(data, rules), timing.shapes, timing.values)
    runs = _measure([path], replace(conditions, timing=timing))
    baseline = Baseline(
        model=Path(os.path.relpath(_place(path), _place(out).parent)).as_posix(),
        provider=settings.provider,
        threads=settings.threads,
        batch=timing.batch,
        shapes={name: tuple(shape) for name, shape in timing.shapes.items()},
        **recorded,
        on_data=data is not None,
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
    conditions: Conditions | None = None,
    data: Labelled | None = None,
    rules: InputRules | None = None,
) -> Verdict:
    """Compare a model with a baseline, or with another model.

    Both models run on inputs of the same shapes, those of the baseline's model. A model that takes other inputs, does not run
    on them, has a weight with NaN or gives NaN fails without being timed.

    Args:
        reference: a baseline, its file, or another model (a file that ends in .onnx), which is then measured as well.
        path: the ONNX file of the model to check.
        limits: the limits for the differences.
        conditions: how the models run and are timed, as for `record`, but with up to four times as many processes on a busy
            machine. A baseline has its own provider, threads, batch size and shapes: they are left at their defaults here, or
            are the recorded ones.
        data: labelled inputs for a score; with a baseline, the data that it was recorded with.
        rules: what the inputs are, as for `record`; a baseline has its own.

    Returns:
        One finding per property, and the times.

    Raises:
        ModelError: a file is neither a baseline nor a model, the options differ from the recorded ones, or a score cannot be
            compared: one side has none, it is of another metric or other data, or the metric cannot be imported or fails.
        UsageError: fewer than two processes, no seconds to time in, or, with a baseline, a session with other settings than
            provider and threads.

    """
    limits = limits or Limits()
    if data is not None:
        metric_of(data.metric)  # raises, before anything runs, if it cannot be imported
    before = _reference(reference, checked(conditions), data, rules)
    settings = before.conditions.settings
    after: Facts | Finding | None = interface_of(path, settings, before.facts)
    if after is None:
        before, after = _like(before, path, data)
    if isinstance(after, Finding):
        return Verdict(model=Path(path).name, timing=None, findings=(after,), machine=machine(gpu=settings.on_gpu))
    paths = [path] if before.model is None else [before.model, path]
    recorded = () if before.model is not None or before.recorded is None else before.recorded.processes
    runs = _measure(paths, before.conditions, limits.max_slowdown / PRECISION, recorded)
    timing = _time_change(before, runs)
    uncertain = imprecision([[one.samples for one in run.latencies] for run in runs], limits.max_slowdown, recorded)
    elsewhere = (line for line in runs[0].warnings if "unstable times" not in line)
    return Verdict(
        model=Path(path).name,
        timing=timing,
        findings=(latency_finding(timing, limits), *held(before.facts, after, limits, settings.provider)),
        machine=runs[0].machine,
        recorded_on=before.recorded.machine if before.recorded is not None and before.model is None else None,
        noise=(*((uncertain,) if uncertain else ()), *elsewhere),
    )


def checked(conditions: Conditions | None) -> Conditions:
    """Return the conditions with the gate's defaults where nothing is given.

    Raises `UsageError` for too few processes, and for what the gate has its own way of.
    """
    conditions = conditions or Conditions(TIMING)
    timing = conditions.timing
    seconds = TIMING.seconds if timing.seconds is None else timing.seconds
    plain = replace(timing, warmup=Timing.warmup, io_binding=False, seed=Timing.seed)
    if plain != timing:
        raise UsageError("the gate has its own warm-up, inputs and binding: leave out warmup, seed and io_binding")
    timing = replace(timing, seconds=seconds, processes=timing.processes or TIMING.processes)
    if timing.processes < _LEAST_PROCESSES or not timing.duration > 0:
        raise UsageError(
            f"expected at least {_LEAST_PROCESSES} fresh processes and more than 0 seconds in each, got "
            f"processes={timing.processes}, seconds={timing.duration:g}"
        )
    return replace(conditions, timing=timing)


@dataclass(frozen=True)
class _Reference:
    """What a model is checked against."""

    facts: Facts
    """The properties of the baseline's model."""
    conditions: Conditions
    """How both models run; its shapes are those of every input, with the batch."""
    model: Path | None
    """The baseline's model, which is timed beside the checked one; None if it is not there, or has changed."""
    recorded: Baseline | None
    """The baseline; None for another model."""
    rules: InputRules
    """What the inputs of both models are."""


def _reference(
    reference: Baseline | Path | str, conditions: Conditions, data: Labelled | None, rules: InputRules | None
) -> _Reference:
    """Read a baseline, or measure the properties of the other model."""
    timing = conditions.timing
    model: Path | None
    recorded: Baseline | None
    if not isinstance(reference, Baseline) and Path(reference).suffix == ".onnx":
        model, recorded, batch, shapes = Path(reference), None, timing.batch, timing.shapes
        rules = rules or InputRules()
        timing = with_values(timing, model, conditions.settings, rules, data)
        shapes, values = timing.shapes, timing.values
        facts = facts_of(reference, conditions.settings, batch, _ruled(data, rules), shapes, values)
    else:
        recorded = reference if isinstance(reference, Baseline) else Baseline.load(reference)
        _require_recorded(recorded, conditions, rules)
        recorded.require_data(data)
        conditions = replace(conditions, settings=Session(provider=recorded.provider, threads=recorded.threads))
        model = None if isinstance(reference, Baseline) else _at_hand(recorded, Path(reference))
        facts, batch, shapes, rules = recorded.facts, recorded.batch, recorded.shapes, recorded.rules
        values = {name: np.asarray(value) for name, value in recorded.constants.items()}
    every_shape = {name: tensor.at(batch, shapes.get(name)) for name, tensor in facts.inputs.items()}
    timing = replace(timing, batch=1, shapes=every_shape, values=values)
    return _Reference(facts, replace(conditions, timing=timing), model, recorded, rules)


def _require_recorded(recorded: Baseline, conditions: Conditions, rules: InputRules | None) -> None:
    """Raise `ModelError` for options that are neither the defaults nor the recorded ones."""
    timing, settings = conditions.timing, conditions.settings
    if timing.values:
        raise UsageError(f"the baseline of {recorded.model} keeps no values of inputs: leave them out, or give data")
    if not settings.is_plain:
        raise UsageError(f"the baseline of {recorded.model}: {_SETTINGS}")
    recorded.require(
        provider=None if settings.provider == Session.provider else settings.provider,
        threads=None if settings.threads == Session.threads else settings.threads,
        batch=None if timing.batch == Timing.batch else timing.batch,
        shapes=timing.shapes,
        rules=rules,
    )


def _as_before(
    out: Path, conditions: Conditions | None, rules: InputRules | None, data: Labelled | None
) -> tuple[Conditions, InputRules]:
    """Return the conditions and rules, with those of the baseline in a file where they have the defaults.

    Raises `ModelError` if the file is not a baseline, or has a score and there are no data for another one.
    """
    try:
        older = Baseline.load(out)
    except ModelError as error:
        raise ModelError(f"{error}; remove the file to record one under the given conditions") from None
    if older.facts.score is not None and data is None:
        raise ModelError(f"{out}: was recorded with a score on labelled data, got no data: give them, or remove the file")
    rules = rules or InputRules()
    return _as_recorded(older, conditions or Conditions(TIMING)), older.rules if rules == InputRules() else rules


def _as_recorded(recorded: Baseline, conditions: Conditions) -> Conditions:
    """Return the conditions with the recorded values where they have the defaults; the shapes hold for the recorded batch."""
    timing, settings = conditions.timing, conditions.settings
    same_batch = timing.batch in (Timing.batch, recorded.batch)
    timing = replace(
        timing,
        batch=recorded.batch if same_batch else timing.batch,
        shapes=timing.shapes or (recorded.shapes if same_batch else {}),
    )
    settings = replace(
        settings,
        provider=recorded.provider if settings.provider == Session.provider else settings.provider,
        threads=recorded.threads if settings.threads == Session.threads else settings.threads,
    )
    return replace(conditions, timing=timing, settings=settings)


def _recordable(rules: InputRules) -> dict[str, Any]:  # Any: the fields of a baseline
    """Return rules as a baseline holds them. Raises `ModelError` for a constant that is no number or row of numbers."""
    constants = {}
    for name, value in rules.constants.items():
        array = np.asarray(value)
        if array.dtype.kind not in "fiub" or array.ndim > 1:
            raise ModelError(
                f"constant {name!r}: expected a number or a row of numbers, got {array.dtype} of shape {list(array.shape)}: a "
                "baseline holds no others"
            )
        constants[name] = tuple(array.tolist()) if array.ndim else array.item()
    return {"constants": constants, "batch_axes": dict(rules.batch_axes), "states": dict(rules.states)}


def with_values(timing: Timing, path: Path | str, settings: Session, rules: InputRules, data: Labelled | None) -> Timing:
    """Return the timing with the values that are known: constants, and the first labelled inputs but for states."""
    if data is None and rules == InputRules():
        return timing
    session = open_session(path, settings=settings.exact)
    ruled = _ruled(data, rules)
    stateless = None
    if ruled is not None:
        batches = load_batches(ruled.inputs, session, ruled.rules, batch=timing.batch, most=timing.batch)
        stateless = replace(batches, feeds=batches.feeds[:1])
    shapes, values = known_values(session, rules, stateless, timing.batch, timing.shapes)
    return replace(timing, shapes=shapes, values={name: value for name, value in values.items() if name not in rules.states})


def _on_recorded_data(before: _Reference, path: Path | str, data: Labelled | None) -> _Reference:
    """Return the reference with the values that its baseline was recorded on, if it was on labelled inputs."""
    recorded, timing = before.recorded, before.conditions.timing
    if recorded is None or not recorded.on_data:
        return before
    read = with_values(replace(timing, batch=recorded.batch), path, before.conditions.settings, before.rules, data)
    return replace(before, conditions=replace(before.conditions, timing=replace(timing, values=read.values)))


def _ruled(data: Labelled | None, rules: InputRules) -> Labelled | None:
    """Return labelled data with the rules, unless they have their own."""
    return replace(data, rules=rules) if data is not None and data.rules == InputRules() else data


def _like(before: _Reference, path: Path | str, data: Labelled | None) -> tuple[_Reference, Facts | Finding]:
    """Return the reference with the inputs that both models run on, and the properties of a model as `_facts_like` does."""
    if fault := file_fault(path):
        return before, _does_not_run(fault)
    try:
        before = _on_recorded_data(before, path, data)
    except ModelError as error:
        if not before.rules.states:
            raise
        return before, _does_not_run(str(error))  # the states of the inputs are this model's outputs
    return before, _facts_like(before, path, _ruled(data, before.rules))


def _facts_like(before: _Reference, path: Path | str, data: Labelled | None) -> Facts | Finding:
    """Return the properties of a model on the inputs of the baseline's model, or a finding if it does not run on them."""
    settings, timing = before.conditions.settings, before.conditions.timing
    measured_on = timing.shapes, timing.values
    try:
        return facts_of(path, settings, timing.batch, data, *measured_on, order=tuple(before.facts.inputs))
    except MetricError as error:
        unscored = held(before.facts, facts_of(path, settings, timing.batch, None, *measured_on), Limits(), settings.provider)
        interface = next(finding for finding in unscored if finding.name == "interface")
        if not interface.holds:  # the metric may read an output by its name
            return interface
        if before.recorded is not None:  # today's metric may be at fault: it has not scored another model yet
            raise
        return _does_not_run(str(error))
    except ModelError as error:
        return _does_not_run(str(error))


def _does_not_run(reason: str) -> Finding:
    return Finding(name="run", baseline="runs", measured=reason, limit="runs", holds=False)


def _time_change(before: _Reference, runs: Sequence[LatencyReport]) -> TimeChange:
    """Compare the times of the checked model with those of the baseline's model in the same runs, or with the recorded ones."""
    new: list[Sequence[float]] = [run.latencies[-1].samples for run in runs]
    old: list[Sequence[float]] = [run.latencies[0].samples for run in runs]
    if before.model is None and before.recorded is not None:
        old = list(before.recorded.processes)
    return time_change(old, new, paired=before.model is not None)


def _measure(
    paths: Sequence[Path | str],
    conditions: Conditions,
    precision: float | None = None,
    recorded: Sequence[Sequence[float]] = (),
) -> list[LatencyReport]:
    """Time the models in fresh processes, in so many as `needs_more` wants; the first report has the warnings on a GPU."""
    timing = conditions.timing
    each = Timing(timing.batch, timing.shapes, timing.duration, _WARMUP, values=timing.values)
    reports: list[LatencyReport] = []
    names = [Path(path).name for path in paths]
    while needs_more([[one.samples for one in run.latencies] for run in reports], timing.processes, precision, recorded):
        first = len(reports) % len(paths)
        reports.append(fresh_report(paths, first, each, conditions.settings, names, placed=not reports))
        conditions.progress("measuring latency", min(1.0, len(reports) / timing.processes))
    return reports


def _place(path: Path | str) -> Path:
    """Return the path of a file with the links among its folders followed: `..` behind a link leads to the folder's parent."""
    return Path(path).parent.resolve() / Path(path).name


def _at_hand(baseline: Baseline, file: Path) -> Path | None:
    """Return the path of the baseline's model if it is where it was recorded and unchanged, else None."""
    path = file.parent / baseline.model
    try:
        return path if path.is_file() and sha256_of(path) == baseline.facts.sha256 else None
    except ModelError:  # its external data are missing
        return None


def _shown(shapes: Shapes) -> str:
    return ", ".join(f"{name}={','.join(map(str, shape))}" for name, shape in shapes.items()) or "none"
