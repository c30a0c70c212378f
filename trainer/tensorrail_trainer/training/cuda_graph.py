"""A training step as one CUDA graph: the kernels of a small network take less time than to launch them one by one.

A step is captured once and replayed on every later batch (PyTorch: torch.cuda.CUDAGraph). What it reads and writes has to stay
where it is: parameters, the optimizer's state and its rate, ADMM's targets, the batch; nothing in it may wait for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""Takes samples and labels of a fixed shape, and returns tensors."""

IMPLEMENTATION = ("foreach", "fused", "capturable")
"""The keys of an optimizer's groups that say how it computes, and not what."""

_AS_IT_IS = 3  # steps before the capture: the first ones allocate, and choose kernels


class CaptureError(RuntimeError):
    """A step that cannot be captured as a graph: something in it waits for the GPU, or is not where it was."""


class Replay:
    """Runs a step on batch after batch: the first three as they come, then as a graph of what the fourth would launch."""

    def __init__(self) -> None:
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: tuple[Tensor, Tensor] | None = None
        self._found: tuple[Tensor, ...] = ()

    def __call__(self, step: Step, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Do the step on samples x (B, …) and labels y (B,), of the same shapes every time, and return what it returns.

        Raises `CaptureError` where the step cannot be captured.
        """
        self._steps += 1
        if self._steps <= _AS_IT_IS:
            return _aside(step, x, y)
        if self._graph is None or self._batch is None:
            self._batch = x.clone(), y.clone()
            self._graph = torch.cuda.CUDAGraph()
            try:
                # Of this thread alone: others pin memory for batches that are read from files.
                with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                    self._found = step(*self._batch)
            except RuntimeError as error:
                raise CaptureError(str(error).partition("\n")[0]) from error
        for held, new in zip(self._batch, (x, y), strict=True):
            held.copy_(new)
        self._graph.replay()
        return tuple(one.clone() for one in self._found)


def on_device(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Have the optimizer read its rate from the device, in kernels that a graph can hold."""
    for group in optimizer.param_groups:
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
        group.update(fused=True, foreach=False)
        if "capturable" in group:
            group["capturable"] = True
    for state in optimizer.state.values():  # AdamW counts its steps on the CPU, unless they are captured
        if "step" in state:
            state["step"] = state["step"].to(device)


def _aside(step: Step, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Do the step on another stream, as a capture will."""
    here, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        found = step(x, y)
    here.wait_stream(side)
    return found
