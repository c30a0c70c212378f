"""The formats: one module each, all with the same functions, in one visible dict.

A new format is one file and one line in `FORMATS`; trainer, exporter, recipes and tests iterate over the dict.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Protocol

from tensorrail_exporter.formats import cp, svd, tr, tt, ttm, tucker
from tensorrail_exporter.formats.contraction import ArrayT, LayerSpec, Op, Step
from tensorrail_exporter.formats.modes import Equation
from tensorrail_runtime.errors import PlanError


class Format(Protocol):
    """What every format module offers. Weights are (O, I, *K) for convolutions, (O, I) for linear and recurrent layers."""

    def merges(self, op: Op) -> tuple[str, ...]:
        """Return the ways in which neighbouring cores may be joined before they run, the most joined one first."""

    def default_modes(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the modes that a plan means when it names none."""

    def uniform(self, shape: Sequence[int], modes: Sequence[int], rank: int) -> tuple[int, ...]:
        """Return the ranks that one number stands for, before clamping."""

    def clamp(self, shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
        """Return `ranks` lowered to the largest that exist for `modes`; the argument is not changed."""

    def validate(self, shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> None:
        """Raise `PlanError` when modes or ranks cannot describe a weight of this shape."""

    def decompose(self, weight: ArrayT, modes: Sequence[int], ranks: Sequence[int]) -> list[ArrayT]:
        """Return the cores of the closest tensor of these ranks that the format's method finds."""

    def reconstruct(self, cores: Sequence[ArrayT], shape: Sequence[int], modes: Sequence[int]) -> ArrayT:
        """Return the dense weight of this shape that the cores stand for."""

    def core_shapes(self, shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Return the shape of every core, without computing one."""

    def rank_axes(self, shape: Sequence[int], modes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Return for every core the axes that are ranks: those that zeros may widen without changing the weight."""

    def equation(self, shape: Sequence[int], modes: Sequence[int]) -> Equation:
        """Return how the cores multiply up to the weight, as an einsum: linear in every single core."""

    def contraction(self, cores: Sequence[ArrayT], layer: LayerSpec, modes: Sequence[int], merge: str) -> tuple[Step, ...]:
        """Return the steps that run in place of the dense layer, bias left out."""


FORMATS: dict[str, Format] = {"tt": tt, "tr": tr, "tucker": tucker, "cp": cp, "svd": svd, "ttm": ttm}


def format_of(name: str) -> Format:
    """Return the format of that name; `PlanError` lists the valid ones."""
    try:
        return FORMATS[name]
    except KeyError:
        raise PlanError(f"unknown format {name!r}: expected one of {', '.join(sorted(FORMATS))}") from None


def project(name: str, weight: ArrayT, modes: Sequence[int], ranks: Sequence[int]) -> ArrayT:
    """Return the weight that a format's decomposition of these ranks keeps: ADMM's Z-step.

    `weight` is (O, I, *K) or (O, I), of NumPy or torch; the computation stays on its device. Torch's tensors on the CPU are
    computed as NumPy arrays, which multiplies a matrix by its own transpose in half the time. Errors are `decompose`'s.
    """
    form = format_of(name)
    tensor: Any = weight  # of torch where it has `new_tensor`, which the exporter itself does not import
    on_cpu = hasattr(tensor, "new_tensor") and tensor.device.type == "cpu"
    if on_cpu and str(tensor.dtype) in ("torch.float32", "torch.float64"):
        torch = sys.modules["torch"]
        projected: ArrayT = torch.from_numpy(project(name, tensor.detach().numpy(), modes, ranks))
        return projected
    return form.reconstruct(form.decompose(weight, modes, ranks), tuple(weight.shape), modes)
