"""An estimate of the accuracy that an option costs, before anything is trained.

There are three sources, from the least to the most informative: the weights alone (the share of a weight that is lost);
calibration inputs (the share of the layer's output that is lost, by the second moment of its input channels, times the
effect of such a loss on the network's outputs); labelled inputs (the same, with the increase of the cross-entropy as the
effect). The losses of layers are added, because the errors of different layers are nearly uncorrelated and their effect
grows with their square.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from scipy.special import log_softmax

from tensorrail_exporter.calibrate.inputs import Calibration, Sampler, fits, run_to
from tensorrail_exporter.calibrate.layerwise import dense_weights
from tensorrail_exporter.calibrate.metric import roots
from tensorrail_exporter.formats import format_of
from tensorrail_exporter.plans.plan import Plan
from tensorrail_exporter.rewrite.resolve import ResolvedPlan, resolve
from tensorrail_exporter.rewrite.rewriter import with_weights
from tensorrail_exporter.rewrite.survey import DenseLayer
from tensorrail_exporter.search.options import Option
from tensorrail_runtime.errors import GraphError
from tensorrail_runtime.measure.accuracy import wrong_labels
from tensorrail_runtime.progress import Progress, silent
from tensorrail_runtime.sessions.session import Session

_SAMPLES = 64  # samples on which the effect on the network's outputs is measured
_PROBE = 0.05  # share of a layer's output that is lost in that measurement, as closely as the options allow


@dataclass(frozen=True)
class Losses:
    """The loss of every option of every layer.

    Attributes:
        source: what the losses were estimated from: `weights`, `calibration` or `labels`.
        values: one loss per option, by the name of the layer.

    """

    source: str
    values: Mapping[str, tuple[float, ...]]


def losses_of(
    model: onnx.ModelProto,
    wanted: Mapping[DenseLayer, Sequence[Option]],
    calibration: Calibration | None = None,
    settings: Session | None = None,
    *,
    resolved: ResolvedPlan | None = None,
    progress: Progress = silent,
) -> Losses:
    """Return the loss of every option of every layer.

    Args:
        model: the dense model.
        wanted: the options of every layer.
        calibration: calibration inputs; default: only the weights are used.
        settings: settings of the ONNX Runtime sessions; default `Session()`.
        resolved: a plan of these layers, in any format, in the model, where it is at hand.
        progress: told which layer is next.

    Returns:
        The losses, in the order of the options. A layer without options has none.

    Raises:
        GraphError: no output of the model is numeric, or the labels do not fit its first output.

    """
    settings = settings or Session()
    layers = [layer for layer, options in wanted.items() if options]
    plans = [wanted[layer][0].plan(layer.name) for layer in layers]
    resolved = resolved or resolve(model, Plan(layers=tuple(plans)))
    weights = dense_weights(resolved, [layer.name for layer in layers])
    metric = _channel_roots(model, layers, calibration, settings) if calibration is not None else {}
    whitened = {name: on_inputs(weight, metric[name][0]) if name in metric else weight for name, weight in weights.items()}
    shares = {}
    for number, layer in enumerate(layers):
        progress("measuring losses", 0.5 * number / len(layers), layer.name)
        shares[layer.name] = tuple(lost_shares(whitened[layer.name], wanted[layer]))
    if calibration is None:
        return Losses("weights", shares)
    probe = _Probe(resolved, calibration.first(_SAMPLES), settings)
    scaled = {}
    for number, layer in enumerate(layers):
        progress("measuring losses", 0.5 + 0.5 * number / len(layers), layer.name)
        # One option per layer is tried in the network; the losses of the others are proportional to their shares.
        nearest = min(range(len(shares[layer.name])), key=lambda k: abs(shares[layer.name][k] - _PROBE))
        plan = wanted[layer][nearest].plan(layer.name)
        weight = plan.reconstruct(plan.decompose(whitened[layer.name]), layer.spec.shape)
        if layer.name in metric:
            weight = on_inputs(weight, metric[layer.name][1])
        effect = probe.effect(layer.name, weight)
        scaled[layer.name] = tuple(share * effect / max(shares[layer.name][nearest], 1e-9) for share in shares[layer.name])
    progress("measuring losses", 1.0)
    return Losses("labels" if calibration.labels is not None else "calibration", scaled)


def check_outputs(model: onnx.ModelProto, calibration: Calibration, settings: Session) -> None:
    """Check the outputs of the first batch: raise `GraphError` if they are not finite or have fewer classes than the labels."""
    names = [output.name for output in model.graph.output]
    outputs = run_to(model, names, settings)(calibration.feeds[0])
    for name, array in zip(names, outputs, strict=True):
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise GraphError(
                f"output {name!r} contains NaN or infinite values on the calibration inputs: losses cannot be measured"
            )
    _require_classes(calibration.labels, outputs[0])


def on_inputs(weight: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return a weight (O, I, *K) with its input channels multiplied by a symmetric matrix (I, I)."""
    product = np.moveaxis(np.tensordot(weight, matrix.astype(np.float32), (1, 0)), -1, 1)
    return np.ascontiguousarray(product, np.float32)


def lost_shares(weight: np.ndarray, options: Sequence[Option]) -> list[float]:
    """Return the share of ‖W‖² that each option loses.

    For `svd` the share follows exactly from the singular values. For `tt` and `tucker` with one mode per side it is the sum
    over both unfoldings, an upper bound (Oseledets 2011, Theorem 2.2). For other formats the weight is decomposed.

    Args:
        weight: the weight (O, I, *K), W.
        options: the options.

    """
    total = float(np.square(weight, dtype=np.float64).sum()) or 1.0
    spectra: dict[tuple[int, ...], np.ndarray] = {}
    kernel = weight.shape[2:]
    axes = len(weight.shape)

    def tail(split: tuple[int, ...], rank: int) -> float:
        """Return the squared singular values beyond a rank of the unfolding with these axes as rows."""
        if split not in spectra:
            rows = np.transpose(weight, (*split, *(axis for axis in range(axes) if axis not in split)))
            matrix = rows.reshape(int(np.prod([weight.shape[axis] for axis in split])), -1).astype(np.float32)
            if matrix.shape[0] > matrix.shape[1]:
                matrix = matrix.T
            squares = np.linalg.eigvalsh((matrix @ matrix.T).astype(np.float64))[::-1]
            spectra[split] = np.append(np.cumsum(np.maximum(squares, 0.0)[::-1])[::-1], 0.0)
        beyond = spectra[split]
        return float(beyond[min(rank, len(beyond) - 1)])

    shares = []
    for option in options:
        if option.format == "svd":
            j = next(j for j in range(len(kernel) + 1) if option.modes[1] == weight.shape[1] * int(np.prod(kernel[:j])))
            lost = tail((0, *range(2 + j, axes)), option.ranks[0])
        elif option.format in ("tt", "tucker") and len(option.modes) == (3 if kernel else 2):
            ranks = option.ranks[1:-1] if option.format == "tt" else option.ranks
            lost = min(total, tail((0,), ranks[0]) + (tail((1,), ranks[-1]) if kernel else 0.0))
        else:
            form = format_of(option.format)
            cores = form.decompose(np.ascontiguousarray(weight, np.float32), option.modes, option.ranks)
            lost = float(np.square(weight - form.reconstruct(cores, weight.shape, option.modes), dtype=np.float64).sum())
        shares.append(lost / total)
    return shares


class _Probe:
    """Measures the effect of the approximation of one layer on the outputs of the network."""

    def __init__(self, resolved: ResolvedPlan, calibration: Calibration, settings: Session) -> None:
        self.resolved, self.calibration, self.settings = resolved, calibration, settings
        self.names = [output.name for output in resolved.model.graph.output]
        self.dense = self._outputs(resolved.model)
        self.compared = [k for k, parts in enumerate(self.dense) if all(part.dtype.kind in "fiub" for part in parts)]
        if not self.compared:
            raise GraphError(f"the model's outputs, {', '.join(self.names)}, are not numeric: losses cannot be measured")
        _require_classes(calibration.labels, self.dense[0][0])

    def effect(self, layer: str, weight: np.ndarray) -> float:
        """Return the loss of the network, see `_distance`, when only the weight of this layer is replaced."""
        return self._distance(self._outputs(with_weights(self.resolved, {layer: weight})))

    def _outputs(self, model: onnx.ModelProto) -> list[list[np.ndarray]]:
        """Return the values of every output, one array per batch."""
        run = run_to(model, self.names, self.settings)
        parts = [run(feed) for feed in self.calibration.feeds]
        return [[part[k] for part in parts] for k in range(len(self.names))]

    def _distance(self, changed: list[list[np.ndarray]]) -> float:
        """Return the increase of the cross-entropy if there are labels, else the relative change of the outputs."""
        labels = self.calibration.labels
        if labels is not None and self.dense[0][0].ndim == 2:
            rows = np.arange(len(labels))
            before, after = (log_softmax(np.concatenate(outputs[0]), 1)[rows, labels] for outputs in (self.dense, changed))
            return max(float(before.mean() - after.mean()), 0.0) + 1e-3 * self._relative(changed)
        return self._relative(changed)

    def _relative(self, changed: list[list[np.ndarray]]) -> float:
        """Return the mean over outputs of ‖a − b‖² / ‖a − mean‖², with 1 for an output whose shape has changed."""
        shares = []
        for k in self.compared:
            if any(a.shape != b.shape for a, b in zip(self.dense[k], changed[k], strict=True)):
                shares.append(1.0)
                continue
            before, after = ([np.asarray(part, np.float64) for part in parts] for parts in (self.dense[k], changed[k]))
            lost = sum(float(np.square(a - b).sum()) for a, b in zip(before, after, strict=True))
            shares.append(lost / max(_variation(before), 1e-12))
        return float(np.mean(shares))


def _variation(parts: Sequence[np.ndarray]) -> float:
    """Return ‖a − mean‖²; the mean is over samples, or over all values if there is one sample or the shapes differ."""
    joined = parts[0].ndim > 0 and all(part.shape[1:] == parts[0].shape[1:] for part in parts) and sum(map(len, parts)) > 1
    values = np.concatenate(parts) if joined else np.concatenate([part.ravel() for part in parts])
    return float(np.square(values - values.mean(0)).sum()) if len(values) else 0.0


def _require_classes(labels: np.ndarray | None, scores: np.ndarray) -> None:
    if labels is None or scores.ndim != 2:
        return
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise GraphError(f"expected integer labels, one per sample, got {labels.dtype} of shape {list(labels.shape)}")
    if wrong := wrong_labels(labels, scores.shape[1]):
        raise GraphError(wrong)


def _channel_roots(
    model: onnx.ModelProto, layers: Sequence[DenseLayer], calibration: Calibration, settings: Session
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the square root of the second moment of the input channels and its inverse, for layers in the main graph."""
    top = {name for node in model.graph.node for name in node.output} | {value.name for value in model.graph.input}
    measurable = [layer for layer in layers if layer.input_name in top and fits(layer.spec)]
    if not measurable:
        return {}
    samplers = {layer.name: Sampler(layer, calibration.count) for layer in measurable}
    sums = {layer.name: np.zeros((layer.spec.shape[1],) * 2, np.float64) for layer in measurable}
    run = run_to(model, [layer.input_name for layer in measurable], settings)
    for k, feed in enumerate(calibration.feeds):
        for layer, data in zip(measurable, run(feed), strict=True):
            rows = samplers[layer.name].rows(data, k).reshape(-1, layer.spec.shape[1], int(np.prod(layer.spec.kernel)))
            for tap in range(rows.shape[2]):
                sums[layer.name] += rows[:, :, tap].T @ rows[:, :, tap]
    return {name: roots(value) for name, value in sums.items()}
