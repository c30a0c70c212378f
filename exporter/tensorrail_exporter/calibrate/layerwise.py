"""Decomposition without training: layer by layer, each on the inputs that the already compressed network really gives it.

For every layer in the graph's order the outputs that the dense network had are compared with what the compressed network's
inputs can give: the best weight (with a ridge toward the dense one), cut to the plan's format in the metric of those inputs
(`metric.decompose`), and a bias that keeps the mean of every output. Errors of earlier layers are so made up for by later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from tensorrail_exporter.calibrate import metric
from tensorrail_exporter.calibrate.inputs import Calibration, Sampler, Statistics, fits, run_to
from tensorrail_exporter.graphs.io import export_graph
from tensorrail_exporter.plans.plan import LayerPlan, Plan
from tensorrail_exporter.rewrite.resolve import ResolvedLayer, ResolvedPlan, resolve
from tensorrail_exporter.rewrite.rewriter import check_finite, decompose, with_weights
from tensorrail_exporter.rewrite.survey import DenseLayer, dense_layer
from tensorrail_runtime.errors import GraphError
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
    on_share: Callable[[float, str], None] = lambda _, __: None,
) -> Fitted:
    """Return cores for every planned layer, fitted in the graph's order to the outputs of the dense network.

    A layer whose patches are too wide for a full second moment, or that stands in the body of a node, is decomposed from
    its weight alone, and its row says so. Raises `GraphError` as `decompose_graph` does, and for a calibration without
    samples or with outputs that are not finite.
    """
    return fit(resolve(model, plan), calibration, settings, ridge=ridge, on_share=on_share)


def fit(
    resolved: ResolvedPlan,
    calibration: Calibration,
    settings: Session | None = None,
    *,
    ridge: float = _RIDGE,
    on_share: Callable[[float, str], None] = lambda _, __: None,
) -> Fitted:
    """Do what `fit_layers` does for a plan that was resolved; it is not changed."""
    if not calibration.count:
        raise GraphError("the calibration holds no sample: expected one or more batches of inputs")
    settings = settings or Session()
    model = resolved.model
    cores = decompose(resolved)  # for the layers that cannot be fitted
    uses = _uses(resolved.copy())
    able = {name: found for name, found in uses.items() if found and fits(found[0].spec)}
    weights = dense_weights(resolved, able)
    samplers = {name: [Sampler(use, calibration.count * len(found)) for use in found] for name, found in able.items()}
    wanted = _outputs(model, able, weights, samplers, calibration, settings)
    done: dict[str, list[np.ndarray]] = {}
    biases: dict[str, np.ndarray] = {}
    rows = []
    current = model
    for number, (name, found) in enumerate(uses.items()):
        on_share(number / len(uses), name)
        layer = resolved.layers[name]
        if name in able:
            run = run_to(current, [use.input_name for use in found], settings)
            statistics = Statistics(weights[name][0].size, len(weights[name]))
            for k, feed in enumerate(calibration.feeds):
                statistics.add(_rows(samplers[name], run(feed), k), wanted[name][k])
            del wanted[name]
            if not np.isfinite(statistics.yy) or not np.isfinite(statistics.x).all():
                raise GraphError(f"layer {name}: its inputs or outputs on the calibration data are not finite; check the data")
            biased = takes_bias(layer)
            cores[name], bias, row = _fit(layer.plan, weights[name], cores[name], statistics, ridge, biased=biased)
            if bias is not None:
                biases[name] = bias
        else:
            why = "its patches are too wide for a full second moment" if found else "in the body of a node"
            row = LayerFit(layer=name, rows=0, plain=None, fitted=None, bias=False, why=why)
        rows.append(row)
        done[name] = cores[name]
        partial = add_biases(resolved, biases)
        current = with_weights(
            partial,
            {
                n: partial.layers[n].plan.reconstruct(c, weights[n].shape if n in weights else partial.layers[n].spec.shape)
                for n, c in done.items()
            },
        )
    on_share(1.0, "")
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


def takes_bias(layer: ResolvedLayer) -> bool:
    """Return whether a bias can be given to the layer without a new node: one node, a Conv or Gemm, or an Add behind it."""
    return len(layer.sites) == 1 and _bias(layer) is not None


def add_biases(resolved: ResolvedPlan, biases: Mapping[str, np.ndarray]) -> ResolvedPlan:
    """Return the plan with a model whose layers have a vector (O,) added to their bias; one that has none gets it.

    The argument is not changed. Raises `GraphError` for a layer that `takes_bias` does not hold for.
    """
    if not biases:
        return resolved
    changed = resolved.copy(folded=False)
    for name, bias in biases.items():
        _add_bias(changed.layers[name], bias)
    return replace(changed, model=export_graph(changed.graph, resolved.model))


def _add_bias(layer: ResolvedLayer, bias: np.ndarray) -> gs.Node:
    """Add a vector (O,) to the layer's bias; return the node that holds it."""
    place, name, site = _bias(layer), layer.plan.name, layer.sites[0]
    if place is None:
        raise GraphError(
            f"layer {name}: has no bias that could be changed; expected a Conv, a Gemm, or a MatMul with an Add of "
            "a constant vector behind it"
        )
    node, index = place
    scale = 1.0
    if node.op == "Gemm":
        scale = node.attrs.get("alpha", 1.0) / (node.attrs.get("beta", 1.0) or 1.0)
    present = index < len(node.inputs) and isinstance(node.inputs[index], gs.Constant)
    before = np.asarray(node.inputs[index].values, np.float64) if present else 0.0
    constant = gs.Constant(site.names.unique(f"{name}/bias"), (before + scale * bias).astype(layer.dtype))
    if index < len(node.inputs):
        node.inputs[index] = constant
    else:
        node.inputs.append(constant)
    return node


def _bias(layer: ResolvedLayer) -> tuple[gs.Node, int] | None:
    """Return the node and the place of its input that hold the layer's bias, or could; None when there is none."""
    site = layer.sites[0]
    node = site.node
    if node.op in ("Conv", "Gemm"):
        if node.attrs.get("beta", 1.0) == 0:
            return None
        if len(node.inputs) < 3 or node.inputs[2].is_empty():
            return (node, 2) if node.op == "Conv" or site.graph.opset >= 11 else None
        known = isinstance(node.inputs[2], gs.Constant)
        vector = known and node.inputs[2].values.size == max(node.inputs[2].shape, default=1)
        return (node, 2) if vector and node.inputs[2].values.size > 1 else None
    consumers = node.outputs[0].outputs
    if node.op != "MatMul" or len(consumers) != 1 or consumers[0].op != "Add" or layer.rule.weight_input(node) == 0:
        return None
    add = consumers[0]
    for index, tensor in enumerate(add.inputs):
        if isinstance(tensor, gs.Constant) and tensor.values.ndim == 1 and tensor.values.size > 1:
            return add, index
    return None


def _uses(folded: ResolvedPlan) -> dict[str, list[DenseLayer]]:
    """Return for each planned layer, in the graph's order, its nodes outside of bodies: several where they share the weight."""
    graph = folded.graph
    return {
        layer.plan.name: [
            dense_layer(layer.plan.name, graph, layer.rule, [site]) for site in layer.sites if site.graph is graph
        ]
        for layer in folded.in_graph_order
    }


def _rows(samplers: list[Sampler], values: list[np.ndarray], batch: int) -> np.ndarray:
    """Return the rows of all nodes of a layer on one batch."""
    return np.concatenate([sampler.rows(data, batch) for sampler, data in zip(samplers, values, strict=True)])


def _outputs(
    model: onnx.ModelProto,
    layers: Mapping[str, list[DenseLayer]],
    weights: Mapping[str, np.ndarray],
    samplers: Mapping[str, list[Sampler]],
    calibration: Calibration,
    settings: Session,
) -> dict[str, list[np.ndarray]]:
    """Return for each layer what the dense network gives at the sampled places (rows, O), bias left out, batch by batch."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in layers}
    if not layers:
        return found
    tensors = list(dict.fromkeys(use.input_name for uses in layers.values() for use in uses))
    run = run_to(model, tensors, settings)
    for k, feed in enumerate(calibration.feeds):
        values = dict(zip(tensors, run(feed), strict=True))
        for name, uses in layers.items():
            rows = _rows(samplers[name], [values[use.input_name] for use in uses], k)
            found[name].append(rows @ weights[name].reshape(len(weights[name]), -1).T)
    return found


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
