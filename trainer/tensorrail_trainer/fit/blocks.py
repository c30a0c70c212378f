"""Fit the cores to the activations of the dense network, block by block, without labels.

The graph is divided where the rest of it depends on a single tensor: in a residual network after every block. Each block of the
factored graph is trained to reproduce the output of the dense block, with the output of the fitted blocks before it as input.
Memory and time are those of one block at a time. Fitting block by block to a few unlabelled inputs follows BRECQ (Li et al.,
ICLR 2021), a method for quantization. `network` then fits all blocks together.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx
import torch

from tensorrail_exporter.calibrate.inputs import Calibration
from tensorrail_exporter.plans.plan import Plan
from tensorrail_runtime.graphs.files import descendants
from tensorrail_runtime.progress import Progress, silent
from tensorrail_runtime.records import Record
from tensorrail_trainer.fit.module import OnnxModule
from tensorrail_trainer.fit.pieces import Pieces, divided, per_step, run, sample_by_sample, variance
from tensorrail_trainer.fit.training import Steps

_RATE = 0.01  # relative to the root mean square of a tensor: Adam's first steps change values by this share
_STAGE = "fitting to activations"


@dataclass(frozen=True)
class FitSettings:
    """Settings of the fit."""

    epochs: int = 12
    """Passes over the calibration inputs for each block at most."""
    seconds: float = 60.0
    """Time limit in seconds for all blocks; fewer passes are made where they take longer."""
    rate: float = _RATE
    """Learning rate, relative to the root mean square of each tensor."""
    seed: int = 0
    """Seed of the order of the samples."""


class BlockFit(Record):
    """One block: the share of the variance of its output that is lost on the calibration inputs, before and after the fit."""

    block: str
    tensors: int
    before: float
    after: float


@dataclass(frozen=True)
class CalibrationFit:
    """The factored graph with fitted values, and the errors of each block before and after the fit."""

    model: onnx.ModelProto
    blocks: tuple[BlockFit, ...]


def fit_blocks(
    dense: onnx.ModelProto,
    factored: onnx.ModelProto,
    plan: Plan,
    calibration: Calibration,
    settings: FitSettings | None = None,
    progress: Progress = silent,
) -> CalibrationFit:
    """Fit cores, biases and batch-norms of the factored graph to the activations of the dense graph.

    Args:
        dense: the dense graph.
        factored: the graph that was made of it by the plan.
        plan: the plan.
        calibration: inputs, without labels.
        settings: the settings of the fit; default `FitSettings()`.
        progress: told which block is fitted.

    Returns:
        The factored graph with fitted values. A block that the fit does not improve keeps its values.

    Raises:
        GraphError: an operator is not supported, or the graph cannot be divided into samples: its outputs do not have one row
            per sample, and its batch size is not fixed.

    """
    settings = settings or FitSettings()
    trainable = trainable_names(factored, plan)
    teacher, student = OnnxModule(dense), OnnxModule(factored, trainable)
    feeds = divided(dense, teacher, calibration)
    ends = [value.name for value in dense.graph.output]
    spans = _spans(factored, shared_cuts(dense, factored, teacher, feeds), ends, set(trainable))
    rows = []
    student_inputs, teacher_outputs = feeds, feeds
    end = time.monotonic() + settings.seconds
    for number, (tensors, names) in enumerate(spans):
        teacher_outputs = run(teacher, teacher_outputs, tensors)
        target = teacher_outputs.floating()
        if names and target and settings.epochs:
            progress(_STAGE, number / len(spans), ", ".join(tensors))
            seconds = (end - time.monotonic()) / (len(spans) - number)
            row, student_inputs = _fit_block(student, student_inputs, target, (tensors, names), settings, seconds)
            rows.append(row)
        else:
            student_inputs = run(student, student_inputs, tensors)
    progress(_STAGE, 1.0)
    return CalibrationFit(student.write_back(factored), tuple(rows))


def _fit_block(
    student: OnnxModule,
    inputs: Pieces,
    target: Pieces,
    span: tuple[list[str], list[str]],
    settings: FitSettings,
    seconds: float,
) -> tuple[BlockFit, Pieces]:
    """Fit one block, and return its errors and its outputs. A block that the fit does not improve keeps its values."""
    tensors, names = span
    before = _lost_share(run(student, inputs, tensors), target)
    parameters = student.parameters_by_name()
    start = {name: parameters[name].detach().clone() for name in names}
    _train(student, inputs, target, names, settings, seconds)
    outputs = run(student, inputs, tensors)
    after = _lost_share(outputs, target)
    if not after < before:
        with torch.no_grad():
            for name, value in start.items():
                parameters[name].copy_(value)
        outputs, after = run(student, inputs, tensors), before
    return BlockFit(block=", ".join(tensors), tensors=len(names), before=before, after=after), outputs


def shared_cuts(dense: onnx.ModelProto, factored: onnx.ModelProto, teacher: OnnxModule, feeds: Pieces) -> list[str]:
    """Return the tensors at which both graphs can be divided; of samples, those that depend on one sample alone."""
    of_factored = set(cut_points(factored))
    cuts = [name for name in cut_points(dense) if name in of_factored]
    if not feeds.together:
        return cuts
    independent = sample_by_sample(teacher, feeds.values[:3], cuts)
    return [name for name in cuts if name in independent]


def trainable_names(factored: onnx.ModelProto, plan: Plan) -> list[str]:
    """Return the initializers that the fit trains: cores and biases of factored layers, scale and shift of norms after them.

    Initializers that other nodes use, too, or that are outputs of the graph, are left out: a fit would change other layers.
    """
    initializers = {tensor.name for tensor in factored.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    layers = tuple(f"{layer.name}/" for layer in plan.layers)
    trainable: list[str] = []
    layer_outputs: set[str] = set()
    outside = {value.name for value in factored.graph.output}
    outside |= {name for body in descendants(factored.graph) for node in body.node for name in node.input}
    for node in factored.graph.node:
        own = node.name.startswith(layers) or any(name.startswith(layers) for name in node.input if name in initializers)
        if own:
            trainable += [name for name in node.input if name in initializers]
            layer_outputs.update(node.output)
        elif node.op_type == "BatchNormalization" and node.input[0] in layer_outputs:
            trainable += [name for name in node.input[1:3] if name in initializers]
        elif node.op_type == "Add" and any(name in layer_outputs for name in node.input):
            trainable += [name for name in node.input if name in initializers]
        else:
            outside.update(node.input)
    return [name for name in dict.fromkeys(trainable) if name not in outside]


def cut_points(model: onnx.ModelProto) -> list[str]:
    """Return, in order, the tensors after which no earlier tensor is needed."""
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    last_use: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        for name in node.input:
            last_use[name] = index
    for value in graph.output:
        last_use[value.name] = len(graph.node)
    live = {value.name for value in graph.input if value.name not in constants and value.name in last_use}
    cuts: list[str] = []
    derived = _constant_tensors(graph, constants)
    for index, node in enumerate(graph.node):
        live |= {name for name in node.output if last_use.get(name, -1) > index and name not in derived}
        live -= {name for name in live if last_use[name] <= index}
        if len(live) == 1 and index < len(graph.node) - 1:
            (only,) = live
            if only in node.output and (not cuts or cuts[-1] != only):
                cuts.append(only)
    return cuts


def _constant_tensors(graph: onnx.GraphProto, constants: set[str]) -> set[str]:
    """Return the tensors that depend on no input."""
    constant = set(constants) | {""}
    for node in graph.node:
        if all(name in constant for name in node.input):
            constant.update(node.output)
    return constant


def _spans(
    factored: onnx.ModelProto, cuts: Sequence[str], ends: Sequence[str], trainable: set[str]
) -> list[tuple[list[str], list[str]]]:
    """Return the blocks: the tensors at their ends, and the names that are trained in them.

    A block ends as late as possible before the next one begins, at the single tensor of a cut. The last block ends at the
    outputs of the graph, of which there may be several. A tensor that several blocks use is trained in the first of them: later
    blocks are fitted to outputs that it has already given.
    """
    spans: list[tuple[list[str], list[str]]] = []
    names: list[str] = []
    pending = ""
    earlier: set[str] = set()
    candidates = {*cuts, *(ends if len(ends) == 1 else ())}
    ending = _ending(factored)
    for node in factored.graph.node:
        own = [name for name in node.input if name in trainable and name not in earlier]
        if own and pending:
            spans.append(([pending], list(dict.fromkeys(names))))
            earlier.update(names)
            names, pending = [], ""
            own = [name for name in own if name not in earlier]
        names += own
        ready = [name for name in node.output if name in candidates]
        if ready and names and (pending or not ending or node.op_type in ending):
            pending = ready[0]
    if pending:
        spans.append(([pending], list(dict.fromkeys(names))))
    elif names:
        spans.append((list(ends), list(dict.fromkeys(names))))
    return spans


def _ending(model: onnx.ModelProto) -> frozenset[str]:
    """Return the operators that end a block: sums of branches and activations. None in a graph without branches."""
    constants = {tensor.name for tensor in model.graph.initializer}
    joins = any(node.op_type == "Add" and not any(name in constants for name in node.input) for node in model.graph.node)
    return frozenset({"Relu", "Add", "Clip", "HardSwish"}) if joins else frozenset()


def _train(
    student: OnnxModule, inputs: Pieces, targets: Pieces, names: Iterable[str], settings: FitSettings, seconds: float
) -> None:
    """Train some tensors to reproduce the targets; the loss is the sum of the lost shares of their variance."""
    variances = {name: variance(targets.joined(name)) for name in targets.values[0]}
    most = settings.epochs * max(1, len(inputs.values) // per_step(inputs))
    steps = Steps(student.parameters_by_name(), names, settings.rate).within(seconds, most)
    for _, pick in zip(steps, _picks(inputs, settings.seed), strict=False):
        runs = list(zip(inputs.runs(pick), targets.runs(pick), strict=True))
        for feed, target in runs:
            outputs = student(feed, list(variances))
            losses = [(outputs[name] - target[name]).square().mean() / variance for name, variance in variances.items()]
            (torch.stack(losses).sum() / len(runs)).backward()


def _picks(inputs: Pieces, seed: int) -> Iterator[list[int]]:
    """Yield the pieces of each step, without end, in a new order in each pass; a last step that would be short is left out."""
    count, size = len(inputs.values), per_step(inputs)
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, max(1, count - size + 1), size):
            yield order[start : start + size].tolist()


def _lost_share(outputs: Pieces, target: Pieces) -> float:
    """Return the lost share of the variance, averaged over the tensors."""
    shares = []
    for name in target.values[0]:
        value = target.joined(name)
        shares.append((outputs.joined(name) - value).square().mean() / variance(value))
    return float(torch.stack(shares).mean())
