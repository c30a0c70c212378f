r"""What runs in place of a dense layer: an ordered list of steps.

Stored cores and executed steps are two things. A format turns cores into steps (`Format.contraction`); the trainer runs
the steps in torch, the exporter writes them as ONNX nodes. Every step has exactly one constant operand, so that no
product of constants is left in a graph for a runtime to fold back into the dense weight, and no step is an `Einsum`.

The layouts are chosen so that a chain of cores needs no transposition. For a convolution with input modes
:math:`i_1 … i_n`, the leading modes are folded into the batch and the last one is contracted by a 1×1 convolution,
again and again; on the output side the modes already made are folded into the first spatial axis:

    (B, i₁i₂, H, W) → (B·i₁, i₂, H, W) → (B·i₁, r, H, W) → (B, i₁r, H, W) → (B, r', H, W)
    (B, r, H, W) → (B, r₁o₂, H, W) → (B, r₁, o₂H, W) → (B, o₁, o₂H, W) → (B, o₁o₂, H, W)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Array: TypeAlias = Any
"""A `numpy.ndarray` or a `torch.Tensor`; the functions here use only what both have."""

Op = Literal["conv", "linear"]


@dataclass(frozen=True)
class LayerSpec:
    """What a dense layer is, apart from the values of its weight.

    `shape` is (O, I, *K) for a convolution, (O, I) for a linear layer. `pads` holds the begins, then the ends, as ONNX
    writes them. `lead` is the number of axes before the features of a linear layer's input.
    """

    op: Op
    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    auto_pad: str = "NOTSET"
    lead: int = 1

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
    """Product with a constant matrix on the right (x @ weight) or on the left (weight @ x), batched over leading axes."""

    weight: Array
    cores: tuple[int, ...]
    side: Literal["left", "right"] = "right"


@dataclass(frozen=True)
class Reshape:
    """Reshape as ONNX defines it: 0 copies the axis at the same place, one -1 is inferred."""

    shape: tuple[int, ...]


Step = Conv | MatMul | Reshape


def pointwise(weight: Array, cores: tuple[int, ...], spatial: int) -> Conv:
    """Return the 1×…×1 convolution that applies the matrix `weight`, (O, C), at every position."""
    ones = (1,) * spatial
    return Conv(weight.reshape(*weight.shape, *ones), cores, ones, (0,) * (2 * spatial), ones)


def resolve(shape: tuple[int, ...], current: tuple[int, ...]) -> tuple[int, ...]:
    """Return `shape` with its zeros replaced by the axes of `current`; -1 is left to the library that reshapes."""
    return tuple(current[axis] if size == 0 else size for axis, size in enumerate(shape))


def describe(steps: tuple[Step, ...]) -> str:
    """Return one line that says what runs, such as `conv 64→16, conv 3×3 16→16, conv 16→64`."""
    return ", ".join(text for text in map(_describe_step, steps) if text)


def _describe_step(step: Step) -> str:
    match step:
        case Conv(weight=weight, groups=groups):
            kernel = "×".join(map(str, weight.shape[2:]))
            size = "" if set(weight.shape[2:]) == {1} else f"{kernel} "
            return f"conv {size}{weight.shape[1] * groups}→{weight.shape[0]}" + (f" /{groups}" if groups > 1 else "")
        case MatMul(weight=weight, side="right"):
            return f"matmul {weight.shape[0]}→{weight.shape[1]}"
        case MatMul(weight=weight):
            return f"matmul {weight.shape[1]}→{weight.shape[0]}"
        case Reshape():
            return ""
