"""Conversion of graphs whose names, constants and outputs the converters of ONNX Runtime do not expect."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tensorrail_exporter.precision.reduce import to_fp16, to_int8
from tensorrail_runtime.sessions.session import open_session, run

X = np.random.default_rng(1).standard_normal((32, 16, 6, 6)).astype(np.float32)


def model_of(nodes, weights, inputs, outputs, **more):
    graph = helper.make_graph(
        [helper.make_node(*args, **attrs) for args, attrs in nodes],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    domains = [helper.make_opsetid(name, 1) for name in more.pop("domains", ())]
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), *domains], ir_version=8, **more)
    onnx.checker.check_model(model)
    return model


def outputs_of(model, feed, tmp_path, name="m"):
    onnx.save(model, tmp_path / f"{name}.onnx")
    return run(open_session(tmp_path / f"{name}.onnx"), feed)


def weights(rng):
    conv = lambda: (rng.standard_normal((16, 16, 1, 1)) / 4).astype(np.float32)  # noqa: E731
    return {"w1": conv(), "w2": conv(), "w3": conv(), "b": rng.standard_normal(16).astype(np.float32)}


def two_convolutions(rng, weight="w1", gain="gain", middle="t", data="x", shared="b"):
    """Two convolutions share a bias; `weight`, `gain`, `middle`, `data` and `shared` are names to choose."""
    stored = weights(rng)
    stored[weight], stored[shared] = stored.pop("w1"), stored.pop("b")
    stored[gain] = np.full((16, 1, 1), 5.0, np.float32)
    nodes = [
        (("Conv", [data, weight, shared], ["y1"], "c1"), {}),
        (("Relu", ["y1"], [middle], "r1"), {}),
        (("Mul", [middle, gain], ["m"], "mul"), {}),
        (("Conv", ["m", "w2", shared], ["y2"], "c2"), {}),
        (("Conv", [middle, "w3", shared], ["y3"], "c3"), {}),
        (("Add", ["y2", "y3"], ["y"], "add"), {}),
    ]
    shape = ["n", 16, 6, 6]
    return model_of(nodes, stored, {data: shape}, {"y": shape})


TAKEN = [
    {"middle": "b0"},
    {"shared": "c", "gain": "c1"},
    {"gain": "w1_scale"},
    {"gain": "w1_zero_point"},
    {"gain": "w1_quantized"},
    {"gain": "w1_DequantizeLinear_Output"},
    {"gain": "x_scale"},
    {"gain": "x_QuantizeLinear_Input"},
    {"middle": "m_QuantizeLinear_Output"},
    {"gain": "b_quantized", "middle": "b_quantized_scale"},
    {"middle": "y1_ReduceMin"},
    {"weight": "#0#", "gain": "#1#_scale", "middle": "#2#"},
    {"gain": "x_cast_to_fp16", "middle": "graph_input_cast_0", "weight": "y1_cast_to_fp32", "data": "graph_output_cast_0"},
]


@pytest.mark.parametrize("names", TAKEN, ids=lambda names: ",".join(names.values()))
@pytest.mark.parametrize("to", ["int8", "fp16"])
def test_names_that_are_taken_change_nothing(names, to, tmp_path):
    plain = two_convolutions(np.random.default_rng(0))
    taken = two_convolutions(np.random.default_rng(0), **names)
    data = names.get("data", "x")
    results = []
    for name, model, source in (("plain", plain, "x"), ("taken", taken, data)):
        small = to_int8(model, [{source: X}]) if to == "int8" else to_fp16(model, keep=("mul",))
        onnx.checker.check_model(small, full_check=True)
        results.append(outputs_of(small, {source: X}, tmp_path, name)["y"])
        made = {out for node in small.graph.node for out in node.output}
        assert "y" in made
        assert [value.name for value in small.graph.input] == [source]
    np.testing.assert_array_equal(*results)
    exact = outputs_of(plain, {"x": X}, tmp_path)["y"]
    error = np.linalg.norm(results[1] - exact) / np.linalg.norm(exact)
    assert 0 < error < (0.05 if to == "int8" else 0.005)


def test_new_names_follow_the_names_of_the_model(tmp_path):
    small = to_int8(two_convolutions(np.random.default_rng(0), gain="w1_scale"), [{"x": X}])
    names = {tensor.name for tensor in small.graph.initializer}
    assert {"w1_quantized", "w1_scale", "w1_scale_2", "w2_scale"} <= names
    assert {"c1", "c2", "c3", "mul"} <= {node.name for node in small.graph.node}
    assert not any("#" in name for node in small.graph.node for name in (node.name, *node.input, *node.output))


@pytest.mark.parametrize("to", ["int8", "fp16"])
@pytest.mark.parametrize("output", ["k", "a.weight", "x", "sparse"])
def test_outputs_that_no_node_computes(output, to, tmp_path, rng):
    stored = {
        "a.weight": rng.standard_normal((48, 64)).astype(np.float32),
        "b.weight": rng.standard_normal((64, 32)).astype(np.float32),
    }
    stored["k"] = rng.standard_normal(5).astype(np.float32)
    shapes = {"k": [5], "a.weight": [48, 64], "x": ["n", 48], "sparse": [7]}
    nodes = [
        (("MatMul", ["x", "a.weight"], ["h"], "a"), {}),
        (("Relu", ["h"], ["r"], "r"), {}),
        (("MatMul", ["r", "b.weight"], ["y"], "b"), {}),
    ]
    model = model_of(
        nodes, stored, {"x": ["n", 48]}, {"y": ["n", 32], **({} if output == "sparse" else {output: shapes[output]})}
    )
    if output == "sparse":  # an initializer that is not a float, of which nothing is converted
        model.graph.initializer.append(numpy_helper.from_array(np.arange(7), "sparse"))
        model.graph.output.append(helper.make_tensor_value_info("sparse", TensorProto.INT64, [7]))
    feed = {"x": rng.standard_normal((16, 48)).astype(np.float32)}
    for keep in ((), ("a",)):
        small = to_int8(model, [feed], keep=keep) if to == "int8" else to_fp16(model, keep=keep)
        onnx.checker.check_model(small, full_check=True)
        dense, reduced = outputs_of(model, feed, tmp_path), outputs_of(small, feed, tmp_path, "small")
        assert list(dense) == list(reduced)
        np.testing.assert_array_equal(dense[output], reduced[output])
        assert np.linalg.norm(dense["y"] - reduced["y"]) < 0.05 * np.linalg.norm(dense["y"])


@pytest.mark.parametrize("constant", [{"value_float": 0.5}, {"value_floats": [0.5] * 64}, {"value": np.float32(0.5)}])
@pytest.mark.parametrize("keep", [(), ("half",), ("mul", "half")])
def test_constants_are_converted_however_they_are_stored(constant, keep, tmp_path, rng):
    stored = {"a.weight": rng.standard_normal((48, 64)).astype(np.float32)}
    attributes = {key: numpy_helper.from_array(value) if key == "value" else value for key, value in constant.items()}
    nodes = [
        (("MatMul", ["x", "a.weight"], ["h"], "a"), {}),
        (("Constant", [], ["k"], "half"), attributes),
        (("Mul", ["h", "k"], ["y"], "mul"), {}),
    ]
    model = model_of(nodes, stored, {"x": ["n", 48]}, {"y": ["n", 64]})
    feed = {"x": rng.standard_normal((4, 48)).astype(np.float32)}
    small = outputs_of(to_fp16(model, keep=keep), feed, tmp_path, "small")["y"]
    np.testing.assert_allclose(small, outputs_of(model, feed, tmp_path)["y"], rtol=5e-3, atol=5e-3)


def test_functions_with_constants_and_layers_are_converted(tmp_path, rng):
    body = [
        helper.make_node("Constant", [], ["half"], value_float=0.5),
        helper.make_node("MatMul", ["a", "w"], ["m"], "inner"),
        helper.make_node("Mul", ["m", "half"], ["o"]),
    ]
    functions = [helper.make_function("own", "block", ["a", "w"], ["o"], body, [helper.make_opsetid("", 17)])]
    stored = {f"{name}.weight": rng.standard_normal((48, 48)).astype(np.float32) / 7 for name in "ab"}
    nodes = [
        (("block", ["x", "a.weight"], ["half"], "first"), {"domain": "own"}),
        (("block", ["half", "b.weight"], ["y"], "second"), {"domain": "own"}),
    ]
    model = model_of(nodes, stored, {"x": ["n", 48]}, {"y": ["n", 48]}, domains=("own",), functions=functions)
    feed = {"x": rng.standard_normal((16, 48)).astype(np.float32)}
    dense = outputs_of(model, feed, tmp_path)["y"]
    for small in (to_fp16(model), to_int8(model, [feed])):
        onnx.checker.check_model(small, full_check=True)
        assert np.linalg.norm(outputs_of(small, feed, tmp_path, "small")["y"] - dense) < 0.05 * np.linalg.norm(dense)
        kinds = {tensor.data_type for tensor in small.graph.initializer if len(tensor.dims) == 2}
        assert TensorProto.FLOAT not in kinds


def test_names_that_repeat_between_bodies_are_kept_apart(tmp_path, rng):
    def branch(factor):
        stored = [numpy_helper.from_array(np.float32(factor), "k")]
        out = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node("Mul", ["h", "k"], ["z"], "scale")], "branch", [], [out], stored)

    stored = {"a.weight": rng.standard_normal((48, 64)).astype(np.float32), "limit": np.float32(0.0)}
    nodes = [
        (("MatMul", ["x", "a.weight"], ["h"], "a"), {}),
        (("ReduceSum", ["h"], ["s"], "sum"), {"keepdims": 0}),
        (("Greater", ["s", "limit"], ["c"], "greater"), {}),
        (("If", ["c"], ["y"], "if"), {"then_branch": branch(2.0), "else_branch": branch(3.0)}),
    ]
    model = model_of(nodes, stored, {"x": ["n", 48]}, {"y": ["n", 64]})
    x = rng.standard_normal((4, 48)).astype(np.float32)
    for feed in ({"x": x}, {"x": -x}):
        dense = outputs_of(model, feed, tmp_path)["y"]
        for small in (to_fp16(model, keep=("sum", "greater")), to_int8(model, [feed])):
            difference = outputs_of(small, feed, tmp_path, "small")["y"] - dense
            assert np.linalg.norm(difference) < 0.05 * np.linalg.norm(dense)
