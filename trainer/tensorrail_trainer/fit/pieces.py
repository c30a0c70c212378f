"""Calibration inputs as torch tensors, divided into samples where the graph computes each one independently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor

from tensorrail_exporter.calibrate.inputs import Calibration
from tensorrail_runtime.errors import GraphError
from tensorrail_trainer.fit.module import OnnxModule

BATCH = 32  # samples in one step of a fit


@dataclass(frozen=True)
class Pieces:
    """Tensors by name, divided into samples, which can be joined to batches, or into the fixed batches of the graph."""

    values: tuple[dict[str, Tensor], ...]
    together: bool

    def __bool__(self) -> bool:
        return bool(self.values and self.values[0])

    def floating(self) -> Pieces:
        """Return only the floating-point tensors, which have a difference."""
        kept = tuple({name: value for name, value in piece.items() if value.is_floating_point()} for piece in self.values)
        return Pieces(kept, self.together)

    def runs(self, picks: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return the feeds that run the chosen pieces: one joined batch if samples can be joined, else each piece."""
        chosen = [self.values[k] for k in picks]
        return [_join(chosen)] if self.together else chosen

    def joined(self, name: str) -> Tensor:
        """Return a tensor over all pieces; all its values in one row where its shape differs between pieces."""
        values = [piece[name] for piece in self.values]
        alike = all(value.dim() and value.shape[1:] == values[0].shape[1:] for value in values)
        return torch.cat(values if alike else [value.reshape(-1) for value in values])


def divided(dense: onnx.ModelProto, teacher: OnnxModule, calibration: Calibration) -> Pieces:
    """Divide the calibration inputs into samples if the graph computes each one independently, else into its fixed batches.

    Feeds whose samples are not along the first axis of every input stay whole.
    """
    feeds = [{name: torch.from_numpy(array) for name, array in feed.items()} for feed in calibration.feeds]
    by_rows = all(array.ndim and calibration.axes.get(name, 0) == 0 for name, array in calibration.feeds[0].items())
    if calibration.whole or not by_rows:
        whole = tuple({name: _channels_last(value) for name, value in feed.items()} for feed in feeds)
        return Pieces(whole, together=False)
    samples = tuple(
        {name: _channels_last(value[k : k + 1]) for name, value in feed.items()}
        for feed in feeds
        for k in range(len(next(iter(feed.values()))))
    )
    ends = [value.name for value in dense.graph.output]
    if sample_by_sample(teacher, samples[:3], ends) == set(ends):
        return Pieces(samples, together=True)
    stored = {tensor.name for tensor in dense.graph.initializer}
    sizes = {
        axis.dim_value
        for value in dense.graph.input
        if value.name not in stored
        for axis in value.type.tensor_type.shape.dim[:1]
        if axis.dim_value > 0
    }
    if not sizes:
        raise GraphError(
            "expected outputs with one row per sample, or a fixed batch size, found neither; fix the batch size or skip the fit"
        )
    size = min(sizes)
    fixed = [
        {name: _channels_last(value[at : at + size]) for name, value in feed.items()}
        for feed in feeds
        for at in range(0, len(next(iter(feed.values()))), size)
    ]
    return Pieces(tuple(fixed), together=False)


@torch.no_grad()
def sample_by_sample(module: OnnxModule, samples: Sequence[dict[str, Tensor]], outputs: Sequence[str]) -> set[str]:
    """Return the tensors of a batch that are equal to the joined tensors of its samples, each run separately."""
    try:
        together = module(_join(samples), list(outputs))
        separate = _join([module(sample, list(outputs)) for sample in samples])
    except (GraphError, RuntimeError, IndexError, ValueError):
        return set()
    return {name for name in outputs if _close(together[name], separate[name])}


def per_step(inputs: Pieces) -> int:
    """Return the number of pieces that together hold the samples of one step of a fit."""
    rows = next((len(value) for value in inputs.values[0].values() if value.dim()), 1)
    return BATCH if inputs.together else max(1, BATCH // rows)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not b.numel():
        return a.shape == b.shape
    a, b = a.double(), b.double()
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def _join(pieces: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: _channels_last(torch.cat([piece[name] for piece in pieces])) for name in pieces[0]}


@torch.no_grad()
def run(module: OnnxModule, inputs: Pieces, outputs: Sequence[str]) -> Pieces:
    """Return tensors of a graph for all inputs."""
    if not inputs.together:
        return Pieces(tuple(module(piece, list(outputs)) for piece in inputs.values), together=False)
    samples: list[dict[str, Tensor]] = []
    for start in range(0, len(inputs.values), BATCH):
        (feed,) = inputs.runs(range(start, min(start + BATCH, len(inputs.values))))
        values = module(feed, list(outputs))
        count = min(BATCH, len(inputs.values) - start)
        by_sample = {name: value.split(len(value) // count) for name, value in values.items()}  # one row or several per sample
        samples += [{name: rows[k] for name, rows in by_sample.items()} for k in range(count)]
    return Pieces(tuple(samples), together=True)


def variance(value: Tensor) -> Tensor:
    """Return the mean over all elements of a tensor (N, …) of their variance over the samples, at least 1e-12."""
    if value.dim() == 0 or len(value) < 2:
        value = value.reshape(-1)
    return value.float().var(0, correction=0).mean().clamp_min(1e-12)


def _channels_last(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value
