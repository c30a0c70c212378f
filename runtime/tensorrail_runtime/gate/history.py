"""The latency of a model from commit to commit, as lines of JSON, and the commits from which it is another one.

Steps are found by the PELT search of the library ruptures, with the sum of absolute deviations from the median of a segment as
its cost, in which a single disturbed run counts little: Killick, Fearnhead and Eckley, *Optimal Detection of Changepoints With
a Linear Computational Cost*, JASA 107, 2012. Logarithms of times are compared, so that a step is a change in per cent. The
noise is estimated from the differences of neighbours, which a step hardly changes.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, ValidationError

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.gate.regress import Baseline
from tensorrail_runtime.records import Record, first_problem
from tensorrail_runtime.tables import Part, PrintedRecord, Table

_SHORTEST = 3  # runs of a segment
_PENALTY = 3.0  # times the noise and the logarithm of the number of runs, for each step
_NOISE = 0.003  # of a time, at least: a machine is no steadier from run to run
_LEAST = 0.01  # change that is a step
_NORMAL = 0.6745 * 2**0.5  # median of the difference of two normal values, in standard deviations
_MEAN = 0.8  # mean absolute deviation of normal values, in standard deviations
_VARIABLES = ("GITHUB_SHA", "CI_COMMIT_SHA", "BUILDKITE_COMMIT", "CIRCLE_SHA1")


class Entry(Record):
    """One measurement of a model. Only those with the same `model`, `machine` and `how` are compared."""

    version: Literal[1] = 1
    commit: str
    when: str  # UTC, ISO 8601
    model: str
    machine: str  # processor or GPU, and cores
    how: str  # provider, threads, batch size, shapes and what the inputs are
    onnxruntime: str
    p50_ms: float = Field(gt=0, allow_inf_nan=False)


class Step(Record):
    """A commit from which a model takes another time."""

    place: int  # of its first entry in the course
    commit: str
    onnxruntime: str
    before_ms: float
    after_ms: float

    @property
    def change(self) -> float:
        """The change of the time as a share: 0.05 is 5 % more."""
        return self.after_ms / self.before_ms - 1


class Course(Record):
    """The measurements of one model on one machine in one way, in order, with the steps in them."""

    model: str
    machine: str
    how: str
    entries: tuple[Entry, ...]
    steps: tuple[Step, ...]


class History(PrintedRecord):
    """All measurements of a file."""

    courses: tuple[Course, ...]

    def shown(self) -> tuple[Part, ...]:
        """Return a table of the models, and one of the steps."""
        models = [
            (one.model, one.machine, one.how, str(len(one.entries)), f"{one.entries[-1].p50_ms:.4f}", str(len(one.steps)))
            for one in self.courses
        ]
        steps = [
            (
                one.model,
                step.commit,
                step.onnxruntime,
                f"{step.before_ms:.4f}",
                f"{step.after_ms:.4f}",
                f"{step.change:+.1%}",
            )
            for one in self.courses
            for step in one.steps
        ]
        parts: list[Part] = [Table("history", ("model", "machine", "how", "runs", "last p50 (ms)", "steps"), models)]
        if steps:
            head = ("model", "from commit", "ONNX Runtime", "before (ms)", "after (ms)", "change")
            parts.append(Table("steps: from these commits on, a model takes another time", head, steps))
        return tuple(parts)


def entry_of(measured: Baseline, commit: str | None = None, model: Path | str | None = None) -> Entry:
    """Return the entry of a baseline that was recorded now.

    Args:
        measured: the baseline.
        commit: what was measured; default: the commit that a CI system names in its environment, or that git has checked out,
            or else nothing.
        model: the model's file, which is named by its path from the current folder, or by its name if it is elsewhere; default:
            by its name.

    """
    host = measured.machine
    shapes = "".join(f", {name} {'×'.join(map(str, shape))}" for name, shape in measured.shapes.items())
    threads = f"{measured.threads} threads" if measured.threads else "default threads"
    return Entry(
        commit=_commit() if commit is None else commit,
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        model=Path(measured.model).name if model is None else _name(Path(model)),
        machine=f"{host.processor if host.gpu is None else host.gpu.name}, {host.cores} cores",
        how=f"{measured.provider}, {threads}, batch {measured.batch}{shapes}{_inputs(measured)}",
        onnxruntime=host.onnxruntime,
        p50_ms=float(np.median(np.concatenate(measured.processes))),
    )


def _inputs(measured: Baseline) -> str:
    """Return what the inputs of a baseline were, as far as the time may depend on it."""
    constants = [f"{name}={value}" for name, value in measured.constants.items()]
    axes = [f"{name} along {axis}" for name, axis in measured.batch_axes.items()]
    states = [f"{name} from {output}" for name, output in measured.states.items()]
    return "".join(f", {text}" for text in (*constants, *axes, *states, *(["on data"] if measured.on_data else [])))


def add_entry(path: Path | str, entry: Entry) -> None:
    """Add an entry to a file, which is made if it is not there; raises `ModelError` for a file that is no history."""
    path, line = Path(path), entry.model_dump_json() + "\n"
    if path.exists():
        read_entries(path)  # raises for another file, to which nothing is added
        if not path.read_bytes().endswith(b"\n"):
            line = "\n" + line
    try:
        with path.open("a", encoding="utf-8") as file:  # in one piece, so that two jobs do not lose a line
            file.write(line)
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be written ({error.strerror or error}): expected a file in an existing folder"
        ) from None


def read_entries(path: Path | str) -> tuple[Entry, ...]:
    """Return the entries of a file; raises `ModelError` for a file that is no history."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error}): expected a history, lines of JSON") from None
    except UnicodeDecodeError:
        raise ModelError(f"{path}: not a history: it is not a text file; expected lines of JSON") from None
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entries.append(Entry.model_validate_json(line))
        except ValidationError as error:
            raise ModelError(f"{path}: not a history: line {number}: {first_problem(error)}") from None
    return tuple(entries)


def history_of(entries: Sequence[Entry]) -> History:
    """Return the courses of all models, with the steps in them.

    Args:
        entries: the entries in the order in which they were measured.

    Raises:
        ModuleNotFoundError: the library ruptures is not installed.

    """
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.model, entry.machine, entry.how), []).append(entry)
    courses = [
        Course(model=model, machine=where, how=how, entries=tuple(own), steps=_steps(own))
        for (model, where, how), own in groups.items()
    ]
    return History(courses=tuple(courses))


def _steps(entries: Sequence[Entry]) -> tuple[Step, ...]:
    if len(entries) < 2 * _SHORTEST:
        return ()
    from ruptures import Pelt

    logs = np.log([entry.p50_ms for entry in entries])
    noise = max(float(np.median(np.abs(np.diff(logs)))) / _NORMAL, _NOISE)
    penalty = _PENALTY * np.log(len(logs)) * _MEAN * noise
    ends = [0, *Pelt(model="l1", min_size=_SHORTEST, jump=1).fit(logs[:, None]).predict(pen=penalty)]
    medians = [float(np.exp(np.median(logs[begin:end]))) for begin, end in pairwise(ends)]
    found = [
        Step(
            place=place,
            commit=entries[place].commit,
            onnxruntime=entries[place].onnxruntime,
            before_ms=before,
            after_ms=after,
        )
        for place, (before, after) in zip(ends[1:-1], pairwise(medians), strict=True)
    ]
    bounds = zip(found, ends[2:], strict=True)
    return tuple(step for step, end in bounds if abs(step.change) >= _LEAST and _lasts(step, logs[step.place : end]))


def _lasts(step: Step, logs: np.ndarray) -> bool:
    """Return whether enough runs of a segment, whose logarithms are given, are nearer to the time after a step."""
    before, after = np.abs(logs - np.log(step.before_ms)), np.abs(logs - np.log(step.after_ms))
    return int((after < before).sum()) >= _SHORTEST


def drawn(history: History) -> str:
    """Return a picture of all courses as SVG: times against runs, and a line at each step.

    Args:
        history: the courses.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.

    """
    import io

    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tensorrail"}):
        rows = max(1, len(history.courses))
        figure = Figure(figsize=(8, 2.8 * rows), layout="constrained")
        for row, one in enumerate(history.courses):
            axes = figure.add_subplot(rows, 1, row + 1)
            axes.plot(range(len(one.entries)), [entry.p50_ms for entry in one.entries], "o", markersize=3)
            for step in one.steps:
                place = step.place
                axes.axvline(place - 0.5, linewidth=1)
                axes.annotate(
                    f"{step.commit[:8]} {step.change:+.1%}",
                    (place - 0.5, 1.0),
                    xycoords=("data", "axes fraction"),
                    rotation=90,
                    va="top",
                    fontsize=8,
                    parse_math=False,
                )
            axes.set_title(f"{one.model}, {one.machine}, {one.how}", fontsize=9, parse_math=False)
            axes.set_xlabel("run")
            axes.set_ylabel("p50 (ms)")
            axes.grid(alpha=0.3)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _name(model: Path) -> str:
    """Return the path of a model from the current folder, or its name if it is elsewhere."""
    own, here = model.parent.resolve() / model.name, Path.cwd()  # a link has a name of its own
    return own.relative_to(here).as_posix() if own.is_relative_to(here) else model.name


def _commit() -> str:
    """Return the commit that a CI system names, or that git has checked out in this folder; empty where neither does."""
    named = next((os.environ[name] for name in _VARIABLES if os.environ.get(name)), "")
    if named:
        return named
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],  # noqa: S607 - the git of the user
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
