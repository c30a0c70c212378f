"""`tensorrail export`: a dense graph and a plan become a factored graph."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tensorrail.options import Json, require_writable
from tensorrail.show import stages, table


def command(
    dense: Annotated[Path, typer.Argument(metavar="DENSE.onnx", help="The dense graph.")],
    plan: Annotated[Path, typer.Option(help="plan.json: the layers, formats, modes and ranks.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the factored graph is written.")],
    cores: Annotated[
        Path | None, typer.Option(help="cores.safetensors; without it the graph's own weights are decomposed.")
    ] = None,
    block: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="Widen the ranks that run with zeros to multiples of it, which changes no output; auto: time 1, 4, 8 and 16 "
            "for every layer on the CPU provider, and take the fastest.",
        ),
    ] = "1",
    fold_batch_norm: Annotated[
        bool, typer.Option("--fold-batch-norm", help="Take a batch norm behind a convolution into its last core.")
    ] = False,
    dense_if_slower: Annotated[
        bool,
        typer.Option(
            "--dense-if-slower",
            help="Time every planned layer, and give one that is faster in dense form the dense weight of its cores: the same "
            "function in a larger file.",
        ),
    ] = False,
    scan: Annotated[
        bool,
        typer.Option(help="Let a wide LSTM or GRU without a rank between input and output run as a Scan: for a CPU."),
    ] = True,
    batch: Annotated[int, typer.Option(min=1, help="The batch size that layers are timed with.")] = 1,
    json: Json = None,
) -> None:
    """Rewrite every planned layer of a dense graph to the contraction of its cores."""
    from tensorrail_exporter.graphs.io import load_model, save_model
    from tensorrail_exporter.plans.cores import load_cores
    from tensorrail_exporter.plans.plan import Plan
    from tensorrail_exporter.rewrite.rewriter import Rewrites, decompose_graph
    from tensorrail_exporter.search.fastest_form import factorize_fastest
    from tensorrail_runtime.errors import PlanError

    if block != "auto" and not (block.isascii() and block.isdigit() and int(block)):
        raise PlanError(f"--block pads ranks to multiples of a block of 1 or more, or auto, and {block!r} came")
    require_writable(out, dense, plan, cores)
    model, read = load_model(dense), Plan.load(plan)
    if not read.layers:
        raise PlanError(f"{plan}: names no layer: there is nothing to rewrite")
    found = load_cores(cores, read) if cores else decompose_graph(model, read)
    with stages() as on_stage:
        factored, dense_again = factorize_fastest(
            model,
            read,
            found,
            block="auto" if block == "auto" else int(block),
            or_dense=dense_if_slower,
            fold_batch_norm=fold_batch_norm,
            scan=scan,
            batch=batch,
            on_stage=on_stage,
        )
    save_model(factored.model, out)
    rows = [
        (r.layer, r.op, r.format, r.steps, f"{r.dense_params:,}", f"{r.stored_params:,}", f"{r.weight_error:.1e}")
        for r in factored.layers
    ]
    rows += [(one.name, "", one.format, "the dense weight, which is faster here", "", "", "") for one in dense_again.layers]
    table(str(out), ("layer", "op", "format", "runs as", "dense", "stored", "weight error"), rows)
    if json is not None:
        Rewrites(layers=factored.layers).save(json)
