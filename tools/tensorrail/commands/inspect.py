"""`tensorrail inspect`: the layers of a model, what each costs on paper, and where each really runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tensorrail.commands.arguments import Json, provider_option, shape_options
from tensorrail.commands.groups import Group, grouped
from tensorrail.terminal import finish


@grouped
def command(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="Any ONNX model.")],
    timing: Any = Group(shape_options),
    placement: Annotated[
        bool, typer.Option("--placement", help="Run it with ONNX Runtime's profile on: provider and time of every node.")
    ] = False,
    fusion: Annotated[
        bool, typer.Option("--fusion", help="Count the operators that ONNX Runtime fuses from several nodes.")
    ] = False,
    session: Any = Group(provider_option),
    json: Json = None,
) -> None:
    """Print the layers with their shapes, parameters and FLOPs (2 × MACs), and their shares of the whole."""
    from tensorrail.options import Options
    from tensorrail.verbs.inspect import inspect
    from tensorrail_runtime.errors import ModelError, UsageError
    from tensorrail_runtime.measure.placement import Placement

    if session.on_gpu and not (placement or fusion):
        raise UsageError("--provider has no effect without --placement or --fusion, which open the model: give one of them")
    try:
        report = inspect(model, placement=placement, fusion=fusion, options=Options(session, timing))
    except ModelError as error:
        hint = ": see --shape" if "give the shape" in str(error) else ""
        raise ModelError(f"{error}{hint}") from None
    finish(report, json, not (isinstance(report, Placement) and report.elsewhere))
