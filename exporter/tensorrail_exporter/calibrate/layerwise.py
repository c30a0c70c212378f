"""Decomposition without training: layer by layer, each on the inputs that the already compressed network really gives it.

For every layer in the graph's order the outputs that the dense network had are compared with what the compressed network's
inputs can give: the best weight (with a ridge toward the dense one), cut to the plan's format in the metric of those inputs
(`metric.decompose`), and a bias that keeps the mean of every output. Errors of earlier layers are so made up for by later ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from tensorrail_exporter.calibrate import metric
from tensorrail_exporter.calibrate.inputs import Calibration, Sampler, Statistics, fits
from tensorrail_exporter.calibrate.progressive import ProgressiveNetwork
from tensorrail_exporter.plans.plan import LayerPlan, Plan
from tensorrail_exporter.rewrite.biases import add_biases, takes_bias
from tensorrail_exporter.rewrite.resolve import ResolvedPlan, resolve
from tensorrail_exporter.rewrite.rewriter import check_finite, decompose
from tensorrail_exporter.rewrite.survey import DenseLayer, dense_layer
from tensorrail_runtime.errors import GraphError
from tensorrail_runtime.progress import Progress, silent
from tensorrail_runtime.records import Record
from tensorrail_runtime.sessions.session import Session

_RIDGE = 0.01  # of the mean eigenvalue of the inputs' second moment


class LayerFit(Record):
    """What the calibration made of one layer: shares of the variance of its outputs that are lost."""

    layer: str
    rows: int  # sampled patches behind the moments; 0: cut from the weight alone, and `why`
    plain: float | None  # by the format's own decomposition of the weight
    fitted: float | None  # by the cores that came out, their bias included
    bias: bool
    why: str = ""


@dataclass(frozen=True)
class Fitted:
    """A dense graph whose biases fit the cores, as the plan was found in it; the cores, and how well they keep each layer."""

    resolved: ResolvedPlan
    cores: dict[str, list[np.ndarray]]
    layers: tuple[LayerFit, ...]

    @property
    def model(self) -> onnx.ModelProto:
        """The dense graph."""
        return self.resolved.model


def fit_layers(
    model: onnx.ModelProto,
    plan: Plan,
    calibration: Calibration,
    settings: Session | None = None,
    *,
    ridge: float = _RIDGE,
    progress: Progress = silent,
) -> Fitted:
    """Return cores for every planned layer, fitted in the order of the graph to the outputs of the dense network.

    A layer whose patches are too wide for a full second moment, or that is in the body of a node, is decomposed from its weight
    alone, and its row says so.

    Args:
        model: the dense graph.
        plan: the layers, formats, modes and ranks.
        calibration: inputs of the network.
        settings: how the network runs; default: the CPU provider.
        ridge: weight of the pull toward the dense weight, as a share of the mean eigenvalue of the inputs' second moment.
        progress: told which layer is fitted.

    Returns:
        The graph with the biases that fit the cores, the cores, and how well each layer keeps its outputs.

    Raises:
        GraphError: a layer is not in the graph or cannot be rewritten, or the calibration has no samples or outputs that are
            not finite.

    """
    return fit(resolve(model, plan), calibration, settings, ridge=ridge, progress=progress)


def fit(
    resolved: ResolvedPlan,
    calibration: Calibration,
    settings: Session | None = None,
    *,
    ridge: float = _RIDGE,
    progress: Progress = silent,
) -> Fitted:
    """Do what `fit_layers` does for a plan that was resolved; it is not changed."""
    if not calibration.count:
        raise GraphError("expected one or more batches of calibration inputs, got none")
    settings = settings or Session()
    cores = decompose(resolved)  # for the layers that cannot be fitted
    uses = _uses(resolved.copy())
    able = {name: found for name, found in uses.items() if found and fits(found[0].spec)}
    weights = dense_weights(resolved, able)
    samplers = {name: [Sampler(use, calibration.count * len(found)) for use in found] for name, found in able.items()}
    biases: dict[str, np.ndarray] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        inputs = {name: [use.input_name for use in found] for name, found in able.items()}
        network = ProgressiveNetwork(resolved, inputs, calibration.feeds, settings, Path(folder))
        wanted = _outputs(network, weights, samplers)
        for number, (name, found) in enumerate(uses.items()):
            progress("fitting layers", number / len(uses), name)
            layer = resolved.layers[name]
            if name in able:
                statistics = _statistics(network, name, weights[name], samplers[name], wanted.pop(name))
                biased = takes_bias(layer)
                cores[name], bias, row = _fit(layer.plan, weights[name], cores[name], statistics, ridge, biased=biased)
                if bias is not None:
                    biases[name] = bias
            else:
                why = "its patches are too wide for a full second moment" if found else "in the body of a node"
                row = LayerFit(layer=name, rows=0, plain=None, fitted=None, bias=False, why=why)
            rows.append(row)
            network.replace(name, np.asarray(layer.plan.reconstruct(cores[name], layer.spec.shape)), biases.get(name))
    progress("fitting layers", 1.0)
    return Fitted(add_biases(resolved, biases), cores, tuple(rows))


def dense_weights(resolved: ResolvedPlan, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Return the weights (O, I, *K) of planned layers, float32; `GraphError` for one that holds NaN or infinite values.

    `names` are those of the layers, None for all of the plan.
    """
    found = {}
    for name in resolved.layers if names is None else names:
        found[name] = np.array(resolved.layers[name].weight, np.float32)
        check_finite(name, found[name])
    return found


def _uses(folded: ResolvedPlan) -> dict[str, list[DenseLayer]]:
    """Return for each planned layer, in the graph's order, its nodes outside of bodies: several where they share the weight."""
    graph = folded.graph
    return {
        layer.plan.name: [
            dense_layer(layer.plan.name, graph, layer.rule, [site]) for site in layer.sites if site.graph is graph
        ]
        for layer in folded.in_graph_order
    }


def _rows(samplers: list[Sampler], values: Mapping[str, np.ndarray], batch: int) -> np.ndarray:
    """Return the rows of all nodes of a layer on one batch."""
    return np.concatenate([sampler.rows(values[sampler.layer.input_name], batch) for sampler in samplers])


def _outputs(
    network: ProgressiveNetwork, weights: Mapping[str, np.ndarray], samplers: Mapping[str, list[Sampler]]
) -> dict[str, list[np.ndarray]]:
    """Return for each layer what the dense network gives at the sampled places (rows, O), bias left out, batch by batch."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in samplers}
    for k, values in enumerate(network.dense()):
        for name, own in samplers.items():
            found[name].append(_rows(own, values, k) @ weights[name].reshape(len(weights[name]), -1).T)
    return found


def _statistics(
    network: ProgressiveNetwork, name: str, weight: np.ndarray, samplers: list[Sampler], wanted: list[np.ndarray]
) -> Statistics:
    """Return the sums over a layer's inputs as they are now; `GraphError` for values that are not finite."""
    statistics = Statistics(weight[0].size, len(weight))
    for k, values in enumerate(network.inputs_of(name)):
        statistics.add(_rows(samplers, values, k), wanted[k])
    if not np.isfinite(statistics.yy) or not np.isfinite(statistics.x).all():
        raise GraphError(
            f"layer {name}: its inputs or outputs on the calibration data hold NaN or infinite values; check the data"
        )
    return statistics


def _fit(
    part: LayerPlan, weight: np.ndarray, plain: list[np.ndarray], statistics: Statistics, ridge: float, *, biased: bool
) -> tuple[list[np.ndarray], np.ndarray | None, LayerFit]:
    moments = statistics.moments(centred=biased)
    target = statistics.best(weight, moments, centred=biased, ridge=ridge)
    cores = metric.decompose(part, target, moments)
    fitted, before = part.reconstruct(cores, weight.shape), part.reconstruct(plain, weight.shape)
    if not statistics.lost(fitted, centred=biased) <= statistics.lost(before, centred=biased):
        cores, fitted = plain, before  # of rows that say next to nothing
    row = LayerFit(
        layer=part.name,
        rows=statistics.count,
        plain=statistics.lost(before, centred=False),
        fitted=statistics.lost(fitted, centred=biased),
        bias=biased,
    )
    return cores, statistics.bias(fitted) if biased else None, row
