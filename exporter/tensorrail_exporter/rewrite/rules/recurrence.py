"""LSTM(X, W, R, B, …) -> Scan over MatMul(X, W) with the steps of a factored R in its body, and likewise GRU.

ONNX's own nodes multiply the state by a dense R inside. The rule of the input weight W comes first if both are planned: it
then leaves the inputs of all gates in place of the data, and no W. The weights of both directions are one matrix, of which each
direction multiplies its own state by all input cores and by the rows of its own gates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from tensorrail_exporter.formats.contraction import LayerSpec, MatMul, Reshape, Step
from tensorrail_exporter.rewrite.rules import recurrent, scan
from tensorrail_exporter.rewrite.rules.emit import Site
from tensorrail_exporter.rewrite.rules.recurrent import TORCH_FROM_ONNX
from tensorrail_exporter.rewrite.rules.writer import Writer

OPS: tuple[str, ...] = recurrent.OPS


def weight_input(node: gs.Node) -> int:
    """Return 2: the third input is the recurrent weight."""
    return 2


def why_not(node: gs.Node) -> str | None:
    """Return the reason why this recurrent weight stays dense, or None."""
    weight = node.inputs[2]
    if not isinstance(weight, gs.Constant):
        found = f"its recurrent weight {weight.name!r} is computed in the graph, not a constant"
        return f"{found}; store it in the model, or leave it dense"
    directions, gates = len(scan.directions(node)), len(TORCH_FROM_ONNX[node.op])
    shape = tuple(weight.shape)
    if len(shape) != 3 or shape[:2] != (directions, gates * shape[2]):
        expected = f"expected a recurrent weight of shape ({directions}, {gates} · hidden, hidden)"
        return f"{expected}, got {list(shape)}; export the model again, or leave the weight dense"
    other = scan.what_no_scan_has(node)
    if other is None:
        return None
    return f"its cores run in a Scan, and none is written for a node with {other}; leave it dense, or plan the input weight"


def layer(node: gs.Node) -> LayerSpec:
    """Return the product with the states, of shape (directions · gates · hidden, hidden)."""
    directions, rows, hidden = node.inputs[2].shape
    resets_first = node.op == "GRU" and not node.attrs.get("linear_before_reset", 0)
    products = directions * (2 if resets_first else 1)
    size = (recurrent.steps_of(node),)
    shape = (directions * rows, hidden)
    return LayerSpec("recurrent", shape, lead=2, size=size, scan=scan.takes(node), state_products=products)


def weight(node: gs.Node) -> np.ndarray:
    """Return the weight (directions · gates · hidden, hidden) with the gates in torch's order."""
    values = np.asarray(node.inputs[2].values)
    return scan.in_order(values, TORCH_FROM_ONNX[node.op]).reshape(-1, values.shape[2])


def replace_weight(node: gs.Node, weight: np.ndarray, name: str) -> None:
    """Replace the node's weight by a new constant, given as (directions · gates · hidden, hidden) in torch's order."""
    node.inputs[2] = gs.Constant(name, recurrent.as_onnx(node, weight))


def rewrite(site: Site, steps: tuple[Step, ...], layer: str) -> None:
    """Replace the node by one Scan per direction, with the steps in its body."""
    node = site.node
    order = TORCH_FROM_ONNX[node.op]
    dtype = node.inputs[2].dtype
    directions, rows, hidden = node.inputs[2].shape
    gates = node.inputs[0]
    if not node.inputs[1].is_empty():  # its rule has not left the inputs of the gates
        inputs = scan.values(site, 1, order, layer)
        matrix = site.constant(f"{layer}/input_weight", inputs.reshape(-1, inputs.shape[2]).T.astype(dtype))
        gates = site.variable(f"{layer}/gates", dtype)
        site.append("MatMul", f"{layer}/input_matmul", [node.inputs[0], matrix], gates)
    in_body = tuple(replace(step, shape=step.shape[1:]) if isinstance(step, Reshape) else step for step in steps)
    total = directions * rows
    products = [_Factored(in_body, slice(k * rows, (k + 1) * rows), total, hidden) for k in range(directions)]
    scan.rewrite(site, gates, order, layer, products)


@dataclass(frozen=True)
class _Factored:
    """The product with the cores of a recurrent weight.

    Attributes:
        steps: the steps of the contraction for a state (B, H).
        rows: the rows of the weight that belong to the direction.
        total: the rows of all directions.
        hidden: the number of hidden units.

    """

    steps: tuple[Step, ...]
    rows: slice
    total: int
    hidden: int

    def plus(self, body: Writer, state: gs.Tensor, columns: slice, addend: gs.Tensor | None, name: str) -> gs.Tensor:
        start, stop = (self.rows.start + place for place in (columns.start, columns.stop))
        last = self.steps[-1]
        if isinstance(last, MatMul) and last.side == "right":
            inner = self._chain(body, state, self.steps[:-1])
            matrix = body.constant("+".join(map(str, last.cores)), np.asarray(last.weight)[:, start:stop])
            return scan.product_plus(body, inner, matrix, addend)
        features = self._chain(body, state, self.steps)
        sizes = [start, stop - start, self.total - stop]
        own = body.split(features, [size for size in sizes if size], axis=1)[1 if start else 0]
        return own if addend is None else body.add("Add", [own, addend])

    def _chain(self, body: Writer, state: gs.Tensor, steps: tuple[Step, ...]) -> gs.Tensor:
        if not steps:
            return state
        out = body.variable("features")
        body.site.chain(state, out, steps, body.layer, body.dtype)
        return out
