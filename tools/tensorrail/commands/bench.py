"""`tensorrail bench`: interleaved latency of several models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorrail.commands.arguments import Batch, Duration, Inputs, Json, Shape, input_options, session_options
from tensorrail.commands.groups import Group, grouped
from tensorrail.terminal import finish, progress_bar, show

if TYPE_CHECKING:
    from tensorrail_runtime.measure.timing import Timing


_PROCESSES = 6  # each of two or three models is loaded first in as many of them


def bench_options(
    batch: Batch = 1,
    shape: Shape = None,
    duration: Duration = 10.0,
    warmup: Annotated[float, typer.Option(min=0.0, help="Seconds of running the models before the measurement.")] = 0.2,
    io_binding: Annotated[
        bool, typer.Option("--io-binding", help="Keep inputs and outputs on the device; latency with transfers is also shown.")
    ] = False,
) -> Timing:
    """Return how latency is measured."""
    from tensorrail_runtime.measure.timing import Timing
    from tensorrail_runtime.sessions.inputs import parse_shapes

    return Timing(batch, parse_shapes(shape or []), duration, warmup, io_binding=io_binding)


@grouped
def command(
    models: Annotated[list[Path], typer.Argument(metavar="A.onnx [B.onnx …]", help="The first one is the reference.")],
    timing: Any = Group(bench_options),
    inputs: Any = Group(input_options),
    session: Any = Group(session_options),
    data: Inputs = None,
    memory: Annotated[bool, typer.Option("--memory", help="Also peak memory, each model in a process of its own.")] = False,
    processes: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Fresh processes to time in: the interval covers what they differ by, and each model is loaded first in some "
            "of them. 0: this process alone, which loads the reference first.  [default: 0; with --min-speedup: 6]",
            show_default=False,
        ),
    ] = None,
    min_speedup: Annotated[
        float | None, typer.Option(help="Exit code 1 unless the interval of every other model begins at this or above.")
    ] = None,
    json: Json = None,
) -> None:
    """Time models in interleaved runs (A B B A) and print the speed-up over the first with a 95 % interval."""
    from dataclasses import replace

    from tensorrail.options import Options
    from tensorrail.verbs.bench import bench
    from tensorrail_runtime.errors import UsageError

    if min_speedup is not None and len(models) < 2:
        raise UsageError("--min-speedup compares other models with the first: expected two models or more, got one")
    if processes is None:
        processes = 0 if min_speedup is None else _PROCESSES
    timing = replace(timing, processes=processes)
    with progress_bar() as progress:
        report = bench(models, data=data, memory=memory, options=Options(session, timing, progress=progress, inputs=inputs))
    if min_speedup is not None and report.uneven:
        show(report.shown())  # what was measured is not lost
        raise UsageError(
            f"--min-speedup: nothing to compare: {report.uneven}; give all models the same with --batch or --shape"
        )
    fast_enough = min_speedup is None or all(ratio.low >= min_speedup for ratio in report.ratios)
    slowest = min(report.ratios, key=lambda ratio: ratio.low, default=None)
    reason = "" if fast_enough or slowest is None else f"too slow: the interval of {slowest.model} begins at {slowest.low:.2f}×"
    finish(report, json, fast_enough, f"{reason}, expected at least {min_speedup}×" if reason else "")
