"""`tensorrail check`: whether two models compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tensorrail.options import Json, Provider
from tensorrail.show import console, table


def command(
    reference: Annotated[Path, typer.Argument(metavar="A.onnx")],
    candidate: Annotated[Path, typer.Argument(metavar="B.onnx")],
    tolerance: Annotated[float, typer.Option(min=0, help="Largest relative L2 difference of any output.")] = 1e-4,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch sizes to run; may be given again.")] = None,
    provider: Provider = "cpu",
    json: Json = None,
) -> None:
    """Compare the outputs of two models on the same random inputs. Exit code 1 when out of tolerance."""
    from tensorrail_runtime.parity import parity

    result = parity(reference, candidate, batches=batch or (1, 7), tolerance=tolerance, provider=provider)
    rows = [
        (
            o.name,
            f"{o.relative_l2:.2e}",
            f"{o.max_abs:.2e}",
            f"{o.mean_abs:.2e}",
            f"{o.cosine:.8f}",
            "–" if o.top1_agreement is None else f"{100 * o.top1_agreement:.1f} %",
        )
        for o in result.outputs
    ]
    table(
        f"{reference} against {candidate}, batches {list(result.batches)}",
        ("output", "relative L2", "max abs", "mean abs", "cosine", "top-1 agreement"),
        rows,
    )
    verdict = "within" if result.holds else "OUT OF"
    console.print(f"{verdict} tolerance {tolerance:g}; the smallest that would pass is {result.worst:.2e}")
    if json is not None:
        result.save(json)
    raise typer.Exit(0 if result.holds else 1)
