"""Gemm(X, W, B) -> Gemm(… Gemm(X, W₁) …, Wₙ, B), with alpha and beta on the last Gemm and transA on the first."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from tensorrail_exporter.formats.contraction import LayerSpec, MatMul, Step
from tensorrail_exporter.rewrite.rules.emit import Site

OPS: tuple[str, ...] = ("Gemm",)


def weight_input(node: gs.Node) -> int:
    """Return 1: the second operand is the weight."""
    return 1


def why_not(node: gs.Node) -> str | None:
    """Return the reason why this Gemm stays dense, or None."""
    weight = node.inputs[1]
    if not isinstance(weight, gs.Constant):
        return f"its weight {weight.name!r} is computed in the graph, not a constant"
    if len(weight.shape) != 2:
        return f"expected a matrix as its weight, got shape {list(weight.shape)}"
    return None


def layer(node: gs.Node) -> LayerSpec:
    """Return a linear layer of shape (O, I)."""
    rows, columns = node.inputs[1].shape
    return LayerSpec("linear", (rows, columns) if node.attrs.get("transB", 0) else (columns, rows))


def weight(node: gs.Node) -> np.ndarray:
    """Return the weight (O, I), without alpha."""
    values = np.asarray(node.inputs[1].values)
    return values if node.attrs.get("transB", 0) else values.T


def replace_weight(node: gs.Node, weight: np.ndarray, name: str) -> None:
    """Replace the node's weight by a new constant, given as (O, I)."""
    node.inputs[1] = gs.Constant(name, np.ascontiguousarray(weight if node.attrs.get("transB", 0) else weight.T))


def rewrite(site: Site, steps: tuple[Step, ...], layer: str) -> None:
    """Write the steps: as Gemms if all of them are products, else as a chain between a Transpose and an Add."""
    node = site.node
    dtype = node.inputs[1].dtype
    bias = node.inputs[2] if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
    alpha, beta = node.attrs.get("alpha", 1.0), node.attrs.get("beta", 1.0)
    transposed = bool(node.attrs.get("transA", 0))
    source, target = node.inputs[0], node.outputs[0]
    node.outputs.clear()
    products = all(isinstance(step, MatMul) and step.side == "right" for step in steps)
    optional_bias = site.graph.opset >= 11  # earlier opsets require the third operand
    if transposed and not (products and optional_bias):
        rows = site.variable(f"{layer}/rows", dtype)
        site.append("Transpose", f"{layer}/transA", [source], rows, {"perm": [1, 0]})
        source, transposed = rows, False
    if products and (optional_bias or bias is not None):
        nodes = site.chain(source, target, steps, layer, dtype)
        for product in nodes if optional_bias else nodes[-1:]:
            product.op = "Gemm"
        if transposed:
            nodes[0].attrs["transA"] = 1
        nodes[-1].attrs["alpha"] = alpha
        if bias is not None:
            nodes[-1].inputs.append(bias)
            nodes[-1].attrs["beta"] = beta
            if "broadcast" in node.attrs:  # an attribute of opset 6
                nodes[-1].attrs["broadcast"] = node.attrs["broadcast"]
        return
    if bias is None and alpha == 1.0:
        site.chain(source, target, steps, layer, dtype)
        return
    product = site.variable(f"{layer}/product", dtype)
    site.chain(source, product, steps, layer, dtype)
    if bias is None:
        _scale(site, product, alpha, f"{layer}/alpha", target)
        return
    scaled = [
        tensor
        if factor == 1.0
        else _scale(site, tensor, factor, f"{layer}/{name}", site.variable(f"{layer}/{name}_scaled", dtype))
        for tensor, factor, name in ((product, alpha, "alpha"), (bias, beta, "beta"))
    ]
    site.append("Add", f"{layer}/add", scaled, target)


def _scale(site: Site, tensor: gs.Tensor, factor: float, name: str, out: gs.Tensor) -> gs.Tensor:
    """Append `out = factor · tensor` and return `out`."""
    site.append("Mul", f"{name}_mul", [tensor, site.constant(name, np.array(factor, out.dtype or tensor.dtype))], out)
    return out
