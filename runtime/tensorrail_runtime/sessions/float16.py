"""Detects models that compute in float16: ONNX Runtime's CPU provider needs other settings for them."""

from __future__ import annotations

import functools
from pathlib import Path

import onnx

_HALF = onnx.TensorProto.FLOAT16


def holds_fp16(path: Path | str) -> bool:
    """Return whether a model has a float16 tensor; False for a file that is not a model. External data are not read."""
    try:
        stat = Path(path).stat()
    except OSError:
        return False
    return _read(str(path), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=64)
def _read(path: str, *_: int) -> bool:
    try:
        model = onnx.load(path, load_external_data=False)
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
