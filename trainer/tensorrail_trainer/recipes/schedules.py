"""How a phase is trained: optimizer, learning rate, regularisation; each a part of `recipe.yaml`."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from tensorrail_trainer.admm.admm import Metric
from tensorrail_trainer.data import Augment


class Part(BaseModel):
    """A part of a recipe: frozen, strict, and without keys that nobody knows."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


# YAML has lists where the record has tuples; what is in them stays strict.
FROM_LIST = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decayed = Literal["weights", "cores", "norms", "biases"]


class Named(Part):
    """A data set or model by its name, and the arguments it takes."""

    name: str
    args: dict[str, Any] = Field(default_factory=dict)


class NamedModel(Named):
    """A model, and the file of trained weights that it starts from: safetensors, or a state dict of torch."""

    weights: str | None = None


class Steps(Part):
    """The learning rate is multiplied by `factor` after every `every` epochs."""

    every: Count
    factor: Positive


class Schedule(Part):
    """One phase. The learning rate rises over `warmup` epochs, and falls as `decay` says: by a cosine to 0, or by `steps`.

    `decay_on` says which parameters the weight decay acts on: dense weights, cores, scales and shifts of norms, biases.
    `clip` is the largest norm of the gradient over all parameters.
    """

    epochs: Count
    lr: Positive
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # of SGD; AdamW's first
    nesterov: bool = False
    weight_decay: NotNegative = 1e-4
    decay_on: Annotated[tuple[Decayed, ...], FROM_LIST] = ("weights", "cores")
    decay: Literal["cosine", "steps", "constant"] = "cosine"
    steps: Steps | None = None
    warmup: NotNegative = 0.0
    clip: Positive | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Schedule:
        if (self.decay == "steps") != (self.steps is not None):
            raise ValueError("expected both decay: steps and the key steps: {every: …, factor: …}, got only one of them")
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise ValueError("nesterov expects optimizer: sgd and a momentum above 0")
        if self.warmup >= self.epochs:
            raise ValueError(f"expected a warmup shorter than the phase's {self.epochs} epochs, got {self.warmup:g}")
        return self


class AdmmSchedule(Schedule):
    """The ADMM phase: Z and U are updated every `every` epochs, or every `every_steps` steps.

    `rho` is the penalty's weight: constant, or rising (or falling) geometrically to `rho_end` over the phase, or doubled and
    halved where primal and dual residual are a factor of 10 apart (`balance`; Boyd et al. 2011, section 3.4.1). `metric` says
    how far a weight is from low rank: by itself (`weight`), or by what it does to the layer's inputs (`activation`), which
    must be one mode then. `stop` ends the phase when both relative residuals of every layer are below it. `hard` projects the
    weights at the end of the phase, so that its last accuracy is that of a network of low rank.
    """

    rho: Positive = 1e-3
    rho_end: Positive | None = None
    balance: bool = False
    every: Count = 1
    every_steps: Count | None = None
    metric: Metric = "weight"
    stop: Positive | None = None
    hard: bool = False

    @model_validator(mode="after")
    def _one_rule(self) -> AdmmSchedule:
        if self.balance and self.rho_end is not None:
            raise ValueError("expected either rho_end or balance, got both")
        if self.every > self.epochs:
            raise ValueError(
                f"every: expected at most the phase's {self.epochs} epochs, got {self.every}: ADMM would never update"
            )
        if self.every_steps is not None and self.every != 1:
            raise ValueError("expected either every (in epochs) or every_steps (in steps), got both")
        return self


class Distillation(Part):
    """The loss is (1 − weight) · that on the labels + weight · T² · KL of softened class scores (Hinton et al. 2015).

    The teacher is the dense network at the end of its phase, or another one that is trained already.
    """

    weight: Fraction = 0.5
    temperature: Positive = 4.0
    teacher: NamedModel | None = None


class Augmentation(Part):
    """What is done to training images in memory: see `tensorrail_trainer.data.Augment`."""

    shift: int = Field(default=0, ge=0)
    flip: bool = False
    border: Literal["edge", "zero", "reflect"] = "edge"
    cutout: int = Field(default=0, ge=0)

    def made(self) -> Augment:
        """Return it as the data take it."""
        return Augment(self.shift, self.flip, self.border, self.cutout)


class Training(Part):
    """The phases and what they share.

    `dense` is left out when the model comes with trained weights, or when cores are to be trained from scratch; `admm`
    when the dense network is to be cut as it is. `control` is the dense network trained on for as many epochs as ADMM and
    fine-tuning take, by the same recipe: `same`, a schedule of its own, or `none`. With `same` a constant rate of ADMM, which
    fine-tuning is to lower, falls by cosine. The control learns from the teacher of `distill` as well. `ema` averages the
    weights with this decay a step; the average is evaluated and handed on. `cuda_graph` wants one process, every step the
    same: no mixup, no fp16, no metric of the activations.
    """

    batch: Count = 128
    label_smoothing: Fraction = 0.1
    augment: Augmentation = Augmentation()
    mixup: NotNegative = 0.0  # alpha of Beta(alpha, alpha); 0: none (Zhang et al. 2018)
    distill: Distillation | None = None
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    cuda_graph: bool = False  # replay each step as one launch; for small networks on a GPU, changes nothing on a CPU
    sync_batch_norm: bool = True  # over all processes, so that their number does not change the result
    dense: Schedule | None = None
    admm: AdmmSchedule | None = None
    finetune: Schedule
    control: Schedule | Literal["same", "none"] = "same"

    @model_validator(mode="after")
    def _captured(self) -> Training:
        if self.cuda_graph:
            for name, there in {
                "mixup": self.mixup > 0,
                "precision: fp16": self.precision == "fp16",
                "admm.metric: activation": self.admm is not None and self.admm.metric == "activation",
            }.items():
                if there:
                    raise ValueError(
                        f"cuda_graph cannot be combined with {name}, which changes the work of each step; remove one of them"
                    )
        return self

    @property
    def control_schedule(self) -> Schedule | None:
        """The schedule of the dense control, or None for none."""
        if isinstance(self.control, Schedule):
            return self.control
        if self.control == "none":
            return None
        first = self.admm or self.finetune
        kept = first.model_dump(include=set(Schedule.model_fields), exclude={"epochs", "steps"})
        if first.decay == "constant":  # nothing would follow that lets it settle, as fine-tuning does for the cores
            kept["decay"] = "cosine"
        epochs = self.finetune.epochs + (self.admm.epochs if self.admm else 0)
        return Schedule(**kept, steps=first.steps, epochs=epochs)


def rate(schedule: Schedule, progress: float) -> float:
    """Return the learning rate after `progress` epochs; a fraction counts."""
    if progress < schedule.warmup:
        return schedule.lr * progress / schedule.warmup
    if schedule.steps is not None:
        return float(schedule.lr * schedule.steps.factor ** int(progress / schedule.steps.every))
    if schedule.decay == "constant":
        return schedule.lr
    return schedule.lr * (1 + math.cos(math.pi * (progress - schedule.warmup) / (schedule.epochs - schedule.warmup))) / 2


def penalty_weight(schedule: AdmmSchedule, progress: float) -> float:
    """Return rho after `progress` epochs: constant, or geometric toward `rho_end`, which the last epoch has."""
    if schedule.rho_end is None:
        return schedule.rho
    return float(schedule.rho * (schedule.rho_end / schedule.rho) ** min(1.0, progress / max(1, schedule.epochs - 1)))
