"""Makes a faster model from an ONNX file alone: decompose, rewrite, check, time and report.

Several models may be made: of plans for several targets, in fp32, fp16 and int8, beside the dense network in the last two. They
are measured in interleaved runs, and the best one is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx

from tensorrail_exporter.calibrate.head_inputs import with_heads_for
from tensorrail_exporter.calibrate.inputs import Calibration
from tensorrail_exporter.calibrate.layerwise import LayerFit
from tensorrail_exporter.calibrate.split import Split, split
from tensorrail_exporter.choice import Wanted, best, meets
from tensorrail_exporter.compressed import CompressReport, Point, Ratios
from tensorrail_exporter.fitted import Fitting, fitted, numerical_error
from tensorrail_exporter.fitted import Refine as Refine
from tensorrail_exporter.graphs.io import load_model, save_model
from tensorrail_exporter.graphs.joint import rounding_error, without_inner_shapes
from tensorrail_exporter.plans.plan import HeadPlan, Plan, Precision
from tensorrail_exporter.precision.islands import fastest_islands
from tensorrail_exporter.precision.planned import PRECISIONS, Converter, PlannedPrecision, Require, require_kept
from tensorrail_exporter.precision.spared import Judge as SparedJudge
from tensorrail_exporter.precision.spared import Layer, Spared, with_spared_layers
from tensorrail_exporter.rewrite.narrowed_heads import NarrowedHeads, heads_error, narrowed_heads
from tensorrail_exporter.rewrite.resolve import ResolvedPlan, resolve
from tensorrail_exporter.rewrite.rewriter import LayerRewrite, require_scan
from tensorrail_exporter.search.guard import Guard
from tensorrail_exporter.search.judge import Judge
from tensorrail_exporter.search.losses import check_metric
from tensorrail_exporter.search.report import PlanReport, Size, times_less
from tensorrail_runtime.errors import GraphError, ModelError, PlanError, TargetError
from tensorrail_runtime.graphs.cost import cost
from tensorrail_runtime.graphs.files import bytes_of
from tensorrail_runtime.measure.accuracy import Comparison, Labelled, compare_scores, evaluate
from tensorrail_runtime.measure.agreement import Agreement, agreement_of
from tensorrail_runtime.measure.fusions import compared_fusions
from tensorrail_runtime.measure.latency import LatencyReport, Ratio, bench
from tensorrail_runtime.measure.parity import parity_of, run_both
from tensorrail_runtime.measure.timing import Conditions, Timing
from tensorrail_runtime.scratch import scratch
from tensorrail_runtime.sessions.halves import runs_with_casts
from tensorrail_runtime.sessions.inputs import random_inputs
from tensorrail_runtime.sessions.session import Session, open_session

_EACH = 0.3  # seconds of timing for each network that is tried with other layers in fp32
_LOOKED_AT = 64  # inputs on which overflow is looked for, and as many of those held out: every tensor is read

Planned = Plan | PlanReport
Feeds = list[Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Compression:
    """How a model is compressed and measured."""

    calibration: Calibration | None = None
    """Inputs: a quarter is held out, and the model that is written is judged on it. Cores are fitted to the rest, or to part of
    it where something is chosen by inputs: among models, whether a further fit is kept, or by a limit on the loss. Default:
    none, so each weight is decomposed alone."""
    refine: Mapping[str, Refine] = field(default_factory=dict)
    """Further fits of the factored graph, by what they are called, in order; each is kept if it is better on inputs that were
    held out; default: none."""
    test: Labelled | None = None
    """Labelled inputs to measure the accuracy on; nothing is fitted to them."""
    guard: Guard = field(default_factory=Guard)
    """How closely the outputs must agree with the dense model's."""
    conditions: Conditions = field(default_factory=lambda: Conditions(Timing(processes=5)))
    """How models run and how latency is measured; default: 5 processes on the CPU provider."""
    metric: str | None = None
    """A score of each sample, as `top1` or `module:function`, that fits and models are judged by, on calibration inputs with
    labels; default: none, so they are judged by how far outputs are from the dense ones."""
    targets: Mapping[str, float] | None = None
    """What the written model must reach; default: the targets of the plan."""
    max_loss: float | None = None
    """Limit on the loss of the written model, where there are several; default: none."""
    fastest: bool = False
    """Of several models, write the fastest one within the limits, not the one that meets the targets with the least loss."""
    refusal: TargetError | None = None
    """Raised, and nothing is written, unless the best model meets the targets within the limits; default: none."""


def compress(
    model: onnx.ModelProto, plan: Planned | Sequence[Planned], out: Path, options: Compression | None = None
) -> CompressReport:
    """Write the factored model of a plan to `out`, and compare it with the dense one.

    Args:
        model: the dense graph.
        plan: the layers to rewrite; the report of a search also provides targets and predictions. Or several, of whose models
            the best one is written. With one for fp16 or int8, the dense network in that precision is measured beside them; it
            may be written if a plan was searched for, or has no layers.
        out: the file to write.
        options: the inputs to fit and test with, and how the models are measured; default `Compression()`.

    Returns:
        Size, speed, accuracy and the errors of the model that was written, beside those of all that it was chosen from.

    Raises:
        TargetError: the best model does not meet the targets, and there is a `refusal`.
        PlanError: no plan names a layer, there are no calibration inputs for int8, or there is a metric without calibration
            inputs that have labels.
        ModelError: the metric is unknown, fails, or gives other than one finite number per sample.
        GraphError: a layer is not in the graph or cannot be rewritten, or the factored graph differs from the graph with
            reconstructed weights by more than rounding; nothing is written.

    """
    options = options or Compression()
    plans = [plan] if isinstance(plan, Plan | PlanReport) else list(plan)
    options.conditions.settings.check()
    options.guard.check()
    check_metric(options.metric, options.calibration)
    parts = None if options.calibration is None else split(options.calibration, model)
    wanted = Wanted(_targets(plans, options), options.guard, options.max_loss, options.fastest)
    with scratch() as folder:
        dense = Path(folder) / "dense.onnx"
        save_model(model, dense)
        # A limit on the loss is a choice, too: it is judged on inputs that the model was not fitted to.
        limited = options.max_loss is not None
        several = limited or len(plans) > 1 or any(planned.precision != "fp32" for planned in plans)
        judge = None
        if parts is not None and (several or options.refine):
            judge = Judge(model, parts.chosen, options.metric, options.conditions.settings.exact)
            if judge.left_out and not any(isinstance(planned, PlanReport) for planned in plans):  # a search has told it
                options.conditions.progress("note", 1.0, judge.left_out)
        builder = _Builder(model, dense, parts, options, wanted, judge, several=several)
        built = list(builder.models(plans))
        searched = any(isinstance(planned, PlanReport) or not planned.layers for planned in plans)
        eligible = [k for k, one in enumerate(built) if one.layers or searched]
        if builder.fault is not None and not eligible:
            raise builder.fault
        dense_size, points, times = _measured(dense, built, parts, options, builder.feeds)
        if several and judge is not None:
            judged = [judge(load_model(one.path)) for one in built]
            points = [p.model_copy(update={"loss": loss, "chosen": own}) for p, (loss, own) in zip(points, judged, strict=True)]
        k = eligible[best([points[place] for place in eligible], wanted)]
        if options.refusal is not None and not wanted.met_by(points[k]):
            raise options.refusal
        points, accuracy = _scored(dense, points, built, k, options)
        save_model(load_model(built[k].path), out)
        fusions = compared_fusions(dense, built[k].path, options.conditions.settings)
    report = _report(points, k, built[k], dense_size, times, accuracy, wanted, options.conditions.settings, out)
    held_out = parts is None or not several or parts.holds_out
    return report.model_copy(update={"fusions": fusions, "calibrated": parts is not None, "held_out": held_out})


def _report(
    points: Sequence[Point],
    k: int,
    written: _Built,
    dense: Size,
    times: LatencyReport,
    accuracy: Comparison | None,
    wanted: Wanted,
    settings: Session,
    out: Path,
) -> CompressReport:
    """Return the report of the model that was written, the k-th one."""
    point, planning = points[k], written.planning
    if planning is not None and written.spared:
        planning = planning.model_copy(update={"plan": planning.plan.model_copy(update={"fp32": written.spared})})
    return CompressReport(
        dense=dense,
        factored=point.size,
        ratios=point.ratios,
        targets=dict(wanted.targets),
        meets=meets(point, wanted.targets),
        predicted_latency=planning.predicted if planning else None,
        approximation=point.approximation,
        top1_agreement=None if point.aside is None else point.aside.agreement,
        aside=point.aside,
        guard=wanted.guard,
        max_loss=wanted.max_loss,
        loss=point.loss,
        precision=written.precision,
        with_casts=runs_with_casts(written.precision, settings),
        written=k,
        front=tuple(points),
        numerical=written.numerical,
        exact=written.exact,
        accuracy=accuracy,
        layers=written.layers,
        heads=written.heads,
        planned=planning.rows if planning else (),
        fits=written.fits,
        latency=times.model_copy(
            update={"latencies": (times.latencies[0], times.latencies[k + 1]), "ratios": (times.ratios[k],)}
        ),
        planning=planning,
        model=str(out),
    )


@dataclass(frozen=True)
class _Built:
    """A model to choose from, and its file."""

    precision: Precision
    path: Path
    plain: Path  # the same in fp32
    planning: PlanReport | None = None
    layers: tuple[LayerRewrite, ...] = ()  # none: the dense network
    fits: tuple[LayerFit, ...] = ()
    numerical: float = 0.0
    spared: tuple[str, ...] = ()  # nodes that stay in fp32 in a model in another precision
    exact: str = ""  # changes besides low rank
    heads: tuple[NarrowedHeads, ...] = ()  # attention heads of a smaller size
    asked: str = ""  # the targets of the plan, where plans have different ones

    @property
    def name(self) -> str:
        """What the model is, for tables."""
        spared = f", {len(self.spared)} layer{'s' * (len(self.spared) > 1)} in fp32" if self.spared else ""
        what = "low rank" if self.layers else self.exact or "dense"
        return f"{what} in {self.precision}{spared}{self.asked}"


class _Builder:
    """Writes the models to choose from, beside the dense one."""

    def __init__(
        self,
        model: onnx.ModelProto,
        dense: Path,
        parts: Split | None,
        options: Compression,
        wanted: Wanted,
        judge: Judge | None,
        *,
        several: bool,
    ) -> None:
        self.model, self.dense, self.parts, self.wanted, self.judge = model, dense, parts, wanted, judge
        self.conditions = options.conditions
        settings, progress = options.conditions.settings, options.conditions.progress
        # Several models are judged by inputs that none was fitted to.
        self.how = Fitting(options.refine, judge, settings, progress, refit=not several)
        self.feeds = _feeds(dense, parts, options)
        self.fault: GraphError | None = None
        self._narrowed: dict[tuple[HeadPlan, ...], onnx.ModelProto] = {}

    def models(self, plans: Sequence[Planned]) -> Iterator[_Built]:
        """Write the model of each plan that has layers; the dense network in the precisions of the plans comes first.

        Of several models, one that cannot be made is left out with a note.
        """
        factored = [planned for planned in plans if _plan(planned).changes]
        reduced = [name for name in PRECISIONS if name != "fp32" and any(planned.precision == name for planned in plans)]
        if not factored and not reduced:
            raise PlanError("the plan changes nothing: it names no layer; add one to it")
        needing = [name for name in reduced if PRECISIONS[name].needs_inputs]
        if needing and self.parts is None:
            raise PlanError(
                f"{needing[0]} needs typical inputs for the ranges of activations: give calibration inputs, 100 or more"
            )
        # Raises for a layer that is not there or cannot run here, before the work begins.
        resolved = [resolve(self._with_heads(_plan(planned)), _plan(planned).without_heads) for planned in factored]
        for in_graph in resolved:
            require_scan(in_graph, scan=not self.conditions.settings.on_gpu)
        different = {_words(planned.targets) for planned in factored if isinstance(planned, PlanReport)}
        jobs: list[tuple[str, Callable[[], Sequence[_Built]]]] = []
        empty = {planned.precision: _plan(planned) for planned in plans if not _plan(planned).changes}
        for name in reduced:
            plan = empty.get(name, Plan(layers=(), precision=name))
            jobs.append((f"the dense network in {name}", partial(self._dense_in, plan)))
        for number, (planned, layers) in enumerate(zip(factored, resolved, strict=True)):
            jobs.append((f"a plan for {planned.precision}", partial(self._of, planned, layers, number)))
        for what, make in jobs:
            try:
                made = make()
            except GraphError as error:
                self.fault = error
                if len(jobs) > 1:
                    self.conditions.progress("note", 1.0, f"{what} is left out: {error}")
                continue
            for one in made:
                planning = one.planning if len(different) > 1 else None
                yield one if planning is None else replace(one, asked=f", for {_words(planning.targets)}")

    def _with_heads(self, plan: Plan) -> onnx.ModelProto:
        """Return the dense network with the sizes of heads of a plan; the same one for the same sizes."""
        if plan.heads not in self._narrowed:
            inputs = None if self.parts is None else self.parts.fitted
            self._narrowed[plan.heads] = with_heads_for(self.model, plan.head_sizes, inputs, self.conditions.settings.exact)
        return self._narrowed[plan.heads]

    def _dense_in(self, plan: Plan) -> list[_Built]:
        """Return the dense network in the precision of a plan and, if that is faster, the same with layers in fp32."""
        precision = plan.precision
        return [
            _Built(
                precision, _saved(one.model, self.dense.with_name(f"dense-{precision}-{k}.onnx")), self.dense, spared=one.spared
            )
            for k, one in enumerate(self._in_precision(self.model, plan))
        ]

    def _of(self, planned: Planned, resolved: ResolvedPlan, number: int) -> list[_Built]:
        planning, plan = (planned if isinstance(planned, PlanReport) else None), _plan(planned)
        path = plain = self.dense.with_name(f"factored{number}.onnx")
        settings = self.conditions.settings.exact
        feeds = self.feeds if self.parts is None else list(self.parts.fitted.feeds)
        rewrites: tuple[LayerRewrite, ...] = ()
        fits: tuple[LayerFit, ...] = ()
        error = 0.0
        if plan.heads:
            error = heads_error(self.dense, self.model, plan.heads, feeds[:1], settings)
        if plan.joint:
            joined = _saved(resolved.model, self.dense.with_name("joined.onnx"))
            apart = _saved(self._with_heads(plan), self.dense.with_name("apart.onnx")) if plan.heads else self.dense
            error = rounding_error(apart, joined, feeds[:1], settings)
        if resolved.layers:
            network = fitted(resolved, self.parts, self.how)
            save_model(network.factored.model, path)
            error = numerical_error(network.resolved, network.cores, path, feeds, self.dense.parent, settings)
            model, rewrites, fits = network.model, network.factored.layers, network.layers
        else:
            model = resolved.model
        save_model(_shaped(model, plan), path)
        spared: tuple[str, ...] = ()
        if plan.precision != "fp32":
            small = self._in_precision(model, plan)[-1]
            path = _saved(_shaped(small.model, plan), self.dense.with_name(f"{plan.precision}-{number}.onnx"))
            spared = small.spared
        changes = {
            "smaller heads": bool(plan.heads),
            "joint layers": bool(plan.joint),
            "no inner shapes": not plan.inner_shapes,
        }
        exact = ", ".join(change for change, made in changes.items() if made)
        heads = narrowed_heads(self.model, plan.heads)
        return [_Built(plan.precision, path, plain, planning, rewrites, fits, error, spared, exact, heads)]

    def _in_precision(self, model: onnx.ModelProto, plan: Plan) -> list[Spared]:
        """Return a model in the precision of a plan and, if that is faster, the same with more layers in fp32.

        Layers stay in fp32 that overflow, and where the model would not keep the limits without them, but would in fp32; or
        just those that are given beside the ones that overflow. They are timed as the plan says that the file is written.
        """
        own, parts, judge = PRECISIONS[plan.precision], self.parts, self.judge
        if own.converter is None:
            return [Spared(model, (), good=True)]

        def judged(one: onnx.ModelProto) -> tuple[float, bool]:
            loss, agreement = (0.0, None) if judge is None else judge(one)
            return loss, self.wanted.accepts(loss, agreement)

        with own.converter(model, self._feeds_of(own)) as convert:
            if plan.fp32:
                require_kept(convert.model, plan.fp32)
                fixed = convert(plan.fp32)
                made = [Spared(fixed, plan.fp32, judged(fixed)[1])]
            else:
                counted = self._macs(convert.model)
                layers = [Layer(name, counted.get(name, 0)) for name in convert.layers()]
                made = [with_spared_layers(layers, convert, judged, model, self.conditions.progress)]
                if own.islands:
                    made += self._with_islands(made[0], layers, convert, judged, plan)
            if own.require is not None and parts is not None and parts.judged is not None:
                for one in made:
                    _require_on_others(own.require, convert.model, one.model, parts.judged)
            return [replace(one, spared=tuple(dict.fromkeys((*convert.kept, *one.spared)))) for one in made]

    def _feeds_of(self, precision: PlannedPrecision) -> Feeds:
        """Return the inputs to convert with: all that cores are fitted to, or a few where nothing is measured but overflow."""
        if self.parts is None:
            return self.feeds
        return list((self.parts.fitted if precision.needs_inputs else self.parts.fitted.first(_LOOKED_AT)).feeds)

    def _with_islands(
        self, first: Spared, layers: Sequence[Layer], convert: Converter, judged: SparedJudge, plan: Plan
    ) -> list[Spared]:
        """Return the network with the layers in fp32 that are faster so; empty if none are, or it would not keep the limits."""
        names = fastest_islands(layers, first.spared, convert, partial(self._times, plan), self.conditions.progress)
        if names == first.spared:
            return []
        faster = convert(names)
        good = judged(faster)[1]
        return [Spared(faster, names, good)] if good or not first.good else []

    def _times(self, plan: Plan, models: Sequence[onnx.ModelProto]) -> tuple[Ratio, ...]:
        """Return how many times faster each model but the first is than the first one."""
        paths = [_saved(_shaped(one, plan), self.dense.with_name(f"island{k}.onnx")) for k, one in enumerate(models)]
        timing, settings = self.conditions.timing, self.conditions.settings
        seconds = min(timing.duration, _EACH) * len(paths)
        return bench(paths, replace(timing, seconds=seconds, processes=0, io_binding=settings.on_gpu), settings).ratios

    def _macs(self, model: onnx.ModelProto) -> dict[str, int]:
        """Return the multiply-accumulates of the nodes of a model by their names."""
        timing = self.conditions.timing
        path = _saved(model, self.dense.with_name("named.onnx"))
        return {node.name: node.macs for node in cost(path, timing.batch, timing.shapes, timing.values).layers}


def _require_on_others(require: Require, model: onnx.ModelProto, converted: onnx.ModelProto, aside: Calibration) -> None:
    """Raise `GraphError` if a converted model does not hold on the inputs that are held out."""
    try:
        require(model, converted, aside.first(_LOOKED_AT).feeds)
    except GraphError as error:
        raise GraphError(
            f"{error}. Only inputs that were held out show it: give more calibration inputs, or name these layers in "
            "`fp32` of the plan"
        ) from None


def _measured(
    dense: Path, built: Sequence[_Built], parts: Split | None, options: Compression, feeds: Feeds
) -> tuple[Size, list[Point], LatencyReport]:
    """Return the size of the dense model, the models as they were measured in interleaved runs with it, and their times."""
    timing, settings, progress = options.conditions.timing, options.conditions.settings, options.conditions.progress
    progress("comparing outputs", 0.5)
    compared = [_compared(dense, one.path, parts, feeds, settings.exact) for one in built]
    labels = ["factored"] if len(built) == 1 and built[0].layers else [one.name for one in built]
    times = bench(
        [dense, *(one.path for one in built)],
        replace(timing, io_binding=settings.on_gpu),
        settings,
        labels=["dense", *labels],
        progress=progress,
    )
    dense_size = _size(dense, timing, times.latencies[0].p50)
    points = []
    rows = zip(built, labels, compared, times.latencies[1:], times.ratios, strict=True)
    for one, label, (worst, aside), latency, ratio in rows:
        size = _size(one.plain, timing, latency.p50).model_copy(update={"bytes": bytes_of(one.path)})
        points.append(
            Point(
                name=one.name,
                precision=one.precision,
                layers=len(one.layers),
                spared=one.spared,
                size=size,
                ratios=_ratios(dense_size, size, ratio),
                unstable=any(w.startswith((f"{label}: unstable", "dense: unstable")) for w in times.warnings),
                approximation=worst,
                aside=aside,
            )
        )
    return dense_size, points, times


def _compared(
    dense: Path, path: Path, parts: Split | None, feeds: Feeds, settings: Session
) -> tuple[float | None, Agreement | None]:
    """Return how far outputs are from the dense ones at most, and how far they agree on the held-out inputs, if any are.

    There is no distance where an output has another shape, such as a list of boxes, or is not finite.
    """
    both = run_both(dense, path, inputs=feeds, settings=settings)
    agreement = None if parts is None or parts.judged is None else agreement_of(both, parts.judged.axes)
    try:
        return parity_of(both).worst, agreement
    except ModelError:
        return None, agreement


def _targets(plans: Sequence[Planned], options: Compression) -> dict[str, float]:
    """Return what was asked for."""
    if options.targets is not None:
        return dict(options.targets)
    return next((dict(one.targets) for one in plans if isinstance(one, PlanReport)), {})


def _plan(planned: Planned) -> Plan:
    return planned.plan if isinstance(planned, PlanReport) else planned


def _shaped(model: onnx.ModelProto, plan: Plan) -> onnx.ModelProto:
    """Return a model with the shapes of inner tensors in its file, or without, as the plan says."""
    return model if plan.inner_shapes else without_inner_shapes(model)


def _words(targets: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in targets.items())


def _saved(model: onnx.ModelProto, path: Path) -> Path:
    save_model(model, path)
    return path


def _feeds(dense: Path, parts: Split | None, options: Compression) -> Feeds:
    """Return the inputs that outputs are compared on: those held out, else those to fit to, else random ones."""
    if parts is not None:
        return list((parts.judged or parts.fitted.first(100)).feeds)
    session, timing = open_session(dense, settings=options.conditions.settings.exact), options.conditions.timing
    return [random_inputs(session, 7, shapes=timing.shapes, values=timing.values)]


def _scored(
    dense: Path, points: list[Point], built: Sequence[_Built], chosen: int, options: Compression
) -> tuple[list[Point], Comparison | None]:
    """Return the points with their mean scores, where there are labelled inputs, and the comparison of the chosen one."""
    if options.test is None:
        return points, None
    exact = options.conditions.settings.exact
    reference, *scores = [evaluate(path, options.test, settings=exact) for path in (dense, *(one.path for one in built))]
    scored = [point.model_copy(update={"score": own.mean}) for point, own in zip(points, scores, strict=True)]
    return scored, compare_scores(reference, scores[chosen])


def _size(path: Path, timing: Timing, milliseconds: float) -> Size:
    counted = cost(path, timing.batch, timing.shapes, timing.values)
    return Size(
        params=counted.params,
        macs=counted.macs,
        flops=counted.flops,
        bytes=counted.bytes,
        milliseconds=milliseconds,
    )


def _ratios(dense: Size, factored: Size, latency: Ratio) -> Ratios:
    return Ratios(
        **{name: times_less(dense, factored, name) for name in ("params", "macs", "flops", "bytes")},
        latency=latency.value,
        latency_low=latency.low,
        latency_high=latency.high,
    )
