"""The least time that a graph's products can take on a card: the more of arithmetic and memory traffic, node by node.

    peaks("cuda")   # what this card really gives, measured
    bound_ms(cost("model.onnx", batch=64), peaks("cuda"), "tf32")

A bound, not a prediction: inputs, weights and outputs of a node are moved once, everything between products is free, and so are
launches. Source: Williams, Waterman, Patterson, "Roofline", Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tensorrail_runtime.graphs.cost import GraphCost

SIDES = {"cuda": 8192, "cpu": 1024}  # of the square matrices that are multiplied
MIB = {"cuda": 2048, "cpu": 64}  # that are copied
REPEATS = 10


@dataclass(frozen=True)
class Peaks:
    """Bytes a second of a copy (read and written both counted), and FLOPs a second of a product, by precision."""

    bandwidth: float
    flops: dict[str, float]


def peaks(device: str) -> Peaks:
    """Measure them by large copies and large products on `cuda` or `cpu`; a CPU has no TF32."""
    side, size = SIDES[device], MIB[device] * 2**20
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    flops = {}
    before, threads = torch.backends.cuda.matmul.allow_tf32, torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)  # as ONNX Runtime does, whatever OMP_NUM_THREADS says
    try:
        bandwidth = 2 * size / _seconds(lambda: target.copy_(source), device)
        for name, dtype, tf32 in (
            ("fp32", torch.float32, False),
            ("tf32", torch.float32, True),
            ("fp16", torch.float16, False),
        ):
            if device == "cpu" and name != "fp32":
                continue
            torch.backends.cuda.matmul.allow_tf32 = tf32
            a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
            flops[name] = 2 * side**3 / _seconds(lambda a=a, b=b: a @ b, device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
        torch.set_num_threads(threads)
    return Peaks(bandwidth, flops)


def bound_ms(found: GraphCost, card: Peaks, precision: str) -> float | None:
    """Return the milliseconds that the products take at least; None for a precision that was not measured."""
    if precision not in card.flops:
        return None
    itemsize = 2 if precision == "fp16" else 4
    seconds = 0.0
    for node in found.layers:
        moved = itemsize * (math.prod(node.input) + math.prod(node.output) + node.params)
        seconds += max(node.flops / card.flops[precision], moved / card.bandwidth)
    return 1e3 * seconds


def _seconds(work: Callable[[], object], device: str) -> float:
    """Return the median seconds of one call, waiting for the device each time."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    samples = []
    for _ in range(REPEATS + 3):
        wait()
        start = time.perf_counter()
        work()
        wait()
        samples.append(time.perf_counter() - start)
    return sorted(samples[3:])[REPEATS // 2]
