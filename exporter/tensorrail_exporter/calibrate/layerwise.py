"""Decomposes a network without training: layer by layer, each on the inputs that it receives from the compressed layers before.

For each layer, in the order of the graph, a linear regression on these inputs gives the weight that best reproduces the outputs
of the dense network. It is decomposed to the plan's format in the metric of the inputs (`metric.decompose`), and a bias keeps
the mean of every output. Later layers thus compensate for the errors of earlier ones.

Both the regression and the metric use moments that are shrunk toward a multiple of the identity: few inputs say nothing about
some directions, and a fit that ignores these loses accuracy on other inputs. How much is best differs between layers. It is
chosen by the error on inputs that were held out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from tensorrail_exporter.calibrate import metric, tables
from tensorrail_exporter.calibrate.inputs import Calibration, Sampler, Statistics, fits
from tensorrail_exporter.calibrate.metric import Moments
from tensorrail_exporter.calibrate.progressive import KeptTensors, ProgressiveNetwork
from tensorrail_exporter.plans.plan import LayerPlan, Plan
from tensorrail_exporter.rewrite.biases import add_biases, takes_bias
from tensorrail_exporter.rewrite.resolve import ResolvedLayer, ResolvedPlan, resolve
from tensorrail_exporter.rewrite.rewriter import check_finite, decompose
from tensorrail_exporter.rewrite.survey import DenseLayer, dense_layer
from tensorrail_runtime.errors import GraphError
from tensorrail_runtime.progress import Progress, silent
from tensorrail_runtime.records import Record
from tensorrail_runtime.scratch import scratch
from tensorrail_runtime.sessions.session import Session

_SHRINKAGES = (0.01, 0.05, 0.2, 0.5, 0.8)  # from which one is chosen for each layer
_FIRST = {5.0: 2, 0.0: 3}  # the one to try first, with the one below it, by rows per value of a row at least
_FLAT = 0.01  # share of the error: where two shrinkages differ by less, no other is tried
_DEFAULT = 0.1  # without inputs to choose it by


class LayerFit(Record):
    """How well one layer was fitted.

    `plain` and `fitted` are the lost share of the variance of its outputs, on the rows that it was fitted to: on other inputs
    more is lost, above all where there are few rows.
    """

    layer: str
    rows: int  # number of sampled patches; 0: decomposed from the weight alone, for the reason in `why`
    plain: float | None  # with cores decomposed from the weight alone
    fitted: float | None  # with the fitted cores and bias
    bias: bool
    shrinkage: float | None = None  # of the moments of its inputs; of several groups, the median
    why: str = ""


@dataclass(frozen=True)
class Fitted:
    """The result of a fit.

    Attributes:
        resolved: the plan in the dense graph, whose biases now fit the cores.
        cores: the fitted cores, by layer name.
        layers: how well each layer was fitted, in the order of the graph.

    """

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
    held_out: Calibration | None = None,
    shrinkage: float | None = None,
    progress: Progress = silent,
) -> Fitted:
    """Fit the cores of every planned layer, in the order of the graph, to the outputs of the dense network.

    A layer whose patches are too wide for a full second moment, a transposed convolution, a recurrent weight, an embedding in
    `ttm`, and a layer in the body of a node are decomposed from their weights alone; their rows give the reason. Of a
    convolution in groups, each group is fitted as a layer of its own. Of an embedding, rows that are read often weigh more
    (`tables`).

    Args:
        model: the dense graph; it is not changed.
        plan: the layers, formats, modes and ranks.
        calibration: inputs of the network.
        settings: how the network runs; default: the CPU provider.
        held_out: inputs to choose the shrinkage of each layer by; default: none.
        shrinkage: how far the moments of the inputs of all layers are shrunk toward a multiple of the identity, from 0 to
            1; default: chosen by the inputs that are held out, 0.1 if there are none.
        progress: is told which layer is fitted.

    Returns:
        The dense graph with fitted biases, the cores, and how well each layer was fitted.

    Raises:
        GraphError: a layer is not in the graph or cannot be rewritten, the calibration has no samples, or inputs or outputs
            of a layer are not finite.
        PlanError: modes or ranks do not fit the weight.

    """
    return fit(resolve(model, plan), calibration, settings, held_out=held_out, shrinkage=shrinkage, progress=progress)


def fit(
    resolved: ResolvedPlan,
    calibration: Calibration,
    settings: Session | None = None,
    *,
    held_out: Calibration | None = None,
    refit: bool = False,
    shrinkage: float | Mapping[str, float] | None = None,
    progress: Progress = silent,
) -> Fitted:
    """Do the same as `fit_layers` for a resolved plan, which is not changed.

    Args:
        resolved: the plan in the dense graph.
        calibration: as for `fit_layers`.
        settings: as for `fit_layers`.
        held_out: as for `fit_layers`.
        refit: once its shrinkage is chosen, fit each layer to the inputs that were held out as well; default False.
        shrinkage: as for `fit_layers`; or one for each of some layers, by name, such as those of an earlier fit.
        progress: as for `fit_layers`.

    """
    if not calibration.count:
        raise GraphError("expected one or more batches of calibration inputs, got none")
    settings = settings or Session()
    cores = decompose(resolved)  # for the layers that cannot be fitted
    uses = _uses(resolved.copy())
    fittable = {name: nodes for name, nodes in uses.items() if nodes and fits(nodes[0].spec)}
    read = {name for name, nodes in uses.items() if nodes and tables.weighs_rows(nodes[0].spec, resolved.layers[name].plan)}
    weights = dense_weights(resolved, fittable)
    feeds = (*calibration.feeds, *(() if held_out is None else held_out.feeds))
    samples = [*calibration.samples, *(() if held_out is None else held_out.samples)]
    samplers = {name: [Sampler(use, samples, len(nodes)) for use in nodes] for name, nodes in fittable.items()}
    how = _Shrinking(len(calibration.feeds), refit, shrinkage)
    biases: dict[str, np.ndarray] = {}
    rows = []
    with scratch() as folder:
        inputs = {name: [use.input_name for use in uses[name]] for name in uses if name in fittable or name in read}
        network = ProgressiveNetwork(resolved, inputs, feeds, settings, Path(folder))
        dense_outputs = _outputs(
            network, {name: _of_groups(resolved.layers[name], weights[name]) for name in weights}, samplers, Path(folder)
        )
        for number, (name, nodes) in enumerate(uses.items()):
            progress("fitting layers", number / len(uses), name)
            layer = resolved.layers[name]
            if name in fittable:
                parts = _of_groups(layer, weights[name])
                statistics = _statistics(network, name, parts, samplers[name], dense_outputs, how.fitted)
                dense_outputs.drop(name)
                plain = [cores[name]] if len(parts) == 1 else [list(own) for own in zip(*cores[name], strict=True)]
                biased = takes_bias(layer)
                problems = [
                    _Problem(layer.plan, part, own, *sums, biased)
                    for part, own, sums in zip(parts, plain, statistics, strict=True)
                ]
                cores[name], bias, row = _fit(problems[0], how) if len(problems) == 1 else _fit_groups(problems, how)
                if bias is not None:
                    biases[name] = bias
            elif name in read:
                cores[name], row = _fit_table(network, layer, cores[name], how)
            else:
                why = _why_unfitted(nodes)
                row = LayerFit(layer=name, rows=0, plain=None, fitted=None, bias=False, why=why)
            rows.append(row)
            dense = layer.plan.reconstruct(cores[name], layer.spec.shape, layer.spec.groups)
            network.replace(name, np.asarray(dense), biases.get(name))
    progress("fitting layers", 1.0)
    return Fitted(add_biases(resolved, biases), cores, tuple(rows))


def dense_weights(resolved: ResolvedPlan, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Return the weights of planned layers.

    Args:
        resolved: the plan in the dense graph.
        names: the layers; default: all layers of the plan.

    Returns:
        The weights (O, I, *K) by layer name, float32.

    Raises:
        GraphError: a weight holds NaN or infinite values.

    """
    weights = {}
    for name in resolved.layers if names is None else names:
        weights[name] = np.array(resolved.layers[name].weight, np.float32)
        check_finite(name, weights[name])
    return weights


def _fit_table(
    network: ProgressiveNetwork, layer: ResolvedLayer, plain: list[np.ndarray], how: _Shrinking
) -> tuple[list[np.ndarray], LayerFit]:
    """Return the cores of an embedding, fitted by how often the inputs read its entries, and the row of the report."""
    name, plan, weight = layer.plan.name, layer.plan, np.array(layer.weight, np.float32)
    check_finite(name, weight)
    batches = [list(values.values()) for values in network.inputs_of(name)]
    fitted, held_out = (
        tables.reads((indices for batch in part for indices in batch), weight.shape[1])
        for part in (batches[: how.fitted], batches[how.fitted :])
    )

    def lost(cores: list[np.ndarray], counts: np.ndarray) -> float:
        return tables.lost(weight, np.asarray(plan.reconstruct(cores, weight.shape)), counts)

    shrinkage = how.known(name)
    if shrinkage is None:
        tried = {share: tables.decompose(plan, weight, fitted, share) for share in _SHRINKAGES} if held_out.any() else {}
        shrinkage = min(tried, key=lambda share: lost(tried[share], held_out), default=tables.DEFAULT)
    counts = fitted + held_out if how.refit else fitted
    cores = tables.decompose(plan, weight, counts, shrinkage)
    row = LayerFit(
        layer=name,
        rows=int(counts.sum()),
        plain=lost(plain, counts),
        fitted=lost(cores, counts),
        bias=False,
        shrinkage=shrinkage,
    )
    return cores, row


def _why_unfitted(nodes: Sequence[DenseLayer]) -> str:
    """Return why a layer is decomposed from its weight alone."""
    if not nodes:
        return "in the body of a node"
    if nodes[0].spec.gathers:
        return "an embedding whose entries are several modes, so that rows have no weights of their own"
    if nodes[0].spec.state_products:
        return "a recurrent weight, of which the states are not known outside of its node"
    return "a transposed convolution" if nodes[0].spec.transposed else "its patches are too wide for a full second moment"


def _uses(folded: ResolvedPlan) -> dict[str, list[DenseLayer]]:
    """Return the nodes of each planned layer that are not in a body, by layer name in the order of the graph."""
    graph = folded.graph
    return {
        layer.plan.name: [
            dense_layer(layer.plan.name, graph, layer.rule, [site]) for site in layer.sites if site.graph is graph
        ]
        for layer in folded.in_graph_order
    }


def _of_groups(layer: ResolvedLayer, weight: np.ndarray) -> list[np.ndarray]:
    """Return the weight of each group; the weight itself for a layer without groups."""
    return [weight] if layer.spec.groups == 1 else np.split(weight, layer.spec.groups)


def _rows(samplers: list[Sampler], values: Mapping[str, np.ndarray], batch: int) -> np.ndarray:
    """Return the sampled input rows of all nodes of a layer for one batch."""
    return np.concatenate([sampler.rows(values[sampler.layer.input_name], batch) for sampler in samplers])


def _outputs(
    network: ProgressiveNetwork,
    weights: Mapping[str, Sequence[np.ndarray]],
    samplers: Mapping[str, list[Sampler]],
    folder: Path,
) -> KeptTensors:
    """Return each layer's dense outputs without bias at the sampled positions, (groups, rows, O) for each batch.

    `folder` takes what is too much for the memory.
    """
    (folder / "outputs").mkdir()
    outputs = KeptTensors(folder / "outputs")
    for k, values in enumerate(network.dense()):
        for name, layer_samplers in samplers.items():
            rows = np.split(_rows(layer_samplers, values, k), len(weights[name]), 1)
            products = [own @ part.reshape(len(part), -1).T for own, part in zip(rows, weights[name], strict=True)]
            outputs.put(name, np.stack(products))
    return outputs


@dataclass(frozen=True)
class _Shrinking:
    """How the shrinkage of the moments is chosen."""

    fitted: int  # number of batches to fit to; the others are held out
    refit: bool
    shrinkage: float | Mapping[str, float] | None

    def known(self, layer: str) -> float | None:
        """Return the shrinkage of a layer, if it need not be chosen."""
        return self.shrinkage.get(layer) if isinstance(self.shrinkage, Mapping) else self.shrinkage


@dataclass(frozen=True)
class _Problem:
    """What the cores of one layer are fitted to."""

    plan: LayerPlan
    weight: np.ndarray
    plain: list[np.ndarray]  # cores of the weight alone
    statistics: Statistics
    held_out: Statistics
    biased: bool

    def moments(self, statistics: Statistics) -> Moments:
        """Return the moments of some rows, with their spectrum."""
        moments = statistics.moments(centred=self.biased)
        moments.spectrum(self.weight.shape[1])
        return moments

    def shrunk(self, statistics: Statistics, moments: Moments, shrinkage: float) -> tuple[np.ndarray, Moments]:
        """Return the weight that predicts the outputs of some rows best, and their moments, both shrunk."""
        shrunk = moments.shrunk(shrinkage)
        return statistics.best(self.weight, shrunk, centred=self.biased, shrinkage=shrinkage), shrunk

    def lost(self, moments: Moments, shrinkage: float) -> float:
        """Return the share that is lost on the rows that were held out, after a short fit."""
        target, shrunk = self.shrunk(self.statistics, moments, shrinkage)
        fitted = self.plan.reconstruct(metric.in_metric(self.plan, target, shrunk, sweeps=0), self.weight.shape)
        bias = self.statistics.bias(fitted) if self.biased else None
        return self.held_out.lost(fitted, centred=self.biased, bias=bias)

    def best_shrinkage(self) -> float:
        """Return the shrinkage that loses least on the rows that were held out."""
        moments = self.moments(self.statistics)
        first = next(at for least, at in _FIRST.items() if self.statistics.count >= least * self.statistics.width)
        tried = {at: self.lost(moments, _SHRINKAGES[at]) for at in (first - 1, first)}
        step = 1 if tried[first] <= tried[first - 1] else -1
        at = min(tried, key=lambda place: tried[place])
        if max(tried.values()) <= (1 + _FLAT) * tried[at]:
            return _SHRINKAGES[at]
        while 0 <= at + step < len(_SHRINKAGES):
            tried[at + step] = self.lost(moments, _SHRINKAGES[at + step])
            if not tried[at + step] < tried[at]:
                break
            at += step
        return _SHRINKAGES[at]


def _statistics(
    network: ProgressiveNetwork,
    name: str,
    weights: Sequence[np.ndarray],
    samplers: list[Sampler],
    dense_outputs: KeptTensors,
    fitted: int,
) -> list[tuple[Statistics, Statistics]]:
    """Return the sums over a layer's current inputs and its dense outputs, for the first batches and for the others.

    `weights` are those of its groups, and there are two sums for each. Raises `GraphError` if they are not finite.
    """
    sums = [(Statistics(part[0].size, len(part)), Statistics(part[0].size, len(part))) for part in weights]
    for k, values in enumerate(network.inputs_of(name)):
        rows = np.split(_rows(samplers, values, k), len(weights), 1)
        for own, x, y in zip(sums, rows, dense_outputs.get(name, k), strict=True):
            own[k >= fitted].add(x, y)
    if not all(np.isfinite(part.yy) and np.isfinite(part.x).all() for own in sums for part in own):
        raise GraphError(
            f"layer {name}: its inputs or outputs on the calibration data hold NaN or infinite values; check the data"
        )
    return sums


def _fit(problem: _Problem, how: _Shrinking) -> tuple[list[np.ndarray], np.ndarray | None, LayerFit]:
    """Return the fitted cores, the vector to add to the bias (None without bias), and the row of the layer."""
    plan, weight, biased = problem.plan, problem.weight, problem.biased
    shrinkage = how.known(plan.name)
    if shrinkage is None:
        shrinkage = problem.best_shrinkage() if problem.held_out.count else _DEFAULT
    statistics = problem.statistics + problem.held_out if how.refit else problem.statistics
    cores = metric.decompose(plan, *problem.shrunk(statistics, problem.moments(statistics), shrinkage))
    fitted, unfitted = plan.reconstruct(cores, weight.shape), plan.reconstruct(problem.plain, weight.shape)
    squares = statistics.squares(unfitted)
    lost, lost_unfitted = statistics.lost(fitted, centred=biased), statistics.lost(unfitted, centred=biased, squares=squares)
    if not lost <= lost_unfitted:
        cores, fitted, lost = problem.plain, unfitted, lost_unfitted  # too few or too similar rows to fit to
    row = LayerFit(
        layer=plan.name,
        rows=statistics.count,
        plain=statistics.lost(unfitted, centred=False, squares=squares),
        fitted=lost,
        bias=biased,
        shrinkage=shrinkage,
    )
    return cores, statistics.bias(fitted) if biased else None, row


def _fit_groups(problems: Sequence[_Problem], how: _Shrinking) -> tuple[list[np.ndarray], np.ndarray | None, LayerFit]:
    """Do the same as `_fit` for the groups of a convolution: their cores are stacked, and their shares are weighted."""
    fits_of_groups = [_fit(problem, how) for problem in problems]
    cores = [np.stack(of_groups) for of_groups in zip(*(own for own, _, _ in fits_of_groups), strict=True)]
    biases = [bias for _, bias, _ in fits_of_groups if bias is not None]
    rows = [row for _, _, row in fits_of_groups]
    energies = np.array([problem.statistics.variance for problem in problems])
    shares = energies / (energies.sum() or 1.0)
    row = LayerFit(
        layer=rows[0].layer,
        rows=rows[0].rows,
        plain=float(shares @ [row.plain for row in rows]),
        fitted=float(shares @ [row.fitted for row in rows]),
        bias=bool(biases),
        shrinkage=float(np.median([row.shrinkage for row in rows])),
    )
    return cores, np.concatenate(biases) if biases else None, row
