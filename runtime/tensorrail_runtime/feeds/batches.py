"""Samples in batches, and what of a batch is not divided: constants, shared inputs and whole feeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.feeds.rules import Axes, ModelInputs
from tensorrail_runtime.feeds.sources import Part
from tensorrail_runtime.sessions.values import Values, at_shape

Feed = dict[str, np.ndarray]

LABELS = "labels"


@dataclass(frozen=True)
class Batches:
    """Inputs in batches, as a model takes them."""

    feeds: tuple[Mapping[str, np.ndarray], ...]
    """Each an array per input name, of the model's types."""
    axes: Axes
    """The batch axis of each input; None for one that all samples share."""
    labels: np.ndarray | None = None
    """One label a sample, (N, …), where there are labels."""
    fixed: int | None = None
    """The batch size of the model if it is fixed."""
    whole: bool = False
    """Whether each feed must stay as it is: feeds differ in shape, or their samples cannot be told apart."""
    sequences: np.ndarray | None = None
    """For models with states, the number of the sequence that each sample is a step of, (N,)."""

    @property
    def samples(self) -> list[int]:
        """The number of samples in each feed."""
        return [samples_of(feed, self.axes) for feed in self.feeds]


def samples_of(feed: Mapping[str, np.ndarray], axes: Axes | None = None) -> int:
    """Return the number of samples in a feed: 1 where no input has a batch axis.

    Args:
        feed: the arrays by input name.
        axes: the batch axis of each input, 0 for an input that is not listed; default: 0 for all.

    """
    return next((size for name, array in feed.items() if (size := length_of(name, array, axes or {})) is not None), 1)


def class_column(labels: np.ndarray) -> np.ndarray:
    """Return class labels of shape (N, 1), a column of a table, with shape (N,), and all others as they are."""
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def length_of(name: str, array: np.ndarray, axes: Axes) -> int | None:
    """Return the size of an input's batch axis; None where it has none."""
    axis = axes.get(name, 0)
    return None if axis is None or not array.ndim else int(array.shape[axis])


def cut(part: Part, inputs: ModelInputs, batch: int, most: int | None) -> Batches:
    """Return the samples of a part in batches, or the part as one feed where its arrays are what one run takes."""
    where, arrays = part
    labels = arrays.get(LABELS)
    arrays = {name: array for name, array in arrays.items() if name != LABELS or LABELS in inputs.entries}
    lengths = {name: size for name, array in arrays.items() if (size := length_of(name, array, inputs.axes)) is not None}
    fixed = inputs.fixed
    total = next(iter(lengths.values()), 1)
    if len(set(lengths.values())) > 1:
        total = _declared_length(where, lengths, inputs)
        axes = _varying(inputs)
        return Batches((_complete(arrays, inputs, total),), axes, labels_of(where, labels, total), fixed, whole=True)
    labels = labels_of(where, labels, total)
    if fixed is not None and (not fixed or total % fixed):
        raise ModelError(f"{where}: the model takes batches of {fixed}, got {total} samples: give a multiple of {fixed}")
    size = fixed or batch
    if most is not None and fixed is not None:
        most = max(fixed, most - most % fixed)  # whole batches
    picks = np.arange(total)
    if most is not None and total > most:
        picks = np.linspace(0, total - 1, most).astype(int)
        labels = None if labels is None else labels[picks]
    feeds = [
        _complete(_rows(arrays, picks[start : start + size], inputs.axes), inputs, len(picks[start : start + size]))
        for start in range(0, len(picks), size)
    ]
    return Batches(tuple(feeds), inputs.axes, labels, fixed)


def _rows(arrays: Values, picks: np.ndarray, axes: Axes) -> Feed:
    """Return some samples of each array; an array without a batch axis as it is."""
    rows = {}
    for name, array in arrays.items():
        axis = axes.get(name, 0)
        shared = axis is None or not array.ndim
        rows[name] = array if shared else np.asarray(np.take(array, picks, axis), order="C")
    return rows


def _varying(inputs: ModelInputs) -> Axes:
    """Return the batch axes where some inputs have a fixed size along theirs and others any: None for those of a fixed size."""
    fixed = {
        name for name, axis in inputs.axes.items() if axis is not None and isinstance(inputs.entries[name].shape[axis], int)
    }
    if len(fixed) == sum(axis is not None for axis in inputs.axes.values()):
        return inputs.axes
    return {name: None if name in fixed else axis for name, axis in inputs.axes.items()}


def _declared_length(where: str, lengths: Mapping[str, int], inputs: ModelInputs) -> int:
    """Return the length of the batch axes that may vary where arrays differ only in fixed ones; else raise `ModelError`."""
    sizes = {name: inputs.entries[name].shape[inputs.axes[name] or 0] for name in lengths if inputs.entries[name].shape}
    dynamic = {length for name, length in lengths.items() if not isinstance(sizes.get(name), int)}
    if not dynamic and all(sizes[name] == length for name, length in lengths.items()):
        return inputs.fixed or 1  # what one run takes, as the model declares it
    if len(dynamic) == 1 and all(sizes[name] == length for name, length in lengths.items() if isinstance(sizes.get(name), int)):
        return dynamic.pop()
    raise ModelError(
        f"{where}: the arrays of the inputs differ in length: {dict(lengths)}; expected one row per sample in each: give the "
        "batch axis of an input whose samples are along another axis, or none for an input that all samples share"
    )


def _complete(arrays: Values, inputs: ModelInputs, samples: int) -> Feed:
    """Return a feed with its constants, in the order of the model's inputs."""
    axis_sizes = {
        axis: size
        for name, array in arrays.items()
        for axis, size in zip(inputs.entries[name].shape, array.shape, strict=False)
        if isinstance(axis, str)
    }
    feed = {}
    for name, entry in inputs.entries.items():
        if name not in inputs.constants:
            feed[name] = arrays[name]
            continue
        value = inputs.constants[name]
        shape = []
        for place, size in enumerate(entry.shape):
            own = value.shape[place - len(entry.shape)] if value.ndim >= len(entry.shape) - place else 1
            known = size if isinstance(size, int) else samples if place == inputs.axes[name] else axis_sizes.get(size)
            if known is None and own == 1:
                raise ModelError(
                    f"constant {name!r}: the size of axis {place} of shape {entry.shape} is not known from the other inputs; "
                    "give its values as an array"
                )
            shape.append(known or own)
        feed[name] = at_shape(value, shape)
    return feed


def labels_of(where: str, labels: np.ndarray | None, total: int) -> np.ndarray | None:
    """Return the labels, of which there must be one per sample; raises `ModelError` otherwise."""
    if labels is None:
        return None
    if labels.shape[:1] != (total,):
        raise ModelError(f"{where}: expected one label per sample, got {total} samples and labels of shape {labels.shape}")
    return labels
