"""`tensorrail inspect`: the layers of a model, what each costs on paper, and where each really runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tensorrail.options import Json, Provider, Shape
from tensorrail.show import say, table


def command(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx")],
    batch: Annotated[int, typer.Option(min=1, help="Size of the dynamic axes that --shape does not give.")] = 1,
    shape: Shape = None,
    placement: Annotated[
        bool, typer.Option("--placement", help="Run it with ONNX Runtime's profile on: provider and time of every node.")
    ] = False,
    provider: Provider = "cpu",
    json: Json = None,
) -> None:
    """Print the layers with their shapes, parameters and FLOPs (2 × MACs), and their shares of the whole."""
    from tensorrail_runtime.errors import ModelError
    from tensorrail_runtime.sessions.inputs import parse_shapes

    shapes = parse_shapes(shape or [])
    if provider != "cpu" and not placement:
        raise ModelError("--provider is for --placement, which runs the model: give --placement as well")
    if placement:
        _placement(model, provider, batch, shapes, json)
        return
    from tensorrail_runtime.graphs.cost import cost

    result = cost(model, batch, shapes)
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
        f"{model}, batch {result.batch}: {result.nodes} nodes, {result.kernels} kernels, {result.bytes:,} bytes, "
        f"{result.activation_bytes:,} activation bytes moved",
        ("layer", "op", "input", "output", "params", "share", "FLOPs", "share"),
        rows,
    )
    if result.uncounted:
        say(f"not counted: {', '.join(result.uncounted)}")
    if json is not None:
        result.save(json)


def _placement(model: Path, provider: str, batch: int, shapes: dict[str, tuple[int, ...]], json: Path | None) -> None:
    from tensorrail_runtime.measure.placement import placement
    from tensorrail_runtime.sessions.session import Session

    result = placement(model, settings=Session(provider=provider), batch=batch, shapes=shapes)
    rows = [
        (node.name, node.op, node.provider.removesuffix("ExecutionProvider"), f"{node.microseconds:,.0f}", f"{node.share:.1%}")
        for node in result.nodes
    ]
    counts = ", ".join(f"{count} on {name.removesuffix('ExecutionProvider')}" for name, count in result.providers.items())
    time = "µs" if provider == "cpu" else "µs to launch"
    table(f"{model}, batch {batch}: {counts}", ("node as it ran", "op", "provider", time, "share"), rows)
    if json is not None:
        result.save(json)
    if result.elsewhere:
        say(f"{len(result.elsewhere)} nodes ran elsewhere than on {provider}")
        raise typer.Exit(1)
