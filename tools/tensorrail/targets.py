"""How the options of `plan` and `compress` are read, and how a plan is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tensorrail.show import say, table

if TYPE_CHECKING:
    import onnx

    from tensorrail_exporter.calibrate.inputs import Calibration
    from tensorrail_exporter.search.planner import PlanReport, Search

Target = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        metavar="latency=2.0",
        help="How many times less: latency, flops, params or bytes. May be given again: all must hold.",
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Batch size that times and FLOPs are of.")]
Formats = Annotated[list[str] | None, typer.Option("--format", help="auto, or a format such as tt; may be given again.")]
MaxLoss = Annotated[
    float | None,
    typer.Option("--max-loss", help="The fastest network within this sum of losses (as the plan's table shows them)."),
]
Keep = Annotated[list[str] | None, typer.Option("--keep", metavar="PATTERN", help="Layers that stay dense; `*` and `?` match.")]
Slower = Annotated[
    bool, typer.Option("--allow-slower", help="For a target on size: rewrite layers that would not be 5 % faster, too.")
]
CalibrationPath = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="X.npz|FOLDER",
        help="Inputs, no labels needed: arrays by input name, or a folder of npz, npy or image files (ImageNet's scaling).",
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Calibration samples that are used at most.")]
Grid = Annotated[int, typer.Option(min=0, help="Ranks are multiples of it; 0: what the provider's kernels compute at once.")]
Threads = Annotated[int, typer.Option(min=0, help="Intra-op threads, 0: ONNX Runtime's own choice.")]
Seconds = Annotated[float, typer.Option("--seconds", min=1, help="Seconds of timing layers that are not in the table yet.")]
Cache = Annotated[
    Path | None,
    typer.Option("--cache", help="Folder of latency tables; default $TENSORRAIL_CACHE, else ~/.cache/tensorrail."),
]


def read_targets(texts: Sequence[str]) -> dict[str, float]:
    """Return the targets of texts such as `latency=2.0`; `PlanError` says how one is written."""
    from tensorrail_runtime.errors import PlanError

    found: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name.strip() in found:
            raise PlanError(f"the target {name.strip()} came twice: give it once")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise PlanError(f"a target is written as latency=2.0, and {text!r} came") from None
    return found


def read_search(
    targets: Mapping[str, float],
    batch: int,
    formats: Sequence[str] | None,
    *,
    grid: int,
    keep: Sequence[str] | None,
    max_loss: float | None,
    slower: bool,
    seconds: float,
    cache: Path | None,
) -> Search:
    """Return what the options of `plan` and `compress` ask the planner for."""
    from tensorrail_exporter.search.planner import Search

    made = Search(
        targets=targets,
        batch=batch,
        formats=tuple(formats or ("auto",)),
        grid=grid,
        keep=tuple(keep or ()),
        max_loss=max_loss,
        seconds=seconds,
        check_seconds=min(10.0, seconds),
        cache=cache,
    )
    return replace(made, gain=float("inf")) if slower else made


def load_inputs(path: Path | None, model: Path, samples: int) -> Calibration | None:
    """Return the calibration inputs for a model, where a path came."""
    if path is None:
        return None
    from tensorrail_exporter.calibrate.inputs import load_calibration

    return load_calibration(path, model, most=samples)


def show_plan(report: PlanReport) -> None:
    """Print the plan as a table, its totals and what was measured."""
    rows = [
        (
            row.layer,
            row.what,
            row.steps or f"dense: {row.reason}",
            f"{row.dense_ms:.3f}",
            f"{row.ms:.3f}",
            f"{row.dense_ms / row.ms:.2f}×" if row.format else "–",
            f"{2 * row.dense_macs / 1e6:.1f}",
            f"{2 * row.macs / 1e6:.1f}",
            f"{row.loss:.2e}" if row.format else "–",
        )
        for row in report.rows
    ]
    head = ("layer", "dense", "runs as", "dense ms", "ms", "speed-up", "dense MFLOPs", "MFLOPs", "loss")
    table(f"plan for {report.provider}, batch {report.batch}; losses from {report.loss_from}", head, rows)
    dense, planned = report.dense, report.planned
    say(
        f"predicted: {dense.ms:.2f} → {planned.ms:.2f} ms ({report.predicted:.2f}×), "
        f"FLOPs ÷ {_ratio(dense.macs, planned.macs)}, parameters ÷ {_ratio(dense.params, planned.params)}"
    )
    for name, reached in report.missed.items():
        say(f"{name} falls {reached:.2f} times, and {report.targets[name]:g} was asked for")
    if report.measured is None:
        say("nothing to rewrite: every layer stays dense")
        return
    found = report.measured
    say(
        f"measured: {found.value:.2f}× [{found.low:.2f}, {found.high:.2f}]; predicted time is "
        f"{100 * (report.prediction_error or 0.0):+.1f} % off"
    )
    if report.slower:
        say(f"slower than dense by the profile: {', '.join(report.slower)}")
    if found.low <= 1.0:
        say("the planned network was not measured to be faster")


def _ratio(before: int, after: int) -> str:
    return f"{before / after:.2f}" if after else "1.00"  # of a network without any


def load_network(model: str, shapes: Sequence[str] | None) -> tuple[onnx.ModelProto, Path | None]:
    """Return the graph of an ONNX file, or of a torch module that `module:factory` makes, and the file if it is one.

    A module needs its input's shape, batch left out, as `--shape input=3,224,224`.
    """
    from tensorrail_exporter.graphs.io import load_model
    from tensorrail_runtime.errors import PlanError

    if ":" not in model or Path(model).exists():
        return load_model(model), Path(model)
    import torch

    from tensorrail_runtime.measure.accuracy import imported
    from tensorrail_runtime.sessions.inputs import parse_shapes
    from tensorrail_trainer.run.export import to_onnx

    if not shapes or len(shapes) != 1:
        raise PlanError(f"{model}: a torch module needs the shape of its input, batch left out: --shape image=3,224,224")
    (shape,) = parse_shapes(shapes).values()
    module = imported(model, "model factory")()
    if not isinstance(module, torch.nn.Module):
        raise PlanError(f"{model}: made a {type(module).__name__}, and a torch.nn.Module was expected")
    return to_onnx(module, torch.zeros(2, *shape)), None
