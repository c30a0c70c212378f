"""The form of given cores that runs fastest here: zeros around their ranks, or the dense weight that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import onnx

from tensorrail_exporter.plans.cores import Cores
from tensorrail_exporter.plans.plan import Plan
from tensorrail_exporter.rewrite.rewriter import Factored, factorize, reconstruct
from tensorrail_runtime.errors import PlanError
from tensorrail_runtime.sessions.session import Session


def factorize_fastest(
    model: onnx.ModelProto,
    plan: Plan,
    cores: Cores,
    *,
    block: int | Literal["auto"] = "auto",
    or_dense: bool = False,
    fold_batch_norm: bool = False,
    scan: bool = True,
    settings: Session | None = None,
    batch: int = 1,
    cache: Path | None = None,
    on_stage: Callable[[str, float], None] = lambda _, __: None,
) -> tuple[Factored, Plan]:
    """Return the factored graph in the form that runs fastest here, and the layers in it that have their cores' dense weight.

    `block` is what ranks are widened to multiples of, by zeros: a number, or `auto` for the fastest of 1, 4, 8 and 16, layer by
    layer. `or_dense` gives a layer that no form of its cores makes faster their dense weight: the same function in a larger
    file. On a GPU there is no `scan`. `PlanError` where every planned layer would; else as `rewrite.factorize` and
    `fastest_blocks`.
    """
    scan = scan and not (settings is not None and settings.on_gpu)
    widths = {layer.name: 1 if block == "auto" else block for layer in plan.layers}
    if block == "auto" or or_dense:
        from tensorrail_exporter.search.planner import (  # only where something is timed: it is slow to load
            BLOCKS,
            fastest_blocks,
        )

        blocks = BLOCKS if block == "auto" else (block,)
        widths |= fastest_blocks(
            model,
            plan,
            settings=settings,
            batch=batch,
            cache=cache,
            blocks=blocks,
            or_dense=or_dense,
            scan=scan,
            on_stage=on_stage,
        )
    slower = Plan(layers=tuple(layer for layer in plan.layers if not widths[layer.name]))
    kept = Plan(layers=tuple(layer for layer in plan.layers if widths[layer.name]))
    if slower.layers:
        if not kept.layers:
            raise PlanError(f"every planned layer is faster in dense form here, at batch {batch}: plan on this machine instead")
        model = reconstruct(model, slower, cores)
    return factorize(model, kept, cores, block=widths, fold_batch_norm=fold_batch_norm, scan=scan), slower
