"""The inputs of every step of sequences, with the states that the model really has there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnxruntime as ort

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.feeds.batches import Batches, Feed, cut, length_of
from tensorrail_runtime.feeds.rules import ModelInputs
from tensorrail_runtime.feeds.sources import Part
from tensorrail_runtime.sessions.session import run
from tensorrail_runtime.sessions.values import TYPES


def along_sequences(session: ort.InferenceSession, inputs: ModelInputs, parts: Sequence[Part], batch: int) -> Batches:
    """Run the model along each part and return the inputs of every step, joined to batches where their shapes allow it."""
    if inputs.fixed not in (None, 1):
        raise ModelError(
            f"states: a sequence runs one step at a time, but the model takes batches of {inputs.fixed}: expected a batch size "
            "that is 1 or dynamic; give the batch axis of a state whose samples are not along the axis of that size"
        )
    steps: list[Feed] = []
    labels = []
    lengths = []
    for part in parts:
        feeds, own = _sequence(session, inputs, part)
        steps += feeds
        lengths.append(len(feeds))
        labels += [] if own is None else [own]
    numbers = np.repeat(np.arange(len(parts)), lengths)
    whole = Batches(tuple(steps), inputs.axes, np.concatenate(labels) if labels else None, inputs.fixed, sequences=numbers)
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
    steps = cut(
        (where, {name: array for name, array in arrays.items() if name not in inputs.states}), _stepped(inputs), 1, None
    )
    states = {name: arrays[name] if name in arrays else _zeros(where, inputs, name) for name in inputs.states}
    for name, state in states.items():
        if (length := length_of(name, state, inputs.axes)) not in (None, 1):
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
