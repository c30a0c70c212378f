"""The training log: one row per epoch of each phase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from tensorrail_runtime.records import Record


class Epoch(Record):
    """One row of the training log. Accuracies are in percent; `residuals` holds (primal, dual) by layer.

    `seconds` is the time of the whole epoch with its evaluation, `projection_seconds` the part of it spent in ADMM's updates.
    """

    phase: str
    epoch: int
    lr: float
    loss: float
    train_accuracy: float
    test_accuracy: float
    seconds: float
    projection_seconds: float = 0.0
    rho: float | None = None
    residuals: dict[str, tuple[float, float]] = Field(default_factory=dict)


def projection_share(epochs: Sequence[Epoch]) -> float | None:
    """Return the share of the ADMM phase's time that its updates took, or None if there was no ADMM phase."""
    admm = [row for row in epochs if row.phase == "admm"]
    return sum(row.projection_seconds for row in admm) / max(1e-9, sum(row.seconds for row in admm)) if admm else None


class TrainingLog(Record):
    """Every epoch of every phase, in order."""

    version: Literal[1] = 1
    epochs: tuple[Epoch, ...]
    cut_accuracy: float | None = None  # percent, of the factored network before fine-tuning
