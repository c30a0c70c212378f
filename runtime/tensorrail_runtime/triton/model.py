"""Reads the inputs and outputs of a model for Triton, and checks that requests may share a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.serve.protocol.datatypes import DATATYPES, ONNX
from tensorrail_runtime.serve.replicas.batch_axis import unequal
from tensorrail_runtime.sessions.inputs import Shapes
from tensorrail_runtime.sessions.session import run
from tensorrail_runtime.triton.config import Serving, TritonSignature, TritonTensor

# The types that Triton's ONNX Runtime backend takes, by ONNX Runtime's names; bfloat16 is not one of them. Triton's protocol
# has the same types; only strings have another name there than in the configuration.
_TYPES = {onnx_name: f"TYPE_{'STRING' if name == 'BYTES' else name}" for onnx_name, name in ONNX.items()}
_DTYPES = {_TYPES[onnx_name]: DATATYPES[name] for onnx_name, name in ONNX.items()}
_UNBATCHED = "package it without batching (largest batch 0)"
_LOUDER = 10  # the values of the second request in a batch are this many times larger


def signature(path: Path, session: ort.InferenceSession) -> TritonSignature:
    """Return a model's inputs and outputs; raises `ModelError` for one that Triton's backend does not take."""
    graph = onnx.load(path, format="protobuf", load_external_data=False).graph
    unranked = {
        value.name
        for value in (*graph.input, *graph.output)
        if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape")
    }

    def read(entry: ort.NodeArg) -> TritonTensor:
        if entry.type not in _TYPES:
            raise ModelError(f"{path}: {entry.name!r} has type {entry.type}, which Triton's ONNX Runtime backend does not take")
        if not entry.shape and entry.name in unranked:
            raise ModelError(f"{path}: the graph gives no shape for {entry.name!r}: run onnx.shape_inference on it first")
        shape = tuple(size if isinstance(size, int) else -1 for size in entry.shape)
        if 0 in shape:
            raise ModelError(f"{path}: {entry.name!r} has shape {list(shape)}: Triton needs axes of size 1 or more")
        return TritonTensor(entry.name, _TYPES[entry.type], shape)

    if not session.get_inputs():
        raise ModelError(f"{path}: the model has no inputs: expected at least one")
    return TritonSignature(tuple(map(read, session.get_inputs())), tuple(map(read, session.get_outputs())))


def request_shapes(signature: TritonSignature, batched: bool, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the axes of each input in one request, without the batch.

    Args:
        signature: the inputs of the model.
        batched: whether the first axis of the inputs is the batch.
        shapes: shapes of inputs with all their axes, by name, needed for dynamic axes.

    Raises:
        ModelError: a shape does not fit its input, or an input with dynamic axes has no shape.

    """
    names = [tensor.name for tensor in signature.inputs]
    unknown = [name for name in shapes if name not in names]
    if unknown:
        raise ModelError(f"shapes: unknown input {unknown[0]!r}; the model's inputs are {', '.join(names) or 'none'}")
    requests = {}
    for tensor in signature.inputs:
        given = tuple(shapes.get(tensor.name, tensor.shape))
        if len(given) != len(tensor.shape) or any(a not in (-1, b) for a, b in zip(tensor.shape, given, strict=True)):
            raise ModelError(f"input {tensor.name!r}: expected shape {list(tensor.shape)}, got {list(given)}")
        requests[tensor.name] = given[1:] if batched else given
        if -1 in requests[tensor.name]:
            raise ModelError(
                f"input {tensor.name!r} has dynamic axes, {list(tensor.shape)}: give the shape of one request, "
                f"such as {tensor.name}={','.join(str(8 if size == -1 else size) for size in tensor.shape)}"
            )
    return requests


def check_warmup(
    session: ort.InferenceSession,
    signature: TritonSignature,
    serving: Serving,
    requests: Mapping[str, tuple[int, ...]],
    batched: bool,
) -> None:
    """Run one warm-up request; raises `ModelError` if it fails, since Triton would then not serve the model."""
    rng = np.random.default_rng(0)
    feed = {}
    for tensor in signature.inputs:
        shape = (1, *requests[tensor.name]) if batched else requests[tensor.name]
        feed[tensor.name] = _fill(tensor, shape, rng, "bytes" if serving.warmup_data == "random" else "zero")
    try:
        run(session, feed)
    except ModelError as error:
        raise ModelError(
            f"a warm-up request with {serving.warmup_data} data fails, so Triton would not serve the model: {error}"
        ) from None


def check_batching(
    path: Path,
    session: ort.InferenceSession,
    signature: TritonSignature,
    requests: Mapping[str, tuple[int, ...]],
    tolerance: float,
) -> float:
    """Compare both answers of a batch of two requests with the answers to the same requests alone.

    Triton puts requests of different clients into one batch, so no answer may depend on the other requests.

    Args:
        path: the ONNX file, for error messages.
        session: a session of the model.
        signature: its inputs and outputs.
        requests: the axes of each input in one request, without the batch.
        tolerance: the largest difference of an answer.

    Returns:
        The largest difference: the relative L2 difference of floating-point outputs, the share of different entries of others.

    Raises:
        ModelError: the first axis of an output is not the batch, or an answer has another shape or differs by more than the
            tolerance.

    """
    rng = np.random.default_rng(0)
    random = [
        {tensor.name: _fill(tensor, (1, *requests[tensor.name]), rng, "normal") for tensor in signature.inputs}
        for _ in range(2)
    ]
    feeds = unequal(session, random[0], random[1], _LOUDER)
    batched = run(session, {name: np.concatenate([feed[name] for feed in feeds]) for name in random[0]})
    alone = [run(session, feed) for feed in feeds]
    worst = 0.0
    for name, both in batched.items():
        if [np.shape(array)[:1] for array in (both, *(outputs[name] for outputs in alone))] != [(2,), (1,), (1,)]:
            raise ModelError(
                f"{path}: output {name!r} of a batch of 2 has shape {list(both.shape)}: its first axis is not the batch, so "
                f"Triton cannot split it between requests; {_UNBATCHED}"
            )
        for k, outputs in enumerate(alone):
            if both.shape[1:] != outputs[name].shape[1:]:
                raise ModelError(
                    f"{path}: output {name!r} has shape {list(both.shape[1:])} in a batch of 2 and "
                    f"{list(outputs[name].shape[1:])} alone: an answer depends on others in its batch; {_UNBATCHED}"
                )
            worst = max(worst, _difference(path, name, outputs[name][0], both[k]))
    if worst > tolerance:
        raise ModelError(
            f"{path}: an answer changes by {worst:.1e} with another request in its batch; the tolerance is {tolerance:g}: "
            f"Triton batches unrelated requests; {_UNBATCHED}, or with a larger tolerance"
        )
    return worst


def _difference(path: Path, name: str, alone: np.ndarray, batched: np.ndarray) -> float:
    if not np.issubdtype(batched.dtype, np.floating):
        return float(np.mean(alone != batched)) if batched.size else 0.0
    if alone.size and np.isnan(alone).all():
        raise ModelError(f"{path}: output {name!r} is NaN on random inputs, so batching cannot be checked; {_UNBATCHED}")
    if not np.array_equal(np.isnan(alone), np.isnan(batched)):
        return float("inf")
    if not np.array_equal(np.where(np.isinf(alone), np.sign(alone), 0), np.where(np.isinf(batched), np.sign(batched), 0)):
        return float("inf")
    a, b = (np.nan_to_num(array.astype(np.float64), posinf=0.0, neginf=0.0) for array in (alone, batched))
    return float(np.linalg.norm(b - a) / (np.linalg.norm(a) or 1.0))


def _fill(tensor: TritonTensor, shape: Sequence[int], rng: np.random.Generator, how: str) -> np.ndarray:
    """Return an input: zeros, standard normal values (integers: 0 and 1), or, for floats, random bytes as Triton uses."""
    dtype = _DTYPES[tensor.data_type]
    floating = np.issubdtype(dtype, np.floating)
    if tensor.data_type == "TYPE_STRING":
        return np.full(shape, "", dtype)
    if how == "normal":
        return (rng.standard_normal(shape) if floating else rng.integers(0, 2, shape)).astype(dtype)
    if how == "zero" or not floating:
        return np.zeros(shape, dtype)
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)
