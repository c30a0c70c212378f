"""Changes the biases of planned layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from tensorrail_exporter.graphs.io import export_graph
from tensorrail_exporter.rewrite.negligible import without_negligible
from tensorrail_exporter.rewrite.resolve import ResolvedLayer, ResolvedPlan
from tensorrail_runtime.errors import GraphError


def takes_bias(layer: ResolvedLayer) -> bool:
    """Return whether a vector can be added to the layer's bias without a new node.

    This holds for one Conv, ConvTranspose, Gemm or Attention node, and for one MatMul node followed by an Add of a constant
    vector.
    """
    return len(layer.sites) == 1 and _bias(layer) is not None


def add_biases(resolved: ResolvedPlan, biases: Mapping[str, np.ndarray]) -> ResolvedPlan:
    """Return the resolved plan in a model with changed biases.

    Args:
        resolved: the plan in the dense model; it is not changed.
        biases: a vector (O,) to add to the bias of each layer, by layer name; a layer without a bias gets this one.

    Returns:
        The resolved plan in the changed model.

    Raises:
        GraphError: `takes_bias` is false for a layer.

    """
    if not biases:
        return resolved
    changed = resolved.copy(folded=False)
    for name, bias in biases.items():
        add_bias(changed.layers[name], bias)
    # Of a copy, since nodes whose outputs nothing uses would leave the graph, but not the plan.
    return replace(changed, model=export_graph(changed.copy(folded=False).graph, resolved.model))


def add_bias(layer: ResolvedLayer, bias: np.ndarray) -> gs.Node:
    """Add a vector (O,) to the layer's bias; return the node that takes it. Raises `GraphError` if there is none."""
    bias_input, name, site = _bias(layer), layer.plan.name, layer.sites[0]
    if bias_input is None:
        raise GraphError(
            f"layer {name}: has no bias that can be changed; expected one Conv, ConvTranspose, Gemm or Attention node, or one "
            "MatMul node followed by an Add of a constant vector"
        )
    node, index = bias_input
    scale = bias_scale(node)
    has_bias = index < len(node.inputs) and isinstance(node.inputs[index], gs.Constant)
    before = np.asarray(node.inputs[index].values, np.float64) if has_bias else 0.0
    added = without_negligible((before + scale * bias).astype(layer.dtype))
    constant = gs.Constant(site.names.unique(f"{name}/bias"), added)
    if index < len(node.inputs):
        node.inputs[index] = constant
    else:
        node.inputs.append(constant)
    return node


def bias_scale(node: gs.Node) -> float:
    """Return by how much a vector is multiplied when it is added to the bias of a node: alpha / beta for a Gemm."""
    return float(node.attrs.get("alpha", 1.0) / (node.attrs.get("beta", 1.0) or 1.0)) if node.op == "Gemm" else 1.0


def _bias(layer: ResolvedLayer) -> tuple[gs.Node, int] | None:
    """Return the node and input index of the layer's bias, also if it has none yet; None if it cannot have one."""
    site = layer.sites[0]
    node = site.node
    if node.op in ("Conv", "ConvTranspose", "Gemm", "Attention"):
        if node.attrs.get("beta", 1.0) == 0:
            return None
        if len(node.inputs) < 3 or node.inputs[2].is_empty():
            return (node, 2) if node.op != "Gemm" or site.graph.opset >= 11 else None
        is_constant = isinstance(node.inputs[2], gs.Constant)
        vector = is_constant and node.inputs[2].values.size == max(node.inputs[2].shape, default=1)
        return (node, 2) if vector and node.inputs[2].values.size > 1 else None
    add = _only_reader(site.graph, node.outputs[0])
    if node.op != "MatMul" or add is None or add.op != "Add" or layer.rule.weight_input(node) == 0:
        return None
    for index, tensor in enumerate(add.inputs):
        if isinstance(tensor, gs.Constant) and tensor.values.ndim == 1 and tensor.values.size > 1:
            return add, index
    return None


def _only_reader(graph: gs.Graph, tensor: gs.Tensor) -> gs.Node | None:
    """Return the node that a tensor goes to, if it goes nowhere else."""
    is_output = any(tensor is output for output in graph.outputs)
    return None if is_output or len(tensor.outputs) != 1 else tensor.outputs[0]
