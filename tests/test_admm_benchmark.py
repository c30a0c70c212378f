"""The benchmark of ADMM, on a network of seconds."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest


@pytest.fixture
def admm(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("admm")


@pytest.fixture
def task(admm, monkeypatch, tmp_path):
    """A task of seconds in place of `cifar100`."""
    (tmp_path / "digits_in_a_folder.py").write_text(
        "from tensorrail_trainer.data.digits import digits as whole\n\ndef digits(root):\n    return whole(0, size=16)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    small = replace(
        admm.CIFAR100,
        data={"name": "digits_in_a_folder:digits", "args": {}},
        model={"name": "small_resnet", "args": {"widths": [16, 32], "blocks": 1, "hidden": 16, "classes": 10, "channels": 1}},
        layers="stages.*.conv?",
        batch=256,
        steps=2,
        dense_epochs=3,
        shared={},
        validation=0,
    )
    monkeypatch.setitem(admm.TASKS, "cifar100", small)


def call(admm, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["admm.py", *map(str, arguments)])
    admm.main()


def test_every_way_has_a_valid_recipe(admm):
    for task in admm.TASKS.values():
        for name, way in admm.EVERY_WAY.items():
            recipe = admm.recipe_of(task, "run", "data", 0, way.recipe(task, 2.0, 10), Path("dense.safetensors"))
            phases = (recipe.train.control,) if name == "control" else (recipe.train.admm, recipe.train.finetune)
            assert sum(phase.epochs for phase in phases if phase is not None) == 10


def test_ways_are_trained_reported_and_timed(admm, task, monkeypatch, tmp_path):
    work = ("--work", tmp_path / "runs")
    ways = ("--ways", "cut", "cut-auto")
    call(admm, monkeypatch, "train", "cifar100", "--data", "-", "--epochs", 2, "--ratios", 1.5, *ways, *work)
    call(admm, monkeypatch, "report", "-o", tmp_path / "admm.md", *work)
    outcomes = json.loads((tmp_path / "admm.json").read_text())
    ran = [(one["way"], one["ratio"], one["epochs"]) for one in outcomes]
    assert sorted(ran) == [("cut", 1.5, 2), ("cut-auto", 1.5, 2), ("dense", 1.0, 0)]
    assert all(one["params_ratio"] >= one["ratio"] for one in outcomes)
    rows = (tmp_path / "admm.md").read_text().splitlines()
    assert any("| cut by activations, tt or svd | 1 |" in row for row in rows)
    before = (tmp_path / "runs").stat().st_mtime
    call(admm, monkeypatch, "train", "cifar100", "--data", "-", "--epochs", 2, "--ratios", 1.5, *ways, *work)
    assert (tmp_path / "runs").stat().st_mtime == before
    short = ("--seconds", 0.2, "--batches", 1, "--pixels", 24)
    call(admm, monkeypatch, "speed", "cifar100", "--epochs", 2, "--ratios", 1.5, *ways, *short, *work, "-o", tmp_path / "speed")
    timed = json.loads((tmp_path / "speed.json").read_text())
    assert [(one["way"], one["batch"], one["macs"] > 1) for one in timed] == [("cut", 1, True), ("cut-auto", 1, True)]
    assert all(0 < one["low"] <= one["value"] <= one["high"] for one in timed)
