"""Graphs of one LSTM or GRU node, with every optional input."""

from __future__ import annotations

import numpy as np
from conftest import make_model
from onnx import TensorProto, helper

GATES = {"LSTM": 4, "GRU": 3}


def recurrent_model(
    op, direction, hidden, inputs, rng, *, bias=True, state=False, lengths=False, cell=False, layout=0, **attrs
):
    """Return a graph of one node: X (T, B, I), or (B, T, I) of layout 1, and optional lengths and initial states."""
    many = 2 if direction == "bidirectional" else 1
    weights = {
        "w": rng.standard_normal((many, GATES[op] * hidden, inputs)).astype(np.float32) / 3,
        "r": rng.standard_normal((many, GATES[op] * hidden, hidden)).astype(np.float32) / 3,
    }
    names = ["x", "w", "r"]
    if bias:
        weights["b"] = rng.standard_normal((many, 2 * GATES[op] * hidden)).astype(np.float32)
    names.append("b" if bias else "")
    names.append("lengths" if lengths else "")
    free = {"x": ["n", "t", inputs] if layout else ["t", "n", inputs]}
    if state:
        for name in ("h", *(["c"] if op == "LSTM" else [])):
            free[name] = ["n", many, hidden] if layout else [many, "n", hidden]
            names.append(name)
    outputs = {"y": ["n", "t", many, hidden] if layout else ["t", many, "n", hidden]}
    node_outputs = ["y", "last"] if cell else ["y"]
    if cell:
        outputs["last"] = ["n", many, hidden] if layout else [many, "n", hidden]
    node = helper.make_node(op, names, node_outputs, "rnn", hidden_size=hidden, direction=direction, layout=layout, **attrs)
    if lengths:
        # an input of another type than make_model's: made from floats in the graph
        free["lengths_f"] = ["n"]
        cast = helper.make_node("Cast", ["lengths_f"], ["lengths"], "cast", to=TensorProto.INT32)
        return make_model([cast, node], weights, free, outputs)
    return make_model([node], weights, free, outputs)
