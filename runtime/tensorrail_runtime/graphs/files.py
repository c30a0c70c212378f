"""The files of a model (the graph and its external data), and the graphs inside a graph."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path, PurePosixPath

import onnx
from google.protobuf.message import DecodeError, Message

from tensorrail_runtime.errors import ModelError

_RANDOM = frozenset(
    {
        "Bernoulli",
        "BiasDropout",
        "BitmaskDropout",
        "Dropout",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)
"""The operators whose outputs may differ from run to run; Dropout does so in training mode only."""

_STARTS = frozenset(
    bytes([field << 3 | kind]) for field, kind in ((1, 0), (2, 2), (3, 2), (4, 2), (5, 0), (6, 2), (7, 2), (8, 2))
)
"""The first byte of an ONNX file: the tag of one of the model's fields."""


def external_files(path: Path) -> list[str]:
    """Return the paths of a model's external data, relative to its folder.

    Raises:
        ModelError: the file is not a model, or a path is missing, a link, or outside the folder.

    """
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error}): expected an ONNX model") from None
    except DecodeError:
        raise ModelError(f"{path}: not an ONNX model, or a truncated one: its protobuf cannot be parsed") from None
    locations: dict[str, None] = {}
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            locations |= {entry.value: None for entry in tensor.external_data if entry.key == "location"}
    folder = path.parent.resolve()
    for location in locations:
        if "\0" in location:
            raise ModelError(f"{path}: its external data {location!r} are no file name: store them beside the model")
        relative = PurePosixPath(location)
        absolute = folder / relative
        if not location or relative.is_absolute() or ".." in relative.parts or absolute.resolve() != absolute:
            raise ModelError(
                f"{path}: its external data {location!r} are outside the model's folder or a link: store them beside the model"
            )
        if not absolute.is_file():
            raise ModelError(f"{path}: its external data {location!r} are missing: expected a file beside the model")
    return list(locations)


def files_read(path: Path) -> list[Path]:
    """Return all files that are read with a file: the file itself and, of a model, its external data.

    A file that cannot be read counts alone: the command that reads it says why.

    Args:
        path: a model, or any other file.

    """
    return [path, *(path.parent / location for location in _locations(path))]


def data_file(path: Path) -> Path:
    """Return the file beside a model for its external data: `<name>.data`, or a free name if a model reads that one.

    Args:
        path: the model that is to be written, or replaced.

    """
    for number in count(1):
        data = path.with_name(f"{path.name}.data" if number == 1 else f"{path.name}.{number}.data")
        if not data.exists() or not is_read(data):
            return data
    raise AssertionError("count never ends")


def own_data_files(path: Path) -> list[Path]:
    """Return the external data of a model that have a name which `data_file` returns; none if there is no such model.

    Args:
        path: the model.

    """
    own = re.compile(re.escape(path.name) + r"(\.\d+)?\.data")
    return [file for file in files_read(path)[1:] if file.parent == path.parent and own.fullmatch(file.name)]


def is_read(data: Path) -> bool:
    """Return whether a model in the folder of a file reads it as its external data."""
    models = [file for file in data.parent.iterdir() if file.is_file()]
    return any(_same(data, file) for model in models for file in files_read(model)[1:])


def _same(first: Path, second: Path) -> bool:
    return first.exists() and second.exists() and first.samefile(second)


def _locations(path: Path) -> dict[str, None]:
    """Return where the external data of a file are, as it stores them; none if it is not a model."""
    try:
        with path.open("rb") as stream:
            if stream.read(1) not in _STARTS:
                return {}
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except (OSError, DecodeError):
        return {}
    external = (tensor for tensor in _tensors(model) if tensor.data_location == onnx.TensorProto.EXTERNAL)
    return {entry.value: None for tensor in external for entry in tensor.external_data if entry.key == "location"}


def bytes_of(path: Path) -> int:
    """Return the size in bytes of a model's file and its external data."""
    return sum(file.stat().st_size for file in _files(path))


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a model's file followed by its external data in the order of their names."""
    digest = hashlib.sha256()
    for file in _files(path):
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of ONNX's own operator set that a model uses; 0 where it names none."""
    return next((opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")), 0)


def random_nodes(path: Path) -> list[str]:
    """Return the nodes of a model that may draw random numbers, as texts such as `noise: RandomNormalLike`.

    Nodes with a seed draw the same numbers in every session, and are left out.
    """
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except (OSError, DecodeError):
        return []
    groups = [graph.node for graph in (model.graph, *descendants(model.graph))] + [f.node for f in model.functions]
    drawing = [node for nodes in groups for node in nodes if node.op_type in _RANDOM and node.output]
    unseeded = [node for node in drawing if not any(attribute.name == "seed" for attribute in node.attribute)]
    return [f"{node.name or node.output[0]}: {node.op_type}" for node in unseeded]


def bodies(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs in the attributes of a graph's nodes: the bodies of If, Loop and Scan."""
    for node in graph.node:
        yield from bodies_of(node)


def bodies_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs in the attributes of a node."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def descendants(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield the bodies of a graph's nodes, and all bodies inside them."""
    for body in bodies(graph):
        yield body
        yield from descendants(body)


def _files(path: Path) -> list[Path]:
    return [path, *(path.parent / location for location in sorted(external_files(path)))]


def _tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """Yield every tensor in a message: of initializers, attributes, bodies and functions."""
    for kind, value in message.ListFields():
        if kind.message_type is None:
            continue
        for item in [value] if isinstance(value, Message) else value:
            if isinstance(item, onnx.TensorProto):
                yield item
            else:
                yield from _tensors(item)
