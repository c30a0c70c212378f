r"""Convolutions in groups: a format for each group's weight, all of the same modes and ranks.

The weight (O, I, *K) of a convolution in g groups, with I inputs per group, holds g weights (O/g, I, *K). Each is decomposed on
its own. A core is stored with one more axis in front, for the groups: (g, …).

The steps of one group are convolutions. Those of all groups run beside each other as convolutions with g times as many groups,
whose kernels are those of the groups one after the other: g groups of 1×1 → K → 1×1, without a node that divides or joins
channels. With unmerged sides there would be Reshapes, so `sides` is the only merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tensorrail_exporter.formats.contraction import ArrayT, Conv, LayerSpec, Op, Step, concatenated
from tensorrail_exporter.formats.modes import LETTERS, Equation, require_merge
from tensorrail_runtime.errors import PlanError

if TYPE_CHECKING:
    from tensorrail_exporter.formats import Format

_MERGE = "sides"
_GROUP = LETTERS[-1]  # in equations; formats take letters from the front


@dataclass(frozen=True)
class Grouped:
    """A format of a convolution in groups, with the functions of a format module; shapes are those of the whole weight.

    Attributes:
        name: key of the format.
        form: the format of each group's weight.
        groups: number of groups, 2 or more.

    """

    name: str
    form: Format
    groups: int

    def merges(self, op: Op) -> tuple[str, ...]:
        """Return `sides`, the only merge without Reshapes, if the format has it."""
        return tuple(merge for merge in self.form.merges(op) if merge == _MERGE)

    def default_modes(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the modes of one group's weight."""
        return self.form.default_modes(self._of_one(shape))

    def uniform(self, shape: Sequence[int], modes: Sequence[int], rank: int) -> tuple[int, ...]:
        """Return the ranks that a single number stands for."""
        return self.form.uniform(self._of_one(shape), modes, rank)

    def clamp(self, shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
        """Return the ranks, lowered to the largest that exist in one group."""
        return self.form.clamp(self._of_one(shape), modes, ranks)

    def validate(self, shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> None:
        """Raise `PlanError` if the modes or ranks do not fit the weight of one group, or the format has no such steps."""
        one = self._of_one(shape)
        try:
            self.form.validate(one, modes, ranks)
        except PlanError as error:
            raise PlanError(f"in {self.groups} groups, each with modes and ranks of its own weight: {error}") from None
        if not self.merges("conv"):
            raise PlanError(
                f"format {self.name} cannot run in groups: expected a format with the merge {_MERGE!r}, got one with "
                f"{', '.join(self.form.merges('conv')) or 'none'}; use another format, or leave the layer out of the plan"
            )

    def decompose(self, weight: ArrayT, modes: Sequence[int], ranks: Sequence[int]) -> list[ArrayT]:
        """Return the cores of every group's weight, stacked over the groups."""
        shape = tuple(weight.shape)
        self.validate(shape, modes, ranks)
        parts = weight.reshape((self.groups, *self._of_one(shape)))
        cores = [self.form.decompose(part, modes, ranks) for part in _unstacked(parts)]
        return [_stacked(list(of_groups)) for of_groups in zip(*cores, strict=True)]

    def reconstruct(self, cores: Sequence[ArrayT], shape: Sequence[int], modes: Sequence[int]) -> ArrayT:
        """Return the weight (O, I, *K) whose groups the cores represent."""
        one = self._of_one(shape)
        return concatenated([self.form.reconstruct(own, one, modes) for own in self._by_group(cores)])

    def core_shapes(self, shape: Sequence[int], modes: Sequence[int], ranks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of the cores, (g, …)."""
        self.validate(shape, modes, ranks)
        return tuple((self.groups, *core) for core in self.form.core_shapes(self._of_one(shape), modes, ranks))

    def rank_axes(self, shape: Sequence[int], modes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Return the axes that are ranks, behind that of the groups."""
        return tuple(tuple(axis + 1 for axis in axes) for axes in self.form.rank_axes(self._of_one(shape), modes))

    def equation(self, shape: Sequence[int], modes: Sequence[int]) -> Equation:
        """Return the einsum of the cores, of which all, and the weight, have the groups as their first axis."""
        one = self.form.equation(self._of_one(shape), modes)
        return replace(
            one,
            cores=tuple(_GROUP + core for core in one.cores),
            weight=_GROUP + one.weight,
            axes=(self.groups, *one.axes),
        )

    def contraction(self, cores: Sequence[ArrayT], layer: LayerSpec, modes: Sequence[int], merge: str) -> tuple[Step, ...]:
        """Return the convolutions of one group with the kernels of all groups, one after the other."""
        require_merge(merge, self.merges(layer.op), f"{self.name} of a convolution in {self.groups} groups")
        one = layer.of_one_group
        steps = zip(*(self.form.contraction(own, one, modes, merge) for own in self._by_group(cores)), strict=True)
        return tuple(self._beside(of_groups) for of_groups in steps)

    def _beside(self, steps: Sequence[Step]) -> Conv:
        """Return the same step of all groups as one convolution."""
        convolutions = [step for step in steps if isinstance(step, Conv)]
        if len(convolutions) < len(steps):
            raise PlanError(
                f"format {self.name} cannot run in groups: expected a contraction of convolutions alone, got another step; "
                "use tt, svd, tucker or cp"
            )
        first = convolutions[0]
        return replace(first, weight=concatenated([step.weight for step in convolutions]), groups=self.groups * first.groups)

    def _of_one(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape (O/g, I, *K) of one group's weight."""
        if shape[0] % self.groups:
            raise PlanError(f"expected outputs that are a multiple of the {self.groups} groups, got {shape[0]}")
        return (shape[0] // self.groups, *shape[1:])

    def _by_group(self, cores: Sequence[ArrayT]) -> list[tuple[ArrayT, ...]]:
        """Return the cores of each group."""
        return list(zip(*map(_unstacked, cores), strict=True))


def _unstacked(stack: ArrayT) -> list[ArrayT]:
    """Return the arrays along the first axis."""
    either: Any = stack
    return list(either.unbind(0) if hasattr(either, "unbind") else either)


def _stacked(arrays: Sequence[ArrayT]) -> ArrayT:
    return concatenated([array[None] for array in arrays])
