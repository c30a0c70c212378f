"""Writes Triton's `config.pbtxt` for an ONNX model: the options of serving, as fields and as protobuf text.

The fields and their rules are those of `ModelConfig` (triton-inference-server/common, protobuf/model_config.proto). The README
and `src/onnxruntime.cc` of triton-inference-server/onnxruntime_backend say how the ONNX Runtime backend uses them. The text is
written here, so that no package of Triton is needed; the tests parse it with Triton's own schema.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.sessions.session import Session

MODEL_FILE = "model.onnx"
_DEFAULT_BATCH = 8
_INT32 = 2**31 - 1
# The backend reads -1 as basic, 1 as extended and 2 as none; 0, the default, is all.
_LEVELS = {"none": 2, "basic": -1, "extended": 1}
_FLOATS = ("TYPE_FP16", "TYPE_FP32", "TYPE_FP64")


class Name(str):
    """A value that is written without quotes: the name of an enum value, `true` or `false`."""

    __slots__ = ()


@dataclass(frozen=True)
class TritonTensor:
    """An input or output: its name, Triton's name of its data type, and its shape in the graph, -1 for a dynamic axis."""

    name: str
    data_type: str
    shape: tuple[int, ...]

    def dims(self, batched: bool) -> tuple[int, ...]:
        """Return the axes that the configuration lists: without the batch, and [1] for a scalar."""
        return (self.shape[1:] if batched else self.shape) or (1,)


@dataclass(frozen=True)
class TritonSignature:
    """The inputs and outputs of a model."""

    inputs: tuple[TritonTensor, ...]
    outputs: tuple[TritonTensor, ...]

    @property
    def unbatched(self) -> TritonTensor | None:
        """The first tensor whose first axis is not dynamic, so that Triton cannot batch it; None if there is none."""
        return next((t for t in (*self.inputs, *self.outputs) if t.shape[:1] != (-1,)), None)


@dataclass(frozen=True)
class Serving:
    """How Triton serves a model.

    Attributes:
        settings: the provider and the options of the session.
        max_batch: the largest batch; 0 for a model whose first axis is not the batch. None means 8 if the first axis of every
            input and output is dynamic, else 0.
        dynamic_batching: whether Triton puts several requests into one batch.
        preferred: batch sizes that run without further waiting.
        delay: how many microseconds a request waits for others.
        instances: how many instances run at the same time, on each GPU or on the CPU.
        gpus: the numbers of the GPUs; empty for all.
        warmup: how many requests of each batch size run before the model is ready.
        warmup_data: the values of these requests, "zero" or "random"; integers are always zero.
        versions: the versions to serve: "latest", "all" or their numbers. None means all versions that are written, if there
            are several, else the latest.

    """

    settings: Session = field(default_factory=Session)
    max_batch: int | None = None
    dynamic_batching: bool = True
    preferred: tuple[int, ...] = ()
    delay: int = 0
    instances: int = 1
    gpus: tuple[int, ...] = ()
    warmup: int = 1
    warmup_data: Literal["zero", "random"] = "zero"
    versions: Literal["latest", "all"] | tuple[int, ...] | None = None

    def check(self) -> None:
        """Raise `ModelError` for options that Triton would reject for any model."""
        self.settings.check()
        if self.settings.cuda_graph:
            raise ModelError("CUDA graphs need inputs at fixed addresses, which Triton does not have: omit cuda_graph")
        if self.settings.conv_search != Session.conv_search:
            raise ModelError("how cuDNN's algorithms are searched for has no place in config.pbtxt: omit conv_search")
        if self.gpus and not self.settings.on_gpu:
            raise ModelError(
                f"expected provider cuda or tensorrt for GPUs {list(self.gpus)}, got 'cpu': use one of them, or omit the GPUs"
            )
        if self.instances < 1:
            raise ModelError(f"expected 1 or more instances, got {self.instances}")
        if min(self.delay, self.warmup, self.max_batch or 0, *self.gpus, 0) < 0:
            raise ModelError("expected max_batch, delay, warmup and GPU numbers of 0 or more, got a negative number")
        if max(self.instances, self.delay, self.warmup, self.max_batch or 0, *self.preferred, *self.gpus, 0) > _INT32:
            raise ModelError(f"expected numbers of at most {_INT32}, Triton's limit, got a larger one")
        if self.warmup_data not in ("zero", "random"):
            raise ModelError(f"expected warm-up data zero or random, got {self.warmup_data!r}")
        if (self.preferred or self.delay) and not self.dynamic_batching:
            raise ModelError("preferred sizes and a delay need dynamic batching, which is off: turn it on, or omit them")

    def batch_for(self, signature: TritonSignature) -> int:
        """Return the largest batch to declare for a model; raises `ModelError` if it does not allow the given options."""
        unbatched = signature.unbatched
        largest = self.max_batch or 0
        if self.max_batch is None and unbatched is None:
            largest = max((_DEFAULT_BATCH, *self.preferred))
        if unbatched is not None and (largest or self.preferred or self.delay):
            raise ModelError(
                f"{unbatched.name!r} has shape {list(unbatched.shape)}, whose first axis is not dynamic: Triton cannot batch "
                f"this model; export it with a dynamic batch, or omit batch sizes and delay"
            )
        invalid = [size for size in self.preferred if not 1 <= size <= largest]
        if invalid:
            raise ModelError(f"expected preferred batch sizes from 1 to the largest batch, {largest}, got {invalid[0]}")
        return largest


Value = Name | str | int | Sequence[int] | Sequence["Message"] | Mapping[str, "Value"]
Message = Mapping[str, Value]


def config(
    name: str, signature: TritonSignature, serving: Serving, requests: Mapping[str, tuple[int, ...]], written: Sequence[int]
) -> Message:
    """Return the fields of a model's configuration, in the order in which they are written.

    Args:
        name: the name of the model in Triton.
        signature: its inputs and outputs.
        serving: how it is served.
        requests: the axes of each input in a warm-up request, without the batch, by name.
        written: the versions in the repository.

    Raises:
        ModelError: Triton would reject the options for this model.

    """
    largest = serving.batch_for(signature)
    fields: dict[str, Value] = {
        "name": name,
        "backend": "onnxruntime",
        "default_model_filename": MODEL_FILE,
        "max_batch_size": largest,
        "input": [_tensor(tensor, largest > 0) for tensor in signature.inputs],
        "output": [_tensor(tensor, largest > 0) for tensor in signature.outputs],
        "version_policy": _policy(serving, written),
        "instance_group": [_group(serving)],
        "parameters": _parameters(serving.settings),
    }
    if optimization := _optimization(serving.settings):
        fields["optimization"] = optimization
    if largest and serving.dynamic_batching:
        batching: dict[str, Value] = {}
        if serving.preferred:
            batching["preferred_batch_size"] = sorted(set(serving.preferred))
        if serving.delay:
            batching["max_queue_delay_microseconds"] = serving.delay
        fields["dynamic_batching"] = batching
    if serving.warmup:
        sizes = sorted({1, largest, *serving.preferred} - {0})
        fields["model_warmup"] = [_warmup(signature, serving, requests, size) for size in sizes]
    return fields


def text(message: Message, indent: str = "") -> str:
    """Return a message in protobuf's text format, one field per line."""
    lines = []
    for name, value in message.items():
        if isinstance(value, Name | int):
            lines.append(f"{name}: {value}")
        elif isinstance(value, str):
            lines.append(f"{name}: {_quoted(value)}")
        elif isinstance(value, Mapping):
            lines.append(_block(name, value, indent))
        elif all(isinstance(item, int) for item in value):
            lines.append(f"{name}: [{', '.join(map(str, value))}]")
        else:
            lines += [_block(name, item, indent) for item in value if isinstance(item, Mapping)]
    return "".join(f"{indent}{line}\n" for line in lines)


def _block(name: str, message: Message, indent: str) -> str:
    return f"{name} {{\n{text(message, indent + '  ')}{indent}}}" if message else f"{name} {{ }}"


def _quoted(value: str) -> str:
    """Return a string literal; names come from the graph and may contain any character."""
    escaped = [chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in value.encode()]
    return f'"{"".join(escaped)}"'


def _entries(values: Mapping[str, Value]) -> list[Message]:
    """Return a map field: one message per entry."""
    return [{"key": key, "value": value} for key, value in values.items()]


def _tensor(tensor: TritonTensor, batched: bool) -> Message:
    fields: dict[str, Value] = {"name": tensor.name, "data_type": Name(tensor.data_type), "dims": tensor.dims(batched)}
    if batched and len(tensor.shape) == 1:
        fields["reshape"] = {"shape": ()}  # one value per sample: [1] in Triton, [] in the graph
    return fields


def _policy(serving: Serving, written: Sequence[int]) -> Message:
    versions = serving.versions or (tuple(written) if len(written) > 1 else "latest")
    if versions == "latest":
        return {"latest": {"num_versions": 1}}
    if versions == "all":
        return {"all": {}}
    if not set(versions) <= set(written):
        raise ModelError(f"expected versions latest, all, or some of {list(written)}, got {list(versions)}")
    return {"specific": {"versions": sorted(set(versions))}}


def _group(serving: Serving) -> Message:
    fields: dict[str, Value] = {"count": serving.instances}
    if not serving.settings.on_gpu:
        return fields | {"kind": Name("KIND_CPU")}
    return fields | {"kind": Name("KIND_GPU")} | ({"gpus": sorted(set(serving.gpus))} if serving.gpus else {})


def _optimization(settings: Session) -> Message:
    fields: dict[str, Value] = {}
    if settings.level in _LEVELS:
        fields["graph"] = {"level": _LEVELS[settings.level]}
    accelerators: list[Message] = []
    if settings.provider == "tensorrt":
        accelerators.append({"name": "tensorrt", "parameters": _entries({"precision_mode": "FP32"})})
    if settings.on_gpu:
        # ONNX Runtime's CUDA provider uses TF32 by default; here it is set as it was measured.
        flags = {"use_tf32": str(int(settings.tf32)), **({"prefer_nhwc": "1"} if settings.nhwc else {})}
        accelerators.append({"name": "cuda", "parameters": _entries(flags)})
        fields["execution_accelerators"] = {"gpu_execution_accelerator": accelerators}
    return fields


def _parameters(settings: Session) -> list[Message]:
    values = {"execution_mode": "0"}  # sequential, as in all measurements of this package
    if settings.threads:
        values["intra_op_thread_count"] = str(settings.threads)
    if not settings.arena:
        values["enable_mem_arena"] = "false"
    return _entries({key: {"string_value": value} for key, value in values.items()})


def _warmup(signature: TritonSignature, serving: Serving, requests: Mapping[str, tuple[int, ...]], batch: int) -> Message:
    inputs: dict[str, Value] = {}
    for tensor in signature.inputs:
        # Triton's random data are random bytes, which as integers would be indices out of range.
        kind = "random_data" if serving.warmup_data == "random" and tensor.data_type in _FLOATS else "zero_data"
        dims = requests[tensor.name] or (1,)
        inputs[tensor.name] = {"data_type": Name(tensor.data_type), "dims": dims, kind: Name("true")}
    return {"name": f"batch {batch}", "batch_size": batch, "inputs": _entries(inputs), "count": serving.warmup}
