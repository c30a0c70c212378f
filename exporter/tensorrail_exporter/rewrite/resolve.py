"""Resolves a plan in a model once: finds the nodes of each planned layer, and what they compute.

`resolve` imports the graph, finds every planned layer and checks its plan. Code that changes the graph works on
`ResolvedPlan.copy`, which does not import the model again: nodes and tensors are copied, the values of constants are shared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from tensorrail_exporter.formats.contraction import LayerSpec
from tensorrail_exporter.graphs.einsum import products_of_einsums
from tensorrail_exporter.graphs.heads import with_heads
from tensorrail_exporter.graphs.io import import_graph
from tensorrail_exporter.graphs.joint import with_joint
from tensorrail_exporter.plans.plan import LayerPlan, Plan
from tensorrail_exporter.rewrite.rules import Rule
from tensorrail_exporter.rewrite.rules.emit import Names, Site
from tensorrail_exporter.rewrite.sites import NamedLayers, walk
from tensorrail_runtime.errors import GraphError


@dataclass(frozen=True, eq=False)
class ResolvedLayer:
    """One planned layer in a graph.

    Attributes:
        plan: its format, modes and ranks, which fit the weight.
        rule: how its nodes are read and rewritten.
        sites: its nodes; several where they share the weight.
        specs: what each node computes; shape, stride and axes may differ where the weight is shared.
        constants: the weight of each node, folded to a constant if nodes of the graph compute it.
        place: index of its first node in the graph, counting the nodes of bodies, from 0.

    """

    plan: LayerPlan
    rule: Rule
    sites: tuple[Site, ...]
    specs: tuple[LayerSpec, ...]
    constants: tuple[gs.Constant, ...]
    place: int

    @property
    def spec(self) -> LayerSpec:
        """What the first node computes."""
        return self.specs[0]

    @property
    def dtype(self) -> np.dtype[Any]:  # any of the floating types
        """Type of the weight."""
        dtype: np.dtype[Any] = np.dtype(self.constants[0].dtype)
        return dtype

    @cached_property
    def weight(self) -> np.ndarray:
        """The dense weight (O, I, *K) as it stands in the graph, a recurrent layer's gates in torch's order."""
        return self.rule.weight(self._stand_in(0))

    def stored(self, weight: np.ndarray, site: int) -> np.ndarray:
        """Return a weight (O, I, *K) as the node of a site stores it: perhaps transposed, or with gates in another order."""
        stand_in = self._stand_in(site)
        self.rule.replace_weight(stand_in, weight.astype(self.dtype, copy=False), self.constants[site].name)
        return np.asarray(stand_in.inputs[self.rule.weight_input(stand_in)].values)

    def _stand_in(self, site: int) -> gs.Node:
        """Return a node like that of a site, with the folded weight: that of the original may be computed."""
        node, constant = self.sites[site].node, self.constants[site]
        inputs: list[gs.Tensor] = [gs.Variable("data") for _ in node.inputs]
        inputs[self.rule.weight_input(node)] = gs.Constant(constant.name, constant.values)
        return gs.Node(node.op, attrs=node.attrs, inputs=inputs)


@dataclass(frozen=True, eq=False)
class ResolvedPlan:
    """A plan whose layers were found in a model. The graph is never changed; `copy` returns one that may be changed.

    Attributes:
        model: the model, in which heads have the sizes of the plan, and the layers that it joins are one.
        graph: its graph, in which computed weights are not folded.
        plan: the plan.
        layers: the planned layers by name, in the plan's order.

    """

    model: onnx.ModelProto
    graph: gs.Graph
    plan: Plan
    layers: dict[str, ResolvedLayer]

    @property
    def in_graph_order(self) -> tuple[ResolvedLayer, ...]:
        """The layers in the order of their first nodes in the graph."""
        return tuple(sorted(self.layers.values(), key=lambda layer: (layer.place, layer.plan.name)))

    def copy(self, *, folded: bool = True) -> ResolvedPlan:
        """Return a copy whose graph may be changed, with the sites in it. The values of constants are shared.

        Args:
            folded: whether planned weights that are computed from constants become constants; default True.

        Returns:
            A resolved plan; changes of its graph and nodes do not affect this one.

        """
        copier = _Copier()
        graph = copier.graph(self.graph)
        names = Names(set(next((layer.sites[0].names.taken for layer in self.layers.values()), ())))
        layers = {}
        for name, layer in self.layers.items():
            sites = tuple(Site(copier.graphs[id(site.graph)], copier.nodes[id(site.node)], names) for site in layer.sites)
            constants = tuple(copier.tensor(constant) for constant in layer.constants)
            if folded:
                _give(layer.rule, sites, constants)
            layers[name] = replace(layer, sites=sites, constants=constants)
        return replace(self, graph=graph, layers=layers)


def prepared(model: onnx.ModelProto, plan: Plan) -> onnx.ModelProto:
    """Return the graph that layers are factorized in: Einsums as products, the plan's sizes of heads, and its joint layers.

    Raises:
        GraphError: a pair or a layer is not in the graph, or does not fit the plan.

    """
    return with_joint(with_heads(products_of_einsums(model), plan.head_sizes), plan.joint)


def resolve(model: onnx.ModelProto, plan: Plan) -> ResolvedPlan:
    """Find every layer of a plan in a model.

    Args:
        model: the dense model; it is not changed.
        plan: names, formats, modes and ranks of the layers. Heads get their sizes and layers are joined first.

    Returns:
        The nodes of each layer, what they compute, and the weights.

    Raises:
        GraphError: a layer is not in the graph, cannot be rewritten, or is planned under two names.
        PlanError: modes, ranks or merge do not fit the weight's shape.

    """
    model = prepared(model, plan)
    graph = import_graph(model)
    named = NamedLayers(graph)
    places = {id(node): place for place, (_, node) in enumerate(walk(graph))}
    before = {id(node): tuple(node.inputs) for _, node in walk(graph)}
    layers: dict[str, ResolvedLayer] = {}
    owners: dict[tuple[int, int], str] = {}  # by the node and the place of the weight among its inputs
    for layer_plan in plan.layers:
        rule, sites = named.find(layer_plan.name)
        for site in sites:
            place = (id(site.node), rule.weight_input(site.node))
            if (owner := owners.setdefault(place, layer_plan.name)) != layer_plan.name:
                raise GraphError(f"layer {layer_plan.name}: is also planned as {owner}; plan it under one of these names")
        specs = tuple(rule.layer(site.node) for site in sites)
        layer_plan.check_layer(specs[0])
        constants = tuple(site.node.inputs[rule.weight_input(site.node)] for site in sites)
        first = min(places[id(site.node)] for site in sites)
        layers[layer_plan.name] = ResolvedLayer(layer_plan, rule, tuple(sites), specs, constants, first)
    for layer in layers.values():  # weights stay folded until all layers are found
        original = [before[id(site.node)][layer.rule.weight_input(site.node)] for site in layer.sites]
        _give(layer.rule, layer.sites, original)
    return ResolvedPlan(model, graph, plan, layers)


def _give(rule: Rule, sites: tuple[Site, ...], weights: list[gs.Tensor] | tuple[gs.Constant, ...]) -> None:
    """Set the weight of each node."""
    for site, weight in zip(sites, weights, strict=True):
        index = rule.weight_input(site.node)
        if site.node.inputs[index] is not weight:
            site.node.inputs[index] = weight


class _Copier:
    """Copies a graph with its bodies. `gs.Graph.copy` identifies tensors by name, but a body may reuse a name of the graph."""

    def __init__(self) -> None:
        self.graphs: dict[int, gs.Graph] = {}
        self.nodes: dict[int, gs.Node] = {}
        self.tensors: dict[int, gs.Tensor] = {}

    def graph(self, graph: gs.Graph) -> gs.Graph:
        copied = gs.Graph(
            nodes=[self.node(node) for node in graph.nodes],
            inputs=[self.tensor(tensor) for tensor in graph.inputs],
            outputs=[self.tensor(tensor) for tensor in graph.outputs],
            name=graph.name,
            doc_string=graph.doc_string,
            opset=graph.opset,
            import_domains=graph.import_domains,
            producer_name=graph.producer_name,
            producer_version=graph.producer_version,
            functions=graph.functions,
            ir_version=graph.ir_version,
        )
        self.graphs[id(graph)] = copied
        return copied

    def node(self, node: gs.Node) -> gs.Node:
        attrs = {name: self.attribute(value) for name, value in node.attrs.items()}
        inputs, outputs = ([self.tensor(tensor) for tensor in tensors] for tensors in (node.inputs, node.outputs))
        copied = gs.Node(node.op, node.name, attrs, inputs, outputs, node.domain)
        self.nodes[id(node)] = copied
        return copied

    def attribute(self, value: object) -> object:
        if isinstance(value, gs.Graph):
            return self.graph(value)
        return [self.attribute(item) for item in value] if isinstance(value, list) else value

    def tensor(self, tensor: gs.Tensor) -> gs.Tensor:
        if tensor.is_empty():
            return gs.Variable.empty()
        if id(tensor) not in self.tensors:
            copied = tensor.copy()
            if isinstance(tensor, gs.Variable):
                copied.type = tensor.type
            else:
                copied.data_location = tensor.data_location
            self.tensors[id(tensor)] = copied
        return self.tensors[id(tensor)]
