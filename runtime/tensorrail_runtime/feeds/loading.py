"""Inputs in batches, from files or arrays: the one loader that every command uses.

An array holds samples along the batch axis of its input, and is cut into batches. Three kinds of inputs are not:

- *Constants* and inputs without a batch axis go into every batch.
- *Whole feeds*: where inputs have a batch axis of fixed size and others do not, one file holds what one run takes. The files of
  a folder are joined to one set of samples if their shapes allow it; otherwise each file is a feed by itself.
- *Sequences*: with states, samples are the steps of a sequence, in order. The model runs along each sequence, one step a run,
  and each feed has the states that it really had there. Afterwards the steps are samples like all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnxruntime as ort

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.feeds.batches import LABELS, Batches, cut, labels_of, length_of
from tensorrail_runtime.feeds.pictures import Preprocessing
from tensorrail_runtime.feeds.rules import InputRules, ModelInputs, model_inputs
from tensorrail_runtime.feeds.sequences import along_sequences
from tensorrail_runtime.feeds.sources import Part, Source, read_parts
from tensorrail_runtime.sessions.inputs import Shapes
from tensorrail_runtime.sessions.values import Values, require_shape, typed


def load_batches(
    source: Source,
    session: ort.InferenceSession,
    rules: InputRules | None = None,
    *,
    batch: int,
    most: int | None = None,
    images: Preprocessing | None = None,
) -> Batches:
    """Return inputs in batches: typed, checked, in native byte order and contiguous.

    Args:
        source: an npz file, a folder of npz, npy or image files, or arrays by input name; arrays that are no inputs are
            ignored, but `labels` are kept. Where one input needs values and there is one array, names need not match.
        session: a session of the model; with states, the model runs along the sequences in it.
        rules: constants, batch axes and states; default: none.
        batch: the largest number of samples in a batch; a model with a fixed batch size gets batches of that size.
        most: largest number of samples, which are spread evenly over the data; default: all.
        images: how images become inputs; default: as for ImageNet models.

    Returns:
        The batches.

    Raises:
        ModelError: the data cannot be read, or do not fit the model or the rules.

    """
    inputs = model_inputs(session, rules)
    if not inputs.entries:
        raise ModelError("the model has no inputs, so it cannot be run on data")
    entries = [inputs.entries[name] for name in inputs.given]
    parts = [_taken(part, inputs) for part in read_parts(source, entries, most, images)]
    if not parts:
        raise ModelError("expected one or more sets of input arrays, got none")
    _check_labels(parts)
    if inputs.states:
        return _thinned(along_sequences(session, inputs, parts, batch), most)
    where, joined = _joined(parts, inputs)
    if joined is not None:
        return cut((where, joined), inputs, batch, most)
    pieces = [cut(part, inputs, batch, None) for part in parts]
    labels = [piece.labels for piece in pieces if piece.labels is not None]
    feeds = tuple(feed for piece in pieces for feed in piece.feeds)
    whole = replace(pieces[0], feeds=feeds, labels=np.concatenate(labels) if labels else None, whole=True)
    return _thinned(whole, most)


def known_values(
    session: ort.InferenceSession,
    rules: InputRules | None,
    batches: Batches | None,
    batch: int = 1,
    shapes: Shapes | None = None,
) -> tuple[dict[str, tuple[int, ...]], Values]:
    """Return the shapes and values that a model is timed with.

    Args:
        session: a session of the model.
        rules: the rules of its inputs.
        batches: typical inputs, of which the first feed counts; None where there are none.
        batch: the number of samples in a run.
        shapes: given shapes of inputs, by name.

    Returns:
        The given shapes, and the shapes of further inputs that have dynamic axes beside the batch: as in the typical inputs.
        The values of constants, and of all inputs where there are typical ones.

    """
    inputs = model_inputs(session, rules)
    values: dict[str, np.ndarray] = dict(inputs.constants)
    known = {name: tuple(shape) for name, shape in (shapes or {}).items()}
    if batches is None or not batches.feeds:
        return known, values
    feed = batches.feeds[0]
    sizes: dict[object, int] = {  # by the name of a dynamic axis
        axis: size
        for name, shape in known.items()
        if name in inputs.entries
        for axis, size in zip(inputs.entries[name].shape, shape, strict=False)
        if isinstance(axis, str)
    }
    for name, entry in inputs.entries.items():
        if name not in feed or feed[name].ndim < len(entry.shape):
            continue  # a run says what is missing
        values.setdefault(name, feed[name])
        shape = _timed_shape(entry.shape, feed[name].shape, inputs.axes[name], batch, sizes)
        if shape is not None:
            known.setdefault(name, shape)
    return known, values


def _timed_shape(
    declared: Sequence[object], actual: Sequence[int], axis: int | None, batch: int, sizes: Mapping[object, int]
) -> tuple[int, ...] | None:
    """Return the shape of an input in a run of some samples; None if no axis but that of the batch is dynamic."""
    dynamic = [place for place, size in enumerate(declared) if not isinstance(size, int)]
    if not set(dynamic) - {axis}:
        return None
    shape = list(actual)
    for place in dynamic:
        shape[place] = sizes.get(declared[place], batch if place == axis else actual[place])
    return tuple(shape)


def _taken(part: Part, inputs: ModelInputs) -> Part:
    """Return the arrays of the model's inputs, typed and checked, and the labels."""
    where, arrays = part
    labels = {} if LABELS in inputs.entries else {LABELS: arrays[LABELS]} if LABELS in arrays else {}
    others = {name: array for name, array in arrays.items() if name != LABELS or LABELS in inputs.entries}
    given = inputs.given
    free = [name for name in others if name not in inputs.entries]
    if len(given) == 1 and given[0] not in others and len(free) == 1:
        others = {**others, given[0]: others[free[0]]}
    missing = [name for name in given if name not in others]
    if missing:
        raise ModelError(
            f"{where}: no array for input {missing[0]!r}; expected {', '.join(given)}, got {', '.join(others) or 'none'}: "
            "add the array, or say that the input is a constant or a state"
        )
    taken = {}
    for name, entry in inputs.entries.items():
        if name in inputs.constants or name not in others:  # a state without a start
            continue
        array = typed(others[name], entry, where)
        if not array.size and (not array.ndim or not array.shape[inputs.axes[name] or 0]):
            raise ModelError(f"{where}: the array of input {name!r} holds no data; expected one or more samples")
        if not entry.shape and array.shape == (1,):
            array = array.reshape(())
        require_shape(array, entry, inputs.axes[name], where)
        taken[name] = array
    return where, taken | {name: np.atleast_1d(array) for name, array in labels.items()}


def _check_labels(parts: Sequence[Part]) -> None:
    """Raise `ModelError` unless all parts have labels of one shape for each sample, or none has labels."""
    shapes = [arrays[LABELS].shape[1:] if LABELS in arrays else None for _, arrays in parts]
    for (where, _), shape in zip(parts, shapes, strict=True):
        if shape != shapes[0]:
            first, this = ("none" if one is None else f"labels of shape {list(one)} a sample" for one in (shapes[0], shape))
            raise ModelError(f"{where}: expected {first}, as in {parts[0][0]}, got {this}")


def _joined(parts: Sequence[Part], inputs: ModelInputs) -> Part | tuple[str, None]:
    """Return all parts as one, with the samples of one after those of the other; None if their shapes do not allow it."""
    where, first = parts[0]
    if len(parts) == 1:
        return where, first
    axes = dict(inputs.axes) | {LABELS: 0}
    for own, arrays in parts:
        lengths = {length_of(name, array, axes) for name, array in arrays.items() if name != LABELS} - {None}
        if len(lengths) > 1:
            return where, None
        labels_of(own, arrays.get(LABELS), next((size for size in lengths if size is not None), 1))
        for name, array in arrays.items():
            axis = axes.get(name, 0)
            if length_of(name, array, axes) is None:
                if not np.array_equal(array, first[name]):
                    return where, None
            elif name != LABELS and _without(array.shape, axis) != _without(first[name].shape, axis):
                return where, None
    joined = {
        name: array
        if length_of(name, array, axes) is None
        else np.concatenate([arrays[name] for _, arrays in parts], axes.get(name, 0) or 0)
        for name, array in first.items()
    }
    return where, joined


def _without(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    return tuple(size for place, size in enumerate(shape) if place != axis)


def _thinned(batches: Batches, most: int | None) -> Batches:
    """Return some of the feeds, spread evenly, with about `most` samples in all."""
    samples = batches.samples
    if most is None or sum(samples) <= most:
        return batches
    count = max(1, int(most * len(samples) / sum(samples)))
    picks = np.linspace(0, len(samples) - 1, count).astype(int)
    starts = np.cumsum([0, *samples])
    kept = np.concatenate([np.arange(starts[k], starts[k + 1]) for k in picks])
    labels, sequences = (None if own is None else own[kept] for own in (batches.labels, batches.sequences))
    return replace(batches, feeds=tuple(batches.feeds[k] for k in picks), labels=labels, sequences=sequences)
