"""Planning and rewriting see the same layers, also behind operators that onnx does not know, and in bodies that read them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import tensorrail as tr
from tensorrail_exporter.rewrite.survey import left_out, survey, with_known_axes
from tensorrail_runtime.sessions.session import open_session, run

D = 16
X = np.random.default_rng(1).standard_normal((2, 4, D)).astype(np.float32)


def weight(name, *shape):
    return numpy_helper.from_array(np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32) / 4, name)


def model_of(nodes, weights, output=("b", 4, D)):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 4, D])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)],
        weights,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def product(data, name, output):
    return helper.make_node("MatMul", [data, name], [output], f"product/{name}")


def fused_block():
    nodes = [
        product("x", "w1", "a"),
        helper.make_node("BiasGelu", ["a", "bias"], ["g"], "gelu", domain="com.microsoft"),
        product("g", "w2", "m"),
        helper.make_node("SkipLayerNormalization", ["m", "x", "gamma"], ["s"], "norm", domain="com.microsoft"),
        product("s", "w3", "y"),
    ]
    ones = numpy_helper.from_array(np.ones(D, np.float32), "gamma")
    return model_of(nodes, [weight("w1", D, D), weight("w2", D, D), weight("w3", D, D), weight("bias", D), ones])


def body(name, nodes, weights=()):
    out = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    return helper.make_graph(nodes, name, [], [out], list(weights))


def branches_behind_a_fused_operator():
    choices = {
        "then_branch": body("then", [product("g", "inside1", "t")], [weight("inside1", D, D)]),
        "else_branch": body("else", [product("g", "inside22", "e")], [weight("inside22", D, D)]),
    }
    nodes = [
        product("x", "w1", "a"),
        helper.make_node("QuickGelu", ["a"], ["g"], "gelu", domain="com.microsoft"),
        helper.make_node("ReduceSum", ["x"], ["sum"], "sum", keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["c"], "greater"),
        helper.make_node("If", ["c"], ["i"], "if", **choices),
        product("i", "w2", "y"),
    ]
    zero = numpy_helper.from_array(np.float32(0), "zero")
    return model_of(nodes, [weight("w1", D, D), weight("w2", D, D), zero])


def loop_before_a_layer():
    value = helper.make_tensor_value_info
    inner = helper.make_graph(
        [
            helper.make_node("QuickGelu", ["v"], ["q"], "gelu", domain="com.microsoft"),
            product("q", "inside1", "out"),
            helper.make_node("Identity", ["on"], ["still"], "on"),
        ],
        "loop",
        [value("i", TensorProto.INT64, []), value("on", TensorProto.BOOL, []), value("v", TensorProto.FLOAT, None)],
        [value("still", TensorProto.BOOL, []), value("out", TensorProto.FLOAT, None)],
        [weight("inside1", D, D)],
    )
    nodes = [helper.make_node("Loop", ["n", "", "x"], ["l"], "loop", body=inner), product("l", "w2", "y")]
    return model_of(nodes, [numpy_helper.from_array(np.int64(2), "n"), weight("w2", D, D)])


GRAPHS = {
    "fused block": (fused_block, {"w1", "w2", "w3"}, set()),
    "If": (branches_behind_a_fused_operator, {"w1", "w2", "inside1", "inside22"}, set()),
    "Loop": (loop_before_a_layer, {"w2"}, {"inside1"}),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_every_layer_is_rewritten_or_has_a_reason(name, tmp_path):
    make, rewritten, refused = GRAPHS[name]
    path = tmp_path / "m.onnx"
    path.write_bytes(make().SerializeToString())
    model = with_known_axes(tr.load_model(path))
    kept, others = left_out(model, survey(model))
    assert {layer.name for layer in kept} == rewritten
    assert {row.name.removeprefix("product/") for row in others} == refused
    assert all("unknown" in row.reason or "not known" in row.reason for row in others)
    layers = tuple(tr.LayerPlan(name=layer, format="svd", modes=(D, D), ranks=(D,)) for layer in sorted(rewritten))
    tr.export(path, tmp_path / "o.onnx", tr.Plan(layers=layers))
    expected = run(open_session(path), {"x": X})["y"]
    np.testing.assert_allclose(run(open_session(tmp_path / "o.onnx"), {"x": X})["y"], expected, rtol=1e-4, atol=1e-5)
    assert len([layer for layer in tr.inspect(path).layers if layer.weight]) >= len(rewritten) - 2  # those in branches apart


WAYS = {
    "change": [helper.make_node("Add", ["w", "delta"], ["sum"])],
    "weight normalization": [
        helper.make_node("ReduceL2", ["w"], ["norm"], axes=[0]),
        helper.make_node("Div", ["w", "norm"], ["direction"]),
        helper.make_node("Mul", ["delta", "direction"], ["sum"]),
    ],
    "low-rank change": [
        helper.make_node("Transpose", ["delta"], ["up"], perm=[1, 0]),
        helper.make_node("MatMul", ["delta", "up"], ["update"]),
        helper.make_node("Add", ["w", "update"], ["sum"]),
    ],
    "shape": [
        helper.make_node("Shape", ["w"], ["shape"]),
        helper.make_node("ReduceProd", ["shape"], ["count"]),
        helper.make_node("Constant", [], ["row"], value_ints=[D]),
        helper.make_node("Div", ["count", "row"], ["rows"]),
        helper.make_node("Concat", ["rows", "row"], ["sizes"], axis=0),
        helper.make_node("Reshape", ["delta", "sizes"], ["sum"]),
    ],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_weight_that_is_computed_from_constants_is_a_layer(way, tmp_path):
    nodes = [*WAYS[way], helper.make_node("MatMul", ["x", "sum"], ["y"], "adapted")]
    path = tmp_path / "m.onnx"
    path.write_bytes(model_of(nodes, [weight("w", D, D), weight("delta", D, D)]).SerializeToString())
    kept, others = left_out(tr.load_model(path), survey(tr.load_model(path)))
    assert ([layer.nodes for layer in kept], others) == ([1], ())
    plan = tr.Plan(layers=(tr.LayerPlan(name=kept[0].name, format="svd", modes=(D, D), ranks=(D,)),))
    tr.export(path, tmp_path / "o.onnx", plan)
    expected = run(open_session(path), {"x": X})["y"]
    np.testing.assert_allclose(run(open_session(tmp_path / "o.onnx"), {"x": X})["y"], expected, rtol=1e-4, atol=1e-5)
    assert [node.op_type for node in onnx.load(tmp_path / "o.onnx").graph.node] == ["MatMul", "MatMul"]


def test_a_plan_names_what_it_cannot_rewrite(tmp_path):
    nodes = [
        product("x", "w1", "a"),
        helper.make_node("Sinh", ["w"], ["sum"], "sum"),
        helper.make_node("MatMul", ["a", "sum"], ["b"], "adapted"),
        helper.make_node("Einsum", ["b", "e"], ["c"], "einsum", equation="bnd,de->bne"),
        helper.make_node("MatMul", ["c", "c2"], ["y"], "attention"),
        helper.make_node("Transpose", ["c"], ["c2"], "transpose", perm=[0, 2, 1]),
    ]
    nodes[4], nodes[5] = nodes[5], nodes[4]
    model = model_of(nodes, [weight("w1", D, D), weight("w", D, D), weight("e", D, D)], ["b", 4, 4])
    onnx.checker.check_model(model, full_check=True)
    kept, others = left_out(model, survey(model))
    assert [layer.name for layer in kept] == ["w1"]
    reasons = {row.op: row.reason for row in others}
    assert reasons.keys() == {"MatMul", "Einsum"}
    assert reasons["MatMul"] == "its weight 'sum' is computed in the graph, not a constant"
    assert "no rule rewrites Einsum" in reasons["Einsum"]
