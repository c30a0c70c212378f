r"""What runs in place of a dense layer: an ordered list of steps.

Stored cores and executed steps are two things. A format turns cores into steps (`Format.contraction`); the trainer runs
the steps in torch, the exporter writes them as ONNX nodes. Every step has exactly one constant operand, so that no
product of constants is left in a graph for a runtime to fold back into the dense weight, and no step is an `Einsum`.

A format writes its steps with a `Chain`, which sees the features of a layer as a product of axes (before, n, after) and
contracts the middle one. No transposition is needed: in a convolution the axes before are folded into the batch and those
after into the first spatial axis; in a linear layer they become axes of a batched product.

    (B, before·n·after, H, W) → (B·before, n, after·H, W) → 1×1 convolution
    → (B·before, q, after·H, W) → (B, before·q·after, H, W)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, TypeVar

import numpy as np


class Array(Protocol):
    """What `numpy.ndarray` and `torch.Tensor` have in common: all that a format uses of either.

    An index, an operand or a value is `Any`: the types that the two libraries declare for them have no common name.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of every axis."""

    @property
    def dtype(self) -> object:
        """The type of the values: a `numpy.dtype` or a `torch.dtype`."""

    @property
    def T(self) -> Self:
        """The transpose of a matrix."""

    @property
    def ndim(self) -> int:
        """The number of axes."""

    @property
    def size(self) -> Any:
        """The number of values in NumPy, but a method in torch: code for both takes `math.prod(shape)`."""

    @property
    def reshape(self) -> Callable[..., Self]:
        """Return the same values in another shape, given as a tuple or as one argument per axis."""

    def __array__(self) -> np.ndarray: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Self: ...
    def __setitem__(self, index: Any, value: Any, /) -> None: ...
    def __add__(self, other: Any, /) -> Self: ...
    def __sub__(self, other: Any, /) -> Self: ...
    def __mul__(self, other: Any, /) -> Self: ...
    def __truediv__(self, other: Any, /) -> Self: ...
    def __matmul__(self, other: Any, /) -> Self: ...


ArrayT = TypeVar("ArrayT", bound=Array)
"""The type of an array in a function that returns arrays of the library that it was given."""

SCAN_FROM = 1024  # rows of the input weight: directions · gates · hidden units

Op = Literal["conv", "linear", "recurrent"]


@dataclass(frozen=True)
class LayerSpec:
    """What a dense layer is, apart from the values of its weight.

    `shape` is (O, I, *K) for a convolution, (O, I) for a linear layer. The weight of a recurrent layer is that of its input
    projection: O = directions · gates · hidden, the gates in torch's order. `pads` holds the begins, then the ends, as
    ONNX writes them. `lead` is the number of axes before the features of a linear or recurrent layer's input.
    """

    op: Op
    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    auto_pad: str = "NOTSET"
    lead: int = 1
    size: tuple[int, ...] = ()  # of the input between batch and features, or behind the channels; 0 or none: not known
    scan: bool = False  # of a recurrent layer: whether its loop can be written as a Scan, and may be

    @property
    def spatial(self) -> int:
        """Number of spatial axes: 1, 2 or 3 for a convolution, 0 for a linear layer."""
        return len(self.shape) - 2

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size, (Kh, Kw) for two spatial axes; empty for a linear layer."""
        return self.shape[2:]

    @property
    def params(self) -> int:
        """Number of values in the dense weight, without bias."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Conv:
    """Convolution with a constant kernel: (N, C, *S) → (N, O, *S'), weight (O, C / groups, *K)."""

    weight: Array
    cores: tuple[int, ...]  # which cores were merged into the weight
    stride: tuple[int, ...]
    pads: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    auto_pad: str = "NOTSET"


@dataclass(frozen=True)
class MatMul:
    """Product with a constant matrix on the right (x @ weight) or on the left (weight @ x), batched over leading axes.

    A weight on the left may be a stack (g, q, p), one matrix for each index of the input's third axis from the end.
    """

    weight: Array
    cores: tuple[int, ...]
    side: Literal["left", "right"] = "right"


@dataclass(frozen=True)
class Reshape:
    """Reshape as ONNX defines it: 0 copies the axis at the same place, one -1 is inferred."""

    shape: tuple[int, ...]


Step = Conv | MatMul | Reshape


class Chain:
    """Steps being written, one contraction after the other, for one layer."""

    def __init__(self, layer: LayerSpec) -> None:
        self.layer = layer
        self._steps: list[Step] = []

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps so far."""
        return tuple(self._steps)

    def apply(self, matrix: Array, cores: tuple[int, ...], *, before: int = 1, after: int = 1, strided: bool = False) -> None:
        """Contract features (before, p, after) with a matrix (q, p) to (before, q, after).

        `strided` gives a convolution the layer's stride and pads: for a 1×1 kernel, whose own core has been merged away.
        """
        self.grouped(matrix[None], cores, before=before, after=after, strided=strided)

    def grouped(self, stack: Array, cores: tuple[int, ...], *, before: int = 1, after: int = 1, strided: bool = False) -> None:
        """Contract features (before, g, p, after) with a stack of matrices (g, q, p) to (before, g, q, after)."""
        if self.layer.op == "conv":
            self._pointwise(stack, cores, before, after, strided)
        else:
            self._product(stack, cores, before, after)

    def window(self, weight: Array, cores: tuple[int, ...], *, groups: int = 1, fold: int = 1) -> None:
        """Slide a kernel (O, C / groups, *K) with the layer's stride, pads and dilation.

        With `fold` the features are (fold, C) and every one of the `fold` parts meets the same kernel.
        """
        rest = (0,) * self.layer.spatial
        if fold > 1:
            self._reshape((-1, weight.shape[1] * groups, *rest))
        layer = self.layer
        self._steps.append(Conv(weight, cores, layer.stride, layer.pads, layer.dilation, groups, layer.auto_pad))
        if fold > 1:
            self._reshape((-1, fold * weight.shape[0], *rest))

    def _pointwise(self, stack: Array, cores: tuple[int, ...], before: int, after: int, strided: bool) -> None:
        groups, out, inputs = stack.shape
        nd = self.layer.spatial
        rest = (0,) * nd
        if before > 1:
            self._reshape((-1, groups * inputs * after, *rest))
        if after > 1:
            self._reshape((0, groups * inputs, -1, *rest[1:]))
        ones = (1,) * nd
        weight = stack.reshape(groups * out, inputs, *ones)
        if strided:
            layer = self.layer
            self._steps.append(Conv(weight, cores, layer.stride, layer.pads, layer.dilation, groups, layer.auto_pad))
        else:
            self._steps.append(Conv(weight, cores, ones, (0,) * (2 * nd), ones, groups))
        if after > 1:
            self._reshape((0, groups * out * after, -1, *rest[1:]))
        if before > 1:
            self._reshape((-1, before * groups * out * after, *rest))

    def _product(self, stack: Array, cores: tuple[int, ...], before: int, after: int) -> None:
        groups, out, inputs = stack.shape
        lead = (0,) * self.layer.lead
        outer = (*lead, *((before,) if before > 1 else ()))
        if groups == 1 and after == 1:
            if before > 1:
                self._reshape((*outer, inputs))
            self._steps.append(MatMul(stack[0].T, cores))
        else:
            self._reshape((*outer, *((groups,) if groups > 1 else ()), inputs, after))
            self._steps.append(MatMul(stack if groups > 1 else stack[0], cores, side="left"))
        if before * after * groups > 1:
            self._reshape((*lead, before * groups * out * after))

    def _reshape(self, shape: tuple[int, ...]) -> None:
        """Append a Reshape; one that comes straight behind another takes its place when it copies no axis that one changed."""
        if self._steps and isinstance(self._steps[-1], Reshape):
            previous = self._steps[-1].shape
            if all(previous[axis] == 0 for axis, size in enumerate(shape) if size == 0):
                self._steps.pop()
        self._steps.append(Reshape(shape))


def dense_step(weight: Array, layer: LayerSpec) -> Step:
    """Return the layer itself as a step, with a weight (O, I, *K) or (O, I); of a recurrent one its input projection."""
    if layer.op == "conv":
        return Conv(weight, (), layer.stride, layer.pads, layer.dilation, 1, layer.auto_pad)
    return MatMul(weight.T, ())


def split_at_boundary(steps: Sequence[Step]) -> tuple[tuple[Step, ...], Array | None, tuple[int, ...]]:
    """Return a recurrent layer's steps up to the rank between input and output, the matrix (O, p) behind it, and its cores.

    Without such a boundary all steps come back, and None for the matrix: the steps make the O features themselves.
    """
    last = steps[-1]
    if len(steps) > 1 and isinstance(last, MatMul) and last.side == "right":
        return tuple(steps[:-1]), last.weight.T, last.cores
    return tuple(steps), None, ()


def runs_in_scan(steps: Sequence[Step], layer: LayerSpec) -> bool:
    """Return whether a recurrent layer's loop is written as a Scan: its steps make the gates' inputs, and these are many.

    ONNX's own node would multiply them by an identity. From `SCAN_FROM` on the Scan was nowhere slower on the CPU that
    results/loops.md was measured on.
    """
    return layer.scan and layer.shape[0] >= SCAN_FROM and split_at_boundary(steps)[1] is None


def resolve(shape: tuple[int, ...], current: tuple[int, ...]) -> tuple[int, ...]:
    """Return `shape` with its zeros replaced by the axes of `current`; -1 is left to the library that reshapes."""
    return tuple(current[axis] if size == 0 else size for axis, size in enumerate(shape))


def describe(steps: Sequence[Step], layer: LayerSpec) -> str:
    """Return one line that says what runs, such as `conv 64→16, conv 3×3 16→16, conv 16→64`."""
    loop = ("scan",) if runs_in_scan(steps, layer) else ()
    return ", ".join(text for text in (*map(describe_step, steps), *loop) if text)


def describe_step(step: Step) -> str:
    """Return what one step does, such as `conv 3×3 16→16`; nothing for a Reshape."""
    match step:
        case Conv(weight=weight, groups=groups):
            kernel = "×".join(map(str, weight.shape[2:]))
            size = "" if set(weight.shape[2:]) == {1} else f"{kernel} "
            return f"conv {size}{weight.shape[1] * groups}→{weight.shape[0]}" + (f" /{groups}" if groups > 1 else "")
        case MatMul(weight=weight, side="right"):
            return f"matmul {weight.shape[0]}→{weight.shape[1]}"
        case MatMul(weight=weight):
            stack = f" ·{weight.shape[0]}" if len(weight.shape) == 3 else ""
            return f"matmul {weight.shape[-1]}→{weight.shape[-2]}{stack}"
        case Reshape():
            return ""
