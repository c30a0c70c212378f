"""`tensorrail accuracy`: a metric over a data set, and whether two models really differ in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tensorrail.commands.arguments import Json, Metric, input_options, provider_option
from tensorrail.commands.groups import Group, grouped
from tensorrail.terminal import finish, progress_bar


@grouped
def command(
    reference: Annotated[Path, typer.Argument(metavar="A.onnx", help="The model to score; of two, the reference.")],
    candidate: Annotated[Path | None, typer.Argument(metavar="B.onnx", help="A model to compare with it.")] = None,
    *,
    data: Annotated[Path, typer.Option(metavar="X.npz|FOLDER", help="Arrays by input name, and `labels`.")],
    metric: Metric = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples that are run at a time.")] = 64,
    inputs: Any = Group(input_options),
    session: Any = Group(provider_option),
    max_drop: Annotated[
        float | None, typer.Option(help="Exit code 1 when B's mean score is lower than A's by more than this share.")
    ] = None,
    json: Json = None,
) -> None:
    """Score one model on data, or two on the same samples with a paired test."""
    from tensorrail.options import Options
    from tensorrail.verbs.accuracy import accuracy
    from tensorrail_runtime.errors import UsageError
    from tensorrail_runtime.measure.accuracy import Comparison, within_drop
    from tensorrail_runtime.measure.timing import Timing

    if max_drop is not None and candidate is None:
        raise UsageError("--max-drop compares B's score with A's: expected a second model")
    with progress_bar() as progress:
        options = Options(session, Timing(batch), progress=progress, inputs=inputs)
        report = accuracy(reference, candidate, data=data, metric=metric, options=options)
    holds = (
        max_drop is None
        or not isinstance(report, Comparison)
        or within_drop(report.reference.mean, report.candidate.mean, max_drop)
    )
    finish(report, json, holds, "" if holds else f"too low: the mean score is lower by more than {max_drop:g}")
