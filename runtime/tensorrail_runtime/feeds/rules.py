"""What a model's inputs are: constants, samples along some axis, or states that an output of the step before provides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort

from tensorrail_runtime.errors import ModelError, UsageError
from tensorrail_runtime.sessions.values import TYPES, native, require_shape, typed

Axes = Mapping[str, int | None]
"""The batch axis of each input, by name: 0 for an input that is not listed, None for one that is the same for all samples."""


@dataclass(frozen=True)
class InputRules:
    """How a model's inputs are given values; an input without a rule has its samples along its first axis.

    A first axis of a fixed size is no batch axis if another axis has the name of another input's first axis, as in
    `x [batch, 80]` and `state [2, batch, 128]`, or is the only one of unknown size and name: then samples are along that axis.
    """

    constants: Mapping[str, Any] = field(default_factory=dict)  # Any: a number, or numbers as NumPy takes them
    """Inputs that are the same in every run, by name, such as `{"sr": 16000}`: a number, or an array that is repeated."""
    batch_axes: Axes = field(default_factory=dict)
    """The axis of the samples, such as `{"state": 1}`; None for an input that all samples share."""
    states: Mapping[str, str] = field(default_factory=dict)
    """Inputs that get the value of an output in the step before, such as `{"state": "stateN"}`; zeros in the first step."""


def parse_rules(constants: Sequence[str] = (), batch_axes: Sequence[str] = (), states: Sequence[str] = ()) -> InputRules:
    """Parse the rules of inputs.

    Args:
        constants: texts such as `sr=16000` or `size=224,224`.
        batch_axes: texts such as `state=1`, or `table=none`.
        states: texts such as `state:stateN`.

    Raises:
        UsageError: a text has another form, or an input is named twice.

    """
    rules: tuple[dict[str, Any], dict[str, int | None], dict[str, str]] = ({}, {}, {})  # Any: as in InputRules
    for text in constants:
        name, _, values = text.rpartition("=")
        numbers = [_number(value) for value in values.split(",")]
        if not name or any(number is None for number in numbers):
            raise UsageError(f"input: expected a constant such as sr=16000 or size=224,224, got {text!r}")
        _add(rules[0], name, numbers[0] if len(numbers) == 1 else numbers, "input")
    for text in batch_axes:
        name, _, axis = text.rpartition("=")
        if not name or not (axis == "none" or (axis.isascii() and axis.isdecimal() and len(axis) < 3)):
            raise UsageError(f"batch axis: expected a number from 0, such as state=1, or table=none, got {text!r}")
        _add(rules[1], name, None if axis == "none" else int(axis), "batch axis")
    for text in states:
        parts = text.split(":")
        half = len(parts) // 2  # names may hold colons, such as state:0
        name, output = ":".join(parts[:half]), ":".join(parts[half:])
        if len(parts) % 2 or not name or not output:
            raise UsageError(f"state: expected an input and an output, such as state:stateN, got {text!r}")
        _add(rules[2], name, output, "state")
    return InputRules(*rules)


def _add(rules: dict[str, Any], name: str, value: object, what: str) -> None:  # Any: of one of the three kinds
    if name in rules:
        raise UsageError(f"{what}: {name!r} is given twice; give it once")
    rules[name] = value


def _number(text: str) -> int | float | bool | None:
    text = text.strip()
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if math.isfinite(value) else None
    return None


@dataclass(frozen=True)
class ModelInputs:
    """The inputs of a model with their rules, checked."""

    entries: Mapping[str, ort.NodeArg]
    """The inputs by name, in the model's order."""
    axes: Axes
    """The batch axis of every input."""
    constants: Mapping[str, np.ndarray]
    """The constants in the type that the model takes."""
    states: Mapping[str, str]
    """The output of the step before for each state."""

    @property
    def fixed(self) -> int | None:
        """The batch size of the model where it is fixed, else None; the size of a constant is none."""
        batched = [name for name in self.entries if name not in self.constants]
        sizes = [self.entries[name].shape[axis] for name in batched if (axis := self.axes[name]) is not None]
        return next((size for size in sizes if isinstance(size, int)), None)

    @property
    def given(self) -> list[str]:
        """The inputs whose values must come from data."""
        return [name for name in self.entries if name not in self.constants and name not in self.states]


def model_inputs(session: ort.InferenceSession, rules: InputRules | None = None) -> ModelInputs:
    """Return the inputs of a model with their rules.

    Args:
        session: a session of the model.
        rules: the rules; default: none, so that samples are along the first axes.

    Raises:
        ModelError: a rule names an unknown input or output, an axis that the input does not have, a constant that does not fit
            the input, or an output of another type or shape than the state.

    """
    rules = rules or InputRules()
    entries = {entry.name: entry for entry in session.get_inputs()}
    for what, names in (("constant", rules.constants), ("batch axis", rules.batch_axes), ("state", rules.states)):
        for name in names:
            if name not in entries:
                raise ModelError(f"{what}: unknown input {name!r}; the model's inputs are {', '.join(entries) or 'none'}")
    for name in {*rules.constants} & {*rules.states}:
        raise ModelError(f"input {name!r} is both a constant and a state: expected one of them")
    for name, axis in rules.batch_axes.items():
        count = len(entries[name].shape)
        if axis is not None and count and not 0 <= axis < count:
            raise ModelError(f"batch axis of input {name!r}: expected 0 to {count - 1}, got {axis}")
    outputs = {entry.name: entry for entry in session.get_outputs()}
    for name, output in rules.states.items():
        _check_state(entries[name], outputs, output)
    axes = deduced_axes({name: entry.shape for name, entry in entries.items()}) | dict(rules.batch_axes)
    constants = {name: _constant(value, entries[name], axes[name]) for name, value in rules.constants.items()}
    for name in constants.keys() - rules.batch_axes.keys():
        axis, shape = axes[name], entries[name].shape
        if axis is not None and isinstance(shape[axis], int):  # all samples share it, whatever the batch
            axes[name] = None
    return ModelInputs(entries, axes, constants, dict(rules.states))


def deduced_axes(declared: Mapping[str, Sequence[object]]) -> dict[str, int | None]:
    """Return the batch axis of each input by the declared shapes; None for a scalar.

    Args:
        declared: the shape of each input by name: a number is a fixed size, a text the name of a dynamic axis.

    """
    firsts = {name: axes[0] for name, axes in declared.items() if axes}
    dynamic = any(not isinstance(size, int) for size in firsts.values())
    found: dict[str, int | None] = {}
    for name, axes in declared.items():
        found[name] = 0 if axes else None
        if not axes or not dynamic or not isinstance(axes[0], int):
            continue
        batches = {size for other, size in firsts.items() if other != name and isinstance(size, str)}
        shared = [place for place, size in enumerate(axes) if size in batches]
        unnamed = [place for place, size in enumerate(axes) if not isinstance(size, int)]
        if len(shared) == 1:
            found[name] = shared[0]
        elif len(unnamed) == 1 and not axes[unnamed[0]]:
            found[name] = unnamed[0]
    return found


def _check_state(entry: ort.NodeArg, outputs: Mapping[str, ort.NodeArg], name: str) -> None:
    if name not in outputs:
        raise ModelError(f"state {entry.name!r}: unknown output {name!r}; the model's outputs are {', '.join(outputs)}")
    output = outputs[name]
    sizes = list(zip(entry.shape, output.shape, strict=False))
    unlike = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in sizes)
    if output.type != entry.type or len(output.shape) != len(entry.shape) or unlike or entry.type not in TYPES:
        raise ModelError(
            f"state {entry.name!r}: expected an output like the input, {entry.type} of shape {entry.shape}, got {name!r}, "
            f"{output.type} of shape {output.shape}"
        )


def _constant(value: object, entry: ort.NodeArg, axis: int | None) -> np.ndarray:
    """Return a constant in the type of its input; its axes are the last ones of the input, of the same size or of size 1."""
    try:
        array = native(value)
    except ValueError as error:
        raise ModelError(f"constant {entry.name!r}: expected a number or an array of numbers ({error})") from None
    array = typed(array, entry, "constant")
    if not entry.shape and array.size == 1:
        return array.reshape(())
    if array.ndim > len(entry.shape) or not array.size:
        raise ModelError(f"constant {entry.name!r}: expected shape {entry.shape}, got an array of shape {list(array.shape)}")
    padded = array.reshape((1,) * (len(entry.shape) - array.ndim) + array.shape)
    for place, (size, actual) in enumerate(zip(entry.shape, padded.shape, strict=True)):
        if actual != 1 and isinstance(size, int) and actual != size:
            require_shape(padded, entry, None, "constant")
        if actual != 1 and place == axis and size != actual:
            raise ModelError(
                f"constant {entry.name!r}: expected one value for all samples, got {actual} along the batch axis, {axis}"
            )
    return padded if array.ndim else array
