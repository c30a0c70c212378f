"""`tensorrail export`: a dense graph and a plan become a factored graph."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorrail.commands.arguments import Contrib, Json, Shape
from tensorrail.commands.groups import Group, grouped
from tensorrail.terminal import finish, progress_bar

if TYPE_CHECKING:
    from tensorrail_exporter.search.fastest_form import Form


def form_options(
    block: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="Pad ranks with zeros to multiples of this number, which changes no output; auto: time 1, 4, 8 and 16 "
            "for every layer on the CPU provider, and use the fastest.",
        ),
    ] = "1",
    fold_batch_norm: Annotated[
        bool, typer.Option("--fold-batch-norm", help="Fold a batch norm behind a convolution into its last core.")
    ] = False,
    dense_if_slower: Annotated[
        bool,
        typer.Option(
            "--dense-if-slower",
            help="Time every planned layer, and write the dense weight where the cores are 2 % slower: the same function in "
            "a larger file.",
        ),
    ] = False,
    scan: Annotated[
        bool,
        typer.Option(
            help="Let an LSTM or GRU run as a Scan, for a CPU: a wide one without a rank between input and output, or one "
            "whose recurrent weight is factored."
        ),
    ] = True,
    batch: Annotated[int, typer.Option(min=1, help="Batch size that layers are timed with.")] = 1,
    shape: Shape = None,
) -> Form:
    """Return which forms of the cores may be chosen."""
    from tensorrail_exporter.search.fastest_form import Form
    from tensorrail_runtime.errors import UsageError
    from tensorrail_runtime.sessions.inputs import parse_shapes

    if block != "auto" and not (block.isascii() and block.isdigit() and int(block)):
        raise UsageError(f"--block: expected a number of 1 or more, or auto, got {block!r}")
    return Form(
        block="auto" if block == "auto" else int(block),
        dense_if_slower=dense_if_slower,
        fold_batch_norm=fold_batch_norm,
        scan=scan,
        batch=batch,
        shapes=parse_shapes(shape) if shape else None,
    )


@grouped
def command(
    dense: Annotated[Path, typer.Argument(metavar="DENSE.onnx", help="The dense graph.")],
    plan: Annotated[Path, typer.Option(help="plan.json: the layers, formats, modes and ranks.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the factored graph is written.")],
    cores: Annotated[
        Path | None, typer.Option(help="cores.safetensors; without it the graph's own weights are decomposed.")
    ] = None,
    contrib: Contrib = True,
    form: Any = Group(form_options),
    json: Json = None,
) -> None:
    """Rewrite every planned layer of a dense graph to the contraction of its cores."""
    from tensorrail.options import Options
    from tensorrail.verbs.export import export

    with progress_bar() as progress:
        report = export(dense, out, plan, cores=cores, form=form, options=Options(progress=progress, contrib=contrib))
    finish(report, json)
