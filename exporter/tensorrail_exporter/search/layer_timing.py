"""Times layers, dense and in their forms, in small models of several copies that run in turn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from tensorrail_exporter.graphs.io import save_model
from tensorrail_exporter.plans.costs import dense_cost
from tensorrail_exporter.plans.plan import Precision
from tensorrail_exporter.precision.planned import PRECISIONS
from tensorrail_exporter.rewrite.survey import DenseLayer
from tensorrail_exporter.search.context import copies_of, dense_context, factored_context
from tensorrail_exporter.search.options import Option
from tensorrail_exporter.search.timed_layers import DENSE, Timed, form_of, key_of
from tensorrail_runtime.measure.turns import BURST_ROUNDS, fresh_bursts
from tensorrail_runtime.scratch import scratch
from tensorrail_runtime.sessions.session import Session

_TOGETHER = 10  # forms in one process, timed in turn with the dense layer
_ON_GPU = 12  # the same on a GPU, where a process takes seconds to start; every form needs workspaces in its memory
_LOADED = 2**29  # bytes of weights in one process, where layers are timed in turn
SKETCHED = 96  # models in one process that sketches times
_DENSE_PRECISE = 0.02  # half the 95 % interval of a ratio of dense layers among each other
_DENSE_OF_ALL = 0.001  # the same, of the time of all of them: small layers need not be as precise
_DENSE_ROUNDS = 40  # at most: a network's time is a sum of many layers'
_BURSTS = 20  # runs of a model at least, see `fresh_bursts`
_RATE = 1e10  # multiply-accumulates per second of a slow processor core, to estimate how long a sketch takes


def dense_times(
    layers: Sequence[DenseLayer], settings: Session, seconds: float, precision: Precision
) -> tuple[list[Timed], float]:
    """Return the times of dense layers, and the share of the time that was spent waiting; each is timed for about `seconds`.

    All of them run in turn in one process, so that they are comparable, whatever else the machine does in the meantime. Where
    their weights are too large to be loaded together, each group is timed beside the first layer, and its times are those that
    it would take if the first layer took its usual time.
    """
    groups: list[list[DenseLayer]] = [[layers[0]]]
    for layer in layers[1:]:
        if sum(copies_of(other) * other.bytes for other in (*groups[-1], layer)) > _LOADED and len(groups[-1]) > 1:
            groups.append([layers[0]])
        groups[-1].append(layer)
    how = How(settings, seconds, BURST_ROUNDS, _DENSE_PRECISE, precision)
    results = [timed_together(group, how, (_DENSE_PRECISE, _DENSE_ROUNDS, _DENSE_OF_ALL)) for group in groups]
    usual = float(np.median([times[0] for times, _ in results]))
    milliseconds = [usual]
    for times, _ in results:
        milliseconds += [time * usual / times[0] for time in times[1:]]
    timed = [
        Timed(key=key_of(layer, None), layer=layer.describe(), form=DENSE, milliseconds=time)
        for layer, time in zip(layers, milliseconds, strict=True)
    ]
    return timed, float(np.median([waited for _, waited in results]))


def timed_together(layers: Sequence[DenseLayer], how: How, precise: tuple[float, int, float]) -> tuple[list[float], float]:
    """Return the milliseconds of one copy of each dense layer, timed in turn, and the share that was spent waiting.

    `precise` are the last arguments of `fresh_bursts`.
    """
    with scratch() as folder:
        paths: list[Path] = []
        for layer in layers:
            for copies in dict.fromkeys((copies_of(layer), 1)):
                paths.append(Path(folder) / f"{len(paths)}.onnx")
                _write(dense_context(layer, copies), paths[-1], how.precision)
        measured, waited = fresh_bursts(paths, how.settings, how.seconds * len(layers), how.rounds, *precise)
    rows = iter(measured)
    per_copy = []
    for layer in layers:
        whole, copies = next(rows), copies_of(layer)
        per_copy.append(np.maximum((whole - next(rows)) / (copies - 1) if copies > 1 else whole, 1e-6))
    # Each layer's time is a multiple of the first one's in the same rounds, which may be fewer than that one's.
    first = float(np.nanmedian(per_copy[0]))
    return [max(first * float(np.nanmedian(own / per_copy[0])), 1e-6) for own in per_copy], waited


@dataclass(frozen=True)
class How:
    """How the forms of a layer are timed."""

    settings: Session
    seconds: float  # of each form, about
    rounds: int  # at least
    precise: float  # half the 95 % interval of a ratio of times
    precision: Precision


def layer_times(layer: DenseLayer, options: Sequence[Option], how: How) -> tuple[list[Timed], float]:
    """Return the times of a layer, dense and with these options, and the share of the time that was spent waiting.

    Every form is timed in turn with the dense copies and only the ratio of each pair counts, which cancels other load on the
    machine. The time of the dense layer is the median over all turns. Every group of forms runs in its own process.
    """
    copies = copies_of(layer)
    with scratch() as folder:
        dense_model = dense_context(layer, copies)
        dense, single = Path(folder) / "dense.onnx", Path(folder) / "single.onnx"
        _write(dense_model, dense, how.precision)
        _write(dense_context(layer, 1), single, how.precision)
        groups = loaded_together(layer, options, _ON_GPU if how.settings.on_gpu else _TOGETHER)
        ratios: list[float] = []
        base: list[float] = []
        waits: list[float] = []
        single_ratio = 0.0  # time of a single copy divided by that of all
        for number, group in enumerate(groups):
            paths = [dense, *(Path(folder) / f"{k}.onnx" for k in range(len(group)))]
            for path, option in zip(paths[1:], group, strict=True):
                _write(factored_context(layer, dense_model, option), path, how.precision)
            if number == 0 and copies > 1:
                paths.append(single)
            times, waited = fresh_bursts(paths, how.settings, how.seconds * len(paths), how.rounds, how.precise)
            waits.append(waited)
            base += list(times[0])
            ratios += [float(np.nanmedian(row / times[0])) for row in times[1 : 1 + len(group)]]
            if number == 0 and copies > 1:
                single_ratio = float(np.nanmedian(times[-1] / times[0]))
    timed = _times_of(layer, options, float(np.median(base)), single_ratio, ratios)
    return timed, float(np.median(waits))


def sketched(group: Sequence[tuple[DenseLayer, Sequence[Option]]], settings: Session, precision: Precision) -> list[Timed]:
    """Return rough times of layers and forms: a few runs of each, all in turn in one process."""
    with scratch() as folder:
        paths: list[Path] = []
        for layer, options in group:
            dense = dense_context(layer, copies_of(layer))
            models = [dense, dense_context(layer, 1), *(factored_context(layer, dense, option) for option in options)]
            for model in models:
                paths.append(Path(folder) / f"{len(paths)}.onnx")
                _write(model, paths[-1], precision)
        rows = iter(fresh_bursts(paths, settings, 0.0)[0])
    timed = []
    for layer, options in group:
        whole = next(rows)
        single_ratio, *ratios = (float(np.median(next(rows) / whole)) for _ in range(1 + len(options)))
        timed += _times_of(layer, options, float(np.median(whole)), single_ratio, ratios)
    return timed


def sketch_groups(jobs: Iterable[tuple[DenseLayer, Sequence[Option]]]) -> list[list[tuple[DenseLayer, Sequence[Option]]]]:
    """Return layers with their options in groups, each of which `sketched` can time in one process."""
    groups: list[list[tuple[DenseLayer, Sequence[Option]]]] = []
    models = loaded = 0
    for layer, options in jobs:
        size = copies_of(layer) * layer.bytes * (1 + len(options))
        if not groups or models + 2 + len(options) > SKETCHED or loaded + size > _LOADED:
            groups.append([])
            models = loaded = 0
        groups[-1].append((layer, options))
        models, loaded = models + 2 + len(options), loaded + size
    return groups


def loaded_together(layer: DenseLayer, options: Sequence[Option], most: int) -> list[Sequence[Option]]:
    """Return the options in groups of at most `most`, smaller ones where each form holds much beside its cores.

    Every form of a recurrent weight holds the input weight of its node, which may be hundreds of times larger.
    """
    beside = copies_of(layer) * max(0, layer.bytes - layer.params * layer.dtype.itemsize)
    count = max(1, min(most, _LOADED // max(1, beside)))
    return [options[k : k + count] for k in range(0, len(options), count)] or [()]


def _write(context: onnx.ModelProto, path: Path, precision: Precision) -> None:
    """Write a small model of copies of a layer in the precision that it is timed in."""
    save_model(PRECISIONS[precision].for_layer(context), path)


def sketch_seconds(layer: DenseLayer, options: Sequence[Option]) -> float:
    """Return about how long the models of a layer run in a sketch, by their MACs."""
    copies, macs = copies_of(layer), dense_cost(layer.spec).macs
    own, whole = layer.macs / max(1, layer.nodes), layer.node_macs
    factored = sum(whole - own + own * option.macs / max(1, macs) for option in options)
    return _BURSTS * ((copies + 1) * whole + copies * factored) / _RATE


def _times_of(
    layer: DenseLayer, options: Sequence[Option], whole: float, single_ratio: float, ratios: Sequence[float]
) -> list[Timed]:
    """Return the times of a layer, dense and with these options.

    Args:
        layer: the layer.
        options: the options.
        whole: milliseconds of all dense copies.
        single_ratio: time of a single dense copy divided by that of all.
        ratios: time of all copies with each option, divided by that of all dense copies.

    """
    copies = copies_of(layer)
    per_copy = whole * (1 - single_ratio) / (copies - 1) if copies > 1 else whole
    ends = whole - copies * per_copy  # the part that does not depend on the number of copies
    dense_macs = dense_cost(layer.spec).macs
    timed = [Timed(key=key_of(layer, None), layer=layer.describe(), form=DENSE, milliseconds=max(per_copy, 1e-6))]
    for option, ratio in zip(options, ratios, strict=True):
        # Noise may hide a layer of microseconds: no form is assumed to be more than twice as efficient as the dense layer.
        least = 0.5 * timed[0].milliseconds * option.macs / dense_macs if dense_macs else 0.0
        milliseconds = max((whole * ratio - ends) / copies, least, 1e-6)
        timed.append(Timed(key=key_of(layer, option), layer=layer.describe(), form=form_of(option), milliseconds=milliseconds))
    return timed
