"""What Triton needs to know of a model, read from its session, and whether it holds: that requests may share a batch."""

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

# The types that Triton's ONNX Runtime backend takes, by ONNX Runtime's names; bfloat16 is not one of them. The protocol that
# Triton speaks has the same ones, and calls strings otherwise than the configuration does.
_TYPES = {onnx_name: f"TYPE_{'STRING' if name == 'BYTES' else name}" for onnx_name, name in ONNX.items()}
_DTYPES = {_TYPES[onnx_name]: DATATYPES[name] for onnx_name, name in ONNX.items()}
_LOUDER = 10  # times the other request of a batch


def signature(path: Path, session: ort.InferenceSession) -> TritonSignature:
    """Return a model's inputs and outputs; `ModelError` names one that Triton's ONNX Runtime backend does not take."""
    graph = onnx.load(path, load_external_data=False).graph
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


def request_shapes(found: TritonSignature, batched: bool, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Return each input's axes in one request, the batch left out, from the graph and from `shapes`, which hold all axes.

    `ModelError` for a shape that does not fit its input, and for an axis of any size without one.
    """
    names = [tensor.name for tensor in found.inputs]
    unknown = [name for name in shapes if name not in names]
    if unknown:
        raise ModelError(f"shapes: unknown input {unknown[0]!r}; the model's inputs are {', '.join(names) or 'none'}")
    made = {}
    for tensor in found.inputs:
        given = tuple(shapes.get(tensor.name, tensor.shape))
        if len(given) != len(tensor.shape) or any(a not in (-1, b) for a, b in zip(tensor.shape, given, strict=True)):
            raise ModelError(f"input {tensor.name!r}: expected shape {list(tensor.shape)}, got {list(given)}")
        made[tensor.name] = given[1:] if batched else given
        if -1 in made[tensor.name]:
            raise ModelError(
                f"input {tensor.name!r} has dynamic axes, {list(tensor.shape)}: give the shape of one request, "
                f"--shape {tensor.name}={','.join(str(8 if size == -1 else size) for size in tensor.shape)}"
            )
    return made


def check_warmup(
    session: ort.InferenceSession,
    found: TritonSignature,
    serving: Serving,
    requests: Mapping[str, tuple[int, ...]],
    batched: bool,
) -> None:
    """Run one warm-up request here: one that fails would keep Triton from serving the model. `ModelError` says why it fails."""
    rng = np.random.default_rng(0)
    feed = {}
    for tensor in found.inputs:
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
    found: TritonSignature,
    requests: Mapping[str, tuple[int, ...]],
    tolerance: float,
) -> float:
    """Hold both answers of a batch of two against the same alone; return the largest difference.

    Triton puts requests of different clients into one batch, so no answer may depend on its neighbour. It is the relative L2
    difference of floating-point numbers, and the share of others that differ. `ModelError` when the first axis of an output is
    not the batch, an answer has another shape alone, or differs by more than `tolerance`.
    """
    rng = np.random.default_rng(0)
    drawn = [
        {tensor.name: _fill(tensor, (1, *requests[tensor.name]), rng, "normal") for tensor in found.inputs} for _ in range(2)
    ]
    alone_on = unequal(session, drawn[0], drawn[1], _LOUDER)
    together = run(session, {name: np.concatenate([one[name] for one in alone_on]) for name in drawn[0]})
    alone = [run(session, one) for one in alone_on]
    worst = 0.0
    for name, both in together.items():
        if [np.shape(array)[:1] for array in (both, *(one[name] for one in alone))] != [(2,), (1,), (1,)]:
            raise ModelError(
                f"{path}: output {name!r} of a batch of 2 has shape {list(both.shape)}: its first axis is not the batch, so "
                f"Triton cannot split it between requests; use --max-batch 0"
            )
        for k, one in enumerate(alone):
            if both.shape[1:] != one[name].shape[1:]:
                raise ModelError(
                    f"{path}: output {name!r} has shape {list(both.shape[1:])} in a batch of 2 and {list(one[name].shape[1:])} "
                    f"alone: an answer depends on other requests in its batch; use --max-batch 0"
                )
            worst = max(worst, _apart(path, name, one[name][0], both[k]))
    if worst > tolerance:
        raise ModelError(
            f"{path}: an answer changes by {worst:.1e} with another request in its batch; the tolerance is {tolerance:g}: "
            f"Triton batches unrelated requests; use --max-batch 0, or a larger --tolerance"
        )
    return worst


def _apart(path: Path, name: str, alone: np.ndarray, batched: np.ndarray) -> float:
    if not np.issubdtype(batched.dtype, np.floating):
        return float(np.mean(alone != batched)) if batched.size else 0.0
    if alone.size and np.isnan(alone).all():
        raise ModelError(f"{path}: output {name!r} is NaN on random inputs, so batching cannot be checked; use --max-batch 0")
    if not np.array_equal(np.isnan(alone), np.isnan(batched)):
        return float("inf")
    a, b = (np.nan_to_num(array.astype(np.float64), posinf=0.0, neginf=0.0) for array in (alone, batched))
    return float(np.linalg.norm(b - a) / (np.linalg.norm(a) or 1.0))


def _fill(tensor: TritonTensor, shape: Sequence[int], rng: np.random.Generator, how: str) -> np.ndarray:
    """Return an input: zeros, standard normal values (integers: 0 and 1), or for floats random bytes, as Triton makes them."""
    dtype = _DTYPES[tensor.data_type]
    floating = np.issubdtype(dtype, np.floating)
    if tensor.data_type == "TYPE_STRING":
        return np.full(shape, "", dtype)
    if how == "normal":
        return (rng.standard_normal(shape) if floating else rng.integers(0, 2, shape)).astype(dtype)
    if how == "zero" or not floating:
        return np.zeros(shape, dtype)
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)
