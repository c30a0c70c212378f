"""`tensorrail plan`: which layers become which cores, so that a target is met at the least loss."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tensorrail.commands.arguments import (
    Calibration,
    Json,
    Precision,
    Target,
    given_options,
    input_options,
    read_targets,
    search_options,
    session_options,
    shape_options,
)
from tensorrail.commands.groups import Group, grouped
from tensorrail.terminal import finish, progress_bar


@grouped
def command(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL.onnx | module:factory", help="A dense graph, or a function that returns a torch module."),
    ],
    target: Target = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where the plan is written; default: it is only printed.")
    ] = None,
    calibration: Calibration = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Use at most this many calibration samples; default 128.")] = None,
    precision: Precision = None,
    session: Any = Group(session_options),
    timing: Any = Group(shape_options),
    inputs: Any = Group(input_options),
    search: Any = Group(search_options),
    json: Json = None,
) -> None:
    """Choose formats and ranks for a target, from times measured here. Exit code 1 when a target is missed."""
    from dataclasses import replace

    from tensorrail.modules import load_network
    from tensorrail.options import Fit, Options
    from tensorrail.verbs.plan import plan
    from tensorrail_runtime.errors import UsageError

    targets = read_targets(target)
    if calibration is None and search.improve_seconds and "search_seconds" in given_options(context):
        raise UsageError("--search-seconds is about calibration inputs and has no effect without them: give --calibration")
    search.check(targets)
    network, timing = load_network(model, timing)
    if not isinstance(network, Path) and search.joint is None:
        search = replace(search, joint=False)  # a module keeps such layers apart, and is trained toward the plan
    with progress_bar() as progress:
        options = Options(session, timing, search, Fit(samples=samples), progress=progress, inputs=inputs, precision=precision)
        report = plan(network, targets, calibration=calibration, options=options)
    if out is not None:
        report.plan.save(out)
    finish(report, json, report.meets)
