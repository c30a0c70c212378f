"""The operators that ONNX Runtime fuses, in one model and compared in two."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from conftest import make_model
from onnx import TensorProto, helper

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.measure.fusions import Fusions, compared_fusions, fused_operators
from tensorrail_runtime.sessions.session import Session


def saved(model, folder, name="model.onnx"):
    path = folder / name
    onnx.save(model, path)
    return path


def values(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def network(rng, *, apart=False):
    """Return a model of a convolution with a Relu, and a dense layer with a bias; `apart`: both are read elsewhere."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["conv"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("GlobalAveragePool", ["relu"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "m"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["out"]),
    ]
    outputs = {"out": [1, 4]} | ({"conv": [1, 8, 6, 6], "product": [1, 4]} if apart else {})
    weights = {"w": values(rng, 8, 8, 3, 3), "m": values(rng, 8, 4), "b": values(rng, 4)}
    return make_model(nodes, weights, {"x": [1, 8, 6, 6]}, outputs)


def test_fused_operators_are_counted_by_what_they_take_in(rng, tmp_path):
    report = fused_operators(saved(network(rng), tmp_path))
    assert report.counts == {"Conv + Relu": 1, "Gemm": 1}
    assert "operators that ONNX Runtime fuses on cpu" in " ".join(str(report).split())
    basic = fused_operators(saved(network(rng), tmp_path), Session(level="none"))
    assert basic.counts == {}
    assert "fuses no nodes" in str(basic)


def test_what_the_file_has_already_is_not_counted(rng, tmp_path):
    model = network(rng)
    model.graph.node[4].CopyFrom(helper.make_node("Gemm", ["flat", "m", "b"], ["out"]))
    del model.graph.node[5]
    assert fused_operators(saved(model, tmp_path)).counts == {"Conv + Relu": 1}


def test_lost_fusions_are_named(rng, tmp_path):
    dense, other = saved(network(rng), tmp_path, "a.onnx"), saved(network(rng, apart=True), tmp_path, "b.onnx")
    fusions = compared_fusions(dense, other)
    assert fusions.lost == {"Conv + Relu": 1, "Gemm": 1}
    assert fusions.described() == "fused operators of ONNX Runtime that are LOST: Conv + Relu 1 → 0, Gemm 1 → 0"
    assert compared_fusions(dense, dense).described() == "fused operators of ONNX Runtime: all 2 are still there"
    assert compared_fusions(other, other).described() == ""


def test_in_int8_products_are_fused_in_other_operators():
    fusions = Fusions(before={"Conv + Relu": 8, "Gemm": 1, "Attention": 6}, after={"QLinearConv": 8, "QGemm": 1})
    assert fusions.lost == {"Attention": 6}
    assert Fusions(before={"Conv + Relu": 8}, after={"Conv + Relu": 7}).lost == {"Conv + Relu": 1}
    assert Fusions(before={"Conv + Relu": 8}, after={"QLinearConv": 8}).described() == ""
    assert Fusions(before={}, after={"Conv + Relu": 1}).described() == ""


def test_a_model_that_does_not_load_is_told_and_ends_nothing(rng, tmp_path):
    path = saved(network(rng), tmp_path)
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    assert "are not compared: " in compared_fusions(path, tmp_path / "broken.onnx").described()
    with pytest.raises(ModelError):
        fused_operators(tmp_path / "broken.onnx")


def test_weights_may_be_external(rng, tmp_path):
    model = network(rng)
    onnx.save(model, tmp_path / "large.onnx", save_as_external_data=True, size_threshold=0, location="large.data")
    assert fused_operators(tmp_path / "large.onnx").counts == {"Conv + Relu": 1, "Gemm": 1}


def test_operators_in_bodies_are_found(rng, tmp_path):
    wide = helper.make_tensor_value_info("sum", TensorProto.FLOAT, [2, 4])
    nodes = [helper.make_node("MatMul", ["x", "m"], ["inner"]), helper.make_node("Add", ["inner", "b"], ["sum"])]
    body = helper.make_graph(nodes, "then", [], [wide])
    same = helper.make_tensor_value_info("same", TensorProto.FLOAT, [2, 4])
    other = helper.make_graph([helper.make_node("Identity", ["c"], ["same"])], "else", [], [same])
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        helper.make_node("Cast", ["total"], ["choice"], to=TensorProto.BOOL),
        helper.make_node("If", ["choice"], ["out"], then_branch=body, else_branch=other),
    ]
    weights = {"m": values(rng, 8, 4), "b": values(rng, 4), "c": values(rng, 2, 4)}
    assert fused_operators(saved(make_model(nodes, weights, {"x": [2, 8]}, {"out": [2, 4]}), tmp_path)).counts == {"Gemm": 1}


def test_tensorrt_does_not_tell_its_operators(rng, tmp_path):
    path = saved(network(rng), tmp_path)
    with pytest.raises(ModelError, match="TensorRT compiles whole parts of a model"):
        fused_operators(path, Session(provider="tensorrt"))
    assert "not compared: TensorRT compiles" in compared_fusions(path, path, Session(provider="tensorrt")).described()
