"""Where the planned layers are: in the graph or in the body of one of its nodes, by the weight's name or the node's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from tensorrail_exporter.errors import GraphError
from tensorrail_exporter.fold import folded, is_constant, sources
from tensorrail_exporter.plan import LayerPlan
from tensorrail_exporter.rules import RULES, STAY_DENSE, Rule
from tensorrail_exporter.rules.emit import Names, Site

_RULE_OF = {op: rule for rule in RULES for op in rule.OPS}


def names_in(graph: gs.Graph) -> Names:
    """Return the names that are taken in a graph and in all bodies below it."""
    taken: set[str] = set()
    for inner, node in walk(graph):
        taken.add(node.name)
        taken.update(tensor.name for tensor in (*node.inputs, *node.outputs))
        taken.update(tensor.name for tensor in (*inner.inputs, *inner.outputs))
    return Names(taken)


def walk(graph: gs.Graph) -> Iterator[tuple[gs.Graph, gs.Node]]:
    """Yield every node with the graph that it stands in, those of If, Loop and Scan bodies included."""
    for node in graph.nodes:
        yield graph, node
        for value in node.attrs.values():
            for body in value if isinstance(value, list) else [value]:
                if isinstance(body, gs.Graph):
                    yield from walk(body)


def find(graph: gs.Graph, layer: LayerPlan, names: Names) -> tuple[Rule, list[Site]]:
    """Return the rule and the nodes of a planned layer, their weights folded; more than one node when they share a weight.

    `GraphError` when the layer is not there, or says why it stays dense.
    """
    called = [Site(inner, node, names) for inner, node in walk(graph) if layer.name in names_of(node)]
    # A computed tensor of that name is no weight: it stands for the node only where nothing else does.
    sites = [site for site in called if layer.name == site.node.name or _has_weight(site.node)] or called
    # A weight's name goes before a node's: nodes that only bear the name of another layer's weight are other layers.
    sites = [site for site in sites if layer.name in _weight_names(site.node)] or sites
    if not sites:
        raise GraphError(f"layer {layer.name}: not in the graph; its layers with weights are {_known(graph)}")
    rules = {id(_RULE_OF.get(site.node.op)): _RULE_OF.get(site.node.op) for site in sites}
    rule = next(iter(rules.values()))
    if len(rules) > 1 or rule is None:
        op = next((site.node.op for site in sites if site.node.op not in _RULE_OF), None)
        if op in STAY_DENSE:
            raise GraphError(f"layer {layer.name}: cannot be rewritten: {STAY_DENSE[op]}")
        ops = ", ".join(sorted({site.node.op for site in sites}))
        raise GraphError(f"layer {layer.name}: no rule rewrites {ops}; the rules take {', '.join(_RULE_OF)}")
    for site in sites:
        _fold(site, rule, graph.opset, layer)
        if why := _why_not(site.node, rule):
            raise GraphError(f"layer {layer.name}: cannot be rewritten: {why}")
    return rule, sites


def rewritable(graph: gs.Graph) -> dict[str, gs.Node]:
    """Return the nodes that a plan may name, each under the name that one would choose for it."""
    found: dict[str, gs.Node] = {}
    for inner, node in walk(graph):
        rule = _RULE_OF.get(node.op)
        if rule is None or node.domain not in (None, "", "ai.onnx"):
            continue
        weight = node.inputs[rule.weight_input(node)]
        constant = folded(weight, inner.opset, "weight")
        if constant is not None and names_of(node):
            trial = gs.Node(node.op, attrs=node.attrs, inputs=list(node.inputs))
            trial.inputs[rule.weight_input(node)] = constant
            if _why_not(trial, rule) is None:
                found.setdefault(names_of(node)[0], node)
            trial.inputs.clear()
    return found


def names_of(node: gs.Node) -> list[str]:
    """Return the names by which a plan may call a node: its weight's, with and without `.weight`, and its own."""
    return [*_weight_names(node), *([node.name] if node.name else [])]


def _weight_names(node: gs.Node) -> list[str]:
    names = []
    if rule := _RULE_OF.get(node.op):
        weight = node.inputs[rule.weight_input(node)]
        origin = (weight.name,) if isinstance(weight, gs.Constant) else sources(weight)[:1]
        names = [name for whole in (*origin, weight.name) if whole for name in (whole.removesuffix(".weight"), whole)]
    return names


def _known(graph: gs.Graph) -> str:
    named = [names_of(node)[0] for _, node in walk(graph) if _has_weight(node)]
    return ", ".join(sorted(set(named))) or "none"


def _has_weight(node: gs.Node) -> bool:
    if node.op not in _RULE_OF:
        return False
    weight = node.inputs[_RULE_OF[node.op].weight_input(node)]
    return is_constant(weight)


def _fold(site: Site, rule: Rule, opset: int, layer: LayerPlan) -> None:
    index = rule.weight_input(site.node)
    weight = site.node.inputs[index]
    if not isinstance(weight, gs.Constant):
        constant = folded(weight, opset, site.names.unique(f"{layer.name}/folded"))
        if constant is not None:
            site.node.inputs[index] = constant


def _why_not(node: gs.Node, rule: Rule) -> str | None:
    if why := rule.why_not(node):
        return why
    dtype = node.inputs[rule.weight_input(node)].dtype
    if dtype not in (np.float16, np.float32, np.float64):
        return f"its weight is of type {dtype}; expected float16, float32 or float64"
    return None
