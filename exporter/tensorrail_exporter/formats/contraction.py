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
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self, TypeVar

import numpy as np

from tensorrail_runtime.errors import PlanError


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


def permute(array: ArrayT, axes: tuple[int, ...]) -> ArrayT:
    """Return the array with its axes reordered."""
    either: Any = array  # here and below: the libraries have no common name for it
    permuted: ArrayT = either.permute(axes) if hasattr(either, "permute") else either.transpose(axes)
    return permuted


def concatenated(arrays: Sequence[ArrayT]) -> ArrayT:
    """Return arrays one after the other along their first axis."""
    either: Any = arrays[0]
    if hasattr(either, "new_tensor"):  # of torch, which the exporter itself does not import
        either = sys.modules["torch"].cat(tuple(arrays))
    else:
        either = np.concatenate([np.asarray(array) for array in arrays])
    joined: ArrayT = either
    return joined


LOOP = "scan"  # the last word of the steps of a recurrent layer whose loop is written as a Scan
SCAN_FROM = 1024  # rows of the input weight, directions · gates · hidden units, from which a Scan is written

Op = Literal["conv", "linear", "recurrent"]


@dataclass(frozen=True)
class LayerSpec:
    """A dense layer without the values of its weight.

    Attributes:
        op: `conv`, `linear` or `recurrent` (LSTM and GRU).
        shape: shape of the weight: (O, I, *K) for a convolution, transposed or not, (O, I) for a linear layer. For a recurrent
            layer it is the weight of the input projection, or the recurrent weight: O = directions · gates · hidden units, with
            the gates in torch's order. For a convolution in groups, I is the number of inputs of one group.
        stride: strides of a convolution, one per spatial axis.
        pads: padding of a convolution in ONNX's order: the begins of all spatial axes, then the ends.
        dilation: dilations of a convolution, one per spatial axis.
        auto_pad: `auto_pad` of ONNX's Conv; with a value other than `NOTSET`, `pads` does not count.
        lead: number of axes before the features in the input of a linear or recurrent layer.
        size: sizes of the input's axes between batch and features, or behind the channels of a convolution; 0 for an axis
            of unknown size, empty if none is known.
        scan: whether the loop of a recurrent layer can and may be written as a Scan.
        transposed: whether a convolution is a transposed one, whose stride spreads its input.
        output_padding: what a transposed convolution adds at the end of each spatial axis; empty for nothing.
        gathers: whether the input of a linear layer is indices, which stand for rows with a single one: an embedding of I
            entries with O features.
        groups: number of groups of a convolution; default 1.
        state_products: for a recurrent weight, how many states a time step multiplies by it: one for each direction, or two in
            a GRU that resets the state before the product. 0 for any other layer.

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
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    gathers: bool = False
    groups: int = 1
    state_products: int = 0

    @property
    def inputs(self) -> int:
        """Number of input channels or features, of all groups together."""
        return self.shape[1] * self.groups

    @property
    def of_one_group(self) -> LayerSpec:
        """The convolution of one group: the layer itself if it has no groups."""
        return self if self.groups == 1 else replace(self, shape=(self.shape[0] // self.groups, *self.shape[1:]), groups=1)

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
        transposed: whether it is a transposed convolution; its kernel is (O, C / groups, *K) as well.
        output_padding: as in `LayerSpec`.

    """

    weight: Array
    cores: tuple[int, ...]
    stride: tuple[int, ...]
    pads: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    auto_pad: str = "NOTSET"
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    def spread(self) -> Array:
        """Return the kernel of a transposed convolution as ONNX and torch store it, (C, O / groups, *K)."""
        out, inputs, *kernel = self.weight.shape
        grouped = self.weight.reshape((self.groups, out // self.groups, inputs, *kernel))
        return permute(grouped, (0, 2, 1, *range(3, 3 + len(kernel)))).reshape(
            (self.groups * inputs, out // self.groups, *kernel)
        )


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
class SplitIndex:
    """Indices as one index per mode, for the steps behind it that gather: each takes that of its mode, the last mode first.

    Attributes:
        modes: sizes of the modes (n₁, …, n_d), of which the last one counts fastest.
        padding: how many rows the product of the modes has before the first entry. Negative indices count from the last entry.

    """

    modes: tuple[int, ...]
    padding: int


@dataclass(frozen=True)
class Gather:
    """Rows of a constant table, by indices: the product of a row with a single one and the table.

    Attributes:
        weight: table (entries, features), or a matrix for each entry (entries, p, q).
        cores: indices of the cores that were merged into the table.

    """

    weight: Array
    cores: tuple[int, ...]


@dataclass(frozen=True)
class GatherMatMul:
    """A product with matrices that indices choose from a constant stack, matrix @ x.

    Attributes:
        weight: stack (entries, q, p), a matrix for each entry.
        cores: indices of the cores that were merged into the stack.

    """

    weight: Array
    cores: tuple[int, ...]


@dataclass(frozen=True)
class Reshape:
    """A reshape as ONNX defines it.

    Attributes:
        shape: new size of every axis; 0 copies the size of the input's axis at the same place, a single -1 is inferred.

    """

    shape: tuple[int, ...]


Step = Conv | MatMul | SplitIndex | Gather | GatherMatMul | Reshape
"""One step of a contraction: one ONNX node, but several for `SplitIndex`, and a Gather and a MatMul for `GatherMatMul`."""


class Chain:
    """Builds the steps of one layer, one contraction after the other."""

    def __init__(self, layer: LayerSpec) -> None:
        self.layer = layer
        self._steps: list[Step] = []
        self._strided: int | None = None  # the place of the step with one tap that has the stride of the layer

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps so far. With one tap, a stride comes first, and that of a transposed convolution last if it can."""
        steps = list(self._steps)
        if self._strided is not None and self.layer.transposed and isinstance(steps[-1], Conv):
            for place, of_layer in ((self._strided, False), (len(steps) - 1, True)):
                step = steps[place]
                if isinstance(step, Conv):
                    steps[place] = self._one_tap(step.weight, step.cores, step.groups, strided=of_layer)
        return tuple(steps)

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
        self._steps.append(as_layer(weight, cores, self.layer, groups))
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
        if strided:
            self._strided = len(self._steps)
        self._steps.append(self._one_tap(stack.reshape(groups * out, inputs, *(1,) * nd), cores, groups, strided=strided))
        if after > 1:
            self._reshape((0, groups * out * after, -1, *copied[1:]))
        if before > 1:
            self._reshape((-1, before * groups * out * after, *copied))

    def _one_tap(self, weight: Array, cores: tuple[int, ...], groups: int, *, strided: bool) -> Conv:
        return as_layer(weight, cores, self.layer, groups, (strided,) * self.layer.spatial)

    def _product(self, stack: Array, cores: tuple[int, ...], before: int, after: int) -> None:
        """Append a product, between the Reshapes that make axes of the features before and after it."""
        groups, out, inputs = stack.shape
        if self.layer.gathers and not self._steps:
            if groups * before * after > 1:
                raise PlanError(
                    f"expected the {self.layer.shape[1]} entries of an embedding as a single mode of the first core, got "
                    "several: give the modes of the features, then the number of entries, or use format ttm"
                )
            self._steps.append(Gather(stack[0].T, cores))
            return
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
    """Return the dense layer as one step with `weight` (O, I, *K) or (O, I); for a recurrent layer that product."""
    if layer.op == "conv":
        return as_layer(weight, (), layer, layer.groups)
    return Gather(weight.T, ()) if layer.gathers else MatMul(weight.T, ())


def as_layer(
    weight: Array, cores: tuple[int, ...], layer: LayerSpec, groups: int = 1, used: Sequence[bool] | None = None
) -> Conv:
    """Return a convolution with the stride, pads and dilation of a layer.

    Args:
        weight: the kernel (O, C / groups, *K).
        cores: indices of the cores that were merged into it.
        layer: the dense convolution.
        groups: number of groups; default 1.
        used: the spatial axes along which it does what the layer does; along others it has stride 1 and no pads. Default: all.

    """
    on = used or (True,) * layer.spatial
    stride = tuple(s if use else 1 for s, use in zip(layer.stride, on, strict=True))
    pads = tuple(p if use else 0 for p, use in zip(layer.pads, (*on, *on), strict=True))
    dilation = tuple(d if use else 1 for d, use in zip(layer.dilation, on, strict=True))
    added = tuple(p if use else 0 for p, use in zip(layer.output_padding, on, strict=False))
    # A transposed convolution that spreads nothing is a convolution, for which there are faster kernels.
    plain = math.prod(weight.shape[2:]) == math.prod(stride) == 1 and not any((*pads, *added))
    transposed = layer.transposed and not plain
    auto_pad = layer.auto_pad if any(on) else "NOTSET"
    return Conv(weight, cores, stride, pads, dilation, groups, auto_pad, transposed, added if transposed else ())


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
    the gates have at least `SCAN_FROM` rows. From that size on the Scan was never slower in results/loops.md. The cores of a
    recurrent weight run in a Scan always: ONNX's node has no place for them.
    """
    return layer.scan and (bool(layer.state_products) or (layer.shape[0] >= SCAN_FROM and split_at_boundary(steps)[1] is None))


def resolve(shape: tuple[int, ...], current: tuple[int, ...]) -> tuple[int, ...]:
    """Return `shape` with each 0 replaced by the size of the same axis in `current`; a -1 stays."""
    return tuple(current[axis] if size == 0 else size for axis, size in enumerate(shape))


def describe(steps: Sequence[Step], layer: LayerSpec) -> str:
    """Return the steps in one line, such as `conv 64→16, conv 3×3 16→16, conv 16→64`."""
    loop = (LOOP,) if runs_in_scan(steps, layer) else ()
    return ", ".join(text for text in (*map(describe_step, steps), *loop) if text)


def describe_step(step: Step) -> str:
    """Return one step in words, such as `conv 3×3 16→16`; an empty string for a Reshape."""
    match step:
        case Conv(weight=weight, groups=groups, transposed=transposed):
            kernel = "×".join(map(str, weight.shape[2:]))
            size = "" if set(weight.shape[2:]) == {1} else f"{kernel} "
            kind = "transposed conv" if transposed else "conv"
            return f"{kind} {size}{weight.shape[1] * groups}→{weight.shape[0]}" + (f" /{groups}" if groups > 1 else "")
        case MatMul(weight=weight, side="right"):
            return f"matmul {weight.shape[0]}→{weight.shape[1]}"
        case MatMul(weight=weight):
            stack = f" ·{weight.shape[0]}" if len(weight.shape) == 3 else ""
            return f"matmul {weight.shape[-1]}→{weight.shape[-2]}{stack}"
        case SplitIndex(modes=modes, padding=padding):
            return f"index {'×'.join(map(str, modes))}" + (f" (padding {padding})" if padding else "")
        case Gather(weight=weight):
            return f"gather {weight.shape[0]}→{'×'.join(map(str, weight.shape[1:]))}"
        case GatherMatMul(weight=weight):
            return f"gathered matmul {weight.shape[2]}→{weight.shape[1]} of {weight.shape[0]}"
        case Reshape():
            return ""
