"""`tensorrail quantize`: a model in fp16 or int8, measured beside fp32."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorrail.commands.arguments import Data, Json, Metric, Provider, Threads, input_options, timing_options
from tensorrail.commands.groups import Group, grouped
from tensorrail.terminal import finish, progress_bar, show

if TYPE_CHECKING:
    from tensorrail_exporter.precision.reduce import Quantization


def quantization_options(
    to: Annotated[str, typer.Option("--to", metavar="fp16|int8", help="The precision.")],
    keep: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A layer or node that stays fp32; may be repeated.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="How int8 finds the ranges of activations: minmax (default), entropy or percentile.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Largest relative L2 difference of any output; default 0.01 fp16, 0.1 int8.")
    ] = None,
    reduce_range: Annotated[
        bool | None,
        typer.Option(
            "--reduce-range/--no-reduce-range",
            help="Whether int8 weights have 7 bits, for processors without VNNI; default: only if this machine lacks VNNI.",
        ),
    ] = None,
    gauge: Annotated[
        bool,
        typer.Option(
            "--gauge/--no-gauge",
            help="Whether int8 may scale and mix the channels between two layers, which changes nothing in fp32.",
        ),
    ] = True,
    rounding: Annotated[
        str | None,
        typer.Option(
            help="How int8 rounds weights: outputs (default), so that the outputs of layers change least on the calibration "
            "inputs, or nearest."
        ),
    ] = None,
) -> Quantization:
    """Return the precision, and what stays fp32."""
    from tensorrail_exporter.precision.reduce import Quantization

    kept = tuple(keep or ())
    return Quantization(to, method, kept, tolerance, reduce_range, gauge, rounding)  # type: ignore[arg-type] # checked there


@grouped
def command(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The fp32 model, dense or factored.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the reduced model is written.")],
    quantization: Any = Group(quantization_options),
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="X.npz|FOLDER", help="Typical inputs, arrays by input name: int8 needs them, parity uses them."),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Use at most this many calibration samples; default: all.")] = None,
    data: Data = None,
    metric: Metric = None,
    timing: Any = Group(timing_options),
    inputs: Any = Group(input_options),
    provider: Provider = "cpu",
    threads: Threads = 0,
    json: Json = None,
) -> None:
    """Convert a model to fp16 or int8 and show parity, accuracy and latency. Exit code 1 when out of tolerance."""
    from tensorrail.inputs import as_labelled
    from tensorrail.options import Fit, Options
    from tensorrail.verbs.quantize import quantize
    from tensorrail_exporter.precision.ranges import RangeError, ranges_table
    from tensorrail_runtime.sessions.session import Session

    try:
        with progress_bar() as progress:
            session = Session(provider=provider, threads=threads)
            options = Options(session, timing, fit=Fit(samples=samples), progress=progress, inputs=inputs)
            report = quantize(
                model, out, quantization, calibration=calibration, data=as_labelled(data, metric, inputs), options=options
            )
    except RangeError as error:
        show((ranges_table(error.ranges),))
        raise
    finish(report, json, report.holds)
