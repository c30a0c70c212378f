"""The front of a compression: all models that were measured in interleaved runs, as a file and as a picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from tensorrail_runtime.errors import UsageError
from tensorrail_runtime.records import write_text

if TYPE_CHECKING:
    from tensorrail_exporter.compressed import CompressReport, Point

_MARKS = {
    ("fp32", True): "o",
    ("fp32", False): "s",
    ("fp16", True): "v",
    ("fp16", False): "P",
    ("int8", True): "^",
    ("int8", False): "D",
}


def front_files(path: Path) -> tuple[Path, Path]:
    """Return the files of a front, JSON and SVG; `UsageError` where the name does not end in .json."""
    if path.suffix != ".json":
        raise UsageError(f"front: expected a file that ends in .json, got {path}")
    return path, path.with_suffix(".svg")


def write_front(report: CompressReport, path: Path) -> list[Path]:
    """Write the front of a report as JSON, and beside it as an SVG picture where matplotlib is installed.

    Args:
        report: the report of `compress` with `Options(front=True)`.
        path: the JSON file.

    Returns:
        The files that were written.

    """
    from tensorrail_exporter.compressed import Front

    data, picture = front_files(path)
    front = Front(model=report.model, dense=report.dense, points=report.front, machine=report.latency.machine)
    write_text(data, front.model_dump_json(indent=1) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        return [data]
    write_text(picture, drawn(front.points))
    return [data, picture]


def drawn(points: tuple[Point, ...]) -> str:
    """Return a picture of how often outputs agree, or how far they differ, against the measured speed-up, as SVG."""
    import io

    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tensorrail"}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        scores = any(_agreement(point) is not None for point in points)
        for (precision, low_rank), mark in _MARKS.items():
            own = [point for point in points if point.precision == precision and bool(point.layers) == low_rank]
            shown = [(point.ratios, _height(point, scores=scores)) for point in own]
            pairs = [(ratios, height) for ratios, height in shown if height is not None]
            if not pairs:
                continue
            x = [ratios.latency for ratios, _ in pairs]
            errors = [[r.latency - r.latency_low for r, _ in pairs], [r.latency_high - r.latency for r, _ in pairs]]
            label = f"{'low rank' if low_rank else 'dense'}, {precision}"
            axes.errorbar(x, [100 * y for _, y in pairs], xerr=errors, fmt=mark, capsize=2, label=label)
        axes.set_xlabel("speed-up over the dense network in fp32 (times, 95 % interval)")
        axes.set_ylabel("top-1 agreement (%)" if scores else "outputs differ by (%)")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _agreement(point: Point) -> float | None:
    return None if point.aside is None else point.aside.agreement


def _height(point: Point, *, scores: bool) -> float | None:
    if scores or point.aside is None:
        return _agreement(point)
    return point.aside.difference
