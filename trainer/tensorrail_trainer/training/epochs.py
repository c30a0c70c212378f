"""The training log: one row per epoch of each phase."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Literal

from pydantic import Field

from tensorrail_runtime.records import Record
from tensorrail_runtime.tables import Part, PrintedRecord


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

    def line(self, left: int) -> str:
        """Return loss, accuracies, the largest residuals and the time left, in one line.

        Args:
            left: number of epochs still to come, in all phases.

        """
        primal = max((primal for primal, _ in self.residuals.values()), default=None)
        dual = max((dual for _, dual in self.residuals.values()), default=0.0)
        residuals = "" if primal is None else f"  residuals primal {primal:.4f} dual {dual:.4f}"
        return (
            f"loss {self.loss:.3f}  train {self.train_accuracy:.1f} %  test {self.test_accuracy:.2f} %{residuals}  "
            f"training left {timedelta(seconds=round(left * self.seconds))}"
        )


def projection_share(epochs: Sequence[Epoch]) -> float | None:
    """Return the share of the ADMM phase's time that its updates took, or None if there was no ADMM phase."""
    admm = [row for row in epochs if row.phase == "admm"]
    return sum(row.projection_seconds for row in admm) / max(1e-9, sum(row.seconds for row in admm)) if admm else None


def projection_line(epochs: Sequence[Epoch]) -> tuple[str, ...]:
    """Return the line that says how much of ADMM's time the projections took, where there was ADMM."""
    share = projection_share(epochs)
    return () if share is None else (f"projections took {100 * share:.1f} % of the ADMM phase",)


class TrainingLog(PrintedRecord):
    """Every epoch of every phase, in order."""

    version: Literal[1] = 1
    epochs: tuple[Epoch, ...]
    cut_accuracy: float | None = None  # percent, of the factored network before fine-tuning

    def shown(self) -> tuple[Part, ...]:
        """Return the last epoch of each phase, and the time that projections took."""
        last = {row.phase: row for row in self.epochs}
        lines = [f"{phase}: {row.epoch} epochs, test accuracy {row.test_accuracy:.2f} %" for phase, row in last.items()]
        return (*lines, *projection_line(self.epochs))
