"""The formats: one module each, all with the same functions, in one visible dict.

A new format is one file and one line in `FORMATS`; trainer, exporter, recipes and tests iterate over the dict.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tensorrail_exporter.contraction import Array, LayerSpec, Step
from tensorrail_exporter.errors import PlanError
from tensorrail_exporter.formats import tt


class Format(Protocol):
    """What every format module offers. Weights are (O, I, *K) for convolutions and (O, I) for linear layers."""

    MERGES: tuple[str, ...]
    """The ways in which cores may be merged before they run."""

    def default_modes(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the modes that a plan means when it names none."""

    def clamp(self, modes: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
        """Return `ranks` lowered to the largest that exist for `modes`; the argument is not changed."""

    def validate(self, shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> None:
        """Raise `PlanError` when modes or ranks cannot describe a weight of this shape."""

    def decompose(self, weight: Array, modes: Sequence[int], ranks: Sequence[int]) -> list[Array]:
        """Return the cores of the closest tensor of these ranks that the format's method finds."""

    def reconstruct(self, cores: Sequence[Array], shape: Sequence[int]) -> Array:
        """Return the dense weight of this shape that the cores stand for."""

    def project(self, weight: Array, modes: Sequence[int], ranks: Sequence[int]) -> Array:
        """Return `reconstruct(decompose(weight))`: ADMM's Z-step."""

    def core_shapes(self, shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Return the shape of every core, without computing one."""

    def contraction(self, cores: Sequence[Array], layer: LayerSpec, merge: str = "sides") -> tuple[Step, ...]:
        """Return the steps that run in place of the dense layer, bias left out."""


FORMATS: dict[str, Format] = {"tt": tt}


def format_of(name: str) -> Format:
    """Return the format of that name; `PlanError` lists the valid ones."""
    try:
        return FORMATS[name]
    except KeyError:
        raise PlanError(f"unknown format {name!r}: expected one of {', '.join(sorted(FORMATS))}") from None
