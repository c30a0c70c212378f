"""Makes a faster model from an ONNX file alone: decompose, rewrite, check, time and report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from tensorrail_exporter.calibrate.inputs import Calibration
from tensorrail_exporter.calibrate.layerwise import LayerFit, fit
from tensorrail_exporter.calibrate.split import Split, split
from tensorrail_exporter.compressed import CompressReport, Point, Ratios
from tensorrail_exporter.graphs.io import load_model, save_model
from tensorrail_exporter.plans.plan import Plan, Precision
from tensorrail_exporter.precision.int8 import Quantizer
from tensorrail_exporter.precision.islands import Islands, Judge, Layer, with_islands
from tensorrail_exporter.rewrite.resolve import ResolvedPlan, resolve
from tensorrail_exporter.rewrite.rewriter import Factored, decompose, rewrite, with_cores
from tensorrail_exporter.search.divergence import Divergence
from tensorrail_exporter.search.guard import Guard
from tensorrail_exporter.search.losses import agreement_between, check_metric, outputs_of
from tensorrail_exporter.search.report import PlanReport, Size, times_less
from tensorrail_exporter.search.targets import is_met
from tensorrail_runtime.errors import GraphError, PlanError
from tensorrail_runtime.graphs.cost import cost
from tensorrail_runtime.graphs.files import bytes_of
from tensorrail_runtime.measure.accuracy import Comparison, Labelled, compare_scores, evaluate
from tensorrail_runtime.measure.agreement import agreement_of
from tensorrail_runtime.measure.latency import LatencyReport, Ratio, bench
from tensorrail_runtime.measure.parity import parity, parity_of, run_both
from tensorrail_runtime.measure.timing import Conditions, Timing
from tensorrail_runtime.scratch import scratch
from tensorrail_runtime.sessions.inputs import random_inputs
from tensorrail_runtime.sessions.session import Session, open_session

Refine = Callable[[onnx.ModelProto, onnx.ModelProto, Plan, Calibration], onnx.ModelProto]
"""Fits a factored graph to the dense one's activations: (dense, factored, plan, calibration) → factored."""

Planned = Plan | PlanReport

_ROUNDING = 1e-4  # relative L2: allowed difference between reconstructed weights and their cores in float32
_ROUNDINGS = 8  # per layer of a narrower type: two cores, the vector between, the weight, both outputs; two for longer chains


@dataclass(frozen=True)
class Compression:
    """How a model is compressed and measured."""

    calibration: Calibration | None = None
    """Inputs; cores are fitted to three quarters and judged on the rest. Default: none, so each weight is decomposed alone."""
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
    """A score of each sample, as `top1` or `module:function`, that the fits of `refine` are judged by, on calibration inputs
    with labels; default: none, so they are judged by how far outputs are from the dense ones."""
    targets: Mapping[str, float] | None = None
    """What the written model must reach; default: the targets of the plan."""
    fastest: bool = False
    """Of several models, write the fastest one that agrees, and not the one that meets the targets with the least loss."""


def compress(
    model: onnx.ModelProto, plan: Planned | Sequence[Planned], out: Path, options: Compression | None = None
) -> CompressReport:
    """Write the factored model of a plan to `out`, and compare it with the dense one.

    Args:
        model: the dense graph.
        plan: the layers to rewrite; the report of a search also provides targets and predictions. Or several: the best model of
            these plans, and with one for int8 also of the dense network in int8, is written.
        out: the file to write.
        options: the inputs to fit and test with, and how the models are measured; default `Compression()`.

    Returns:
        Size, speed, accuracy and the errors of the model that was written, beside those of all that it was chosen from.

    Raises:
        PlanError: a plan names no layer, there are no calibration inputs for int8, or there is a metric without calibration
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
    targets = _targets(plans, options)
    with scratch() as folder:
        dense = Path(folder) / "dense.onnx"
        save_model(model, dense)
        feeds = _feeds(dense, parts, options)
        built = list(_built(model, plans, parts, options, feeds, dense))
        dense_size, points, times = _measured(dense, built, parts, options, feeds)
        unstable = bool(times.warnings)
        if len(built) > 1 and parts is not None:
            points = _with_losses(points, built, model, parts, options)
        k = _best(points, targets, options, unstable=unstable)
        points, accuracy = _scored(dense, points, built, k, options)
        chosen = load_model(built[k].path)
    save_model(chosen, out)
    one, point = built[k], points[k]
    network, planning = one.network, one.planning
    return CompressReport(
        dense=dense_size,
        factored=point.size,
        ratios=point.ratios,
        targets=targets,
        meets=_meets(point.ratios, targets, unstable=unstable),
        predicted_latency=planning.predicted if planning else None,
        approximation=point.approximation,
        top1_agreement=None if point.aside is None else point.aside.agreement,
        aside=point.aside,
        guard=options.guard,
        precision=one.precision,
        front=tuple(points) if len(points) > 1 else (),
        numerical=one.numerical,
        accuracy=accuracy,
        layers=() if network is None else network.factored.layers,
        planned=planning.rows if planning else (),
        fits=() if network is None else network.layers,
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
    planning: PlanReport | None
    network: _Network | None  # None: the dense network
    numerical: float
    plain: Path  # the same in fp32
    path: Path
    kept: tuple[str, ...] = ()  # nodes that stay in fp32 in the model in int8
    asked: str = ""  # the targets of the plan, where plans have different ones

    @property
    def name(self) -> str:
        """What the model is, for tables."""
        but = f" but for {len(self.kept)} of its products" if self.kept else ""
        return f"{'dense' if self.network is None else 'low rank'} in {self.precision}{but}{self.asked}"


def _built(
    model: onnx.ModelProto,
    plans: Sequence[Planned],
    parts: Split | None,
    options: Compression,
    feeds: list[Mapping[str, np.ndarray]],
    dense: Path,
) -> Iterator[_Built]:
    """Write the models to choose from beside the dense one."""
    folder = dense.parent
    exact = options.conditions.settings.exact
    if any(planned.precision == "int8" for planned in plans):
        if parts is None:
            raise PlanError("int8 needs typical inputs for the ranges of activations: give calibration inputs, 100 or more")
        judge = _judge(model, parts, options)
        try:
            small = _in_int8(model, dense, parts, options, judge)
        except GraphError as error:
            plans = [planned for planned in plans if planned.precision != "int8"]
            if not plans:
                raise
            options.conditions.progress("note", 1.0, f"int8 is left out: {error}")
        else:
            yield _Built("int8", None, None, 0.0, dense, _saved(small.model, folder / "dense-int8.onnx"), small.kept)
    different = {str(planned.targets) for planned in plans if isinstance(planned, PlanReport)}
    for number, planned in enumerate(plans):
        planning, plan = (planned, planned.plan) if isinstance(planned, PlanReport) else (None, planned)
        if not plan.layers:
            if len(plans) == 1 and plan.precision == "fp32":
                raise PlanError("the plan names no layer, so there is nothing to rewrite; add a layer to it")
            continue
        network = _fitted(resolve(model, plan), parts, options)
        kept: tuple[str, ...] = ()
        plain = path = _saved(network.factored.model, folder / f"factored{number}.onnx")
        numerical = _numerical(network.resolved, network.cores, path, feeds, folder, exact)
        save_model(network.model, plain)
        if plan.precision == "int8" and parts is not None:
            small = _in_int8(network.model, plain, parts, options, judge)
            path, kept = _saved(small.model, folder / f"int8-{number}.onnx"), small.kept
        asked = "" if planning is None or len(different) == 1 else f", for {_words(planning.targets)}"
        yield _Built(plan.precision, planning, network, numerical, plain, path, kept, asked)


def _in_int8(model: onnx.ModelProto, path: Path, parts: Split, options: Compression, judge: Judge) -> Islands:
    """Return a model in int8, with layers in fp32 where it would not agree as closely as asked for without them."""
    timing, progress = options.conditions.timing, options.conditions.progress
    macs = {node.name: node.macs for node in cost(path, timing.batch, timing.shapes, timing.values).layers}
    with Quantizer(model, parts.fitted.feeds) as quantizer:
        layers = [Layer(name, macs.get(name, 0)) for name in quantizer.layers()]

        def convert(keep: Sequence[str]) -> onnx.ModelProto:
            progress("converting to int8", 0.0, f"{len(keep)} of {len(layers)} products in fp32" if keep else "")
            return quantizer(keep)

        if judge(model)[1] and (found := with_islands(layers, convert, judge)).good:
            return found
        return Islands(quantizer(), (), good=False)  # what is lost is not lost to int8


def _judge(model: onnx.ModelProto, parts: Split, options: Compression) -> Judge:
    """Return a function that measures a network on the inputs that networks are chosen by, which ranges are not taken from."""
    settings, others = options.conditions.settings.exact, parts.chosen
    names = [output.name for output in model.graph.output]
    dense = outputs_of(model, names, others, settings)
    divergence = Divergence(names, dense, others.labels, options.metric, others.samples)

    def judge(small: onnx.ModelProto) -> tuple[float, bool]:
        outputs = outputs_of(small, names, others, settings)
        return divergence.of(outputs), not options.guard.refusal(agreement_between(dense, outputs, others))

    return judge


def _words(targets: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in targets.items())


def _measured(
    dense: Path, built: Sequence[_Built], parts: Split | None, options: Compression, feeds: list[Mapping[str, np.ndarray]]
) -> tuple[Size, list[Point], LatencyReport]:
    """Return the size of the dense model, the models as they were measured in turns with it, and their times."""
    timing, settings, progress = options.conditions.timing, options.conditions.settings, options.conditions.progress
    progress("comparing outputs", 0.5)
    times = bench(
        [dense, *(one.path for one in built)],
        replace(timing, io_binding=settings.on_gpu),
        settings,
        labels=["dense", *("factored" if len(built) == 1 else one.name for one in built)],
        progress=progress,
    )
    dense_size = _size(dense, timing, times.latencies[0].p50)
    points = []
    for one, latency, ratio in zip(built, times.latencies[1:], times.ratios, strict=True):
        both = run_both(dense, one.path, inputs=feeds, settings=settings.exact)
        size = _size(one.plain, timing, latency.p50).model_copy(update={"bytes": bytes_of(one.path)})
        points.append(
            Point(
                name=one.name,
                precision=one.precision,
                layers=0 if one.network is None else len(one.network.factored.layers),
                size=size,
                ratios=_ratios(dense_size, size, ratio),
                approximation=parity_of(both).worst,
                kept=one.kept,
                aside=None if parts is None or parts.judged is None else agreement_of(both, parts.judged.axes),
            )
        )
    return dense_size, points, times


def _with_losses(
    points: Sequence[Point], built: Sequence[_Built], model: onnx.ModelProto, parts: Split, options: Compression
) -> list[Point]:
    """Return the points with their losses and their agreement on the inputs that networks are chosen by."""
    settings, others = options.conditions.settings.exact, parts.chosen
    names = [output.name for output in model.graph.output]
    dense = outputs_of(model, names, others, settings)
    divergence = Divergence(names, dense, others.labels, options.metric, others.samples)
    found = []
    for point, one in zip(points, built, strict=True):
        outputs = outputs_of(load_model(one.path), names, others, settings)
        agreement = agreement_between(dense, outputs, others)
        found.append(point.model_copy(update={"loss": divergence.of(outputs), "chosen_by": agreement}))
    return found


def _best(points: Sequence[Point], targets: Mapping[str, float], options: Compression, *, unstable: bool) -> int:
    """Return the place of the model that meets the targets with the least loss, or of the fastest one that agrees.

    The loss is that on inputs that networks are chosen by. Where no model does, it is the one that comes nearest.
    """

    def rank(point: Point) -> tuple[bool, bool, float]:
        agrees = point.chosen_by is None or not options.guard.refusal(point.chosen_by)
        meets = _meets(point.ratios, targets, unstable=unstable) and point.ratios.latency_low > 1.0
        better = point.ratios.latency if options.fastest or not meets else -(point.loss or 0.0)
        return (agrees, meets, better) if options.fastest else (meets, agrees, better)

    return max(range(len(points)), key=lambda k: rank(points[k]))


def _targets(plans: Sequence[Planned], options: Compression) -> dict[str, float]:
    """Return what was asked for."""
    if options.targets is not None:
        return dict(options.targets)
    return next((dict(one.targets) for one in plans if isinstance(one, PlanReport)), {})


def _meets(ratios: Ratios, targets: Mapping[str, float], *, unstable: bool) -> bool:
    """Return whether all targets are met."""
    return all(is_met(_reached(ratios, name, unstable=unstable), value) for name, value in targets.items())


def _saved(model: onnx.ModelProto, path: Path) -> Path:
    save_model(model, path)
    return path


@dataclass(frozen=True)
class _Network:
    """A factored network, and what it was made of."""

    resolved: ResolvedPlan
    cores: Mapping[str, list[np.ndarray]]
    layers: tuple[LayerFit, ...]
    factored: Factored
    model: onnx.ModelProto  # the graph of `factored`, or the same with values that were fitted further


def _fitted(resolved: ResolvedPlan, parts: Split | None, options: Compression) -> _Network:
    """Return the factored network, fitted to the inputs that are not set aside.

    Each further fit sees a part of them, and is kept if the network is better for it on the rest.
    """
    if parts is None:
        return _factored(resolved, decompose(resolved), (), options)
    if not options.refine:
        return _layerwise(resolved, parts, options)
    settings, progress = options.conditions.settings.exact, options.conditions.progress
    names = [output.name for output in resolved.model.graph.output]
    dense = outputs_of(resolved.model, names, parts.chosen, settings)
    divergence = Divergence(names, dense, parts.chosen.labels, options.metric, parts.chosen.samples)
    network = _layerwise(resolved, parts, options, refit=False)
    shrinkages = {row.layer: row.shrinkage for row in network.layers if row.shrinkage is not None}
    start = least = divergence.of(outputs_of(network.model, names, parts.chosen, settings))
    for what, refine in options.refine.items():
        refined = _refined(refine, resolved.model, network, parts.fitted)
        loss = divergence.of(outputs_of(refined, names, parts.chosen, settings))
        if loss < least:
            network, least = replace(network, model=refined), loss
        else:
            progress("note", 1.0, f"{what} is left out: the network is not better for it on inputs that were held out")
    if least < start or parts.chosen is parts.fitted:
        return network
    return _layerwise(resolved, parts, options, shrinkages=shrinkages)


def _layerwise(
    resolved: ResolvedPlan,
    parts: Split,
    options: Compression,
    *,
    refit: bool = True,
    shrinkages: Mapping[str, float] | None = None,
) -> _Network:
    """Return the network with its layers fitted; with `shrinkages`, by layer name, none is chosen anew."""
    held_out = None if parts.chosen is parts.fitted else parts.chosen
    settings, progress = options.conditions.settings.exact, options.conditions.progress
    fitted = fit(resolved, parts.fitted, settings, held_out=held_out, refit=refit, shrinkage=shrinkages, progress=progress)
    return _factored(fitted.resolved, fitted.cores, fitted.layers, options)


def _factored(
    resolved: ResolvedPlan, cores: Mapping[str, list[np.ndarray]], layers: tuple[LayerFit, ...], options: Compression
) -> _Network:
    factored = rewrite(resolved, cores, scan=not options.conditions.settings.on_gpu)
    return _Network(resolved, cores, layers, factored, factored.model)


def _feeds(dense: Path, parts: Split | None, options: Compression) -> list[Mapping[str, np.ndarray]]:
    """Return the inputs that outputs are compared on: those set aside, or random ones where there are none."""
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


def _refined(refine: Refine, dense: onnx.ModelProto, network: _Network, inputs: Calibration) -> onnx.ModelProto:
    """Return the factored graph with refined values. Layers that run as a Scan are refined in a graph without Scan.

    If the refined tensors are not all stored in the graph with Scan, the graph without Scan is returned.
    """
    factored, resolved = network.factored, network.resolved
    if not any(layer.scan for layer in factored.layers):
        return refine(dense, network.model, resolved.plan, inputs)
    nodes = _with_values_of(network.model, rewrite(resolved, network.cores, scan=False).model)
    fitted = refine(dense, nodes, resolved.plan, inputs)
    before = {tensor.name: tensor for tensor in nodes.graph.initializer}
    changed = {tensor.name for tensor in fitted.graph.initializer if tensor != before.get(tensor.name)}
    if not changed <= {tensor.name for tensor in network.model.graph.initializer}:
        return fitted
    return _with_values_of(fitted, network.model)


def _with_values_of(other: onnx.ModelProto, model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a model that stores the values of another one, for the tensors that both store."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    stored = {tensor.name: tensor for tensor in copy.graph.initializer}
    for tensor in other.graph.initializer:
        if tensor.name in stored and list(tensor.dims) == list(stored[tensor.name].dims):
            stored[tensor.name].CopyFrom(tensor)
    return copy


def _numerical(
    base: ResolvedPlan,
    cores: Mapping[str, list[np.ndarray]],
    path: Path,
    feeds: list[Mapping[str, np.ndarray]],
    folder: Path,
    settings: Session,
) -> float:
    """Return the numerical error of the rewriting. Raises `GraphError` if it exceeds rounding."""
    reconstructed = folder / "reconstructed.onnx"
    save_model(with_cores(base, cores), reconstructed)
    error = parity(reconstructed, path, inputs=feeds[:1], tolerance=None, settings=settings).worst
    limit = _rounding(base)
    if not error <= limit:
        raise GraphError(
            f"expected the factored graph to differ by at most {limit:.1g} (relative L2) from the graph with reconstructed "
            f"weights, got {error:.1e}; remove layers from the plan until this check passes, and please report the model"
        )
    return error


def _rounding(resolved: ResolvedPlan) -> float:
    """Return the relative difference that rounding may cause in the coarsest type of the planned weights.

    Each rounding is at most the unit roundoff u (2⁻¹¹ in float16). Roundings within a layer add up, those of different
    layers are independent: 8 · u · √layers.
    """
    unit = max(float(np.finfo(layer.dtype).eps) / 2 for layer in resolved.layers.values())
    return max(_ROUNDING, _ROUNDINGS * unit * math.sqrt(len(resolved.layers)))


def _size(path: Path, timing: Timing, milliseconds: float) -> Size:
    counted = cost(path, timing.batch, timing.shapes, timing.values)
    return Size(
        params=counted.params,
        macs=counted.macs,
        flops=counted.flops,
        bytes=counted.bytes,
        milliseconds=milliseconds,
    )


def _reached(ratios: Ratios, target: str, *, unstable: bool) -> float:
    """Return the reduction factor that counts for a target: for unstable times, the lower end of the interval."""
    return float(ratios.latency_low if target == "latency" and unstable else getattr(ratios, target))


def _ratios(dense: Size, factored: Size, latency: Ratio) -> Ratios:
    return Ratios(
        **{name: times_less(dense, factored, name) for name in ("params", "macs", "flops", "bytes")},
        latency=latency.value,
        latency_low=latency.low,
        latency_high=latency.high,
    )
