"""`tensorrail regress`: record a model's baseline, and check later models against it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorrail.commands.arguments import Data, Json, Metric, Shape, input_options
from tensorrail.commands.groups import Group, grouped
from tensorrail.terminal import finish, progress_bar

if TYPE_CHECKING:
    from tensorrail.options import Options
    from tensorrail_runtime.gate.regress import Baseline, Limits, Verdict

_MOST = 10.0  # a slow-down in per cent, as a share

app = typer.Typer(
    help="Check a model's latency, size and outputs against a baseline.", no_args_is_help=True, rich_markup_mode=None
)

Model = Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The model to record.")]
Processes = Annotated[int, typer.Option(min=2, help="Fresh processes; an even number loads each model first equally often.")]
Seconds = Annotated[float, typer.Option(min=0.05, help="Seconds of timing in each process.")]


def record_options(
    batch: Annotated[int, typer.Option(min=1, help="Batch size: the size of dynamic axes that --shape does not give.")] = 1,
    shape: Shape = None,
    threads: Annotated[int, typer.Option(min=0, help="Intra-op threads; 0: ONNX Runtime's own choice.")] = 0,
    provider: Annotated[str, typer.Option(help="ONNX Runtime execution provider: cpu, cuda or tensorrt.")] = "cpu",
    processes: Processes = 6,
    seconds: Seconds = 1.0,
) -> Options:
    """Return how a baseline is measured."""
    return _options(batch, shape, threads, provider, processes, seconds)


def check_options(
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="For two models, default 1; a recorded baseline has its own."),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=1,3,224,224", help="Shape of an input, for two models; a recorded baseline has its own."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=0, help="For two models, default 0; a recorded baseline has its own.")
    ] = None,
    provider: Annotated[
        str | None,
        typer.Option(help="cpu (default), cuda or tensorrt, for two models; a recorded baseline has its own."),
    ] = None,
    processes: Processes = 6,
    seconds: Seconds = 1.0,
) -> tuple[Options, dict[str, object]]:
    """Return how models are measured, and what of it was asked for."""
    asked: dict[str, object] = {"batch": batch, "threads": threads, "provider": provider}
    return _options(batch or 1, shape, threads or 0, provider or "cpu", processes, seconds), asked


def limit_options(
    max_slowdown: Annotated[
        str, typer.Option(help="Slow-downs of this much or more are detected; the check fails above half of it.")
    ] = "5%",
    retrained: Annotated[bool, typer.Option("--retrained", help="Do not compare outputs: the weights have changed.")] = False,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Largest relative L2 difference of the outputs; default 0.001.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(min=0, help="How much lower the metric's mean may be, as a share; default 0.005, with --data."),
    ] = None,
) -> Limits:
    """Return the slow-down to detect, and how far outputs and the metric may differ."""
    from tensorrail_runtime.errors import UsageError
    from tensorrail_runtime.gate.regress import Limits

    if retrained and tolerance is not None:
        raise UsageError("--retrained compares no outputs, so --tolerance has no effect: give one of them")
    limits = Limits(max_slowdown=_share(max_slowdown))
    if retrained or tolerance is not None:
        limits = limits.model_copy(update={"tolerance": tolerance})
    return limits if max_drop is None else limits.model_copy(update={"score": max_drop})


@dataclass(frozen=True)
class Written:
    """Files that a verdict is written to, in the forms that other tools read."""

    junit: Path | None
    benchmark_json: Path | None
    markdown: Path | None
    annotations: Path | None

    def save(self, verdict: Verdict) -> None:
        """Write the files that were asked for."""
        from tensorrail_runtime.gate import outputs
        from tensorrail_runtime.records import write_text

        for path, text in (
            (self.junit, outputs.junit),
            (self.benchmark_json, outputs.smaller_is_better),
            (self.markdown, outputs.markdown),
            (self.annotations, outputs.workflow_commands),
        ):
            if path is not None:
                write_text(path, text(verdict))


def written_options(
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Write JUnit XML.")] = None,
    benchmark_json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write customSmallerIsBetter JSON for github-action-benchmark.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a summary as Markdown.")] = None,
    annotations: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write failures as GitHub workflow commands (::error …).")
    ] = None,
) -> Written:
    """Return the files that a verdict is written to."""
    return Written(junit, benchmark_json, markdown, annotations)


@dataclass(frozen=True)
class Kept:
    """Where the measured time is kept."""

    path: Path | None
    commit: str | None

    def check(self, out: Path) -> None:
        """Raise an error, before any work, where the history is none, cannot be written, or is the baseline's file `out`."""
        from tensorrail.inputs import require_writable
        from tensorrail_runtime.gate.history import read_entries

        if self.path is not None:
            require_writable(self.path, append=True)
            _require_another(out, self.path)
            if self.path.exists():
                read_entries(self.path)

    def add(self, baseline: Baseline, model: Path) -> None:
        """Add the time of a model's baseline to the history, if there is one."""
        from tensorrail.verbs import regress

        if self.path is not None:
            regress.add_to_history(self.path, baseline, commit=self.commit, model=model)


def history_options(
    history: Annotated[
        Path | None,
        typer.Option("--history", metavar="FILE.jsonl", help="Add the time to this file, which `regress history` shows."),
    ] = None,
    commit: Annotated[
        str | None, typer.Option(help="What was measured, for --history; default: the commit that the CI or git names.")
    ] = None,
) -> Kept:
    """Return where the measured time is kept."""
    from tensorrail_runtime.errors import UsageError

    if commit is not None and history is None:
        raise UsageError("--commit names what was measured in a history: give --history FILE.jsonl as well")
    return Kept(history, commit)


@app.command()
@grouped
def record(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the baseline is written.")],
    options: Any = Group(record_options),
    inputs: Any = Group(input_options),
    data: Data = None,
    metric: Metric = None,
    kept: Any = Group(history_options),
) -> None:
    """Measure a model and write its baseline."""
    from dataclasses import replace

    from tensorrail.inputs import as_labelled
    from tensorrail.verbs import regress

    kept.check(out)
    with progress_bar() as progress:
        options = replace(options, progress=progress, inputs=inputs)
        baseline = regress.record(model, out, data=as_labelled(data, metric), options=options)
    kept.add(baseline, model)
    finish(baseline, None, last=f"written to {out}")


@app.command()
@grouped
def check(
    baseline: Annotated[Path, typer.Argument(metavar="BASELINE.json|A.onnx", help="A recorded baseline, or a model.")],
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL.onnx", help="The model to check; with --against-python, default: A.onnx.")
    ] = None,
    against_python: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PYTHON",
            help="A Python interpreter with another onnxruntime, under which A.onnx runs; may be repeated. It needs numpy, and "
            "nothing of this package.",
        ),
    ] = None,
    limits: Any = Group(limit_options),
    how: Any = Group(check_options),
    inputs: Any = Group(input_options),
    data: Data = None,
    metric: Metric = None,
    written: Any = Group(written_options),
    json: Json = None,
) -> None:
    """Check a model against a baseline, against another model that is timed beside it, or against other environments.

    Exit code 1 if a limit is exceeded; the reason is printed.
    """
    from dataclasses import replace

    from tensorrail.inputs import as_labelled
    from tensorrail.verbs import regress
    from tensorrail_runtime.errors import UsageError
    from tensorrail_runtime.gate.regress import Baseline

    options, asked = how
    has_drop = "score" in limits.model_fields_set  # also if it is the default value
    if has_drop and data is None:
        raise UsageError("--max-drop limits the accuracy on labelled data: give --data FILE.npz as well")
    pythons = against_python or []
    if baseline.suffix != ".onnx" and not pythons:
        Baseline.load(baseline).require(**asked, rules=inputs)
    if pythons and (has_drop or metric is not None):
        raise UsageError("--against-python compares times and outputs, and scores nothing: leave out --max-drop and --metric")
    if model is None and not pythons:
        raise UsageError(f"expected a model to check against {baseline}: give MODEL.onnx, or --against-python PYTHON")
    with progress_bar() as progress:
        options = replace(options, progress=progress, inputs=inputs)
        verdict: Verdict
        if pythons:
            verdict = regress.check_environments(
                model or baseline, pythons, there=baseline, limits=limits, data=data, options=options
            )
        else:
            verdict = regress.check(baseline, model, limits=limits, data=as_labelled(data, metric), options=options)
    finish(verdict, json, verdict.holds, also=lambda: written.save(verdict))


@app.command()
@grouped
def history(
    path: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="The file that --history wrote.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE.svg", help="Draw the times here.")] = None,
    json: Json = None,
) -> None:
    """Show the times of a model from commit to commit, and the commits from which it takes another time."""
    from tensorrail.inputs import require_writable
    from tensorrail.verbs import regress
    from tensorrail_runtime.gate.history import drawn
    from tensorrail_runtime.records import write_text

    for written in (out, json):
        if written is not None:
            require_writable(written)
            _require_another(written, path)
    shown = regress.history(path)
    if out is not None:
        write_text(out, drawn(shown))
    finish(shown, json, last=f"written to {out}" if out is not None else "")


def _require_another(out: Path, history: Path) -> None:
    """Raise `UsageError` for a file that is to be written and is a history, which would be lost."""
    from tensorrail_runtime.errors import UsageError

    if out.resolve() == history.resolve():
        raise UsageError(f"{out}: is the history, which would be lost; write to another file")


def _options(batch: int, shape: list[str] | None, threads: int, provider: str, processes: int, seconds: float) -> Options:
    from tensorrail.options import Options
    from tensorrail_runtime.measure.timing import Timing
    from tensorrail_runtime.sessions.inputs import parse_shapes
    from tensorrail_runtime.sessions.session import Session

    timing = Timing(batch, parse_shapes(shape or []), seconds, processes=processes)
    return Options(Session(provider=provider, threads=threads), timing)


def _share(text: str) -> float:
    from tensorrail_runtime.errors import UsageError

    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not (0 < value < 1 or (text.endswith("%") and 0 < value < _MOST)):
        raise UsageError(f"--max-slowdown: expected a share such as 5% or 0.05, got {text!r}")
    return value
