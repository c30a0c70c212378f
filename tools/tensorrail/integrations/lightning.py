"""ADMM under Lightning's `Trainer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from tensorrail.extras import MissingExtraError
from tensorrail.integrations.phase import Phase
from tensorrail_exporter.plans.plan import Plan
from tensorrail_runtime.errors import PlanError
from tensorrail_trainer.admm.admm import Metric, Residual

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise MissingExtraError("ADMM under Lightning", error) from None


class ADMMCallback(Callback):
    """Trains the planned layers of a module toward low rank.

    >>> callback = ADMMCallback(plan, rho=1e-3)  # doctest: +SKIP
    >>> Trainer(max_epochs=10, callbacks=[callback]).fit(module, data)  # weights come near to low rank # doctest: +SKIP
    >>> callback.finish(Trainer(max_epochs=2), module, data)  # cut into cores and fine-tuned # doctest: +SKIP

    The gradient of the penalty is added once before each step of the optimizer, after gradients were accumulated over batches
    and averaged over processes, and before they are clipped. Checkpoints hold the state. Residuals are logged as `admm/primal`
    and `admm/dual`.

    Args:
        plan: the layers to factor, by their names in the module (in `model.fc1`, `model` is its attribute).
        rho: the weight ρ of the penalty, above 0; default 1e-3.
        metric: `weight` or `activation`, see `ADMM`; default `weight`.
        every: steps of the optimizer between updates; default 0, one update after each epoch.

    Raises:
        ValueError: an argument is out of range.

    """

    def __init__(self, plan: Plan, rho: float = 1e-3, metric: Metric = "weight", every: int = 0) -> None:
        super().__init__()
        self.phase = Phase(plan, rho, metric, every)
        self._stepped = False  # whether the batch made a step of the optimizer: gradients may be accumulated over several

    @property
    def residuals(self) -> tuple[Residual, ...]:
        """The residuals of the last update."""
        return self.phase.residuals

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create the state, or go on with that of the checkpoint."""
        if "DeepSpeed" in type(trainer.strategy).__name__:
            raise PlanError("DeepSpeed divides weights and gradients among processes: train toward low rank without it")
        self.phase.begin(pl_module)
        self.phase.catch_up(trainer.current_epoch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the gradient of the penalty to the weights that this optimizer trains."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._stepped |= self.phase.before_step(parameters)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the steps of the optimizer, and update if updates are counted in steps."""
        if self._stepped:
            self.phase.after_step()
        self._stepped = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Update after an epoch, and log the residuals."""
        self.phase.after_epoch()
        for name, value in self.phase.logged().items():
            pl_module.log(name, value)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return self.phase.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.phase.load_state_dict(state_dict)

    def factorize(self) -> nn.Module:
        """Replace the planned layers by layers made of cores, in place, and return the module."""
        return self.phase.factorize()

    def finish(self, trainer: Trainer, module: LightningModule, *args: Any, **options: Any) -> LightningModule:
        """Factorize the module, fine-tune it with another trainer, and return it.

        Args:
            trainer: a new trainer, without this callback; its optimizer is made anew, with the cores.
            module: the module that was trained.
            *args: the data, as for `Trainer.fit`.
            **options: further options of `Trainer.fit`.

        """
        self.factorize()
        trainer.fit(module, *args, **options)
        return module
