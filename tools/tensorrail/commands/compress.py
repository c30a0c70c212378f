"""`tensorrail compress`: a faster model from nothing but an ONNX file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from tensorrail.commands import quantize
from tensorrail.options import CudaGraph, Data, Json, Nhwc, Provider, Shape, Tf32, require_writable
from tensorrail.show import say, stages, table
from tensorrail.targets import (
    Batch,
    Cache,
    CalibrationPath,
    Formats,
    Grid,
    Keep,
    MaxLoss,
    Samples,
    Seconds,
    Slower,
    Target,
    Threads,
    load_inputs,
    read_search,
    read_targets,
    show_plan,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import onnx

    from tensorrail_exporter.calibrate.inputs import Calibration
    from tensorrail_exporter.plans.plan import Plan
    from tensorrail_exporter.workflow import CompressReport, Refine

Fit = Annotated[
    int,
    typer.Option(
        "--fit",
        min=-1,
        metavar="EPOCHS",
        help="Passes over the calibration inputs that fit the cores to the dense activations, in torch; 0: none, "
        "-1: 12 where torch is installed.",
    ),
]


_OF_THE_PLAN = ("format", "grid", "keep", "allow_slower", "seconds", "cache")
"""Options that say how a plan is found: nothing where one came."""


def command(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The dense graph.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the faster model is written.")],
    target: Target = None,
    max_loss: MaxLoss = None,
    plan: Annotated[Path | None, typer.Option(help="A plan.json in place of a target.")] = None,
    calibration: CalibrationPath = None,
    samples: Samples = 512,
    fit: Fit = -1,
    also: Annotated[
        list[str] | None,
        typer.Option("--also", metavar="fp16|int8", help="Write OUT in that precision as well, and show it beside fp32."),
    ] = None,
    data: Data = None,
    provider: Provider = "cpu",
    tf32: Tf32 = False,
    nhwc: Nhwc = False,
    cuda_graph: CudaGraph = False,
    threads: Threads = 0,
    batch: Batch = 1,
    shape: Shape = None,
    format: Formats = None,  # noqa: A002 - the record's own word
    grid: Grid = 0,
    keep: Keep = None,
    allow_slower: Slower = False,
    seconds: Seconds = 150.0,
    duration: Annotated[float, typer.Option(min=0.5, help="Seconds of the final comparison.")] = 10.0,
    cache: Cache = None,
    json: Json = None,
) -> None:
    """Plan, decompose, rewrite, check and time. Exit code 1 when the target or a speed-up above 1 was not measured."""
    from tensorrail_exporter.graphs.io import load_model
    from tensorrail_exporter.plans.plan import Plan
    from tensorrail_exporter.precision.reduce import reduced
    from tensorrail_exporter.search.planner import plan_network
    from tensorrail_exporter.workflow import compress
    from tensorrail_runtime.errors import PlanError, TargetError
    from tensorrail_runtime.sessions.inputs import open_axes, parse_shapes
    from tensorrail_runtime.sessions.session import Session

    _check_also(also or [], calibration)
    if (bool(target) or max_loss is not None) == (plan is not None):
        raise PlanError("compress needs --target latency=2.0 (or flops, params, bytes), or --plan plan.json, and not both")
    _check_given(context, plan, calibration)
    for path in (out, *(_reduced(out, one) for one in also or [])):
        require_writable(path, model, plan, calibration, data)
    settings = Session(provider=provider, threads=threads, tf32=tf32, nhwc=nhwc, cuda_graph=cuda_graph)
    shapes = parse_shapes(shape or [])
    targets = read_targets(target or [])
    search = read_search(
        targets, batch, format, grid=grid, keep=keep, max_loss=max_loss, slower=allow_slower, seconds=seconds, cache=cache
    )
    if plan is None:
        search.check()
    elif not plan.exists():
        raise PlanError(f"{plan}: cannot be read (no such file): expected a plan.json")
    graph = load_model(model)
    for line in open_axes(graph, shapes):
        say(f"warning: {line}")
    inputs = load_inputs(calibration, model, samples)
    test = _labelled(data) if data is not None else None
    refine = _refine(fit) if inputs is not None else None
    with stages() as on_stage:
        if plan is not None:
            chosen, wanted = None, Plan.load(plan)
        else:
            chosen = plan_network(graph, search, calibration=inputs, settings=settings, shapes=shapes, on_stage=on_stage)
            wanted = chosen.plan
        if not wanted.layers:
            raise TargetError("every layer stays dense: nothing here is faster, and no model was written")
        report = compress(
            graph,
            wanted,
            out,
            targets=targets,
            planned=chosen.rows if chosen else (),
            predicted=chosen.predicted if chosen else None,
            calibration=inputs,
            test=test,
            refine=refine(on_stage) if refine else None,
            settings=settings,
            batch=batch,
            shapes=shapes,
            seconds=duration,
            on_stage=on_stage,
        )
    if chosen is not None:
        show_plan(chosen)
    _show(out, report)
    for precision in also or []:
        small = reduced(
            out,
            _reduced(out, precision),
            to=precision,  # type: ignore[arg-type] # checked above
            calibration=inputs.feeds if inputs is not None else None,
            data=test[0] if test else None,
            labels=test[1] if test else None,
            batch=batch,
            shapes=shapes,
            seconds=duration,
            settings=settings,
        )
        quantize.show(small)
        report = report.model_copy(update={"reduced": (*report.reduced, small)})
    if json is not None:
        report.save(json)
    raise typer.Exit(0 if report.meets and report.faster else 1)


def _reduced(out: Path, precision: str) -> Path:
    return out.with_suffix(f".{precision}.onnx")


def _check_also(also: Sequence[str], calibration: Path | None) -> None:
    from tensorrail_exporter.precision.reduce import Precision
    from tensorrail_runtime.errors import PlanError

    unknown = [one for one in also if one not in get_args(Precision)]
    if unknown:
        raise PlanError(f"--also takes {' or '.join(get_args(Precision))}, and {unknown[0]!r} came")
    if "int8" in also and calibration is None:
        raise PlanError("--also int8 needs --calibration: the ranges of activations are measured on inputs")


def _check_given(context: typer.Context, plan: Path | None, calibration: Path | None) -> None:
    """Raise `PlanError` for an option that the user gave and that would have no effect."""
    from tensorrail_runtime.errors import PlanError

    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    for name in _OF_THE_PLAN if plan is not None else ():
        if name in given:
            raise PlanError(f"--{name.replace('_', '-')} says how a plan is found, and one came: leave it out, or --plan")
    for name in ("fit", "samples") if calibration is None else ():
        if name in given and context.params[name]:
            raise PlanError(f"--{name} is of calibration inputs, and none came: give --calibration, or leave it out")


def _labelled(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    from tensorrail_runtime.errors import ModelError
    from tensorrail_runtime.sessions.inputs import load_arrays

    arrays = load_arrays(path)
    if "labels" not in arrays:
        raise ModelError(f"{path}: --data needs an array `labels` beside the inputs, and holds {', '.join(arrays)}")
    labels = arrays.pop("labels")
    return arrays, labels


def _refine(epochs: int):  # type: ignore[no-untyped-def] # a function that makes a Refine of a listener
    """Return what makes the fit in torch; None when it is switched off, or torch is absent and it was not asked for."""
    if epochs == 0:
        return None
    try:
        from tensorrail_runtime.errors import GraphError
        from tensorrail_trainer.fit.blocks import FitSettings, fit_blocks
    except ModuleNotFoundError:
        if epochs > 0:
            raise
        return None
    settings = FitSettings() if epochs < 0 else FitSettings(block_epochs=epochs)

    def make(on_stage) -> Refine:  # type: ignore[no-untyped-def]
        listen = partial(_named, on_stage)

        def refine(dense: onnx.ModelProto, factored: onnx.ModelProto, plan: Plan, inputs: Calibration) -> onnx.ModelProto:
            try:
                return fit_blocks(dense, factored, plan, inputs, settings, listen).model
            except GraphError as error:
                if epochs > 0:  # asked for
                    raise
                say(f"the fit to activations is left out: {error}")
                return factored

        return refine

    return make


def _named(on_stage, share: float, what: str) -> None:  # type: ignore[no-untyped-def]
    on_stage(f"fitting to activations {what}", share)


def _show(out: Path, report: CompressReport) -> None:
    dense, factored, ratios = report.dense, report.factored, report.ratios
    rows = [
        ("parameters", f"{dense.params:,}", f"{factored.params:,}", f"÷ {ratios.params:.2f}"),
        ("FLOPs (2 × MACs)", f"{dense.flops:,}", f"{factored.flops:,}", f"÷ {ratios.flops:.2f}"),
        ("file, bytes", f"{dense.bytes:,}", f"{factored.bytes:,}", f"÷ {ratios.bytes:.2f}"),
        (
            f"latency p50, batch {report.latency.batch}",
            f"{dense.milliseconds:.3f} ms",
            f"{factored.milliseconds:.3f} ms",
            f"{ratios.latency:.2f}× [{ratios.latency_low:.2f}, {ratios.latency_high:.2f}]",
        ),
    ]
    if report.accuracy is not None:
        a, b = report.accuracy.reference, report.accuracy.candidate
        rows.append(
            (
                "top-1 accuracy",
                f"{100 * a.mean:.2f} %",
                f"{100 * b.mean:.2f} %",
                f"{100 * report.accuracy.difference:+.2f} points",
            )
        )
    table(str(out), ("", "dense", "factored", ""), rows)
    agreement = "" if report.top1_agreement is None else f", top-1 agrees on {100 * report.top1_agreement:.1f} %"
    say(f"outputs differ by {report.approximation:.2e} relative{agreement}; the rewriting itself by {report.numerical:.1e}")
    if not report.faster:
        say("NOT measured to be faster than the dense model")
    if not report.meets:
        wanted = ", ".join(f"{name}={value:g}" for name, value in report.targets.items())
        say(f"the target {wanted} was NOT reached")
