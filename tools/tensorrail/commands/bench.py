"""`tensorrail bench`: interleaved latency of several models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tensorrail.options import Json, Provider
from tensorrail.show import console, table


def command(
    models: Annotated[list[Path], typer.Argument(metavar="A.onnx [B.onnx …]", help="The first one is the reference.")],
    batch: Annotated[int, typer.Option(min=1)] = 1,
    duration: Annotated[float, typer.Option(min=0.1, help="Seconds of measuring, all models together.")] = 10.0,
    threads: Annotated[int, typer.Option(min=0, help="Intra-op threads; 0 is ONNX Runtime's own choice.")] = 0,
    provider: Provider = "cpu",
    min_speedup: Annotated[
        float | None, typer.Option(help="Exit with 1 unless every other model's interval lies above this.")
    ] = None,
    json: Json = None,
) -> None:
    """Time models in turns, A B B A, and print the speed-up over the first with a 95 % interval."""
    from tensorrail_runtime.latency import bench

    with console.status("measuring in turns"):
        result = bench(models, batch=batch, seconds=duration, threads=threads, provider=provider)
    ratios = ["1", *(f"{r.value:.2f}× [{r.low:.2f}, {r.high:.2f}]" for r in result.ratios)]
    rows = [
        (latency.model, f"{latency.p50:.3f}", f"{latency.p90:.3f}", ratio)
        for latency, ratio in zip(result.latencies, ratios, strict=True)
    ]
    table(
        f"batch {batch}, {result.rounds} rounds, {result.machine.processor}",
        ("model", "p50 ms", "p90 ms", "speed-up [95 %]"),
        rows,
    )
    if json is not None:
        result.save(json)
    if min_speedup is not None and any(ratio.low < min_speedup for ratio in result.ratios):
        console.print(f"falls short: not every interval lies above {min_speedup}×")
        raise typer.Exit(1)
