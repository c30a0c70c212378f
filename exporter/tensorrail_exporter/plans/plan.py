"""The plan: which layers become which cores. One small record, also a file that a person can read (`plan.json`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tensorrail_exporter.formats import format_of
from tensorrail_exporter.formats.contraction import ArrayT, LayerSpec, Step
from tensorrail_exporter.formats.modes import require_merge
from tensorrail_exporter.plans.costs import cheapest_merge
from tensorrail_runtime.errors import PlanError
from tensorrail_runtime.records import first_problem, write_text


class LayerPlan(BaseModel):
    """One layer's format, modes, ranks and the merge that runs. Modes and ranks are in the format's own order.

    The merge says which neighbouring cores are joined before they run; `auto` leaves the choice to the cost model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(min_length=1)
    format: str
    modes: tuple[int, ...] = Field(min_length=1, strict=False)
    ranks: tuple[int, ...] = Field(min_length=1, strict=False)
    merge: str = "auto"

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise `PlanError`, naming the layer, when the plan cannot hold for a weight of this shape."""
        try:
            form = format_of(self.format)
            form.validate(shape, self.modes, self.ranks)
            require_merge(self.merge, ("auto", *form.merges("conv" if len(shape) > 2 else "linear")), self.format)
        except PlanError as error:
            raise PlanError(f"layer {self.name}: {error}") from None

    def core_shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of the cores of a weight of this shape."""
        return format_of(self.format).core_shapes(shape, self.modes, self.ranks)

    def params(self, shape: tuple[int, ...]) -> int:
        """Return the number of values in the cores of a weight of this shape."""
        return sum(map(math.prod, self.core_shapes(shape)))

    def merge_for(self, spec: LayerSpec) -> str:
        """Return the merge that runs: the plan's own, or for `auto` the cheapest one."""
        if self.merge != "auto":
            return self.merge
        return cheapest_merge(self.format, self.modes, self.core_shapes(spec.shape), spec)

    def decompose(self, weight: ArrayT) -> list[ArrayT]:
        """Return the cores that the format finds for a weight (O, I, *K) or (O, I)."""
        return format_of(self.format).decompose(weight, self.modes, self.ranks)

    def reconstruct(self, cores: Sequence[ArrayT], shape: tuple[int, ...]) -> ArrayT:
        """Return the dense weight that the cores stand for."""
        return format_of(self.format).reconstruct(cores, shape, self.modes)

    def contraction(self, cores: Sequence[ArrayT], spec: LayerSpec) -> tuple[Step, ...]:
        """Return the steps that run in place of the dense layer, bias left out."""
        return format_of(self.format).contraction(cores, spec, self.modes, self.merge_for(spec))


class Plan(BaseModel):
    """The layers to factor, each named once; every other layer stays dense."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    layers: tuple[LayerPlan, ...] = Field(strict=False)

    @model_validator(mode="after")
    def _names_once(self) -> Plan:
        names = [layer.name for layer in self.layers]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"each layer may be planned once, but {twice[0]!r} appears {names.count(twice[0])} times")
        return self

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """Read `plan.json`; `PlanError` names the file and the key that is wrong."""
        try:
            plan = cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise PlanError(f"{path}: cannot be read ({error.strerror}): expected a plan.json") from None
        except ValidationError as error:
            raise PlanError(f"{path}: {first_problem(error)}") from None
        for layer in plan.layers:
            try:
                format_of(layer.format)
            except PlanError as error:
                raise PlanError(f"{path}: layer {layer.name}: {error}") from None
        return plan

    def save(self, path: Path | str) -> None:
        """Write `plan.json`."""
        write_text(path, self.model_dump_json(indent=1) + "\n")
