"""Divides calibration inputs into a part to fit to, a part to choose by, and a part that is held out.

What was fitted to some inputs, or chosen by them, is better on these than on any others. Whatever a report says about accuracy
is therefore measured on the part that is held out.

The steps of a sequence are alike, and each has the state that the step before it left. So sequences are divided as a whole or,
where there are few, in runs of consecutive steps: a single step that is held out would lie between two that were fitted to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from tensorrail_exporter.calibrate.inputs import BATCH, Calibration
from tensorrail_runtime.feeds.rules import Axes

_ASIDE = 4  # one sample in four is held out
_CHOOSING = 3  # one in three of the others is for choosing
_LEAST = 32  # samples to hold out, where there are twice as many
_FEWEST = 4  # pieces that can be divided
_SEQUENCES = 8  # that are divided as a whole, at least
_RUNS = 12  # of consecutive steps, where there are fewer sequences


@dataclass(frozen=True)
class Split:
    """Calibration inputs in three parts."""

    fitted: Calibration
    """Inputs that cores are fitted to."""
    chosen: Calibration
    """Inputs that ranks are chosen by; the same as `fitted` where there are too few to divide."""
    judged: Calibration | None
    """Inputs that nothing is fitted to or chosen by; None where there are too few to hold any out."""

    @property
    def holds_out(self) -> bool:
        """Whether the inputs to choose by are others than those to fit to."""
        return self.chosen is not self.fitted

    @property
    def exchanged(self) -> Split:
        """The same with the inputs to fit to and those to choose by exchanged.

        Where fitted networks are compared to find the fastest one that agrees, ranks are chosen by the inputs that cores will
        be fitted to, with approximations from the others (here `fitted`). So networks are compared on inputs that ranks owe
        nearly nothing to.
        """
        return replace(self, fitted=self.chosen, chosen=self.fitted)

    @property
    def seen(self) -> Calibration:
        """All inputs that are not held out: those to fit to once ranks are chosen."""
        return joined(self.fitted, self.chosen) if self.holds_out else self.fitted


def split(calibration: Calibration, model: onnx.ModelProto | None = None, seed: int = 0) -> Split:
    """Divide calibration inputs at random.

    Args:
        calibration: the inputs; for a model with a fixed batch size, and for feeds that cannot be divided into samples, whole
            batches are divided.
        model: the model that they are for, which shows whether its batch size is fixed; default: as `calibration.batch` says.
        seed: seed of the division; default 0.

    Returns:
        A quarter of the samples to judge by, at least 32 where there are 64; of the others, a third to choose by and the rest
        to fit to. Fewer than four samples (or batches of a fixed size) are not divided: nothing is held out.
        Where samples are steps of eight or more sequences, none with more than half of the steps, these are shares of the
        sequences; of fewer, or unequal ones, they are shares of twelve runs of consecutive steps.

    """
    if calibration.batch is None and model is not None:
        calibration = replace(calibration, batch=_fixed_batch(model, calibration.axes))
    pieces = _pieces(calibration)
    if len(pieces) < _FEWEST:
        return Split(calibration, calibration, None)
    groups = _groups(calibration, pieces)
    count = len(groups)
    order = np.random.default_rng(seed).permutation(count)
    samples = calibration.count / count  # in a group
    aside = max(count // _ASIDE, round(_LEAST / samples) if calibration.count >= 2 * _LEAST else 0)
    rest = order[aside:]
    choosing = len(rest) // _CHOOSING

    def part(picks: np.ndarray) -> Calibration:
        return _of(calibration, pieces, np.concatenate([groups[k] for k in picks]))

    fitted = part(rest[choosing:])
    return Split(fitted, part(rest[:choosing]) if choosing else fitted, part(order[:aside]))


def joined(first: Calibration, second: Calibration) -> Calibration:
    """Return the inputs of two parts of the same calibration as one."""
    return replace(
        first,
        feeds=(*first.feeds, *second.feeds),
        labels=_one_after_the_other(first.labels, second.labels),
        sequences=_one_after_the_other(first.sequences, second.sequences),
    )


def _one_after_the_other(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    return None if first is None or second is None else np.concatenate([first, second])


def _fixed_batch(model: onnx.ModelProto, batch_axes: Axes) -> int | None:
    """Return the size of the batch axis of the model's inputs, if that is fixed in all of them that have one.

    An input that is a constant has a fixed size beside others that take any number of samples.
    """
    stored = {tensor.name for tensor in model.graph.initializer}
    sizes = set()
    for value in model.graph.input:
        axes = value.type.tensor_type.shape.dim
        place = batch_axes.get(value.name, 0)
        if value.name not in stored and axes and place is not None:
            sizes.add(max(0, axes[place].dim_value))  # 0: any size, which some exporters write as −1
    return None if not sizes or min(sizes) == 0 else int(max(sizes))


def _pieces(calibration: Calibration) -> list[tuple[int, int]]:
    """Return the batch and the row of every sample; for batches that stay whole, the batches, with row −1."""
    if _is_whole(calibration):
        return [(batch, -1) for batch in range(len(calibration.feeds))]
    return [(batch, row) for batch, size in enumerate(calibration.samples) for row in range(size)]


def _is_whole(calibration: Calibration) -> bool:
    return calibration.whole or calibration.batch is not None


def _groups(calibration: Calibration, pieces: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Return the indices of the pieces that stay together: each alone, or the steps of a sequence, or runs of steps."""
    every = np.arange(len(pieces))
    if calibration.sequences is None:
        return list(every[:, None])
    starts = np.cumsum([0, *calibration.samples])
    own = calibration.sequences[[starts[batch] + max(row, 0) for batch, row in pieces]]
    groups = [np.flatnonzero(own == number) for number in np.unique(own)]
    if len(groups) >= _SEQUENCES and max(map(len, groups)) <= len(pieces) / 2:
        return groups
    return np.array_split(every, min(_RUNS, len(pieces)))


def _of(calibration: Calibration, pieces: Sequence[tuple[int, int]], picks: np.ndarray) -> Calibration:
    """Return some of the pieces, in the order of the inputs."""
    kept = [pieces[k] for k in sorted(picks.tolist())]
    batches, whole = calibration.feeds, _is_whole(calibration)
    starts = np.cumsum([0, *calibration.samples])
    numbers = np.concatenate(
        [np.arange(starts[batch], starts[batch + 1]) if whole else [starts[batch] + row] for batch, row in kept]
    )
    labels, sequences = (None if own is None else own[numbers] for own in (calibration.labels, calibration.sequences))
    if whole:
        feeds = [batches[batch] for batch, _ in kept]
    else:
        groups = [kept[begin : begin + BATCH] for begin in range(0, len(kept), BATCH)]
        feeds = [{name: _rows(calibration, name, group) for name in batches[0]} for group in groups]
    return replace(calibration, feeds=tuple(feeds), labels=labels, sequences=sequences)


def _rows(calibration: Calibration, name: str, group: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return some samples of one input; all of it where the samples share it."""
    batches, axis = calibration.feeds, calibration.axes.get(name, 0)
    if axis is None or not batches[0][name].ndim:
        return batches[0][name]
    return np.concatenate([batches[batch][name].take([row], axis) for batch, row in group], axis)
