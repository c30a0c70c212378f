r"""The steps that replace a dense layer: an ordered list of convolutions, matrix products and reshapes.

Stored cores and executed steps are two things. A format turns cores into steps (`Format.contraction`); the trainer runs
the steps in torch, the exporter writes them as ONNX nodes. Every step has exactly one constant operand. A graph therefore
has no product of constants that a runtime could fold back into the dense weight, and no step is an `Einsum`.

A format builds its steps with a `Chain`. It treats the features of a layer as a product of axes (before, n, after) and
contracts the middle one. This needs no transposition: in a convolution the axes before are folded into the batch and the
axes after into the first spatial axis; in a linear layer they become axes of a batched product.

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
    """The methods that `numpy.ndarray` and `torch.Tensor` share: formats use no others.

    Indices, operands and values are `Any`, because the two libraries declare different types for them.
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
"""The array type of a function that returns arrays of the same library as its argument."""

SCAN_FROM = 1024  # rows of the input weight, directions · gates · hidden units, from which a Scan is written

Op = Literal["conv", "linear", "recurrent"]


@dataclass(frozen=True)
class LayerSpec:
    """A dense layer without the values of its weight.

    Attributes:
        op: `conv`, `linear` or `recurrent` (LSTM and GRU).
        shape: shape of the weight: (O, I, *K) for a convolution, (O, I) for a linear layer. For a recurrent layer it is the
            weight of the input projection: O = directions · gates · hidden units, with the gates in torch's order.
        stride: strides of a convolution, one per spatial axis.
        pads: padding of a convolution in ONNX's order: the begins of all spatial axes, then the ends.
        dilation: dilations of a convolution, one per spatial axis.
        auto_pad: `auto_pad` of ONNX's Conv; with a value other than `NOTSET`, `pads` does not count.
        lead: number of axes before the features in the input of a linear or recurrent layer.
        size: sizes of the input's axes between batch and features, or behind the channels of a convolution; 0 for an axis
            of unknown size, empty if none is known.
        scan: whether the loop of a recurrent layer can and may be written as a Scan.

    """

    op: Op
    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    auto_pad: str = "NOTSET"
    lead: int = 1
    size: tuple[int, ...] = ()
    scan: bool = False

    @property
    def spatial(self) -> int:
        """Number of spatial axes: 1, 2 or 3 for a convolution, 0 for a linear layer."""
        return len(self.shape) - 2

    @property
    def kernel(self) -> tuple[int, ...]:
        """Size of the kernel, (Kh, Kw) for two spatial axes; empty for a linear layer."""
        return self.shape[2:]

    @property
    def params(self) -> int:
        """Number of values in the dense weight, without bias."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Conv:
    """A convolution with a constant kernel, (N, C, *S) → (N, O, *S').

    Attributes:
        weight: kernel (O, C / groups, *K).
        cores: indices of the cores that were merged into the weight.
        stride: one stride per spatial axis.
        pads: the begins of all spatial axes, then the ends.
        dilation: one dilation per spatial axis.
        groups: number of groups; default 1.
        auto_pad: as in ONNX; default `NOTSET`, which uses `pads`.

    """

    weight: Array
    cores: tuple[int, ...]
    stride: tuple[int, ...]
    pads: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    auto_pad: str = "NOTSET"


@dataclass(frozen=True)
class MatMul:
    """A product with a constant matrix, batched over the leading axes of the input.

    Attributes:
        weight: matrix (p, q) on the right or (q, p) on the left. On the left it may also be a stack (g, q, p) with one
            matrix for each index of the input's third axis from the end.
        cores: indices of the cores that were merged into the weight.
        side: `right` for x @ weight, the default, `left` for weight @ x.

    """

    weight: Array
    cores: tuple[int, ...]
    side: Literal["left", "right"] = "right"


@dataclass(frozen=True)
class Reshape:
    """A reshape as ONNX defines it.

    Attributes:
        shape: new size of every axis; 0 copies the size of the input's axis at the same place, a single -1 is inferred.

    """

    shape: tuple[int, ...]


Step = Conv | MatMul | Reshape
"""One step of a contraction; it becomes one ONNX node."""


class Chain:
    """Builds the steps of one layer, one contraction after the other."""

    def __init__(self, layer: LayerSpec) -> None:
        self.layer = layer
        self._steps: list[Step] = []

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps so far."""
        return tuple(self._steps)

    def apply(self, matrix: Array, cores: tuple[int, ...], *, before: int = 1, after: int = 1, strided: bool = False) -> None:
        """Contract features (before, p, after) with a matrix (q, p) to (before, q, after).

        `cores` are the indices of the cores in the matrix. `strided` gives the 1×1 convolution the stride and pads of the
        layer; it is for a layer with a 1×1 kernel, whose core was merged into the matrix.
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

        With `fold` the features are (fold, C) and the same kernel is applied to each of the `fold` parts.
        """
        copied = (0,) * self.layer.spatial  # 0 in a Reshape copies the size of an axis
        if fold > 1:
            self._reshape((-1, weight.shape[1] * groups, *copied))
        layer = self.layer
        self._steps.append(Conv(weight, cores, layer.stride, layer.pads, layer.dilation, groups, layer.auto_pad))
        if fold > 1:
            self._reshape((-1, fold * weight.shape[0], *copied))

    def _pointwise(self, stack: Array, cores: tuple[int, ...], before: int, after: int, strided: bool) -> None:
        """Append a 1×1 convolution in groups, between the Reshapes that fold the axes before and after it."""
        groups, out, inputs = stack.shape
        nd = self.layer.spatial
        copied = (0,) * nd
        if before > 1:
            self._reshape((-1, groups * inputs * after, *copied))
        if after > 1:
            self._reshape((0, groups * inputs, -1, *copied[1:]))
        ones = (1,) * nd
        weight = stack.reshape(groups * out, inputs, *ones)
        if strided:
            layer = self.layer
            self._steps.append(Conv(weight, cores, layer.stride, layer.pads, layer.dilation, groups, layer.auto_pad))
        else:
            self._steps.append(Conv(weight, cores, ones, (0,) * (2 * nd), ones, groups))
        if after > 1:
            self._reshape((0, groups * out * after, -1, *copied[1:]))
        if before > 1:
            self._reshape((-1, before * groups * out * after, *copied))

    def _product(self, stack: Array, cores: tuple[int, ...], before: int, after: int) -> None:
        """Append a product, between the Reshapes that make axes of the features before and after it."""
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
        """Append a Reshape; it replaces a Reshape right before it unless it copies an axis that the other one changed."""
        if self._steps and isinstance(self._steps[-1], Reshape):
            previous = self._steps[-1].shape
            if all(previous[axis] == 0 for axis, size in enumerate(shape) if size == 0):
                self._steps.pop()
        self._steps.append(Reshape(shape))


def dense_step(weight: Array, layer: LayerSpec) -> Step:
    """Return the dense layer as one step with `weight` (O, I, *K) or (O, I); for a recurrent layer its input projection."""
    if layer.op == "conv":
        return Conv(weight, (), layer.stride, layer.pads, layer.dilation, 1, layer.auto_pad)
    return MatMul(weight.T, ())


def split_at_boundary(steps: Sequence[Step]) -> tuple[tuple[Step, ...], Array | None, tuple[int, ...]]:
    """Split the steps of a recurrent layer at the rank between its input and its output.

    Returns:
        The steps up to that rank p, the matrix (O, p) that follows, and the indices of the cores in the matrix. If there
        is no such rank: all steps, which compute the O features themselves, None, and no indices.

    """
    last = steps[-1]
    if len(steps) > 1 and isinstance(last, MatMul) and last.side == "right":
        return tuple(steps[:-1]), last.weight.T, last.cores
    return tuple(steps), None, ()


def runs_in_scan(steps: Sequence[Step], layer: LayerSpec) -> bool:
    """Return whether the loop of a recurrent layer is written as a Scan.

    It is if the steps compute the inputs of all gates, which ONNX's own node would multiply by an identity matrix, and if
    the gates have at least `SCAN_FROM` rows. From that size on the Scan was never slower in results/loops.md.
    """
    return layer.scan and layer.shape[0] >= SCAN_FROM and split_at_boundary(steps)[1] is None


def resolve(shape: tuple[int, ...], current: tuple[int, ...]) -> tuple[int, ...]:
    """Return `shape` with each 0 replaced by the size of the same axis in `current`; a -1 stays."""
    return tuple(current[axis] if size == 0 else size for axis, size in enumerate(shape))


def describe(steps: Sequence[Step], layer: LayerSpec) -> str:
    """Return the steps in one line, such as `conv 64→16, conv 3×3 16→16, conv 16→64`."""
    loop = ("scan",) if runs_in_scan(steps, layer) else ()
    return ", ".join(text for text in (*map(describe_step, steps), *loop) if text)


def describe_step(step: Step) -> str:
    """Return one step in words, such as `conv 3×3 16→16`; an empty string for a Reshape."""
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
