"""Detects models that compute in float16: ONNX Runtime's CPU provider needs other settings for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

_HALF = 10  # onnx.TensorProto.FLOAT16
_MOST = 64  # files that are remembered

_known: dict[tuple[str, int, int], bool] = {}  # by path, time of the last change and size


def holds_fp16(path: Path | str) -> bool:
    """Return whether a model has a float16 tensor; False for a file that is not a model. External data are not read."""
    key = _key(path)
    if key is None:
        return False
    if key not in _known:
        remember(path, holds=_read(path))
    return _known[key]


def remember(path: Path | str, *, holds: bool) -> None:
    """Store the answer for a file, so that a process that is told it need not read the model."""
    key = _key(path)
    if key is not None:
        while len(_known) >= _MOST:
            del _known[next(iter(_known))]
        _known[key] = holds


def _key(path: Path | str) -> tuple[str, int, int] | None:
    try:
        stat = Path(path).stat()
    except OSError:
        return None
    return str(path), stat.st_mtime_ns, stat.st_size


def _read(path: Path | str) -> bool:
    import onnx

    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except Exception:  # noqa: BLE001 - protobuf raises its own classes; opening a session reports the error
        return False
    return _in_graph(model.graph) or any(_in_node(node) for function in model.functions for node in function.node)


def _in_graph(graph: onnx.GraphProto) -> bool:
    return (
        any(tensor.data_type == _HALF for tensor in graph.initializer)
        or any(value.type.tensor_type.elem_type == _HALF for value in (*graph.input, *graph.output))
        or any(map(_in_node, graph.node))
    )


def _in_node(node: onnx.NodeProto) -> bool:
    return any(
        attribute.t.data_type == _HALF
        or (attribute.name in ("to", "dtype") and attribute.i == _HALF)
        or any(map(_in_graph, (attribute.g, *attribute.graphs)))
        for attribute in node.attribute
    )
