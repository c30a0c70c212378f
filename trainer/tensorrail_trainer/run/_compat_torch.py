"""What torch keeps private and the export needs. Tested with torch 2.13.0 and onnxscript 0.7.2.

With versions that have no such names, each function does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from typing import Any

import torch


@functools.cache
def read_operators_once() -> None:
    """Cache the exporter's list of operators: it parses the source of every operator for each graph, a second of CPU time."""
    with contextlib.suppress(ImportError, AttributeError):
        exporter: Any = importlib.import_module("torch.onnx._internal.exporter._registration")  # Any: untyped and private
        apis = exporter.onnxscript_apis
        apis.get_torchlib_ops = functools.cache(apis.get_torchlib_ops)


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
