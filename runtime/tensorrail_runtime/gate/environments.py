"""Holds a model in this environment against the same model under another Python's ONNX Runtime.

A new version of ONNX Runtime may fuse other nodes or choose other kernels, and the same file is slower for it. So one process
of each environment opens the model, and both run it interleaved, a burst of runs each; fresh processes follow as for two
models. Two processes differ by a few per cent, whatever runs in them. So the p-value is that of Student's test over pairs of
processes, and not over parts of them. The other environment needs onnxruntime and numpy, and nothing of this package.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from sys import executable
from threading import Timer
from typing import Any

import numpy as np
import onnxruntime as ort

from tensorrail_runtime.errors import ModelError, UsageError, first_line
from tensorrail_runtime.gate.checks import Finding, Limits
from tensorrail_runtime.gate.regress import Verdict, checked
from tensorrail_runtime.gate.times import BLOCKS, PRECISION, TimeChange, imprecision, latency_finding, needs_more, time_change
from tensorrail_runtime.gate.worker import ANSWER
from tensorrail_runtime.measure.fusions import operators_made
from tensorrail_runtime.measure.parity import is_exact, relative_l2, require_comparable
from tensorrail_runtime.measure.timing import Conditions
from tensorrail_runtime.records import Record
from tensorrail_runtime.scratch import scratch
from tensorrail_runtime.sessions.inputs import random_inputs
from tensorrail_runtime.sessions.kernels import contents_of
from tensorrail_runtime.sessions.machine import machine
from tensorrail_runtime.sessions.session import PROVIDERS, Session, open_session
from tensorrail_runtime.tables import Part, Table

_WORKER = Path(__file__).with_name("worker.py")
_WARMUP = 0.1  # seconds of each process
_BURST = 10.0  # milliseconds of runs in a row, beside which a request costs nothing
_LONGEST = 100  # runs in a row
_FEWEST = 2 * BLOCKS  # bursts of each side in a process
_PATIENCE = 600.0  # seconds after which an interpreter that does not answer is stopped
_MOVED = 0.1  # change of an operator's time that is shown
_SEEN = 0.01  # of the model's time: an operator that takes less is not shown for its time


class Operators(Record):
    """All nodes of one operator as they ran on one provider."""

    op: str
    provider: str
    count: int
    microseconds: float  # of all of them in one run


class Environment(Record):
    """A Python environment, and how a model runs there."""

    python: str
    version: str
    onnxruntime: str
    numpy: str
    fused: dict[str, int]
    operators: tuple[Operators, ...]

    @property
    def name(self) -> str:
        """The version of ONNX Runtime and the interpreter, for tables."""
        return f"ONNX Runtime {self.onnxruntime} of {self.python}"


class EnvironmentsVerdict(Verdict):
    """The result of a check against other environments: `findings` has one latency and one output for each of them."""

    here: Environment
    others: tuple[Environment, ...]

    @property
    def how(self) -> str:
        """With which times the measured ones were compared, as text."""
        return f"in interleaved runs with other environments, here ONNX Runtime {self.here.onnxruntime}"

    def shown(self) -> tuple[Part, ...]:
        """Return the table of findings, what runs differently in each environment, and the reason."""
        head, *rest = super().shown()
        return (head, *(part for other in self.others for part in _changes(other, self.here)), *rest)


def check_environments(
    path: Path | str,
    pythons: Sequence[Path | str],
    *,
    there: Path | str | None = None,
    limits: Limits | None = None,
    conditions: Conditions | None = None,
) -> EnvironmentsVerdict:
    """Compare a model under this environment's ONNX Runtime with the same one under others'.

    Args:
        path: the ONNX file.
        pythons: Python interpreters of the other environments, which have onnxruntime and numpy. Each is started: it must be
            one that you trust.
        there: the model that runs in the other environments; default: the same file.
        limits: the slow-down to detect, and how far outputs may differ; sizes are those of the file and not compared.
        conditions: how the model runs and is timed: batch size, shapes, values of inputs (random ones by default), fresh
            processes of each interpreter (6 by default; up to four times as many on a busy machine) and seconds of both in
            each (1 by default).

    Returns:
        For each other environment whether the model is slower here and whether outputs are the same, and what runs differently.

    Raises:
        ModelError: an interpreter cannot be started, has no onnxruntime, or cannot load or run the model; or this one cannot.
        UsageError: there is no interpreter, fewer than two processes or no seconds to time in, or a session with other settings
            than provider and threads.

    """
    limits, conditions = limits or Limits(), checked(conditions)
    settings = conditions.settings
    if not pythons:
        raise UsageError("expected at least one other Python interpreter, got none")
    if not settings.is_plain:
        raise UsageError("in another environment, a session has a provider and a number of threads, and no other settings")
    timing = conditions.timing
    session = open_session(path, settings=settings.exact)
    feed = random_inputs(session, timing.batch, shapes=timing.shapes, values=timing.values)
    del session  # its weights would take memory beside those that are timed
    require_comparable(path, feed, settings.exact)
    with scratch() as name:
        folder = Path(name)
        arrays = _stored(feed, folder / "inputs.npz")
        own = _Side(executable, Path(path), arrays, conditions)
        here, reference = own.described(folder)
        if here.onnxruntime != ort.__version__:
            raise ModelError(
                f"{executable} starts with ONNX Runtime {here.onnxruntime}, but this process has {ort.__version__}: it was not "
                "found in the same place"
            )
        others: list[Environment] = []
        findings: list[Finding] = []
        changes: list[TimeChange] = []
        noise: list[str] = []
        for python in pythons:
            # A Path drops the `./` that tells a file from a name on PATH.
            program = str(python.absolute()) if isinstance(python, Path) and python.exists() else str(python)
            side = replace(own, python=program, model=Path(there or path))
            environment, outputs = side.described(folder)
            others.append(environment)
            old, new = timed_in_turns(side, own, limits.max_slowdown / PRECISION)
            changes.append(time_change(old, new, paired=True, apart=True))
            if uncertain := imprecision(list(zip(old, new, strict=True)), limits.max_slowdown):
                noise.append(f"against {environment.name}, {uncertain}")
            findings.append(latency_finding(changes[-1], limits, f"latency, against {environment.name}"))
            if limits.tolerance is not None:
                findings.append(_same_outputs(outputs, reference, limits.tolerance, environment))
    return EnvironmentsVerdict(
        model=Path(path).name,
        timing=max(changes, key=lambda change: change.slowdown, default=None),
        findings=tuple(findings),
        machine=machine(gpu=settings.on_gpu),
        noise=tuple(noise),
        here=here,
        others=tuple(others),
    )


@dataclass(frozen=True)
class _Arrays:
    """Inputs in an npz file, with their names in its order."""

    path: Path
    names: tuple[str, ...]


def _stored(feed: Mapping[str, np.ndarray], path: Path) -> _Arrays:
    for name, array in feed.items():
        if array.dtype.kind not in "fiub":
            raise ModelError(
                f"input {name!r} has values of type {array.dtype}: only numbers can be passed to another environment"
            )
    np.savez(path, *feed.values())
    return _Arrays(path, tuple(feed))


@dataclass(frozen=True)
class _Side:
    """A model in an environment."""

    python: str
    model: Path
    inputs: _Arrays
    conditions: Conditions

    @contextmanager
    def open(self, *, optimized: Path | None = None, profile: Path | None = None) -> Iterator[tuple[_Worker, dict[str, Any]]]:
        """Start a process that has opened the model, and yield it with what it says of its environment."""
        settings = self.conditions.settings
        options = {
            "inputs": self.inputs.names,
            "threads": settings.threads,
            "providers": _providers(settings),
            "optimized": None if optimized is None else str(optimized),
            "profile": None if profile is None else str(profile),
            # ONNX Runtime 1.31 fuses Transpose(1, 0, 2) → MatMul in fp16 in a way that crashes the process.
            "disabled": ["MatmulTransposeFusion"] if not settings.on_gpu and contents_of(self.model).fp16 else [],
        }
        with _started(self.python) as worker:
            arguments = str(self.model.absolute()), PROVIDERS[settings.provider], str(self.inputs.path), options
            yield worker, worker.ask("open", *arguments)

    def described(self, folder: Path) -> tuple[Environment, dict[str, np.ndarray]]:
        """Return the environment with how the model runs in it, and the model's outputs."""
        with scratch(beside=folder) as name:
            place = Path(name)
            # TensorRT compiles whole parts of a model, and then there is no graph to write.
            optimized = None if self.conditions.settings.provider == "tensorrt" else place / "optimized.onnx"
            with self.open(optimized=optimized, profile=place / "profile") as (worker, versions):
                names = worker.ask("outputs", str(place / "outputs.npz"))
                nodes = worker.ask("profile")
            with np.load(place / "outputs.npz", allow_pickle=False) as stored:
                outputs = {name: stored[f"arr_{k}"] for k, name in enumerate(names)}
            fused = {} if optimized is None else operators_made(self.model, optimized)
        groups: dict[tuple[str, str], list[float]] = defaultdict(list)
        for _, op, provider, microseconds in nodes:
            groups[op, provider].append(microseconds)
        operators = tuple(
            Operators(op=op, provider=provider, count=len(times), microseconds=sum(times))
            for (op, provider), times in groups.items()
        )
        environment = Environment(
            python=self.python,
            version=versions["version"],
            onnxruntime=versions["onnxruntime"],
            numpy=versions["numpy"],
            fused=fused,
            operators=operators,
        )
        return environment, outputs


def timed_in_turns(before: _Side, after: _Side, precision: float | None) -> tuple[list[list[float]], list[list[float]]]:
    """Return the milliseconds of two sides that ran interleaved, one list per process of each.

    Args:
        before: the side that is compared with.
        after: the side that is checked.
        precision: as for `needs_more`.

    """
    timing, progress = after.conditions.timing, after.conditions.progress
    runs: list[tuple[list[float], list[float]]] = []
    while needs_more(runs, timing.processes, precision):
        runs.append(_one_process_each(before, after, timing.duration, swapped=bool(len(runs) % 2)))
        progress("measuring latency", min(1.0, len(runs) / timing.processes))
    return [run[0] for run in runs], [run[1] for run in runs]


def _providers(settings: Session) -> list[tuple[str, dict[str, str]]]:
    """Return the providers, in which CUDA runs what TensorRT does not take, as in `open_session`.

    Of the options TF32 alone is set: another version of ONNX Runtime may not know the newer ones.
    """
    cuda = (PROVIDERS["cuda"], {"use_tf32": "0"})
    return {"cuda": [cuda], "tensorrt": [(PROVIDERS["tensorrt"], {}), cuda]}.get(settings.provider, [(PROVIDERS["cpu"], {})])


def _one_process_each(before: _Side, after: _Side, seconds: float, *, swapped: bool) -> tuple[list[float], list[float]]:
    """Time both sides interleaved (A B B A), in one fresh process each; the one that is opened first gets the better place."""
    sides = (after, before) if swapped else (before, after)
    with sides[0].open() as (first, _), sides[1].open() as (second, _):
        workers = (first, second)
        slower = max(worker.ask("warm", _WARMUP) for worker in workers)
        count = int(min(max(_BURST / slower, 1), _LONGEST))
        times: tuple[list[float], list[float]] = ([], [])
        spent, bursts = 0.0, 0
        while spent < 1e3 * seconds or bursts < _FEWEST:
            for k in (0, 1) if bursts % 2 else (1, 0):
                new = workers[k].ask("times", count)
                times[k].extend(new)
                spent += sum(new)
            bursts += 1
    return (times[1], times[0]) if swapped else times


class _Worker:
    """A process of another environment, which answers requests."""

    def __init__(self, python: str, process: subprocess.Popen[str], errors: Path) -> None:
        self.python, self.process, self.errors = python, process, errors
        self._late = False

    def _give_up(self) -> None:
        self._late = True
        self.process.kill()

    def ask(self, do: str, *arguments: object) -> Any:  # Any: JSON
        """Return the answer to a request; raises `ModelError` with the reason where it fails."""
        late = Timer(_PATIENCE, self._give_up)
        late.start()
        try:
            line = self._answer(json.dumps({"do": do, "arguments": arguments}))
        finally:
            late.cancel()
        if not line:
            code = self.process.wait()
            if self._late:
                raise ModelError(f"{self.python}: no answer within {_PATIENCE:g} seconds: try a smaller batch")
            lines = self.errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise ModelError(f"{self.python}: the process ended with {code}: {lines[-1] if lines else 'no message'}")
        answer = json.loads(line)
        if "error" in answer:
            what = answer["error"]
            hint = ": install onnxruntime and numpy in that environment" if what.startswith("ModuleNotFoundError") else ""
            raise ModelError(f"{self.python}: {first_line(Exception(what))}{hint}")
        return answer["value"]

    def _answer(self, request: str) -> str:
        """Return the line of JSON that answers a request; empty where the process has ended."""
        if self.process.stdin is None or self.process.stdout is None:
            raise ValueError("the process has no pipes")
        with suppress(BrokenPipeError):
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                if line.startswith(ANSWER):
                    return line.removeprefix(ANSWER)
                if line.strip() == request:
                    raise ModelError(f"{self.python}: repeats what it is asked: expected a Python interpreter")
        return ""  # other lines are those that a module of the environment prints when Python starts


@contextmanager
def _started(python: str) -> Iterator[_Worker]:
    """Start a worker with an interpreter, in a folder of its own; another one gets no variables that are meant for this one."""
    own = python == executable
    program = str(Path(python).absolute()) if os.sep in python else python  # the link of a virtual environment stays one
    variables = {key: value for key, value in os.environ.items() if own or not key.startswith("PYTHON")}
    with scratch() as name:
        errors = Path(name) / "stderr"
        with errors.open("w", encoding="utf-8") as stderr:
            try:
                process = subprocess.Popen(  # noqa: S603 - the user named the interpreter
                    [program, str(_WORKER)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    cwd=name,
                    env=variables,
                    text=True,
                    encoding="utf-8",
                    errors="replace",
                )
            except OSError as error:
                raise ModelError(
                    f"{python}: cannot be started ({error.strerror or error}): expected a Python interpreter whose environment "
                    "has onnxruntime and numpy"
                ) from None
        try:
            yield _Worker(python, process, errors)
        finally:
            process.kill()
            process.communicate()


def _same_outputs(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], tolerance: float, environment: Environment
) -> Finding:
    """Return whether outputs are those of another environment."""
    apart = {name: _apart(before.get(name), after.get(name)) for name in dict.fromkeys((*before, *after))}
    worst = max(apart, key=lambda name: apart[name][0])
    return Finding(
        name=f"outputs, against {environment.name}",
        baseline="the same inputs",
        measured=f"{worst}: {apart[worst][1]}",
        limit=f"at most {tolerance:g} (relative L2)",
        holds=apart[worst][0] <= tolerance,
    )


def _apart(before: np.ndarray | None, after: np.ndarray | None) -> tuple[float, str]:
    """Return the difference of two outputs, and the same in words.

    It is the relative L2 difference, or for exact outputs the share that differs; infinite for other shapes or types, and where
    other values are infinite or NaN.
    """
    if before is None or after is None:
        return np.inf, "missing there" if before is None else "missing here"
    if before.shape != after.shape or before.dtype != after.dtype:
        return np.inf, f"{before.dtype} {list(before.shape)} → {after.dtype} {list(after.shape)}"
    if is_exact(after.dtype):
        share = float(np.mean(before != after)) if after.size else 0.0
        return share, f"{share:.1%} of the values differ"
    a, b = before.astype(np.float64), after.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
        return np.inf, "other values are infinite or NaN"
    difference = relative_l2(a[finite], b[finite])
    return difference, f"differs by {difference:.1e}"


def _changes(before: Environment, after: Environment) -> Iterator[Part]:
    """Yield the table of what runs differently in two environments."""
    old, new = ({(one.op, one.provider): one for one in side.operators} for side in (before, after))
    total = max(sum(one.microseconds for one in before.operators), 1e-9)
    rows = []
    for key in dict.fromkeys((*new, *old)):
        a, b = old.get(key), new.get(key)
        counts = 0 if a is None else a.count, 0 if b is None else b.count
        times = 0.0 if a is None else a.microseconds, 0.0 if b is None else b.microseconds
        moved = abs(times[1] - times[0])
        if counts[0] != counts[1] or (moved > _MOVED * times[0] and moved > _SEEN * total):
            provider = key[1].removesuffix("ExecutionProvider")
            rows.append((-moved, (key[0], provider, *map(str, counts), *(f"{time:,.0f}" for time in times))))
    fused = dict.fromkeys((*before.fused, *after.fused))
    lost = [
        (n, before.fused.get(n, 0), after.fused.get(n, 0)) for n in fused if before.fused.get(n, 0) != after.fused.get(n, 0)
    ]
    if not rows and not lost:
        yield f"{before.name} runs the same operators, within 10 % of their time"
        return
    if rows:
        head = ("operator as it ran", "provider", "nodes there", "nodes here", "µs there", "µs here")
        title = f"what runs differently here than with {before.name}; times of one profile, on a GPU those to launch kernels"
        yield Table(title, head, [row for _, row in sorted(rows)])
    if lost:
        names = ", ".join(f"{name} {a} → {b}" for name, a, b in lost)
        yield f"operators that are fused differently (there → here): {names}"
