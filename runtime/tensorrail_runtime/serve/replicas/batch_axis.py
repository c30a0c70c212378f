"""Finds the batch axis of a model's inputs and outputs: candidates by name, each tested by running the model.

Requests may be concatenated along an axis only if f(a ‖ b) = f(a) ‖ f(b). A dynamic first axis alone does not guarantee that:
it may be time, as in a recurrent network that takes (time, batch, features), and a graph may compute one scale over the whole
batch, as dynamic quantization does. So each candidate is tested on random inputs, concatenated and separate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnxruntime as ort

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.serve.protocol.signature import Signature, TensorSpec
from tensorrail_runtime.sessions.inputs import random_inputs
from tensorrail_runtime.sessions.session import run

Axes = Mapping[str, int]  # the batch axis of every input and every output, by name

TOLERANCE = 1e-4  # relative to an output's largest value: rounding differs by less, dynamic quantization by 1e-3 or more
_SIZES = (8, 64, 224)  # tried for other dynamic axes, since images may have a smallest size
_ROWS = (1, 2)  # samples of the two requests
_RANGES = ((50, 255), (1, 3))  # largest integers of the two requests: for images, dark and bright, and for lengths


def find_batch_axis(session: ort.InferenceSession, signature: Signature) -> tuple[Axes | None, str]:
    """Return the batch axes that passed the test, or None, and a text that names the axis or says why there is none."""
    reason = "no dynamic axis is shared by all inputs and outputs"
    for name, axes in _candidates(signature):
        problem = _disproof(session, signature, axes)
        if problem is None:
            return axes, f"along axis {name}"
        reason = f"axis {name}: {problem}"
    return None, reason


def _candidates(signature: Signature) -> Iterator[tuple[str, Axes]]:
    """Yield axes that could be the batch: the first axis, then each named axis that every tensor has once."""
    tensors = (*signature.inputs, *signature.outputs)
    if not signature.inputs:
        return
    if all(tensor.shape and not isinstance(tensor.shape[0], int) for tensor in tensors):
        first = signature.inputs[0].shape[0]
        yield (f"0 ({first})" if isinstance(first, str) else "0"), {tensor.name: 0 for tensor in tensors}
    for name in dict.fromkeys(axis for axis in signature.inputs[0].shape if isinstance(axis, str)):
        if all(tensor.shape.count(name) == 1 for tensor in tensors):
            axes = {tensor.name: tensor.shape.index(name) for tensor in tensors}
            if any(axes.values()):  # if all are 0, it is the first candidate
                yield name, axes


def _disproof(session: ort.InferenceSession, signature: Signature, axes: Axes) -> str | None:
    """Return why requests cannot be concatenated along the axes; None if the test passes."""
    problem = ""
    for size in _SIZES:
        try:
            first, second = (_draw(session, signature.inputs, axes, rows, size, seed) for seed, rows in enumerate(_ROWS))
            feeds = unequal(session, first, second)
            separate = [run(session, feed) for feed in feeds]
            joined = run(session, {name: np.concatenate([feed[name] for feed in feeds], axes[name]) for name in feeds[0]})
        except ModelError as error:
            problem = problem or str(error)
            continue
        return next((text for name in joined if (text := _differs(name, joined[name], separate, axes[name]))), None)
    return f"it could not be tested ({problem})"


def _draw(
    session: ort.InferenceSession, inputs: Sequence[TensorSpec], axes: Axes, rows: int, size: int, seed: int
) -> dict[str, np.ndarray]:
    """Return random inputs of `rows` samples."""
    shapes = {}
    for tensor in inputs:
        shape = [axis if isinstance(axis, int) else size for axis in tensor.shape]
        shape[axes[tensor.name]] = rows
        shapes[tensor.name] = shape
    return random_inputs(session, seed=seed, shapes=shapes)


def unequal(
    session: ort.InferenceSession, quiet: Mapping[str, np.ndarray], loud: Mapping[str, np.ndarray], times: float = 3
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return two requests, the second with larger values, so that a scale, length or mask over the whole batch is detected.

    Floating-point values of the second request are multiplied by `times`. Integers are drawn again from two ranges, the widest
    on which the model runs: an index may have only few values.
    """
    first, second = dict(quiet), dict(loud)
    second |= {name: (array * times).astype(array.dtype) for name, array in loud.items() if array.dtype.kind == "f"}
    rng = np.random.default_rng(0)
    for name, array in quiet.items():
        if array.dtype.kind not in "iu":
            continue
        for ranges in _RANGES:
            largest = np.iinfo(array.dtype).max
            a, b = (
                rng.integers(0, min(high, largest), feed[name].shape, endpoint=True).astype(array.dtype)
                for high, feed in zip(ranges, (quiet, loud), strict=True)
            )
            try:
                run(session, {**first, name: a})
                run(session, {**second, name: b})
            except ModelError:
                continue
            first[name], second[name] = a, b
            break
    return first, second


def _differs(name: str, joined: np.ndarray, separate: Sequence[Mapping[str, np.ndarray]], axis: int) -> str | None:
    parts = [outputs[name] for outputs in separate]
    if any(part.ndim <= axis or part.shape[axis] != rows for part, rows in zip(parts, _ROWS, strict=True)):
        return f"output {name!r} has a different length along it than the inputs"
    try:
        expected = np.concatenate(parts, axis)
    except ValueError:
        return f"output {name!r} has shapes that cannot be concatenated along it"
    if joined.shape != expected.shape:
        return f"output {name!r} has shape {list(joined.shape)} for a batch, but {list(expected.shape)} for its parts"
    if joined.dtype.kind != "f":
        return None if np.array_equal(joined, expected) else f"output {name!r} differs between a batch and its parts"
    if not np.isfinite(expected).all():
        return f"output {name!r} holds NaN or infinity on random inputs, so batching cannot be tested"
    difference = float(np.abs(joined.astype(np.float64) - expected).max(initial=0))
    if difference <= TOLERANCE * float(np.abs(expected.astype(np.float64)).max(initial=0)):
        return None
    return f"output {name!r} differs between a batch and its parts (by {difference:.1e})"
