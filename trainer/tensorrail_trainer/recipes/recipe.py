"""`recipe.yaml`: everything that a run depends on, checked before anything starts."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import Discriminator, Field, Tag, ValidationError, model_validator
from torch import nn

from tensorrail_exporter.plans.plan import LayerPlan, Plan
from tensorrail_runtime.errors import DataError, NetworkError, PlanError, RecipeError, WeightsError
from tensorrail_runtime.records import first_problem, write_text
from tensorrail_trainer.admm.moments import require_one_input
from tensorrail_trainer.data import Dataset, Source, source_of
from tensorrail_trainer.layers.dense import planned_layers
from tensorrail_trainer.networks.registry import model_of
from tensorrail_trainer.networks.weights import load_weights
from tensorrail_trainer.planning.published import published_plan
from tensorrail_trainer.planning.ranks import join, plan_layers, plan_to_size
from tensorrail_trainer.recipes.schedules import FROM_LIST, Count, Named, NamedModel, Part, Positive, Schedule, Training

Integers = Annotated[tuple[int, ...], FROM_LIST]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 2e-2 as text, for it has no point; here it is the number that YAML 1.2 takes it for.

    A key that comes twice is refused, as YAML asks, where PyYAML takes the last.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    "while reading a mapping", node.start_mark, f"found the key {key.value!r} twice", key.start_mark
                )
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: a text that it would take for such a number has quotes."""


for _one in (_Loader, _Dumper):
    _one.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


class PlanRule(Part):
    """Layers by a pattern of names, and what becomes of them.

    Their ranks are given, or chosen from the dense network's trained weights: with `params: 2.3` those that make the whole
    network's parameters 2.3 times fewer at the least truncation error, one choice over all layers of the pattern.
    """

    layers: str
    format: str = "tt"
    ranks: int | Integers | None = None
    params: Annotated[float, Field(gt=1)] | None = None
    modes: Integers | None = None
    merge: str = "auto"

    @model_validator(mode="after")
    def _one_way(self) -> PlanRule:
        if (self.ranks is None) == (self.params is None):
            raise ValueError("expected exactly one of ranks and params")
        return self


class PublishedRule(Part):
    """The ranks published for a network (Yin et al., CVPR 2021), its 3×3 convolutions in three or five modes.

    `only_3x3` leaves the 1×1 convolutions of the table dense.
    """

    published: str
    modes: int = 3
    only_3x3: bool = False


class FileRule(Part):
    """The layers of a `plan.json`, as `tensorrail plan` writes it: ranks chosen by measured time."""

    file: str


def _kind(rule: Any) -> str:
    if isinstance(rule, PublishedRule) or (isinstance(rule, dict) and "published" in rule):
        return "published"
    return "file" if isinstance(rule, FileRule) or (isinstance(rule, dict) and "file" in rule) else "rule"


# Told apart by their keys, so that a mistake in one is not reported as a lack in the other.
Rule = Annotated[
    Annotated[PlanRule, Tag("rule")] | Annotated[PublishedRule, Tag("published")] | Annotated[FileRule, Tag("file")],
    Discriminator(_kind),
]


class Export(Part):
    """In which form the cores run: ranks widened by zeros to multiples of a block, or, with `auto`, of the one that is fastest
    here, layer by layer; with `dense_if_slower` a layer that no form of its cores makes faster has their dense weight. Both
    are timed at this batch size and leave every output as it is.
    """

    block: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    dense_if_slower: bool = False
    batch: Count = 1


class Bench(Part):
    """Interleaved latency: batch sizes, seconds of measuring for each, in so many fresh processes, and threads.

    0 threads are ONNX Runtime's own choice. The interval of one process says nothing of what processes differ by.
    """

    batches: Annotated[tuple[Count, ...], FROM_LIST] = (1, 32)
    seconds: Positive = 10.0
    processes: int = Field(default=5, ge=1)
    threads: int = Field(default=0, ge=0)


class Targets(Part):
    """What the run must show; it ends with exit code 1 when it falls short."""

    accuracy_drop: float = 0.5  # points below the dense control, at most
    params_ratio: Positive = 2.5
    numerical_error: Positive = 1e-4
    speedup: Positive = 1.3


class Recipe(Part):
    """A whole run: data, model, plan, training, benchmark and targets.

    Data and models are named as in `tensorrail_trainer.data.DATASETS` and `tensorrail_trainer.networks.registry.MODELS`,
    or are a user's own as `module:factory`.
    """

    version: Literal[1]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0, lt=2**63)
    data: Named
    model: NamedModel
    plan: Annotated[tuple[Rule, ...], FROM_LIST, Field(min_length=1)]
    train: Training
    export: Export = Export()
    bench: Bench = Bench()
    targets: Targets = Targets()

    @model_validator(mode="after")
    def _taught(self) -> Recipe:
        distill = self.train.distill
        if distill is not None and distill.teacher is None and self.train.dense is None and self.model.weights is None:
            raise ValueError(
                "train.distill: expected a trained network to learn from, found none; set train.distill.teacher, model.weights "
                "or train.dense"
            )
        if isinstance(self.train.control, Schedule) and self.train.dense is None and self.model.weights is None:
            raise ValueError(
                "train.control: expected a trained dense network to start from, found none; set model.weights or train.dense"
            )
        return self

    @classmethod
    def load(cls, path: Path | str) -> Recipe:
        """Read a recipe; `RecipeError` in one line for a file, key, type or rank that cannot be."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise RecipeError(f"{path}: cannot be read ({reason}); expected a YAML recipe") from None
        try:
            raw = yaml.load(text, _Loader)  # noqa: S506 - a safe one
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not a valid date
            raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
        try:
            recipe = cls.model_validate(raw)
            recipe._look_in(Path(path).resolve().parent)
            recipe.make_plan(recipe.make_model(trained=False), trained=False)
            recipe.make_teacher(trained=False)
        except ValidationError as error:
            raise RecipeError(f"{path}: {first_problem(error)}") from None
        except (PlanError, RecipeError, DataError, WeightsError) as error:
            raise RecipeError(f"{path}: {error}") from None
        return recipe

    def _look_in(self, folder: Path) -> None:
        """Let functions that the recipe names be found beside it, behind wherever else modules are."""
        distill = self.train.distill
        named = (self.data, self.model, None if distill is None else distill.teacher)
        if any(one is not None and ":" in one.name for one in named) and str(folder) not in sys.path:
            sys.path.append(str(folder))

    def make_data(self) -> Dataset:
        """Return the data set; one that is split by chance is split by the recipe's seed."""
        make = self._source().make
        data: Dataset = _call(make, make, self.data, "data", {"seed": self.seed})
        return data

    def make_model(self, *, trained: bool = True) -> nn.Module:
        """Return the dense model with fresh weights that the seed decides, or with those of the file that the recipe names."""
        return self._made(self.model, "model", trained)

    def make_teacher(self, *, trained: bool = True) -> nn.Module | None:
        """Return the network that `train.distill` names as a teacher, or None where it names none."""
        named = None if self.train.distill is None else self.train.distill.teacher
        if named is None:
            return None
        if named.weights is None:
            raise RecipeError("train.distill.teacher.weights: expected the path of a file of trained weights, got none")
        return self._made(named, "train.distill.teacher", trained)

    def _made(self, named: NamedModel, key: str, trained: bool) -> nn.Module:
        source = self._source()
        known = dict(_call(source.known, source.make, self.data, "data", {}))
        try:
            make = model_of(named.name)
        except NetworkError as error:
            raise RecipeError(f"{key}.name: {error}") from None
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = _call(make, make, named, key, known)
        if not isinstance(model, nn.Module):
            raise RecipeError(f"{key}.name: expected {named.name} to return a torch.nn.Module, got {type(model).__name__}")
        if trained and named.weights is not None:
            load_weights(model, Path(named.weights))
        return model

    def _source(self) -> Source:
        try:
            return source_of(self.data.name)
        except DataError as error:
            raise RecipeError(f"data.name: {error}") from None

    def make_plan(self, model: nn.Module, *, trained: bool = True) -> Plan:
        """Return the plan of this model; `RecipeError` names the rule, or the layer, that does not fit.

        With `trained=False` the weights are fresh and ranks that would follow from them are not looked for.
        """
        plans = []
        for index, rule in enumerate(self.plan):
            try:
                plans.append(_planned(model, rule, trained))
            except PlanError as error:
                raise RecipeError(f"plan.{index}: {error}") from None
        plan = join(plans)
        if not plan.layers:
            raise RecipeError("plan: expected at least one layer to factor, got none; add a rule that matches a layer")
        if self.train.admm is not None and self.train.admm.metric == "activation":
            try:
                require_one_input(plan, planned_layers(model, plan))
            except PlanError as error:
                raise RecipeError(f"train.admm.metric: {error}") from None
        return plan

    def files(self) -> list[tuple[str, str]]:
        """Return the keys and names of the files that the run starts from."""
        distill = self.train.distill
        teacher = None if distill is None or distill.teacher is None else distill.teacher.weights
        named = [("model.weights", self.model.weights), ("train.distill.teacher.weights", teacher)]
        plans = [(f"plan.{index}.file", rule.file) for index, rule in enumerate(self.plan) if isinstance(rule, FileRule)]
        return [(key, name) for key, name in (*named, *plans) if name is not None]

    def save(self, path: Path) -> None:
        """Write the recipe, every default filled in."""
        write_text(path, yaml.dump(self.model_dump(mode="json", exclude_none=True), Dumper=_Dumper, sort_keys=False))


def _planned(model: nn.Module, rule: PlanRule | PublishedRule | FileRule, trained: bool) -> tuple[LayerPlan, ...]:
    if isinstance(rule, FileRule):
        plan = Plan.load(rule.file)
        planned_layers(model, plan)
        return plan.layers
    if isinstance(rule, PublishedRule):
        layers = published_plan(rule.published, rule.modes).layers
        found = tuple(layer for layer in layers if not rule.only_3x3 or 9 in layer.modes)
        planned_layers(model, Plan(layers=found))
        return found
    if rule.params is not None:
        return plan_to_size(
            model, rule.layers, rule.params, format=rule.format, modes=rule.modes, merge=rule.merge, trained=trained
        )
    ranks = rule.ranks if rule.ranks is not None else ()
    return plan_layers(model, rule.layers, format=rule.format, ranks=ranks, modes=rule.modes, merge=rule.merge)


def _call(function: Any, factory: Any, named: Named, key: str, known: Mapping[str, Any]) -> Any:
    """Return what a function makes of the arguments that its factory takes; `RecipeError` for one that it does not take."""
    parameters = inspect.signature(factory).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for argument in named.args:
        if argument not in parameters and not anything:
            raise RecipeError(f"{key}.args.{argument}: unknown argument; {named.name} takes {', '.join(parameters) or 'none'}")
    given = {name: value for name, value in known.items() if name in parameters} | named.args
    try:
        inspect.signature(function).bind(**given)
        return function(**given)
    except (DataError, RecipeError):
        raise
    except Exception as error:
        if ":" in named.name and not isinstance(error, TypeError | ValueError | RuntimeError):
            raise  # of somebody's own function, who wants to see where
        what = str(error) or type(error).__name__
        raise RecipeError(f"{key}.args: {named.name} cannot be created with {given}: {what}") from None
