"""`tensorrail plan`: which layers become which cores, so that a target is met at the least loss."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from tensorrail.options import CudaGraph, Json, Nhwc, Provider, Shape, Tf32, require_writable
from tensorrail.show import say, stages
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
    load_network,
    read_search,
    read_targets,
    show_plan,
)


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL.onnx | module:factory", help="A dense graph, or a torch module.")],
    target: Target = None,
    max_loss: MaxLoss = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where plan.json is written.")] = None,
    calibration: CalibrationPath = None,
    samples: Samples = 128,
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
    cache: Cache = None,
    json: Json = None,
) -> None:
    """Choose formats and ranks for a target, from times measured here. Exit code 1 when a target is missed."""
    from tensorrail_exporter.graphs.io import save_model
    from tensorrail_exporter.search.planner import plan_network
    from tensorrail_runtime.sessions.inputs import open_axes, parse_shapes
    from tensorrail_runtime.sessions.session import Session

    search = read_search(
        read_targets(target or []),
        batch,
        format,
        grid=grid,
        keep=keep,
        max_loss=max_loss,
        slower=allow_slower,
        seconds=seconds,
        cache=cache,
    )
    search.check()
    require_writable(out, *([Path(model)] if ":" not in str(model) else []), calibration)
    graph, path = load_network(model, shape)
    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            path = Path(folder) / "model.onnx"
            save_model(graph, path)
            shape = None
        inputs = load_inputs(calibration, path, samples)
        shapes = parse_shapes(shape or [])
        for line in open_axes(graph, shapes):
            say(f"warning: {line}")
        with stages() as on_stage:
            report = plan_network(
                graph,
                search,
                calibration=inputs,
                settings=Session(provider=provider, threads=threads, tf32=tf32, nhwc=nhwc, cuda_graph=cuda_graph),
                shapes=shapes,
                on_stage=on_stage,
            )
    show_plan(report)
    if out is not None:
        report.plan.save(out)
    if json is not None:
        report.save(json)
    raise typer.Exit(0 if report.meets else 1)
