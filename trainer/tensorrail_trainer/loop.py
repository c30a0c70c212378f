"""The training loop of a phase: resumable at every epoch, the same result whether it was interrupted or not.

Nothing is drawn from a state that an interruption would lose: the batches, shifts and any randomness of the model follow
from the seed, the phase and the epoch alone.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from tensorrail_runtime.report import Epoch
from tensorrail_trainer.admm import ADMM
from tensorrail_trainer.checkpoints import Checkpoints
from tensorrail_trainer.data import Dataset, batches
from tensorrail_trainer.recipe import Recipe, Schedule

OnEpoch = Callable[[Epoch, int], None]
"""Called after every epoch with its row and the number of epochs of the phase."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and what to try."""


@dataclass
class Phase:
    """One phase of a run: what is trained, by which schedule, and the rows of its epochs."""

    name: str
    model: nn.Module
    schedule: Schedule
    admm: ADMM | None = None
    every: int = 1
    rows: list[Epoch] = field(default_factory=list)


def train(
    phase: Phase, recipe: Recipe, data: Dataset, accelerator: Accelerator, store: Checkpoints, on_epoch: OnEpoch
) -> nn.Module:
    """Train a phase from its last checkpoint, or from the start, to its last epoch, and return the model.

    Raises `TrainingError` when the loss is no longer finite.
    """
    # torch types `memory_format` only for tensors, and documents it for modules as well.
    phase.model.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(_groups(phase), lr=phase.schedule.lr, momentum=0.9)
    state = store.latest(phase.name)
    if state is not None:
        _restore(phase, optimizer, state)
    model, optimizer = accelerator.prepare(phase.model, optimizer)
    for epoch in range(state["epoch"] if state else 0, phase.schedule.epochs):
        start = time.perf_counter()
        loss, accuracy = _epoch(phase, model, optimizer, recipe, data, accelerator, epoch)
        residuals = {}
        if phase.admm is not None and (epoch + 1) % phase.every == 0:
            residuals = {r.layer: (r.primal, r.dual) for r in phase.admm.update()}
        row = Epoch(
            phase=phase.name,
            epoch=epoch + 1,
            lr=rate(phase.schedule, epoch),
            loss=loss,
            train_accuracy=accuracy,
            test_accuracy=evaluate(model, data.test_x, data.test_y),
            seconds=time.perf_counter() - start,
            residuals=residuals,
        )
        phase.rows.append(row)
        store.save(phase.name, epoch + 1, _state(phase, optimizer))
        on_epoch(row, phase.schedule.epochs)
    unwrapped: nn.Module = accelerator.unwrap_model(model)
    accelerator.free_memory()
    return unwrapped


def rate(schedule: Schedule, progress: float) -> float:
    """Return the learning rate after `progress` epochs (a fraction counts): a cosine from `lr` to 0."""
    return schedule.lr * (1 + math.cos(math.pi * progress / schedule.epochs)) / 2


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor, size: int = 256) -> float:
    """Return the top-1 accuracy in percent."""
    model.eval()
    hits = sum(int((model(_last(a)).argmax(1) == b).sum()) for a, b in zip(x.split(size), y.split(size), strict=True))
    return 100 * hits / len(y)


def _epoch(
    phase: Phase,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    data: Dataset,
    accelerator: Accelerator,
    epoch: int,
) -> tuple[float, float]:
    """Train one epoch and return the mean loss (penalty included) and the accuracy on the batches as they came."""
    settings = recipe.train
    seed = zlib.crc32(f"{recipe.seed}/{phase.name}/{epoch}".encode())
    torch.manual_seed(seed)
    model.train()
    steps = len(data.train_x) // settings.batch
    total, hits, seen = torch.zeros(()), 0, 0
    for step, (x, y) in enumerate(batches(data.train_x, data.train_y, settings.batch, seed, settings.shift)):
        for group in optimizer.param_groups:
            group["lr"] = rate(phase.schedule, epoch + step / steps)
        with accelerator.autocast():
            scores = model(_last(x))
            loss = F.cross_entropy(scores, y, label_smoothing=settings.label_smoothing)
        if phase.admm is not None:
            loss = loss + phase.admm.penalty()
        if not torch.isfinite(loss):
            raise TrainingError(
                f"phase {phase.name}, epoch {epoch + 1}, step {step + 1}: the loss is {loss.item()} at learning rate "
                f"{rate(phase.schedule, epoch + step / steps):.3g}; try a lower train.{phase.name}.lr"
            )
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        optimizer.step()
        total, seen = total + loss.detach().cpu(), seen + len(y)
        hits += int((scores.detach().argmax(1) == y).sum())
    return float(total) / steps, 100 * hits / seen


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _groups(phase: Phase) -> list[dict[str, Any]]:
    """Return the parameters in two groups: weights and cores decay, biases and norms do not."""
    decayed = [p for p in phase.model.parameters() if p.dim() > 1]
    rest = [p for p in phase.model.parameters() if p.dim() <= 1]
    return [{"params": decayed, "weight_decay": phase.schedule.weight_decay}, {"params": rest, "weight_decay": 0.0}]


def _state(phase: Phase, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "model": phase.model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "admm": phase.admm.state_dict() if phase.admm else None,
        "rows": [row.model_dump(mode="json") for row in phase.rows],
    }


def _restore(phase: Phase, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    phase.model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if phase.admm is not None:
        phase.admm.load_state_dict(state["admm"])
    phase.rows[:] = [Epoch.model_validate(row) for row in state["rows"]]
