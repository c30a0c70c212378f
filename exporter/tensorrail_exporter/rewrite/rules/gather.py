"""Gather(W, I) -> MatMul(… Gather(W₁, I) …, Wₙ): an embedding, whose rows are read by indices that a run gives.

In `ttm`, with an index for each mode of the entries: -> MatMul(Gather(G₁, I₁), … MatMul(Gather(Gₙ₋₁, Iₙ₋₁), Gather(Gₙ, Iₙ))).
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from tensorrail_exporter.formats.contraction import LayerSpec, Step
from tensorrail_exporter.graphs.fold import is_constant, type_name
from tensorrail_exporter.rewrite.rules.emit import Site

OPS: tuple[str, ...] = ("Gather",)


def is_table(node: gs.Node) -> bool:
    """Return whether a Gather reads rows of a stored matrix of floats; others read shapes, axes or constants."""
    table, indices = node.inputs
    stored = isinstance(table, gs.Constant) and len(table.shape) == 2 and "float" in type_name(table.dtype)
    return stored and node.attrs.get("axis", 0) in (0, -2) and not is_constant(indices)


def weight_input(node: gs.Node) -> int:
    """Return 0: the first input is the table."""
    return 0


def why_not(node: gs.Node) -> str | None:
    """Return the reason why this embedding stays dense, or None."""
    indices = node.inputs[1]
    if indices.shape is None:
        return f"the number of axes of its indices {indices.name!r} is unknown: give the shapes of the inputs"
    return None


def layer(node: gs.Node) -> LayerSpec:
    """Return a linear layer of shape (features, entries) whose input is indices."""
    axes = [axis if isinstance(axis, int) and axis > 0 else 0 for axis in node.inputs[1].shape]
    entries, features = node.inputs[0].shape
    return LayerSpec("linear", (features, entries), lead=len(axes), size=tuple(axes[1:]), gathers=True)


def weight(node: gs.Node) -> np.ndarray:
    """Return the weight (features, entries)."""
    return np.asarray(node.inputs[0].values).T


def replace_weight(node: gs.Node, weight: np.ndarray, name: str) -> None:
    """Replace the table by a new constant, given as (features, entries)."""
    node.inputs[0] = gs.Constant(name, np.ascontiguousarray(weight.T))


def rewrite(site: Site, steps: tuple[Step, ...], layer: str) -> None:
    """Write the steps: rows of the first core and products, or the product of a matrix of each core."""
    node = site.node
    indices, target, dtype = node.inputs[1], node.outputs[0], node.inputs[0].dtype
    node.outputs.clear()
    site.chain(indices, target, steps, layer, dtype)
