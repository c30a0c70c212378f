"""MatMul(X, Wᵀ) -> MatMul(… MatMul(X, W₁) …, Wₙ), for a constant matrix on the right, batched over X's leading axes."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from tensorrail_exporter.contraction import LayerSpec, Step
from tensorrail_exporter.rules.emit import chain

OP = "MatMul"


def why_not(node: gs.Node) -> str | None:
    """Return the reason why this product stays dense, or None."""
    weight = node.inputs[1]
    if not isinstance(weight, gs.Constant):
        return f"its right operand {weight.name!r} is computed in the graph, not a constant"
    if len(weight.shape) != 2:
        return f"its constant has shape {list(weight.shape)}, and only a matrix can be factored"
    if node.inputs[0].shape is None:
        return f"the rank of its input {node.inputs[0].name!r} is not known: run onnx.shape_inference.infer_shapes first"
    return None


def layer(node: gs.Node) -> LayerSpec:
    """Return the (O, I) of the product and the number of axes before the features."""
    inputs, outputs = node.inputs[1].shape
    return LayerSpec("linear", (outputs, inputs), lead=len(node.inputs[0].shape) - 1)


def weight(node: gs.Node) -> np.ndarray:
    """Return the weight (O, I)."""
    return np.asarray(node.inputs[1].values).T


def replace_weight(node: gs.Node, weight: np.ndarray, name: str) -> None:
    """Give the node a weight of its own, from (O, I)."""
    node.inputs[1] = gs.Constant(name, np.ascontiguousarray(weight.T))


def rewrite(graph: gs.Graph, node: gs.Node, steps: tuple[Step, ...], layer: str) -> None:
    """Write the steps; a bias is a node of its own behind the product and stays where it is."""
    source, target = node.inputs[0], node.outputs[0]
    node.outputs.clear()
    chain(graph, source, target, steps, layer, node.inputs[1].dtype)
