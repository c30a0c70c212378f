"""Graphs that onnx's checker lets pass and no rule can take: each is refused in one line that names the layer."""

import itertools

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tensorrail_exporter import GraphError, LayerPlan, Plan, decompose_graph
from tensorrail_exporter.rewrite.survey import survey

PLAN = Plan(layers=(LayerPlan(name="c", format="svd", modes=(8, 8), ranks=(4,)),))


def graph_of(nodes, weights, shape=("n", 8)):
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def one(op, shape, **attributes):
    more = {"r": np.ones((1, 8, 2), np.float32)} if op == "LSTM" else {}
    node = helper.make_node(op, ["x", "c.weight", *more], ["", "y"] if more else ["y"], **attributes)
    return graph_of([node], {"c.weight": np.ones(shape, np.float32), **more})


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (one("Gemm", (8,)), r"expected a matrix as its weight, got shape \[8\]"),
        (one("Gemm", (8, 8, 1)), r"expected a matrix as its weight, got shape \[8, 8, 1\]"),
        (one("Conv", (8,)), r"expected a weight of shape \(outputs, inputs, \*kernel\), got \[8\]"),
        (one("Conv", (8,), group=8), r"expected a weight of shape \(outputs, .*, got \[8\]"),
        (one("LSTM", (8, 8), hidden_size=2), r"expected an input weight of shape \(1, 4 · hidden, inputs\), got \[8, 8\]"),
        (
            one("LSTM", (1, 8, 8), hidden_size=2, direction="bidirectional"),
            r"expected an input weight of shape \(2, 4 · hidden, inputs\), got \[1, 8, 8\]",
        ),
        (one("LSTM", (1, 7, 8), hidden_size=2), r"expected an input weight of shape .*, got \[1, 7, 8\]"),
    ],
)
def test_weights_of_another_rank_are_refused_and_not_surveyed(model, reason):
    with pytest.raises(GraphError, match=f"^layer c: cannot be rewritten: {reason}"):
        decompose_graph(model, PLAN)
    assert survey(model) == ()


def computed(op, sizes, shape):
    nodes = [helper.make_node(op, ["c.weight", "sizes"], ["w"]), helper.make_node("MatMul", ["x", "w"], ["y"])]
    return graph_of(nodes, {"c.weight": np.ones(shape, np.float32), "sizes": np.array(sizes)})


def doubled(times):
    """W, put beside itself `times` times: 2 to that power as wide."""
    names = ["c.weight", *(f"w{k}" for k in range(times))]
    nodes = [helper.make_node("Concat", [a, a], [b], axis=1) for a, b in itertools.pairwise(names)]
    return graph_of([*nodes, helper.make_node("MatMul", ["x", names[-1]], ["y"])], {"c.weight": np.ones((8, 8), np.float32)})


def test_products_of_constants_that_take_too_long_are_not_folded(monkeypatch):
    monkeypatch.setattr("tensorrail_exporter.graphs.fold._MACS", 100)
    nodes = [helper.make_node("MatMul", ["a", "b"], ["c.weight"]), helper.make_node("MatMul", ["x", "c.weight"], ["y"])]
    model = graph_of(nodes, dict.fromkeys(("a", "b"), np.ones((8, 8), np.float32)))
    with pytest.raises(GraphError, match=r"its weight 'c\.weight' is not folded: the product 'c\.weight' would take too long"):
        decompose_graph(model, PLAN)


def test_nodes_that_compute_too_much_together_are_not_folded(monkeypatch):
    monkeypatch.setattr("tensorrail_exporter.graphs.fold._TOGETHER", 8 * 8 * 2 + 8 * 8 * 4 - 1)
    with pytest.raises(GraphError, match="its nodes compute more than 383 values"):
        decompose_graph(doubled(2), PLAN)


def hidden():
    """W, spread to 2 to the power of 40 values by a size that inference does not compute."""
    nodes = [
        helper.make_node("Pow", ["base", "power"], ["size"]),
        helper.make_node("Expand", ["c.weight", "size"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    return graph_of(nodes, {"c.weight": np.ones((8, 1), np.float32), "base": np.array([8, 2]), "power": np.array([1, 37])})


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (hidden(), "its weight 'w' is too large to fold: 'w' would hold 1,099,511,627,776 values"),
        (computed("Reshape", [7, 8], (8, 8)), "its weight 'w' cannot be computed from constants"),
        (computed("Expand", [10**7, 10**7], (1, 1)), "its weight 'w' is too large to fold: 'w' would hold 100,0"),
        (doubled(40), r"its weight 'w39' is too large to fold: 'w39' would hold [\d,]+ values"),
    ],
)
def test_weights_that_cannot_be_computed_are_refused_and_not_surveyed(model, reason):
    with pytest.raises(GraphError, match=f"^layer c: {reason}"):
        decompose_graph(model, PLAN)
    assert survey(model) == ()
