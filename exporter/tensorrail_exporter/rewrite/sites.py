"""Finds planned layers by the name of their weight or node, in a graph and in the bodies of its nodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import onnx_graphsurgeon as gs

from tensorrail_exporter.graphs.fold import folded, is_constant, is_standard, sources, tensors_above, type_name
from tensorrail_exporter.rewrite.rules import RULES, SECOND_RULES, STAY_DENSE, Rule, gather
from tensorrail_exporter.rewrite.rules.emit import Names, Site
from tensorrail_runtime.errors import GraphError
from tensorrail_runtime.graphs.operators import DOMAINS, MACS

_Answer = TypeVar("_Answer")
_RULE_OF = {op: rule for rule in RULES for op in rule.OPS}
_SECOND_RULE_OF = {op: rule for rule in SECOND_RULES for op in rule.OPS}


def walk(graph: gs.Graph) -> Iterator[tuple[gs.Graph, gs.Node]]:
    """Yield every node and the graph that contains it, including the nodes in the bodies of If, Loop and Scan."""
    for node in graph.nodes:
        yield graph, node
        for value in node.attrs.values():
            for body in value if isinstance(value, list) else [value]:
                if isinstance(body, gs.Graph):
                    yield from walk(body)


class NamedLayers:
    """The layers of one graph, by every name that a plan may use for them.

    The index is built once and stays valid while layers are rewritten; it does not include nodes that a rewriting adds. `names`
    holds the names in use in the graph and in all bodies of its nodes.
    """

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.names = _names_in(graph)
        self._sites: dict[str, list[Site]] = {}
        self._second: dict[str, list[Site]] = {}  # by the names of second weights
        for inner, node in walk(graph):
            for name in _all_names(node):
                self._sites.setdefault(name, []).append(Site(inner, node, self.names))
            for name in _second_names(node):
                self._second.setdefault(name, []).append(Site(inner, node, self.names))

    def find(self, name: str) -> tuple[Rule, list[Site]]:
        """Return the rule and the nodes of a layer, and fold a computed weight to a constant.

        Args:
            name: the name of the layer's weight, with or without `.weight`, of its node, or of its output.

        Returns:
            The rule that rewrites the layer, and its nodes: several if they share the weight.

        Raises:
            GraphError: the layer is not in the graph, cannot be rewritten, or the name refers to several weights.

        """
        sites = self._called(name)
        if second := self._called_second(name, sites):
            return _second_found(name, second)
        if not sites:
            raise GraphError(f"layer {name}: not in the graph; its layers with weights are {_known(self.graph)}")
        other = next((site.node for site in sites if _rule_of(site.node) is None), None)
        if other is not None:
            if is_standard(other) and other.op in STAY_DENSE:
                raise GraphError(f"layer {name}: cannot be rewritten: {STAY_DENSE[other.op]}")
            ops = ", ".join(sorted({_full_name(site.node) for site in sites}))
            raise GraphError(f"layer {name}: no rule rewrites {ops}; expected one of {', '.join(_RULE_OF)}")
        groups = _by_weight(sites)
        if len(groups) > 1:
            own_names = ", ".join(filter(None, (self._own_name(group[0].node) for group in groups)))
            divided = len({group[0].node.attrs.get("group", 1) for group in groups}) > 1
            raise GraphError(
                f"layer {name}: expected nodes that share one weight, got {len(sites)} nodes with {len(groups)} "
                f"different weights{' or numbers of groups' if divided else ''}; "
                f"plan each weight by its own name: {own_names or 'none has one: give the nodes names'}"
            )
        for site in sites:
            rule = _RULE_OF[_full_name(site.node)]  # the same for all sites, since they are one group
            _require_rewritable(site, rule, name)
        return rule, sites

    def rewritable(self) -> dict[str, gs.Node]:
        """Return one node of every layer that can be rewritten, by the name that a plan should use.

        If a name refers to several weights, such as the parts of a matrix that is split, each is listed under its own name.
        """
        node_by_name: dict[str, gs.Node] = {}
        for inner, node in walk(self.graph):
            site = Site(inner, node, self.names)
            if _on_folded(site, lambda *_: True) and (name := self._own_name(node)):
                node_by_name.setdefault(name, node)
            second = _second_rule_of(node)
            if second and _on_folded(site, lambda *_: True, second) and (name := self._own_second_name(node)):
                node_by_name.setdefault(name, node)
        return node_by_name

    def refused(self) -> list[tuple[str, str, int, str]]:
        """Return the weights that cannot be rewritten: name, operator, number of values in the weight, reason."""
        rows, seconds = [], {}
        for inner, node in walk(self.graph):
            site = Site(inner, node, self.names)
            reason, weight = _refusal(site)
            if reason:
                name = next(iter(_all_names(node)), "") or node.name or next((t.name for t in node.outputs if t.name), node.op)
                rows.append((name, _full_name(node), _size(weight), reason))
            reason, weight = _second_refusal(site)
            if reason and (second := self._own_second_name(node)):
                seconds[second] = second, node.op, _size(weight), reason
        return [*rows, *seconds.values()]

    def _called(self, name: str) -> list[Site]:
        """Return the nodes that a name refers to: by the name of the weight, else of the node, else of the output."""
        # Names change: a rewritten node has no outputs, and a folded weight loses the names of the tensors it came from.
        sites = [site for site in self._sites.get(name, ()) if name in _all_names(site.node)]
        called = [site for site in sites if name in names_of(site.node)]
        # A computed tensor of that name is not a weight: its node is returned only if no other node matches.
        matching = [site for site in called if name == site.node.name or _has_weight(site.node)] or called
        # Weight names take precedence: a node that is named like the weight of another layer is a different layer.
        matching = [site for site in matching if name in _weight_names(site.node)] or matching
        # The name of a table that an embedding shares with a product is the product's; the embedding has that of its node.
        matching = [site for site in matching if site.node.op not in gather.OPS] or matching
        return matching or [site for site in sites if _has_weight(site.node)]

    def _called_second(self, name: str, first: list[Site]) -> list[Site]:
        """Return the nodes whose second weight has a name, unless it is also the name of the first weight of a node."""
        if any(name in _weight_names(site.node) for site in first):
            return []
        return [site for site in self._second.get(name, ()) if name in _second_names(site.node)]

    def _own_second_name(self, node: gs.Node) -> str | None:
        """Return the first name of a node's second weight, unless the first weight of a node has it."""
        return next((name for name in _second_names(node) if self._called_second(name, self._called(name))), None)

    def _own_name(self, node: gs.Node) -> str | None:
        """Return the first name of a node that refers to its weight only."""
        for name in _all_names(node):
            sites = self._called(name)
            if any(site.node is node for site in sites) and len(_by_weight(sites)) == 1:
                return name
        return None


def _second_found(name: str, sites: list[Site]) -> tuple[Rule, list[Site]]:
    """Return the rule and the nodes of a layer that is their second weight. Raises `GraphError` if it cannot be rewritten."""
    for site in sites:
        rule = _SECOND_RULE_OF[site.node.op]
        _require_rewritable(site, rule, name)
    first, *others = (rule.weight(site.node) for site in sites)
    if not all(np.array_equal(first, other, equal_nan=True) for other in others):
        raise GraphError(
            f"layer {name}: expected nodes that share one weight, got {len(sites)} nodes with different weights of that name; "
            "give each weight its own name"
        )
    return rule, sites


def _require_rewritable(site: Site, rule: Rule, name: str) -> None:
    """Fold the weight of a node; raise `GraphError` if the node cannot be rewritten."""
    _fold(site, rule, name)
    if why := _why_not(site.node, rule):
        raise GraphError(f"layer {name}: cannot be rewritten: {why}")


def _refusal(site: Site) -> tuple[str, gs.Tensor | None]:
    """Return why a node with a weight cannot be rewritten, and the weight; an empty reason for any other node."""
    node, rule = site.node, _rule_of(site.node)
    if rule is None:
        weight = next((t for t in node.inputs if isinstance(t, gs.Constant) and len(t.shape) > 1), None)
        if node.op not in MACS or node.domain not in (*DOMAINS, None) or weight is None:
            return "", None
        stays = STAY_DENSE.get(node.op, "") if is_standard(node) else ""
        return stays or f"no rule rewrites {_full_name(node)}; expected one of {', '.join(_RULE_OF)}", weight
    weight = node.inputs[rule.weight_input(node)]
    if _on_folded(site, lambda *_: True) or all(map(is_constant, node.inputs)):
        return "", None  # what constants alone make is part of a weight
    if not _is_stored(weight):
        if not (node.op == "MatMul" and _is_stored(node.inputs[0])):
            return "", None
        weight = node.inputs[0]
    if isinstance(weight, gs.Constant):
        return _why_not(node, rule) or "", weight
    return f"its weight {weight.name!r} is computed in the graph, not a constant", weight


def _second_refusal(site: Site) -> tuple[str, gs.Tensor | None]:
    """Return why the second weight of a node cannot be rewritten, and the weight; an empty reason if it can or is none."""
    rule = _second_rule_of(site.node)
    if rule is None:
        return "", None
    place = rule.weight_input(site.node)
    on_trial = _on_trial(site, lambda rule, node: (_why_not(node, rule) or "", node.inputs[place]), rule)
    if on_trial is not None:
        return on_trial
    weight = site.node.inputs[place]
    return (_why_not(site.node, rule) or "", weight) if _is_stored(weight) else ("", None)


def _size(weight: gs.Tensor | None) -> int:
    return math.prod(weight.shape) if isinstance(weight, gs.Constant) else 0


def _is_stored(tensor: gs.Tensor) -> bool:
    """Return whether a tensor is a constant, or computed from constants alone by any operators."""
    stored = False
    for current in tensors_above(tensor):
        if isinstance(current, gs.Constant):
            stored = stored or len(current.shape) > 1
        elif not current.inputs:
            return False  # an input of the graph, or of the graph around it
        else:
            stored = stored or any(node.op == "Constant" for node in current.inputs)
    return stored


def _rule_of(node: gs.Node) -> Rule | None:
    """Return the rule for a node; None if there is none, or if the node is no layer, as a Gather that reads a shape."""
    if node.op in gather.OPS and is_standard(node) and not gather.is_table(node):
        return None
    return _RULE_OF.get(_full_name(node))


def _second_rule_of(node: gs.Node) -> Rule | None:
    """Return the rule for the second weight of a node; None if it has none."""
    rule = _SECOND_RULE_OF.get(node.op) if is_standard(node) else None
    return rule if rule is not None and len(node.inputs) > rule.weight_input(node) else None


def _full_name(node: gs.Node) -> str:
    return node.op if is_standard(node) else f"{node.domain}:{node.op}"


def names_of(node: gs.Node) -> list[str]:
    """Return the names that a plan may use for a node: those of its weight, with and without `.weight`, and its own."""
    return [*_weight_names(node), *([node.name] if node.name else [])]


def _all_names(node: gs.Node) -> dict[str, None]:
    """Return the names of a node and of its outputs; none for a node that was rewritten."""
    return dict.fromkeys((*names_of(node), *_output_names(node))) if node.outputs else {}


def _names_in(graph: gs.Graph) -> Names:
    taken: set[str] = set()
    for inner, node in walk(graph):
        taken.add(node.name)
        taken.update(tensor.name for tensor in (*node.inputs, *node.outputs))
        taken.update(tensor.name for tensor in (*inner.inputs, *inner.outputs))
    return Names(taken)


def _by_weight(sites: list[Site]) -> list[list[Site]]:
    """Return the nodes by their weight (O, I, *K) and the groups of convolutions; together if one cannot be rewritten."""
    if len(sites) == 1:
        return [sites]
    groups: list[tuple[Rule | None, np.ndarray, list[Site]]] = []
    for site in sites:
        weight = _weight(site)
        if weight is None:
            return [sites]
        for rule, group_weight, group in groups:
            same_kind = rule is _rule_of(site.node) and group_weight.dtype == weight.dtype
            same_kind = same_kind and group[0].node.attrs.get("group", 1) == site.node.attrs.get("group", 1)
            if same_kind and np.array_equal(group_weight, weight, equal_nan=True):
                group.append(site)
                break
        else:
            groups.append((_rule_of(site.node), weight, [site]))
    return [group for _, _, group in groups]


def _weight(site: Site) -> np.ndarray | None:
    """Return a node's weight (O, I, *K), also if it is computed; None if the node cannot be rewritten. It is not changed."""
    return _on_folded(site, lambda rule, node: rule.weight(node))


def _on_folded(site: Site, ask: Callable[[Rule, gs.Node], _Answer], rule: Rule | None = None) -> _Answer | None:
    """Call `ask` on a copy of the node with a constant weight; return None if the node cannot be rewritten.

    `rule` is that of the node's first weight by default.
    """
    rule = rule or _rule_of(site.node)
    return None if rule is None else _on_trial(site, lambda own, node: None if _why_not(node, own) else ask(own, node), rule)


def _on_trial(site: Site, ask: Callable[[Rule, gs.Node], _Answer | None], rule: Rule) -> _Answer | None:
    """Call `ask` on a copy of the node with a constant weight, which may be refused; return None if the weight is computed."""
    node, index = site.node, rule.weight_input(site.node)
    try:
        constant = folded(node.inputs[index], site.graph.opset, "weight")
    except GraphError:
        return None
    if constant is None:
        return None
    # With names of their own: lists of nodes remove what is equal to a node, which must not be the node itself.
    outputs = [gs.Variable(f"{tensor.name}/trial" if tensor.name else "") for tensor in node.outputs]
    trial = gs.Node(node.op, attrs=node.attrs, inputs=list(node.inputs), outputs=outputs)
    trial.inputs[index] = constant
    answer = ask(rule, trial)
    trial.inputs.clear()
    return answer


def _output_names(node: gs.Node) -> list[str]:
    return [tensor.name for tensor in node.outputs if tensor.name] if _rule_of(node) else []


def _second_names(node: gs.Node) -> list[str]:
    rule = _second_rule_of(node)
    return list(dict.fromkeys(_weight_names(node, rule))) if rule and node.outputs else []


def _weight_names(node: gs.Node, rule: Rule | None = None) -> list[str]:
    names = []
    if rule := rule or _rule_of(node):
        weight = node.inputs[rule.weight_input(node)]
        origin = (weight.name,) if isinstance(weight, gs.Constant) else sources(weight)[:1]
        names = [name for full in (*origin, weight.name) if full for name in (full.removesuffix(".weight"), full)]
    return names


def _known(graph: gs.Graph) -> str:
    named = [names_of(node)[0] for _, node in walk(graph) if _has_weight(node)]
    for _, node in walk(graph):
        rule = _second_rule_of(node)
        if rule is not None and is_constant(node.inputs[rule.weight_input(node)]):
            named += _second_names(node)[:1]
    return ", ".join(sorted(set(named))) or "none"


def _has_weight(node: gs.Node) -> bool:
    rule = _rule_of(node)
    return rule is not None and is_constant(node.inputs[rule.weight_input(node)])


def _fold(site: Site, rule: Rule, name: str) -> None:
    index = rule.weight_input(site.node)
    weight = site.node.inputs[index]
    if not isinstance(weight, gs.Constant):
        try:
            constant = folded(weight, site.graph.opset, site.names.unique(f"{name}/folded"))
        except GraphError as error:
            raise GraphError(f"layer {name}: {error}") from None
        if constant is not None:
            site.node.inputs[index] = constant


def _why_not(node: gs.Node, rule: Rule) -> str | None:
    if why := rule.why_not(node):
        weight = node.inputs[rule.weight_input(node)]
        producer = weight.inputs[0].op if weight.inputs else ""
        if producer in ("DequantizeLinear", "DynamicQuantizeLinear"):
            why = f"its weight is quantized (the output of {producer}); plan the fp32 model, and quantize the factored model"
        return why
    if 0 in node.inputs[rule.weight_input(node)].shape:
        return f"its weight is empty: it has shape {list(node.inputs[rule.weight_input(node)].shape)}"
    dtype = node.inputs[rule.weight_input(node)].dtype
    if dtype not in (np.float16, np.float32, np.float64):
        return f"its weight is of type {type_name(dtype)}; expected float16, float32 or float64"
    return None
