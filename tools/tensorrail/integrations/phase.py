"""The ADMM phase of a training that another library runs: when it begins, what each step adds, and when it is updated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tensorrail_exporter.plans.plan import Plan
from tensorrail_runtime.errors import PlanError
from tensorrail_trainer.admm.admm import ADMM, Metric, Residual


@dataclass
class Phase:
    """An ADMM phase.

    Attributes:
        plan: the layers to factor.
        rho: the weight of the penalty.
        metric: how the distance of two weights is measured, see `ADMM`.
        every: steps of the optimizer between updates; 0 for one update after each epoch.
        admm: the state, once training has begun.
        residuals: those of the last update; empty before.

    """

    plan: Plan
    rho: float
    metric: Metric
    every: int
    admm: ADMM | None = None
    residuals: tuple[Residual, ...] = ()
    _steps: int = 0
    _epochs: int = 0  # after which it was updated
    _state: Mapping[str, Any] | None = field(default=None, repr=False)  # of a checkpoint, for the model that is trained next

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every: expected 0 or more steps between updates, got {self.every}")

    def begin(self, model: nn.Module) -> None:
        """Begin with this model, with the state of a checkpoint if one was read; go on if the phase has begun with it."""
        if self.admm is None or self.admm.model is not model:
            self.admm = ADMM(model, self.plan, self.rho, self.metric)
            self._steps = self._epochs = 0
        if self._state is not None:
            self.admm.load_state_dict(self._state["admm"])
            self._steps, self._epochs = int(self._state["steps"]), int(self._state["epochs"])
            self._state = None

    def catch_up(self, epochs: int) -> None:
        """Update for the last epoch if a checkpoint was written between its last step and the update."""
        if not self.every and self._epochs < epochs:
            self.after_epoch()

    def before_step(self, parameters: Iterable[Tensor] | None = None) -> bool:
        """Add the gradient of the penalty, once in each step of the optimizer that trains them; return whether it has any."""
        return self._running().add_gradients(parameters)

    def after_step(self) -> None:
        """Update after as many steps as were asked for."""
        self._steps += 1
        if self.every and self._steps % self.every == 0:
            self.residuals = self._running().update()

    def after_epoch(self) -> None:
        """Update after an epoch, unless updates are counted in steps."""
        self._epochs += 1
        if not self.every:
            self.residuals = self._running().update()

    def logged(self) -> dict[str, float]:
        """Return the largest primal and dual residual of the last update, for a log; empty before the first update."""
        if not self.residuals:
            return {}
        return {
            "admm/primal": max(residual.primal for residual in self.residuals),
            "admm/dual": max(residual.dual for residual in self.residuals),
        }

    def factorize(self) -> nn.Module:
        """Replace the planned layers by layers made of cores, in place, and return the model."""
        return self._running().factorize()

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save, equal on all processes, which all call it; empty before training has begun."""
        if self.admm is None:
            return {}
        self.admm.synchronize()
        return {"steps": self._steps, "epochs": self._epochs, "admm": self.admm.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep the state that `state_dict` returned for when training begins."""
        missing = [key for key in ("steps", "epochs", "admm") if key not in state]
        if state and missing:
            raise PlanError(f"ADMM state: keys {', '.join(missing)} are missing; expected what a checkpoint holds")
        self._state = state or None

    def _running(self) -> ADMM:
        if self.admm is None:
            raise PlanError("ADMM has not begun: train with the callback first")
        return self.admm
