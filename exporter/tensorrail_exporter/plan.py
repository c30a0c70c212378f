"""The plan: which layers become which cores. One small record, also a file that a person can read (`plan.json`)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tensorrail_exporter.errors import PlanError
from tensorrail_exporter.formats import format_of
from tensorrail_runtime.records import first_problem, write_text


class LayerPlan(BaseModel):
    """One layer's format, modes, ranks and the merge that runs. Modes and ranks are in the format's own order."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(min_length=1)
    format: str
    modes: tuple[int, ...] = Field(min_length=1, strict=False)
    ranks: tuple[int, ...] = Field(min_length=1, strict=False)
    merge: str = "sides"

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise `PlanError`, naming the layer, when the plan cannot hold for a weight of this shape."""
        try:
            form = format_of(self.format)
            form.validate(shape, self.modes, self.ranks)
            _require_merge(self.merge, self.format, form.MERGES)
        except PlanError as error:
            raise PlanError(f"layer {self.name}: {error}") from None

    def params(self, shape: tuple[int, ...]) -> int:
        """Return the number of values in the cores of a weight of this shape."""
        return sum(map(math.prod, format_of(self.format).core_shapes(shape, self.modes, self.ranks)))


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
            raise ValueError(f"each layer may be planned once, and {twice[0]!r} is there {names.count(twice[0])} times")
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


def _require_merge(merge: str, name: str, merges: tuple[str, ...]) -> None:
    if merge not in merges:
        raise PlanError(f"unknown merge {merge!r} for format {name}: expected {' or '.join(merges)}")
