"""What torch keeps private and the export needs. Tested with torch 2.13.0 and onnxscript 0.7.2.

With versions that have no such names, each function does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def operators_read_once() -> Iterator[None]:
    """Let exports in this block share the exporter's table of operators.

    The exporter parses the source of every operator and builds this table anew for each graph, which takes over a second.
    """
    try:
        registry: Any = importlib.import_module("torch.onnx._internal.exporter._registration").ONNXRegistry  # untyped, private
        built = registry.__dict__["from_torchlib"]
    except (ImportError, AttributeError, KeyError):
        yield
        return
    registry.from_torchlib = staticmethod(_tables(registry, built))
    try:
        yield
    finally:
        registry.from_torchlib = built


@functools.cache
def _tables(registry: Any, built: Any) -> Callable[..., Any]:
    return functools.cache(built.__get__(None, registry))


def forget_recurrent_kernels() -> None:
    """Clear what torch has cached of LSTM and GRU, compiled functions included.

    The exporter traces these operators by a decomposition of its own, for sequences of any length. If the process has run or
    exported such a network before, torch uses the cached kernel, or compares the length with that of a compiled loop, and the
    example's length becomes a constant of the graph.
    """
    torch.compiler.reset()
    for operator in (torch.ops.aten.lstm.input, torch.ops.aten.gru.input):
        with contextlib.suppress(AttributeError):
            operator._dispatch_cache.clear()
