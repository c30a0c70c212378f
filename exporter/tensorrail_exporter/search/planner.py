"""The plan of a whole network: what each layer becomes, so that a target is met at the least loss of accuracy.

Options on the target's rank grid → their measured times → their losses → one choice for all layers → the chosen network is
built, timed against the dense one and profiled. Where it misses a latency target or passes it by far, the budget is changed
by as much; a form that the profile shows slower than its dense layer is no longer offered; and it is chosen anew.
"""

from __future__ import annotations

import fnmatch
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx

from tensorrail_exporter.calibrate.inputs import Calibration
from tensorrail_exporter.calibrate.layerwise import dense_weights
from tensorrail_exporter.graphs.io import save_model
from tensorrail_exporter.plans.costs import dense_cost
from tensorrail_exporter.plans.plan import Plan
from tensorrail_exporter.rewrite.resolve import ResolvedPlan, resolve
from tensorrail_exporter.rewrite.rewriter import rewrite
from tensorrail_exporter.rewrite.survey import DenseLayer, survey
from tensorrail_exporter.search.knapsack import Limit, choose
from tensorrail_exporter.search.latency_table import LatencyTable
from tensorrail_exporter.search.layer_profile import layer_times, slower_layers
from tensorrail_exporter.search.losses import Losses, check_outputs, losses_of
from tensorrail_exporter.search.options import Option, option_for, options_of
from tensorrail_runtime.errors import PlanError, TargetError
from tensorrail_runtime.graphs.cost import GraphCost, cost
from tensorrail_runtime.measure.latency import Ratio, bench_fresh
from tensorrail_runtime.records import Record
from tensorrail_runtime.sessions.inputs import Shapes
from tensorrail_runtime.sessions.machine import Machine, machine, processor
from tensorrail_runtime.sessions.session import Session

TARGETS = ("latency", "flops", "params", "bytes")

_GAIN = 0.95  # of the dense time: a layer that would take more stays dense
_NEAR, _BEYOND = 0.995, 1.03  # of a latency target: a measured speed-up between them is near enough
_NUDGE = 1.005
_TRIES = 4
_GPU_GRID = 8
BLOCKS = (1, 4, 8, 16)

OnStage = Callable[[str, float], None]
"""Told what is being done and the share of it that is done."""


@dataclass(frozen=True)
class Search:
    """What is searched, and how. `keep` are patterns of layers that stay dense; `gain` the most of its dense time, as a
    share, that a rewritten layer may take (above 1: slower layers are allowed, for a target on size).
    """

    targets: Mapping[str, float]
    batch: int = 1
    formats: tuple[str, ...] = ("auto",)
    grid: int = 0  # 0: the target's own
    keep: tuple[str, ...] = ()
    max_loss: float | None = None
    gain: float = _GAIN
    seconds: float = 150.0  # of measuring layers
    check_seconds: float = 10.0  # of timing the chosen network
    cache: Path | None = None

    def check(self) -> None:
        """Raise `PlanError` for a target that is none."""
        if self.max_loss is not None and not self.max_loss > 0:
            raise PlanError(f"the largest loss is a positive number, and {self.max_loss:g} came")
        if not self.targets and self.max_loss is None:
            raise PlanError(
                f"no target came: expected one of {', '.join(f'{name}=2.0' for name in TARGETS)}, or a largest loss"
            )
        for name, value in self.targets.items():
            if name not in TARGETS:
                raise PlanError(f"unknown target {name!r}: expected one of {', '.join(TARGETS)}")
            if not 1.0 < value < 1e4:
                raise PlanError(f"target {name}={value:g}: expected how many times less, a number above 1, such as 2.0")


class PlannedLayer(Record):
    """One layer of the plan; `reason` says why it stays dense. Milliseconds are predicted, of all its nodes together; 0 where
    it was not timed.
    """

    layer: str
    what: str
    format: str | None
    ranks: tuple[int, ...]
    steps: str
    dense_ms: float
    ms: float
    dense_macs: int
    macs: int
    dense_params: int
    params: int
    loss: float
    reason: str = ""


class Totals(Record):
    """A whole network at the plan's batch size, as its graph is; FLOPs are 2 × MACs. The planned one's time is predicted."""

    params: int
    macs: int
    bytes: int
    ms: float


class PlanReport(Record):
    """How a plan was chosen, and what is expected of it; `measured` is the chosen network against the dense one.

    `slower` are the rewritten layers that its profile shows slower than dense: none, unless slower layers were allowed or no
    other choice meets the targets. On a GPU nothing is profiled: the latency table alone says which layers are faster.
    """

    version: Literal[1] = 1
    targets: dict[str, float]
    provider: str
    batch: int
    grid: int
    loss_from: str
    dense: Totals
    planned: Totals
    rows: tuple[PlannedLayer, ...]
    measured: Ratio | None
    slower: tuple[str, ...] = ()
    machine: Machine
    plan: Plan

    @property
    def predicted(self) -> float:
        """The speed-up that the latency table predicts."""
        return self.dense.ms / self.planned.ms

    @property
    def prediction_error(self) -> float | None:
        """Predicted time over measured time, less one."""
        return None if self.measured is None else self.measured.value / self.predicted - 1

    @property
    def reached(self) -> dict[str, float]:
        """How many times less the chosen network takes, by the targets' names: measured, and counted in its graph."""
        before, after = _whole(self.dense), _whole(self.planned)
        found = {name: before[name] / after[name] if after[name] else 1.0 for name in TARGETS}
        return found | {"latency": 1.0 if self.measured is None else self.measured.value}

    @property
    def missed(self) -> dict[str, float]:
        """What was reached of the targets that the chosen network does not meet."""
        return {name: self.reached[name] for name, wanted in self.targets.items() if self.reached[name] < wanted * _NEAR}

    @property
    def meets(self) -> bool:
        """Whether the chosen network meets all targets."""
        return not self.missed


def plan_network(
    model: onnx.ModelProto,
    search: Search,
    *,
    calibration: Calibration | None = None,
    settings: Session | None = None,
    shapes: Shapes | None = None,
    on_stage: OnStage = lambda _, __: None,
) -> PlanReport:
    """Return the plan that meets the targets at the least loss, and its report.

    Raises `TargetError` when the targets cannot be met, `ModelError` when the model does not run as asked; and before anything
    is measured `PlanError` for a target on what the model has none of and for layers to keep that are not there, `GraphError`
    for weights or outputs that are not finite and labels that are no classes.
    """
    search.check()
    settings = settings or Session()
    settings.check()
    grid = search.grid or (_GPU_GRID if settings.on_gpu else processor().channel_block)
    layers = survey(model, search.batch, shapes, scan=not settings.on_gpu)
    _check_keep(search.keep, layers)
    wanted = {
        layer: ()
        if any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in search.keep)
        else options_of(layer, search.formats, grid)
        for layer in layers
        if layer.output is not None and layer.inputs[layer.data] is not None
    }
    resolved = resolve(model, Plan(layers=tuple(own[0].plan(layer.name) for layer, own in wanted.items() if own)))
    dense_weights(resolved)  # are they finite?
    if calibration is not None and calibration.count:
        check_outputs(model, calibration, settings.exact)
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.onnx"
        save_model(model, dense)
        made = _counted(dense, search, shapes)
        table = LatencyTable.open(settings, search.cache)
        table.measure(wanted, settings, seconds=search.seconds, on_share=lambda share, what: on_stage(f"timing {what}", share))
        faster = {layer: _faster(layer, options, table, search.gain) for layer, options in wanted.items()}
        losses = losses_of(
            model,
            faster,
            calibration,
            settings.exact,
            resolved=resolved,
            on_share=lambda share, what: on_stage(f"sensitivity {what}", share),
        )
        # The least of several: what else runs on the machine for a moment only ever makes a time longer.
        whole = min(_dense_ms(dense, search, settings, shapes) for _ in range(3))
        totals = Totals(params=made.params, macs=made.macs, bytes=made.bytes, ms=whole)
        aim = dict(search.targets)
        tried: list[PlanReport] = []
        for number in range(_TRIES):
            try:
                report = _choose(search, aim, grid, wanted, faster, losses, table, totals, settings)
            except TargetError:
                if not tried:
                    raise
                break  # what was tried is what there is
            on_stage("timing the chosen network", number / _TRIES)
            tried.append(_measured(report, model, dense, search, settings, shapes, Path(folder)))
            reached, slower = tried[-1].reached, tried[-1].slower if search.gain <= 1 else ()
            off = {*tried[-1].missed}
            if "latency" in aim and reached["latency"] / search.targets["latency"] > _BEYOND:
                off.add("latency")
            if tried[-1].measured is None or not (off or slower):
                break
            for name in off:
                # The table is some per cent off, and a weight that something else reads stays in the graph: what was reached
                # says how much tighter or looser the budget should be.
                aim[name] *= search.targets[name] / reached[name] * _NUDGE
            faster, losses = _without(faster, losses, tried[-1], slower)
            if min(aim.values(), default=2.0) <= 1.0 or not _reachable(aim, faster, table, totals):
                break
        on_stage("timing the chosen network", 1.0)
    meeting = [report for report in tried if report.meets]
    if meeting:
        found = min(meeting, key=lambda report: (len(report.slower), sum(row.loss for row in report.rows)))
    else:
        found = max(tried, key=lambda report: (_nearest(report), report.reached["latency"]))
    untimed = [layer for layer in layers if layer not in wanted]  # such as those in the bodies of If and Loop
    rows = (_dense_row(layer, 0.0, "not timed: the shape of its data is not known") for layer in untimed)
    return found.model_copy(update={"rows": (*found.rows, *rows)})


def _dense_row(layer: DenseLayer, milliseconds: float, reason: str) -> PlannedLayer:
    """Return the row of a layer that stays dense."""
    return PlannedLayer(
        layer=layer.name,
        what=layer.describe(),
        format=None,
        ranks=(),
        steps="",
        dense_ms=milliseconds,
        ms=milliseconds,
        dense_macs=layer.macs,
        macs=layer.macs,
        dense_params=layer.params,
        params=layer.params,
        loss=0.0,
        reason=reason,
    )


def _nearest(report: PlanReport) -> float:
    """Return which share of its targets a choice has reached, the worst of them."""
    return min((report.reached[name] / wanted for name, wanted in report.targets.items()), default=1.0)


def fastest_blocks(
    model: onnx.ModelProto,
    plan: Plan,
    *,
    settings: Session | None = None,
    batch: int = 1,
    shapes: Shapes | None = None,
    seconds: float = 60.0,
    cache: Path | None = None,
    blocks: Sequence[int] = BLOCKS,
    or_dense: bool = False,
    scan: bool = True,
    on_stage: OnStage = lambda _, __: None,
) -> dict[str, int]:
    """Return for every layer of a plan the block that its ranks run fastest at when zeros widen them to its multiples.

    The blocks (1: no zeros) are timed on the target; a wider one must be 2 % faster to be taken. With `or_dense` a layer
    that runs faster with the dense weight of its cores than with any of them gets 0. `scan` is that of `rewrite.factorize`.
    """
    settings = settings or Session()
    planned = {layer.name: layer for layer in plan.layers}
    widest_first = sorted(blocks, reverse=True)  # of blocks that come to the same steps the narrowest one stays
    wanted = {
        layer: tuple({o.steps: o for o in (option_for(planned[layer.name], layer.spec, b) for b in widest_first)}.values())
        for layer in survey(model, batch, shapes, scan=scan and not settings.on_gpu)
        if layer.name in planned and layer.output is not None and layer.inputs[layer.data] is not None
    }
    table = LatencyTable.open(settings, cache)
    table.measure(wanted, settings, seconds=seconds, on_share=lambda share, what: on_stage(f"timing {what}", share))
    chosen = {}
    for layer, options in wanted.items():
        best = min(options, key=lambda o: table.milliseconds(layer, o) * (1.0 if o.block == min(blocks) else 1.02))
        slower = table.milliseconds(layer, best) > table.milliseconds(layer)
        chosen[layer.name] = 0 if or_dense and slower else best.block
    return chosen


def _check_keep(keep: Sequence[str], layers: Sequence[DenseLayer]) -> None:
    names = [layer.name for layer in layers]
    for pattern in keep:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            known = ", ".join(names) or "none"
            raise PlanError(f"layer {pattern}: to be kept dense, and no layer that could be factored has that name: {known}")


def _counted(dense: Path, search: Search, shapes: Shapes | None) -> GraphCost:
    """Return what the dense model costs; `PlanError` for a target on what it has none of."""
    made = cost(dense, search.batch, shapes)
    whole = {"params": made.params, "flops": made.macs, "bytes": made.bytes}
    for name in search.targets:
        if whole.get(name) == 0:
            raise PlanError(f"target {name}={search.targets[name]:g}: the model has 0 {name}, and nothing to divide")
    return made


def _faster(layer: DenseLayer, options: Sequence[Option], table: LatencyTable, gain: float) -> tuple[Option, ...]:
    dense = table.milliseconds(layer)
    return tuple(option for option in options if table.milliseconds(layer, option) <= gain * dense)


def _without(
    faster: Mapping[DenseLayer, tuple[Option, ...]], losses: Losses, report: PlanReport, slower: Sequence[str]
) -> tuple[dict[DenseLayer, tuple[Option, ...]], Losses]:
    """Return the options and their losses without the chosen forms of the layers that were slower with them."""
    chosen = {row.layer: row.steps for row in report.rows if row.layer in slower}
    left, values = {}, dict(losses.values)
    for layer, options in faster.items():
        stay = [k for k, option in enumerate(options) if option.steps != chosen.get(layer.name)]
        left[layer] = tuple(options[k] for k in stay)
        if options:
            values[layer.name] = tuple(losses.values[layer.name][k] for k in stay)
    return left, replace(losses, values=values)


def _macs(layer: DenseLayer, option: Option) -> int:
    """Return the MACs of all the layer's nodes in this form, at the survey's batch size."""
    return round(layer.macs * option.macs / max(1, dense_cost(layer.spec).macs))


def _costs(name: str, layer: DenseLayer, options: Sequence[Option], table: LatencyTable) -> tuple[float, list[float]]:
    """Return what the dense layer and each option cost toward a target."""
    match name:
        case "latency":
            return layer.nodes * table.milliseconds(layer), [layer.nodes * table.milliseconds(layer, o) for o in options]
        case "flops":
            return float(layer.macs), [float(_macs(layer, o)) for o in options]
        case "params":
            return float(layer.params), [float(o.params) for o in options]
        case _:
            return float(layer.bytes), [float(o.params * layer.dtype.itemsize) for o in options]


def _limits(
    aim: Mapping[str, float],
    faster: Mapping[DenseLayer, Sequence[Option]],
    table: LatencyTable,
    totals: Totals,
) -> list[Limit]:
    whole = _whole(totals)
    limits = []
    for name, times in aim.items():
        pairs = [_costs(name, layer, options, table) for layer, options in faster.items()]
        rest = whole[name] - sum(dense for dense, _ in pairs)
        limits.append(Limit(name, [[dense, *others] for dense, others in pairs], whole[name] / times - rest))
    return limits


def _whole(totals: Totals) -> dict[str, float]:
    return {"latency": totals.ms, "flops": float(totals.macs), "params": float(totals.params), "bytes": float(totals.bytes)}


def _reachable(
    aim: Mapping[str, float],
    faster: Mapping[DenseLayer, Sequence[Option]],
    table: LatencyTable,
    totals: Totals,
) -> bool:
    return all(sum(min(one) for one in limit.costs) <= limit.most for limit in _limits(aim, faster, table, totals))


def _choose(
    search: Search,
    aim: Mapping[str, float],
    grid: int,
    wanted: Mapping[DenseLayer, Sequence[Option]],
    faster: Mapping[DenseLayer, Sequence[Option]],
    losses: Losses,
    table: LatencyTable,
    totals: Totals,
    settings: Session,
) -> PlanReport:
    limits = _limits(aim, faster, table, totals)
    for limit in limits:
        least = sum(min(one) for one in limit.costs)
        if least > limit.most:
            whole = _whole(totals)[limit.name]
            reach = whole / (whole - sum(one[0] for one in limit.costs) + least)
            slower = search.gain > 1  # are allowed
            more = "" if "latency" in aim or slower else ", or allow slower layers"
            raise TargetError(
                f"the target {limit.name}={search.targets[limit.name]:g} cannot be met: with every layer in its cheapest form"
                f"{'' if slower else ' that is faster here'}, {limit.name} falls {reach:.2f} times; ask for less{more}"
            )
    lost = [[0.0, *losses.values.get(layer.name, ())] for layer in faster]
    if search.max_loss is None:
        picks = choose(lost, limits)
    else:
        pairs = [_costs("latency", layer, options, table) for layer, options in faster.items()]
        picks = choose([[dense, *others] for dense, others in pairs], [*limits, Limit("loss", lost, search.max_loss)])
    rows, plans = [], []
    saved = {"ms": 0.0, "macs": 0, "params": 0, "bytes": 0}
    for (layer, options), pick in zip(faster.items(), picks, strict=True):
        dense_ms = layer.nodes * table.milliseconds(layer)
        if not pick:
            rows.append(_dense_row(layer, dense_ms, _reason(layer, wanted[layer], options, table, search)))
            continue
        option = options[pick - 1]
        ms, macs = layer.nodes * table.milliseconds(layer, option), _macs(layer, option)
        saved["ms"] += dense_ms - ms
        saved["macs"] += layer.macs - macs
        saved["params"] += layer.params - option.params
        saved["bytes"] += (layer.params - option.params) * layer.dtype.itemsize
        plans.append(option.plan(layer.name))
        rows.append(
            PlannedLayer(
                layer=layer.name,
                what=layer.describe(),
                format=option.format,
                ranks=option.ranks,
                steps=option.steps,
                dense_ms=dense_ms,
                ms=ms,
                dense_macs=layer.macs,
                macs=macs,
                dense_params=layer.params,
                params=option.params,
                loss=losses.values[layer.name][pick - 1],
            )
        )
    return PlanReport(
        targets=dict(search.targets),
        provider=settings.provider,
        batch=search.batch,
        grid=grid,
        loss_from=losses.source,
        dense=totals,
        planned=Totals(
            params=totals.params - int(saved["params"]),
            macs=totals.macs - int(saved["macs"]),
            bytes=totals.bytes - int(saved["bytes"]),
            ms=totals.ms - saved["ms"],
        ),
        rows=tuple(rows),
        measured=None,
        machine=machine(gpu=settings.on_gpu),
        plan=Plan(layers=tuple(plans)),
    )


def _reason(layer: DenseLayer, options: Sequence[Option], faster: Sequence[Option], table: LatencyTable, search: Search) -> str:
    if any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in search.keep):
        return "kept as asked"
    if not options:
        return "too narrow for a rank on the grid"
    if not faster:
        best = max(table.milliseconds(layer) / table.milliseconds(layer, option) for option in options)
        if best * search.gain >= 1:
            return "slower in the network, by its profile"
        return f"no form is faster: the best one {best:.2f}×"
    return "its loss would buy more elsewhere"


def _dense_ms(dense: Path, search: Search, settings: Session, shapes: Shapes | None) -> float:
    seconds = search.check_seconds / 9
    binding = settings.on_gpu
    run = bench_fresh(
        [dense], batch=search.batch, seconds=seconds, settings=settings, shapes=shapes, io_binding=binding, processes=1
    )
    return run.latencies[0].p50


def _measured(
    report: PlanReport,
    model: onnx.ModelProto,
    dense: Path,
    search: Search,
    settings: Session,
    shapes: Shapes | None,
    folder: Path,
) -> PlanReport:
    """Return the report with the chosen network timed and profiled beside the dense one; random cores run as long as any.

    Only the CPU provider is profiled: kernels of a GPU run on after their node has ended in the profile.
    """
    if not report.plan.layers:
        return report
    path = folder / "chosen.onnx"
    resolved = resolve(model, report.plan)
    save_model(rewrite(resolved, timing_cores(resolved), scan=not settings.on_gpu).model, path)
    seconds, binding = search.check_seconds, settings.on_gpu
    times = bench_fresh(
        [dense, path], batch=search.batch, seconds=seconds, settings=settings, shapes=shapes, io_binding=binding
    )
    made = cost(path, search.batch, shapes)
    planned = report.planned.model_copy(update={"params": made.params, "macs": made.macs, "bytes": made.bytes})
    report = report.model_copy(update={"measured": times.ratios[0], "planned": planned})
    if settings.on_gpu:
        return report
    layers = layer_times(dense, path, report.plan, settings=settings, batch=search.batch, shapes=shapes, resolved=resolved)
    return report.model_copy(update={"slower": slower_layers(layers)})


def random_cores(model: onnx.ModelProto, plan: Plan, seed: int = 0) -> dict[str, list[np.ndarray]]:
    """Return cores of the plan's shapes with values of the size that keeps activations as they are: to time a plan."""
    return timing_cores(resolve(model, plan), seed)


def timing_cores(resolved: ResolvedPlan, seed: int = 0) -> dict[str, list[np.ndarray]]:
    """Do what `random_cores` does for a plan that was resolved."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, layer in resolved.layers.items():
        part, shape = layer.plan, layer.spec.shape
        sizes = part.core_shapes(shape)
        ranks = part.ranks[1:] if part.format == "tr" else part.ranks  # a ring's first one comes again as its last
        terms = math.prod(shape[1:]) * math.prod(ranks)  # of the sums: over the inputs, and over the ranks in a weight
        scale = terms ** (-0.5 / len(sizes))
        found[name] = [(rng.standard_normal(size, np.float32) * np.float32(scale)) for size in sizes]
    return found
