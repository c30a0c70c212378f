"""The plan says which layers are factorized, and how. It is a small record, stored as the readable file `plan.json`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tensorrail_exporter.formats import format_of
from tensorrail_exporter.formats.contraction import ArrayT, LayerSpec, Step
from tensorrail_exporter.formats.modes import require_merge
from tensorrail_exporter.plans.costs import cheapest_merge
from tensorrail_runtime.errors import PlanError
from tensorrail_runtime.records import first_problem, write_text

Precision = Literal["fp32", "fp16", "int8"]
"""The precision that a network is planned in."""


class LayerPlan(BaseModel):
    """How one layer is factorized.

    Attributes:
        name: name of the layer: of its weight, without `.weight`, or of its node.
        format: key of `FORMATS`.
        modes: modes in the order of the format, see its module; for a convolution in groups those of one group's weight.
        ranks: ranks in the order of the format. Larger ones than exist are lowered.
        merge: which neighbouring cores are merged before they run; default `auto`, the cheapest by the cost model.

    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(min_length=1)
    format: str
    modes: tuple[int, ...] = Field(min_length=1, strict=False)
    ranks: tuple[int, ...] = Field(min_length=1, strict=False)
    merge: str = "auto"

    def check(self, shape: tuple[int, ...], groups: int = 1) -> None:
        """Raise `PlanError`, with the name of the layer, if the plan does not fit a weight of this shape in these groups."""
        try:
            form = format_of(self.format, groups)
            form.validate(shape, self.modes, self.ranks)
            what = self.format if groups == 1 else f"{self.format} of a convolution in {groups} groups"
            require_merge(self.merge, ("auto", *form.merges("conv" if len(shape) > 2 else "linear")), what)
        except PlanError as error:
            raise PlanError(f"layer {self.name}: {error}") from None

    def check_layer(self, spec: LayerSpec) -> None:
        """Raise `PlanError`, with the name of the layer, if the plan does not fit this layer or its cores cannot run it."""
        self.check(spec.shape, spec.groups)
        if spec.op != "conv":
            cores = [np.broadcast_to(np.float32(0), size) for size in self.core_shapes(spec.shape)]
            try:
                self.contraction(cores, spec)
            except PlanError as error:
                raise PlanError(f"layer {self.name}: {error}") from None

    def core_shapes(self, shape: tuple[int, ...], groups: int = 1) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of the cores of a weight of this shape; with several groups they begin with their number."""
        return format_of(self.format, groups).core_shapes(shape, self.modes, self.ranks)

    def params(self, shape: tuple[int, ...], groups: int = 1) -> int:
        """Return the number of values in the cores of a weight of this shape."""
        return sum(map(math.prod, self.core_shapes(shape, groups)))

    def merge_for(self, spec: LayerSpec) -> str:
        """Return the merge to run: that of the plan, or for `auto` the one with the lowest estimated time."""
        if self.merge != "auto":
            return self.merge
        return cheapest_merge(self.format, self.modes, self.core_shapes(spec.shape, spec.groups), spec)

    def decompose(self, weight: ArrayT, groups: int = 1) -> list[ArrayT]:
        """Return the cores of a weight (O, I, *K) or (O, I), of NumPy or torch; I is that of one group."""
        return format_of(self.format, groups).decompose(weight, self.modes, self.ranks)

    def reconstruct(self, cores: Sequence[ArrayT], shape: tuple[int, ...], groups: int = 1) -> ArrayT:
        """Return the dense weight of this shape that the cores represent."""
        return format_of(self.format, groups).reconstruct(cores, shape, self.modes)

    def contraction(self, cores: Sequence[ArrayT], spec: LayerSpec) -> tuple[Step, ...]:
        """Return the steps that replace the dense layer, without its bias."""
        return format_of(self.format, spec.groups).contraction(cores, spec, self.modes, self.merge_for(spec))


class HeadPlan(BaseModel):
    """How many values the heads of an attention have between two of its layers.

    Attributes:
        weights: the names of query and key, or of value and output: those of their weights, without `.weight`. Where one
            product gives queries, keys and values, its name stands for each of them.
        size: the number of values of each head.

    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    weights: Annotated[tuple[str, str], Field(strict=False)]
    size: int = Field(ge=1)


class Plan(BaseModel):
    """The layers to factorize; every other layer stays dense.

    Attributes:
        version: version of the file format.
        layers: one plan per layer; no name may appear twice.
        precision: the precision in which the network was timed, and in which `compress` writes it; `fp32` in files of older
            versions. What is not factorized is in it as well; inputs and outputs of the network stay fp32.
        joint: layers of an ONNX graph that read the same input and become one layer, which has the name `joint_name` and may
            be planned in turn; by the names of their weights. None in files of older versions.
        heads: pairs of layers of an ONNX graph between which the heads of an attention get fewer values, before layers are
            joined or factorized. None in files of older versions.
        inner_shapes: whether the file of an ONNX graph states the shapes of inner tensors; `False` where the graph was measured
            to be faster without them.
        fp32: layers, weights or nodes of the network with its cores that stay in fp32 where `precision` is another one: those
            that `compress` found to lose too much or to overflow in it, or to be faster in fp32. Empty: `compress` looks for
            them.

    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    layers: tuple[LayerPlan, ...] = Field(strict=False)
    precision: Precision = "fp32"
    joint: tuple[Annotated[tuple[str, ...], Field(min_length=2, strict=False)], ...] = Field(default=(), strict=False)
    heads: tuple[HeadPlan, ...] = Field(default=(), strict=False)
    inner_shapes: bool = True
    fp32: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), strict=False)

    @property
    def changes(self) -> bool:
        """Whether the plan changes a graph in fp32."""
        return bool(self.layers or self.joint or self.heads or not self.inner_shapes)

    @property
    def head_sizes(self) -> dict[tuple[str, str], int]:
        """The number of values of each head, by the names of the pair."""
        return {pair.weights: pair.size for pair in self.heads}

    @property
    def without_heads(self) -> Plan:
        """The plan for a graph in which heads have their sizes already."""
        return self.model_copy(update={"heads": ()})

    @property
    def of_layers(self) -> Plan:
        """The plan for a graph in which heads have their sizes and layers are joined already."""
        return self.model_copy(update={"joint": (), "heads": ()})

    @model_validator(mode="after")
    def _names_once(self) -> Plan:
        names = [layer.name for layer in self.layers]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"each layer may be planned once, but {repeated[0]!r} appears {names.count(repeated[0])} times")
        pairs = [pair.weights for pair in self.heads]
        again = sorted({pair for pair in pairs if pairs.count(pair) > 1})
        if again:
            raise ValueError(
                f"each pair may have one head size, but {' and '.join(again[0])} appear {pairs.count(again[0])} times"
            )
        parts = [part for group in self.joint for part in group]
        twice = sorted({part for part in parts if parts.count(part) > 1})
        if twice:
            raise ValueError(
                f"each layer may be joined with others once, but {twice[0]!r} appears {parts.count(twice[0])} times"
            )
        return self

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """Read a plan from a JSON file.

        Raises:
            PlanError: the file cannot be read, or a key or value is wrong; the message names both.

        """
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
        """Write the plan to a JSON file."""
        # What older versions do not know is written only where it says something.
        newer = ("precision", "joint", "heads", "inner_shapes", "fp32")
        unsaid = {name for name in newer if getattr(self, name) == type(self).model_fields[name].default}
        write_text(path, self.model_dump_json(indent=1, exclude=unsaid) + "\n")
