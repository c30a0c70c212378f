"""A training step as one CUDA graph, for small networks whose kernels run faster than they can be launched.

A step is captured once and replayed on every later batch (`torch.cuda.CUDAGraph`). Everything that it reads and writes must
stay at the same memory address: parameters, the state and learning rate of the optimizer, ADMM's targets, the batch. Nothing
in the step may wait for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""A step: takes samples and labels of a fixed shape, and returns tensors."""

IMPLEMENTATION = ("foreach", "fused", "capturable")
"""The keys of an optimizer's parameter groups that select its implementation."""

_EAGER_STEPS = 3  # before the capture: the first steps allocate memory and choose kernels


class CaptureError(RuntimeError):
    """A step cannot be captured as a graph: it waits for the GPU, or its memory moves."""


class Replay:
    """Runs a step on one batch after another: the first three times directly, then as a graph captured from the fourth."""

    def __init__(self) -> None:
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: tuple[Tensor, Tensor] | None = None
        self._outputs: tuple[Tensor, ...] = ()

    def __call__(self, step: Step, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Run the step on samples x (B, …) and labels y (B,), which have the same shapes every time, and return its outputs.

        Raises `CaptureError` if the step cannot be captured.
        """
        self._steps += 1
        if self._steps <= _EAGER_STEPS:
            return _on_side_stream(step, x, y)
        if self._graph is None or self._batch is None:
            self._batch = x.clone(), y.clone()
            self._graph = torch.cuda.CUDAGraph()
            try:
                # Only this thread: other threads pin memory for batches that are read from files.
                with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                    self._outputs = step(*self._batch)
            except RuntimeError as error:
                raise CaptureError(str(error).partition("\n")[0]) from error
        for captured, new in zip(self._batch, (x, y), strict=True):
            captured.copy_(new)
        self._graph.replay()
        return tuple(output.clone() for output in self._outputs)


def on_device(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Make an optimizer capturable: its learning rate and state are on the device, and its kernels are fused."""
    for group in optimizer.param_groups:
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
        group.update(fused=True, foreach=False)
        if "capturable" in group:
            group["capturable"] = True
    for state in optimizer.state.values():  # AdamW counts its steps on the CPU unless it is capturable
        if "step" in state:
            state["step"] = state["step"].to(device)


def _on_side_stream(step: Step, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Run the step on another stream, as the capture does."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        outputs = step(x, y)
    current.wait_stream(side)
    return outputs
