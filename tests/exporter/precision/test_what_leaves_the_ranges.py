"""A Relu or Clip that int8 cannot turn into a range stays, and models that a later opset changes are refused."""

import numpy as np
import onnx
import pytest
from cases import relative
from conftest import make_model
from onnx import TensorProto, helper

from tensorrail_exporter.precision.int8 import to_int8
from tensorrail_runtime.errors import GraphError
from tensorrail_runtime.sessions.session import open_session, run


def weight(rng, *shape):
    return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def errors(nodes, outputs, rng, tmp_path, **constants):
    """Return the relative error of each output in int8."""
    stored = {"w": weight(rng, 8, 8, 3, 3), "w2": weight(rng, 8, 8, 1, 1)} | constants
    model = make_model(nodes, stored, {"x": ["n", 8, 10, 10]}, {name: [None] * 4 for name in outputs}, opset=17)
    feeds = [{"x": rng.standard_normal((2, 8, 10, 10)).astype(np.float32)} for _ in range(8)]
    found = []
    for name, one in (("fp32", model), ("int8", to_int8(model, feeds))):
        path = tmp_path / f"{name}.onnx"
        onnx.save(one, path)
        found.append(run(open_session(path), feeds[0]))
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(path).graph.node)
    return [relative(found[1][name], found[0][name]) for name in outputs]


CONV = helper.make_node("Conv", ["x", "w"], ["a"], "conv", pads=[1] * 4)
BLOCK = [
    CONV,
    helper.make_node("Relu", ["a"], ["c"], "relu"),
    helper.make_node("Conv", ["c", "w2"], ["d"], "conv2"),
    helper.make_node("Add", ["d", "c"], ["e"], "add"),
]


def test_a_relu_that_is_also_an_output_stays(rng, tmp_path):
    assert max(errors(BLOCK, ["e", "c"], rng, tmp_path)) < 0.05


def test_a_relu_that_a_node_in_fp32_reads_as_well_stays(rng, tmp_path):
    pool = helper.make_node("GlobalAveragePool", ["c"], ["z"], "pool")
    assert max(errors([*BLOCK, pool], ["e", "z"], rng, tmp_path)) < 0.05


def test_a_relu_that_is_only_rounded_becomes_a_range(rng, tmp_path):
    errors(BLOCK, ["e"], rng, tmp_path)
    assert not [node for node in onnx.load(tmp_path / "int8.onnx").graph.node if node.op_type == "Relu"]


@pytest.mark.parametrize(
    ("low", "high", "stays"), [(0.1, 10.0, True), (-3.0, -0.5, True), (0.0, 6.0, False), (-1.0, 1.0, False), (None, 6.0, False)]
)
@pytest.mark.parametrize("opset", ["inputs", "attributes"])
def test_a_clip_stays_unless_its_limits_include_zero(low, high, stays, opset, rng, tmp_path):
    limits = {name: np.float32(value) for name, value in (("low", low), ("high", high)) if value is not None}
    clip = helper.make_node("Clip", ["a", "low" if low is not None else "", "high"], ["c"], "clip")
    if opset == "attributes":
        given = {key: float(value) for key, value in (("min", low), ("max", high)) if value is not None}
        clip, limits = helper.make_node("Clip", ["a"], ["c"], "clip", **given), {}
    nodes = [CONV, clip, helper.make_node("Conv", ["c", "w2"], ["y"], "conv2")]
    stored = {"w": weight(rng, 8, 8, 3, 3), "w2": weight(rng, 8, 8, 1, 1)} | limits
    version = 10 if opset == "attributes" else 17
    model = make_model(nodes, stored, {"x": ["n", 8, 10, 10]}, {"y": [None] * 4}, opset=version)
    feeds = [{"x": rng.standard_normal((2, 8, 10, 10)).astype(np.float32)} for _ in range(8)]
    quantized = to_int8(model, feeds)
    assert bool([node for node in quantized.graph.node if node.op_type == "Clip"]) == stays
    for name, one in (("fp32", model), ("int8", quantized)):
        onnx.save(one, tmp_path / f"{name}.onnx")
    before, after = (run(open_session(tmp_path / f"{name}.onnx"), feeds[0])["y"] for name in ("fp32", "int8"))
    assert relative(after, before) < 0.05


def test_a_logarithm_behind_a_clip_stays_finite(rng, tmp_path):
    nodes = [
        CONV,
        helper.make_node("Clip", ["a", "low", "high"], ["c"], "clip"),
        helper.make_node("Log", ["c"], ["y"], "log"),
    ]
    limits = {"low": np.float32(0.1), "high": np.float32(10)}
    assert errors(nodes, ["y"], rng, tmp_path, **limits)[0] < 0.05


def test_a_bias_that_is_also_an_output_keeps_its_name(rng, tmp_path):
    bias = rng.standard_normal(6).astype(np.float32)
    gemm = helper.make_node("Gemm", ["x", "w", "b"], ["y"], "gemm")
    model = make_model([gemm], {"w": weight(rng, 8, 6), "b": bias}, {"x": ["n", 8]}, {"y": ["n", 6], "b": [6]}, opset=17)
    feeds = [{"x": rng.standard_normal((4, 8)).astype(np.float32)} for _ in range(8)]
    path = tmp_path / "int8.onnx"
    onnx.save(to_int8(model, feeds), path)
    np.testing.assert_array_equal(run(open_session(path), feeds[0])["b"], bias)


def test_an_operator_that_onnx_converts_wrongly_is_refused(rng):
    """The axis of a Hardmax means something else before opset 13, and the converter leaves it as it is."""
    nodes = [CONV, helper.make_node("Hardmax", ["a"], ["y"], "hardmax", axis=1)]
    model = make_model(nodes, {"w": weight(rng, 8, 8, 3, 3)}, {"x": ["n", 8, 10, 10]}, {"y": [None] * 4}, opset=11)
    feeds = [{"x": rng.standard_normal((2, 8, 10, 10)).astype(np.float32)} for _ in range(4)]
    with pytest.raises(GraphError, match="output 'y' changed when onnx converted the model from opset 11 to 13"):
        to_int8(model, feeds)


def test_an_unknown_type_of_a_weight_is_named(rng, tmp_path):
    from tensorrail_exporter.graphs.io import load_model

    model = make_model([CONV], {"w": weight(rng, 8, 8, 3, 3)}, {"x": ["n", 8, 10, 10]}, {"a": [None] * 4})
    model.graph.initializer.append(TensorProto(name="z", dims=[1], data_type=99, raw_data=b"\0"))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(GraphError, match=r"m\.onnx: not a valid ONNX model .*'z' has the unknown type 99"):
        load_model(tmp_path / "m.onnx")
