"""The phases of a training: dense network → ADMM → cut into cores → fine-tuning → dense control."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list
from torch import nn

from tensorrail_exporter.plans.cores import save_cores
from tensorrail_exporter.plans.plan import Plan
from tensorrail_runtime.errors import RecipeError
from tensorrail_runtime.progress import Progress, silent
from tensorrail_trainer._compat_accelerate import forget_other_precision
from tensorrail_trainer.admm.admm import ADMM
from tensorrail_trainer.admm.moments import input_roots
from tensorrail_trainer.data import Dataset
from tensorrail_trainer.layers.metric import Root
from tensorrail_trainer.layers.swap import cores_of, swap
from tensorrail_trainer.networks.weights import save_weights
from tensorrail_trainer.recipes.recipe import Recipe
from tensorrail_trainer.run.tracking import Tracking, check_trackers, folder_of
from tensorrail_trainer.run.tryout import try_out
from tensorrail_trainer.training.checkpoints import Checkpoints
from tensorrail_trainer.training.denormals import flushed
from tensorrail_trainer.training.epochs import Epoch
from tensorrail_trainer.training.loop import Phase, evaluate, laid_out, train


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
    begin: Callable[[], None] = lambda: None,
) -> tuple[Trained, Dataset]:
    """Run the training phases, each from its last checkpoint; write `plan.json`, `cores.safetensors` and `dense.safetensors`.

    With several processes all of them call this function, and the first one writes. On a CPU, denormal floats are treated as 0.

    Args:
        recipe: the recipe.
        folder: the folder of the run, made by `prepare`, here or by `begin`.
        progress: is told of the progress.
        accelerator: device, processes and precision; default `make_accelerator(recipe)`.
        tracking: logs every epoch; default: nothing is logged.
        begin: called once the data are there and samples have run through all networks, before the first phase.

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
    job.channels_last = try_out(recipe, job.data, teacher, device)
    if not job.channels_last:
        progress(
            "note",
            1.0,
            "a network of this run does not accept images in channels_last memory format, which trains many times faster on a "
            "CPU; use flatten or reshape in it instead of view",
        )
    begin()
    if settings.dense is not None:
        dense = job.fit(Phase("dense", dense, settings.dense))
        job.write(lambda: save_weights(dense, folder / "dense.safetensors"))
    plan_file = folder / "plan.json"
    start = job.copy_of(dense)
    note = partial(progress, "note", 1.0)
    own = Plan.load(plan_file) if plan_file.exists() else recipe.make_plan(start, inputs=job.inputs, note=note)
    # Processes on different processors may choose other ranks where two choices are equally good.
    plan = Plan.model_validate_json(broadcast_object_list([own.model_dump_json()])[0])
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
    job.write(lambda: save_cores(folder / "cores.safetensors", core_arrays(finetuned)))
    reference_network: nn.Module | None = dense if settings.dense or recipe.model.weights else None
    reference = "dense network"
    if job.control is not None:
        reference_network = job.fit(Phase("control", job.copy_of(dense), job.control, teacher=teacher))
        reference = "dense control"
    return Trained(plan, uncut, finetuned, reference_network, reference, tuple(job.rows), cut_accuracy, roots), job.data


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
            epochs = self.control.epochs - left_out
            self.control = self.control.model_copy(update={"epochs": epochs, "warmup": min(self.control.warmup, epochs - 1)})
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


def core_arrays(model: nn.Module) -> dict[str, list[np.ndarray]]:
    """Return the cores of a factored network as arrays, by layer name."""
    return {name: [core.numpy() for core in cores] for name, cores in cores_of(model).items()}
