"""The accuracy that an option costs, measured in the network before anything is trained.

There are three sources, from the least to the most informative: the weights alone (the share of a weight that is lost);
calibration inputs (how far the network's outputs move when one layer is approximated, see `divergence`); labelled inputs (the
same, by the cross-entropy or by a metric). A layer's effect is measured at several of its options, of which the cheapest is
one, and interpolated between them: a layer that loses two thirds of its output is not thirteen times as bad as one that loses
a twentieth.

The losses of layers are added, because the errors of different layers are nearly uncorrelated and their effect grows with their
square. Where a network is cut deeply this fails: `verification` measures the loss of the chosen network as a whole.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from tensorrail_exporter.calibrate import tables
from tensorrail_exporter.calibrate.inputs import Calibration, Sampler, fits, run_to
from tensorrail_exporter.calibrate.layerwise import dense_weights, fit
from tensorrail_exporter.calibrate.metric import Moments, roots
from tensorrail_exporter.calibrate.split import Split
from tensorrail_exporter.formats.contraction import LayerSpec
from tensorrail_exporter.plans.plan import Plan, Precision
from tensorrail_exporter.precision.planned import PRECISIONS
from tensorrail_exporter.rewrite.biases import takes_bias
from tensorrail_exporter.rewrite.resolve import ResolvedPlan, resolve
from tensorrail_exporter.rewrite.rewriter import rewrite, with_cores, with_weights
from tensorrail_exporter.rewrite.survey import DenseLayer
from tensorrail_exporter.search.approximations import Approximations, GroupedApproximations, InputMoments
from tensorrail_exporter.search.divergence import Divergence, Outputs, require_classes, require_labels
from tensorrail_exporter.search.guard import Guard
from tensorrail_exporter.search.options import Option
from tensorrail_exporter.search.stitched import Change, StitchedNetwork
from tensorrail_runtime.errors import GraphError, PlanError
from tensorrail_runtime.measure.accuracy import metric_of, sample_scores
from tensorrail_runtime.measure.agreement import Agreement, compared
from tensorrail_runtime.progress import Progress, silent
from tensorrail_runtime.sessions.session import Session
from tensorrail_runtime.sessions.side_by_side import side_by_side

SAMPLES = 64  # samples on which effects on the network's outputs are measured, if not fewer take long
_FEWEST, _FEWEST_FIRST = 16, 4
_LEVEL_SECONDS = 60.0  # for measuring one option of every layer
_POINTS = 5  # options of a layer whose effect is measured, at most
_FEW = 24  # samples on which the shape of a layer's curve is measured, if not fewer take long; one point is measured on all
_SHAPE_SECONDS = 30.0  # for those of all layers
_STRAIGHT = 0.5  # distance of the logarithms: a curve whose middle is nearer to the line between its ends needs three points
_ALIKE = 3.0  # factor between effects on few and on all samples up to which one factor serves for the whole curve
_SHRINKAGE = 0.1  # of the second moments of inputs, which few samples do not determine; see `calibrate.layerwise`
_FLOOR = 1e-12  # of shares and effects whose logarithms are taken
_STAGE = "measuring losses"


@dataclass(frozen=True)
class Losses:
    """The loss of every option of every layer.

    Attributes:
        source: what the losses were estimated from: `weights`, `calibration` or `labels`.
        values: one loss per option, by the name of the layer.
        unit: what a loss is, in words.
        factors: by how much the losses of a layer were scaled after they were measured, by layer name; 1 for one without.

    """

    source: str
    values: Mapping[str, tuple[float, ...]]
    unit: str = "lost share of the weight"
    factors: Mapping[str, float] = field(default_factory=dict)


class Probe:
    """Measures how far the outputs of a network move when some of its layers are approximated.

    Args:
        resolved: a plan of the layers, in any format, in the dense model.
        approximations: the approximated weights of each layer.
        inputs: the inputs to measure on.
        settings: how the network runs.
        folder: an empty folder for models.
        metric: a score of each sample, whose fall is the loss; default: none, so outputs are compared with the dense ones.
        parts: inputs to fit cores to and to compare fitted networks on; default: none, so no network is fitted.
        precision: the precision of networks with fitted cores; default fp32.
        reference: the network that outputs must agree with; default: the one that layers are replaced in.

    Raises:
        GraphError: no output is numeric, or the labels do not fit the first output.
        PlanError: there is a metric without labels.
        ModelError: the metric is unknown, fails, or gives other than one finite number per sample.

    """

    def __init__(
        self,
        resolved: ResolvedPlan,
        approximations: Mapping[str, Approximations | GroupedApproximations],
        inputs: Calibration,
        settings: Session,
        folder: Path,
        metric: str | None = None,
        parts: Split | None = None,
        precision: Precision = "fp32",
        reference: onnx.ModelProto | None = None,
    ) -> None:
        self.parts, self.precision, self.reference = parts, precision, reference
        self._of_reference: Outputs | None = None  # on all inputs
        self.gain: object = None  # what a fit gains, for whoever asks for several
        self.resolved, self.approximations, self.settings = resolved, approximations, settings
        self.inputs, self.metric = inputs, metric
        self._dense: Outputs | None = None  # on the inputs that fitted networks are compared on
        self._latest: dict[str, tuple[Option, Change]] = {}  # networks are tried that differ in one or two layers
        self.network = StitchedNetwork(resolved, inputs.feeds, settings, folder)
        dense, seconds = self.network.timed_dense()
        each = seconds / max(1, inputs.count) * len(self.network.layers)
        self.divergence = Divergence(self.network.outputs, dense, inputs.labels, metric, inputs.samples)
        # Scores of few samples are too coarse.
        few = len(inputs.feeds if self.divergence.uses_labels else inputs.first(_few(each)).feeds)
        self.few = few if few < len(inputs.feeds) else None  # batches for a first look; None where it takes all of them

    def change(self, layer: str, option: Option) -> Change:
        """Return the approximated weight of a layer, and the bias that keeps the mean of its outputs."""
        if layer not in self._latest or self._latest[layer][0] != option:
            approximations = self.approximations[layer]
            weight = approximations.approximated(option)
            self._latest[layer] = option, Change(weight, approximations.bias(weight))
        return self._latest[layer][1]

    def effects(self, layer: str, options: Sequence[Option], batches: int | None = None) -> list[float]:
        """Return the loss of the network with each of some options of one layer.

        Args:
            layer: the layer; call it in the order of the graph.
            options: the options to try.
            batches: the number of batches to measure on, from the first, such as `few`; default: all.

        """
        loss = self.divergence.of if batches is None else self.divergence.of_first
        return [loss(outputs) for outputs in self._with_each(layer, options, batches)]

    def effect(self, layer: str, option: Option) -> tuple[float, float]:
        """Return the loss of the network with an option of one layer: on the first `few` batches, and on all."""
        (outputs,) = self._with_each(layer, [option], None)
        loss = self.divergence.of(outputs)
        return loss if self.few is None else self.divergence.of_first([parts[: self.few] for parts in outputs]), loss

    def _with_each(self, layer: str, options: Sequence[Option], batches: int | None) -> list[Outputs]:
        """Return the outputs of the network with each of some options of one layer."""
        changes = [self.change(layer, option) for option in options]
        if layer in self.network.layers:
            return self.network.with_each(layer, changes, batches)
        # In the body of a node: the whole network runs.
        inputs = replace(self.inputs, feeds=self.inputs.feeds[:batches])
        models = (with_weights(self.resolved, {layer: change.weight}) for change in changes)
        return [outputs_of(model, self.network.outputs, inputs, self.settings) for model in models]

    def loss(self, choice: Mapping[str, Option], batches: int | None = None) -> float:
        """Return the loss of the network with an option for each of some layers; the others stay dense.

        Args:
            choice: the options by layer name.
            batches: the number of batches to measure on, from the first, such as `few`; default: all.

        """
        outputs = self.outputs(choice, batches)
        return self.divergence.of(outputs) if batches is None else self.divergence.of_first(outputs)

    def fitted(self, plan: Plan, progress: Progress = silent) -> Agreement:
        """Return how far the network of a plan agrees with the dense one once its cores are fitted, layer by layer."""
        if self.parts is None:
            raise ValueError("there are no inputs to fit cores to")
        names, others = self.network.outputs, self.parts.chosen
        model = self.resolved.model
        if plan.layers:
            fitted = fit(resolve(model, plan), self.parts.fitted, self.settings, progress=progress)
            in_one_step = self.precision == "fp32"  # reconstructed weights give the same outputs
            model = with_cores(fitted.resolved, fitted.cores) if in_one_step else rewrite(fitted.resolved, fitted.cores).model
        model = PRECISIONS[self.precision].for_outputs(model, self.parts.fitted.feeds)
        if self._dense is None:
            self._dense = outputs_of(self.reference or self.resolved.model, names, others, self.settings)
        outputs = outputs_of(model, names, others, self.settings)
        return agreement_between(self._dense, outputs, others)

    def agreement(self, outputs: Outputs) -> Agreement:
        """Return how far outputs for all inputs agree with the dense network's."""
        if self.reference is None:
            return agreement_between(self.divergence.dense, outputs, self.inputs)
        if self._of_reference is None:
            self._of_reference = outputs_of(self.reference, self.network.outputs, self.inputs, self.settings)
        return agreement_between(self._of_reference, outputs, self.inputs)

    def outputs(self, choice: Mapping[str, Option], batches: int | None = None) -> Outputs:
        """Return the outputs of the network with an option for each of some layers; `batches` as for `loss`."""
        return self.network.with_changes({layer: self.change(layer, option) for layer, option in choice.items()}, batches)


def samples_for(seconds: float) -> int:
    """Return the number of samples to measure effects on.

    Args:
        seconds: how long the dense network takes for one sample, times the number of layers.

    """
    return max(_FEWEST, min(SAMPLES, round(_LEVEL_SECONDS / max(seconds / 2, 1e-9))))  # half of it lies behind a layer


def seconds_of_a_sample(model: onnx.ModelProto, inputs: Calibration, settings: Session) -> float:
    """Return how long a model takes for one sample of some inputs, in the second run of the first batch."""
    run = run_to(model, [output.name for output in model.graph.output], settings)
    run(inputs.feeds[0])
    began = time.monotonic()
    run(inputs.feeds[0])
    return (time.monotonic() - began) / max(1, inputs.samples[0])


def _few(seconds: float) -> int:
    """Return the number of samples for a first look; `seconds` as for `samples_for`."""
    return max(_FEWEST_FIRST, min(_FEW, round(_SHAPE_SECONDS / max(seconds * (_POINTS - 1) / 2, 1e-9))))


def agreement_between(dense: Outputs, outputs: Outputs, inputs: Calibration) -> Agreement:
    """Return how far the outputs of two networks, for the same inputs, agree."""
    before, after = (list(zip(*values, strict=True)) for values in (dense, outputs))
    return compared(before, after, inputs.samples)


def weight_losses(
    wanted: Mapping[DenseLayer, Sequence[Option]],
    approximations: Mapping[str, Approximations | GroupedApproximations],
    progress: Progress = silent,
) -> Losses:
    """Return the share of its weight that each option loses."""
    values = {}
    for number, (layer, options) in enumerate(wanted.items()):
        progress(_STAGE, number / len(wanted), layer.name)
        if options:
            values[layer.name] = tuple(approximations[layer.name].share(option) for option in options)
    return Losses("weights", values)


def measured_losses(wanted: Mapping[DenseLayer, Sequence[Option]], probe: Probe, progress: Progress = silent) -> Losses:
    """Return the loss of every option, interpolated between options whose effect on the network's outputs is measured.

    Labels that were given and do not apply are told as a note.
    """
    if probe.divergence.left_out:
        progress("note", 1.0, probe.divergence.left_out)
    options_by_layer = {layer.name: tuple(options) for layer, options in wanted.items() if options}
    order = [*probe.network.layers, *(name for name in options_by_layer if name not in probe.network.layers)]
    values = {}
    for number, name in enumerate(name for name in order if name in options_by_layer):
        progress(_STAGE, number / len(options_by_layer), name)
        options = options_by_layer[name]
        shares = [probe.approximations[name].share(option) for option in options]
        values[name] = interpolated(shares, _curve(name, options, shares, probe))
    progress(_STAGE, 1.0)
    source = "labels" if probe.divergence.uses_labels else "calibration"
    return Losses(source, values, probe.divergence.unit)


def _curve(name: str, options: Sequence[Option], shares: Sequence[float], probe: Probe) -> dict[float, float]:
    """Return the effects of some options of a layer by the share that each loses.

    The shape of the curve is measured on few samples, and its height on all of them, at its middle: the effects of two options
    of the same layer on a sample are large or small together. Points between the ends and the middle are measured where these
    three are not nearly on a line.
    """

    def effects(places: Sequence[int], batches: int | None) -> dict[int, float]:
        return dict(zip(places, probe.effects(name, [options[k] for k in places], batches), strict=True))

    picks = _spread(shares)
    middle = picks[len(picks) // 2]
    first, level = probe.effect(name, options[middle])
    measured = {middle: first} | effects([k for k in dict.fromkeys((picks[0], picks[-1])) if k != middle], probe.few)
    if not _straight(sorted((shares[k], effect) for k, effect in measured.items())):
        measured |= effects([k for k in picks if k not in measured], probe.few)
    factor = level / max(measured[middle], _FLOOR)
    if 1 / _ALIKE <= factor <= _ALIKE:
        measured = {k: factor * effect for k, effect in measured.items()}
    elif probe.few is not None:
        measured = effects([k for k in measured if k != middle], None) | {middle: level}
    return {shares[k]: effect for k, effect in measured.items()}


def _straight(points: Sequence[tuple[float, float]]) -> bool:
    """Return whether the middle one of three points (share, effect) is near the line between the others; on logarithms."""
    if len(points) < 3:
        return True
    (x0, y0), (x1, y1), (x2, y2) = np.log(np.maximum(points, _FLOOR))
    return bool(abs(y1 - np.interp(x1, [x0, x2], [y0, y2])) <= _STRAIGHT)


def interpolated(shares: Sequence[float], effects: Mapping[float, float]) -> tuple[float, ...]:
    """Return the effects of all options from those of some, which never fall as the share that is lost rises.

    Args:
        shares: the share of the layer's output that each option loses.
        effects: measured effects by the share that was lost.

    Returns:
        The effects, interpolated between logarithms; below the smallest measured share they are proportional to the share.

    """
    xs = np.array(sorted(effects))
    ys = np.maximum.accumulate([effects[x] for x in xs])
    logs = np.interp(*(np.log(np.maximum(np.asarray(values, float), _FLOOR)) for values in (shares, xs, ys)))
    small = [float(ys[0] * share / max(xs[0], _FLOOR)) for share in shares]
    return tuple(low if share < xs[0] else float(np.exp(log)) for share, log, low in zip(shares, logs, small, strict=True))


def approximations_of(
    resolved: ResolvedPlan, wanted: Mapping[DenseLayer, Sequence[Option]], split: Split | None, settings: Session
) -> dict[str, Approximations | GroupedApproximations]:
    """Return the approximations of every layer that has options, in the metric of the inputs that cores are fitted to."""
    layers = [layer for layer, options in wanted.items() if options]
    weights = dense_weights(resolved, [layer.name for layer in layers])
    moments = {} if split is None else _input_moments(resolved, layers, split.fitted, settings)
    approximations: dict[str, Approximations | GroupedApproximations] = {}
    for layer in layers:
        weight, own = weights[layer.name], moments.get(layer.name)
        approximations[layer.name] = (
            Approximations(weight, own[0] if own else None)
            if layer.spec.groups == 1
            else GroupedApproximations(weight, layer.spec.groups, own)
        )
    return approximations


def check_metric(metric: str | None, calibration: Calibration | None) -> None:
    """Raise `PlanError` for a metric without calibration inputs that have a label each, and `ModelError` for an unknown one."""
    if metric is None:
        return
    metric_of(metric)
    if calibration is None or not calibration.count:
        raise PlanError(
            f"metric {metric} is a loss that is measured, got no calibration inputs: give calibration inputs with labels"
        )
    require_labels(metric, calibration.labels, calibration.count)


def check_outputs(
    model: onnx.ModelProto,
    calibration: Calibration,
    settings: Session,
    metric: str | None = None,
    guard: Guard | None = None,
) -> None:
    """Check the outputs of the first batch, before anything is measured.

    Args:
        model: the dense model.
        calibration: the inputs.
        settings: how the model runs.
        metric: a metric that must be able to score the outputs; default: none.
        guard: limits on the agreement of outputs, one of which must be for such outputs; default: none.

    Raises:
        PlanError: the outputs are no scores of classes, and their difference is not limited.
        GraphError: an output is not finite, or has fewer classes than the labels.
        ModelError: the metric fails, or gives other than one finite number per sample.

    """
    names = [output.name for output in model.graph.output]
    outputs = run_to(model, names, settings)(calibration.feeds[0])
    for name, array in zip(names, outputs, strict=True):
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise GraphError(
                f"output {name!r} contains NaN or infinite values on the calibration inputs: losses cannot be measured"
            )
    if guard is not None and guard.max_difference is None:
        same = compared([outputs], [outputs], [calibration.samples[0]])
        if same.agreement is None:
            raise PlanError(
                f"output {names[0]!r} holds no class scores in rows of samples, so that there is no top-1 agreement: give "
                "max_difference, the largest difference of the outputs in standard deviations, such as 0.05, or a target"
            )
    if metric is not None and calibration.labels is not None:
        sample_scores(metric, dict(zip(names, outputs, strict=True)), calibration.labels[: calibration.samples[0]])
    else:
        require_classes(calibration.labels, outputs[0])


def _spread(shares: Sequence[float]) -> list[int]:
    """Return the options to measure: those that lose most and least, and some between, evenly by the logarithm of the share."""
    order = sorted(range(len(shares)), key=lambda k: shares[k])
    if len(order) <= _POINTS:
        return order
    logs = np.log(np.maximum([shares[k] for k in order], 1e-6))
    places = np.linspace(logs[0], logs[-1], _POINTS)
    nearest = {min(range(len(order)), key=lambda k: (abs(logs[k] - place), k)) for place in places} | {0, len(order) - 1}
    return [order[k] for k in sorted(nearest)]


def outputs_of(model: onnx.ModelProto, names: Sequence[str], inputs: Calibration, settings: Session) -> Outputs:
    """Return the values of some outputs of a model: one list per output, with one array per batch."""
    run = run_to(model, names, settings)
    batches = list(side_by_side(lambda batch: run(inputs.feeds[batch]), len(inputs.feeds), settings))
    return [[batch[k] for batch in batches] for k in range(len(names))]


def _input_moments(
    resolved: ResolvedPlan, layers: Sequence[DenseLayer], calibration: Calibration, settings: Session
) -> dict[str, list[InputMoments]]:
    """Return the moments of the inputs of layers in the main graph, for each group of a convolution."""
    model = resolved.model
    top = {name for node in model.graph.node for name in node.output} | {value.name for value in model.graph.input}
    measurable = [layer for layer in layers if layer.input_name in top and fits(layer.spec)]
    embeddings = [layer for layer in layers if layer.input_name in top and layer.spec.gathers]
    return _moments_of_rows(model, embeddings, calibration, settings) | _moments_of_channels(
        resolved, measurable, calibration, settings
    )


def _moments_of_rows(
    model: onnx.ModelProto, layers: Sequence[DenseLayer], calibration: Calibration, settings: Session
) -> dict[str, list[InputMoments]]:
    """Return the moments of embeddings, whose inputs are one-hot: how often each row is read."""
    if not layers:
        return {}
    indices = outputs_of(model, [layer.input_name for layer in layers], calibration, settings)
    found = {}
    for layer, batches in zip(layers, indices, strict=True):
        root = np.sqrt(tables.row_weights(tables.reads(batches, layer.spec.shape[1]), tables.DEFAULT))
        found[layer.name] = [InputMoments(root, 1 / root, np.zeros(len(root)))]
    return found


def _moments_of_channels(
    resolved: ResolvedPlan, measurable: Sequence[DenseLayer], calibration: Calibration, settings: Session
) -> dict[str, list[InputMoments]]:
    """Return the moments of the inputs of layers whose patches have a full second moment, for each group of a convolution."""
    model = resolved.model
    if not measurable:
        return {}
    samplers = {layer.name: Sampler(layer, calibration.samples) for layer in measurable}
    sums = {layer.name: [_Sums(layer.spec) for _ in range(layer.spec.groups)] for layer in measurable}
    run = run_to(model, [layer.input_name for layer in measurable], settings)
    for k, values in enumerate(side_by_side(lambda k: run(calibration.feeds[k]), len(calibration.feeds), settings)):
        for layer, data in zip(measurable, values, strict=True):
            # Each tap of a patch gives a row for the moment of the channels, so one patch in as many is enough.
            rows = samplers[layer.name].rows(data, k)[:: math.prod(layer.spec.kernel)]
            for own, part in zip(sums[layer.name], np.split(rows, layer.spec.groups, 1), strict=True):
                own.add(part)
    return {
        layer.name: [own.moments(takes_bias(resolved.layers[layer.name])) for own in sums[layer.name]] for layer in measurable
    }


class _Sums:
    """Sums over patches of the inputs of a layer, or of one group of a convolution."""

    def __init__(self, spec: LayerSpec) -> None:
        self.inputs, self.kernel, self.taps = spec.shape[1], spec.kernel, math.prod(spec.kernel)
        self.squares = np.zeros((self.inputs, self.inputs), np.float64)
        self.sums = np.zeros((self.inputs, self.taps), np.float64)
        self.count = 0

    def add(self, patches: np.ndarray) -> None:
        """Add patches (N, I·K)."""
        rows = patches.reshape(-1, self.inputs, self.taps)
        self.count += len(rows)
        self.sums += rows.sum(0, dtype=np.float64)
        channels = np.ascontiguousarray(rows.transpose(0, 2, 1)).reshape(-1, self.inputs)
        self.squares += channels.T @ channels

    def moments(self, biased: bool) -> InputMoments:
        """Return the moments, about the mean if a bias follows the weight."""
        means, second = self.sums / max(1, self.count), self.squares / max(1, self.count)
        if biased:
            centred = second - means @ means.T
            # Inputs that hardly vary leave nothing but rounding about their mean.
            second = centred if np.trace(centred) > 1e-5 * np.trace(second) else second
        root, inverse = roots(Moments(second).shrunk(_SHRINKAGE).gram)
        mean = means if biased else np.zeros_like(means)
        return InputMoments(root, inverse, mean.reshape(self.inputs, *self.kernel))
