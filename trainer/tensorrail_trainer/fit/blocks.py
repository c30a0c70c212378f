"""Cores fitted to the activations of the dense network, block by block, without labels.

A graph is cut where a single tensor holds all that the rest needs: in a residual network behind every block. Each block of the
factored graph is trained to give the dense block's output from the input that the fitted blocks before it really give, so
that no block needs more memory or time than it has itself. A last pass over the whole graph can fit all blocks together; it is
off by default, since with 500 images it lost accuracy on others (results/calibration.md). The idea of fitting block by block to
few unlabelled inputs is that of BRECQ (Li et al., ICLR 2021) for quantization.
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
from tensorrail_runtime.records import Record
from tensorrail_trainer.fit.module import OnnxModule

_RATE = 0.01  # of a tensor's root mean square: Adam's first steps change values by that share
_BATCH = 32


@dataclass(frozen=True)
class FitSettings:
    """Passes over the calibration inputs: `block_epochs` for every block alone, `epochs` for the whole graph."""

    block_epochs: int = 12
    epochs: int = 0
    rate: float = _RATE
    seed: int = 0


class BlockFit(Record):
    """One block: the share of the variance of its output that is lost, before and after the fit, on the calibration inputs."""

    block: str
    tensors: int
    before: float
    after: float


@dataclass(frozen=True)
class CalibrationFit:
    """The factored graph with fitted values, and how well each block now keeps the dense activations."""

    model: onnx.ModelProto
    blocks: tuple[BlockFit, ...]


def fit_blocks(
    dense: onnx.ModelProto,
    factored: onnx.ModelProto,
    plan: Plan,
    calibration: Calibration,
    settings: FitSettings | None = None,
    on_share: Callable[[float, str], None] = lambda _, __: None,
) -> CalibrationFit:
    """Return the factored graph with its cores, biases and batch-norms fitted to the dense graph's activations.

    Raises `GraphError` for a graph with an operator that cannot be run in torch, and for one whose inputs are not one row a
    sample where its batch is not fixed.
    """
    settings = settings or FitSettings()
    trainable = trainable_names(factored, plan)
    teacher, student = OnnxModule(dense), OnnxModule(factored, trainable)
    feeds = _pieces(dense, teacher, calibration)
    ends = [value.name for value in dense.graph.output]
    cuts = [name for name in cut_points(dense) if name in cut_points(factored)]
    if feeds.together:
        apart = _sample_by_sample(teacher, feeds.values[:3], cuts)
        cuts = [name for name in cuts if name in apart]
    spans = _spans(factored, cuts, ends, set(trainable))
    rows = []
    given, wanted = feeds, feeds
    for number, (tensors, names) in enumerate(spans):
        block = ", ".join(tensors)
        wanted = _run(teacher, wanted, tensors)
        target = wanted.floating()
        if names and target and settings.block_epochs:
            on_share(0.6 * number / len(spans), block)
            before = _lost(_run(student, given, tensors), target)
            known = student.parameters_by_name()
            start = {name: known[name].detach().clone() for name in names}
            _train(student, given, target, names, settings.block_epochs, settings)
            fitted = _run(student, given, tensors)
            after = _lost(fitted, target)
            if not after < before:
                with torch.no_grad():
                    for name, value in start.items():
                        known[name].copy_(value)
                fitted, after = _run(student, given, tensors), before
            given = fitted
            rows.append(BlockFit(block=block, tensors=len(names), before=before, after=after))
        else:
            given = _run(student, given, tensors)
    if settings.epochs:
        on_share(0.6, "the whole graph")
        trained = (name for tensors, names in spans if names for name in tensors)
        targets = _run(teacher, feeds, list(dict.fromkeys([*trained, *ends])))
        _train(
            student,
            feeds,
            targets.floating(),
            trainable,
            settings.epochs,
            settings,
            on_share=lambda s: on_share(0.6 + 0.4 * s, "the whole graph"),
        )
    on_share(1.0, "")
    return CalibrationFit(student.write_back(factored), tuple(rows))


@dataclass(frozen=True)
class _Pieces:
    """Tensors by name, in pieces that a graph runs whole: samples, which may be run together, or its own fixed batches."""

    values: tuple[dict[str, Tensor], ...]
    together: bool

    def __bool__(self) -> bool:
        return bool(self.values and self.values[0])

    def floating(self) -> _Pieces:
        """Return those that have a difference."""
        kept = tuple({name: value for name, value in piece.items() if value.is_floating_point()} for piece in self.values)
        return _Pieces(kept, self.together)

    def runs(self, picks: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return some pieces as they are run: joined where they may be."""
        chosen = [self.values[k] for k in picks]
        return [_join(chosen)] if self.together else chosen

    def joined(self, name: str) -> Tensor:
        """Return all values of a tensor."""
        return torch.cat([piece[name] for piece in self.values])


def _pieces(dense: onnx.ModelProto, teacher: OnnxModule, calibration: Calibration) -> _Pieces:
    """Return the calibration inputs as samples where the graph computes them one by one, else in its own fixed batches."""
    feeds = [{name: torch.from_numpy(array) for name, array in feed.items()} for feed in calibration.feeds]
    samples = tuple(
        {name: _last(value[k : k + 1]) for name, value in feed.items()}
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
        {name: _last(value[at : at + size]) for name, value in feed.items()}
        for feed in feeds
        for at in range(0, len(next(iter(feed.values()))), size)
    ]
    return _Pieces(tuple(fixed), together=False)


@torch.no_grad()
def _sample_by_sample(module: OnnxModule, samples: Sequence[dict[str, Tensor]], outputs: Sequence[str]) -> set[str]:
    """Return the tensors that hold, for samples that are run together, what each gives alone, one after the other."""
    try:
        together = module(_join(samples), list(outputs))
        wanted = _join([module(sample, list(outputs)) for sample in samples])
    except (GraphError, RuntimeError, IndexError, ValueError):
        return set()
    return {name for name in outputs if _alike(together[name], wanted[name])}


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not b.numel():
        return a.shape == b.shape
    a, b = a.double(), b.double()
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def _join(pieces: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: _last(torch.cat([piece[name] for piece in pieces])) for name in pieces[0]}


def trainable_names(factored: onnx.ModelProto, plan: Plan) -> list[str]:
    """Return what a fit may change: cores, biases of rewritten layers, scale and shift of the norms behind them.

    What another node reads as well, or the graph gives out, stays: a fit would change layers that are not planned.
    """
    initializers = {tensor.name for tensor in factored.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    layers = tuple(f"{layer.name}/" for layer in plan.layers)
    found: list[str] = []
    touched: set[str] = set()
    outside = {value.name for value in factored.graph.output}
    outside |= {name for body in descendants(factored.graph) for node in body.node for name in node.input}
    for node in factored.graph.node:
        own = node.name.startswith(layers) or any(name.startswith(layers) for name in node.input if name in initializers)
        if own:
            found += [name for name in node.input[1:] if name in initializers]
            touched.update(node.output)
        elif node.op_type == "BatchNormalization" and node.input[0] in touched:
            found += [name for name in node.input[1:3] if name in initializers]
        elif node.op_type == "Add" and any(name in touched for name in node.input):
            found += [name for name in node.input if name in initializers]
        else:
            outside.update(node.input)
    return [name for name in dict.fromkeys(found) if name not in outside]


def cut_points(model: onnx.ModelProto) -> list[str]:
    """Return, in order, the tensors behind which nothing computed earlier is needed any more."""
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    last: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        for name in node.input:
            last[name] = index
    for value in graph.output:
        last[value.name] = len(graph.node)
    live = {value.name for value in graph.input if value.name not in constants and value.name in last}
    found: list[str] = []
    derived = _constant_tensors(graph, constants)
    for index, node in enumerate(graph.node):
        live |= {name for name in node.output if last.get(name, -1) > index and name not in derived}
        live -= {name for name in live if last[name] <= index}
        if len(live) == 1 and index < len(graph.node) - 1:
            (only,) = live
            if only in node.output and (not found or found[-1] != only):
                found.append(only)
    return found


def _constant_tensors(graph: onnx.GraphProto, constants: set[str]) -> set[str]:
    """Return the tensors that depend on no input."""
    known = set(constants) | {""}
    for node in graph.node:
        if all(name in known for name in node.input):
            known.update(node.output)
    return known


def _spans(
    factored: onnx.ModelProto, cuts: Sequence[str], ends: Sequence[str], trainable: set[str]
) -> list[tuple[list[str], list[str]]]:
    """Return the blocks: their last tensors and what is trained in them. One ends as late as it can before the next begins.

    The last block ends in the graph's outputs, of which there may be several; the others in the one tensor of a cut.
    """
    spans: list[tuple[list[str], list[str]]] = []
    names: list[str] = []
    pending = ""
    wanted = {*cuts, *(ends if len(ends) == 1 else ())}
    ending = _ending(factored)
    for node in factored.graph.node:
        own = [name for name in node.input if name in trainable]
        if own and pending:
            spans.append(([pending], list(dict.fromkeys(names))))
            names, pending = [], ""
        names += own
        ready = [name for name in node.output if name in wanted]
        if ready and names and (pending or not ending or node.op_type in ending):
            pending = ready[0]
    if pending:
        spans.append(([pending], list(dict.fromkeys(names))))
    elif names:
        spans.append((list(ends), list(dict.fromkeys(names))))
    return spans


def _ending(model: onnx.ModelProto) -> frozenset[str]:
    """Return the operators that end a block: where branches meet and are activated; none in a graph without branches."""
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
    """Train some tensors to give the targets: the mean of their lost shares of variance is the loss."""
    known = student.parameters_by_name()
    chosen = [known[name] for name in names]
    for parameter in known.values():
        parameter.requires_grad_(False)
    groups = []
    for parameter in chosen:
        parameter.requires_grad_(True)
        size = float(parameter.detach().square().mean().sqrt())
        groups.append({"params": [parameter], "lr": settings.rate * max(size, 1e-3)})
    base = [float(group["lr"]) for group in groups]  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    spreads = {name: _spread(targets.joined(name)) for name in targets.values[0]}
    count = len(inputs.values)
    size = _BATCH if inputs.together else max(1, _BATCH // len(next(iter(inputs.values[0].values()))))
    generator = torch.Generator().manual_seed(settings.seed)
    steps, step = epochs * max(1, count // size), 0
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        for start in range(0, max(1, count - size + 1), size):
            pick = order[start : start + size].tolist()
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad(set_to_none=True)
            runs = list(zip(inputs.runs(pick), targets.runs(pick), strict=True))
            for feed, wanted in runs:
                made = student(feed, list(spreads))
                gaps = [(made[name] - wanted[name]).square().mean() / spread for name, spread in spreads.items()]
                (torch.stack(gaps).sum() / len(runs)).backward()
            optimizer.step()
            step += 1
            on_share(step / steps)
    for parameter in known.values():
        parameter.requires_grad_(False)


@torch.no_grad()
def _run(module: OnnxModule, inputs: _Pieces, outputs: Sequence[str]) -> _Pieces:
    if not inputs.together:
        return _Pieces(tuple(module(piece, list(outputs)) for piece in inputs.values), together=False)
    found: list[dict[str, Tensor]] = []
    for start in range(0, len(inputs.values), _BATCH):
        (feed,) = inputs.runs(range(start, min(start + _BATCH, len(inputs.values))))
        made = module(feed, list(outputs))
        count = min(_BATCH, len(inputs.values) - start)
        parts = {name: value.split(len(value) // count) for name, value in made.items()}  # one row a sample, or several
        found += [{name: part[k] for name, part in parts.items()} for k in range(count)]
    return _Pieces(tuple(found), together=True)


def _spread(value: Tensor) -> Tensor:
    if value.dim() == 0 or len(value) < 2:
        value = value.reshape(-1)
    return value.float().var(0, correction=0).mean().clamp_min(1e-12)


def _lost(made: _Pieces, target: _Pieces) -> float:
    """Return the lost share of the variance, the mean over tensors."""
    shares = []
    for name in target.values[0]:
        value = target.joined(name)
        shares.append((made.joined(name) - value).square().mean() / _spread(value))
    return float(torch.stack(shares).mean())


def _last(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value
