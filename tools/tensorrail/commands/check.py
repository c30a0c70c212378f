"""`tensorrail check`: whether two models compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorrail.commands.arguments import Inputs, Json, Shape, input_options, provider_option
from tensorrail.commands.groups import Group, grouped
from tensorrail.terminal import finish

if TYPE_CHECKING:
    from tensorrail.verbs.check import Layers
    from tensorrail_runtime.measure.parity import Tolerances

Limit = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[OUTPUT=]VALUE",
        help="Element-wise tolerance as in NumPy: |b − a| ≤ atol + rtol·|a|. OUTPUT= sets it for one output; may be repeated.",
    ),
]


def tolerance_options(
    tolerance: Annotated[float, typer.Option(min=0, help="Largest relative L2 difference of any output.")] = 1e-4,
    rtol: Limit = None,
    atol: Limit = None,
) -> Tolerances:
    """Return how far outputs may differ."""
    from tensorrail_runtime.measure.parity import Tolerances

    return Tolerances(tolerance, _limits("--rtol", rtol), _limits("--atol", atol))


def layer_options(
    layers: Annotated[
        bool, typer.Option("--layers", help="Errors at every planned layer, approximation and numerical apart.")
    ] = False,
    plan: Annotated[Path | None, typer.Option(help="For --layers: plan.json.")] = None,
    cores: Annotated[Path | None, typer.Option(help="For --layers: cores.safetensors; without it A is decomposed.")] = None,
) -> Layers | None:
    """Return the plan at whose layers the models are compared as well."""
    from tensorrail.verbs.check import Layers
    from tensorrail_runtime.errors import UsageError

    if layers and plan is None:
        raise UsageError("--layers compares at the layers of a plan: give --plan")
    for option, given in (("--plan", plan), ("--cores", cores)):
        if given is not None and not layers:
            raise UsageError(
                f"{option} has no effect without --layers, which compares at the layers of a plan: give it as well"
            )
    return None if plan is None else Layers(plan, cores)


@grouped
def command(
    reference: Annotated[Path, typer.Argument(metavar="A.onnx", help="The reference.")],
    candidate: Annotated[Path, typer.Argument(metavar="B.onnx", help="The model to compare with it.")],
    tolerance: Any = Group(tolerance_options),
    batch: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Batch sizes of random inputs, default 1 and 7; samples per run with --data, default 7.",
        ),
    ] = None,
    shape: Shape = None,
    data: Inputs = None,
    session: Any = Group(provider_option),
    inputs: Any = Group(input_options),
    layers: Any = Group(layer_options),
    json: Json = None,
) -> None:
    """Compare the outputs of two models on the same inputs, random or from a file. Exit code 1 when out of tolerance."""
    from tensorrail.options import Options
    from tensorrail.verbs.check import check
    from tensorrail_runtime.errors import UsageError
    from tensorrail_runtime.measure.timing import Timing
    from tensorrail_runtime.sessions.inputs import parse_shapes

    sizes = tuple(batch or (1, 7))
    if data is not None and shape:
        raise UsageError("--shape is for random inputs, and --data has shapes of its own: give one of them")
    if len(batch or ()) > 1 and (shape or data is not None):
        raise UsageError(f"{'--shape' if shape else '--data'} runs at one batch size, got several: give --batch once")
    timing = Timing(max(sizes) if data is not None else sizes[0], parse_shapes(shape or []))
    report = check(
        reference,
        candidate,
        inputs=data or (sizes[:1] if shape else sizes),
        tolerance=tolerance,
        layers=layers,
        options=Options(session, timing, inputs=inputs),
    )
    finish(report, json, report.holds)


def _limits(option: str, texts: list[str] | None) -> dict[str, float]:
    from tensorrail_runtime.errors import UsageError

    limits = {}
    for text in texts or []:
        name, _, value = text.rpartition("=")
        if name in limits:
            raise UsageError(f"{option}: given twice for {f'output {name}' if name else 'all outputs'}")
        try:
            limits[name] = float(value)
        except ValueError:
            raise UsageError(f"{option}: expected a number such as 1e-4, or OUTPUT=1e-4, got {text!r}") from None
    return limits
