"""`tensorrail compress`: a faster model from nothing but an ONNX file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from tensorrail.commands.arguments import (
    Calibration,
    Contrib,
    Data,
    Json,
    Precision,
    Target,
    given_options,
    input_options,
    read_targets,
    search_options,
    session_options,
    timing_options,
)
from tensorrail.commands.groups import Group, grouped
from tensorrail.terminal import finish, progress_bar

_OF_THE_SEARCH = ("format", "grid", "keep", "joint", "heads", "allow_slower", "seconds", "search_seconds", "cache")
"""Options that say how a plan is searched for: without effect where one is given."""


_OF_INPUTS = ("fit", "samples", "min_agreement", "max_difference", "metric", "search_seconds")
"""Options without effect where there are no calibration inputs."""


@grouped
def command(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The dense graph.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the faster model is written.")],
    target: Target = None,
    plan: Annotated[Path | None, typer.Option(help="A plan.json in place of a target.")] = None,
    calibration: Calibration = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Use at most this many calibration samples; default 512.")] = None,
    fit: Annotated[
        float | None,
        typer.Option(
            "--fit",
            min=0,
            metavar="SECONDS",
            help="How long the cores may be fitted in torch, block by block and then all together; 0: not at all.  "
            "[default: 120 where torch is installed]",
            show_default=False,
        ),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            "--also",
            metavar="fp16|int8",
            help="Also write OUT in that precision, beside it, and compare both.",
        ),
    ] = None,
    data: Data = None,
    min_agreement: Annotated[
        float,
        typer.Option(
            help="Smallest top-1 agreement with the dense model on the held-out inputs; 0: no limit.  "
            "Without --target, the fastest model within it is looked for."
        ),
    ] = 0.9,
    max_difference: Annotated[
        float | None,
        typer.Option(
            help="Largest difference of the outputs on the held-out inputs, as a multiple of their standard deviation; "
            "default: no limit."
        ),
    ] = None,
    precision: Precision = None,
    front: Annotated[
        Path | None,
        typer.Option(
            "--front",
            metavar="FRONT.json",
            help="Walk targets from a speed-up of 1.2 to what can be reached, measure all of these models interleaved, and "
            "write them here, with a picture FRONT.svg.",
        ),
    ] = None,
    contrib: Contrib = True,
    session: Any = Group(session_options),
    timing: Any = Group(timing_options),
    inputs: Any = Group(input_options),
    search: Any = Group(search_options),
    json: Json = None,
) -> None:
    """Make an ONNX model faster: plan, decompose, rewrite, check and time it.

    Without a target, the result is the fastest model whose outputs agree on the calibration inputs. Exit code 1: the target, a
    speed-up or the agreement was not reached, or a precision of --also could not be written; agreement is checked with four
    calibration inputs or more, and for outputs that are not scores of classes only with --max-difference.
    """
    from tensorrail.front import write_front
    from tensorrail.options import Fit, Options
    from tensorrail.verbs.compress import compress
    from tensorrail_exporter.search.guard import Guard

    targets = read_targets(target)
    _check_given(context, plan, calibration, has_target=bool(targets) or search.max_loss is not None)
    with progress_bar() as progress:
        guard = Guard(min_agreement=min_agreement, max_difference=max_difference)
        searched = replace(search, also=tuple(also or ()))
        walks = front is not None
        options = Options(session, timing, searched, Fit(fit, samples), guard, progress, inputs, precision, walks, contrib)
        report = compress(model, out, plan or targets, calibration=calibration, data=data, options=options)
    holds = report.meets and report.faster and report.accepted and not report.not_reduced
    finish(report, json, holds, also=lambda: None if front is None else write_front(report, front))


def _check_given(context: typer.Context, plan: Path | None, calibration: Path | None, *, has_target: bool) -> None:
    """Raise `UsageError` unless it is clear what is asked for, and for an option that would have no effect."""
    from tensorrail_runtime.errors import UsageError

    if has_target and plan is not None:
        raise UsageError("expected either --target latency=2.0 (or flops, params, bytes) or --plan plan.json, not both")
    if not has_target and plan is None and calibration is None:
        raise UsageError(
            "expected either --target latency=2.0 (or flops, params, bytes), --plan plan.json, or --calibration for the "
            "fastest model that agrees with the dense one"
        )
    given = given_options(context)
    for name in _OF_THE_SEARCH if plan is not None else ():
        if name in given:
            raise UsageError(
                f"--{name.replace('_', '-')} is for the search of a plan and has no effect with --plan: leave it out"
            )
    for name in _OF_INPUTS if calibration is None else ():
        if name in given and context.params[name]:
            option = name.replace("_", "-")
            raise UsageError(f"--{option} is about calibration inputs and has no effect without them: give --calibration")
