"""`tensorrail inspect`: the layers of a model and what each costs on paper."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tensorrail.options import Json
from tensorrail.show import console, table


def command(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx")],
    batch: Annotated[int, typer.Option(min=1, help="Size of every dynamic axis.")] = 1,
    json: Json = None,
) -> None:
    """Print the layers with their shapes, parameters and FLOPs (2 × MACs), and their shares of the whole."""
    from tensorrail_runtime.cost import cost

    result = cost(model, batch)
    rows = [
        (
            layer.weight or layer.name,
            layer.op,
            "×".join(map(str, layer.input)),
            "×".join(map(str, layer.output)),
            f"{layer.params:,}",
            f"{layer.params / (result.params or 1):.1%}",
            f"{layer.flops:,}",
            f"{layer.macs / (result.macs or 1):.1%}",
        )
        for layer in result.layers
    ]
    rows.append(("whole graph", "", "", "", f"{result.params:,}", "", f"{result.flops:,}", ""))
    table(
        f"{model}, batch {batch}: {result.nodes} nodes, {result.bytes:,} bytes",
        ("layer", "op", "input", "output", "params", "share", "FLOPs", "share"),
        rows,
    )
    if result.uncounted:
        console.print(f"not counted: {', '.join(result.uncounted)}")
    if json is not None:
        result.save(json)
