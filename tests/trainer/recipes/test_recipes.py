"""Every shipped recipe, a few steps of every phase, on made data of the true shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tensorrail_trainer.data import Dataset, InMemory, Source
from tensorrail_trainer.layers.factored import FactoredLayer
from tensorrail_trainer.layers.recurrent import FactoredRecurrent
from tensorrail_trainer.recipes import recipe as recipes
from tensorrail_trainer.recipes.recipe import Recipe
from tensorrail_trainer.recipes.schedules import Schedule
from tensorrail_trainer.run.folder import prepare
from tensorrail_trainer.run.phases import train_all

FOLDER = Path(__file__).parents[3] / "recipes"
SHAPES = {
    "cifar10": (10, (3, 32, 32)),
    "cifar100": (100, (3, 32, 32)),
    "digits": (10, (1, 32, 32)),
    "images": (1000, (3, 224, 224)),
    "moving_shapes": (11, (6, 57600)),
    "speech": (10, (8, 320)),
    "video": (11, (6, 57600)),
}
# One of each kind: ADMM with all that recipes offer, both recurrent networks in both formats.
FAMILIES = ("resnet20-cifar100-tt-long", "spoken-digits-gru-tr", "spoken-digits-lstm-tt")
QUICK = [path for path in sorted(FOLDER.glob("*.yaml")) if path.stem in FAMILIES]
SLOW = [path for path in sorted(FOLDER.glob("*.yaml")) if path not in QUICK]


@pytest.fixture
def made_data(monkeypatch):
    """Answer for every data set with four made samples of its shape."""

    def source_of(name):
        classes, shape = SHAPES[name]

        def make(**_):
            x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
            split = InMemory(x, torch.tensor([0, 1, 2, 3]))
            return Dataset("made", classes, split, split)

        return Source(make, lambda **_: known(name, classes))

    monkeypatch.setattr(recipes, "source_of", source_of)


def known(name, classes):
    shape = SHAPES[name][1]
    return {"classes": classes} | ({"channels": shape[0]} if len(shape) == 3 else {"inputs": shape[1]})


def shortened(recipe):
    """Return the recipe with two steps a phase."""
    changes = {"batch": 2, "compile": False}
    if recipe.train.distill is not None:
        changes["distill"] = recipe.train.distill.model_copy(update={"teacher": None})  # its weights are another run's
    for phase in ("dense", "admm", "finetune", "control"):
        schedule = getattr(recipe.train, phase)
        if isinstance(schedule, Schedule):
            short = {"epochs": 1, "warmup": 0.0}
            if phase == "admm":
                short["every_steps"] = 1 if schedule.rho_end else None
            changes[phase] = schedule.model_copy(update=short)
    training = recipe.train.model_copy(update=changes)
    return recipe.model_copy(update={"train": training, "model": recipe.model.model_copy(update={"weights": None})})


def runs(path, tmp_path):
    recipe = shortened(Recipe.load(path))
    prepare(recipe, tmp_path / "run")
    trained, _ = train_all(recipe, tmp_path / "run")
    made = [m for m in trained.factored.modules() if isinstance(m, FactoredLayer | FactoredRecurrent)]
    assert len(made) == len(trained.plan.layers) > 0
    assert all(torch.isfinite(p).all() for p in trained.factored.parameters())
    assert {row.phase for row in trained.rows} >= {"finetune"}
    return recipe, trained


@pytest.mark.parametrize("path", QUICK, ids=lambda path: path.stem)
def test_a_recipe_runs(path, tmp_path, made_data):
    recipe, trained = runs(path, tmp_path)
    assert recipe.name == path.stem
    wanted = [rule.params for rule in recipe.plan if getattr(rule, "params", None)]
    if wanted:
        dense, factored = (sum(p.numel() for p in model.parameters()) for model in (trained.uncut, trained.factored))
        assert dense / factored >= wanted[0]
        assert dense / factored < 1.1 * wanted[0]


@pytest.mark.slow
@pytest.mark.parametrize("path", SLOW, ids=lambda path: path.stem)
def test_another_recipe_runs(path, tmp_path, made_data):
    runs(path, tmp_path)


@pytest.mark.parametrize("path", SLOW, ids=lambda path: path.stem)
def test_another_recipe_is_valid(path, made_data):
    assert Recipe.load(path).name == path.stem
