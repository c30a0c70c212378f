"""Plans a whole network: chooses a form for each layer that meets the targets at the least loss of accuracy.

The steps are: make exact changes where the network is faster for them, list the options on the rank grid of the
hardware, time them, measure their losses, choose one option per layer, measure the loss of the chosen network as a whole and
improve the choice, then build the network, time it against the dense one and profile it. Where the whole network loses more
than its layers were charged, their losses are scaled and the choice is repeated. If it misses a target, or exceeds a latency
target by far, the budget is scaled by that ratio, forms that the profile shows slower than their dense layer are removed, and
the choice is repeated.
"""

from __future__ import annotations

import fnmatch
import glob
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx

from tensorrail_exporter.calibrate.inputs import Calibration
from tensorrail_exporter.calibrate.layerwise import dense_weights
from tensorrail_exporter.calibrate.split import Split, split
from tensorrail_exporter.graphs.io import save_model
from tensorrail_exporter.graphs.joint import joint_groups, joint_name, with_joint
from tensorrail_exporter.plans.plan import Plan, Precision
from tensorrail_exporter.rewrite.resolve import ResolvedPlan, resolve
from tensorrail_exporter.rewrite.survey import DenseLayer, LeftOut, left_out, survey
from tensorrail_exporter.search.exact import fastest_exact
from tensorrail_exporter.search.latency_table import LatencyTable
from tensorrail_exporter.search.losses import (
    Losses,
    Probe,
    approximations_of,
    check_metric,
    check_outputs,
    measured_losses,
    samples_for,
    seconds_of_a_sample,
    weight_losses,
)
from tensorrail_exporter.search.options import Option, families, options_of, thinned
from tensorrail_exporter.search.report import PlannedLayer, PlanReport, Size
from tensorrail_exporter.search.selection import Candidates, require_reachable
from tensorrail_exporter.search.smaller_heads import SmallerHeads, smaller_heads
from tensorrail_exporter.search.targets import Search, nearness
from tensorrail_exporter.search.timed_layers import makers_of
from tensorrail_exporter.search.verification import Verification
from tensorrail_exporter.search.verified_choice import choose_verified, with_inputs_set_aside
from tensorrail_runtime.errors import PlanError, TargetError
from tensorrail_runtime.graphs.cost import cost
from tensorrail_runtime.measure.timing import Conditions, Timing
from tensorrail_runtime.progress import Progress, part_of
from tensorrail_runtime.scratch import scratch
from tensorrail_runtime.sessions.halves import runs_with_casts
from tensorrail_runtime.sessions.machine import machine, processor
from tensorrail_runtime.sessions.session import Session

_BEYOND = 1.03  # times a latency target: a faster network loses more accuracy than needed
_NUDGE = 1.005
_FIRST = 2  # forms of a layer that are timed first, to refuse a target that is out of reach
_FAR = 1.15  # times what these forms reach: other forms may be faster than those with the fewest MACs, but hardly by more
_SKETCHES = 2  # rough measurements that must agree before a target is refused for them
_SKETCH_SECONDS = 4.0  # for which the models of one may run; networks that need longer are timed at once
_LEEWAY = 1.02  # times what a rough measurement reaches: not refused
_ROUGHLY = 0.25  # share of the time for timing layers that is enough where no target is on the latency
_TRIES = 4
_GPU_GRID = 8
_PROCESSES = 5  # at most; a process that times for less than a second mostly starts


def plan_network(
    model: onnx.ModelProto,
    targets: Mapping[str, float],
    search: Search | None = None,
    *,
    calibration: Calibration | None = None,
    conditions: Conditions | None = None,
    judge: bool = True,
) -> PlanReport:
    """Find the plan that meets the targets at the least loss.

    Args:
        model: the dense graph; it is not changed.
        targets: reduction factors of `latency`, `flops`, `params` or `bytes`, such as `{"latency": 2.0}`; all must be met.
        search: how the plan is searched for, and the limit on the loss, if any; default `Search()`.
        calibration: inputs that losses are measured on; default: none, so losses are estimated from the weights.
        conditions: batch size and shapes for times and FLOPs, how the network will run, and where progress is reported;
            default: batch 1 on the CPU provider.
        judge: also compare the chosen network with the dense one on the inputs that are held out; default True.

    Returns:
        The report of the chosen network, with the plan.

    Raises:
        TargetError: a target cannot be met; the message says what can be reached.
        PlanError: a target is invalid or on a quantity that is 0, a pattern of `search.keep` matches no layer, or there is a
            metric without labels.
        GraphError: weights or outputs are not finite, or labels are not classes.
        ModelError: the model does not run in these conditions; or the metric is unknown, fails, or gives other than one finite
            number per sample.

    """
    return plan_networks(model, [targets], search, calibration=calibration, conditions=conditions, judge=judge)[0]


def plan_networks(
    model: onnx.ModelProto,
    targets: Sequence[Mapping[str, float]],
    search: Search | None = None,
    *,
    calibration: Calibration | None = None,
    conditions: Conditions | None = None,
    judge: bool = True,
) -> list[PlanReport]:
    """Do the same for several targets, for which times and losses are measured once.

    Args:
        model: as for `plan_network`, like the other arguments.
        targets: the targets of each plan, those that are easiest to meet first.
        search: how plans are searched for.
        calibration: inputs that losses are measured on.
        conditions: how the networks will run.
        judge: whether chosen networks are compared on the inputs that are held out.

    Returns:
        The reports, up to the first targets that cannot be met.

    Raises:
        TargetError: the first targets cannot be met.
        PlanError: see `plan_network`, as for the other errors.
        GraphError: weights or outputs are not finite, or labels are not classes.
        ModelError: the model does not run in these conditions, or the metric fails.

    """
    dense, search, conditions = model, search or Search(), conditions or Conditions()
    settings, progress = conditions.settings, conditions.progress
    for one in targets:
        search.check(one)
    _check_guard(search, calibration)
    check_metric(search.metric, calibration)
    settings.check()
    search = replace(search, grid=search.grid or (_GPU_GRID if settings.on_gpu else processor().channel_block))
    asked = {name for one in targets for name in one}
    groups = {joint_name(group): group for group in (() if search.joint is False else joint_groups(model, search.keeps))}
    # Who keeps a joint layer by its name keeps its parts, whether or not they are joined.
    parts_kept = [glob.escape(part) for name, group in groups.items() if search.keeps(name) for part in group]
    search = replace(search, keep=(*search.keep, *parts_kept))
    layers, refused, options, resolved = _to_plan(model, search, asked, conditions, groups)
    parts = calibration_parts(calibration, model, search, settings)
    start = smaller_heads(model, search, parts, settings.exact, progress)
    with scratch() as folder:
        verification = _verification(model, start, targets, search, parts, conditions, Path(folder))
        if verification.model is not model:  # layers are replaced in this one
            model = verification.model
            layers, refused, options, resolved = _to_plan(model, search, asked, conditions, groups)
        timed = _all_timed(targets, search, options, verification, conditions)
        ranking = parts if parts is None or search.guard is None else parts.exchanged
        approximations = approximations_of(resolved, timed.faster, ranking, settings.exact)
        probe = None
        if parts is None or ranking is None:
            losses = weight_losses(timed.faster, approximations, progress)
        else:
            each = seconds_of_a_sample(model, ranking.chosen, settings.exact)
            few = ranking.chosen.first(samples_for(each * sum(map(bool, timed.faster.values()))))
            kept, reference = _inside(folder, "kept"), dense if start.heads else None
            probe = Probe(
                resolved, approximations, few, settings.exact, kept, search.metric, parts, search.precision, reference
            )
            losses = measured_losses(timed.faster, probe, progress)
        candidates = replace(timed, losses=losses)
        best: list[PlanReport] = []
        for one in targets:
            try:
                reports = _search(one, search, candidates, verification, probe, progress)
            except TargetError:
                if not best:
                    raise
                break
            best.append(_best(reports, fastest=search.guard is not None))
        if judge and probe is not None and parts is not None:
            places = [_inside(folder, f"aside{k}") for k in range(len(best))]
            best = [
                with_inputs_set_aside(one, candidates.choice_of(one), probe, parts.judged, place)
                for one, place in zip(best, places, strict=True)
            ]
    rows = [PlannedLayer.dense(layer, 0.0, _why_not_timed(layer)) for layer in layers if layer not in options]
    rows += [PlannedLayer.left_out(row) for row in refused]
    exact = {"joint": verification.joint, "inner_shapes": verification.inner_shapes, "heads": start.heads}
    update = {"heads": start.rows, "heads_left": start.left}
    return [
        one.model_copy(update={**update, "rows": (*one.rows, *rows), "plan": one.plan.model_copy(update=exact)}) for one in best
    ]


def _to_plan(
    model: onnx.ModelProto, search: Search, targets: Collection[str], conditions: Conditions, joint: Collection[str]
) -> tuple[tuple[DenseLayer, ...], tuple[LeftOut, ...], dict[DenseLayer, tuple[Option, ...]], ResolvedPlan]:
    """Return the layers that can be factored, those that cannot, the forms to time, and the layers that have forms, resolved.

    Layers to keep may also have the names `joint`.

    Raises:
        PlanError: a pattern of layers to keep matches none.
        GraphError: weights are not finite.

    """
    layers, refused = _surveyed(model, conditions)
    _check_keep(search.keep, [*(layer.name for layer in layers), *joint])
    options = _options(layers, search, targets)
    resolved = resolve(model, Plan(layers=tuple(forms[0].plan(layer.name) for layer, forms in options.items() if forms)))
    dense_weights(resolved)  # raises if they are not finite
    return layers, refused, options, resolved


def _surveyed(model: onnx.ModelProto, conditions: Conditions) -> tuple[tuple[DenseLayer, ...], tuple[LeftOut, ...]]:
    """Return the layers that can be factored, and the rows of those that cannot."""
    timing = conditions.timing
    scan = not conditions.settings.on_gpu
    layers = survey(model, timing.batch, timing.shapes, scan=scan, values=timing.values)
    return left_out(model, layers, scan=scan)


def _inside(folder: str, name: str) -> Path:
    path = Path(folder) / name
    path.mkdir()
    return path


def _verification(
    model: onnx.ModelProto,
    start: SmallerHeads,
    targets: Sequence[Mapping[str, float]],
    search: Search,
    parts: Split | None,
    conditions: Conditions,
    folder: Path,
) -> Verification:
    """Return what times whole networks in `folder`, with the network in which layers are replaced: joint where that is faster.

    `start` is that network as it is without exact changes.

    Raises:
        ModelError: the model does not run.

    """
    settings = conditions.settings
    dense = folder / "dense.onnx"
    save_model(model, dense)
    seconds = search.timed_for / 2 if _roughly(targets, search) else search.timed_for
    processes = min(max(int(seconds), 1), _PROCESSES)
    timing = replace(conditions.timing, seconds=seconds, processes=processes, io_binding=settings.on_gpu)
    ranges = [] if parts is None else parts.fitted.feeds[:1]
    reference = None
    if start.heads:
        reference = folder / "heads.onnx"
        save_model(start.model, reference)
    model = start.model
    verification = Verification(
        model, dense, timing, settings, search.precision, ranges, heads=start.heads, reference=reference
    )
    exact = fastest_exact(verification, search, folder, conditions.progress)
    # The shapes stay in the graph while it is planned for; they are left out where it is written.
    return replace(verification, model=with_joint(model, exact.joint), joint=exact.joint, inner_shapes=exact.inner_shapes)


def _roughly(targets: Sequence[Mapping[str, float]], search: Search) -> bool:
    """Return whether times only tell which forms are slower than their dense layers: no target is on the latency."""
    return not any("latency" in one for one in targets) and search.max_loss is None and search.guard is None


def _all_timed(
    targets: Sequence[Mapping[str, float]],
    search: Search,
    options: Mapping[DenseLayer, tuple[Option, ...]],
    verification: Verification,
    conditions: Conditions,
) -> Candidates:
    """Return the candidates with their times, without losses.

    Raises:
        TargetError: the first targets cannot be met.
        PlanError: a target is on a quantity that is 0.

    """
    size = _counted(verification.dense, targets, conditions.timing)
    size = size.model_copy(update={"milliseconds": verification.dense_ms()})
    rough = _roughly(targets, search)
    table = LatencyTable.open(conditions.settings, search.cache, rough=rough, precision=search.precision)
    sizes = size, verification.start_size(size)
    return _timed(targets[0], search, options, table, sizes, conditions)


def _timed(
    targets: Mapping[str, float],
    search: Search,
    options: Mapping[DenseLayer, tuple[Option, ...]],
    table: LatencyTable,
    sizes: tuple[Size, Size],
    conditions: Conditions,
) -> Candidates:
    """Time some forms of all layers, estimate those between, and return all without losses; `TargetError`: they meet no target.

    What can be reached is measured roughly first, and a target beyond it is refused when a second measurement agrees. For a
    target on the latency above 1.15, the forms with the fewest MACs are timed next, and a target far beyond them is refused at
    once.
    `sizes` are those of the dense network, in fp32 and in the precision of the plan.
    """
    smallest = {layer: tuple(sorted(forms, key=lambda form: form.macs)[:_FIRST]) for layer, forms in options.items()}
    wanted = {layer: thinned(forms) for layer, forms in options.items()}
    share = _count(smallest) / max(1, _count(smallest) + _count(wanted))
    seconds = search.seconds * _ROUGHLY if table.rough else search.seconds
    settings, progress, whole = conditions.settings, conditions.progress, sizes[1].milliseconds

    def candidates(forms: Mapping[DenseLayer, tuple[Option, ...]], table: LatencyTable) -> Candidates:
        faster = {layer: _faster(layer, own, table, search.gain) for layer, own in forms.items()}
        return Candidates(forms, faster, Losses("", {}), table, *sizes, _scale(options, table, whole))

    bounding = {name: factor for name, factor in targets.items() if name in ("latency", "flops")}
    cheapest = {layer: _cheapest(forms) for layer, forms in wanted.items()}
    for attempt in range(_SKETCHES if bounding and not settings.on_gpu and table.lacks(cheapest) else 0):
        rough = table.sketch(cheapest, settings, _SKETCH_SECONDS, progress)
        if rough is None:
            break
        try:
            require_reachable(bounding, candidates(cheapest, rough), search, beyond=_LEEWAY)
        except TargetError:
            if attempt == _SKETCHES - 1:
                raise
        else:
            break
    if targets.get("latency", 0.0) > _FAR:  # nearer targets are not refused for times of a few forms
        table.measure(smallest, settings, seconds=seconds * share, whole=whole, progress=part_of(progress, 0.0, share))
        require_reachable({"latency": targets["latency"]}, candidates(smallest, table), search, beyond=_FAR)
    else:
        share = 0.0
    table.measure(wanted, settings, seconds=seconds * (1 - share), whole=whole, progress=part_of(progress, share, 1.0))
    timed = candidates(options, table.with_estimates(options) if table.lacks(options) else table)
    require_reachable(targets, timed, search)
    return timed


def _cheapest(options: Sequence[Option]) -> tuple[Option, ...]:
    """Return the two forms with the fewest MACs of each format and division of the axes, among which the fastest one is."""
    return tuple(option for family in families(options) for option in family[:_FIRST])


def _count(options: Mapping[DenseLayer, Sequence[Option]]) -> int:
    return sum(1 + len(forms) for forms in options.values())


def _search(
    targets: Mapping[str, float],
    search: Search,
    candidates: Candidates,
    verification: Verification,
    probe: Probe | None,
    progress: Progress,
) -> list[PlanReport]:
    """Choose a network, measure it and correct the budget, until the targets are met or the number of tries is used up."""
    aims = dict(targets)
    start = PlanReport(
        targets=dict(targets),
        provider=verification.settings.provider,
        batch=verification.timing.batch,
        grid=search.grid,
        loss_from=candidates.losses.source,
        dense=candidates.dense,
        planned=candidates.start,
        precision=search.precision,
        rows=(),
        measured=None,
        machine=machine(gpu=verification.settings.on_gpu),
        warnings=(*candidates.warnings, *_casts(search.precision, verification.settings)),
        plan=Plan(layers=(), precision=search.precision),
    )
    reports: list[PlanReport] = []
    for number in range(_TRIES):
        try:
            began = time.monotonic()
            report, candidates = choose_verified(start, aims, candidates, search, probe, progress)
            left = search.improve_seconds - (time.monotonic() - began)  # one budget for all tries
            search = replace(search, improve_seconds=max(0.0, left))
        except TargetError:
            if not reports:
                raise
            break  # the tighter budget cannot be met: return the reports so far
        progress("timing the chosen network", number / _TRIES)
        report = verification.measured(report)
        reports.append(report)
        slower = () if search.allow_slower else report.slower
        to_correct = {*report.missed}
        if search.max_loss is not None or search.guard is not None:
            to_correct.discard("latency")  # it is as fast as its loss allows
        elif "latency" in aims and report.reached["latency"] / targets["latency"] > _BEYOND:
            to_correct.add("latency")
        if not report.plan.layers or not (to_correct or slower):
            break
        for name in to_correct:
            # The table is a few per cent off, and a weight with another reader stays in the graph: the ratio of target to
            # reached value says how much tighter or looser the budget should be.
            aims[name] *= targets[name] / report.reached[name] * _NUDGE
        candidates = candidates.without(report, slower)
        if min(aims.values(), default=2.0) <= 1.0 or not candidates.can_reach(aims):
            break
    progress("timing the chosen network", 1.0)
    return reports


def _casts(precision: Precision, settings: Session) -> tuple[str, ...]:
    """Return the warning that times in fp16 are those of fp32 with casts, where they are."""
    if not runs_with_casts(precision, settings):
        return ()
    return ("this provider computes fp16 as fp32 with casts: plan for a GPU on that GPU, where other ranks are fast",)


def _best(reports: Sequence[PlanReport], *, fastest: bool) -> PlanReport:
    """Return the report with the least loss, or time, among those that meet all targets, else the one that comes closest."""
    meeting = [report for report in reports if report.meets]
    if meeting and fastest:
        return min(meeting, key=lambda report: (len(report.slower), -report.reached["latency"]))
    if meeting:
        return min(meeting, key=lambda report: (len(report.slower), _loss(report)))
    return max(reports, key=lambda report: (nearness(report.reached, report.targets), report.reached["latency"]))


def _loss(report: PlanReport) -> float:
    """Return the loss of a plan: that of the whole network, if it was measured."""
    return sum(row.loss for row in report.rows) if report.verified is None else report.verified.loss


def _options(layers: Sequence[DenseLayer], search: Search, targets: Collection[str]) -> dict[DenseLayer, tuple[Option, ...]]:
    """Return the forms to time for each layer whose data shape is known; no forms for a layer that is kept dense.

    Embeddings are among them only where a target is on size: rows of a table are read faster than they are computed.
    """
    size = {"params", "bytes"} & set(targets)
    return {
        layer: () if search.keeps(layer.name) else _forms(layer, search)
        for layer in layers
        if _has_shapes(layer) and (size or not layer.spec.gathers)
    }


def _forms(layer: DenseLayer, search: Search) -> tuple[Option, ...]:
    """Return the forms of a layer, of which none changes a layer that is kept."""
    forms = options_of(layer, search.formats, search.grid)
    return tuple(form for form in forms if not any(search.keeps(maker.name) for maker in makers_of(layer, form)))


def _has_shapes(layer: DenseLayer) -> bool:
    """Return whether the shapes of its data are known; they are not in the bodies of If, Loop and Scan."""
    return layer.output is not None and layer.inputs[layer.data] is not None


def _why_not_timed(layer: DenseLayer) -> str:
    if _has_shapes(layer):
        return "an embedding: factored for targets on params or bytes only"
    if layer.in_body:
        return "not timed: in the body of an If, Loop or Scan, whose runs are not known"
    return "not timed: the shape of its data is not known"


def calibration_parts(
    calibration: Calibration | None, model: onnx.ModelProto, search: Search, settings: Session
) -> Split | None:
    """Check the calibration inputs and return them in parts; None where there are none.

    Args:
        calibration: the inputs.
        model: the dense graph.
        search: the metric and the limits that outputs are compared with.
        settings: how the model runs.

    Raises:
        PlanError: there are too few to compare networks that are fitted, or the limits are none for such outputs.
        GraphError: an output is not finite, or has fewer classes than the labels.
        ModelError: the metric fails on them.

    """
    if calibration is None or not calibration.count:
        return None
    check_outputs(model, calibration, settings.exact, search.metric, search.guard)
    parts = split(calibration, model)
    if search.guard is not None and (not parts.holds_out or parts.judged is None):
        raise PlanError(
            "there are too few calibration inputs to fit cores to some and to compare outputs on others: give at least 16, or "
            "8 batches for a model with a fixed batch size, or a target"
        )
    return parts


def _check_guard(search: Search, calibration: Calibration | None) -> None:
    if search.guard is not None and (calibration is None or not calibration.count):
        raise PlanError("how far outputs agree is measured on calibration inputs, got none: give some, or a target")


def _check_keep(keep: Sequence[str], names: Sequence[str]) -> None:
    for pattern in keep:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            known = ", ".join(names) or "none"
            raise PlanError(f"keep: no layer matches {pattern!r}; the layers that can be factored are: {known}")


def _scale(layers: Mapping[DenseLayer, object], table: LatencyTable, whole: float) -> float:
    """Return the factor for the times of the layers, with which they add up to no more than the whole network takes."""
    # The time of a recurrent weight is that of its node, which counts as the time of the input weight.
    total = sum(layer.nodes * table.milliseconds(layer) for layer in layers if not layer.spec.state_products)
    return min(1.0, whole / total) if total else 1.0


def _counted(dense: Path, targets: Sequence[Mapping[str, float]], timing: Timing) -> Size:
    """Return the size of the dense model, with time 0. Raises `PlanError` for a target on a quantity that is 0."""
    counted = cost(dense, timing.batch, timing.shapes, timing.values)
    size = Size(params=counted.params, macs=counted.macs, flops=counted.flops, bytes=counted.bytes, milliseconds=0.0)
    for name, value in (pair for one in targets for pair in one.items()):
        if name != "latency" and size.of(name) == 0:
            raise PlanError(f"target {name}={value:g}: the model has 0 {name}, so there is nothing to reduce")
    return size


def _faster(layer: DenseLayer, options: Sequence[Option], table: LatencyTable, gain: float) -> tuple[Option, ...]:
    """Return the forms whose time is at most `gain` times that of the dense layer; all of an embedding, for its size."""
    if layer.spec.gathers:
        return tuple(options)
    dense = table.milliseconds(layer)
    return tuple(option for option in options if table.added(layer, option) <= gain * dense)
