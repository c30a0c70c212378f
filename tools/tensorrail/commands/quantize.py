"""`tensorrail quantize`: a model in fp16 or int8, measured beside fp32."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tensorrail.options import Data, Json, Metric, Provider, Shape, require_writable
from tensorrail.show import bar, say, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensorrail_exporter.precision.ranges import LayerRange
    from tensorrail_exporter.precision.reduce import PrecisionReport

_SHOWN = 8  # layers of the range table
_CALIBRATION_BATCH = 16


def command(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The fp32 model, dense or factored.")],
    to: Annotated[str, typer.Option("--to", metavar="fp16|int8", help="The precision.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the reduced model is written.")],
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz", help="Typical inputs, arrays by input name: int8 needs them, parity uses them."),
    ] = None,
    data: Data = None,
    metric: Metric = None,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A layer or node that stays fp32; may be given again.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="How int8 finds the activations' ranges: minmax (default), entropy or percentile.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Largest relative L2 difference of any output; default 0.01 fp16, 0.1 int8.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch size of the latency.")] = 1,
    shape: Shape = None,
    duration: Annotated[float, typer.Option(min=0.1, help="Seconds of measuring, both models together.")] = 10.0,
    provider: Provider = "cpu",
    json: Json = None,
) -> None:
    """Convert a model to fp16 or int8 and show parity, accuracy and latency. Exit code 1 when out of tolerance."""
    from tensorrail_exporter.precision.ranges import RangeError
    from tensorrail_exporter.precision.reduce import reduced
    from tensorrail_runtime.errors import ModelError
    from tensorrail_runtime.sessions.inputs import batches_of, load_arrays, parse_shapes
    from tensorrail_runtime.sessions.session import Session, open_session

    if to == "int8" and calibration is None:
        raise ModelError("int8 needs typical inputs for the ranges of the activations: --calibration FILE.npz, 100 or more")
    if metric is not None and data is None:
        raise ModelError("--metric scores labelled data: give --data FILE.npz as well")
    require_writable(out, model, calibration, data)
    settings = Session(provider=provider)
    feeds = None
    if calibration is not None:
        feeds = batches_of(open_session(model, settings=settings), load_arrays(calibration), _CALIBRATION_BATCH)
    arrays = None if data is None else load_arrays(data)
    if arrays is not None and "labels" not in arrays:
        raise ModelError(f"{data}: holds no array 'labels'; it has {', '.join(arrays)}")
    labels = None if arrays is None else arrays.pop("labels")
    try:
        with bar("converting, then measuring in turns") as advance:
            report = reduced(
                model,
                out,
                to=to,  # type: ignore[arg-type] # checked there, with the names that exist
                calibration=feeds,
                data=arrays,
                labels=labels,
                metric=metric or "top1",
                method=method,  # type: ignore[arg-type] # likewise
                keep=keep or (),
                tolerance=tolerance,
                batch=batch,
                shapes=parse_shapes(shape or []),
                seconds=duration,
                settings=settings,
                on_round=advance,
            )
    except RangeError as error:
        show_ranges(error.ranges)
        raise
    show(report)
    if json is not None:
        report.save(json)
    raise typer.Exit(0 if report.holds else 1)


def show(report: PrecisionReport) -> None:
    """Print one table, fp32 and the reduced model side by side, and what there is to say of it."""
    worst = max(report.parity.outputs, key=lambda output: output.relative_l2)
    agreement = worst.top1_agreement
    before, after = report.latency.latencies
    rows = [
        ("file, bytes", f"{report.bytes_before:,}", f"{report.bytes_after:,}"),
        (f"relative L2 of {worst.name}", "0", f"{worst.relative_l2:.2e}"),
    ]
    if agreement is not None:
        rows.append(("top-1 agreement", "100.0 %", f"{100 * agreement:.1f} %"))
    if (paired := report.accuracy) is not None:
        interval = f" ({paired.difference:+.4f} [{paired.low:+.4f}, {paired.high:+.4f}], p = {paired.p_value:.2g})"
        rows.append((paired.reference.metric, f"{paired.reference.mean:.4f}", f"{paired.candidate.mean:.4f}{interval}"))
    ratio = report.ratio
    rows += [
        (f"latency p50, batch {report.latency.batch}", f"{before.p50:.3f} ms", f"{after.p50:.3f} ms"),
        ("speed-up [95 %]", "1", f"{ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}]"),
    ]
    on = f"{report.samples} {report.inputs} samples, {report.latency.rounds} rounds on {report.latency.machine.processor}"
    table(f"{report.model} as {report.reduced}; {on}", ("", "fp32", report.to), rows)
    if report.fp32:
        names = ", ".join(f"{one.layer} ({one.op}{', kept' if one.kept else ''})" for one in report.fp32)
        say(f"still fp32: {names}")
    say(f"{report.to} is {report.verdict} than fp32 here" + _why(report))
    for warning in report.latency.warnings:
        say(f"warning: {warning}")
    smallest = max(output.smallest for output in report.parity.outputs)
    held = "within" if report.holds else "OUT OF"
    say(f"{held} tolerance {report.parity.tolerance:g}; the smallest that would pass is {smallest:.2e}")
    if report.ranges:
        show_ranges(report.ranges)


def show_ranges(ranges: Sequence[LayerRange]) -> None:
    """Print the layers' ranges, the most suspicious first: what to name in --keep."""
    rows = [
        (
            r.layer,
            r.core,
            f"{r.core_min:.3g} … {r.core_max:.3g}",
            f"{r.channel_ratio:.3g}",
            f"{r.output_min:.3g} … {r.output_max:.3g}",
            "YES" if r.overflows else "no",
            f"{100 * max(r.core_subnormal, r.output_subnormal):.1f} %",
            f"{100 * r.core_int8_error:.1f} %",
            f"{100 * r.output_int8_error:.1f} %",
        )
        for r in ranges[:_SHOWN]
    ]
    left = f", the first {_SHOWN} of {len(ranges)}" if len(ranges) > _SHOWN else ""
    table(
        f"ranges in fp32, the most suspicious first{left}: try --keep LAYER",
        (
            "layer",
            "core",
            "core's range",
            "channels' ratio",
            "output's range",
            "beyond fp16",
            "subnormal",
            "int8 core",
            "8-bit out",
        ),
        rows,
    )


def _why(report: PrecisionReport) -> str:
    if report.to == "fp16" and report.latency.provider == "cpu" and report.verdict != "faster":
        return ": the CPU provider computes in fp32 and casts around it; fp16 is for GPUs, or for half the file"
    return ""
