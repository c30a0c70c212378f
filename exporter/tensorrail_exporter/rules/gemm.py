"""Gemm(X, W, B) -> Gemm(… Gemm(X, W₁) …, Wₙ, B), alpha and beta on the last one, transA on the first."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from tensorrail_exporter.contraction import LayerSpec, MatMul, Step
from tensorrail_exporter.rules.emit import chain, unique

OP = "Gemm"


def why_not(node: gs.Node) -> str | None:
    """Return the reason why this Gemm stays dense, or None."""
    weight = node.inputs[1]
    if not isinstance(weight, gs.Constant):
        return f"its weight {weight.name!r} is computed in the graph, not a constant"
    return None


def layer(node: gs.Node) -> LayerSpec:
    """Return the (O, I) of the product."""
    rows, columns = node.inputs[1].shape
    return LayerSpec("linear", (rows, columns) if node.attrs.get("transB", 0) else (columns, rows))


def weight(node: gs.Node) -> np.ndarray:
    """Return the weight (O, I), alpha left out."""
    values = np.asarray(node.inputs[1].values)
    return values if node.attrs.get("transB", 0) else values.T


def replace_weight(node: gs.Node, weight: np.ndarray, name: str) -> None:
    """Give the node a weight of its own, from (O, I)."""
    node.inputs[1] = gs.Constant(name, np.ascontiguousarray(weight if node.attrs.get("transB", 0) else weight.T))


def rewrite(graph: gs.Graph, node: gs.Node, steps: tuple[Step, ...], layer: str) -> None:
    """Write the steps: as Gemms when every step is a product, else as a chain between an own transpose and bias."""
    dtype = node.inputs[1].dtype
    bias = node.inputs[2] if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
    alpha, beta = node.attrs.get("alpha", 1.0), node.attrs.get("beta", 1.0)
    transposed = bool(node.attrs.get("transA", 0))
    source, target = node.inputs[0], node.outputs[0]
    node.outputs.clear()
    if all(isinstance(step, MatMul) and step.side == "right" for step in steps):
        nodes = chain(graph, source, target, steps, layer, dtype)
        for product in nodes:
            product.op = "Gemm"
        nodes[0].attrs["transA"] = int(transposed)
        nodes[-1].attrs["alpha"] = alpha
        if bias is not None:
            nodes[-1].inputs.append(bias)
            nodes[-1].attrs["beta"] = beta
        return
    if transposed:
        rows = gs.Variable(unique(graph, f"{layer}/rows"), dtype=dtype)
        graph.nodes.append(
            gs.Node("Transpose", unique(graph, f"{layer}/transA"), attrs={"perm": [1, 0]}, inputs=[source], outputs=[rows])
        )
        source = rows
    plain = bias is None and alpha == 1.0
    product = target if plain else gs.Variable(unique(graph, f"{layer}/product"), dtype=dtype)
    chain(graph, source, product, steps, layer, dtype)
    terms = [(product, alpha, "alpha")] + ([(bias, beta, "beta")] if bias is not None else [])
    scaled = [_scaled(graph, tensor, factor, f"{layer}/{name}", dtype) for tensor, factor, name in terms]
    if bias is not None:
        graph.nodes.append(gs.Node("Add", unique(graph, f"{layer}/add"), inputs=scaled, outputs=[target]))
    elif not plain:
        scaled[0].inputs[0].outputs[0] = target


def _scaled(graph: gs.Graph, tensor: gs.Tensor, factor: float, name: str, dtype: np.dtype) -> gs.Tensor:
    """Return `factor * tensor`; the tensor itself when the factor is 1."""
    if factor == 1.0:
        return tensor
    out = gs.Variable(unique(graph, f"{name}_scaled"), dtype=dtype)
    scale = gs.Constant(unique(graph, name), np.array(factor, dtype))
    graph.nodes.append(gs.Node("Mul", unique(graph, f"{name}_mul"), inputs=[tensor, scale], outputs=[out]))
    return out
