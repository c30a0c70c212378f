"""Biases of planned layers: whether a layer has room for one, and adding to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from tensorrail_exporter.graphs.io import export_graph
from tensorrail_exporter.rewrite.resolve import ResolvedLayer, ResolvedPlan
from tensorrail_runtime.errors import GraphError


def takes_bias(layer: ResolvedLayer) -> bool:
    """Return whether a bias can be given to the layer without a new node: one node, a Conv or Gemm, or an Add behind it."""
    return len(layer.sites) == 1 and _bias(layer) is not None


def add_biases(resolved: ResolvedPlan, biases: Mapping[str, np.ndarray]) -> ResolvedPlan:
    """Return the plan with a model whose layers have a vector (O,) added to their bias; one that has none gets it.

    The argument is not changed. Raises `GraphError` for a layer that `takes_bias` does not hold for.
    """
    if not biases:
        return resolved
    changed = resolved.copy(folded=False)
    for name, bias in biases.items():
        add_bias(changed.layers[name], bias)
    return replace(changed, model=export_graph(changed.graph, resolved.model))


def add_bias(layer: ResolvedLayer, bias: np.ndarray) -> gs.Node:
    """Add a vector (O,) to the layer's bias; return the node that holds it."""
    place, name, site = _bias(layer), layer.plan.name, layer.sites[0]
    if place is None:
        raise GraphError(
            f"layer {name}: has no bias that can be changed; expected one Conv or Gemm node, or one MatMul node followed by an Add "
            "of a constant vector"
        )
    node, index = place
    scale = 1.0
    if node.op == "Gemm":
        scale = node.attrs.get("alpha", 1.0) / (node.attrs.get("beta", 1.0) or 1.0)
    present = index < len(node.inputs) and isinstance(node.inputs[index], gs.Constant)
    before = np.asarray(node.inputs[index].values, np.float64) if present else 0.0
    constant = gs.Constant(site.names.unique(f"{name}/bias"), (before + scale * bias).astype(layer.dtype))
    if index < len(node.inputs):
        node.inputs[index] = constant
    else:
        node.inputs.append(constant)
    return node


def _bias(layer: ResolvedLayer) -> tuple[gs.Node, int] | None:
    """Return the node and the place of its input that hold the layer's bias, or could; None when there is none."""
    site = layer.sites[0]
    node = site.node
    if node.op in ("Conv", "Gemm"):
        if node.attrs.get("beta", 1.0) == 0:
            return None
        if len(node.inputs) < 3 or node.inputs[2].is_empty():
            return (node, 2) if node.op == "Conv" or site.graph.opset >= 11 else None
        known = isinstance(node.inputs[2], gs.Constant)
        vector = known and node.inputs[2].values.size == max(node.inputs[2].shape, default=1)
        return (node, 2) if vector and node.inputs[2].values.size > 1 else None
    consumers = node.outputs[0].outputs
    if node.op != "MatMul" or len(consumers) != 1 or consumers[0].op != "Add" or layer.rule.weight_input(node) == 0:
        return None
    add = consumers[0]
    for index, tensor in enumerate(add.inputs):
        if isinstance(tensor, gs.Constant) and tensor.values.ndim == 1 and tensor.values.size > 1:
            return add, index
    return None
