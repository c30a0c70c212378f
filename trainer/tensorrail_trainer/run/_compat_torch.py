"""What torch keeps private and the export needs. Tested with torch 2.13 and onnxscript 0.7; elsewhere each does nothing."""

from __future__ import annotations

import contextlib
import functools
import importlib
from typing import Any

import torch


@functools.cache
def read_operators_once() -> None:
    """Keep the exporter's list of operators, which it makes for every graph from the source of each: a second of CPU time."""
    with contextlib.suppress(ImportError, AttributeError):
        exporter: Any = importlib.import_module("torch.onnx._internal.exporter._registration")  # Any: untyped and private
        apis = exporter.onnxscript_apis
        apis.get_torchlib_ops = functools.cache(apis.get_torchlib_ops)


def forget_recurrent_kernels() -> None:
    """Drop how torch ran LSTM and GRU before.

    The exporter traces them in a way of its own, for sequences of any length; a kernel that was looked up earlier in the
    process is run in its place, and makes the example's length a constant.
    """
    for operator in (torch.ops.aten.lstm.input, torch.ops.aten.gru.input):
        with contextlib.suppress(AttributeError):
            operator._dispatch_cache.clear()
