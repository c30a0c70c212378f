"""What would fail in training is found before it begins: two samples run through every network of a recipe."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tensorrail_exporter.plans.plan import Plan
from tensorrail_runtime.errors import OWN_CODE, DataError, GraphError, PlanError, RecipeError, in_words
from tensorrail_trainer.admm.moments import require_seen_inputs
from tensorrail_trainer.data import Dataset
from tensorrail_trainer.data.files import Files
from tensorrail_trainer.data.mapped import Mapped
from tensorrail_trainer.data.splits import InMemory, Split
from tensorrail_trainer.layers.dense import dense_layer, planned_layers
from tensorrail_trainer.layers.swap import swap
from tensorrail_trainer.processes import world
from tensorrail_trainer.recipes.recipe import Recipe
from tensorrail_trainer.recipes.schedules import Augmentation, why_not
from tensorrail_trainer.run.export import require_in_graph, to_onnx
from tensorrail_trainer.training.loop import laid_out, place


def try_out(recipe: Recipe, data: Dataset, teacher: nn.Module | None, device: torch.device) -> bool:
    """Run two samples (one if a step has one) through every network. Raises `RecipeError` for what would fail in training.

    The dense network also runs with hooks on its layers if a metric is that of their inputs, and is exported if a planned layer
    may have no place in its graph. Returns whether all networks accept images in channels_last memory format.
    """
    _require_updates(recipe, len(data.train))
    if len(data.test) < 2:
        raise RecipeError(f"data: expected two test samples or more, with which the graph is exported, got {len(data.test)}")
    for name, split in (("training", data.train), ("test", data.test)):
        _check_labels(name, getattr(split, "y", None), data.classes)
    try:
        count = min(2, max(1, recipe.train.batch // world()))
        x, _ = next(data.train.batches([torch.arange(count) % len(data.train)], augment=recipe.train.augment.made()))
    except DataError:
        raise
    except OWN_CODE as error:
        key = "train.augment: cannot be applied to these data" if isinstance(data.train, InMemory) else "data: cannot be read"
        raise RecipeError(f"{key} {in_words(error)}") from None
    if recipe.train.augment != Augmentation() and _ignores_augmentation(data.train):
        raise RecipeError(
            "train.augment: it applies to images in memory, (N, C, H, W), and has no effect on these data: remove it; images "
            "that are read from files are cropped and mirrored at random without it"
        )
    dense, cut = recipe.make_model(trained=False), recipe.make_model(trained=False)
    plan = recipe.make_plan(cut, trained=False)
    specs = {name: layer.spec for name, layer in planned_layers(cut, plan).items()}
    sizes = {layer.name: layer.core_shapes(specs[layer.name].shape, specs[layer.name].groups) for layer in plan.layers}
    cores = {name: [torch.zeros(size) for size in own] for name, own in sizes.items()}
    networks = [("model", "the network", dense), ("plan", "the factored network", swap(cut, plan, cores))]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # a network may draw random numbers
        channels_last = all(_takes_channels_last(network, x, device) for _, _, network in networks)
        if teacher is not None:
            channels_last = channels_last and _takes_channels_last(teacher, x, device, trains=False)
        x = laid_out(x, channels_last)
        for key, what, network in networks:
            place(network, device, channels_last)
            for train in (False, True):
                width = _answers(key, what, network, x, data.classes, train)
        if teacher is not None:
            place(teacher, device, channels_last)
            taught = _answers("train.distill.teacher", "the network", teacher, x, data.classes, train=False)
            if taught != width:
                raise RecipeError(
                    f"train.distill.teacher: expected {width} scores per sample, as the model returns, got {taught}"
                )
        if (measured := recipe.measured(dense)).layers:
            _require_seen_inputs(dense, measured, x)
        _require_places(dense, recipe.plannable(dense), data)
    return channels_last


def _ignores_augmentation(split: Split) -> bool:
    """Return whether a split does not read what `train.augment` says, as far as it is one of this package's."""
    return isinstance(split, Files | Mapped) or (isinstance(split, InMemory) and split.x.dim() != 4)


def _require_updates(recipe: Recipe, samples: int) -> None:
    """Raise `RecipeError` for a schedule by which ADMM would never update, with the steps that so many samples give."""
    steps, schedule = samples // recipe.train.batch, recipe.train.admm
    if schedule is not None and steps and (reason := why_not(schedule, steps)):
        raise RecipeError(f"train.admm.{reason}")


def _require_seen_inputs(network: nn.Module, plan: Plan, x: torch.Tensor) -> None:
    """Raise `RecipeError` for a layer whose inputs `metric: activation` or `cut: activation` could not measure."""
    try:
        require_seen_inputs(network, plan, x)
    except PlanError as error:
        raise RecipeError(f"plan: {error}") from None


def _require_places(network: nn.Module, plan: Plan, data: Dataset) -> None:
    """Raise `RecipeError` for a layer that the graph of the dense network, which the run exports at its end, does not hold.

    Only embeddings and attention can be such layers; without them nothing is exported here.
    """
    layers = {layer.name: dense_layer(network, layer.name) for layer in plan.layers}
    if not any(dense.spec.gathers or isinstance(dense.module, nn.MultiheadAttention) for dense in layers.values()):
        return
    try:
        graph = to_onnx(network, data.example())
    except GraphError as error:
        raise RecipeError(f"model: {error}") from None
    try:
        require_in_graph(graph, {name: dense.spec for name, dense in layers.items()}, "leave the layer out of the plan")
    except GraphError as error:
        raise RecipeError(f"plan: {error}") from None


def _takes_channels_last(network: nn.Module, x: torch.Tensor, device: torch.device, trains: bool = True) -> bool:
    """Return whether a network accepts channels_last images, in training, too. A network that accepts none fails later."""

    def answers(channels_last: bool) -> bool:
        place(network, device, channels_last)
        try:
            for train in (False, True)[: 1 + trains]:
                _run(network, laid_out(x, channels_last), train)
        except torch.OutOfMemoryError:
            raise
        except OWN_CODE:
            return False
        return True

    return answers(channels_last=True) or not answers(channels_last=False)


def _run(network: nn.Module, x: torch.Tensor, train: bool) -> Any:
    """Return the output of a network. In training mode also run backward, since layers of cores then compute differently."""
    with torch.set_grad_enabled(train):
        scores = network.train(train)(x)
        if train and isinstance(scores, torch.Tensor) and scores.requires_grad:
            scores.float().sum().backward()
    return scores


def _check_labels(name: str, y: object, classes: int) -> None:
    """Raise `RecipeError` for labels of a wrong type or range, if they are in memory."""
    if not isinstance(y, torch.Tensor):
        return
    if y.dtype not in (torch.int64, torch.uint8):
        raise RecipeError(f"data: expected {name} labels of type torch.int64, got {y.dtype}")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise RecipeError(f"data: expected {name} labels from 0 to {classes - 1} ({classes} classes), got {low} to {high}")


def _answers(key: str, what: str, network: nn.Module, x: torch.Tensor, classes: int, train: bool) -> int:
    """Return the number of scores per sample of a network. Raises `RecipeError` if it returns no scores, or fails."""
    when = " in training" if train else ""
    try:
        scores = _run(network, x, train)
    except OWN_CODE as error:
        raise RecipeError(
            f"{key}: {what} does not accept samples of shape {list(x.shape[1:])}{when} {in_words(error)}"
        ) from None
    shape = list(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
    if not isinstance(scores, torch.Tensor) or scores.dim() != 2 or len(scores) != len(x) or scores.shape[1] < classes:
        raise RecipeError(
            f"{key}: expected scores of {classes} classes, [{len(x)}, {classes}], for {len(x)} "
            f"sample{'s' if len(x) > 1 else ''}{when}, got {shape}; try args: {{classes: {classes}}}"
        )
    return int(scores.shape[1])
