"""`tensorrail accuracy`: a metric over a data set, and whether two models really differ in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tensorrail.options import Json, Metric, Provider
from tensorrail.show import bar, say, table


def command(
    reference: Annotated[Path, typer.Argument(metavar="A.onnx")],
    candidate: Annotated[Path | None, typer.Argument(metavar="B.onnx")] = None,
    *,
    data: Annotated[Path, typer.Option(metavar="FILE.npz", help="Arrays by input name, and `labels`.")],
    metric: Metric = None,
    batch: Annotated[int, typer.Option(min=1)] = 64,
    provider: Provider = "cpu",
    max_drop: Annotated[
        float | None, typer.Option(help="Exit with 1 when B's mean score is lower than A's by more than this share.")
    ] = None,
    json: Json = None,
) -> None:
    """Score one model on data, or two on the same samples with a paired test."""
    from tensorrail_runtime.errors import ModelError
    from tensorrail_runtime.measure.accuracy import compare_scores, evaluate
    from tensorrail_runtime.sessions.inputs import load_arrays
    from tensorrail_runtime.sessions.session import Session

    if max_drop is not None and candidate is None:
        raise ModelError("--max-drop holds B's score against A's: give a second model")
    metric, arrays = metric or "top1", load_arrays(data)
    if "labels" not in arrays:
        raise ModelError(f"{data}: holds no array 'labels'; it has {', '.join(arrays)}")
    labels = arrays.pop("labels")
    found = []
    for path in [reference] if candidate is None else [reference, candidate]:
        with bar(path.name) as advance:
            settings = Session(provider=provider)
            found.append(evaluate(path, arrays, labels, metric=metric, batch=batch, settings=settings, on_batch=advance))
    rows = [(f.model, f"{f.mean:.4f}", str(len(f.scores))) for f in found]
    table(f"{metric} on {data.name}", ("model", "mean score", "samples"), rows)
    if candidate is None:
        if json is not None:
            found[0].save(json)
        return
    paired = compare_scores(*found)
    say(
        f"difference {paired.difference:+.4f} [{paired.low:+.4f}, {paired.high:+.4f}]; only A {paired.only_reference}, only B "
        f"{paired.only_candidate}; {paired.test}: p = {paired.p_value:.3g}"
    )
    if json is not None:
        paired.save(json)
    if max_drop is not None and not -paired.difference <= max_drop:
        say(f"falls short: lower by more than {max_drop:g}")
        raise typer.Exit(1)
