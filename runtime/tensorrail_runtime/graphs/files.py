"""The files that make up a model, the graph's own and the external data beside it, and the graphs within a graph."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import onnx
from google.protobuf.message import DecodeError, Message

from tensorrail_runtime.errors import ModelError


def external_files(path: Path) -> list[str]:
    """Return where a model's external data lie, relative to its folder; `ModelError` for a place outside it, or a link."""
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error}): expected an ONNX model") from None
    except DecodeError:
        raise ModelError(f"{path}: not an ONNX model, or a truncated one: its protobuf cannot be parsed") from None
    found: dict[str, None] = {}
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            found |= {entry.value: None for entry in tensor.external_data if entry.key == "location"}
    home = path.parent.resolve()
    for location in found:
        place = PurePosixPath(location)
        if not location or place.is_absolute() or ".." in place.parts or (home / place).resolve() != home / place:
            raise ModelError(
                f"{path}: its external data {location!r} are outside the model's folder or a link: store them beside the model"
            )
        if not (home / place).is_file():
            raise ModelError(f"{path}: its external data {location!r} are missing: expected a file beside the model")
    return list(found)


def bytes_of(path: Path) -> int:
    """Return the size of a model's file and of the external data beside it."""
    return sum(file.stat().st_size for file in _files(path))


def sha256_of(path: Path) -> str:
    """Return the hash of a model's file, followed by its external data in the order of their names."""
    found = hashlib.sha256()
    for file in _files(path):
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                found.update(block)
    return found.hexdigest()


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of ONNX's own operators that a model is written in; 0 where it names none."""
    return next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), 0)


def bodies(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield the bodies of a graph's If, Loop and Scan nodes."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
            yield from attribute.graphs


def descendants(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield the bodies of a graph's nodes, and the bodies within them."""
    for body in bodies(graph):
        yield body
        yield from descendants(body)


def _files(path: Path) -> list[Path]:
    return [path, *(path.parent / location for location in sorted(external_files(path)))]


def _tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """Return every tensor of a message, wherever it stands: initializers, attributes, bodies, functions."""
    for kind, value in message.ListFields():
        if kind.message_type is None:
            continue
        for part in [value] if isinstance(value, Message) else value:
            if isinstance(part, onnx.TensorProto):
                yield part
            else:
                yield from _tensors(part)
