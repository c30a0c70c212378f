"""Finds in a model what ONNX Runtime's CPU provider needs other settings for, or must not run at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

CONTRIB = "com.microsoft"
"""The domain of the operators that ONNX Runtime alone has."""

_HALF = 10  # onnx.TensorProto.FLOAT16
_BIAS = 2  # index of the input of Attention with the bias
_MOST = 64  # files that are remembered


@dataclass(frozen=True)
class Contents:
    """What matters of a model to the CPU provider.

    Attributes:
        fp16: whether it has a float16 tensor.
        crashing: the name of the first node whose kernel ends the process, see `ends_the_process`; None for no such node.

    """

    fp16: bool = False
    crashing: str | None = None


_known: dict[tuple[str, int, int], Contents] = {}  # by path, time of the last change and size


def contents_of(path: Path | str) -> Contents:
    """Return what a file holds; the defaults for a file that is not a model. External data are not read."""
    key = _key(path)
    if key is None:
        return Contents()
    if key not in _known:
        remember(path, _read(path))
    return _known[key]


def remember(path: Path | str, contents: Contents) -> None:
    """Store the answer for a file, so that a process that is told it need not read the model."""
    key = _key(path)
    if key is not None:
        while len(_known) >= _MOST:
            del _known[next(iter(_known))]
        _known[key] = contents


def ends_the_process(node: onnx.NodeProto) -> bool:
    """Return whether ONNX Runtime's CPU kernel of a node crashes: in 1.31 that of an Attention without a bias does."""
    return node.op_type == "Attention" and node.domain == CONTRIB and not (len(node.input) > _BIAS and node.input[_BIAS])


def _key(path: Path | str) -> tuple[str, int, int] | None:
    try:
        stat = Path(path).stat()
    except OSError:
        return None
    return str(path), stat.st_mtime_ns, stat.st_size


def _read(path: Path | str) -> Contents:
    import onnx

    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except Exception:  # noqa: BLE001 - protobuf raises its own classes; opening a session reports the error
        return Contents()
    nodes = list(_nodes([*model.graph.node, *(node for function in model.functions for node in function.node)]))
    fp16 = _stores_halves(model.graph) or any(map(_in_node, nodes))
    return Contents(fp16, next((node.name for node in nodes if ends_the_process(node)), None))


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield nodes, and those of the bodies in them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _nodes(body.node)


def _stores_halves(graph: onnx.GraphProto) -> bool:
    return any(tensor.data_type == _HALF for tensor in graph.initializer) or any(
        value.type.tensor_type.elem_type == _HALF for value in (*graph.input, *graph.output)
    )


def _in_node(node: onnx.NodeProto) -> bool:
    return any(
        attribute.t.data_type == _HALF
        or (attribute.name in ("to", "dtype") and attribute.i == _HALF)
        or any(map(_stores_halves, (attribute.g, *attribute.graphs)))
        for attribute in node.attribute
    )
