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
from dataclasses import dataclass, replace

import numpy as np
import onnxruntime as ort

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.sessions.inputs import Shapes
from tensorrail_runtime.sessions.pictures import Preprocessing
from tensorrail_runtime.sessions.rules import Axes, InputRules, ModelInputs, model_inputs
from tensorrail_runtime.sessions.session import run
from tensorrail_runtime.sessions.sources import Part, Source, read_parts
from tensorrail_runtime.sessions.values import TYPES, Values, at_shape, require_shape, typed

Feed = dict[str, np.ndarray]

_LABELS = "labels"


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
    return next((size for name, array in feed.items() if (size := _length(name, array, axes or {})) is not None), 1)


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
    if inputs.states:
        return _thinned(_along_sequences(session, inputs, parts, batch), most)
    where, joined = _joined(parts, inputs)
    if joined is not None:
        return _cut((where, joined), inputs, batch, most)
    cut = [_cut(part, inputs, batch, None) for part in parts]
    labels = None if cut[0].labels is None else np.concatenate([part.labels for part in cut if part.labels is not None])
    feeds = tuple(feed for part in cut for feed in part.feeds)
    return _thinned(replace(cut[0], feeds=feeds, labels=labels, whole=True), most)


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
    axis_sizes = {  # by the name of a dynamic axis
        axis: size
        for name, shape in known.items()
        if name in inputs.entries
        for axis, size in zip(inputs.entries[name].shape, shape, strict=False)
        if isinstance(axis, str)
    }
    for name, entry in inputs.entries.items():
        values.setdefault(name, feed[name])
        own = inputs.axes[name]
        dynamic = [place for place, size in enumerate(entry.shape) if not isinstance(size, int)]
        if name in known or not [place for place in dynamic if place != own]:
            continue
        sizes = list(feed[name].shape)
        for place in dynamic:
            sizes[place] = axis_sizes.get(entry.shape[place], batch if place == own else sizes[place])
        known[name] = tuple(sizes)
    return known, values


def _length(name: str, array: np.ndarray, axes: Axes) -> int | None:
    axis = axes.get(name, 0)
    return None if axis is None or not array.ndim else int(array.shape[axis])


def _taken(part: Part, inputs: ModelInputs) -> Part:
    """Return the arrays of the model's inputs, typed and checked, and the labels."""
    where, arrays = part
    labels = {} if _LABELS in inputs.entries else {_LABELS: arrays[_LABELS]} if _LABELS in arrays else {}
    others = {name: array for name, array in arrays.items() if name != _LABELS or _LABELS in inputs.entries}
    given = inputs.given
    free = [name for name in others if name not in inputs.entries]
    if len(given) == 1 and given[0] not in others and len(free) == 1:
        others = {**others, given[0]: others[free[0]]}
    missing = [name for name in given if name not in others]
    if missing:
        raise ModelError(
            f"{where}: no array for input {missing[0]!r}; expected {', '.join(given)}, got {', '.join(others) or 'none'}"
        )
    taken = {}
    for name, entry in inputs.entries.items():
        if name in inputs.constants or name not in others:  # a state without a start
            continue
        array = typed(others[name], entry, where)
        if not array.size:
            raise ModelError(f"{where}: the array of input {name!r} holds no data; expected one or more samples")
        if not entry.shape and array.shape == (1,):
            array = array.reshape(())
        require_shape(array, entry, inputs.axes[name], where)
        taken[name] = array
    return where, taken | {name: np.asarray(array) for name, array in labels.items()}


def _joined(parts: Sequence[Part], inputs: ModelInputs) -> Part | tuple[str, None]:
    """Return all parts as one, with the samples of one after those of the other; None if their shapes do not allow it."""
    where, first = parts[0]
    if len(parts) == 1:
        return where, first
    axes = dict(inputs.axes) | {_LABELS: 0}
    for _, arrays in parts:
        lengths = {_length(name, array, axes) for name, array in arrays.items() if name != _LABELS} - {None}
        if len(lengths) > 1:
            return where, None
        for name, array in arrays.items():
            axis = axes.get(name, 0)
            if _length(name, array, axes) is None:
                if not np.array_equal(array, first[name]):
                    return where, None
            elif name != _LABELS and _without(array.shape, axis) != _without(first[name].shape, axis):
                return where, None
    joined = {
        name: array
        if _length(name, array, axes) is None
        else np.concatenate([arrays[name] for _, arrays in parts], axes.get(name, 0) or 0)
        for name, array in first.items()
    }
    return where, joined


def _without(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    return tuple(size for place, size in enumerate(shape) if place != axis)


def _cut(part: Part, inputs: ModelInputs, batch: int, most: int | None) -> Batches:
    """Return the samples of a part in batches, or the part as one feed where its arrays are what one run takes."""
    where, arrays = part
    labels = arrays.get(_LABELS)
    arrays = {name: array for name, array in arrays.items() if name != _LABELS or _LABELS in inputs.entries}
    lengths = {name: size for name, array in arrays.items() if (size := _length(name, array, inputs.axes)) is not None}
    fixed = inputs.fixed
    total = next(iter(lengths.values()), 1)
    if len(set(lengths.values())) > 1:
        total = _declared_length(where, lengths, inputs)
        feed = _complete(arrays, inputs, total)
        return Batches((feed,), inputs.axes, _labels(where, labels, samples_of(feed, inputs.axes)), fixed, whole=True)
    labels = _labels(where, labels, total)
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


def _declared_length(where: str, lengths: Mapping[str, int], inputs: ModelInputs) -> int:
    """Return the length of the dynamic batch axes where arrays differ only in axes of fixed size; else raise `ModelError`."""
    sizes = {name: inputs.entries[name].shape[inputs.axes[name] or 0] for name in lengths if inputs.entries[name].shape}
    dynamic = {length for name, length in lengths.items() if not isinstance(sizes.get(name), int)}
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


def _labels(where: str, labels: np.ndarray | None, total: int) -> np.ndarray | None:
    if labels is None:
        return None
    if not labels.ndim and total == 1:
        labels = labels.reshape(1)
    if labels.shape[:1] != (total,):
        raise ModelError(f"{where}: expected one label per sample, got {total} samples and labels of shape {labels.shape}")
    return labels


def _thinned(batches: Batches, most: int | None) -> Batches:
    """Return some of the feeds, spread evenly, with about `most` samples in all."""
    samples = batches.samples
    if most is None or sum(samples) <= most:
        return batches
    count = max(1, int(most * len(samples) / sum(samples)))
    picks = np.linspace(0, len(samples) - 1, count).astype(int)
    starts = np.cumsum([0, *samples])
    kept = np.concatenate([np.arange(starts[k], starts[k + 1]) for k in picks])
    labels = None if batches.labels is None else batches.labels[kept]
    return replace(batches, feeds=tuple(batches.feeds[k] for k in picks), labels=labels)


def _along_sequences(session: ort.InferenceSession, inputs: ModelInputs, parts: Sequence[Part], batch: int) -> Batches:
    """Run the model along each part and return the inputs of every step, joined to batches where their shapes allow it."""
    if inputs.fixed not in (None, 1):
        raise ModelError(
            f"states: a sequence runs one step at a time, but the model takes batches of {inputs.fixed}: expected a batch size "
            "that is 1 or dynamic; give the batch axis of a state whose samples are not along the axis of that size"
        )
    steps: list[Feed] = []
    labels = []
    for part in parts:
        feeds, own = _sequence(session, inputs, part)
        steps += feeds
        labels += [] if own is None else [own]
    whole = Batches(tuple(steps), inputs.axes, np.concatenate(labels) if labels else None, inputs.fixed)
    shared = [name for name in inputs.entries if inputs.axes[name] is None or not steps[0][name].ndim]
    alike = all(
        {name: array.shape for name, array in step.items()} == {name: array.shape for name, array in steps[0].items()}
        and all(np.array_equal(step[name], steps[0][name]) for name in shared)
        for step in steps
    )
    if inputs.fixed is not None or not alike:
        return replace(whole, whole=not alike)
    groups = [steps[start : start + batch] for start in range(0, len(steps), batch)]
    feeds = [
        {
            name: array if name in shared else np.concatenate([step[name] for step in group], inputs.axes[name] or 0)
            for name, array in group[0].items()
        }
        for group in groups
    ]
    return replace(whole, feeds=tuple(feeds))


def _sequence(session: ort.InferenceSession, inputs: ModelInputs, part: Part) -> tuple[list[Feed], np.ndarray | None]:
    """Return the inputs of every step of one sequence, in which each state is an output of the step before, and the labels."""
    where, arrays = part
    steps = _cut(
        (where, {name: array for name, array in arrays.items() if name not in inputs.states}), _stepped(inputs), 1, None
    )
    states = {name: arrays[name] if name in arrays else _zeros(where, inputs, name) for name in inputs.states}
    for name, state in states.items():
        if (length := _length(name, state, inputs.axes)) not in (None, 1):
            raise ModelError(f"{where}: state {name!r}: expected the start of one sequence, got {length} along its batch axis")
    feeds = []
    for number, step in enumerate(steps.feeds):
        feed = {name: states[name] if name in states else step[name] for name in inputs.entries}
        feeds.append(feed)
        outputs = run(session, feed)
        states = {name: np.asarray(outputs[output]) for name, output in inputs.states.items()}
        for name, state in states.items():
            if state.dtype.kind == "f" and not np.isfinite(state).all():
                raise ModelError(
                    f"{where}: output {inputs.states[name]!r}, which is state {name!r} of the next step, contains NaN or "
                    f"infinite values after step {number}; check the inputs"
                )
    return feeds, steps.labels


def _stepped(inputs: ModelInputs) -> ModelInputs:
    """Return the inputs without the states."""
    return replace(inputs, entries={name: entry for name, entry in inputs.entries.items() if name not in inputs.states})


def _zeros(where: str, inputs: ModelInputs, name: str) -> np.ndarray:
    entry, axis = inputs.entries[name], inputs.axes[name]
    shape = [1 if place == axis else size for place, size in enumerate(entry.shape)]
    unknown = [size for size in shape if not isinstance(size, int)]
    if unknown:
        raise ModelError(
            f"{where}: state {name!r} starts at zeros, but the model does not say its size, {entry.shape}: give its start as "
            "an array of this name"
        )
    return np.zeros(shape, TYPES[entry.type])
