"""Inputs of length 0, files that hold what one run takes, and random integers that a model refuses."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import tensorrail as tr
from tensorrail_runtime.feeds.loading import load_batches
from tensorrail_runtime.sessions.inputs import parse_shapes
from tensorrail_runtime.sessions.session import open_session


def saved(path, nodes, inputs, outputs, weights=()):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [value(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in dict(weights).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


@pytest.fixture
def decoder(tmp_path, rng):
    """Return a model whose past has length 0 in the first step."""
    nodes = [
        helper.make_node("Concat", ["past", "x"], ["all"], "concat", axis=1),
        helper.make_node("MatMul", ["all", "w"], ["y"], "product"),
    ]
    inputs = {"x": (TensorProto.FLOAT, ["b", "s", 8]), "past": (TensorProto.FLOAT, ["b", "p", 8])}
    return saved(tmp_path / "m.onnx", nodes, inputs, {"y": ["b", "t", 8]}, {"w": rng.standard_normal((8, 8), np.float32)})


def test_a_past_of_length_0_is_an_input(decoder, tmp_path, rng):
    x = rng.standard_normal((6, 1, 8)).astype(np.float32)
    arrays = {"x": x, "past": np.zeros((6, 0, 8), np.float32)}
    np.savez(tmp_path / "x.npz", **arrays)
    batches = load_batches(tmp_path / "x.npz", open_session(decoder), batch=4)
    assert [feed["past"].shape for feed in batches.feeds] == [(4, 0, 8), (2, 0, 8)]
    assert tr.check(decoder, decoder, inputs=tmp_path / "x.npz").batches == (6,)
    shapes = parse_shapes(["x=1,1,8", "past=1,0,8"])
    assert tr.inspect(decoder, options=tr.Options(timing=tr.Timing(shapes=shapes))).macs == 8 * 8
    report = tr.quantize(
        decoder, tmp_path / "q.onnx", tr.Quantization("int8", tolerance=1), calibration=arrays,
        options=tr.Options(timing=tr.Timing(seconds=0.05)),
    )  # fmt: skip
    assert report.samples == 1  # of six, the others are for the ranges


@pytest.mark.parametrize("text", ["x=0,3", "x=1,-1", "x=1,a", "x="])
def test_other_sizes_are_refused(text):
    with pytest.raises(tr.ModelError, match="expected a shape such as"):
        parse_shapes([text])


def test_no_samples_are_refused(decoder):
    arrays = {"x": np.zeros((0, 1, 8), np.float32), "past": np.zeros((0, 0, 8), np.float32)}
    with pytest.raises(tr.ModelError, match="the array of input 'x' holds no data"):
        load_batches(arrays, open_session(decoder), batch=4)


def test_arrays_of_the_declared_shapes_are_one_run(tmp_path):
    nodes = [helper.make_node("ReduceSum", ["h"], ["s"], "sum", keepdims=0), helper.make_node("Add", ["x", "s"], ["y"], "add")]
    inputs = {"x": (TensorProto.FLOAT, [1, 8]), "h": (TensorProto.FLOAT, [2, 1, 4])}
    path = saved(tmp_path / "m.onnx", nodes, inputs, {"y": [1, 8]})
    arrays = {"x": np.ones((1, 8)), "h": np.ones((2, 1, 4))}
    batches = load_batches(arrays, open_session(path), batch=16)
    assert (batches.whole, [feed["h"].shape for feed in batches.feeds]) == (True, [(2, 1, 4)])
    with pytest.raises(tr.ModelError, match="the arrays of the inputs differ in length"):
        load_batches({**arrays, "x": np.ones((3, 8))}, open_session(path), batch=16)


def test_a_run_that_refuses_random_integers_says_what_to_give(tmp_path, rng):
    nodes = [helper.make_node("Gather", ["table", "i"], ["y"], "gather")]
    weights = {"table": rng.standard_normal((1, 8)).astype(np.float32)}
    path = saved(tmp_path / "m.onnx", nodes, {"i": (TensorProto.INT64, ["n"])}, {"y": ["n", 8]}, weights)
    with pytest.raises(tr.ModelError, match=r"the values of i are random, 0 and 1: give valid inputs .* such as i=0"):
        tr.check(path, path)
    assert tr.check(path, path, options=tr.Options(inputs=tr.InputRules(constants={"i": 0}))).holds
    assert tr.check(path, path, inputs={"i": np.zeros(5, np.int64)}).holds
