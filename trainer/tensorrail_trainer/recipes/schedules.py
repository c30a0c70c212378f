"""The training part of `recipe.yaml`: optimizer, learning rate, regularization, and the phases."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from tensorrail_trainer.admm.admm import Metric
from tensorrail_trainer.data import Augment

_EVERY = 0.25  # epochs between two updates of ADMM
_RHO, _RHO_END = 0.01, 0.1
_ROUNDING = 1e-9  # of a product of floats, far below a step
_MANY = 10_000  # steps of an epoch, where their number is not known yet


class Part(BaseModel):
    """A part of a recipe: frozen, with strict types, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


# YAML has lists where the record has tuples; the types of the elements stay strict.
FROM_LIST = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decayed = Literal["weights", "cores", "norms", "biases"]


class Named(Part):
    """A data set or model: its name and its arguments."""

    name: str
    args: dict[str, Any] = Field(default_factory=dict)


class NamedModel(Named):
    """A model, and optionally a file of trained weights: safetensors, or a state dict saved by torch."""

    weights: str | None = None


class Steps(Part):
    """Step decay: the learning rate is multiplied by `factor` after every `every` epochs."""

    every: Count
    factor: Positive


class Schedule(Part):
    """The optimizer and the learning rate of one phase.

    The learning rate rises linearly over `warmup` epochs, then follows `decay`: a cosine to 0, `steps`, or constant.
    `decay_on` lists the parameters that weight decay applies to: dense weights, cores, parameters of norms, biases. `clip` is
    the largest norm of the gradient over all parameters; default: no clipping.
    """

    epochs: Count
    lr: Positive
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # of SGD, or the first beta of AdamW
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
    """The ADMM phase. Z and U are updated every `every` epochs, which may be a fraction, or every `every_steps` steps.

    `rho` is the weight of the penalty: constant; changing geometrically with every update, to `rho_end`; or, with `balance`,
    doubled or halved after an update if the relative primal and dual residuals of all layers together differ by a factor of
    more than 10 (Wohlberg 2017; see `ADMM.balance`). Without any of these it rises from 0.01 to 0.1. `metric` measures the
    distance to low rank by the weight itself (`weight`) or by the change of the layer's outputs (`activation`, which needs
    formats with one input mode). `stop` ends the phase when both relative residuals of every layer are below it. `hard`
    projects the weights at the end of the phase, so that its last accuracy is that of low-rank weights. It replaces an update
    after the last step.
    """

    rho: Positive = _RHO
    rho_end: Positive | None = None
    balance: bool = False
    every: Positive = _EVERY
    every_steps: Count | None = None
    metric: Metric = "weight"
    stop: Positive | None = None
    hard: bool = False

    @model_validator(mode="before")
    @classmethod
    def _rising(cls, given: Any) -> Any:  # Any: what a recipe holds, before it is checked
        """Let rho rise if nothing says how it changes, unless there is only one update.

        Earlier versions stored `every: 1` beside `every_steps`, where it meant nothing.
        """
        if not isinstance(given, Mapping):
            return given
        if given.get("every_steps") is not None and given.get("every") == 1:
            given = {key: value for key, value in given.items() if key != "every"}
        if {"rho", "rho_end"} & given.keys() or given.get("balance"):
            return given
        epochs, every = given.get("epochs"), given.get("every")
        several = not (isinstance(epochs, int) and isinstance(every, int | float)) or epochs >= 2 * every
        return {**given, "rho_end": _RHO_END} if several else given

    @model_validator(mode="after")
    def _one_rule(self) -> AdmmSchedule:
        if self.balance and self.rho_end is not None:
            raise ValueError("expected either rho_end or balance, got both")
        if self.every_steps is not None and self.every != _EVERY:
            raise ValueError("expected either every (in epochs) or every_steps (in steps), got both")
        if self.every_steps is None and (reason := why_not(self, _MANY)):
            raise ValueError(reason)
        return self


class Distillation(Part):
    """Distillation (Hinton et al. 2015): (1 − weight) · loss on the labels + weight · T² · KL divergence of softened scores.

    The teacher is the dense network at the end of its phase, or the trained network that `teacher` names.
    """

    weight: Fraction = 0.5
    temperature: Positive = 4.0
    teacher: NamedModel | None = None


class Augmentation(Part):
    """The augmentation of training images that are held in memory; see `tensorrail_trainer.data.Augment`."""

    shift: int = Field(default=0, ge=0)
    flip: bool = False
    border: Literal["edge", "zero", "reflect"] = "edge"
    cutout: int = Field(default=0, ge=0)

    def made(self) -> Augment:
        """Return the augmentation as the data sets use it."""
        return Augment(self.shift, self.flip, self.border, self.cutout)


class Training(Part):
    """The phases of the training, and the options that they share.

    Leave out `dense` if the model has trained weights, or to train cores from scratch. Leave out `admm` to factor the dense
    network as it is. `control` trains the dense network for as many further epochs as ADMM and fine-tuning take, to compare
    with: `same` uses the schedule of the ADMM phase (a constant learning rate falls by cosine instead, since no fine-tuning
    follows), `none` skips it, and any other schedule can be given. The control uses the teacher of `distill`, too. `ema`
    averages the weights with this decay per step, less at first (`average_decay`); the average is evaluated and passed to the
    next phase. `cut` is the metric in which the trained weights are decomposed into cores: `weight`, or `activation` for the
    least change of the layers' outputs; default: `activation` if the ADMM phase has it or all ranks were chosen by it, else
    `weight`. `cuda_graph` needs one process and identical steps: no mixup, no fp16, no `metric: activation` in the ADMM phase.
    """

    batch: Count = 128
    label_smoothing: Fraction = 0.1
    augment: Augmentation = Augmentation()
    mixup: NotNegative = 0.0  # alpha of Beta(alpha, alpha); 0: no mixup (Zhang et al. 2018)
    distill: Distillation | None = None
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    cuda_graph: bool = False  # launch each step as one CUDA graph, faster for small networks; no effect on a CPU
    sync_batch_norm: bool = True  # over all processes, so that the result does not depend on their number
    dense: Schedule | None = None
    admm: AdmmSchedule | None = None
    cut: Metric | None = None
    finetune: Schedule
    control: Schedule | Literal["same", "none"] = "same"

    @model_validator(mode="after")
    def _captured(self) -> Training:
        if self.cuda_graph:
            for name, is_set in {
                "mixup": self.mixup > 0,
                "precision: fp16": self.precision == "fp16",
                "admm.metric: activation": self.admm is not None and self.admm.metric == "activation",
            }.items():
                if is_set:
                    raise ValueError(
                        f"cuda_graph cannot be combined with {name}, which changes the work of each step; remove one of them"
                    )
        return self

    @property
    def control_schedule(self) -> Schedule | None:
        """The schedule of the dense control, or None if there is no control."""
        if isinstance(self.control, Schedule):
            return self.control
        if self.control == "none":
            return None
        first = self.admm or self.finetune
        kept = first.model_dump(include=set(Schedule.model_fields), exclude={"epochs", "steps"})
        if self.admm and first.decay == "constant":  # no fine-tuning at a lower rate follows, as it does for the cores
            kept["decay"] = "cosine"
        epochs = self.finetune.epochs + (self.admm.epochs if self.admm else 0)
        return Schedule(**kept, steps=first.steps, epochs=epochs)


def rate(schedule: Schedule, progress: float) -> float:
    """Return the learning rate after `progress` epochs, which may be a fraction."""
    if progress < schedule.warmup:
        return schedule.lr * progress / schedule.warmup
    if schedule.steps is not None:
        return float(schedule.lr * schedule.steps.factor ** int(progress / schedule.steps.every))
    if schedule.decay == "constant":
        return schedule.lr
    return schedule.lr * (1 + math.cos(math.pi * (progress - schedule.warmup) / (schedule.epochs - schedule.warmup))) / 2


def updates_due(schedule: AdmmSchedule, steps: int, per_epoch: int) -> int:
    """Return how many updates of ADMM are due in the first steps of its phase, with so many steps per epoch.

    The projection by which `hard` replaces the last one counts as well.
    """
    return steps // period(schedule, per_epoch)


def period(schedule: AdmmSchedule, per_epoch: int) -> int:
    """Return the number of steps between two updates of ADMM, with so many steps per epoch; a fraction is rounded down."""
    return schedule.every_steps or max(1, int(schedule.every * per_epoch + _ROUNDING))


def why_not(schedule: AdmmSchedule, per_epoch: int) -> str | None:
    """Return why ADMM would never update Z and U, or never reach `rho_end`, with so many steps per epoch; None if it does.

    With the default rho, a phase with a single update has the first one.
    """
    epochs, every = schedule.epochs, schedule.every_steps
    count = updates_due(schedule, epochs * per_epoch, per_epoch)
    if not count and every is None:
        return f"every: expected at most the phase's {epochs} epochs, got {schedule.every:g}: ADMM would never update"
    if not count:
        steps = epochs * per_epoch
        return (
            f"every_steps: expected at most {steps} ({epochs} epochs of {per_epoch} steps), got {every}: ADMM would never "
            "update; lower it"
        )
    if schedule.hard and count == 1 and (epochs * per_epoch) % period(schedule, per_epoch) == 0:
        return (
            f"hard: expected an update before the end of the phase's {epochs} epochs, where hard replaces it, got none: ADMM "
            "would never update; update more often, or train for more epochs"
        )
    default = (schedule.rho, schedule.rho_end) == (_RHO, _RHO_END)
    if schedule.rho_end is not None and count == 1 and not default:
        return "rho_end: expected at least two updates in the phase, got one, which has rho; update more often, or leave it out"
    return None


def penalty_weight(schedule: AdmmSchedule, step: int, per_epoch: int) -> float:
    """Return rho in a step of the phase, counted from 0, with so many steps per epoch.

    It is constant, or changes geometrically with every update, so that the last one has `rho_end`.
    """
    if schedule.rho_end is None:
        return schedule.rho
    done, last = updates_due(schedule, step, per_epoch), updates_due(schedule, schedule.epochs * per_epoch, per_epoch) - 1
    return float(schedule.rho * (schedule.rho_end / schedule.rho) ** min(1.0, done / max(1, last)))


def average_decay(decay: float, updates: int) -> float:
    """Return the decay of the averaged weights after so many updates: min(decay, (1 + n) / (10 + n)).

    It is lower at first, so that a short phase does not keep its first weights (`num_updates` of TensorFlow's
    `tf.train.ExponentialMovingAverage`).
    """
    return min(decay, (1 + updates) / (10 + updates))
