"""ADMM in the metric of the layers' inputs against ADMM in the plain one, at the same ranks and epochs.

    python benchmarks/admm_metric.py [--seeds 3] [--work runs/admm-metric] [-o results/admm-metric.md]

Scikit-learn's digits on the residual network of `recipes/digits.yaml` at half its widths and half its image size, cut to
ranks so low that accuracy suffers. A seed draws the split, the initial weights and the batches; both metrics go on from the
same dense network with the same batches. Measured on the test split: the ADMM network dense, right after its weights were
cut, and after fine-tuning. A third way trains with the plain metric and cuts in that of the inputs, which tells the share
of the cut from that of the training. Finished parts are kept in the work folder, and a second call goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tensorrail_exporter.plans.plan import Plan
from tensorrail_runtime.records import write_text
from tensorrail_runtime.sessions.machine import machine
from tensorrail_trainer.admm.admm import ADMM
from tensorrail_trainer.admm.moments import InputMoments
from tensorrail_trainer.data import Dataset, batches
from tensorrail_trainer.layers.dense import planned_layers
from tensorrail_trainer.layers.metric import Root
from tensorrail_trainer.layers.swap import swap
from tensorrail_trainer.recipes.recipe import Recipe
from tensorrail_trainer.training.checkpoints import Checkpoints
from tensorrail_trainer.training.loop import Phase, evaluate, train

RANK = 5
RECIPE: dict[str, Any] = {
    "version": 1,
    "name": "admm-metric",
    "data": {"name": "digits", "args": {"test_fraction": 0.4, "size": 16}},
    "model": {"name": "small_resnet", "args": {"widths": [32, 64], "blocks": 2, "hidden": 64}},
    "plan": [{"layers": "stages.*.conv?", "ranks": RANK}, {"layers": "hidden", "ranks": RANK}],
    "train": {
        "batch": 64,
        "shift": 2,
        "dense": {"epochs": 6, "lr": 0.05},
        "admm": {"epochs": 8, "lr": 0.03, "rho": 0.2},
        "finetune": {"epochs": 2, "lr": 0.02},
    },
}
WAYS = {
    "weight": "`weight`",
    "activation": "`activation`",
    "mixed": "trained with `weight`, cut with `activation`",
}


@dataclass(frozen=True)
class Outcome:
    """One seed, one way. Accuracies in percent, `error` ‖cut − dense‖ / ‖dense‖ of the scores, `primal` a mean over layers."""

    dense: float
    trained: float
    cut: float
    error: float
    finetuned: float
    primal: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--work", type=Path, default=Path("runs/admm-metric"))
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the layers are small, and the result does not hang on the number of cores
    found = {seed: _seed(seed, options.work) for seed in range(options.first, options.first + options.seeds)}
    text = _text(found)
    print(text)
    if options.out:
        write_text(options.out, text)


def _seed(seed: int, work: Path) -> dict[str, Outcome]:
    """Return the outcome of each way for a seed, from the work folder where it is there already."""
    kept = work / f"{seed}.json"
    if kept.exists():
        return {way: Outcome(**values) for way, values in json.loads(kept.read_text()).items()}
    recipe = Recipe.model_validate(RECIPE | {"seed": seed})
    data = recipe.make_data()
    dense = _fit(recipe, data, work / str(seed) / "dense", Phase("dense", _fresh(recipe, data), recipe.train.dense))
    plan = recipe.make_plan(dense)
    start, found = evaluate(dense, data.test_x, data.test_y), {}
    for metric in ("weight", "activation"):
        admm = ADMM(copy.deepcopy(dense), plan, recipe.train.admm.rho, metric)
        phase = Phase("admm", admm.model, recipe.train.admm, admm)
        trained = _fit(recipe, data, work / str(seed) / metric, phase)
        cuts = {metric: admm.factorize(copy.deepcopy(trained))}
        if metric == "weight":
            cuts["mixed"] = swap(copy.deepcopy(trained), plan, roots=_roots(trained, plan, recipe, data))
        residuals = phase.rows[-1].residuals.values()
        for way, cut in cuts.items():
            accuracy, error = evaluate(cut, data.test_x, data.test_y), _error(cut, trained, data.test_x)
            tuned = _fit(recipe, data, work / str(seed) / way, Phase("finetune", cut, recipe.train.finetune))
            found[way] = Outcome(
                dense=start,
                trained=evaluate(trained, data.test_x, data.test_y),
                cut=accuracy,
                error=error,
                finetuned=evaluate(tuned, data.test_x, data.test_y),
                primal=float(np.mean([primal for primal, _ in residuals])),
            )
            print(f"seed {seed}, {way}: {found[way]}", flush=True)
    write_text(kept, json.dumps({way: asdict(found[way]) for way in WAYS}, indent=1) + "\n")
    return found


def _fresh(recipe: Recipe, data: Dataset) -> nn.Module:
    torch.manual_seed(recipe.seed)
    return recipe.make_model({"channels": data.train_x.shape[1], "classes": data.classes})


def _fit(recipe: Recipe, data: Dataset, folder: Path, phase: Phase) -> nn.Module:
    folder.mkdir(parents=True, exist_ok=True)
    return train(phase, recipe, data, Accelerator(cpu=True), Checkpoints(folder), lambda *_: None).eval()


def _roots(model: nn.Module, plan: Plan, recipe: Recipe, data: Dataset) -> dict[str, Root]:
    """Return the metric of a trained model's inputs, over the training batches of one epoch."""
    model = copy.deepcopy(model).train()
    moments = InputMoments(plan, planned_layers(model, plan))
    with torch.no_grad():
        for x, _ in batches(data.train_x, data.train_y, recipe.train.batch, recipe.seed, recipe.train.shift):
            model(x)
    return moments.roots()


@torch.no_grad()
def _error(cut: nn.Module, dense: nn.Module, x: Tensor) -> float:
    wanted = dense.eval()(x)
    return float((cut.eval()(x) - wanted).norm() / wanted.norm())


def _text(found: dict[int, dict[str, Outcome]]) -> str:
    columns = {
        "ADMM, still dense, %": ("trained", "{:.2f}"),
        "right after the cut, %": ("cut", "{:.2f}"),
        "error of the scores": ("error", "{:.3f}"),
        "fine-tuned, %": ("finetuned", "{:.2f}"),
    }
    head = ["| seed | way | dense baseline, % | " + " | ".join(columns) + " |", "|---" * (3 + len(columns)) + "|"]
    rows, means = [], []
    for seed, ways in found.items():
        for way, label in WAYS.items():
            one = ways[way]
            values = " | ".join(form.format(getattr(one, key)) for key, form in columns.values())
            rows.append(f"| {seed} | {label} | {one.dense:.2f} | {values} |")
    for way, label in WAYS.items():
        cells = [_spread([getattr(ways[way], key) for ways in found.values()], form) for key, form in columns.values()]
        means.append(f"| {label} | " + " | ".join(cells) + " |")
    gains = []
    for way in ("activation", "mixed"):
        cells = []
        for key, form in columns.values():
            signed = form.replace(":", ":+")
            cells.append(_spread([getattr(w[way], key) - getattr(w["weight"], key) for w in found.values()], signed))
        gains.append(f"| {WAYS[way]} | " + " | ".join(cells) + " |")
    where, epochs = machine(), {name: RECIPE["train"][name]["epochs"] for name in ("dense", "admm", "finetune")}
    plain_head = ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    return (
        "# ADMM in the metric of the weights and of the activations\n\n"
        f"Command: `python benchmarks/admm_metric.py --seeds {len(found)}`, seeds {', '.join(map(str, found))}. "
        f"{where.processor}, one thread, torch {torch.__version__.partition('+')[0]}. "
        f"scikit-learn digits at 16×16, {RECIPE['model']['args']['widths']} channels, tensor trains of rank {RANK}; "
        f"{epochs['dense']} epochs dense, {epochs['admm']} of ADMM (rho {RECIPE['train']['admm']['rho']}), "
        f"{epochs['finetune']} of fine-tuning; batches of {RECIPE['train']['batch']}, the same for all ways of a seed.\n\n"
        + "\n".join(head + rows)
        + "\n\nMean over the seeds ± standard deviation:\n\n"
        + "\n".join(plain_head + means)
        + "\n\nDifference to `weight`, seed by seed, mean ± standard deviation:\n\n"
        + "\n".join(plain_head + gains)
        + "\n\n"
        + _verdict(found)
        + "\n"
    )


def _verdict(found: dict[int, dict[str, Outcome]]) -> str:
    """Say in how many seeds which was better and whether that is more than the spread, and no more than that."""
    lines = []
    for what, key, sign in (
        ("the error of the scores right after the cut", "error", -1),
        ("accuracy right after the cut", "cut", 1),
        ("accuracy after fine-tuning", "finetuned", 1),
    ):
        gains = [sign * (getattr(ways["activation"], key) - getattr(ways["weight"], key)) for ways in found.values()]
        better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
        clear = len(gains) > 1 and abs(np.mean(gains)) > np.std(gains, ddof=1)
        lines.append(
            f"- {what}: `activation` better in {better} of {len(gains)} seeds, worse in {worse}; the mean difference is "
            f"{'larger' if clear else 'not larger'} than its standard deviation."
        )
    return "\n".join(lines) + (
        f"\n\n{len(found)} seeds on one small data set show a tendency at most: a difference that is smaller than its standard "
        "deviation is none."
    )


def _spread(values: list[float], form: str) -> str:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return f"{form.format(np.mean(values))} ± {form.replace('+', '').format(deviation)}"


if __name__ == "__main__":
    main()
