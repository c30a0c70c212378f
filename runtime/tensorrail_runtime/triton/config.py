"""Triton's `config.pbtxt` for an ONNX model: how it is served, as fields and as protobuf text.

Fields and their rules are those of `ModelConfig` (triton-inference-server/common, protobuf/model_config.proto); what the ONNX
Runtime backend makes of them is in its README and `src/onnxruntime.cc` (triton-inference-server/onnxruntime_backend). The text
is written here, so that a serving host needs no package of Triton's; the tests parse it with Triton's own schema.
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
    """A value that is written without quotes: an enum's, `true` or `false`."""

    __slots__ = ()


@dataclass(frozen=True)
class TritonTensor:
    """An input or output. `shape` is the graph's, -1 for an axis of any size; `data_type` is Triton's name of it."""

    name: str
    data_type: str
    shape: tuple[int, ...]

    def dims(self, batched: bool) -> tuple[int, ...]:
        """Return the axes that the configuration lists: the batch left out, a single value as [1]."""
        return (self.shape[1:] if batched else self.shape) or (1,)


@dataclass(frozen=True)
class TritonSignature:
    """What a model takes and gives."""

    inputs: tuple[TritonTensor, ...]
    outputs: tuple[TritonTensor, ...]

    @property
    def unbatched(self) -> TritonTensor | None:
        """The first tensor whose first axis is not dynamic, for which Triton could form no batches; None if all are."""
        return next((t for t in (*self.inputs, *self.outputs) if t.shape[:1] != (-1,)), None)


@dataclass(frozen=True)
class Serving:
    """How Triton serves a model.

    `max_batch` is the largest batch, 0 for a model whose first axis is not the batch; without it, 8 where every input and
    output begins with a dynamic axis and 0 elsewhere. `preferred` are batch sizes that run at once, `delay` the microseconds
    that a request waits for others. `instances` run at the same time, on each GPU of `gpus` (none named: all) or on the CPU.
    `warmup` requests of each batch size run before the first real one. `versions` are served: "latest", "all", or numbers;
    without it, every version that is written when there are several, else the latest.
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
        """Raise `ModelError` for what Triton would refuse, whatever the model is."""
        self.settings.check()
        if self.settings.cuda_graph:
            raise ModelError("CUDA graphs need inputs at fixed addresses, which Triton does not have: omit cuda_graph")
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
        """Return the largest batch that is declared for a model; `ModelError` where it cannot be what was asked for."""
        single = signature.unbatched
        largest = self.max_batch or 0
        if self.max_batch is None and single is None:
            largest = max((_DEFAULT_BATCH, *self.preferred))
        if single is not None and (largest or self.preferred or self.delay):
            raise ModelError(
                f"{single.name!r} has shape {list(single.shape)}, whose first axis is not dynamic: Triton cannot batch this "
                f"model; export it with a dynamic batch, or omit batch sizes and delay"
            )
        wrong = [size for size in self.preferred if not 1 <= size <= largest]
        if wrong:
            raise ModelError(f"expected preferred batch sizes from 1 to the largest batch, {largest}, got {wrong[0]}")
        return largest


Value = Name | str | int | Sequence[int] | Sequence["Message"] | Mapping[str, "Value"]
Message = Mapping[str, Value]


def config(
    name: str, signature: TritonSignature, serving: Serving, requests: Mapping[str, tuple[int, ...]], written: Sequence[int]
) -> Message:
    """Return the fields of a model's configuration, in the order in which they are written.

    `requests` gives each input's axes in a warm-up request, the batch left out; `written` the versions there are.
    """
    largest = serving.batch_for(signature)
    made: dict[str, Value] = {
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
        made["optimization"] = optimization
    if largest and serving.dynamic_batching:
        batching: dict[str, Value] = {}
        if serving.preferred:
            batching["preferred_batch_size"] = sorted(set(serving.preferred))
        if serving.delay:
            batching["max_queue_delay_microseconds"] = serving.delay
        made["dynamic_batching"] = batching
    if serving.warmup:
        sizes = sorted({1, largest, *serving.preferred} - {0})
        made["model_warmup"] = [_warmup(signature, serving, requests, size) for size in sizes]
    return made


def text(message: Message, indent: str = "") -> str:
    """Return a message in protobuf's text format, one field a line."""
    lines = []
    for name, value in message.items():
        if isinstance(value, Name | int):
            lines.append(f"{name}: {value}")
        elif isinstance(value, str):
            lines.append(f"{name}: {_quoted(value)}")
        elif isinstance(value, Mapping):
            lines.append(_block(name, value, indent))
        elif all(isinstance(one, int) for one in value):
            lines.append(f"{name}: [{', '.join(map(str, value))}]")
        else:
            lines += [_block(name, one, indent) for one in value if isinstance(one, Mapping)]
    return "".join(f"{indent}{line}\n" for line in lines)


def _block(name: str, message: Message, indent: str) -> str:
    return f"{name} {{\n{text(message, indent + '  ')}{indent}}}" if message else f"{name} {{ }}"


def _quoted(value: str) -> str:
    """Return a string as a literal: names come from the graph, and may hold anything."""
    plain = [chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in value.encode()]
    return f'"{"".join(plain)}"'


def _entries(values: Mapping[str, Value]) -> list[Message]:
    """Return a map field: one message an entry."""
    return [{"key": key, "value": value} for key, value in values.items()]


def _tensor(tensor: TritonTensor, batched: bool) -> Message:
    made: dict[str, Value] = {"name": tensor.name, "data_type": Name(tensor.data_type), "dims": tensor.dims(batched)}
    if batched and len(tensor.shape) == 1:
        made["reshape"] = {"shape": ()}  # a value a sample: Triton's [1] is the graph's []
    return made


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
    made: dict[str, Value] = {"count": serving.instances}
    if not serving.settings.on_gpu:
        return made | {"kind": Name("KIND_CPU")}
    return made | {"kind": Name("KIND_GPU")} | ({"gpus": sorted(set(serving.gpus))} if serving.gpus else {})


def _optimization(settings: Session) -> Message:
    made: dict[str, Value] = {}
    if settings.level in _LEVELS:
        made["graph"] = {"level": _LEVELS[settings.level]}
    accelerators: list[Message] = []
    if settings.provider == "tensorrt":
        accelerators.append({"name": "tensorrt", "parameters": _entries({"precision_mode": "FP32"})})
    if settings.on_gpu:
        # TF32 is on in ONNX Runtime's CUDA provider unless it is told otherwise; here it is told what was measured.
        flags = {"use_tf32": str(int(settings.tf32)), **({"prefer_nhwc": "1"} if settings.nhwc else {})}
        accelerators.append({"name": "cuda", "parameters": _entries(flags)})
        made["execution_accelerators"] = {"gpu_execution_accelerator": accelerators}
    return made


def _parameters(settings: Session) -> list[Message]:
    values = {"execution_mode": "0"}  # one node after the other, as everything here is measured
    if settings.threads:
        values["intra_op_thread_count"] = str(settings.threads)
    if not settings.arena:
        values["enable_mem_arena"] = "false"
    return _entries({key: {"string_value": value} for key, value in values.items()})


def _warmup(signature: TritonSignature, serving: Serving, requests: Mapping[str, tuple[int, ...]], batch: int) -> Message:
    inputs: dict[str, Value] = {}
    for tensor in signature.inputs:
        # Triton's random data are random bytes: as integers they would be indices out of range.
        kind = "random_data" if serving.warmup_data == "random" and tensor.data_type in _FLOATS else "zero_data"
        dims = requests[tensor.name] or (1,)
        inputs[tensor.name] = {"data_type": Name(tensor.data_type), "dims": dims, kind: Name("true")}
    return {"name": f"batch {batch}", "batch_size": batch, "inputs": _entries(inputs), "count": serving.warmup}
