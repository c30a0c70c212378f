"""A network as voice activity detectors are: a state that an output carries on, and a scalar that must have one value."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

RATE = 16000
WIDTH, HIDDEN = 24, 32


def detector(rng: np.random.Generator, batch: str | int = "batch", state_batch: str | int = "batch") -> onnx.ModelProto:
    """Return input [batch, 24], state [2, batch, 32] and the scalar `sr` → output [batch, 1] and stateN.

    Any other rate than 16000 is an index out of range: each run with another value fails.
    """
    weights = {
        "w.weight": rng.standard_normal((WIDTH, HIDDEN)).astype(np.float32) / 5,
        "u.weight": rng.standard_normal((HIDDEN, HIDDEN)).astype(np.float32) / 6,
        "v.weight": rng.standard_normal((HIDDEN, 1)).astype(np.float32),
        "rate": np.array(RATE),
        "one": np.ones(1, np.float32),
        "first": np.array(0),
        "second": np.array(1),
        "front": np.array([0]),
    }
    nodes = [
        helper.make_node("Sub", ["sr", "rate"], ["off"]),
        helper.make_node("Gather", ["one", "off"], ["factor"]),
        helper.make_node("Gather", ["state", "first"], ["h0"], axis=0),
        helper.make_node("Gather", ["state", "second"], ["h1"], axis=0),
        helper.make_node("MatMul", ["input", "w.weight"], ["wx"], "w"),
        helper.make_node("Add", ["wx", "h0"], ["sum0"]),
        helper.make_node("Tanh", ["sum0"], ["n0"]),
        helper.make_node("MatMul", ["n0", "u.weight"], ["un"], "u"),
        helper.make_node("Add", ["un", "h1"], ["sum1"]),
        helper.make_node("Tanh", ["sum1"], ["n1"]),
        helper.make_node("MatMul", ["n1", "v.weight"], ["score"], "v"),
        helper.make_node("Mul", ["score", "factor"], ["output"]),
        helper.make_node("Unsqueeze", ["n0", "front"], ["s0"]),
        helper.make_node("Unsqueeze", ["n1", "front"], ["s1"]),
        helper.make_node("Concat", ["s0", "s1"], ["stateN"], axis=0),
    ]
    floats, integers = TensorProto.FLOAT, TensorProto.INT64
    graph = helper.make_graph(
        nodes,
        "detector",
        [
            helper.make_tensor_value_info("input", floats, [batch, WIDTH]),
            helper.make_tensor_value_info("state", floats, [2, state_batch, HIDDEN]),
            helper.make_tensor_value_info("sr", integers, []),
        ],
        [
            helper.make_tensor_value_info("output", floats, [batch, 1]),
            helper.make_tensor_value_info("stateN", floats, [2, state_batch, HIDDEN]),
        ],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model
