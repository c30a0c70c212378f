"""The recipe of a run, `recipe.yaml`: everything that the run depends on, checked before training starts."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import torch
import yaml
from pydantic import Discriminator, Field, Tag, ValidationError, model_validator
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tensorrail_exporter.plans.plan import LayerPlan, Plan
from tensorrail_runtime.errors import OWN_CODE, DataError, NetworkError, PlanError, RecipeError, WeightsError, in_words
from tensorrail_runtime.records import first_problem, write_text
from tensorrail_trainer.admm.admm import Metric
from tensorrail_trainer.admm.moments import input_roots, require_one_input
from tensorrail_trainer.data import Dataset, Source, source_of
from tensorrail_trainer.data.loading import used_gpus
from tensorrail_trainer.data.splits import EVALUATED, Share
from tensorrail_trainer.layers.dense import dense_layer, planned_layers
from tensorrail_trainer.layers.metric import Root
from tensorrail_trainer.networks.registry import model_of
from tensorrail_trainer.networks.weights import load_weights
from tensorrail_trainer.planning.options import AUTO
from tensorrail_trainer.planning.published import published_plan
from tensorrail_trainer.planning.ranks import any_plan_to_size, join, plan_by_metric, plan_layers, unranked
from tensorrail_trainer.processes import rank, world
from tensorrail_trainer.recipes.schedules import FROM_LIST, Count, Named, NamedModel, Part, Positive, Schedule, Training

_MEASURED = 4096  # training samples on which the second moments of the layers' inputs are measured
Integers = Annotated[tuple[int, ...], FROM_LIST]


class _Loader(yaml.SafeLoader):
    """Reads YAML with two corrections of PyYAML.

    2e-2, without a decimal point, is a number as in YAML 1.2; PyYAML reads it as text. A duplicate key is an error, as the YAML
    standard requires; PyYAML uses the last one.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node. PyYAML refuses nodes that are no mapping, and keys that are lists or mappings."""
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        seen: set[str] = set()
        for key in (key for key, _ in pairs if isinstance(key, yaml.ScalarNode)):
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    "while reading a mapping", node.start_mark, f"found the key {key.value!r} twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node. Raises `ConstructorError` for text that does not fit its tag, such as 2020-13-45."""
        try:
            return super().construct_object(node, deep)
        except (AttributeError, LookupError, ValueError):  # PyYAML's, for a wrong !!timestamp, !!bool and date
            problem = f"{node.value!r:.80} is not a valid {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: text that looks like such a number is quoted."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


class PlanRule(Part):
    """A rule of the plan: layers by a pattern of names, and the format, modes and ranks to factor them with.

    The ranks are given by `ranks`, or chosen from the trained weights: `params: 2.3` chooses those that make the whole network
    2.3× smaller with the least truncation error, over all layers of the pattern at once. The error is that of the weights
    (`metric: weight`), or that of the layers' outputs on training samples (`activation`, which needs formats with one input
    mode). Default: `activation` for trained weights if it can be measured for every layer of the pattern, else `weight`.
    With `format: auto` (default) each layer gets `tt` or a split of `svd`, whichever loses less; with `ranks` or `modes` it is
    `tt`.
    """

    layers: str
    format: str = AUTO
    ranks: int | Integers | None = None
    params: Annotated[float, Field(gt=1)] | None = None
    modes: Integers | None = None
    merge: str = "auto"
    metric: Metric | None = None

    @model_validator(mode="after")
    def _one_way(self) -> PlanRule:
        if (self.ranks is None) == (self.params is None):
            raise ValueError("expected exactly one of ranks and params")
        if self.metric == "activation" and self.params is None:
            raise ValueError("expected metric: activation together with params, since given ranks are not chosen by a metric")
        if self.merge != "auto" and self.format == AUTO and self.params is not None:
            raise ValueError("expected merge together with a format: format: auto chooses among formats that merge differently")
        return self


class PublishedRule(Part):
    """A rule of the plan: the ranks published for a network (Yin et al., CVPR 2021), with three or five modes.

    `only_3x3: true` keeps the 1×1 convolutions of the table dense.
    """

    published: str
    modes: int = 3
    only_3x3: bool = False


class FileRule(Part):
    """A rule of the plan: the layers of a `plan.json`, such as `tensorrail plan` writes, with ranks chosen by measured time."""

    file: str


def _kind(rule: Any) -> str:
    if isinstance(rule, PublishedRule) or (isinstance(rule, dict) and "published" in rule):
        return "published"
    return "file" if isinstance(rule, FileRule) or (isinstance(rule, dict) and "file" in rule) else "rule"


AnyRule: TypeAlias = PlanRule | PublishedRule | FileRule

# Distinguished by their keys, so that a mistake in one kind of rule is not reported as a missing key of another kind.
Rule = Annotated[
    Annotated[PlanRule, Tag("rule")] | Annotated[PublishedRule, Tag("published")] | Annotated[FileRule, Tag("file")],
    Discriminator(_kind),
]


class Export(Part):
    """The form in which the cores run. It does not change any output.

    `block` pads the ranks with zeros to multiples of it; `auto` chooses the fastest multiple for each layer on this machine.
    `dense_if_slower` exports the reconstructed dense weight for a layer that is 2 % slower in each form of its cores. Both are
    timed at the batch size `batch`.
    """

    block: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    dense_if_slower: bool = False
    batch: Count = 1

    @model_validator(mode="after")
    def _timed(self) -> Export:
        if self.batch != 1 and self.block != "auto" and not self.dense_if_slower:
            raise ValueError("expected batch together with block: auto or dense_if_slower, which time layers at that batch")
        return self


class Bench(Part):
    """The benchmark: interleaved latency at each batch size, for `seconds` each, in `processes` fresh processes.

    `threads: 0` leaves the number of threads to ONNX Runtime. With one process, the confidence interval does not include the
    differences between processes.
    """

    batches: Annotated[tuple[Count, ...], FROM_LIST, Field(min_length=1)] = (1, 32)
    seconds: Positive = 10.0
    processes: int = Field(default=5, ge=1)
    threads: int = Field(default=0, ge=0)


class Targets(Part):
    """The targets of the run; the run ends with exit code 1 if one of them is missed."""

    accuracy_drop: float = 0.5  # at most, in percentage points below the dense control
    params_ratio: Positive = 2.5
    numerical_error: Positive = 1e-4
    speedup: Positive = 1.3


class Recipe(Part):
    """A whole run: data, model, plan, training, export, benchmark and targets.

    Read one with `Recipe.load`. Data sets are named as in `tensorrail_trainer.data.DATASETS`, models as in
    `tensorrail_trainer.networks.registry.MODELS`; both can also be your own functions, as `module:function`.

    Attributes:
        version: the version of the file format, 1.
        name: the name of the run and its folder.
        seed: the seed of all random choices; default 0.
        data: the data set and its arguments.
        model: the model, its arguments, and optionally a file of trained weights.
        plan: one or more rules that select layers and their ranks; later rules override earlier ones.
        train: the phases of the training.
        export: the form in which the cores run.
        bench: the benchmark.
        targets: the targets of the run.

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
        """Read and check a recipe. Nothing is trained, and no data set is read.

        Args:
            path: the YAML file. Modules that it names as `module:function` are also searched in its folder.

        Returns:
            The recipe, with all defaults filled in.

        Raises:
            RecipeError: the file cannot be read, or a key, type, name or rank is wrong; one line with the key.

        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise RecipeError(f"{path}: cannot be read ({reason}); expected a YAML recipe") from None
        try:
            raw = yaml.load(text, _Loader)  # noqa: S506 - a safe one
        except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # such as "\UFFFFFFFF"
            raise RecipeError(f"{path}: not valid YAML: {_yaml_problem(error)}") from None
        try:
            recipe = cls.model_validate(raw)
            recipe._add_import_path(Path(path).resolve().parent)
            recipe.make_plan(recipe.make_model(trained=False), trained=False)
            recipe.make_teacher(trained=False)
        except ValidationError as error:
            raise RecipeError(f"{path}: {first_problem(error)}") from None
        except (PlanError, RecipeError, DataError, WeightsError) as error:
            raise RecipeError(f"{path}: {error}") from None
        return recipe

    def _add_import_path(self, folder: Path) -> None:
        """Add the folder of the recipe to the end of `sys.path` if the recipe names a function of a module."""
        distill = self.train.distill
        named = (self.data, self.model, None if distill is None else distill.teacher)
        if any(entry is not None and ":" in entry.name for entry in named) and str(folder) not in sys.path:
            sys.path.append(str(folder))

    def make_data(self) -> Dataset:
        """Read and return the data set. A random split uses the seed of the recipe."""
        make = self._source().make
        data: Dataset = _call(make, make, self.data, "data", {"seed": self.seed})
        return data

    def make_model(self, *, trained: bool = True) -> nn.Module:
        """Return the dense model.

        Args:
            trained: load the weights file that the recipe names, if any; default True. Otherwise, and without such a file, the
                weights are random and depend only on the seed.

        Returns:
            The model, on the CPU.

        Raises:
            RecipeError: the model cannot be created.
            WeightsError: the weights file cannot be read or does not fit.

        """
        return self._create(self.model, "model", trained)

    def make_teacher(self, *, trained: bool = True) -> nn.Module | None:
        """Return the teacher that `train.distill` names, or None if it names none. `trained` is as for `make_model`."""
        named = None if self.train.distill is None else self.train.distill.teacher
        if named is None:
            return None
        if named.weights is None:
            raise RecipeError("train.distill.teacher.weights: expected the path of a file of trained weights, got none")
        return self._create(named, "train.distill.teacher", trained)

    def _create(self, named: NamedModel, key: str, trained: bool) -> nn.Module:
        source = self._source()
        known = dict(_call(source.known, source.make, self.data, "data", {}))
        try:
            make = model_of(named.name)
        except NetworkError as error:
            raise RecipeError(f"{key}.name: {error}") from None
        with torch.random.fork_rng(devices=used_gpus()):
            torch.manual_seed(self.seed)
            model = _call(make, make, named, key, known)
        if not isinstance(model, nn.Module):
            raise RecipeError(f"{key}.name: expected {named.name} to return a torch.nn.Module, got {type(model).__name__}")
        lazy = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if is_lazy(value)]
        if lazy:
            raise RecipeError(
                f"{key}.name: the size of {lazy[0]} is not known yet: give the sizes of lazy layers, or run one sample through "
                "the network in the function that makes it"
            )
        if trained and named.weights is not None:
            load_weights(model, Path(named.weights))
        return model

    def _source(self) -> Source:
        try:
            return source_of(self.data.name)
        except DataError as error:
            raise RecipeError(f"data.name: {error}") from None

    def make_plan(
        self,
        model: nn.Module,
        *,
        trained: bool = True,
        inputs: Callable[[], Iterable[Tensor]] | None = None,
        note: Callable[[str], None] = lambda _: None,
    ) -> Plan:
        """Return the plan for a model.

        Args:
            model: the dense model.
            trained: False if the weights are random: ranks that depend on them are then not computed; default True.
            inputs: returns batches of training samples on the model's device, by which ranks are chosen; default: read from
                the recipe's data set.
            note: is told why ranks are chosen by the weights where the inputs of the layers cannot be measured, and what of
                a plan's file has no effect.

        Returns:
            The plan.

        Raises:
            RecipeError: a rule does not fit the model; the message names the rule and the layer.

        """
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        measured = inputs or partial(self.measured_inputs, device=device)
        plan = self._joined(lambda rule: _planned(model, rule, trained, self._learned, measured, note))
        for rule in self.plan:
            if isinstance(rule, FileRule) and (ignored := _without_effect(Plan.load(rule.file))):
                note(f"{rule.file}: {ignored} has no effect here: a recipe trains and exports in fp32")
        if not plan.layers:
            raise RecipeError("plan: expected at least one layer to factor, got none; add a rule that matches a layer")
        self._require_measurable(model, plan if trained else self.plannable(model))
        return plan

    def plannable(self, model: nn.Module) -> Plan:
        """Return a plan of every layer that the plan of the trained model may have, its ranks 1 where they are chosen later."""
        return self._joined(lambda rule: _plannable(model, rule))

    def roots_of_ranks(self, model: nn.Module, inputs: Callable[[], Iterable[Tensor]]) -> dict[str, Root]:
        """Return the metric in which all ranks are chosen, if it is that of the layers' inputs; empty if any are not.

        Args:
            model: the trained dense network.
            inputs: as for `make_plan`.

        """
        if not (self._learned and all(_may_measure(rule) for rule in self.plan)):
            return {}
        try:
            return input_roots(model, self.plannable(model), inputs())
        except PlanError:
            return {}

    @property
    def _learned(self) -> bool:
        """Whether the weights are trained before they are cut."""
        return self.train.dense is not None or self.model.weights is not None

    def measured(self, model: nn.Module) -> Plan:
        """Return a plan of the layers whose inputs must be measured, as the recipe asks for; without layers if there are none.

        Layers that are measured only if they can be, as by default, are not among them.
        """
        admm = self.train.admm
        if "activation" in (self.train.cut, None if admm is None else admm.metric):
            return self.plannable(model)
        asked = (rule for rule in self.plan if isinstance(rule, PlanRule) and rule.metric == "activation")
        return join([_plannable(model, rule) for rule in asked])

    def _joined(self, planned: Callable[[AnyRule], tuple[LayerPlan, ...]]) -> Plan:
        """Return the joined plan of all rules; raises `RecipeError` with the number of the rule that does not fit."""
        plans = []
        for index, rule in enumerate(self.plan):
            try:
                plans.append(planned(rule))
            except PlanError as error:
                raise RecipeError(f"plan.{index}: {error}") from None
        return join(plans)

    def _require_measurable(self, model: nn.Module, plan: Plan) -> None:
        """Raise `RecipeError` for a layer whose inputs the metric of a phase cannot measure."""
        admm = self.train.admm
        for key, metric in (("admm.metric", admm and admm.metric), ("cut", self.train.cut)):
            if metric == "activation":
                try:
                    require_one_input(plan, {layer.name: dense_layer(model, layer.name) for layer in plan.layers}, model)
                except PlanError as error:
                    raise RecipeError(f"train.{key}: {error}") from None

    def measured_inputs(self, data: Dataset | None = None, device: torch.device | None = None) -> Iterator[Tensor]:
        """Yield batches of training samples, without augmentation, on which the metric of the layers' inputs is measured.

        With several processes, each of them gets its share of every batch.

        Args:
            data: the data set; default: the recipe's, read now.
            device: where the batches are; default: where the data set puts them.

        """
        split = (data or self.make_data()).train
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(self.seed))[:_MEASURED]
        for x, _ in split.batches(list(order.split(EVALUATED)), Share(rank(), world())):
            if len(x):  # the last batch may have fewer samples than there are processes
                yield x if device is None else x.to(device)

    def files(self) -> list[tuple[str, str]]:
        """Return (key, path) of the files that the recipe names: weights and plans."""
        distill = self.train.distill
        teacher = None if distill is None or distill.teacher is None else distill.teacher.weights
        named = [("model.weights", self.model.weights), ("train.distill.teacher.weights", teacher)]
        plans = [(f"plan.{index}.file", rule.file) for index, rule in enumerate(self.plan) if isinstance(rule, FileRule)]
        return [(key, name) for key, name in (*named, *plans) if name is not None]

    def save(self, path: Path) -> None:
        """Write the recipe as YAML, with all defaults filled in."""
        write_text(path, yaml.dump(self.model_dump(mode="json", exclude_none=True), Dumper=_Dumper, sort_keys=False))


def _yaml_problem(error: Exception) -> str:
    """Return what is wrong with a YAML file in one line, with the line and column where it is known."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem and mark:
        return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
    return " ".join(str(error).split())


def _planned(
    model: nn.Module,
    rule: AnyRule,
    trained: bool,
    learned: bool,
    inputs: Callable[[], Iterable[Tensor]],
    note: Callable[[str], None],
) -> tuple[LayerPlan, ...]:
    """Return the layers of a rule with their ranks: any ranks of the right size if the model is not trained.

    `learned` says whether the weights are trained before they are cut; otherwise the inputs of the layers tell nothing.
    """
    if not isinstance(rule, PlanRule) or rule.params is None:
        return _plannable(model, rule)
    every = Plan(layers=_plannable(model, rule))
    layers = planned_layers(model, every)
    if rule.metric == "activation":
        require_one_input(every, layers, model)
    if not trained:
        return any_plan_to_size(model, rule.layers, rule.params, format=rule.format, modes=rule.modes, merge=rule.merge)
    roots: Mapping[str, Root] = {}
    if rule.metric == "activation" or (rule.metric is None and learned):
        try:
            roots = input_roots(model, every, inputs())
        except PlanError as error:
            if rule.metric == "activation":
                raise
            note(f"ranks of {rule.layers!r} are chosen by the weights, not by the outputs of the layers: {error}")
    return plan_by_metric(model, rule.layers, rule.params, roots, format=rule.format, modes=rule.modes, merge=rule.merge)


def _without_effect(plan: Plan) -> str:
    """Return what of a plan a recipe does not carry out, in words; empty if there is nothing."""
    if plan.precision != "fp32":
        return f"the precision {plan.precision}"
    return "" if plan.inner_shapes else "leaving out the shapes of inner tensors"


def _may_measure(rule: AnyRule) -> bool:
    """Return whether the ranks of a rule are chosen by the outputs of its layers, if their inputs can be measured."""
    return isinstance(rule, PlanRule) and rule.params is not None and rule.metric != "weight"


def _plannable(model: nn.Module, rule: AnyRule) -> tuple[LayerPlan, ...]:
    """Return the layers that a rule may factor, with its ranks, or 1 where they are chosen from trained weights."""
    if isinstance(rule, FileRule):
        plan = Plan.load(rule.file)
        planned_layers(model, plan)
        return plan.layers
    if isinstance(rule, PublishedRule):
        layers = published_plan(rule.published, rule.modes).layers
        selected = tuple(layer for layer in layers if not rule.only_3x3 or 9 in layer.modes)
        planned_layers(model, Plan(layers=selected))
        return selected
    if rule.ranks is None:
        return unranked(model, rule.layers, rule.format, rule.modes, rule.merge)
    form = "tt" if rule.format == AUTO else rule.format
    return plan_layers(model, rule.layers, format=form, ranks=rule.ranks, modes=rule.modes, merge=rule.merge)


def _call(function: Any, factory: Any, named: Named, key: str, known: Mapping[str, Any]) -> Any:
    """Call a function with the arguments of a recipe. Raises `RecipeError` for an argument that `factory` does not accept."""
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
    except OWN_CODE as error:
        if ":" in named.name:
            raise RecipeError(f"{key}.name: {named.name} failed with {given} {in_words(error)}") from error
        what = " ".join(str(error).split()) or type(error).__name__
        raise RecipeError(f"{key}.args: {named.name} cannot be created with {given}: {what}") from None
