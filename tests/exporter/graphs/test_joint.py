"""Layers that read the same input become one layer, and the graph computes the same."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import make_model
from onnx import helper, numpy_helper

import tensorrail as tr
from tensorrail_exporter.graphs.joint import joint_groups, joint_name, with_joint, without_inner_shapes
from tensorrail_exporter.plans.plan import LayerPlan, Plan
from tensorrail_runtime.errors import GraphError, PlanError

QKV = ("block.query", "block.key", "block.value")
JOINT = "block.{query,key,value}"


def attention(rng, biases=3, gemm=False, opset=20, widths=(8, 8, 12)):
    """Three products of x (batch, 16), with a bias on the first so many of them, and their sum of squares by row."""
    weights, nodes = {}, []
    for k, (name, width) in enumerate(zip(QKV, widths, strict=True)):
        shape = (width, 16) if gemm else (16, width)
        weights[f"{name}.weight"] = rng.standard_normal(shape).astype(np.float32)
        inputs = ["x", f"{name}.weight"]
        if k < biases:
            weights[f"{name}.bias"] = rng.standard_normal(width).astype(np.float32)
        if gemm:
            nodes.append(helper.make_node("Gemm", inputs + [f"{name}.bias"] * (k < biases), [f"y{k}"], transB=1))
        elif k < biases:
            nodes.append(helper.make_node("MatMul", inputs, [f"p{k}"]))
            terms = [f"p{k}", f"{name}.bias"]
            nodes.append(helper.make_node("Add", terms if k % 2 else terms[::-1], [f"y{k}"]))
        else:
            nodes.append(helper.make_node("MatMul", inputs, [f"y{k}"]))
    nodes.append(helper.make_node("Concat", ["y0", "y1", "y2"], ["y"], axis=-1))
    return make_model(nodes, weights, {"x": ["batch", 16]}, {"y": ["batch", sum(widths)]}, opset)


def outputs(model, feed):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)


def same(model, other, rng):
    feed = {"x": rng.standard_normal((5, 16)).astype(np.float32)}
    for ours, theirs in zip(outputs(model, feed), outputs(other, feed), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (QKV, JOINT),
        (("onnx::MatMul_19", "onnx::MatMul_195"), "onnx::MatMul_{19,195}"),
        (("up", "gate"), "{up,gate}"),
        (("a.query.dense", "a.quick.dense"), "a.{query.dense,quick.dense}"),
    ],
)
def test_the_name_says_what_the_layers_have_in_common(parts, name):
    assert joint_name(parts) == name


@pytest.mark.parametrize("opset", [11, 13, 20])
@pytest.mark.parametrize(("gemm", "biases"), [(False, 3), (False, 0), (False, 2), (True, 3), (True, 0)])
def test_the_graph_computes_the_same(gemm, biases, opset, rng):
    model = attention(rng, biases, gemm, opset)
    before = model.SerializeToString()
    groups = joint_groups(model)
    assert groups == (QKV,)
    joined = with_joint(model, groups)
    onnx.checker.check_model(joined, full_check=True)
    assert model.SerializeToString() == before
    ops = [node.op_type for node in joined.graph.node]
    assert ops.count("MatMul") + ops.count("Gemm") == 1
    assert ops.count("Add") == {3: 1, 0: 0, 2: 2}[biases] * (not gemm)  # one Add for all, where all have one
    parts = {f"{name}.{part}" for name in QKV for part in ("weight", "bias")}
    left = parts & {tensor.name for tensor in joined.graph.initializer}
    assert left == ({"block.query.bias", "block.key.bias"} if biases == 2 else set())  # what is still added apart
    same(model, joined, rng)


def test_gemms_with_and_without_a_bias_stay_apart(rng):
    assert joint_groups(attention(rng, biases=2, gemm=True)) == (QKV[:2],)


def test_a_sum_behind_gemms_that_add_themselves_stays(rng):
    model = attention(rng, gemm=True)
    for k, name in enumerate(QKV):
        width = 12 if k == 2 else 8
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(width).astype(np.float32), f"{name}.shift"))
        model.graph.node[k].output[0] = f"g{k}"
        model.graph.node.insert(3 + k, helper.make_node("Add", [f"g{k}", f"{name}.shift"], [f"y{k}"]))
    joined = with_joint(model, joint_groups(model))
    assert [node.op_type for node in joined.graph.node].count("Gemm") == 1
    same(model, joined, rng)


def test_a_name_that_is_taken_is_not_used_again(rng):
    model = attention(rng)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), f"{JOINT}/bias"))
    assert joint_groups(model) == ()
    with pytest.raises(GraphError, match="cannot become one, since the graph has a"):
        with_joint(model, [QKV])


def test_a_split_counts_axes_from_the_end_from_opset_11(rng):
    assert joint_groups(attention(rng, opset=10)) == ()


def test_what_is_kept_stays_apart(rng):
    assert joint_groups(attention(rng), lambda name: name.endswith("key")) == ((QKV[0], QKV[2]),)


def change_input(model):
    model.graph.input.append(helper.make_tensor_value_info("block.key.weight", onnx.TensorProto.FLOAT, [16, 8]))


def change_output(model):
    model.graph.output.append(helper.make_tensor_value_info("block.key.weight", onnx.TensorProto.FLOAT, [16, 8]))


def read_twice(model):
    model.graph.node.append(helper.make_node("Identity", ["block.key.weight"], ["copy"]))


def other_type(model):
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == "block.key.weight")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))


def other_input(model):
    model.graph.node.insert(0, helper.make_node("Relu", ["x"], ["r"]))
    next(node for node in model.graph.node if "block.key.weight" in node.input).input[0] = "r"


@pytest.mark.parametrize("change", [change_input, change_output, read_twice, other_type, other_input])
def test_a_weight_that_others_see_or_of_another_kind_stays_apart(change, rng):
    model = attention(rng)
    change(model)
    assert joint_groups(model) == ((QKV[0], QKV[2]),)


def test_a_product_that_is_an_output_keeps_its_name(rng):
    model = attention(rng)
    model.graph.output.append(helper.make_tensor_value_info("p1", onnx.TensorProto.FLOAT, ["batch", 8]))
    joined = with_joint(model, joint_groups(model))
    assert [node.op_type for node in joined.graph.node].count("Add") == 3
    same(model, joined, rng)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [(("block.query", "other"), "layer other: expected a product"), (("block.query", "out"), "read the same input")],
)
def test_layers_that_cannot_become_one_are_named(parts, reason, rng):
    model = attention(rng)
    model.graph.initializer.append(numpy_helper.from_array(np.eye(28, dtype=np.float32), "out.weight"))
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(helper.make_node("MatMul", ["before", "out.weight"], ["y"]))
    with pytest.raises(GraphError, match=reason):
        with_joint(model, [parts])


def test_a_plan_names_the_joint_layer(rng, tmp_path):
    plan = Plan(layers=(LayerPlan(name=JOINT, format="svd", modes=(28, 16), ranks=(16,)),), joint=(QKV,))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    model = attention(rng)
    onnx.save(model, tmp_path / "dense.onnx")
    tr.export(tmp_path / "dense.onnx", tmp_path / "model.onnx", tmp_path / "plan.json")
    written = onnx.load(tmp_path / "model.onnx")
    assert f"{JOINT}/0" in {tensor.name for tensor in written.graph.initializer}
    same(model, written, rng)  # at full rank
    report = tr.check(tmp_path / "dense.onnx", tmp_path / "model.onnx", layers=tr.Layers(tmp_path / "plan.json"))
    assert [row.layer for row in report.layers] == [JOINT]
    assert report.layers[0].approximation < 1e-5


def test_a_plan_may_join_alone(rng, tmp_path):
    plan = Plan(layers=(), joint=(QKV,), inner_shapes=False)
    assert plan.changes
    model = onnx.shape_inference.infer_shapes(attention(rng))
    assert model.graph.value_info
    onnx.save(model, tmp_path / "dense.onnx")
    tr.export(tmp_path / "dense.onnx", tmp_path / "model.onnx", plan)
    written = onnx.load(tmp_path / "model.onnx")
    assert not written.graph.value_info
    assert [node.op_type for node in written.graph.node].count("MatMul") == 1
    same(model, written, rng)


def test_files_of_older_versions_are_written_as_before(tmp_path):
    plan = Plan(layers=(LayerPlan(name="a", format="svd", modes=(4, 4), ranks=(2,)),))
    plan.save(tmp_path / "plan.json")
    assert set(json.loads((tmp_path / "plan.json").read_text())) == {"version", "layers"}


def test_a_layer_joins_once():
    with pytest.raises(ValueError, match="may be joined with others once, but 'a' appears 2 times"):
        Plan(layers=(), joint=(("a", "b"), ("a", "c")))
    with pytest.raises(ValueError, match="at least 2"):
        Plan(layers=(), joint=(("a",),))


def test_torch_keeps_layers_apart():
    from torch import nn

    plan = Plan(layers=(LayerPlan(name="{0,1}", format="svd", modes=(8, 4), ranks=(2,)),), joint=(("0", "1"),))
    with pytest.raises(PlanError, match="the plan joins 0, 1, which a PyTorch module keeps apart"):
        tr.ADMM(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), plan)


def test_shapes_of_inner_tensors_are_left_out_of_a_copy(rng):
    model = onnx.shape_inference.infer_shapes(attention(rng))
    count = len(model.graph.value_info)
    assert not without_inner_shapes(model).graph.value_info
    assert len(model.graph.value_info) == count > 0
