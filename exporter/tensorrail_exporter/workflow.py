"""A faster model from nothing but an ONNX file: decompose, rewrite, check, time, and say what came of it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
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
from tensorrail_exporter.search.planner import PlannedLayer
from tensorrail_runtime.errors import GraphError, PlanError
from tensorrail_runtime.graphs.cost import cost
from tensorrail_runtime.measure.accuracy import Comparison, compare_scores, evaluate
from tensorrail_runtime.measure.latency import LatencyReport, bench_fresh
from tensorrail_runtime.measure.parity import parity
from tensorrail_runtime.records import Record
from tensorrail_runtime.sessions.inputs import Shapes, random_inputs
from tensorrail_runtime.sessions.session import Session, open_session

Refine = Callable[[onnx.ModelProto, onnx.ModelProto, Plan, Calibration], onnx.ModelProto]
"""Fits a factored graph to the dense one's activations: (dense, factored, plan, calibration) → factored."""

_ROUNDING = 1e-4  # relative: what may differ between reconstructed weights and their cores in float32
_ROUNDINGS = 8  # in a layer of a narrower type: two cores, the vector between, the weight, both outputs; two for longer chains


class Size(Record):
    """What one model weighs and costs at the batch size of the report. FLOPs are 2 × MACs; milliseconds are the median."""

    params: int
    macs: int
    flops: int
    bytes: int
    milliseconds: float


class Times(Record):
    """Dense over factored. `latency` is measured, with its 95 % interval; the others are counted."""

    params: float
    macs: float
    flops: float
    bytes: float
    latency: float
    latency_low: float
    latency_high: float


class CompressReport(Record):
    """What `compress` made, against the dense model."""

    version: Literal[1] = 1
    dense: Size
    factored: Size
    ratios: Times
    targets: dict[str, float]
    meets: bool
    predicted_latency: float | None  # the speed-up that the latency table predicted
    approximation: float  # relative L2 of the outputs, factored against dense, on the calibration or random inputs
    top1_agreement: float | None
    numerical: float  # relative L2, reconstructed weights against their cores, before any fit
    accuracy: Comparison | None
    layers: tuple[LayerRewrite, ...]
    planned: tuple[PlannedLayer, ...]
    fits: tuple[LayerFit, ...]
    latency: LatencyReport
    reduced: tuple[PrecisionReport, ...] = ()  # the factored model in fp16 or int8, beside itself in fp32

    @property
    def faster(self) -> bool:
        """Whether the whole interval of the measured speed-up lies above 1."""
        return self.ratios.latency_low > 1.0


def compress(
    model: onnx.ModelProto,
    plan: Plan,
    out: Path,
    *,
    targets: Mapping[str, float] | None = None,
    planned: tuple[PlannedLayer, ...] = (),
    predicted: float | None = None,
    calibration: Calibration | None = None,
    test: tuple[Mapping[str, np.ndarray], np.ndarray] | None = None,
    refine: Refine | None = None,
    settings: Session | None = None,
    batch: int = 1,
    shapes: Shapes | None = None,
    seconds: float = 10.0,
    on_stage: Callable[[str, float], None] = lambda _, __: None,
) -> CompressReport:
    """Write the factored model of a plan to `out`, and return the report.

    With calibration inputs the cores are fitted layer by layer, and `refine` goes on from there; without, each weight is
    decomposed by itself. `test` holds arrays by input name and labels (N,). Raises `GraphError` when the factored graph does
    not compute what its cores stand for: nothing is written then.
    """
    settings = settings or Session()
    settings.check()
    exact = settings.exact
    if not plan.layers:
        raise PlanError("the plan names no layer: there is nothing to rewrite")
    base = resolve(model, plan)
    if calibration is not None:
        fitted = fit(base, calibration, exact, on_share=lambda share, what: on_stage(f"fitting {what}", share))
        base, cores, fits = fitted.resolved, fitted.cores, fitted.layers
    else:
        cores, fits = decompose(base), ()
    factored = rewrite(base, cores, scan=not settings.on_gpu)
    with tempfile.TemporaryDirectory() as folder:
        dense_path, path = Path(folder) / "dense.onnx", Path(folder) / "factored.onnx"
        save_model(model, dense_path)
        save_model(factored.model, path)
        session = open_session(dense_path, settings=exact)
        feeds: list[Mapping[str, np.ndarray]]
        feeds = list(calibration.first(100).feeds) if calibration is not None else [random_inputs(session, 7, shapes=shapes)]
        numerical = _numerical(base, cores, path, feeds, Path(folder), exact)
        made = factored.model
        if refine is not None and calibration is not None:
            made = _refined(refine, model, base, cores, factored, calibration)
            save_model(made, path)
        on_stage("comparing", 0.5)
        against = parity(dense_path, path, inputs=feeds, tolerance=None, settings=exact)
        on_stage("timing", 0.0)
        times = bench_fresh(
            [dense_path, path],
            batch=batch,
            seconds=seconds,
            settings=settings,
            io_binding=settings.on_gpu,
            shapes=shapes,
            labels=["dense", "factored"],
        )
        sizes = [_size(p, batch, shapes, times.latencies[k].p50) for k, p in enumerate((dense_path, path))]
        accuracy = None
        if test is not None:
            scores = [evaluate(p, test[0], test[1], settings=exact) for p in (dense_path, path)]
            accuracy = compare_scores(*scores)
    save_model(made, out)
    ratio = times.ratios[0]
    ratios = Times(
        **{name: _times(getattr(sizes[0], name), getattr(sizes[1], name)) for name in ("params", "macs", "flops", "bytes")},
        latency=ratio.value,
        latency_low=ratio.low,
        latency_high=ratio.high,
    )
    wanted = dict(targets or {})
    return CompressReport(
        dense=sizes[0],
        factored=sizes[1],
        ratios=ratios,
        targets=wanted,
        meets=all(_reached(ratios, name) >= value * 0.99 for name, value in wanted.items()),
        predicted_latency=predicted,
        approximation=against.worst,
        top1_agreement=against.outputs[0].top1_agreement,
        numerical=numerical,
        accuracy=accuracy,
        layers=factored.layers,
        planned=planned,
        fits=fits,
        latency=times,
    )


def _refined(
    refine: Refine,
    model: onnx.ModelProto,
    base: ResolvedPlan,
    cores: Mapping[str, list[np.ndarray]],
    factored: Factored,
    calibration: Calibration,
) -> onnx.ModelProto:
    """Return the factored graph with refined values; where a layer is a Scan, which no fit runs, they are found without it.

    A fit that changes what is not stored in the graph of Scans is kept as the graph without them.
    """
    if not any(layer.scan for layer in factored.layers):
        return refine(model, factored.model, base.plan, calibration)
    nodes = rewrite(base, cores, scan=False).model
    fitted = refine(model, nodes, base.plan, calibration)
    before = {tensor.name: tensor for tensor in nodes.graph.initializer}
    changed = {tensor.name: tensor for tensor in fitted.graph.initializer if tensor != before.get(tensor.name)}
    made = onnx.ModelProto()
    made.CopyFrom(factored.model)
    places = {tensor.name: tensor for tensor in made.graph.initializer}
    if not changed.keys() <= places.keys():
        return fitted
    for name, tensor in changed.items():
        places[name].CopyFrom(tensor)
    return made


def _numerical(
    base: ResolvedPlan,
    cores: Mapping[str, list[np.ndarray]],
    path: Path,
    feeds: list[Mapping[str, np.ndarray]],
    folder: Path,
    settings: Session,
) -> float:
    """Return the error of the rewriting itself; `GraphError` when it is more than rounding."""
    joined = folder / "reconstructed.onnx"
    save_model(with_cores(base, cores), joined)
    found = parity(joined, path, inputs=feeds[:1], tolerance=None, settings=settings).worst
    most = _rounding(base)
    if not found <= most:
        raise GraphError(
            f"the factored graph differs from what its cores stand for by {found:.1e}, relative; at most {most:.1g} "
            "was expected: leave layers out of the plan until it holds, and report the model"
        )
    return found


def _rounding(resolved: ResolvedPlan) -> float:
    """Return the relative difference that rounding may make in the coarsest type of the planned weights.

    The roundings of a layer, each at most the unit roundoff u (2⁻¹¹ in float16), are taken to add up, those of different layers
    to be independent: 8 · u · √layers.
    """
    unit = max(float(np.finfo(layer.dtype).eps) / 2 for layer in resolved.layers.values())
    return max(_ROUNDING, _ROUNDINGS * unit * math.sqrt(len(resolved.layers)))


def _size(path: Path, batch: int, shapes: Shapes | None, milliseconds: float) -> Size:
    found = cost(path, batch, shapes)
    return Size(params=found.params, macs=found.macs, flops=found.flops, bytes=found.bytes, milliseconds=milliseconds)


def _times(before: int, after: int) -> float:
    return before / after if after else 1.0  # none before either: a body's products are not counted


def _reached(ratios: Times, name: str) -> float:
    return float(getattr(ratios, name))
