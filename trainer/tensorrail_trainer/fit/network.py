"""Fit all cores together: the whole factored network is trained toward the outputs of the dense one, without labels.

The loss is the divergence of the outputs (Kullback-Leibler for scores of classes, as in Hinton et al., 2015, the squared error
as a share of the variance for others) plus the squared error at the last tensor on which all outputs depend. Images are varied
in every step (`augment`), so that a few of them are not learned by heart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor

from tensorrail_exporter.calibrate.inputs import Calibration
from tensorrail_exporter.plans.plan import Plan
from tensorrail_runtime.measure.agreement import Scores, scores_of
from tensorrail_runtime.progress import Progress, silent
from tensorrail_trainer.fit.augment import image_input, varied
from tensorrail_trainer.fit.blocks import shared_cuts, trainable_names
from tensorrail_trainer.fit.module import OnnxModule
from tensorrail_trainer.fit.pieces import Pieces, divided, per_step, run, variance
from tensorrail_trainer.fit.training import Steps

_STAGE = "fitting the network"
_RATE = 0.003  # relative to the root mean square of a tensor
_WARM_UP = 10  # steps
_FEATURES = 3.0  # weight of the error at the last inner tensor
_FEWEST = 20  # steps that are worth their time
_SURE = 1e-6  # probabilities are taken as no nearer to 0 and 1


@dataclass(frozen=True)
class NetworkFit:
    """Settings of the fit of a whole network."""

    steps: int = 600
    """Steps of 32 samples at most."""
    seconds: float = 60.0
    """Time limit in seconds; fewer steps are made where they take longer."""
    rate: float = _RATE
    """Learning rate, relative to the root mean square of each tensor."""
    seed: int = 0
    """Seed of the order of the samples and of their variants."""


def fit_network(
    dense: onnx.ModelProto,
    factored: onnx.ModelProto,
    plan: Plan,
    calibration: Calibration,
    settings: NetworkFit | None = None,
    progress: Progress = silent,
) -> onnx.ModelProto:
    """Fit cores, biases and batch-norms of the factored graph to the outputs of the dense graph.

    Args:
        dense: the dense graph.
        factored: the graph that was made of it by the plan.
        plan: the plan.
        calibration: inputs, without labels.
        settings: the settings of the fit; default `NetworkFit()`.
        progress: told how far the fit is.

    Returns:
        The factored graph with fitted values; the same graph if the time limit allows fewer than 20 steps. Whether it is better
        on other inputs is for the caller to measure.

    Raises:
        GraphError: an operator is not supported, or the graph cannot be divided into samples.

    """
    settings = settings or NetworkFit()
    trainable = trainable_names(factored, plan)
    teacher, student = OnnxModule(dense), OnnxModule(factored, trainable)
    inputs = divided(dense, teacher, calibration)
    aims = _aims(dense, factored, teacher, inputs)
    if not aims or not trainable:
        return factored
    generator = torch.Generator().manual_seed(settings.seed)
    batches = _batches(inputs, generator)
    steps = Steps(student.parameters_by_name(), trainable, settings.rate, warm_up=_WARM_UP)
    done = 0
    for share in steps.within(settings.seconds, settings.steps, _FEWEST):
        progress(_STAGE, share)
        runs = inputs.runs(next(batches))
        for feed in runs:
            varied_feed = _varied(feed, generator) if inputs.together else feed
            (_loss(teacher, student, varied_feed, aims) / len(runs)).backward()
        done += 1
    progress(_STAGE, 1.0)
    return factored if done < _FEWEST else student.write_back(factored)


@dataclass(frozen=True)
class _Aim:
    """A tensor that is to be reproduced."""

    name: str
    scores: Scores | None  # what kind of scores it holds, if any
    variance: Tensor
    weight: float


def _aims(dense: onnx.ModelProto, factored: onnx.ModelProto, teacher: OnnxModule, inputs: Pieces) -> list[_Aim]:
    """Return the outputs, and the last tensor inside the network on which all of them depend."""
    ends = [value.name for value in dense.graph.output]
    cuts = shared_cuts(dense, factored, teacher, inputs)
    names = [*ends, *(cuts[-1:] if cuts and cuts[-1] not in ends else ())]
    targets = run(teacher, inputs, names).floating()
    if not targets:
        return []
    aims = []
    for name in targets.values[0]:
        value = targets.joined(name)
        kind = scores_of([value.numpy()]) if name == ends[0] else None
        aims.append(_Aim(name, kind, variance(value), 1.0 if name in ends else _FEATURES))
    return aims


def _batches(inputs: Pieces, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield the pieces of each step, without end; all of them once before any comes again."""
    waiting: list[int] = []
    size = min(per_step(inputs), len(inputs.values))
    while True:
        if len(waiting) < size:
            waiting += torch.randperm(len(inputs.values), generator=generator).tolist()
        yield waiting[:size]
        del waiting[:size]


def _varied(feed: Mapping[str, Tensor], generator: torch.Generator) -> Mapping[str, Tensor]:
    name = image_input(feed)
    return feed if name is None else {name: varied(feed[name], generator)}


def _loss(teacher: OnnxModule, student: OnnxModule, feed: Mapping[str, Tensor], aims: Sequence[_Aim]) -> Tensor:
    names = [aim.name for aim in aims]
    with torch.no_grad():
        targets = teacher(feed, names)
    outputs = student(feed, names)
    return torch.stack([aim.weight * _distance(aim, outputs[aim.name], targets[aim.name]) for aim in aims]).sum()


def _distance(aim: _Aim, output: Tensor, target: Tensor) -> Tensor:
    """Return the divergence of scores, the squared error of anything else as a share of the variance."""
    if aim.scores is None:
        return (output - target).square().mean() / aim.variance
    if aim.scores == "sigmoids":
        p, q = (value.clamp(_SURE, 1 - _SURE) for value in (target, output))
        return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1).mean()
    before, after = (_log_probabilities(value, aim.scores) for value in (target, output))
    return (before.exp() * (before - after)).sum(-1).mean()


def _log_probabilities(value: Tensor, kind: Scores) -> Tensor:
    if kind == "probabilities":
        return value.clamp_min(_SURE).log()
    return value if kind == "log-probabilities" else value.log_softmax(-1)
