"""Dense graph + plan + cores → factored graph: rewrite → remove unused → check."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from tensorrail_exporter.contraction import Conv, MatMul, Step, describe
from tensorrail_exporter.cores import Cores, check_cores
from tensorrail_exporter.errors import GraphError
from tensorrail_exporter.formats import format_of
from tensorrail_exporter.graph_io import check_model
from tensorrail_exporter.plan import LayerPlan, Plan
from tensorrail_exporter.rules import RULES, Rule
from tensorrail_runtime.records import Record


class LayerRewrite(Record):
    """What was done to one layer. Parameters count the weight alone, without bias."""

    layer: str
    op: str
    nodes: int  # how many nodes shared the weight; all were rewritten
    shape: tuple[int, ...]
    format: str
    modes: tuple[int, ...]
    ranks: tuple[int, ...]  # as they are in the cores, clamped
    merge: str
    merged: tuple[tuple[int, ...], ...]  # which cores each stored constant holds; one index: the trained core, exactly
    steps: str
    dense_params: int
    core_params: int
    stored_params: int
    weight_error: float  # ‖W − reconstruct(cores)‖ / ‖W‖, W as it stood in the graph


class Rewrites(Record):
    """All rewritten layers of a graph, as a file."""

    layers: tuple[LayerRewrite, ...]


@dataclass(frozen=True)
class Factored:
    """The factored graph and what was done to each layer."""

    model: onnx.ModelProto
    layers: tuple[LayerRewrite, ...]


def factorize(model: onnx.ModelProto, plan: Plan, cores: Cores) -> Factored:
    """Return the graph with every planned layer rewritten to the contraction of its cores.

    Raises `GraphError` for a planned layer that is not in the graph or cannot be rewritten, `PlanError` for modes, ranks
    or cores that do not fit. The argument is not changed.
    """
    graph = gs.import_onnx(model)
    rewrites = []
    for layer in plan.layers:
        rule, nodes = _find(graph, layer)
        spec = rule.layer(nodes[0])
        weight = rule.weight(nodes[0])
        steps = _contract(rule, nodes[0], layer, cores)
        for node in nodes:
            rule.rewrite(graph, node, steps, layer.name)
        rewrites.append(_record(layer, rule.OP, len(nodes), spec.shape, weight, cores[layer.name], steps))
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    factored = _export(graph, model)
    check_model(factored)
    return Factored(factored, tuple(rewrites))


def reconstruct(model: onnx.ModelProto, plan: Plan, cores: Cores) -> onnx.ModelProto:
    """Return the graph with every planned weight replaced by the dense weight that its cores stand for.

    Against the dense graph it shows the approximation error alone, against the factored graph the numerical one.
    """
    graph = gs.import_onnx(model)
    for layer in plan.layers:
        rule, nodes = _find(graph, layer)
        spec = rule.layer(nodes[0])
        layer.check(spec.shape)
        check_cores(layer, cores[layer.name], spec.shape)
        weight = format_of(layer.format).reconstruct(cores[layer.name], spec.shape)
        for index, node in enumerate(nodes):
            rule.replace_weight(node, weight.astype(node.inputs[1].dtype), f"{layer.name}/dense{index}")
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    return _export(graph, model)


def decompose_graph(model: onnx.ModelProto, plan: Plan) -> dict[str, list[np.ndarray]]:
    """Return cores for every planned layer, decomposed from the weights that stand in the graph."""
    graph = gs.import_onnx(model)
    cores = {}
    for layer in plan.layers:
        rule, nodes = _find(graph, layer)
        layer.check(rule.layer(nodes[0]).shape)
        weight = rule.weight(nodes[0])
        wide = weight if weight.dtype == np.float64 else weight.astype(np.float32)
        if not np.isfinite(wide).all():
            raise GraphError(f"layer {layer.name}: its weight holds NaN or infinite values and cannot be decomposed")
        cores[layer.name] = format_of(layer.format).decompose(wide, layer.modes, layer.ranks)
    return cores


def _find(graph: gs.Graph, layer: LayerPlan) -> tuple[Rule, list[gs.Node]]:
    """Return the rule and the nodes of a planned layer; more than one node when they share the weight."""
    nodes = [node for node in graph.nodes if layer.name in _names(node)]
    if not nodes:
        known = sorted({next(iter(_names(node))) for node in _candidates(graph)})
        raise GraphError(f"layer {layer.name}: not in the graph; its layers with weights are {', '.join(known) or 'none'}")
    for rule in RULES:
        if all(node.op == rule.OP for node in nodes):
            for node in nodes:
                if why := rule.why_not(node):
                    raise GraphError(f"layer {layer.name}: cannot be rewritten: {why}")
            return rule, nodes
    ops = ", ".join(sorted({node.op for node in nodes}))
    raise GraphError(f"layer {layer.name}: no rule rewrites {ops}; the rules take {', '.join(rule.OP for rule in RULES)}")


def _names(node: gs.Node) -> list[str]:
    """Return the names by which a plan may call a node: its weight's, with and without `.weight`, and its own."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    names = []
    if isinstance(weight, gs.Constant) or (weight is not None and node.op in {rule.OP for rule in RULES}):
        names = [weight.name.removesuffix(".weight"), weight.name]
    return [*names, *([node.name] if node.name else [])]


def _candidates(graph: gs.Graph) -> Iterator[gs.Node]:
    ops = {rule.OP for rule in RULES}
    return (node for node in graph.nodes if node.op in ops and isinstance(node.inputs[1], gs.Constant))


def _contract(rule: Rule, node: gs.Node, layer: LayerPlan, cores: Cores) -> tuple[Step, ...]:
    spec = rule.layer(node)
    layer.check(spec.shape)
    if layer.name not in cores:
        raise GraphError(f"layer {layer.name}: planned, and no cores came for it; cores came for {', '.join(cores)}")
    check_cores(layer, cores[layer.name], spec.shape)
    return format_of(layer.format).contraction(cores[layer.name], spec, layer.merge)


def _record(
    layer: LayerPlan,
    op: str,
    nodes: int,
    shape: tuple[int, ...],
    weight: np.ndarray,
    cores: Sequence[np.ndarray],
    steps: tuple[Step, ...],
) -> LayerRewrite:
    form = format_of(layer.format)
    constants = [step for step in steps if isinstance(step, Conv | MatMul)]
    wide = weight.astype(np.float64)
    residual = wide - form.reconstruct([core.astype(np.float64) for core in cores], shape)
    return LayerRewrite(
        layer=layer.name,
        op=op,
        nodes=nodes,
        shape=shape,
        format=layer.format,
        modes=layer.modes,
        ranks=form.clamp(layer.modes, layer.ranks),
        merge=layer.merge,
        merged=tuple(step.cores for step in constants),
        steps=describe(steps),
        dense_params=weight.size,
        core_params=sum(core.size for core in cores),
        stored_params=sum(step.weight.size for step in constants),
        weight_error=float(np.linalg.norm(residual) / (np.linalg.norm(wide) or 1.0)),
    )


def _export(graph: gs.Graph, original: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph as a model with the original's IR version, opsets, functions and metadata."""
    exported = gs.export_onnx(graph, do_type_check=False)
    result = onnx.ModelProto()
    result.CopyFrom(original)
    result.graph.CopyFrom(exported.graph)
    return result
