"""A whole run: dense training → ADMM → cores → fine-tuning → dense control → ONNX → checks → benchmark → report.

The folder of a run holds `recipe.yaml`, `checkpoints/`, `plan.json`, `cores.safetensors`, the graphs and the report.
`dense.onnx` is the fine-tuned network in dense form, with every planned weight reconstructed from its cores; `model.onnx` is
made of it, the plan and the cores. `control.onnx` is the dense network after as many further epochs without a constraint, with
which the factored network is compared. If the recipe has no control, `baseline.onnx` is the trained dense network, if there is
one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import nn

from tensorrail_exporter.graphs.io import save_model
from tensorrail_exporter.plans.cores import save_cores
from tensorrail_exporter.plans.plan import Plan
from tensorrail_exporter.rewrite.rewriter import Factored, factorize, reconstruct
from tensorrail_exporter.search.fastest_form import Form, factorize_fastest
from tensorrail_runtime.errors import OWN_CODE, DataError, GraphError, PlanError, RecipeError, in_words
from tensorrail_runtime.graphs.cost import cost
from tensorrail_runtime.measure.accuracy import accuracy_of
from tensorrail_runtime.measure.latency import LatencyReport, bench
from tensorrail_runtime.measure.parity import Parity, parity
from tensorrail_runtime.measure.placement import Placement, placement, time_shares
from tensorrail_runtime.measure.timing import Timing
from tensorrail_runtime.progress import Progress, silent
from tensorrail_runtime.records import write_text
from tensorrail_runtime.scratch import scratch
from tensorrail_runtime.sessions.session import Session
from tensorrail_trainer._compat_accelerate import forget_other_precision
from tensorrail_trainer.admm.admm import ADMM
from tensorrail_trainer.admm.moments import input_roots, require_seen_inputs
from tensorrail_trainer.data import Dataset
from tensorrail_trainer.data.splits import InMemory, arrays
from tensorrail_trainer.layers.dense import dense_layer, planned_layers
from tensorrail_trainer.layers.metric import Root
from tensorrail_trainer.layers.swap import cores_of, swap, to_dense
from tensorrail_trainer.networks.weights import save_weights
from tensorrail_trainer.processes import world
from tensorrail_trainer.recipes.recipe import Bench, Export, Recipe
from tensorrail_trainer.recipes.schedules import why_not
from tensorrail_trainer.run.export import Tracing, require_in_graph, to_onnx
from tensorrail_trainer.run.render import html, markdown
from tensorrail_trainer.run.report import Check, LayerRow, Model, Report
from tensorrail_trainer.run.sources import Sources
from tensorrail_trainer.run.tracking import LOGGED, Tracking, check_trackers, folder_of
from tensorrail_trainer.training.checkpoints import Checkpoints, place_of
from tensorrail_trainer.training.denormals import flushed
from tensorrail_trainer.training.epochs import Epoch
from tensorrail_trainer.training.loop import Phase, evaluate, laid_out, place, train

_WRITTEN = (
    *("plan.json", "cores.safetensors", "dense.safetensors", "training.json", "report.json", "report.md", "report.html"),
    *(f"{graph}.onnx{data}" for graph in ("dense", "model", "control", "baseline") for data in ("", ".data")),
)
_PHASES = ("dense", "admm", "finetune", "control")
_TRAINED_BY = ("version", "seed", "data", "model", "plan", "train")  # the keys of a recipe that a trained network depends on


@dataclass(frozen=True)
class Trained:
    """The trained networks: before the decomposition, factored and fine-tuned, and the dense network to compare with.

    `uncut` is the network after ADMM, or the dense network if there is no ADMM phase. `roots` is the metric in which it was
    decomposed; empty for the Frobenius norm. `cut_accuracy` is the test accuracy in percent right after the decomposition.
    `reference` describes `dense`.
    """

    plan: Plan
    uncut: nn.Module
    factored: nn.Module
    dense: nn.Module | None
    reference: str
    rows: tuple[Epoch, ...]
    cut_accuracy: float
    roots: Mapping[str, Root] = field(default_factory=dict)


def prepare(recipe: Recipe, folder: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Create the folder of a run, or check that the run in it can be resumed.

    Args:
        recipe: the recipe.
        folder: the folder of the run.
        resume: continue the run in the folder; default False.
        overwrite: delete the files of the run in the folder, and no others, and start again; default False.

    Raises:
        RecipeError: the folder holds a run and neither `resume` nor `overwrite` is set, the run was trained with another
            recipe or with files of another content, or the folder holds files of these names without a run.

    """
    recipe_file, checkpoints = folder / "recipe.yaml", folder / "checkpoints"
    sources, kept = Sources.of(recipe), checkpoints / "sources.json"
    if recipe_file.exists() and not checkpoints.is_dir():
        raise RecipeError(f"{recipe_file} exists, but its folder holds no run; give the run another folder")
    written = (
        *(file for file in checkpoints.glob("*.pt") if (place_of(file) or ("",))[0] in _PHASES),
        *(folder / name for name in _WRITTEN),
    )
    if overwrite and checkpoints.is_dir():
        _require_apart(recipe, written)
        for file in (*written, *(file for pattern in LOGGED for file in folder.glob(pattern)), kept, recipe_file):
            file.unlink(missing_ok=True)
    trained = any(file.exists() for file in written)
    if not recipe_file.exists():
        existing = next((file for file in (*written, kept) if file.exists()), None)
        if existing is not None:
            raise RecipeError(f"{existing} exists, but the folder has no recipe.yaml; give the run an empty folder")
    else:
        if not resume:
            raise RecipeError(f"{folder} already holds a run; resume it, or overwrite it to start again")
        old_recipe = Recipe.load(recipe_file)
        changed = [key for key in _TRAINED_BY if _deciding(old_recipe, key) != _deciding(recipe, key)]
        if changed:
            raise RecipeError(
                f"{folder} was trained with a recipe that differs in {', '.join(changed)}; give the run another name, or "
                "overwrite this run to start again"
            )
        if trained:
            sources.require_same(recipe, kept)
    checkpoints.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    recipe.save(recipe_file)
    if sources.sha256 and not trained:
        sources.save(kept)


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of a process that was killed while it wrote to the folder of a run."""
    checkpoints = (f"checkpoints/.{name}.*.part" for name in ("*-[0-9][0-9][0-9][0-9]*.pt", "sources.json"))
    for pattern in (*checkpoints, *(f".{name}.*.part" for name in _WRITTEN)):
        for leftover in folder.glob(pattern):
            leftover.unlink(missing_ok=True)


def _require_apart(recipe: Recipe, written: Sequence[Path]) -> None:
    """Raise `RecipeError` if a file that is about to be deleted is an input of the recipe."""
    to_delete = {file.resolve() for file in written}
    for key, name in recipe.files():
        if Path(name).resolve() in to_delete:
            raise RecipeError(f"{key}: {name} belongs to the run that would be overwritten; give the new run another folder")


def _deciding(recipe: Recipe, key: str) -> Any:
    """Return the value of a recipe's key without `cuda_graph`, which does not change what is trained."""
    return recipe.train.model_copy(update={"cuda_graph": False}) if key == "train" else getattr(recipe, key)


def make_accelerator(recipe: Recipe, folder: Path | None = None, track: Sequence[str] = ()) -> Accelerator:
    """Return the device, processes and precision of the training, as set by `accelerate launch`, or for this process only.

    Args:
        recipe: the recipe, which sets the precision.
        folder: the folder of the run, for the files of trackers; default: none is written.
        track: what the run is logged to, of `TRACKERS`; default: nothing.

    Returns:
        The accelerator.

    Raises:
        RecipeError: the device does not support the precision, or a tracker is unknown or not installed.

    """
    precision = {"fp32": "no"}.get(recipe.train.precision, recipe.train.precision)
    forget_other_precision(precision)
    check_trackers(track)
    logs = None if folder is None or not track else str(folder_of(folder))
    try:
        return Accelerator(
            mixed_precision=precision,
            log_with=list(track) or None,
            project_dir=logs,
            # Otherwise accelerate divides the loss by the steps that its environment names; no phase accumulates gradients.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
    except (ValueError, RuntimeError) as error:
        raise RecipeError(f"train.precision: {precision} is not available here ({error}); use another precision") from None


@flushed()
def train_all(
    recipe: Recipe,
    folder: Path,
    progress: Progress = silent,
    accelerator: Accelerator | None = None,
    tracking: Tracking | None = None,
) -> tuple[Trained, Dataset]:
    """Run the training phases, each from its last checkpoint; write `plan.json`, `cores.safetensors` and `dense.safetensors`.

    With several processes all of them call this function, and the first one writes. On a CPU, denormal floats are treated as 0.

    Args:
        recipe: the recipe.
        folder: the folder of the run, made by `prepare`.
        progress: is told of the progress.
        accelerator: device, processes and precision; default `make_accelerator(recipe)`.
        tracking: logs every epoch; default: nothing is logged.

    Returns:
        The trained networks, and the data set.

    Raises:
        RecipeError: a network does not fit the data, or a setting is not supported here.
        TrainingError: the loss or the weights are not finite, or a phase cannot be trained.
        CheckpointError: a checkpoint cannot be read or written.

    """
    job = _Training(recipe, folder, progress, accelerator or make_accelerator(recipe), tracking)
    settings, device = recipe.train, job.accelerator.device
    dense, teacher = recipe.make_model(), recipe.make_teacher()
    job.channels_last = _try_out(recipe, job.data, teacher, device)
    if not job.channels_last:
        progress(
            "note",
            1.0,
            "a network of this run does not accept images in channels_last memory format, which trains many times faster on a "
            "CPU; use flatten or reshape in it instead of view",
        )
    if settings.dense is not None:
        dense = job.fit(Phase("dense", dense, settings.dense))
        job.write(lambda: save_weights(dense, folder / "dense.safetensors"))
    plan_file = folder / "plan.json"
    start = job.copy_of(dense)
    note = partial(progress, "note", 1.0)
    plan = Plan.load(plan_file) if plan_file.exists() else recipe.make_plan(start, inputs=job.inputs, note=note)
    job.accelerator.wait_for_everyone()
    job.write(lambda: plan.save(plan_file))
    if teacher is None and settings.distill is not None:
        teacher = job.copy_of(dense)
    uncut, roots = job.toward_low_rank(start, plan, teacher)
    cut = swap(job.copy_of(uncut), plan, roots=roots)
    cut_accuracy = evaluate(cut.to(device), job.data.test, job.accelerator, job.channels_last)
    least = "the outputs of the layers" if roots else "the weights"
    note(f"cut so that {least} change least: test accuracy {cut_accuracy:.2f} % before fine-tuning")
    finetuned = job.fit(Phase("finetune", cut, settings.finetune, teacher=teacher))
    job.write(lambda: save_cores(folder / "cores.safetensors", _numpy(finetuned)))
    reference_network: nn.Module | None = dense if settings.dense or recipe.model.weights else None
    reference = "dense network"
    if job.control is not None:
        reference_network = job.fit(Phase("control", job.copy_of(dense), job.control, teacher=teacher))
        reference = "dense control"
    return Trained(plan, uncut, finetuned, reference_network, reference, tuple(job.rows), cut_accuracy, roots), job.data


def _try_out(recipe: Recipe, data: Dataset, teacher: nn.Module | None, device: torch.device) -> bool:
    """Run two samples (one if a step has one) through every network. Raises `RecipeError` for what would fail in training.

    The dense network also runs with hooks on its layers if a metric is that of their inputs, and is exported if a planned layer
    may have no place in its graph. Returns whether all networks accept images in channels_last memory format.
    """
    _require_updates(recipe, len(data.train))
    if len(data.test) < 2:
        raise RecipeError("data: expected two test samples or more, with which the graph is exported, got one")
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


class _Training:
    """The state that the phases of a run share: data, checkpoints, processes, and the number of remaining epochs."""

    def __init__(
        self, recipe: Recipe, folder: Path, progress: Progress, accelerator: Accelerator, tracking: Tracking | None
    ) -> None:
        if recipe.train.batch % accelerator.num_processes:
            raise RecipeError(
                f"train.batch: expected a multiple of the {accelerator.num_processes} processes, got {recipe.train.batch}"
            )
        if recipe.train.cuda_graph and accelerator.num_processes > 1:
            raise RecipeError(
                f"train.cuda_graph: expected one process, got {accelerator.num_processes}; remove train.cuda_graph"
            )
        self.recipe, self.progress, self.accelerator, self.tracking = recipe, progress, accelerator, tracking
        self.store = Checkpoints(folder / "checkpoints", lambda text: progress("note", 1.0, text))
        self.data = recipe.make_data().to(accelerator.device)
        for note in self.data.left_out:
            progress("note", 1.0, note)
        settings = recipe.train
        self.control = settings.control_schedule if settings.dense or recipe.model.weights else None
        schedules = (settings.dense, settings.admm, settings.finetune, self.control)
        self.left = sum(schedule.epochs for schedule in schedules if schedule is not None)
        self.rows: list[Epoch] = []
        self.channels_last = True

    def fit(self, phase: Phase) -> nn.Module:
        """Train a phase to its end and return its model."""
        self.left -= phase.schedule.epochs
        phase.channels_last = self.channels_last

        def report_epoch(row: Epoch, epochs: int) -> None:
            if self.tracking is not None:
                self.tracking.epoch(row, len(self.rows) + row.epoch)
            stage = f"{row.phase} epoch {row.epoch}/{epochs}"
            self.progress(stage, row.epoch / epochs, row.line(self.left + epochs - row.epoch))

        model = train(phase, self.recipe, self.data, self.accelerator, self.store, report_epoch)
        self.rows.extend(phase.rows)
        return model

    def inputs(self) -> Iterator[torch.Tensor]:
        """Yield training samples on which the metric of the layers' inputs is measured."""
        return (laid_out(x, self.channels_last) for x in self.recipe.measured_inputs(self.data))

    def toward_low_rank(self, model: nn.Module, plan: Plan, teacher: nn.Module | None) -> tuple[nn.Module, Mapping[str, Root]]:
        """Train the ADMM phase, if there is one; return the network to cut and the metric to cut it in."""
        schedule = self.recipe.train.admm
        roots: Mapping[str, Root] = {}
        if schedule is not None:
            admm = ADMM(model, plan, schedule.rho, schedule.metric)
            model = self.fit(Phase("admm", model, schedule, admm, teacher))
            self._shorten_control(schedule.epochs - sum(row.phase == "admm" for row in self.rows))
            roots = admm.final_roots()
        cut = self.recipe.train.cut
        if cut == "weight":
            return model, {}
        if cut == "activation":
            return model, roots or input_roots(self.copy_of(model), plan, self.inputs())
        roots = roots or self.recipe.roots_of_ranks(self.copy_of(model), self.inputs)
        planned = {layer.name for layer in plan.layers}
        return model, {name: root for name, root in roots.items() if name in planned}

    def _shorten_control(self, left_out: int) -> None:
        """Leave out of the control the epochs that ADMM did not train because of `stop`, unless it has its own schedule."""
        if self.control is not None and self.recipe.train.control == "same":
            self.control = self.control.model_copy(update={"epochs": self.control.epochs - left_out})
            self.left -= left_out

    def copy_of(self, model: nn.Module) -> nn.Module:
        """Return a copy of the model on the device, without its hooks."""
        copied = self.recipe.make_model(trained=False)
        copied.load_state_dict(model.state_dict())
        return copied.to(self.accelerator.device)

    def write(self, action: Callable[[], None]) -> None:
        """Call a function in the first process only."""
        if self.accelerator.is_main_process:
            action()


def export_all(
    trained: Trained, data: Dataset, folder: Path, temporary: Path, form: Export, progress: Progress
) -> tuple[Factored, dict[str, Path]]:
    """Export `dense.onnx`, `model.onnx` and the network to compare with.

    Args:
        trained: the trained networks.
        data: the data set, for an example input.
        folder: the folder of the run.
        temporary: a folder for `before cut` and `after cut`, which are only used to measure the approximation error.
        form: the form in which the cores run.
        progress: is told of layers that stay dense.

    Returns:
        The factored graph, and the paths of the graphs by label.

    """
    example = data.example()
    tracing = Tracing(to_dense(trained.factored), example)  # the other networks differ only in their weights
    dense = tracing.graph()
    save_model(dense, folder / "dense.onnx")
    paths = {"dense form": folder / "dense.onnx", "factored": folder / "model.onnx"}
    if trained.dense is not None:
        name = "control.onnx" if trained.reference == "dense control" else "baseline.onnx"
        paths = {trained.reference: folder / name, **paths}
        save_model(tracing.graph(trained.dense), folder / name)
    factored = _in_form(dense, trained, form, progress)
    save_model(factored.model, folder / "model.onnx")
    paths |= {"before cut": temporary / "before_cut.onnx", "after cut": temporary / "after_cut.onnx"}
    graph = tracing.graph(trained.uncut)
    save_model(graph, paths["before cut"])
    cut = swap(to_dense(trained.uncut), trained.plan, roots=trained.roots)
    save_model(reconstruct(graph, trained.plan, _numpy(cut)), paths["after cut"])
    return factored, paths


def _in_form(dense: onnx.ModelProto, trained: Trained, form: Export, progress: Progress) -> Factored:
    """Return the factored graph in the form that the recipe asks for."""
    cores = _numpy(trained.factored)
    try:
        chosen = Form(block=form.block, dense_if_slower=form.dense_if_slower, batch=form.batch)
        factored, slower = factorize_fastest(dense, trained.plan, cores, chosen)
    except PlanError as error:  # export and report the trained cores anyway
        progress("note", 1.0, str(error))
        return factorize(dense, trained.plan, cores)
    if slower.layers:
        progress(
            "note",
            1.0,
            f"kept dense, since no form of their cores is faster here: {', '.join(layer.name for layer in slower.layers)}",
        )
    return factored


def run(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
    command: str = "tensorrail run",
    track: Sequence[str] = (),
) -> Report | None:
    """Do a whole run, and write its report to the folder as `report.json`, `report.md` and `report.html`.

    Args:
        recipe: the recipe.
        folder: the folder of the run.
        resume: continue the run in the folder; default False.
        overwrite: delete the run in the folder and start again; default False.
        progress: is told of the progress, in the first process alone; default: nothing is shown.
        command: the command line that the report names.
        track: what the run is logged to, of `TRACKERS`; default: nothing.

    Returns:
        The report, or None in all processes but the first one, which measures.

    Raises:
        RecipeError: the folder holds another run, or the recipe does not fit.
        TrainingError: the training failed.
        CheckpointError: a checkpoint cannot be read or written.

    """
    accelerator = make_accelerator(recipe, folder, track)
    told = progress if accelerator.is_main_process else silent
    with Tracking(accelerator, recipe, track, told) as tracking:
        if accelerator.is_main_process:
            prepare(recipe, folder, resume=resume, overwrite=overwrite)
        accelerator.wait_for_everyone()
        trained, data = train_all(recipe, folder, told, accelerator, tracking)
        if not accelerator.is_main_process:
            return None
        report = _measured(recipe, folder, trained, data, command, progress)
        tracking.report(report, len(trained.rows))
    return report


def _measured(recipe: Recipe, folder: Path, trained: Trained, data: Dataset, command: str, progress: Progress) -> Report:
    """Export and measure the trained networks, and write the report."""
    sample = data.example(33).numpy()
    feeds = [{"image": sample[:1]}, {"image": sample[1:]}]
    with scratch() as temporary:
        progress("exporting to ONNX", 0.0)
        factored, paths = export_all(trained, data, folder, Path(temporary), recipe.export, progress)
        progress("checking parity and accuracy in ONNX Runtime", 0.0)
        approximation = parity(paths.pop("before cut"), paths.pop("after cut"), inputs=feeds, tolerance=None)
    numerical = parity(paths["dense form"], paths["factored"], inputs=feeds, tolerance=recipe.targets.numerical_error)
    models = tuple(
        Model(label=label, cost=cost(path), accuracy=accuracy_of(path, arrays(data.test))) for label, path in paths.items()
    )
    latency = _latency(recipe.bench, paths, progress)
    placed = placement(paths["factored"])
    report = Report(
        name=recipe.name,
        data="; ".join((data.source, *data.left_out)),
        command=command,
        models=models,
        approximation=approximation,
        numerical=numerical,
        latency=latency,
        placement=placed,
        layers=_layer_rows(factored, paths["factored"], placed),
        training=trained.rows,
        cut_accuracy=trained.cut_accuracy,
        checks=_checks(recipe, models, numerical, latency),
    )
    report.save(folder / "report.json")
    write_text(folder / "report.md", markdown(report))
    write_text(folder / "report.html", html(report))
    return report


def _latency(settings: Bench, paths: Mapping[str, Path], progress: Progress) -> tuple[LatencyReport, ...]:
    """Time the first network and the factored one at each batch size.

    They run in new processes: after training, this process would time one of the models too slow.
    """
    compared = (next(iter(paths)), "factored")
    return tuple(
        bench(
            [paths[label] for label in compared],
            Timing(batch, seconds=settings.seconds, processes=settings.processes),
            Session(threads=settings.threads),
            labels=compared,
            progress=lambda _, share, detail="", batch=batch: progress(f"measuring latency at batch {batch}", share, detail),
        )
        for batch in settings.batches
    )


def _layer_rows(factored: Factored, path: Path, placed: Placement) -> tuple[LayerRow, ...]:
    """Return the rewritten layers with their shares of the time of the factored network."""
    shares = time_shares(path, placed, [row.layer for row in factored.layers])
    return tuple(
        LayerRow(**row.model_dump(include=set(LayerRow.model_fields)), time_share=shares[row.layer]) for row in factored.layers
    )


def _checks(
    recipe: Recipe, models: tuple[Model, ...], numerical: Parity, latency: tuple[LatencyReport, ...]
) -> tuple[Check, ...]:
    """Compare accuracy, parameters, numerical error and latency with the targets of the recipe."""
    target = recipe.targets
    dense, factored = models[0], models[-1]
    drop = dense.accuracy.percent - factored.accuracy.percent
    params = dense.cost.params / factored.cost.params
    checks = [
        Check(
            name=f"accuracy against the {dense.label}",
            target=f"≥ −{target.accuracy_drop} points",
            measured=f"{0.0 - drop:+.2f} points",
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
    for measured in latency:
        ratio = measured.ratios[0]
        checks.append(
            Check(
                name=f"speed-up at batch {measured.batch}",
                target=f"≥ {target.speedup}×, interval above 1",
                measured=f"{ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}]",
                holds=ratio.value >= target.speedup and ratio.low > 1,
            )
        )
    return tuple(checks)


def _numpy(model: nn.Module) -> dict[str, list[np.ndarray]]:
    """Return the cores of a factored network as arrays, by layer name."""
    return {name: [core.numpy() for core in cores] for name, cores in cores_of(model).items()}
