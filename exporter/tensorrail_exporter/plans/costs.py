"""The cost of a contraction, step by step: FLOPs, activation bytes, kernels and stored bytes; and the cheapest merge.

The counts are exact for one sample of the given size. The time estimated from them is a rough model. It is good enough to
choose between ways to run the same cores when nothing was measured; a claim about speed needs a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tensorrail_exporter.formats import format_of
from tensorrail_exporter.formats.contraction import (
    Conv,
    Gather,
    GatherMatMul,
    LayerSpec,
    MatMul,
    Reshape,
    SplitIndex,
    Step,
    dense_step,
    describe_step,
    split_at_boundary,
)

# Time in seconds of one FLOP, one byte and one node on one core of a server CPU; only the orders of magnitude matter.
SECONDS_A_FLOP = 1 / 50e9
_SECONDS_A_BYTE = 1 / 10e9
_SECONDS_A_KERNEL = 4e-6
_LANES = 16  # columns that a matrix product computes at once; fewer columns take as long

_GUESSED_AXIS = 14  # assumed size of a spatial axis of unknown size
_GUESSED_TOKENS = 16  # assumed size of any other unknown axis


@dataclass(frozen=True)
class StepCost:
    """The cost of one step for one sample, in float32.

    Attributes:
        step: the step in words, such as `conv 3×3 16→16`.
        shape: shape of the output without the batch.
        flops: 2 × multiply-accumulates.
        busy_flops: `flops` plus those of the idle lanes of a product with few columns.
        activation_bytes: bytes of activations read and written.
        stored_bytes: bytes of the constant.
        kernels: number of nodes that run, 0 for a Reshape, which moves no data; for a recurrent weight those of one time step.

    """

    step: str
    shape: tuple[int, ...]
    flops: int
    busy_flops: int
    activation_bytes: int
    stored_bytes: int
    kernels: int


@dataclass(frozen=True)
class ContractionCost:
    """The cost of a contraction for one sample; `print` shows it as a table with one row per step.

    Attributes:
        steps: the cost of every step, Reshapes included.

    """

    steps: tuple[StepCost, ...]

    @property
    def flops(self) -> int:
        """FLOPs of one sample: 2 × multiply-accumulates."""
        return sum(step.flops for step in self.steps)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        return self.flops // 2

    @property
    def activation_bytes(self) -> int:
        """Bytes of activations read and written for one sample, in float32."""
        return sum(step.activation_bytes for step in self.steps)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the constants, in float32."""
        return sum(step.stored_bytes for step in self.steps)

    @property
    def kernels(self) -> int:
        """Number of nodes that compute something."""
        return sum(step.kernels for step in self.steps)

    @property
    def seconds(self) -> float:
        """Estimated time in seconds for one sample; use it only to compare contractions of the same layer."""
        return self.seconds_of(1)

    def seconds_of(self, batch: int) -> float:
        """Return the estimated time in seconds for a batch; constants are read and kernels launched once per batch."""
        busy = sum(step.busy_flops for step in self.steps)
        per_sample = busy * SECONDS_A_FLOP + self.activation_bytes * _SECONDS_A_BYTE
        return batch * per_sample + self.stored_bytes * _SECONDS_A_BYTE + self.kernels * _SECONDS_A_KERNEL

    def __str__(self) -> str:
        head = ("step", "output", "FLOPs", "activation bytes", "stored bytes", "kernels")
        rows = [
            (
                s.step,
                "×".join(map(str, s.shape)),
                f"{s.flops:,}",
                f"{s.activation_bytes:,}",
                f"{s.stored_bytes:,}",
                str(s.kernels),
            )
            for s in self.steps
            if s.kernels
        ]
        total = ("total", "", f"{self.flops:,}", f"{self.activation_bytes:,}", f"{self.stored_bytes:,}", str(self.kernels))
        table = [head, *rows, total]
        widths = [max(len(row[column]) for row in table) for column in range(len(head))]
        return "\n".join(
            "  ".join(text.ljust(w) if c < 2 else text.rjust(w) for c, (text, w) in enumerate(zip(row, widths, strict=True)))
            for row in table
        )


def contraction_cost(steps: Sequence[Step], layer: LayerSpec) -> ContractionCost:
    """Return the cost of a contraction for one sample.

    Args:
        steps: the steps, in the order in which they run.
        layer: the dense layer that they replace. Its `size` gives the size of the input; an unknown spatial axis counts as
            14, any other unknown axis as 16.

    Returns:
        The cost of every step and their sums.

    """
    shape = (1, *_sample(layer))
    costs = []
    for index, step in enumerate(steps):
        out = _output(step, shape)
        weight = 0 if isinstance(step, Reshape | SplitIndex) else math.prod(step.weight.shape)
        # Each state that is multiplied takes all steps, but of the last product only the columns that it needs.
        states = layer.state_products or 1
        divided = index == len(steps) - 1 and isinstance(step, MatMul) and step.side == "right"
        times = 1 if divided else states
        moved = 0 if isinstance(step, Reshape | SplitIndex) else states * math.prod(shape) + times * math.prod(out)
        if isinstance(step, GatherMatMul):  # its matrices are activations, written and read again
            moved += 2 * math.prod(shape[:-2]) * math.prod(step.weight.shape[1:])
        costs.append(
            StepCost(
                describe_step(step),
                out[1:],
                times * _flops(step, shape, out),
                times * _busy_flops(step, shape, out),
                4 * moved,
                4 * weight,
                states * _kernels(step),
            )
        )
        shape = out
    return ContractionCost(tuple(costs))


def dense_cost(layer: LayerSpec) -> ContractionCost:
    """Return the cost of the dense layer for one sample; for a recurrent layer that of the weight's products alone."""
    return contraction_cost((dense_step(np.broadcast_to(np.float32(0), layer.shape), layer),), layer)


@lru_cache(maxsize=512)
def cheapest_merge(name: str, modes: tuple[int, ...], core_shapes: tuple[tuple[int, ...], ...], layer: LayerSpec) -> str:
    """Return the merge with the lowest estimated time.

    Args:
        name: key of `FORMATS`.
        modes: modes in the order of the format.
        core_shapes: shape of every core.
        layer: the dense layer that the cores replace.

    """
    form = format_of(name, layer.groups)
    cores = [np.zeros(shape, np.float32) for shape in core_shapes]

    def seconds(merge: str) -> float:
        steps = form.contraction(cores, layer, modes, merge)
        cost = contraction_cost(steps, layer).seconds
        if layer.op == "recurrent" and not layer.state_products and split_at_boundary(steps)[1] is None:
            # ONNX's node then reads an identity matrix as its input weight; a Scan takes about as long.
            cost += layer.shape[0] ** 2 * 4 * _SECONDS_A_BYTE
        return cost

    return min(form.merges(layer.op), key=seconds)


def _sample(layer: LayerSpec) -> tuple[int, ...]:
    """Return the shape of one sample of the layer's input."""
    if layer.op == "conv":
        sizes = layer.size or (0,) * layer.spatial
        smallest = [d * (k - 1) + s for d, k, s in zip(layer.dilation, layer.kernel, layer.stride, strict=True)]
        return (layer.inputs, *(size or max(_GUESSED_AXIS, least) for size, least in zip(sizes, smallest, strict=True)))
    sizes = layer.size or (0,) * (layer.lead - 1)
    known = (size or _GUESSED_TOKENS for size in sizes)
    return tuple(known) if layer.gathers else (*known, layer.shape[1])


def _output(step: Step, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a step's output for an input of this shape."""
    match step:
        case Reshape(shape=target):
            sizes = [shape[axis] if size == 0 else size for axis, size in enumerate(target)]
            if -1 in sizes:
                others = max(1, -math.prod(sizes))  # their product is 0 if the batch or the output is empty
                sizes[sizes.index(-1)] = math.prod(shape) // others
            return tuple(sizes)
        case Conv():
            spatial = tuple(_axis(step, axis, size) for axis, size in enumerate(shape[2:]))
            return (shape[0], step.weight.shape[0], *spatial)
        case SplitIndex():
            return shape
        case Gather(weight=weight):
            return (*shape, *weight.shape[1:])
        case GatherMatMul(weight=weight):
            return (*shape[:-2], weight.shape[1], shape[-1])
        case MatMul(weight=weight, side="right"):
            return (*shape[:-1], weight.shape[1])
        case MatMul(weight=weight):
            return (*shape[:-2], weight.shape[-2], shape[-1])


def _axis(step: Conv, axis: int, size: int) -> int:
    """Return the size of a convolution's output along one spatial axis (ONNX, operators Conv and ConvTranspose)."""
    nd = len(step.stride)
    if step.transposed:
        added = step.output_padding[axis] if step.output_padding else 0
        removed = step.pads[axis] + step.pads[nd + axis] if step.auto_pad == "NOTSET" else 0
        reach = step.dilation[axis] * (step.weight.shape[2 + axis] - 1) + 1
        return int(max(0, (size - 1) * step.stride[axis] + reach + added - removed))
    if step.auto_pad.startswith("SAME"):
        return -(-size // step.stride[axis])
    padded = size + (step.pads[axis] + step.pads[nd + axis] if step.auto_pad == "NOTSET" else 0)
    return int(max(0, (padded - step.dilation[axis] * (step.weight.shape[2 + axis] - 1) - 1) // step.stride[axis] + 1))


def _flops(step: Step, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
    match step:
        case Reshape() | SplitIndex() | Gather():
            return 0
        case Conv(weight=weight, transposed=True):  # each value of the input meets every tap
            return int(2 * math.prod(shape[2:]) * shape[0] * math.prod(weight.shape))
        case Conv(weight=weight):
            return int(2 * math.prod(out) * math.prod(weight.shape[1:]))
        case MatMul(weight=weight, side="right"):
            return 2 * math.prod(out) * int(weight.shape[0])
        case MatMul(weight=weight) | GatherMatMul(weight=weight):
            return 2 * math.prod(out) * int(weight.shape[-1])


def _kernels(step: Step) -> int:
    match step:
        case Reshape():
            return 0
        case SplitIndex(modes=modes, padding=padding):
            return 3 * (len(modes) - 1) + (3 if padding else 0)
        case GatherMatMul():
            return 2
        case _:
            return 1


def _busy_flops(step: Step, shape: tuple[int, ...], out: tuple[int, ...]) -> int:
    flops = _flops(step, shape, out)
    if not isinstance(step, MatMul | GatherMatMul):
        return flops
    return flops * (-(-out[-1] // _LANES) * _LANES) // max(1, out[-1])
