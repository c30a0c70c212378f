"""`recipe.yaml`: everything that a run depends on, checked before anything starts."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from torch import nn

from tensorrail_exporter.errors import PlanError
from tensorrail_exporter.formats import FORMATS
from tensorrail_exporter.plan import Plan
from tensorrail_runtime.records import first_problem, write_text
from tensorrail_trainer.admm import Metric
from tensorrail_trainer.data import CHANNELS_AND_CLASSES, DATASETS, Dataset
from tensorrail_trainer.layers import planned_layers
from tensorrail_trainer.models import MODELS
from tensorrail_trainer.moments import require_one_input
from tensorrail_trainer.planning import join, plan_layers


class RecipeError(ValueError):
    """A recipe that cannot be run; one line with the file, the key, what was expected and what to try."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


# YAML has lists where the record has tuples; the numbers in them stay strict.
_FROM_LIST = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Integers = Annotated[tuple[int, ...], _FROM_LIST]
Epochs = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Named(_Part):
    """A data set or model by its name, and the arguments it takes."""

    name: str
    args: dict[str, Any] = {}


class PlanRule(_Part):
    """Layers by a pattern of names, and what becomes of them."""

    layers: str
    format: str = "tt"
    ranks: int | Integers
    modes: Integers | None = None
    merge: str = "auto"


class Schedule(_Part):
    """One phase of SGD with momentum 0.9: the learning rate falls by a cosine from `lr` to 0 over the epochs."""

    epochs: Epochs
    lr: Positive
    weight_decay: float = Field(default=1e-4, ge=0)


class AdmmSchedule(Schedule):
    """The ADMM phase: `rho` is the penalty's weight, Z and U are updated every `every` epochs.

    `metric` says how far a weight is from low rank: by itself (`weight`), or by what it does to the layer's inputs
    (`activation`), which must be one mode then.
    """

    rho: Positive = 1e-3
    every: Epochs = 1
    metric: Metric = "weight"


class Training(_Part):
    """The phases and what they share."""

    batch: int = Field(default=128, ge=1)
    label_smoothing: Fraction = 0.1
    shift: int = Field(default=0, ge=0)
    dense: Schedule
    admm: AdmmSchedule
    finetune: Schedule
    control: Schedule | None = None  # default: as many epochs as admm and finetune together, at the ADMM phase's rate


class Bench(_Part):
    """Interleaved latency: batch sizes, seconds of measuring for each, and threads (0: ONNX Runtime's own choice)."""

    batches: Annotated[tuple[Annotated[int, Field(ge=1)], ...], _FROM_LIST] = (1, 32)
    seconds: Positive = 10.0
    threads: int = Field(default=0, ge=0)


class Targets(_Part):
    """What the run must show; it ends with exit code 1 when it falls short."""

    accuracy_drop: float = 0.5  # points below the dense control, at most
    params_ratio: Positive = 2.5
    numerical_error: Positive = 1e-4
    speedup: Positive = 1.3


class Recipe(_Part):
    """A whole run: data, model, plan, training, benchmark and targets."""

    version: Literal[1]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0)
    data: Named
    model: Named
    plan: Annotated[tuple[PlanRule, ...], _FROM_LIST, Field(min_length=1)]
    train: Training
    bench: Bench = Bench()
    targets: Targets = Targets()

    @classmethod
    def load(cls, path: Path | str) -> Recipe:
        """Read a recipe; `RecipeError` in one line for a file, key, type or rank that cannot be."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise RecipeError(f"{path}: cannot be read ({reason}): expected a YAML recipe") from None
        try:
            raw = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
        try:
            recipe = cls.model_validate(raw)
            recipe.make_plan(recipe.make_model(recipe.channels_and_classes()))
        except ValidationError as error:
            raise RecipeError(f"{path}: {first_problem(error)}") from None
        except (PlanError, RecipeError) as error:
            raise RecipeError(f"{path}: {error}") from None
        return recipe

    @property
    def control(self) -> Schedule:
        """The dense control: trained on from the baseline for as many epochs as ADMM and fine-tuning take."""
        if self.train.control is not None:
            return self.train.control
        admm, finetune = self.train.admm, self.train.finetune
        return Schedule(epochs=admm.epochs + finetune.epochs, lr=admm.lr, weight_decay=admm.weight_decay)

    def channels_and_classes(self) -> dict[str, int]:
        """Return what the data tell the model about its input and output."""
        _lookup(DATASETS, self.data, "data")
        channels, classes = CHANNELS_AND_CLASSES[self.data.name]
        return {"channels": channels, "classes": classes}

    def make_data(self) -> Dataset:
        """Return the data set, split by the recipe's seed."""
        data: Dataset = _make(DATASETS, self.data, "data", {"seed": self.seed})
        return data

    def make_model(self, known: dict[str, int]) -> nn.Module:
        """Return the dense model with fresh weights."""
        model: nn.Module = _make(MODELS, self.model, "model", known)
        return model

    def make_plan(self, model: nn.Module) -> Plan:
        """Return the plan of this model; `RecipeError` names the rule, or the layer, that does not fit."""
        plans = []
        for index, rule in enumerate(self.plan):
            if rule.format not in FORMATS:
                raise RecipeError(
                    f"plan.{index}.format: unknown format {rule.format!r}; expected one of {', '.join(sorted(FORMATS))}"
                )
            try:
                plans.append(
                    plan_layers(model, rule.layers, format=rule.format, ranks=rule.ranks, modes=rule.modes, merge=rule.merge)
                )
            except PlanError as error:
                raise RecipeError(f"plan.{index}: {error}") from None
        plan = join(plans)
        if self.train.admm.metric == "activation":
            try:
                require_one_input(plan, planned_layers(model, plan))
            except PlanError as error:
                raise RecipeError(f"train.admm.metric: {error}") from None
        return plan

    def save(self, path: Path) -> None:
        """Write the recipe, every default filled in."""
        write_text(path, yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False))


def _lookup(registry: dict[str, Any], named: Named, key: str) -> Any:
    """Return the factory of that name; `RecipeError` for an unknown name or argument."""
    factory = registry.get(named.name)
    if factory is None:
        raise RecipeError(f"{key}.name: unknown {key} {named.name!r}; expected one of {', '.join(sorted(registry))}")
    parameters = inspect.signature(factory).parameters
    for argument in named.args:
        if argument not in parameters:
            raise RecipeError(f"{key}.args.{argument}: unknown argument; {named.name} takes {', '.join(parameters)}")
    return factory


def _make(registry: dict[str, Any], named: Named, key: str, known: dict[str, int]) -> Any:
    factory = _lookup(registry, named, key)
    parameters = inspect.signature(factory).parameters
    given = {name: value for name, value in known.items() if name in parameters} | named.args
    try:
        inspect.signature(factory).bind(**given)
        return factory(**given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecipeError(f"{key}.args: {named.name} cannot be made with {given}: {error}") from None
