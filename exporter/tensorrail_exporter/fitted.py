"""Makes the factored network of one plan: layer by layer, then fitted further, each fit kept only if it helps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from tensorrail_exporter.calibrate.inputs import Calibration
from tensorrail_exporter.calibrate.layerwise import LayerFit, fit
from tensorrail_exporter.calibrate.split import Split
from tensorrail_exporter.graphs.io import save_model
from tensorrail_exporter.graphs.rounding import rounding_of
from tensorrail_exporter.plans.plan import Plan
from tensorrail_exporter.rewrite.resolve import ResolvedPlan
from tensorrail_exporter.rewrite.rewriter import Factored, decompose, rewrite, with_cores
from tensorrail_exporter.search.judge import Judge
from tensorrail_runtime.errors import GraphError
from tensorrail_runtime.measure.parity import parity
from tensorrail_runtime.progress import Progress, silent
from tensorrail_runtime.sessions.session import Session

Refine = Callable[[onnx.ModelProto, onnx.ModelProto, Plan, Calibration], onnx.ModelProto]
"""Fits a factored graph to the dense one's activations: (dense, factored, plan, calibration) → factored."""

_ROUNDING = 1e-4  # relative L2: allowed difference between reconstructed weights and their cores in float32
_ROUNDINGS = 8  # per layer of a narrower type: two cores, the vector between, the weight, both outputs; two for longer chains


@dataclass(frozen=True)
class Fitting:
    """How networks are fitted."""

    refine: Mapping[str, Refine] = field(default_factory=dict)
    """Further fits of the factored graph, by what they are called, in order; default: none."""
    judge: Judge | None = None
    """Measures networks on the inputs that are held out; further fits need it. Default: none."""
    settings: Session = field(default_factory=Session)
    """How networks run; outputs are compared with `settings.exact`."""
    progress: Progress = silent
    """Told how far the work is."""
    refit: bool = True
    """Whether layers are fitted once more to the inputs that were held out, when these have served; default True."""


@dataclass(frozen=True)
class Network:
    """A factored network, and what it was made of."""

    resolved: ResolvedPlan
    cores: Mapping[str, list[np.ndarray]]
    layers: tuple[LayerFit, ...]
    factored: Factored
    model: onnx.ModelProto  # the graph of `factored`, or the same with values that were fitted further


def fitted(resolved: ResolvedPlan, parts: Split | None, how: Fitting) -> Network:
    """Return the factored network, fitted to the inputs that are not held out.

    Each further fit sees a part of them, and is kept if the network is better for it on the rest. Where there are too few to
    hold some out, there is no further fit.
    """
    if parts is None:
        return _factored(resolved, decompose(resolved), (), how)
    loops = [name for name, layer in resolved.layers.items() if layer.spec.state_products]
    reason = ""
    if loops:
        reason = f"those of {', '.join(loops)} run in a Scan, which no fit in torch runs"
    elif not parts.holds_out:
        reason = "there are too few calibration inputs to hold some out, on which further fits are judged; give more"
    if reason and how.refine:
        how.progress("note", 1.0, f"cores are not fitted further: {reason}")
    if reason or not how.refine or how.judge is None:
        return _layerwise(resolved, parts, how, refit=how.refit)
    network = _layerwise(resolved, parts, how, refit=False)
    shrinkages = {row.layer: row.shrinkage for row in network.layers if row.shrinkage is not None}
    start = least = how.judge.loss(network.model)
    for what, refine in how.refine.items():
        refined = _refined(refine, resolved.model, network, parts.fitted)
        loss = how.judge.loss(refined)
        if loss < least:
            network, least = replace(network, model=refined), loss
        else:
            how.progress("note", 1.0, f"{what} is left out: the network is not better for it on inputs that were held out")
    if least < start or not how.refit:
        return network
    return _layerwise(resolved, parts, how, shrinkages=shrinkages)


def _layerwise(
    resolved: ResolvedPlan,
    parts: Split,
    how: Fitting,
    *,
    refit: bool = True,
    shrinkages: Mapping[str, float] | None = None,
) -> Network:
    """Return the network with its layers fitted; with `shrinkages`, by layer name, none is chosen anew."""
    held_out = parts.chosen if parts.holds_out else None
    settings, progress = how.settings.exact, how.progress
    fitted = fit(resolved, parts.fitted, settings, held_out=held_out, refit=refit, shrinkage=shrinkages, progress=progress)
    return _factored(fitted.resolved, fitted.cores, fitted.layers, how)


def _factored(
    resolved: ResolvedPlan, cores: Mapping[str, list[np.ndarray]], layers: tuple[LayerFit, ...], how: Fitting
) -> Network:
    factored = rewrite(resolved, cores, scan=not how.settings.on_gpu)
    return Network(resolved, cores, layers, factored, factored.model)


def numerical_error(
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
    error = rounding_of(parity(reconstructed, path, inputs=feeds[:1], tolerance=None, settings=settings))
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


def _refined(refine: Refine, dense: onnx.ModelProto, network: Network, inputs: Calibration) -> onnx.ModelProto:
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
