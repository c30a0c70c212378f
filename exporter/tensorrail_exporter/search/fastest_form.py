"""Chooses the form of given cores that runs fastest on this machine: ranks padded with zeros, or the dense weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx

from tensorrail_exporter.plans.cores import Cores
from tensorrail_exporter.plans.plan import Plan
from tensorrail_exporter.rewrite.resolve import prepared
from tensorrail_exporter.rewrite.rewriter import Factored, factorize, reconstruct
from tensorrail_exporter.rewrite.survey import survey
from tensorrail_exporter.search.latency_table import LatencyTable
from tensorrail_exporter.search.options import option_for
from tensorrail_runtime.errors import PlanError
from tensorrail_runtime.progress import Progress, silent
from tensorrail_runtime.sessions.inputs import Shapes
from tensorrail_runtime.sessions.session import Session

BLOCKS = (1, 4, 8, 16)
_WIDER = 1.02  # a wider block must be 2 % faster
_SLOWER = 1.02  # times are not known more precisely


@dataclass(frozen=True)
class Form:
    """The forms of given cores to choose from, and how they are timed."""

    block: int | Literal["auto"] = 1
    """Ranks are padded with zeros to multiples of it; `auto`: the fastest of 1, 4, 8 and 16 for each layer; default 1."""
    dense_if_slower: bool = False
    """Use the dense weight for a layer that is 2 % slower in each form: equal outputs, larger file; default False."""
    fold_batch_norm: bool = False
    """Fold a batch norm after a convolution into its last core; default False."""
    scan: bool = True
    """Allow an LSTM or GRU to run as a Scan, but never on a GPU: a wide one without a rank between input and output, or one
    with a factored recurrent weight, which is an error otherwise; default True."""
    batch: int = 1
    """Batch size for timing; default 1."""
    shapes: Shapes | None = None
    """Shapes of inputs by name, for timing and where onnx cannot infer those of tensors; default: those of the model."""
    seconds: float = 60.0
    """Time limit in seconds for timing layers that are not in the latency table yet; default 60."""
    cache: Path | None = None
    """Folder of latency tables; default $TENSORRAIL_CACHE, else `tensorrail` in $XDG_CACHE_HOME or ~/.cache."""

    def __post_init__(self) -> None:
        """Raise `PlanError` for a block that is no multiple for ranks."""
        if self.block != "auto" and self.block < 1:
            raise PlanError(f"block: expected a multiple for ranks, 1 or more, or auto, got {self.block}")

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks to choose from."""
        return BLOCKS if self.block == "auto" else (self.block,)


def factorize_fastest(
    model: onnx.ModelProto,
    plan: Plan,
    cores: Cores,
    form: Form | None = None,
    *,
    settings: Session | None = None,
    progress: Progress = silent,
) -> tuple[Factored, Plan]:
    """Return the factored graph in the form that runs fastest on this machine.

    Args:
        model: the dense graph; it is not changed.
        plan: the layers, formats, modes and ranks, and the precision that layers are timed in; the graph is not converted.
        cores: the cores of each planned layer, by name.
        form: the forms to choose from; default `Form()`.
        settings: how the network will run; default: the CPU provider.
        progress: is told about the timing of layers.

    Returns:
        The factored graph, and the plan of the layers in it that have a reconstructed dense weight.

    Raises:
        PlanError: every planned layer is faster in dense form, or modes, ranks or cores do not fit the weight.
        GraphError: a planned layer is not in the graph, has no cores or cannot be rewritten.

    """
    form = form or Form()
    model, plan = prepared(model, plan), plan.of_layers
    scan = form.scan and not (settings is not None and settings.on_gpu)
    widths = {layer.name: 1 if form.block == "auto" else form.block for layer in plan.layers}
    if form.block == "auto" or form.dense_if_slower:
        widths |= fastest_blocks(model, plan, form, settings=settings, progress=progress)
    slower = Plan(layers=tuple(layer for layer in plan.layers if not widths[layer.name]))
    factored_plan = Plan(layers=tuple(layer for layer in plan.layers if widths[layer.name]))
    if slower.layers:
        if not factored_plan.layers:
            raise PlanError(
                f"every planned layer is faster in dense form here, at batch {form.batch}; make a plan on this machine instead"
            )
        model = reconstruct(model, slower, cores)
    return factorize(model, factored_plan, cores, block=widths, fold_batch_norm=form.fold_batch_norm, scan=scan), slower


def fastest_blocks(
    model: onnx.ModelProto,
    plan: Plan,
    form: Form | None = None,
    *,
    settings: Session | None = None,
    progress: Progress = silent,
) -> dict[str, int]:
    """Return the block of each planned layer with which it runs fastest.

    Ranks are padded with zeros to multiples of the block. A wider block must be 2 % faster to be chosen. With
    `form.dense_if_slower`, a layer whose cores are 2 % slower than its dense weight keeps that.

    Args:
        model: the dense graph; it is not changed.
        plan: the layers, formats, modes and ranks, and the precision that layers are timed in.
        form: the blocks to choose from, and how they are timed; default `Form()`.
        settings: how the network will run; default: the CPU provider.
        progress: is told about the timing of layers.

    Returns:
        The blocks by layer name; with `form.dense_if_slower`, 0 for a layer that keeps its dense weight.

    """
    form, settings = form or Form(), settings or Session()
    planned = {layer.name: layer for layer in plan.layers}
    widest_first = sorted(form.blocks, reverse=True)  # of several blocks with the same steps, the last and narrowest is kept
    options = {
        layer: tuple({o.steps: o for o in (option_for(planned[layer.name], layer.spec, b) for b in widest_first)}.values())
        for layer in survey(model, form.batch, form.shapes, scan=form.scan and not settings.on_gpu)
        if layer.name in planned and layer.output is not None and layer.inputs[layer.data] is not None
    }
    table = LatencyTable.open(settings, form.cache, precision=plan.precision)
    table.measure(options, settings, seconds=form.seconds, progress=progress)
    narrowest = min(form.blocks)
    chosen = {}
    for layer, forms in options.items():
        best = min(forms, key=lambda o: table.milliseconds(layer, o) * (1.0 if o.block == narrowest else _WIDER))
        is_slower = table.milliseconds(layer, best) > _SLOWER * table.milliseconds(layer)
        chosen[layer.name] = 0 if form.dense_if_slower and is_slower else best.block
    return chosen
