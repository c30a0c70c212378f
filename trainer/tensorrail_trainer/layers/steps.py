"""The cores of a layer as torch parameters, and the steps of their contraction run in torch, as the exporter writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensorrail_exporter.formats.contraction import (
    Array,
    Conv,
    Gather,
    GatherMatMul,
    MatMul,
    Reshape,
    SplitIndex,
    Step,
    resolve,
)
from tensorrail_exporter.formats.modes import Equation

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class CoreList(nn.ParameterList):
    """The trainable cores of one layer.

    `Module.to(memory_format=…)` does not change their layout: a core with four or five axes is not an image.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(lambda core: fn(core) if core.dim() < 4 else fn(core.flatten(1)).reshape(core.shape), recurse)


def compiled_product(equation: Equation, cores: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Return the weight (O, I, *K) of cores, by one einsum, which `torch.compile` can trace; TensorLy's functions it cannot.

    Args:
        equation: the equation of the format.
        cores: the cores, as the format stores them.
        shape: the shape of the weight.

    """
    sizes = dict(zip(equation.weight, equation.axes, strict=True))
    views = [
        core if core.dim() == len(letters) else core.reshape([sizes.get(letter, -1) for letter in letters])
        for core, letters in zip(cores, equation.cores, strict=True)
    ]
    product = torch.einsum(f"{','.join(equation.cores)}->{equation.weight}", *views)
    return product.reshape(shape[0], -1, *shape[2:])[:, -shape[1] :]  # without the padding of a table


def run_steps(steps: Sequence[Step], x: Tensor) -> Tensor:
    """Apply the steps of a contraction to the input of a convolution (B, I, *S), to rows (N, I), or to indices (N)."""
    of_modes: Iterator[Tensor] = iter(())
    for step in steps:
        if isinstance(step, SplitIndex):
            of_modes = iter(_split_index(step, x))
        elif isinstance(step, GatherMatMul):
            x = _gathered(step.weight, next(of_modes)) @ x
        elif isinstance(step, Gather):
            x = _gathered(step.weight, next(of_modes, x))
        else:
            x = _run(step, x)
    return x


def _split_index(step: SplitIndex, indices: Tensor) -> list[Tensor]:
    """Return the index of each mode, the last mode first; below 0 for an index that the table does not have."""
    if step.padding:
        indices = torch.where(indices < 0, indices, indices + step.padding)
    of_modes = []
    for size in reversed(step.modes[1:]):
        of_modes.append(indices % size)
        indices = indices // size
    return [*of_modes, indices]


def _gathered(weight: Array, indices: Tensor) -> Tensor:
    """Return the rows (N, features) or matrices (N, p, q) of a constant (entries, …) for indices (N)."""
    table = cast(Tensor, weight)
    if table.dim() == 2:
        return F.embedding(indices, table)
    rows: Tensor = F.embedding(indices, table.flatten(1)).unflatten(1, table.shape[1:])
    return rows


def _run(step: Conv | MatMul | Reshape, x: Tensor) -> Tensor:
    match step:
        case Conv():
            nd = x.dim() - 2
            begins, ends = step.pads[:nd], step.pads[nd:]
            if step.transposed:  # torch's layer pads both sides alike
                kernel, added = cast(Tensor, step.spread()), step.output_padding or 0
                return _TRANSPOSED[nd](x, kernel, None, step.stride, begins, added, step.groups, step.dilation)
            if begins != ends:
                x = F.pad(x, [amount for axis in reversed(range(nd)) for amount in (begins[axis], ends[axis])])
                begins = (0,) * nd
            return _CONVOLUTIONS[nd](x, cast(Tensor, step.weight), None, step.stride, begins, step.dilation, step.groups)
        case MatMul(weight=weight, side="right"):
            return x @ cast(Tensor, weight)
        case MatMul(weight=weight):
            return cast(Tensor, weight) @ x
        case Reshape(shape=shape):
            return x.reshape(resolve(shape, tuple(x.shape)))
