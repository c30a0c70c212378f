"""Makes a faster model from an ONNX file alone: decompose, rewrite, check, time and report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from tensorrail_exporter.calibrate.inputs import Calibration
from tensorrail_exporter.calibrate.layerwise import LayerFit, fit
from tensorrail_exporter.calibrate.split import Split, split
from tensorrail_exporter.compressed import CompressReport, Ratios
from tensorrail_exporter.graphs.io import save_model
from tensorrail_exporter.plans.plan import Plan
from tensorrail_exporter.rewrite.resolve import ResolvedPlan, resolve
from tensorrail_exporter.rewrite.rewriter import Factored, decompose, rewrite, with_cores
from tensorrail_exporter.search.divergence import Divergence
from tensorrail_exporter.search.guard import Guard
from tensorrail_exporter.search.losses import check_metric, outputs_of
from tensorrail_exporter.search.report import PlanReport, Size, times_less
from tensorrail_exporter.search.targets import is_met
from tensorrail_runtime.errors import GraphError, PlanError
from tensorrail_runtime.graphs.cost import cost
from tensorrail_runtime.measure.accuracy import Comparison, Labelled, compare_scores, evaluate
from tensorrail_runtime.measure.agreement import agreement_of
from tensorrail_runtime.measure.latency import Ratio, bench
from tensorrail_runtime.measure.parity import parity, parity_of, run_both
from tensorrail_runtime.measure.timing import Conditions, Timing
from tensorrail_runtime.scratch import scratch
from tensorrail_runtime.sessions.inputs import random_inputs
from tensorrail_runtime.sessions.session import Session, open_session

Refine = Callable[[onnx.ModelProto, onnx.ModelProto, Plan, Calibration], onnx.ModelProto]
"""Fits a factored graph to the dense one's activations: (dense, factored, plan, calibration) → factored."""

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


def compress(model: onnx.ModelProto, plan: Plan | PlanReport, out: Path, options: Compression | None = None) -> CompressReport:
    """Write the factored model of a plan to `out`, and compare it with the dense one.

    Args:
        model: the dense graph.
        plan: the layers to rewrite; the report of a search also provides targets and predictions.
        out: the file to write.
        options: the inputs to fit and test with, and how the models are measured; default `Compression()`.

    Returns:
        Size, speed, accuracy and the errors of the factored model.

    Raises:
        PlanError: the plan names no layer, or there is a metric without calibration inputs that have labels.
        ModelError: the metric is unknown, fails, or gives other than one finite number per sample.
        GraphError: a layer is not in the graph or cannot be rewritten, or the factored graph differs from the graph with
            reconstructed weights by more than rounding; nothing is written.

    """
    options = options or Compression()
    planning, plan = (plan, plan.plan) if isinstance(plan, PlanReport) else (None, plan)
    timing, settings, progress = options.conditions.timing, options.conditions.settings, options.conditions.progress
    settings.check()
    exact = settings.exact
    if not plan.layers:
        raise PlanError("the plan names no layer, so there is nothing to rewrite; add a layer to it")
    options.guard.check()
    check_metric(options.metric, options.calibration)
    parts = None if options.calibration is None else split(options.calibration, model)
    with scratch() as folder:
        dense_path, path = Path(folder) / "dense.onnx", Path(folder) / "factored.onnx"
        save_model(model, dense_path)
        fitted = _fitted(resolve(model, plan), parts, options)
        factored, fits = fitted.factored, fitted.layers
        save_model(factored.model, path)
        feeds = _feeds(dense_path, parts, options)
        numerical = _numerical(fitted.resolved, fitted.cores, path, feeds, Path(folder), exact)
        rewritten = fitted.model
        save_model(rewritten, path)
        progress("comparing outputs", 0.5)
        both = run_both(dense_path, path, inputs=feeds, settings=exact)
        against = parity_of(both)
        times = bench(
            [dense_path, path],
            replace(timing, io_binding=settings.on_gpu),
            settings,
            labels=["dense", "factored"],
            progress=progress,
        )
        dense_size, size = (_size(p, timing, times.latencies[k].p50) for k, p in enumerate((dense_path, path)))
        accuracy = _accuracy(dense_path, path, options)
        aside = None if parts is None or parts.judged is None else agreement_of(both, parts.judged.axes)
    save_model(rewritten, out)
    ratios = _ratios(dense_size, size, times.ratios[0])
    targets = dict(planning.targets) if planning else {}
    return CompressReport(
        dense=dense_size,
        factored=size,
        ratios=ratios,
        targets=targets,
        meets=all(is_met(_reached(ratios, name, unstable=bool(times.warnings)), value) for name, value in targets.items()),
        predicted_latency=planning.predicted if planning else None,
        approximation=against.worst,
        top1_agreement=None if aside is None else aside.agreement,
        aside=aside,
        guard=options.guard,
        numerical=numerical,
        accuracy=accuracy,
        layers=factored.layers,
        planned=planning.rows if planning else (),
        fits=fits,
        latency=times,
        planning=planning,
        model=str(out),
    )


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


def _accuracy(dense: Path, factored: Path, options: Compression) -> Comparison | None:
    """Compare the accuracy of both models, where there are labelled inputs."""
    if options.test is None:
        return None
    exact = options.conditions.settings.exact
    return compare_scores(*(evaluate(path, options.test, settings=exact) for path in (dense, factored)))


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
