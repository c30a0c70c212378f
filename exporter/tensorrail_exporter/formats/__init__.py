"""The tensor formats: one module per format, all with the same functions, listed in one dict.

A new format is one file and one line in `FORMATS`. Trainer, exporter, recipes and tests iterate over the dict. A format
module can import all that it needs from here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Protocol

from tensorrail_exporter.formats import cp, svd, tr, tt, ttm, tucker, width
from tensorrail_exporter.formats.contraction import ArrayT, Chain, LayerSpec, Op, Step, permute
from tensorrail_exporter.formats.grouped import Grouped
from tensorrail_exporter.formats.modes import LETTERS, Equation, default_modes, require_merge, require_ranks, split
from tensorrail_exporter.formats.truncation import backend_of
from tensorrail_runtime.errors import PlanError

__all__ = [
    "FORMATS",
    "LETTERS",
    "WIDTH",
    "ArrayT",
    "Chain",
    "Equation",
    "Format",
    "LayerSpec",
    "Op",
    "Step",
    "backend_of",
    "default_modes",
    "format_of",
    "permute",
    "project",
    "require_merge",
    "require_ranks",
    "split",
]


class Format(Protocol):
    """The functions that every format module has.

    The methods share these arguments:

    - `shape`: shape of the dense weight, (O, I, *K) for a convolution, (O, I) for a linear or recurrent layer.
    - `modes`: sizes of the axes that the weight is reshaped to, in the order of the format.
    - `ranks`: ranks of the decomposition, in the order of the format.
    - `weight`, `cores`: arrays of NumPy or torch; results are of the same library, on the same device.
    """

    def merges(self, op: Op) -> tuple[str, ...]:
        """Return the names of the ways to merge neighbouring cores before they run, the most merged first."""

    def default_modes(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the modes of a plan that names none."""

    def uniform(self, shape: Sequence[int], modes: Sequence[int], rank: int) -> tuple[int, ...]:
        """Return the ranks that a single number stands for. They may be larger than the largest that exist."""

    def clamp(self, shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
        """Return the ranks, lowered to the largest that exist for `modes`."""

    def validate(self, shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> None:
        """Raise `PlanError` if the modes or ranks do not fit a weight of this shape."""

    def decompose(self, weight: ArrayT, modes: Sequence[int], ranks: Sequence[int]) -> list[ArrayT]:
        """Return the cores of an approximation of `weight` with these ranks, clamped where they are too large."""

    def reconstruct(self, cores: Sequence[ArrayT], shape: Sequence[int], modes: Sequence[int]) -> ArrayT:
        """Return the dense weight of this shape that the cores represent."""

    def core_shapes(self, shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Return the shape of every core without computing any."""

    def rank_axes(self, shape: Sequence[int], modes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Return, for every core, the axes that are ranks and may be padded with zeros without changing the weight."""

    def equation(self, shape: Sequence[int], modes: Sequence[int]) -> Equation:
        """Return the einsum that multiplies the cores to the weight. It is linear in every single core."""

    def contraction(self, cores: Sequence[ArrayT], layer: LayerSpec, modes: Sequence[int], merge: str) -> tuple[Step, ...]:
        """Return the steps that replace the dense layer, without its bias. `merge` is one of `merges(layer.op)`."""


FORMATS: dict[str, Format] = {"tt": tt, "tr": tr, "tucker": tucker, "cp": cp, "svd": svd, "ttm": ttm}
"""The low-rank formats by name, as plans and recipes write it."""

WIDTH = "width"
"""The format of a layer that reads fewer channels: in plans alone, since training would blur which channels it reads."""


def format_of(name: str, groups: int = 1) -> Format:
    """Return the format with this name.

    Args:
        name: key of `FORMATS`, or `WIDTH`.
        groups: number of groups of the convolution that it is for; default 1.

    Raises:
        PlanError: the name is unknown, the message lists the valid ones; or the format does not divide into groups.

    """
    known = FORMATS | {WIDTH: width}
    if name not in known:
        raise PlanError(f"unknown format {name!r}: expected one of {', '.join(sorted(known))}")
    if groups == 1:
        return known[name]
    if name == WIDTH:
        raise PlanError(
            f"format {WIDTH} reads fewer channels, but each group of a convolution needs its own; use another format"
        )
    return Grouped(name, known[name], groups)


def default_modes_of(name: str, layer: LayerSpec) -> tuple[int, ...]:
    """Return the modes of a plan that names none, for a layer; the entries of an embedding may need padding.

    Args:
        name: key of `FORMATS`, or `WIDTH`.
        layer: the dense layer.

    Raises:
        PlanError: the format is unknown, or does not divide into groups.

    """
    if name == "ttm" and layer.gathers:
        return ttm.table_modes(layer.shape)
    return format_of(name, layer.groups).default_modes(layer.shape)


def project(name: str, weight: ArrayT, modes: Sequence[int], ranks: Sequence[int], groups: int = 1) -> ArrayT:
    """Return the approximation of a weight that a format keeps at these ranks: the Z-step of ADMM.

    A torch tensor in CPU memory is computed as a NumPy array, which multiplies a matrix by its own transpose in half the time.

    Args:
        name: key of `FORMATS`.
        weight: dense weight (O, I, *K) or (O, I), of NumPy or torch.
        modes: modes in the order of the format.
        ranks: ranks in the order of the format.
        groups: number of groups of a convolution; default 1.

    Returns:
        The reconstructed weight, with the shape, library and device of `weight`.

    Raises:
        PlanError: the format is unknown, or the modes or ranks do not fit the weight.
        numpy.linalg.LinAlgError: the weight contains infinity or NaN.

    """
    form = format_of(name, groups)
    tensor: Any = weight  # of torch where it has `new_tensor`, which the exporter itself does not import
    on_cpu = hasattr(tensor, "new_tensor") and tensor.device.type == "cpu"
    if on_cpu and str(tensor.dtype) in ("torch.float32", "torch.float64"):
        torch = sys.modules["torch"]
        projected: ArrayT = torch.from_numpy(project(name, tensor.detach().numpy(), modes, ranks, groups))
        return projected
    return form.reconstruct(form.decompose(weight, modes, ranks), tuple(weight.shape), modes)
