"""ADMM under `transformers.Trainer`."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensorrail.extras import MissingExtraError
from tensorrail.integrations.phase import Phase
from tensorrail_exporter.plans.plan import Plan
from tensorrail_runtime.errors import PlanError
from tensorrail_trainer.admm.admm import Metric, Residual

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise MissingExtraError("ADMM under transformers.Trainer", error) from None

_FILE = "tensorrail-admm.pt"


class ADMMCallback(TrainerCallback):
    """Trains the planned layers of a model toward low rank.

    >>> callback = ADMMCallback(plan, rho=1e-3)  # doctest: +SKIP
    >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])  # doctest: +SKIP
    >>> trainer.train()  # dense weights, which come near to low rank # doctest: +SKIP
    >>> model = callback.finish(trainer, epochs=2)  # cut into cores and fine-tuned # doctest: +SKIP

    The gradient of the penalty is added once before each step of the optimizer, after gradients were accumulated over batches,
    averaged over processes and clipped. It is the same on all processes. Checkpoints of the trainer hold the state; a run that
    is resumed goes on where it ended. The history (`trainer.state.log_history`) gets the residuals after each epoch, as
    `admm/primal` and `admm/dual`.

    Args:
        plan: the layers to factor, with their formats, modes and ranks.
        rho: the weight ρ of the penalty, above 0; default 1e-3.
        metric: `weight` or `activation`, see `ADMM`; default `weight`.
        every: steps of the optimizer between updates; default 0, one update after each epoch.
        checkpoint: folder of the checkpoint from which training goes on, where that is not in the trainer's output folder;
            default: `checkpoint-STEP` there.

    Raises:
        ValueError: an argument is out of range.

    """

    def __init__(
        self,
        plan: Plan,
        rho: float = 1e-3,
        metric: Metric = "weight",
        every: int = 0,
        checkpoint: Path | str | None = None,
    ) -> None:
        super().__init__()
        self.phase = Phase(plan, rho, metric, every)
        self.checkpoint = checkpoint

    @property
    def residuals(self) -> tuple[Residual, ...]:
        """The residuals of the last update."""
        return self.phase.residuals

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Create the state, or read that of the checkpoint from which training goes on."""
        if model is None:
            raise PlanError("the trainer has no model")
        if getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None):
            raise PlanError("DeepSpeed divides weights and gradients among processes: train toward low rank without it")
        if args.n_gpu > 1 and self.phase.metric == "activation":
            raise PlanError(
                f"metric='activation' expects one GPU a process, got {args.n_gpu}, on which DataParallel runs copies of the "
                "model; start the script by torchrun, or use metric='weight'"
            )
        if state.global_step:
            path = Path(self.checkpoint or _checkpoint(args, state)) / _FILE
            if not path.exists():
                raise PlanError(
                    f"{path}: not found: training goes on at step {state.global_step}, and its checkpoint should hold the "
                    "state of ADMM; give the folder of a checkpoint that was written with this callback"
                )
            self.phase.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.phase.begin(model)
        self.phase.catch_up(int(state.epoch or 0))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        """Add the gradient of the penalty."""
        scaler = getattr(optimizer, "scaler", None)  # of fp16
        if scaler is not None and scaler.is_enabled():
            with contextlib.suppress(RuntimeError):  # gradients that were clipped are unscaled already
                scaler.unscale_(optimizer.optimizer)
        self.phase.before_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count the step, and update if updates are counted in steps."""
        self.phase.after_step()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Update after an epoch, and add the residuals to the history of the trainer."""
        self.phase.after_epoch()
        if logged := self.phase.logged():
            state.log_history.append({"epoch": state.epoch or 0.0, "step": state.global_step, **logged})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save the state beside the checkpoint of the trainer."""
        saved = self.phase.state_dict()
        if state.is_world_process_zero:
            folder = _checkpoint(args, state)
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(saved, folder / _FILE)

    def factorize(self) -> nn.Module:
        """Replace the planned layers by layers made of cores, in place, and return the model."""
        return self.phase.factorize()

    def finish(self, trainer: Trainer, epochs: float = 1.0, learning_rate: float | None = None) -> nn.Module:
        """Factorize the model and fine-tune it, with a new optimizer and schedule, and return it.

        Args:
            trainer: the trainer that has trained with this callback.
            epochs: epochs of fine-tuning; default 1.
            learning_rate: default: a tenth of that of the trainer.

        Returns:
            The model with layers made of cores; `trainer` holds it, and evaluates it. Checkpoints are in `finetune` in the
            trainer's output folder.

        """
        model = self.factorize()
        trainer.args = copy.copy(trainer.args)
        trainer.args.num_train_epochs, trainer.args.max_steps = epochs, -1
        trainer.args.output_dir = str(
            Path(trainer.args.output_dir or ".") / "finetune"
        )  # apart from the ADMM phase's checkpoints
        trainer.args.learning_rate = trainer.args.learning_rate / 10 if learning_rate is None else learning_rate
        trainer.remove_callback(self)
        trainer.model = trainer.model_wrapped = model
        trainer.optimizer = trainer.lr_scheduler = None  # made anew, with the cores
        trainer.train()
        return model


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
