"""Fit the cores to the activations of the dense network, block by block, without labels.

The graph is divided where the rest of it depends on a single tensor: in a residual network after every block. Each block of the
factored graph is trained to reproduce the output of the dense block, with the output of the fitted blocks before it as input.
Memory and time are those of one block at a time. A final pass can fit all blocks together; it is off by default, since with 500
images it lost accuracy on other images (results/calibration.md). Fitting block by block to a few unlabelled inputs follows
BRECQ (Li et al., ICLR 2021), a method for quantization.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor

from tensorrail_exporter.calibrate.inputs import Calibration
from tensorrail_exporter.plans.plan import Plan
from tensorrail_runtime.errors import GraphError
from tensorrail_runtime.graphs.files import descendants
from tensorrail_runtime.progress import Progress, silent
from tensorrail_runtime.records import Record
from tensorrail_trainer.fit.module import OnnxModule

_RATE = 0.01  # relative to the root mean square of a tensor: Adam's first steps change values by this share
_BATCH = 32
_STAGE = "fitting to activations"


@dataclass(frozen=True)
class FitSettings:
    """Settings of the fit."""

    block_epochs: int = 12
    """Passes over the calibration inputs for each block."""
    epochs: int = 0
    """Passes over the calibration inputs for the whole graph, after the blocks."""
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
    feeds = _divided(dense, teacher, calibration)
    ends = [value.name for value in dense.graph.output]
    spans = _spans(factored, _shared_cuts(dense, factored, teacher, feeds), ends, set(trainable))
    rows = []
    student_inputs, teacher_outputs = feeds, feeds
    for number, (tensors, names) in enumerate(spans):
        teacher_outputs = _run(teacher, teacher_outputs, tensors)
        target = teacher_outputs.floating()
        if names and target and settings.block_epochs:
            progress(_STAGE, 0.6 * number / len(spans), ", ".join(tensors))
            row, student_inputs = _fit_block(student, student_inputs, target, (tensors, names), settings)
            rows.append(row)
        else:
            student_inputs = _run(student, student_inputs, tensors)
    if settings.epochs:
        progress(_STAGE, 0.6, "the whole graph")
        trained = (name for tensors, names in spans if names for name in tensors)
        targets = _run(teacher, feeds, list(dict.fromkeys([*trained, *ends]))).floating()
        _train(
            student,
            feeds,
            targets,
            trainable,
            settings.epochs,
            settings,
            on_share=lambda share: progress(_STAGE, 0.6 + 0.4 * share, "the whole graph"),
        )
    progress(_STAGE, 1.0)
    return CalibrationFit(student.write_back(factored), tuple(rows))


def _fit_block(
    student: OnnxModule, inputs: _Pieces, target: _Pieces, span: tuple[list[str], list[str]], settings: FitSettings
) -> tuple[BlockFit, _Pieces]:
    """Fit one block, and return its errors and its outputs. A block that the fit does not improve keeps its values."""
    tensors, names = span
    before = _lost_share(_run(student, inputs, tensors), target)
    parameters = student.parameters_by_name()
    start = {name: parameters[name].detach().clone() for name in names}
    _train(student, inputs, target, names, settings.block_epochs, settings)
    outputs = _run(student, inputs, tensors)
    after = _lost_share(outputs, target)
    if not after < before:
        with torch.no_grad():
            for name, value in start.items():
                parameters[name].copy_(value)
        outputs, after = _run(student, inputs, tensors), before
    return BlockFit(block=", ".join(tensors), tensors=len(names), before=before, after=after), outputs


def _shared_cuts(dense: onnx.ModelProto, factored: onnx.ModelProto, teacher: OnnxModule, feeds: _Pieces) -> list[str]:
    """Return the tensors at which both graphs can be divided; of samples, those that depend on one sample alone."""
    of_factored = set(cut_points(factored))
    cuts = [name for name in cut_points(dense) if name in of_factored]
    if not feeds.together:
        return cuts
    independent = _sample_by_sample(teacher, feeds.values[:3], cuts)
    return [name for name in cuts if name in independent]


@dataclass(frozen=True)
class _Pieces:
    """Tensors by name, divided into samples, which can be joined to batches, or into the fixed batches of the graph."""

    values: tuple[dict[str, Tensor], ...]
    together: bool

    def __bool__(self) -> bool:
        return bool(self.values and self.values[0])

    def floating(self) -> _Pieces:
        """Return only the floating-point tensors, which have a difference."""
        kept = tuple({name: value for name, value in piece.items() if value.is_floating_point()} for piece in self.values)
        return _Pieces(kept, self.together)

    def runs(self, picks: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return the feeds that run the chosen pieces: one joined batch if samples can be joined, else each piece."""
        chosen = [self.values[k] for k in picks]
        return [_join(chosen)] if self.together else chosen

    def joined(self, name: str) -> Tensor:
        """Return a tensor over all pieces; all its values in one row where its shape differs between pieces."""
        values = [piece[name] for piece in self.values]
        alike = all(value.dim() and value.shape[1:] == values[0].shape[1:] for value in values)
        return torch.cat(values if alike else [value.reshape(-1) for value in values])


def _divided(dense: onnx.ModelProto, teacher: OnnxModule, calibration: Calibration) -> _Pieces:
    """Divide the calibration inputs into samples if the graph computes each one independently, else into its fixed batches.

    Feeds whose samples are not along the first axis of every input stay whole.
    """
    feeds = [{name: torch.from_numpy(array) for name, array in feed.items()} for feed in calibration.feeds]
    by_rows = all(array.ndim and calibration.axes.get(name, 0) == 0 for name, array in calibration.feeds[0].items())
    if calibration.whole or not by_rows:
        whole = tuple({name: _channels_last(value) for name, value in feed.items()} for feed in feeds)
        return _Pieces(whole, together=False)
    samples = tuple(
        {name: _channels_last(value[k : k + 1]) for name, value in feed.items()}
        for feed in feeds
        for k in range(len(next(iter(feed.values()))))
    )
    ends = [value.name for value in dense.graph.output]
    if _sample_by_sample(teacher, samples[:3], ends) == set(ends):
        return _Pieces(samples, together=True)
    stored = {tensor.name for tensor in dense.graph.initializer}
    sizes = {
        axis.dim_value
        for value in dense.graph.input
        if value.name not in stored
        for axis in value.type.tensor_type.shape.dim[:1]
        if axis.dim_value > 0
    }
    if not sizes:
        raise GraphError(
            "expected outputs with one row per sample, or a fixed batch size, found neither; fix the batch size or skip the fit"
        )
    size = min(sizes)
    fixed = [
        {name: _channels_last(value[at : at + size]) for name, value in feed.items()}
        for feed in feeds
        for at in range(0, len(next(iter(feed.values()))), size)
    ]
    return _Pieces(tuple(fixed), together=False)


@torch.no_grad()
def _sample_by_sample(module: OnnxModule, samples: Sequence[dict[str, Tensor]], outputs: Sequence[str]) -> set[str]:
    """Return the tensors of a batch that are equal to the joined tensors of its samples, each run separately."""
    try:
        together = module(_join(samples), list(outputs))
        separate = _join([module(sample, list(outputs)) for sample in samples])
    except (GraphError, RuntimeError, IndexError, ValueError):
        return set()
    return {name for name in outputs if _close(together[name], separate[name])}


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not b.numel():
        return a.shape == b.shape
    a, b = a.double(), b.double()
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def _join(pieces: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: _channels_last(torch.cat([piece[name] for piece in pieces])) for name in pieces[0]}


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
            trainable += [name for name in node.input[1:] if name in initializers]
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
    outputs of the graph, of which there may be several.
    """
    spans: list[tuple[list[str], list[str]]] = []
    names: list[str] = []
    pending = ""
    candidates = {*cuts, *(ends if len(ends) == 1 else ())}
    ending = _ending(factored)
    for node in factored.graph.node:
        own = [name for name in node.input if name in trainable]
        if own and pending:
            spans.append(([pending], list(dict.fromkeys(names))))
            names, pending = [], ""
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
    student: OnnxModule,
    inputs: _Pieces,
    targets: _Pieces,
    names: Iterable[str],
    epochs: int,
    settings: FitSettings,
    on_share: Callable[[float], None] = lambda _: None,
) -> None:
    """Train some tensors to reproduce the targets; the loss is the sum of the lost shares of their variance."""
    parameters = student.parameters_by_name()
    trained = [parameters[name] for name in names]
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    groups = []
    for parameter in trained:
        parameter.requires_grad_(True)
        size = float(parameter.detach().square().mean().sqrt())
        groups.append({"params": [parameter], "lr": settings.rate * max(size, 1e-3)})
    base_rates = [float(group["lr"]) for group in groups]  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    variances = {name: _variance(targets.joined(name)) for name in targets.values[0]}
    count = len(inputs.values)
    rows = next((len(value) for value in inputs.values[0].values() if value.dim()), 1)
    size = _BATCH if inputs.together else max(1, _BATCH // rows)
    generator = torch.Generator().manual_seed(settings.seed)
    steps, step = epochs * max(1, count // size), 0
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        for start in range(0, max(1, count - size + 1), size):
            pick = order[start : start + size].tolist()
            for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad(set_to_none=True)
            runs = list(zip(inputs.runs(pick), targets.runs(pick), strict=True))
            for feed, target in runs:
                outputs = student(feed, list(variances))
                losses = [(outputs[name] - target[name]).square().mean() / variance for name, variance in variances.items()]
                (torch.stack(losses).sum() / len(runs)).backward()
            optimizer.step()
            step += 1
            on_share(step / steps)
    for parameter in parameters.values():
        parameter.requires_grad_(False)


@torch.no_grad()
def _run(module: OnnxModule, inputs: _Pieces, outputs: Sequence[str]) -> _Pieces:
    if not inputs.together:
        return _Pieces(tuple(module(piece, list(outputs)) for piece in inputs.values), together=False)
    samples: list[dict[str, Tensor]] = []
    for start in range(0, len(inputs.values), _BATCH):
        (feed,) = inputs.runs(range(start, min(start + _BATCH, len(inputs.values))))
        values = module(feed, list(outputs))
        count = min(_BATCH, len(inputs.values) - start)
        by_sample = {name: value.split(len(value) // count) for name, value in values.items()}  # one row or several per sample
        samples += [{name: rows[k] for name, rows in by_sample.items()} for k in range(count)]
    return _Pieces(tuple(samples), together=True)


def _variance(value: Tensor) -> Tensor:
    if value.dim() == 0 or len(value) < 2:
        value = value.reshape(-1)
    return value.float().var(0, correction=0).mean().clamp_min(1e-12)


def _lost_share(outputs: _Pieces, target: _Pieces) -> float:
    """Return the lost share of the variance, averaged over the tensors."""
    shares = []
    for name in target.values[0]:
        value = target.joined(name)
        shares.append((outputs.joined(name) - value).square().mean() / _variance(value))
    return float(torch.stack(shares).mean())


def _channels_last(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value
