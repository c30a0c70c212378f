"""When ADMM pays: the ways from a trained network to a small one, at equal epochs, on the same dense network.

    python benchmarks/admm.py train [--data data/cifar-100-python] [--epochs 10] [--ratios 4 6] [--seeds 0 1 2] [--ways cut …]
    python benchmarks/admm.py report -o results/admm.md

`train` trains ResNet-20 on 45,000 images of CIFAR-100 for 60 epochs, then shortens it in every way, one run after another.
Settings were chosen on the 5,000 images that were left out; the test images are looked at once a run, after its last epoch.
Runs stand in `--work` (default `runs/admm`) and go on from their checkpoints; `report` reads the finished ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from tensorrail_runtime.records import write_text
from tensorrail_runtime.sessions.machine import machine
from tensorrail_trainer.data import Dataset
from tensorrail_trainer.data.cifar import cifar100
from tensorrail_trainer.recipes.recipe import Recipe
from tensorrail_trainer.run.pipeline import make_accelerator, prepare, train_all
from tensorrail_trainer.training.loop import evaluate

Settings = dict[str, Any]
LAYERS = "layer*.conv?"
RATE: Settings = {"nesterov": True, "weight_decay": 5.0e-4}
DENSE_EPOCHS = 60
STEPS = 88  # a quarter of an epoch of 45,000 images in batches of 128


@dataclass(frozen=True)
class Way:
    """A way to the small network: what the table calls it, and its part of a recipe for a ratio and a number of epochs."""

    title: str
    recipe: Callable[[float, int], Settings]


def _cut(metric: str, lr: float = 0.03) -> Callable[[float, int], Settings]:
    """Cut the trained network, ranks and cores chosen by a metric, and train the cores for all epochs."""

    def recipe(ratio: float, epochs: int) -> Settings:
        return {
            "plan": [{"layers": LAYERS, "params": ratio, "metric": metric}],
            "train": {"cut": metric, "finetune": {"epochs": epochs, "lr": lr, **RATE}},
        }

    return recipe


def _admm(ranks_by: str, share: float = 0.4, lr: float = 0.03, **settings: Any) -> Callable[[float, int], Settings]:
    """Train toward low rank for a share of the epochs, then cut as `_cut` and train the cores."""

    def recipe(ratio: float, epochs: int) -> Settings:
        first = round(share * epochs)
        admm = {"epochs": first, "lr": lr, "decay": "constant", **RATE, **settings}
        return {
            "plan": [{"layers": LAYERS, "params": ratio, "metric": ranks_by}],
            "train": {"cut": ranks_by, "admm": admm, "finetune": {"epochs": epochs - first, "lr": lr, **RATE}},
        }

    return recipe


RISING: Settings = {"rho": 0.01, "rho_end": 0.1, "every_steps": STEPS}
WAYS: dict[str, Way] = {
    "control": Way("dense, trained on", lambda _, epochs: {"train": {"control": {"epochs": epochs, "lr": 0.03, **RATE}}}),
    "cut": Way("cut by weights", _cut("weight")),
    "cut-activation": Way("cut by activations", _cut("activation")),
    "published": Way("ADMM as published", _admm("weight", 0.5, rho=0.001)),
    "admm": Way("ADMM, rho rising", _admm("weight", **RISING)),
    "admm-activation": Way("ADMM, rho rising, ranks and cut by activations", _admm("activation", **RISING)),
    "admm-metric": Way("ADMM in the metric of activations", _admm("activation", **RISING, metric="activation")),
    "cut-high": Way("cut by activations, rate 0.1", _cut("activation", 0.1)),
    "admm-high": Way("ADMM, cut by activations, rate 0.1", _admm("activation", lr=0.1, **RISING)),
    "admm-short": Way("ADMM for a fifth of the epochs, cut by activations", _admm("activation", 0.2, **RISING)),
}


def recipe_of(name: str, data: str, seed: int, part: Settings, weights: Path | None) -> Recipe:
    """Return the recipe of a run; without weights it starts with the dense phase."""
    part = {"plan": [{"layers": LAYERS, "params": 4.0}], **part}
    train: Settings = {
        "batch": 128,
        "label_smoothing": 0.0,
        "augment": {"shift": 4, "flip": True, "border": "zero"},
        "precision": "bf16",
        "finetune": {"epochs": 1, "lr": 0.01},
        "control": "none",
        **part.pop("train"),
    }
    return Recipe.model_validate(
        {
            "version": 1,
            "name": name,
            "seed": seed,
            "data": {"name": "cifar100", "args": {"root": data, "validation": 5000}},
            "model": {"name": "resnet20"} | ({"weights": str(weights)} if weights else {}),
            "train": train,
            **part,
        }
    )


def one_run(recipe: Recipe, work: Path, test: Dataset, facts: Settings) -> Settings:
    """Train a recipe, or go on with it, and return its record, which its folder keeps as `outcome.json`."""
    folder = work / recipe.name
    record = folder / "outcome.json"
    if record.exists():
        kept: Settings = json.loads(record.read_text())
        return kept
    start = time.perf_counter()
    prepare(recipe, folder, resume=(folder / "recipe.yaml").exists())
    accelerator = make_accelerator(recipe)

    def progress(stage: str, share: float, detail: str = "") -> None:
        print(f"{recipe.name}: {stage} {detail}", flush=True)

    trained, data = train_all(recipe, folder, progress, accelerator)
    control = trained.reference == "dense control"
    network = trained.dense if control and trained.dense is not None else trained.factored
    dense = recipe.make_model(trained=False)
    outcome = facts | {
        "params_ratio": _size(dense) / _size(network),
        "cut": trained.cut_accuracy,
        "validation": _accuracy(network, data, accelerator),
        "test": _accuracy(network, test, accelerator),
        "seconds": time.perf_counter() - start,
        "machine": machine().processor,
    }
    write_text(record, json.dumps(outcome, indent=1) + "\n")
    print(json.dumps(outcome), flush=True)
    return outcome


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _accuracy(model: nn.Module, data: Dataset, accelerator: Accelerator) -> float:
    return evaluate(model, data.to(accelerator.device).test, accelerator, channels_last=True)


def train(options: argparse.Namespace) -> None:
    """Train the dense network and every run that was asked for."""
    test = cifar100(options.data)
    dense: Settings = {"train": {"dense": {"epochs": options.dense_epochs, "lr": 0.1, "warmup": 2.0, **RATE}}}
    recipe = recipe_of("dense", options.data, 0, dense, None)
    start = one_run(recipe, options.work, test, {"way": "dense", "epochs": options.dense_epochs, "seed": 0})
    weights = options.work / "dense" / "dense.safetensors"
    for seed in options.seeds:
        for ratio in options.ratios:
            for way in options.ways:
                part = WAYS[way].recipe(ratio, options.epochs)
                name = f"{way}-{ratio:g}x-{options.epochs}-{seed}"
                facts = {"way": way, "ratio": ratio, "epochs": options.epochs, "seed": seed, "dense": start["machine"]}
                one_run(recipe_of(name, options.data, seed, part, weights), options.work, test, facts)


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f} ({len(values)})" if len(values) > 1 else f"{mean} (1)"


def report(options: argparse.Namespace) -> None:
    """Write the table of all finished runs."""
    outcomes = [json.loads(path.read_text()) for path in sorted(options.work.glob("*/outcome.json"))]
    groups: dict[tuple[int, float, str], list[Settings]] = {}
    for outcome in outcomes:
        if outcome["way"] != "dense":
            groups.setdefault((outcome["epochs"], outcome["ratio"], outcome["way"]), []).append(outcome)
    order = list(WAYS)
    head = ("epochs", "parameters reduction", "way", "right after the cut, %", "validation, %", "test, %")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for (epochs, ratio, way), found in sorted(groups.items(), key=lambda item: (*item[0][:2], order.index(item[0][2]))):
        cells = (_spread([outcome[key] for outcome in found]) for key in ("cut", "validation", "test"))
        lines.append(f"| {epochs} | {ratio:g}× | {WAYS[way].title} | " + " | ".join(cells) + " |")
    print("\n".join(lines))
    if options.out:
        write_text(options.out, "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train")
    training.set_defaults(call=train)
    training.add_argument("--data", default="data/cifar-100-python")
    training.add_argument("--epochs", type=int, default=10)
    training.add_argument("--dense-epochs", type=int, default=DENSE_EPOCHS)
    training.add_argument("--ratios", type=float, nargs="+", default=[4.0])
    training.add_argument("--seeds", type=int, nargs="+", default=[0])
    usual = ["cut", "cut-activation", "published", "admm-activation"]
    training.add_argument("--ways", nargs="+", choices=list(WAYS), default=usual)
    reporting = commands.add_parser("report")
    reporting.set_defaults(call=report)
    reporting.add_argument("-o", "--out", type=Path)
    for command in (training, reporting):
        command.add_argument("--work", type=Path, default=Path("runs/admm"))
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()
