"""Makes a faster model from an ONNX file alone: decompose, rewrite, check, time and report."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx

from tensorrail_exporter.calibrate.inputs import Calibration
from tensorrail_exporter.calibrate.layerwise import LayerFit, fit
from tensorrail_exporter.graphs.io import save_model
from tensorrail_exporter.plans.plan import Plan
from tensorrail_exporter.precision.reduce import PrecisionReport
from tensorrail_exporter.rewrite.resolve import ResolvedPlan, resolve
from tensorrail_exporter.rewrite.rewriter import Factored, LayerRewrite, decompose, rewrite, with_cores
from tensorrail_exporter.search.report import PlannedLayer, PlanReport, Size, times_less
from tensorrail_exporter.search.targets import is_met
from tensorrail_runtime.errors import GraphError, PlanError
from tensorrail_runtime.graphs.cost import cost
from tensorrail_runtime.measure.accuracy import Comparison, Labelled, compare_scores, evaluate
from tensorrail_runtime.measure.latency import LatencyReport, Ratio, bench
from tensorrail_runtime.measure.parity import parity
from tensorrail_runtime.measure.timing import Conditions, Timing
from tensorrail_runtime.records import Record
from tensorrail_runtime.sessions.inputs import random_inputs
from tensorrail_runtime.sessions.session import Session, open_session
from tensorrail_runtime.tables import Part, PrintedRecord, Table

Refine = Callable[[onnx.ModelProto, onnx.ModelProto, Plan, Calibration], onnx.ModelProto]
"""Fits a factored graph to the dense one's activations: (dense, factored, plan, calibration) → factored."""

_ROUNDING = 1e-4  # relative L2: allowed difference between reconstructed weights and their cores in float32
_ROUNDINGS = 8  # per layer of a narrower type: two cores, the vector between, the weight, both outputs; two for longer chains


class Ratios(Record):
    """Dense divided by factored. `latency` is measured, with its 95 % interval; the others are counted."""

    params: float
    macs: float
    flops: float
    bytes: float
    latency: float
    latency_low: float
    latency_high: float


class CompressReport(PrintedRecord):
    """The model that `compress` wrote, compared with the dense model."""

    version: Literal[1] = 1
    dense: Size
    factored: Size
    ratios: Ratios
    targets: dict[str, float]
    meets: bool
    predicted_latency: float | None  # the speed-up that the latency table predicted
    approximation: float  # relative L2 error of the outputs against the dense model, on calibration or random inputs
    top1_agreement: float | None
    numerical: float  # relative L2 error of the cores against reconstructed weights, before refining
    accuracy: Comparison | None
    layers: tuple[LayerRewrite, ...]
    planned: tuple[PlannedLayer, ...]
    fits: tuple[LayerFit, ...]
    latency: LatencyReport
    reduced: tuple[PrecisionReport, ...] = ()  # the factored model in fp16 or int8, compared with fp32
    planning: PlanReport | None = None  # how the plan was chosen, if a target was given
    model: str = ""  # the file that was written

    @property
    def faster(self) -> bool:
        """Whether the whole interval of the measured speed-up lies above 1."""
        return self.ratios.latency_low > 1.0

    def shown(self) -> tuple[Part, ...]:
        """Return the plan, the table of both models, the errors, and the models in reduced precision."""
        dense, factored, ratios = self.dense, self.factored, self.ratios
        rows = [
            ("parameters", f"{dense.params:,}", f"{factored.params:,}", f"÷ {ratios.params:.2f}"),
            ("FLOPs (2 × MACs)", f"{dense.flops:,}", f"{factored.flops:,}", f"÷ {ratios.flops:.2f}"),
            ("file (bytes)", f"{dense.bytes:,}", f"{factored.bytes:,}", f"÷ {ratios.bytes:.2f}"),
            (
                f"latency p50 (ms), batch {self.latency.batch}",
                f"{dense.milliseconds:.3f}",
                f"{factored.milliseconds:.3f}",
                f"{ratios.latency:.2f}× [{ratios.latency_low:.2f}, {ratios.latency_high:.2f}]",
            ),
        ]
        if (paired := self.accuracy) is not None:
            before, after = (f"{100 * side.mean:.2f} %" for side in (paired.reference, paired.candidate))
            rows.append((f"{paired.reference.metric} accuracy", before, after, f"{100 * paired.difference:+.2f} points"))
        parts: list[Part] = list(self.planning.shown()) if self.planning else []
        parts.append(Table(self.model, ("quantity", "dense", "factored", "dense against factored"), rows))
        agreement = "" if self.top1_agreement is None else f"; top-1 agrees on {100 * self.top1_agreement:.1f} %"
        parts.append(
            f"outputs differ by {self.approximation:.2e} (relative L2){agreement}; "
            f"numerical error of the rewriting {self.numerical:.1e}"
        )
        if not self.faster:
            parts.append("NOT measured to be faster than the dense model")
        if not self.meets:
            targets = ", ".join(f"{name}={value:g}" for name, value in self.targets.items())
            parts.append(f"target {targets} was NOT reached")
        return (*parts, *(part for report in self.reduced for part in report.shown()))


@dataclass(frozen=True)
class Compression:
    """How a model is compressed and measured."""

    calibration: Calibration | None = None
    """Inputs that cores are fitted to, layer by layer; default: none, so each weight is decomposed on its own."""
    refine: Refine | None = None
    """A function that fits the factored graph further to the calibration inputs; default: none."""
    test: Labelled | None = None
    """Labelled inputs to measure the accuracy on; nothing is fitted to them."""
    conditions: Conditions = field(default_factory=lambda: Conditions(Timing(processes=5)))
    """How models run and how latency is measured; default: 5 processes on the CPU provider."""


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
        PlanError: the plan names no layer.
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
    base, cores, fits = _with_cores(resolve(model, plan), options)
    factored = rewrite(base, cores, scan=not settings.on_gpu)
    with tempfile.TemporaryDirectory() as folder:
        dense_path, path = Path(folder) / "dense.onnx", Path(folder) / "factored.onnx"
        save_model(model, dense_path)
        save_model(factored.model, path)
        feeds = _feeds(dense_path, options)
        numerical = _numerical(base, cores, path, feeds, Path(folder), exact)
        rewritten = factored.model
        if options.refine is not None and options.calibration is not None:
            rewritten = _refined(options.refine, model, base, cores, factored, options.calibration)
            save_model(rewritten, path)
        progress("comparing outputs", 0.5)
        against = parity(dense_path, path, inputs=feeds, tolerance=None, settings=exact)
        times = bench(
            [dense_path, path],
            replace(timing, io_binding=settings.on_gpu),
            settings,
            labels=["dense", "factored"],
            progress=progress,
        )
        dense_size, size = (_size(p, timing, times.latencies[k].p50) for k, p in enumerate((dense_path, path)))
        accuracy = _accuracy(dense_path, path, options)
    save_model(rewritten, out)
    ratios = _ratios(dense_size, size, times.ratios[0])
    targets = dict(planning.targets) if planning else {}
    return CompressReport(
        dense=dense_size,
        factored=size,
        ratios=ratios,
        targets=targets,
        meets=all(is_met(float(getattr(ratios, name)), value) for name, value in targets.items()),
        predicted_latency=planning.predicted if planning else None,
        approximation=against.worst,
        top1_agreement=against.outputs[0].top1_agreement,
        numerical=numerical,
        accuracy=accuracy,
        layers=factored.layers,
        planned=planning.rows if planning else (),
        fits=fits,
        latency=times,
        planning=planning,
        model=str(out),
    )


def _with_cores(
    resolved: ResolvedPlan, options: Compression
) -> tuple[ResolvedPlan, Mapping[str, list[np.ndarray]], tuple[LayerFit, ...]]:
    """Return the plan in its graph, its cores, and how well each layer was fitted, where there are calibration inputs."""
    if options.calibration is None:
        return resolved, decompose(resolved), ()
    conditions = options.conditions
    fitted = fit(resolved, options.calibration, conditions.settings.exact, progress=conditions.progress)
    return fitted.resolved, fitted.cores, fitted.layers


def _feeds(dense: Path, options: Compression) -> list[Mapping[str, np.ndarray]]:
    """Return the inputs that outputs are compared on: calibration inputs, or random ones where there are none."""
    if options.calibration is not None:
        return list(options.calibration.first(100).feeds)
    session = open_session(dense, settings=options.conditions.settings.exact)
    return [random_inputs(session, 7, shapes=options.conditions.timing.shapes)]


def _accuracy(dense: Path, factored: Path, options: Compression) -> Comparison | None:
    """Compare the accuracy of both models, where there are labelled inputs."""
    if options.test is None:
        return None
    exact = options.conditions.settings.exact
    return compare_scores(*(evaluate(path, options.test, settings=exact) for path in (dense, factored)))


def _refined(
    refine: Refine,
    model: onnx.ModelProto,
    base: ResolvedPlan,
    cores: Mapping[str, list[np.ndarray]],
    factored: Factored,
    calibration: Calibration,
) -> onnx.ModelProto:
    """Return the factored graph with refined values. Layers that run as a Scan are refined in a graph without Scan.

    If the refined tensors are not all stored in the graph with Scan, the graph without Scan is returned.
    """
    if not any(layer.scan for layer in factored.layers):
        return refine(model, factored.model, base.plan, calibration)
    nodes = rewrite(base, cores, scan=False).model
    fitted = refine(model, nodes, base.plan, calibration)
    before = {tensor.name: tensor for tensor in nodes.graph.initializer}
    changed = {tensor.name: tensor for tensor in fitted.graph.initializer if tensor != before.get(tensor.name)}
    refined = onnx.ModelProto()
    refined.CopyFrom(factored.model)
    stored = {tensor.name: tensor for tensor in refined.graph.initializer}
    if not changed.keys() <= stored.keys():
        return fitted
    for name, tensor in changed.items():
        stored[name].CopyFrom(tensor)
    return refined


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
    counted = cost(path, timing.batch, timing.shapes)
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
