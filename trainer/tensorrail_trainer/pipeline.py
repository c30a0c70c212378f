"""The whole job: dense baseline → ADMM → cores → fine-tune → dense control → ONNX → check → bench → report.

A run folder holds `recipe.yaml`, `checkpoints/`, `plan.json`, `cores.safetensors`, the graphs and the report:
`dense.onnx` is the fine-tuned network in dense form (every planned weight is its cores' reconstruction), so that it, the
plan and the cores are what `model.onnx` is made of; `control.onnx` is the dense network that was trained for as many
epochs without any constraint: what one would ship otherwise, and what the factored network is compared with.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from tensorrail_exporter.cores import save_cores
from tensorrail_exporter.graph_io import save_model
from tensorrail_exporter.plan import Plan
from tensorrail_exporter.rewrite import Factored, factorize, reconstruct
from tensorrail_runtime.accuracy import accuracy
from tensorrail_runtime.cost import cost
from tensorrail_runtime.latency import LatencyReport, bench
from tensorrail_runtime.parity import Parity, parity
from tensorrail_runtime.placement import placement, time_shares
from tensorrail_runtime.records import write_text
from tensorrail_runtime.render import html, markdown
from tensorrail_runtime.report import Check, Epoch, LayerRow, Model, Report
from tensorrail_trainer.admm import ADMM
from tensorrail_trainer.checkpoints import Checkpoints
from tensorrail_trainer.data import Dataset
from tensorrail_trainer.layers import cores_of, swap, to_dense
from tensorrail_trainer.loop import Phase, train
from tensorrail_trainer.moments import Root
from tensorrail_trainer.recipe import Recipe, RecipeError
from tensorrail_trainer.torch_export import to_onnx

_TRAINED_BY = ("version", "seed", "data", "model", "plan", "train")  # the keys that a trained network depends on


@dataclass(frozen=True)
class Progress:
    """Who is told what happens: `note` one line, `epoch` a finished epoch, `bench` the share of a benchmark done."""

    note: Callable[[str], None] = lambda _: None
    epoch: Callable[[Epoch, int, int], None] = lambda *_: None
    """Called with the epoch's row, its phase's number of epochs and the number of epochs still to come in all phases."""
    bench: Callable[[int, float], None] = lambda *_: None


@dataclass(frozen=True)
class Trained:
    """The networks that training leaves: at the end of ADMM, fine-tuned, and the dense control.

    `roots` is the metric that ADMM's network was cut in; empty for the plain one.
    """

    plan: Plan
    admm: nn.Module
    factored: nn.Module
    control: nn.Module
    rows: tuple[Epoch, ...]
    roots: Mapping[str, Root] = field(default_factory=dict)


def prepare(recipe: Recipe, folder: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Make the run folder, or check that the one that is there may be gone on with.

    Raises `RecipeError` when a run is there and neither `resume` nor `overwrite` is asked for, or when it was trained by
    another recipe.
    """
    kept = folder / "recipe.yaml"
    if overwrite and kept.exists():
        shutil.rmtree(folder)
    if kept.exists():
        if not resume:
            raise RecipeError(f"{folder} already holds a run: --resume goes on with it, --overwrite starts it anew")
        before = Recipe.load(kept)
        changed = [key for key in _TRAINED_BY if getattr(before, key) != getattr(recipe, key)]
        if changed:
            raise RecipeError(
                f"{folder} was trained by a recipe with another {', '.join(changed)}: give the run another name, "
                "or start it anew with --overwrite"
            )
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    recipe.save(kept)


def train_all(recipe: Recipe, folder: Path, progress: Progress) -> tuple[Trained, Dataset]:
    """Run the training phases, each from its last checkpoint, and write `plan.json` and `cores.safetensors`."""
    accelerator = Accelerator()
    store = Checkpoints(folder / "checkpoints")
    data = recipe.make_data().to(accelerator.device)
    known = {"channels": data.train_x.shape[1], "classes": data.classes}
    settings = recipe.train
    left = sum(s.epochs for s in (settings.dense, settings.admm, settings.finetune, recipe.control))
    rows: list[Epoch] = []

    def fit(phase: Phase) -> nn.Module:
        nonlocal left
        ahead = left - phase.schedule.epochs
        model = train(phase, recipe, data, accelerator, store, lambda r, n: progress.epoch(r, n, ahead + n - r.epoch))
        for path in store.damaged:
            progress.note(f"refused the damaged checkpoint {path.name}; went on from the one before it")
        store.damaged.clear()
        rows.extend(phase.rows)
        left = ahead
        return model

    def fresh() -> nn.Module:
        torch.manual_seed(recipe.seed)
        return recipe.make_model(known)

    def copy_of(model: nn.Module, into: nn.Module) -> nn.Module:
        into.load_state_dict(model.state_dict())
        return into

    dense = fit(Phase("dense", fresh(), settings.dense))
    plan = recipe.make_plan(dense)
    plan.save(folder / "plan.json")
    start = copy_of(dense, fresh()).to(accelerator.device)
    admm = ADMM(start, plan, settings.admm.rho, settings.admm.metric)
    trained = fit(Phase("admm", start, settings.admm, admm, settings.admm.every))
    cut = admm.factorize(copy_of(trained, fresh()).to(accelerator.device))
    finetuned = fit(Phase("finetune", cut, settings.finetune))
    save_cores(folder / "cores.safetensors", _numpy(finetuned))
    control = fit(Phase("control", copy_of(dense, fresh()).to(accelerator.device), recipe.control))
    return Trained(plan, trained, finetuned, control, tuple(rows), admm.roots), data


def export_all(trained: Trained, data: Dataset, folder: Path, scratch: Path) -> tuple[Factored, Path, Path]:
    """Write `dense.onnx`, `control.onnx` and `model.onnx`; return the factored graph, and ADMM's network dense and cut.

    The last two are written to `scratch`: they are only there to measure the approximation error.
    """
    example = data.test_x[:2]
    dense = to_onnx(to_dense(trained.factored), example)
    save_model(dense, folder / "dense.onnx")
    save_model(to_onnx(trained.control, example), folder / "control.onnx")
    factored = factorize(dense, trained.plan, _numpy(trained.factored))
    save_model(factored.model, folder / "model.onnx")
    before, after = scratch / "before_cut.onnx", scratch / "after_cut.onnx"
    graph = to_onnx(trained.admm, example)
    save_model(graph, before)
    cut = swap(to_dense(trained.admm), trained.plan, roots=trained.roots)
    save_model(reconstruct(graph, trained.plan, _numpy(cut)), after)
    return factored, before, after


def run(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    command: str = "tensorrail run",
) -> Report:
    """Do the whole job and return its report, which also lies in the folder as `report.json`, `.md` and `.html`."""
    progress = progress or Progress()
    prepare(recipe, folder, resume=resume, overwrite=overwrite)
    trained, data = train_all(recipe, folder, progress)
    images, labels = data.test_x.cpu().numpy(), data.test_y.cpu().numpy()
    feeds = [{"image": images[:1]}, {"image": images[1:33]}]
    with tempfile.TemporaryDirectory() as scratch:
        progress.note("exporting to ONNX")
        factored, before, after = export_all(trained, data, folder, Path(scratch))
        progress.note("checking parity and accuracy in ONNX Runtime")
        approximation = parity(before, after, inputs=feeds, tolerance=None)
    target = recipe.targets
    paths = {"dense control": "control.onnx", "dense form": "dense.onnx", "factored": "model.onnx"}
    numerical = parity(folder / "dense.onnx", folder / "model.onnx", inputs=feeds, tolerance=target.numerical_error)
    models = tuple(
        Model(label=label, cost=cost(folder / file), accuracy=accuracy(folder / file, images, labels))
        for label, file in paths.items()
    )
    latency = tuple(
        bench(
            [folder / "control.onnx", folder / "model.onnx"],
            batch=batch,
            seconds=recipe.bench.seconds,
            threads=recipe.bench.threads,
            labels=("dense control", "factored"),
            on_round=lambda share, batch=batch: progress.bench(batch, share),  # type: ignore[misc]
        )
        for batch in recipe.bench.batches
    )
    placed = placement(folder / "model.onnx")
    shares = time_shares(folder / "model.onnx", placed, [row.layer for row in factored.layers])
    report = Report(
        name=recipe.name,
        data=data.source,
        command=command,
        models=models,
        approximation=approximation,
        numerical=numerical,
        latency=latency,
        placement=placed,
        layers=tuple(
            LayerRow(**row.model_dump(include=set(LayerRow.model_fields)), time_share=shares[row.layer])
            for row in factored.layers
        ),
        training=trained.rows,
        checks=_checks(recipe, models, numerical, latency),
    )
    report.save(folder / "report.json")
    write_text(folder / "report.md", markdown(report))
    write_text(folder / "report.html", html(report))
    return report


def _checks(
    recipe: Recipe, models: tuple[Model, ...], numerical: Parity, latency: tuple[LatencyReport, ...]
) -> tuple[Check, ...]:
    target = recipe.targets
    dense, factored = models[0], models[-1]
    drop = dense.accuracy.percent - factored.accuracy.percent
    params = dense.cost.params / factored.cost.params
    checks = [
        Check(
            name="accuracy against the dense control",
            target=f"≥ −{target.accuracy_drop} points",
            measured=f"{-drop:+.2f} points",
            holds=drop <= target.accuracy_drop,
        ),
        Check(
            name="parameters of the whole network",
            target=f"÷ {target.params_ratio} or more",
            measured=f"÷ {params:.2f}",
            holds=params >= target.params_ratio,
        ),
        Check(
            name="numerical error, relative",
            target=f"≤ {target.numerical_error:.0e}",
            measured=f"{numerical.worst:.2e}",
            holds=numerical.holds,
        ),
    ]
    for run_ in latency:
        ratio = run_.ratios[0]
        checks.append(
            Check(
                name=f"speed-up at batch {run_.batch}",
                target=f"≥ {target.speedup}×, interval above 1",
                measured=f"{ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}]",
                holds=ratio.value >= target.speedup and ratio.low > 1,
            )
        )
    return tuple(checks)


def _numpy(model: nn.Module) -> dict[str, list[np.ndarray]]:
    return {name: [core.numpy() for core in cores] for name, cores in cores_of(model).items()}
