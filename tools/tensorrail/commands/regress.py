"""`tensorrail regress`: record a model's baseline, and hold later models against it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tensorrail.options import Data, Json, Metric, Provider, Shape
from tensorrail.show import bar, say, table

if TYPE_CHECKING:
    from tensorrail_runtime.gate.regress import Data as Loaded

_MOST = 10.0  # a slow-down that is asked for in per cent, as a share

app = typer.Typer(help="Hold a model's latency, size and outputs against a baseline.", no_args_is_help=True)

Model = Annotated[Path, typer.Argument(metavar="MODEL.onnx")]
Processes = Annotated[int, typer.Option(min=2, help="Fresh processes; an even number loads each model first equally often.")]
Seconds = Annotated[float, typer.Option(min=0.05, help="Seconds of timing in each process.")]


@app.command()
def record(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the baseline is written.")],
    batch: Annotated[int, typer.Option(min=1, help="Size of the dynamic axes that --shape does not give.")] = 1,
    shape: Shape = None,
    threads: Annotated[int, typer.Option(min=0, help="Intra-op threads; 0 is ONNX Runtime's own choice.")] = 0,
    provider: Provider = "cpu",
    processes: Processes = 6,
    seconds: Seconds = 1.0,
    data: Data = None,
    metric: Metric = None,
) -> None:
    """Measure a model and write its baseline."""
    from tensorrail_runtime.gate import regress
    from tensorrail_runtime.sessions.inputs import parse_shapes
    from tensorrail_runtime.sessions.session import Session

    effort = regress.Effort(processes=processes, seconds=seconds)
    settings = Session(provider=provider, threads=threads)
    with bar("processes") as advance:
        made = regress.record(
            model,
            out,
            settings=settings,
            batch=batch,
            shapes=parse_shapes(shape or []),
            effort=effort,
            data=_load(data, metric),
            on_process=advance,
        )
    times = sorted(time for process in made.processes for time in process)
    say(f"{out}: {model.name}, batch {made.batch}, p50 {times[len(times) // 2]:.4f} ms of {len(times)} runs")


@app.command()
def check(
    baseline: Annotated[Path, typer.Argument(metavar="BASELINE.json|A.onnx", help="A recorded baseline, or a model.")],
    model: Model,
    max_slowdown: Annotated[str, typer.Option(help="The slow-down to be found; half of it raises the alarm.")] = "5%",
    retrained: Annotated[bool, typer.Option("--retrained", help="Do not compare outputs: the weights are others.")] = False,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Largest relative L2 difference of the outputs; 0.001 where none is given.")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(min=0, help="How much lower the metric's mean may be, as a share; 0.005 with --data.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="For two models (1); a baseline has its own.")] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=1,3,224,224", help="For two models, an input's shape; a baseline has its own."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=0, help="For two models (0); a baseline has its own.")] = None,
    provider: Annotated[
        str | None, typer.Option(help="For two models: cpu (where none is given), cuda or tensorrt; a baseline has its own.")
    ] = None,
    processes: Processes = 6,
    seconds: Seconds = 1.0,
    data: Data = None,
    metric: Metric = None,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Write JUnit XML.")] = None,
    benchmark_json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write customSmallerIsBetter JSON for github-action-benchmark.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a summary as Markdown.")] = None,
    annotations: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what falls short as GitHub workflow commands (::error …).")
    ] = None,
    json: Json = None,
) -> None:
    """Hold a model against a baseline, or against another model on the spot. Exit code 1 with the reason in one line."""
    from tensorrail_runtime.errors import ModelError
    from tensorrail_runtime.gate import outputs as gate_output
    from tensorrail_runtime.gate import regress
    from tensorrail_runtime.records import write_text
    from tensorrail_runtime.sessions.inputs import parse_shapes
    from tensorrail_runtime.sessions.session import Session

    if max_drop is not None and data is None:
        raise ModelError("--max-drop holds the accuracy on labelled data: give --data FILE.npz as well")
    if retrained and tolerance is not None:
        raise ModelError("--retrained compares no outputs, and --tolerance says how far they may differ: give one of them")
    limits = regress.Limits(max_slowdown=_share(max_slowdown))
    if retrained or tolerance is not None:
        limits = limits.model_copy(update={"tolerance": tolerance})
    if max_drop is not None:
        limits = limits.model_copy(update={"score": max_drop})
    settings = None
    if baseline.suffix == ".onnx":
        settings = Session(provider=provider or "cpu", threads=threads or 0)
    else:
        regress.Baseline.load(baseline).require(provider=provider, threads=threads)
    with bar("processes") as advance:
        verdict = regress.check(
            baseline,
            model,
            limits=limits,
            effort=regress.Effort(processes=processes, seconds=seconds),
            settings=settings,
            batch=batch,
            shapes=parse_shapes(shape or []),
            data=_load(data, metric),
            on_process=advance,
        )
    rows = [(f.name, f.baseline, f.measured, f.limit, "yes" if f.holds else "NO") for f in verdict.findings]
    table(f"{model} against {baseline}, {verdict.how}", ("what", "baseline", "measured", "limit", "holds"), rows)
    written = (
        (junit, gate_output.junit),
        (benchmark_json, gate_output.smaller_is_better),
        (markdown, gate_output.markdown),
        (annotations, gate_output.workflow_commands),
    )
    for path, text in written:
        if path is not None:
            write_text(path, text(verdict))
    if json is not None:
        verdict.save(json)
    if verdict.warning:
        say(f"warning: {verdict.warning}")
    say(verdict.reason)
    raise typer.Exit(0 if verdict.holds else 1)


def _share(text: str) -> float:
    from tensorrail_runtime.errors import ModelError

    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not (0 < value < 1 or (text.endswith("%") and 0 < value < _MOST)):
        raise ModelError(f"a slow-down is written as 5% or 0.05, and {text!r} came")
    return value


def _load(data: Path | None, metric: str | None) -> Loaded | None:
    from tensorrail_runtime.errors import ModelError
    from tensorrail_runtime.sessions.inputs import load_arrays

    if data is None:
        if metric is not None:
            raise ModelError("--metric scores labelled data: give --data FILE.npz as well")
        return None
    arrays = load_arrays(data)
    if "labels" not in arrays:
        raise ModelError(f"{data}: holds no array 'labels'; it has {', '.join(arrays)}")
    return {name: array for name, array in arrays.items() if name != "labels"}, arrays["labels"], metric or "top1"
