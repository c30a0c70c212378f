"""The training loop of a phase. It can be resumed at every epoch, with the same result as an uninterrupted run.

The batches, their augmentation and the randomness of the model depend only on the seed, the phase and the epoch. The result
does not depend on the number of processes either: each takes its part of the same global batches, batch-norm uses the whole
batch, and gradients are averaged. Two things differ: dropout is random for each process, and mixup mixes samples of its part.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tensorrail_runtime.errors import CheckpointError, TrainingError
from tensorrail_trainer.admm.admm import ADMM, Residual
from tensorrail_trainer.data import Dataset, Share, Split
from tensorrail_trainer.data.splits import EVALUATED, InMemory, in_order, shuffled
from tensorrail_trainer.layers.factored import FactoredLayer
from tensorrail_trainer.layers.recurrent import FactoredRecurrent
from tensorrail_trainer.layers.steps import CoreList
from tensorrail_trainer.layers.swap import require_copyable
from tensorrail_trainer.processes import alike, rank, summed, sync_batch_norm, unsync_batch_norm, world
from tensorrail_trainer.recipes.recipe import Recipe
from tensorrail_trainer.recipes.schedules import (
    AdmmSchedule,
    Schedule,
    Training,
    average_decay,
    penalty_weight,
    period,
    rate,
    why_not,
)
from tensorrail_trainer.training.checkpoints import Checkpoints
from tensorrail_trainer.training.cuda_graph import IMPLEMENTATION, CaptureError, Replay, on_device
from tensorrail_trainer.training.epochs import Epoch

OnEpoch = Callable[[Epoch, int], None]
"""Called after every epoch with its row of the log and the number of epochs of the phase."""

_ON_GPU = 1024  # samples per batch of an evaluation whose data are on the GPU
_CHECK_EVERY = 32  # steps between checks of the loss: each check waits for the device


@dataclass
class Phase:
    """One phase of a run: the model, its schedule, ADMM and teacher if any, and the log of its epochs.

    With `channels_last` images and 2-D convolutions use torch's channels_last memory format, which runs many times faster on a
    CPU. Networks that call `view` on images do not support it.
    """

    name: str
    model: nn.Module
    schedule: Schedule
    admm: ADMM | None = None
    teacher: nn.Module | None = None
    channels_last: bool = True
    rows: list[Epoch] = field(default_factory=list)


def train(
    phase: Phase, recipe: Recipe, data: Dataset, accelerator: Accelerator, store: Checkpoints, on_epoch: OnEpoch
) -> nn.Module:
    """Train a phase from its last checkpoint, or from the start, to its last epoch.

    Args:
        phase: the phase; its model is trained in place, and its rows are filled.
        recipe: the recipe of the run.
        data: the data set, on the device of the accelerator.
        accelerator: device, processes and precision.
        store: the checkpoints of the run.
        on_epoch: called after every epoch.

    Returns:
        The trained model; with `ema` the averaged one.

    Raises:
        TrainingError: the loss or the weights are not finite, or the phase cannot be trained with these settings.
        CheckpointError: a checkpoint cannot be read or written, or belongs to another network.

    """
    settings = recipe.train
    _require_updates(phase, len(data.train), settings.batch)
    place(phase.model, accelerator.device, phase.channels_last)
    optimizer = make_optimizer(phase.model, phase.schedule)
    average = _average(phase.model, settings)
    first, done = _resumed(phase, optimizer, average, accelerator, store)
    _prepare_networks(phase, settings, accelerator.device)
    own_forward = phase.model.__dict__.get("forward")
    model, prepared = accelerator.prepare(phase.model, optimizer)
    replay = _replay(settings, optimizer, accelerator.device)
    for epoch in range(first, 0 if done else phase.schedule.epochs):
        job = _Job(phase, model, prepared, average, recipe, data, accelerator, epoch, replay)
        row, closed = job.carry_out()
        phase.rows.append(row)
        if phase.admm is not None:
            phase.admm.synchronize()
        if accelerator.is_main_process:
            store.save(phase.name, epoch + 1, _state(phase, optimizer, average, accelerator, closed))
        accelerator.wait_for_everyone()
        on_epoch(row, phase.schedule.epochs)
        if closed:
            break
    # Otherwise the model would compute in bf16 afterwards, even in the export.
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    _restore_forward(phase.model, own_forward)
    accelerator.free_memory()
    unsync_batch_norm(phase.model)
    if average is not None:
        phase.model.load_state_dict(average.module.state_dict())
    return phase.model


def _restore_forward(model: nn.Module, own: Callable[..., Any] | None) -> None:
    """Give a model the `forward` back that it had before accelerate wrapped it; `own` is None for that of its class.

    Where `forward` has decorators, accelerate's unwrapping goes on through them to the innermost function.
    """
    if own is None:
        model.__dict__.pop("forward", None)
    else:
        model.forward = own


def _require_updates(phase: Phase, samples: int, batch: int) -> None:
    """Raise `TrainingError` if an epoch of a phase has no step, or ADMM would never update."""
    if samples < batch:
        raise TrainingError(
            f"phase {phase.name}: expected at least one batch of {batch} training samples, got {samples} samples; lower "
            "train.batch"
        )
    if isinstance(phase.schedule, AdmmSchedule) and (reason := why_not(phase.schedule, samples // batch)):
        raise TrainingError(f"phase {phase.name}: train.admm.{reason}")


def _resumed(
    phase: Phase,
    optimizer: torch.optim.Optimizer,
    average: AveragedModel | None,
    accelerator: Accelerator,
    store: Checkpoints,
) -> tuple[int, bool]:
    """Restore the last checkpoint of a phase; return the number of its epochs, and whether the phase has ended.

    Raises `CheckpointError` if the checkpoint does not match the network, or the processes do not all have the same one.
    """
    state = store.latest(phase.name)
    first = state["epoch"] if state else 0
    if not alike(torch.tensor([first], device=accelerator.device)):
        raise CheckpointError(
            f"{store.folder}: the processes found phase {phase.name} at different epochs; expected one run folder that all "
            "processes share"
        )
    if state is None:
        return 0, False
    try:
        _restore(phase, optimizer, average, accelerator, state)
        done = bool(state["done"])
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        what = " ".join(str(error).split())[:160] or type(error).__name__
        raise CheckpointError(
            f"{store.folder}: the checkpoint of phase {phase.name}, epoch {state['epoch']}, does not match this network or "
            f"this version ({what}); delete it, or overwrite the run"
        ) from None
    return first, done


def _prepare_networks(phase: Phase, settings: Training, device: torch.device) -> None:
    """Set up batch-norm over all processes, compilation and the teacher."""
    if world() > 1 and settings.sync_batch_norm:
        try:
            sync_batch_norm(phase.model)
        except ValueError as error:
            raise TrainingError(f"phase {phase.name}: {error}") from None
    if settings.compile:
        phase.model.compile()
    if phase.teacher is not None:
        place(phase.teacher, device, phase.channels_last)
        phase.teacher.eval().requires_grad_(False)


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, accelerator: Accelerator, channels_last: bool = True) -> float:
    """Return the top-1 accuracy on a split in percent; every process evaluates a part of it."""
    model.eval()
    hits = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    size = _ON_GPU if accelerator.device.type == "cuda" and isinstance(split, InMemory) else EVALUATED
    for x, y in split.batches(in_order(len(split), size), Share(rank(), world())):
        if not len(y):  # the last batch has fewer samples than there are processes
            continue
        with accelerator.autocast():
            hits += (model(laid_out(x, channels_last)).argmax(1) == y).sum()
    return 100 * int(summed(hits)) / len(split)


def make_optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """Return the optimizer of a schedule, with weight decay only on the parameters that `decay_on` lists."""
    cores = _parameter_ids(module.cores for module in model.modules() if isinstance(module, FactoredLayer | FactoredRecurrent))
    norms = {id(p) for module in model.modules() for p in module.parameters(recurse=False) if _of_norm(module, p)}
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        if id(parameter) in cores:
            kind = "cores"
        elif id(parameter) in norms:
            kind = "norms"
        else:
            kind = "weights" if parameter.dim() > 1 else "biases"
        (decayed if kind in schedule.decay_on else rest).append(parameter)
    groups = [{"params": decayed, "weight_decay": schedule.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=schedule.lr, betas=(schedule.momentum, 0.999))
    return torch.optim.SGD(groups, lr=schedule.lr, momentum=schedule.momentum, nesterov=schedule.nesterov)


def _of_norm(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Return whether a parameter is the scale or shift of a normalization. Other modules may have an attribute `eps`, too."""
    is_vector = sum(size > 1 for size in parameter.shape) <= 1  # such as (C,) or (1, C, 1, 1)
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) or (hasattr(module, "eps") and is_vector)


def _parameter_ids(modules: Iterable[nn.Module]) -> set[int]:
    return {id(parameter) for module in modules for parameter in module.parameters()}


@dataclass
class _Job:
    """One epoch of a phase."""

    phase: Phase
    model: nn.Module  # wrapped by the accelerator
    optimizer: Any
    average: AveragedModel | None
    recipe: Recipe
    data: Dataset
    accelerator: Accelerator
    epoch: int
    replay: Replay | None = None
    projecting: float = 0.0  # seconds
    residuals: tuple[Residual, ...] = ()

    def carry_out(self) -> tuple[Epoch, bool]:
        """Train the epoch and do the ADMM updates; return its row of the log, and whether the phase has ended."""
        phase, start = self.phase, time.perf_counter()
        loss, accuracy = self.run()
        residuals, closed = self.close()
        tested = phase.model if self.average is None else self.average.module
        row = Epoch(
            phase=phase.name,
            epoch=self.epoch + 1,
            lr=rate(phase.schedule, self.epoch),
            loss=loss,
            train_accuracy=accuracy,
            test_accuracy=evaluate(tested, self.data.test, self.accelerator, phase.channels_last),
            seconds=time.perf_counter() - start,
            projection_seconds=self.projecting,
            rho=phase.admm.rho if phase.admm else None,
            residuals={r.layer: (r.primal, r.dual) for r in residuals},
        )
        return row, closed

    def run(self) -> tuple[float, float]:
        """Train the epoch; return the mean loss (with penalty) and the accuracy in percent, both on the training batches."""
        phase, settings = self.phase, self.recipe.train
        seed = zlib.crc32(f"{self.recipe.seed}/{phase.name}/{self.epoch}".encode())
        torch.manual_seed(seed + rank())  # dropout differs between processes
        self.model.train()
        picks = shuffled(len(self.data.train), settings.batch, seed)
        schedule = phase.schedule if isinstance(phase.schedule, AdmmSchedule) and phase.admm is not None else None
        every = 0 if schedule is None else period(schedule, len(picks))
        last_epoch = self.epoch + 1 == phase.schedule.epochs
        before = self.epoch * len(picks)
        losses: list[Tensor] = []
        hits = torch.zeros((), dtype=torch.int64, device=self.accelerator.device)
        seen = 0
        stream = self.data.train.batches(picks, Share(rank(), world()), settings.augment.made(), seed)
        for step, (x, y) in enumerate(stream):
            self._set_rates(step, len(picks))
            loss, right = self._step(laid_out(x, phase.channels_last), y, np.random.default_rng([seed, step]))
            losses.append(loss)
            hits += right
            seen += len(y)
            last = step + 1 == len(picks)
            due = schedule is not None and (before + step + 1) % every == 0
            due = due and not (last and last_epoch and schedule is not None and schedule.hard)  # `close` projects then
            if (step + 1) % _CHECK_EVERY == 0 or due or last:
                self._check_losses(losses, len(picks))
            if due or last:
                self._require_finite(step, len(picks))
            if due:
                self._update()
        right, seen = summed(torch.stack([hits, hits.new_tensor(seen)])).tolist()
        return float(summed(torch.stack(losses).mean())) / world(), 100 * right / seen

    def close(self) -> tuple[tuple[Residual, ...], bool]:
        """Do the hard projection if it is due; return the last residuals of ADMM and whether the phase has ended."""
        schedule = self.phase.schedule
        last = self.epoch + 1 == schedule.epochs
        if not isinstance(schedule, AdmmSchedule) or self.phase.admm is None:
            return (), last
        if last and schedule.hard:
            self._update(hard=True)
        may_stop = schedule.stop is not None and bool(self.residuals)
        if may_stop and max(max(r.primal, r.moved) for r in self.residuals) < (schedule.stop or 0.0):
            if schedule.hard and not last:
                self._update(hard=True)
            return self.residuals, True
        return self.residuals, last

    def _step(self, x: Tensor, y: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        settings = self.recipe.train
        if self.replay is None:
            share = float(rng.beta(settings.mixup, settings.mixup)) if settings.mixup else 1.0
            results = self._work(x, y, share)
        else:
            try:
                loss, right = self.replay(self._work, x, y)
            except CaptureError as error:
                raise TrainingError(
                    f"phase {self.phase.name}, epoch {self.epoch + 1}: the step cannot be captured as a CUDA graph ({error}); "
                    "remove train.cuda_graph, then resume the run"
                ) from None
            results = loss, right
        if self.average is not None:
            decay = average_decay(self.recipe.train.ema or 0.0, int(self.average.n_averaged))
            self.average.multi_avg_fn = get_ema_multi_avg_fn(decay)
            self.average.update_parameters(self.phase.model)
            _copy_integers(self.phase.model, self.average.module)
        return results

    def _work(self, x: Tensor, y: Tensor, share: float = 1.0) -> tuple[Tensor, Tensor]:
        """Do one step of the optimizer; return the loss and the number of correct predictions, both on the device."""
        phase, settings = self.phase, self.recipe.train
        if share < 1.0:
            x = torch.lerp(x.flip(0), x, share)
        with self.accelerator.autocast():
            scores = self.model(x)
            loss = _cross_entropy(scores, y, share, settings.label_smoothing)
            if phase.teacher is not None and settings.distill is not None:
                with torch.no_grad():
                    teacher_scores = phase.teacher(x)
                weight, temperature = settings.distill.weight, settings.distill.temperature
                loss = (1 - weight) * loss + weight * _divergence(scores, teacher_scores, temperature)
        if phase.admm is not None:
            loss = loss + phase.admm.penalty()
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        if phase.schedule.clip is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), phase.schedule.clip)
        self.optimizer.step()
        return loss.detach(), (scores.detach().argmax(1) == y).sum()

    def _set_rates(self, step: int, steps: int) -> None:
        schedule = self.phase.schedule
        lr = rate(schedule, self.epoch + step / steps)
        for group in self.optimizer.param_groups:
            if self.replay is None:
                group["lr"] = lr
            else:
                group["lr"].fill_(lr)  # the graph reads this memory
        if isinstance(schedule, AdmmSchedule) and self.phase.admm is not None and not schedule.balance:
            self.phase.admm.set_rho(penalty_weight(schedule, self.epoch * steps + step, steps))

    def _update(self, hard: bool = False) -> None:
        admm, schedule = self.phase.admm, self.phase.schedule
        if admm is None:
            return
        start = time.perf_counter()
        self.residuals = admm.project_weights() if hard else admm.update()
        if hard and self.average is not None:  # the average is the result of the phase
            admm.project_copy(self.average.module)
        if not hard and isinstance(schedule, AdmmSchedule) and schedule.balance:
            admm.balance()
        self.projecting += time.perf_counter() - start

    def _check_losses(self, losses: list[Tensor], steps: int) -> None:
        """Raise `TrainingError` for the first step since the last check whose loss was not finite."""
        first = max(0, len(losses) - _CHECK_EVERY)
        values = summed(torch.stack(losses[first:])).tolist()  # if it is not finite on one process, it is not finite on all
        for k, value in enumerate(values):
            if not np.isfinite(value):
                raise self._diverged(f"the loss is {value}", first + k, steps)

    def _require_finite(self, step: int, steps: int) -> None:
        """Raise `TrainingError` if the weights are not finite, which the loss of the last step does not show."""
        with torch.no_grad():
            finite = torch.stack([torch.isfinite(parameter).all() for parameter in self.phase.model.parameters()]).all()
        if not finite:
            raise self._diverged("the weights are no longer finite", step, steps)

    def _diverged(self, what: str, step: int, steps: int) -> TrainingError:
        lr, name = rate(self.phase.schedule, self.epoch + step / steps), self.phase.name
        settings = self.recipe.train
        trained = name != "dense" and settings.dense is not None
        keep = "; a new run can start from the trained dense network: name it as model.weights" if trained else ""
        key = name
        if name == "control" and settings.control == "same":
            key = "finetune" if settings.admm is None else "admm"
        return TrainingError(
            f"phase {name}, epoch {self.epoch + 1}, step {step + 1}: {what} at learning rate {lr:.3g}; try a lower "
            f"train.{key}.lr, a warmup or a clip{keep}"
        )


def _cross_entropy(scores: Tensor, y: Tensor, share: float, smoothing: float) -> Tensor:
    loss = F.cross_entropy(scores, y, label_smoothing=smoothing)
    if share == 1.0:
        return loss
    return share * loss + (1 - share) * F.cross_entropy(scores, y.flip(0), label_smoothing=smoothing)


def _divergence(scores: Tensor, teacher_scores: Tensor, temperature: float) -> Tensor:
    student, teacher = (F.log_softmax(logits.float() / temperature, 1) for logits in (scores, teacher_scores))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def place(model: nn.Module, device: torch.device, channels_last: bool = True) -> None:
    """Move a model to a device, its 2-D convolutions in channels_last memory format or contiguous."""
    model.to(device)
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return
    layout = torch.channels_last if channels_last else torch.contiguous_format
    cores = _parameter_ids(module for module in model.modules() if isinstance(module, CoreList))
    for parameter in model.parameters():  # `model.to(memory_format=…)` fails for parameters with five axes
        if parameter.dim() == 4 and id(parameter) not in cores:  # a core in groups has four axes as well, and is no image
            parameter.data = parameter.data.contiguous(memory_format=layout)


def laid_out(x: Tensor, channels_last: bool = True) -> Tensor:
    """Return images (B, C, H, W) in channels_last memory format; other tensors, or all without `channels_last`, unchanged."""
    return x.contiguous(memory_format=torch.channels_last) if channels_last and x.dim() == 4 else x


def _replay(settings: Training, optimizer: torch.optim.Optimizer, device: torch.device) -> Replay | None:
    if not settings.cuda_graph or device.type != "cuda":
        return None
    on_device(optimizer, device)
    return Replay()


def _average(model: nn.Module, settings: Training) -> AveragedModel | None:
    if settings.ema is None:
        return None
    require_copyable(model)
    return AveragedModel(model, use_buffers=True)


@torch.no_grad()
def _copy_integers(model: nn.Module, average: nn.Module) -> None:
    """Copy buffers of integers, such as indices, into an average: torch would round the mean of equal ones down."""
    for own, averaged in zip(model.buffers(), average.buffers(), strict=True):
        if not (own.is_floating_point() or own.is_complex()):
            averaged.copy_(own)


def _state(
    phase: Phase, optimizer: torch.optim.Optimizer, average: AveragedModel | None, accelerator: Accelerator, done: bool
) -> dict[str, Any]:
    return {
        "done": done,
        "model": phase.model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average.state_dict() if average else None,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
        "admm": phase.admm.state_dict() if phase.admm else None,
        "rows": [row.model_dump(mode="json") for row in phase.rows],
    }


def _restore(
    phase: Phase,
    optimizer: torch.optim.Optimizer,
    average: AveragedModel | None,
    accelerator: Accelerator,
    state: dict[str, Any],
) -> None:
    phase.model.load_state_dict(state["model"])
    chosen = [{key: group[key] for key in IMPLEMENTATION if key in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    for group, kept in zip(optimizer.param_groups, chosen, strict=True):
        group.update(kept)  # the implementation for this device, not for the one that wrote the checkpoint
    if average is not None:
        average.load_state_dict(state["average"])
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    if phase.admm is not None:
        phase.admm.load_state_dict(state["admm"])
    phase.rows[:] = [Epoch.model_validate(row) for row in state["rows"]]
