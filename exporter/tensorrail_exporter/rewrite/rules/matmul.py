"""MatMul(X, W) -> MatMul(… MatMul(X, W₁) …, Wₙ), and likewise MatMul(W, X): a constant matrix on either side.

X may have any number of leading axes, as in attention. With W on the right the rows of X are the tokens, else its columns.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from tensorrail_exporter.formats.contraction import LayerSpec, MatMul, Step
from tensorrail_exporter.graphs.fold import is_constant
from tensorrail_exporter.rewrite.rules.emit import Site

OPS: tuple[str, ...] = ("MatMul",)


def weight_input(node: gs.Node) -> int:
    """Return 1, or 0 if only the left operand is a constant or computed from constants."""
    return 0 if is_constant(node.inputs[0]) and not is_constant(node.inputs[1]) else 1


def why_not(node: gs.Node) -> str | None:
    """Return the reason why this product stays dense, or None."""
    side = weight_input(node)
    weight, other = node.inputs[side], node.inputs[1 - side]
    if not isinstance(weight, gs.Constant):
        return f"neither operand is a constant: {node.inputs[0].name!r} and {weight.name!r} are computed in the graph"
    if is_constant(other):
        return "both operands are constants: a product of constants is not a layer"
    if len(weight.shape) < 2 or math.prod(weight.shape[:-2]) != 1:
        return f"expected a single matrix as its constant, got shape {list(weight.shape)}"
    if other.shape is None:
        return f"the number of axes of its input {other.name!r} is unknown: give the shapes of the inputs"
    if len(weight.shape) > max(len(other.shape), 2):
        return f"its constant of shape {list(weight.shape)} has more axes than its input and would add axes to the output"
    if side == 0 and len(other.shape) < 2:
        return f"its input {other.name!r} is a single column: use a Gemm"
    return None


def layer(node: gs.Node) -> LayerSpec:
    """Return a linear layer of shape (O, I) with the axes before the features of its input."""
    side = weight_input(node)
    rows, columns = node.inputs[side].shape[-2:]
    axes = [axis if isinstance(axis, int) and axis > 0 else 0 for axis in node.inputs[1 - side].shape]
    if side == 0:  # the features are the second to last axis
        axes[-1], axes[-2] = axes[-2], axes[-1]
    return LayerSpec("linear", (columns, rows) if side else (rows, columns), lead=len(axes) - 1, size=tuple(axes[1:-1]))


def weight(node: gs.Node) -> np.ndarray:
    """Return the weight (O, I)."""
    side = weight_input(node)
    values = np.asarray(node.inputs[side].values)
    matrix = values.reshape(values.shape[-2:])
    return matrix.T if side else matrix


def replace_weight(node: gs.Node, weight: np.ndarray, name: str) -> None:
    """Replace the node's weight by a new constant, given as (O, I)."""
    side = weight_input(node)
    node.inputs[side] = gs.Constant(name, np.ascontiguousarray(weight.T if side else weight))


def rewrite(site: Site, steps: tuple[Step, ...], layer: str) -> None:
    """Write the steps; a bias is a separate node after the product and is not touched.

    With the constant on the left, a chain of products only is written mirrored, any other between two Transposes.
    """
    node = site.node
    side = weight_input(node)
    source, target, dtype = node.inputs[1 - side], node.outputs[0], node.inputs[side].dtype
    axes = len(source.shape)
    node.outputs.clear()
    if side == 1:
        site.chain(source, target, steps, layer, dtype)
    elif all(isinstance(step, MatMul) and step.side == "right" for step in steps):
        mirrored = tuple(replace(step, weight=step.weight.T, side="left") for step in steps if isinstance(step, MatMul))
        site.chain(source, target, mirrored, layer, dtype)
    else:
        perm = [*range(axes - 2), axes - 1, axes - 2]
        rows, product = site.variable(f"{layer}/rows", dtype), site.variable(f"{layer}/product", dtype)
        site.append("Transpose", f"{layer}/to_rows", [source], rows, {"perm": perm})
        site.chain(rows, product, steps, layer, dtype)
        site.append("Transpose", f"{layer}/to_columns", [product], target, {"perm": perm})
