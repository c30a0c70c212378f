"""Denormal floats, with which a CPU computes many times more slowly, are treated as 0 during training.

Products of small gradients are often denormal: the backward pass of an LSTM with 57,600 inputs and 59 million weights took
4.8 s on two cores of a Xeon, and 0.45 s with denormals as 0. Values below 1.2e-38 do not contribute to training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def flushed() -> Iterator[None]:
    """Treat denormal floats as 0 on the CPU, if the CPU supports it.

    The setting applies to the calling thread, and permanently to threads that start meanwhile. torch starts its threads at its
    first large operation, so this context must begin before it.
    """
    before = _are_flushed()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def _are_flushed() -> bool:
    smallest = torch.tensor(torch.finfo(torch.float32).tiny, dtype=torch.float32, device="cpu")
    return float(smallest / 2) == 0.0
