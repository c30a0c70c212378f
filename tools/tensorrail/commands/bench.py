"""`tensorrail bench`: interleaved latency of several models."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tensorrail.options import Json, Nhwc, Provider, Shape, Tf32
from tensorrail.show import bar, say, table

if TYPE_CHECKING:
    from tensorrail_runtime.measure.latency import LatencyReport


def command(
    models: Annotated[list[Path], typer.Argument(metavar="A.onnx [B.onnx …]", help="The first one is the reference.")],
    batch: Annotated[int, typer.Option(min=1)] = 1,
    shape: Shape = None,
    duration: Annotated[float, typer.Option(min=0.1, help="Seconds of measuring, all models together.")] = 10.0,
    warmup: Annotated[float, typer.Option(min=0.0, help="Seconds of the same before it.")] = 0.2,
    processes: Annotated[
        int,
        typer.Option(min=0, help="Fresh processes to time in: the interval takes in what they differ by. 0: this one alone."),
    ] = 0,
    threads: Annotated[int, typer.Option(min=0, help="Intra-op threads; 0 is ONNX Runtime's own choice.")] = 0,
    provider: Provider = "cpu",
    io_binding: Annotated[
        bool, typer.Option("--io-binding", help="Keep inputs and outputs on the device; with transfers is shown beside it.")
    ] = False,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Replay a CUDA graph; needs --io-binding.")] = False,
    tf32: Tf32 = False,
    nhwc: Nhwc = False,
    memory: Annotated[bool, typer.Option("--memory", help="Also peak memory, each model in a process of its own.")] = False,
    min_speedup: Annotated[
        float | None, typer.Option(help="Exit with 1 unless every other model's interval lies above this.")
    ] = None,
    json: Json = None,
) -> None:
    """Time models in turns, A B B A, and print the speed-up over the first with a 95 % interval."""
    from tensorrail_runtime.errors import ModelError
    from tensorrail_runtime.measure.footprint import footprint
    from tensorrail_runtime.measure.latency import bench, bench_fresh
    from tensorrail_runtime.sessions.inputs import parse_shapes
    from tensorrail_runtime.sessions.session import Session

    if min_speedup is not None and len(models) < 2:
        raise ModelError("--min-speedup holds the other models against the first: give two models or more")
    shapes = parse_shapes(shape or [])
    settings = Session(provider=provider, threads=threads, tf32=tf32, nhwc=nhwc, cuda_graph=cuda_graph)
    reports = []
    for binding in [True, False] if io_binding and not cuda_graph else [io_binding]:
        with bar("measuring in turns") as advance:
            measure = (
                partial(bench_fresh, processes=processes, on_process=advance) if processes else partial(bench, on_round=advance)
            )
            reports.append(
                measure(
                    models,
                    batch=batch,
                    seconds=duration,
                    warmup=warmup,
                    settings=settings,
                    io_binding=binding,
                    shapes=shapes,
                )
            )
        _show(reports[-1])
    if memory:
        found = [footprint(path, settings=settings, batch=batch, shapes=shapes) for path in models]
        rows = [(f.model, f"{f.load_ms:.0f}", _or_dash(f.host_peak_mib, ".0f"), _or_dash(f.gpu_mib, "d")) for f in found]
        table("in a fresh process", ("model", "load ms", "peak host MiB", "GPU MiB"), rows)
    if json is not None:
        reports[0].save(json)
    if min_speedup is not None and not all(ratio.low >= min_speedup for ratio in reports[0].ratios):
        say(f"falls short: not every interval lies above {min_speedup}×")
        raise typer.Exit(1)


def _show(report: LatencyReport) -> None:
    ratios = ["1", *(f"{r.value:.2f}× [{r.low:.2f}, {r.high:.2f}]" for r in report.ratios)]
    rows = [
        (
            latency.model,
            *(_or_dash(value, ".3f") for value in (latency.p50, latency.p90, latency.p99)),
            f"{latency.throughput:,.0f}",
            f"{latency.load_ms:.0f}",
            ratio,
        )
        for latency, ratio in zip(report.latencies, ratios, strict=True)
    ]
    where = report.machine.gpu.name if report.machine.gpu else report.machine.processor
    how = "with transfers" if report.transfers else "on the device"
    title = f"batch {report.batch}, {report.rounds} rounds{report.fresh}, {where}" + (
        "" if report.provider == "cpu" else f", {how}"
    )
    table(title, ("model", "p50 ms", "p90 ms", "p99 ms", "samples/s", "load ms", "speed-up [95 %]"), rows)
    for warning in report.warnings:
        say(f"warning: {warning}")


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
