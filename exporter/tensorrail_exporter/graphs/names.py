"""Names of tensors and nodes: which ones a graph defines, and which are free."""

from __future__ import annotations

from collections.abc import Iterator

import onnx


def free_name(name: str, taken: set[str]) -> str:
    """Return the name, or the first of `name_2`, `name_3`, … that is free, and mark it as taken."""
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


def defined_names(graph: onnx.GraphProto) -> Iterator[str]:
    """Yield the names of the tensors that a graph itself defines."""
    yield from (value.name for value in graph.input if value.name)
    yield from (tensor.name for tensor in graph.initializer)
    yield from (tensor.values.name for tensor in graph.sparse_initializer)
    yield from (name for node in graph.node for name in node.output if name)
