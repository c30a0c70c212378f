"""The precisions that a network is planned in: fp16 without overflow, and what is asked for."""

from typing import get_args

import numpy as np
import onnxruntime
import pytest
from conftest import make_model
from onnx import TensorProto, helper, numpy_helper

from tensorrail_exporter import GraphError, PlanError
from tensorrail_exporter.plans.plan import Precision
from tensorrail_exporter.precision.finite import Float16Converter, to_finite_fp16
from tensorrail_exporter.precision.fp16 import to_fp16
from tensorrail_exporter.precision.planned import PRECISIONS
from tensorrail_exporter.precision.ranges import RangeError, require_finite
from tensorrail_exporter.search import targets
from tensorrail_exporter.search.targets import precisions_of
from tensorrail_runtime.graphs.constants import constants_of
from tensorrail_runtime.graphs.files import descendants
from tensorrail_runtime.sessions.session import Session


def loud(rng, scale=1e5, shrink=1e-5):
    """Return three products, the first of which gives values of about `scale`, and the second takes them back."""
    weights = {
        "up.weight": (scale / 4 * rng.standard_normal((16, 16))).astype(np.float32),
        "down.weight": (shrink / 4 * rng.standard_normal((16, 16))).astype(np.float32),
        "last.weight": (rng.standard_normal((16, 16)) / 4).astype(np.float32),
    }
    names = [name.removesuffix(".weight") for name in weights]
    sources = ["x", *names[:-1]]
    outputs = [*names[:-1], "y"]
    nodes = [
        helper.make_node("Gemm", [source, weight], [out], name, transB=1)
        for source, weight, out, name in zip(sources, weights, outputs, names, strict=True)
    ]
    return make_model(nodes, weights, {"x": ["batch", 16]}, {"y": ["batch", 16]})


def types_of(model):
    return {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def test_every_precision_of_a_plan_is_known():
    assert tuple(PRECISIONS) == get_args(Precision)
    assert PRECISIONS["fp32"].converter is None


def test_layers_whose_values_leave_the_range_stay_in_fp32(rng):
    model = loud(rng, scale=4e4)
    feeds = [{"x": 4 * rng.standard_normal((8, 16)).astype(np.float32)}]
    with Float16Converter(model, feeds) as convert:
        assert convert.kept == ("down", "up")  # what produces the values, and what reads them
        assert convert.layers() == ["last"]
        narrow, none = convert(), convert(("last",))
    assert types_of(narrow)["last.weight"] == TensorProto.FLOAT16
    assert {types_of(narrow)[name] for name in ("up.weight", "down.weight")} == {TensorProto.FLOAT}
    assert set(types_of(none).values()) == {TensorProto.FLOAT}
    require_finite(model, narrow, feeds)
    with pytest.raises(RangeError, match="overflows in fp16"):
        require_finite(model, PRECISIONS["fp16"].for_layer(model), feeds)


def test_a_weight_outside_the_range_stays_in_fp32_without_inputs(rng):
    model = loud(rng, scale=3e6)
    assert Float16Converter(model, ()).kept == ("up",)
    assert types_of(to_finite_fp16(model))["up.weight"] == TensorProto.FLOAT
    with pytest.raises(GraphError, match=r"layer up: its weight up.weight contains .*, outside the fp16 range"):
        PRECISIONS["fp16"].for_layer(model)


def test_nothing_is_kept_where_nothing_overflows(rng):
    model = loud(rng, scale=1.0, shrink=1.0)
    feeds = [{"x": rng.standard_normal((8, 16)).astype(np.float32)}]
    assert Float16Converter(model, feeds).kept == ()
    assert set(types_of(to_finite_fp16(model, feeds)).values()) == {TensorProto.FLOAT16}


def test_a_layer_in_another_type_is_timed_as_it_is(rng):
    doubles = helper.make_tensor_value_info("x", TensorProto.DOUBLE, ["batch", 4])
    weight = numpy_helper.from_array(rng.standard_normal((4, 4)), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [doubles], [], [weight])
    model = helper.make_model(graph)
    assert PRECISIONS["fp16"].for_layer(model) is model
    assert set(types_of(PRECISIONS["fp16"].for_layer(loud(rng, 1.0, 1.0))).values()) == {TensorProto.FLOAT16}


def test_auto_includes_fp16_only_where_it_is_computed_in(monkeypatch):
    asked = {"auto": ("auto",), "both": ("int8", "fp32"), "all": ("fp16", "auto")}
    monkeypatch.setattr(targets, "computes_in_fp16", lambda settings: settings.on_gpu)
    here = {name: precisions_of(names, Session()) for name, names in asked.items()}
    assert here == {"auto": ("fp32", "int8"), "both": ("fp32", "int8"), "all": ("fp32", "fp16", "int8")}
    assert precisions_of(("auto",), Session(provider="cuda")) == ("fp32", "fp16", "int8")
    with pytest.raises(PlanError, match="precision: expected fp32, fp16, int8, auto, got 'bf16'"):
        precisions_of(("fp32", "bf16"), Session())


def test_two_nodes_in_fp32_may_read_the_same_tensor(rng):
    """The converter of ONNX Runtime adds a cast of the same name for each."""
    weights = {name: rng.standard_normal((4, 4)).astype(np.float32) for name in ("a", "b", "c")}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], "first"),
        helper.make_node("MatMul", ["h", "b"], ["p"], "left"),
        helper.make_node("MatMul", ["h", "c"], ["q"], "right"),
        helper.make_node("Mul", ["p", "q"], ["y"], "product"),
    ]
    model = make_model(nodes, weights, {"x": ["batch", 4]}, {"y": ["batch", 4]})
    narrow = to_fp16(model, keep=("left", "right"))
    assert types_of(narrow) == {"a": TensorProto.FLOAT16, "b": TensorProto.FLOAT, "c": TensorProto.FLOAT}
    require_finite(model, narrow, [{"x": rng.standard_normal((3, 4)).astype(np.float32)}])


def test_a_table_outside_the_range_stays_in_fp32(rng):
    """The converter would clamp its values, of which no infinite one is then left to be found."""
    table = np.zeros((5, 4), np.float32)
    table[3] = 1e5
    weights = {"table": table, "scale.weight": (1e-5 * np.eye(4)).astype(np.float32)}
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], "embed"),
        helper.make_node("MatMul", ["rows", "scale.weight"], ["y"], "scale"),
    ]
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])]
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    feeds = [{"ids": np.arange(5)}]
    assert "embed" in Float16Converter(model, ()).kept
    converted = to_finite_fp16(model, feeds)
    assert types_of(converted)["table"] == TensorProto.FLOAT
    session = onnxruntime.InferenceSession(converted.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, feeds[0])[0][3], 1.0, rtol=1e-2)


def outputs_of(model, feed):
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)[0]


def branching(rng, where, largest=1e5):
    """Return a product, an If whose branch is a product with a large value in its weight, and a product behind it."""
    large = (rng.standard_normal((8, 8)) / 3).astype(np.float32)
    large[0, 0] = largest
    weights = {name: (rng.standard_normal((8, 8)) / 3).astype(np.float32) for name in ("first.weight", "last.weight")}
    weights["zero"] = np.float32(0)
    inner = [helper.make_node("MatMul", ["h", "large"], ["t"], "inside")]
    own, outer = [], []
    if where == "in the body":
        own = [numpy_helper.from_array(large, "large")]
    elif where == "outside":
        weights["large"] = large
    else:
        outer = [helper.make_node("Constant", [], ["large"], "stored", value=numpy_helper.from_array(large, "value"))]
    out = [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)]
    then = helper.make_graph(inner, "then", [], out, own)
    other = helper.make_graph([helper.make_node("Neg", ["h"], ["t"], "neg")], "else", [], out)
    nodes = [
        *outer,
        helper.make_node("ReduceMax", ["x"], ["top"], "top", keepdims=0),
        helper.make_node("Greater", ["top", "zero"], ["yes"], "yes"),
        helper.make_node("MatMul", ["x", "first.weight"], ["h"], "first"),
        helper.make_node("If", ["yes"], ["b"], "either", then_branch=then, else_branch=other),
        helper.make_node("MatMul", ["b", "last.weight"], ["y"], "last"),
    ]
    return make_model(nodes, weights, {"x": ["n", 8]}, {"y": ["n", 8]})


@pytest.mark.parametrize("where", ["in the body", "outside", "as a Constant outside"])
def test_a_large_weight_of_a_body_keeps_the_whole_node_in_fp32(where, rng):
    """The converter would clamp it: values stay within the range, and are wrong."""
    model = branching(rng, where)
    with pytest.raises(
        GraphError, match=r"layer either: its weight large contains 1e\+05, outside .*; keep layer either in fp32"
    ):
        to_fp16(model)
    x = 0.01 * rng.standard_normal((6, 8)).astype(np.float32)
    feeds = [{"x": x}, {"x": -np.abs(x)}]
    with Float16Converter(model, feeds) as convert:
        assert convert.kept == ("either",)
        assert convert.layers() == ["first", "last"]
        narrow = convert()
    assert types_of(narrow)["first.weight"] == types_of(narrow)["last.weight"] == TensorProto.FLOAT16
    for feed in feeds:
        exact, got = outputs_of(model, feed), outputs_of(narrow, feed)
        assert 0 < np.linalg.norm(got - exact) < 5e-3 * np.linalg.norm(exact)


@pytest.mark.parametrize("where", ["in the body", "outside", "as a Constant outside"])
def test_a_node_in_a_body_stays_in_fp32_with_all_that_is_around_it(where, rng):
    model = branching(rng, where, largest=1.0)
    feed = {"x": rng.standard_normal((6, 8)).astype(np.float32)}
    everything, inside = to_fp16(model), to_fp16(model, keep=["inside"])
    stored = [tensor for graph in (inside.graph, *descendants(inside.graph)) for tensor in constants_of(graph).values()]
    kinds = [tensor.data_type for tensor in stored if list(tensor.dims) == [8, 8]]
    assert sorted(kinds) == [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.FLOAT16]
    exact = outputs_of(model, feed)
    errors = [np.linalg.norm(outputs_of(one, feed) - exact) / np.linalg.norm(exact) for one in (everything, inside)]
    assert all(0 < error < 5e-3 for error in errors)


def test_a_weight_of_a_body_that_others_read_in_fp16_is_read_in_fp32(rng):
    """Half of its readers are converted, and the weight with them: the body gets a cast of it."""
    model = branching(rng, "outside", largest=1.0)
    model.graph.node[-1].input[1] = "large"
    feed = {"x": rng.standard_normal((6, 8)).astype(np.float32)}
    narrow = to_fp16(model, keep=["either"])
    assert types_of(narrow)["large"] == TensorProto.FLOAT16
    exact = outputs_of(model, feed)
    assert np.linalg.norm(outputs_of(narrow, feed) - exact) < 5e-3 * np.linalg.norm(exact)


def recurrent(rng, place):
    """Return an LSTM with a large value in one of its inputs, and a product behind it."""
    weights = {
        "w": (rng.standard_normal((1, 16, 6)) / 4).astype(np.float32),
        "r": (rng.standard_normal((1, 16, 4)) / 4).astype(np.float32),
        "b": np.zeros((1, 32), np.float32),
    }
    weights[place][0, 0, ...] = -1e5
    nodes = [
        helper.make_node("LSTM", ["x", "w", "r", "b"], ["", "h"], "rnn", hidden_size=4),
        helper.make_node("MatMul", ["h", "head"], ["y"], "head"),
    ]
    return make_model(nodes, weights | {"head": np.eye(4, dtype=np.float32)}, {"x": [5, "n", 6]}, {"y": [1, "n", 4]})


@pytest.mark.parametrize("place", ["w", "r", "b"])
def test_large_values_in_any_weight_of_a_recurrent_layer_are_seen(place, rng):
    model = recurrent(rng, place)
    with pytest.raises(GraphError, match=rf"layer rnn: its weight {place} contains 1e\+05"):
        to_fp16(model)
    assert Float16Converter(model, ()).kept == ("rnn",)
    assert types_of(to_fp16(model, keep=["rnn"]))[place] == TensorProto.FLOAT


def test_large_biases_and_tables_are_errors_and_masks_are_not():
    large = np.array([1e5, 0, 0, 0], np.float32)
    weights = {"eye": np.eye(4, dtype=np.float32), "large": large, "ones": np.ones(4, np.float32)}
    weights |= {"square": np.diag(large), "off": np.array([-3e38, 0, 0, 0], np.float32)}
    nodes = {
        "Gemm": [helper.make_node("Gemm", ["x", "eye", "large"], ["y"], "n")],
        "Gather": [
            helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64),
            helper.make_node("Gather", ["large", "i"], ["y"], "n"),
        ],
        "MatMul and Add": [
            helper.make_node("MatMul", ["x", "eye"], ["h"], "m"),
            helper.make_node("Add", ["h", "large"], ["y"], "n"),
        ],
        "BatchNormalization": [
            helper.make_node("MatMul", ["x", "eye"], ["h"], "m"),
            helper.make_node("BatchNormalization", ["h", "ones", "ones", "ones", "large"], ["y"], "n"),
        ],
        "Add": [helper.make_node("Add", ["x", "large"], ["y"], "n")],
        "suppressed": [
            helper.make_node("MatMul", ["x", "eye"], ["h"], "m"),
            helper.make_node("Add", ["h", "off"], ["y"], "n"),
        ],
        "mask": [
            helper.make_node("MatMul", ["x", "eye"], ["h"], "m"),
            helper.make_node("Add", ["h", "square"], ["y"], "n"),
        ],
    }
    models = {op: make_model(own, weights, {"x": ["n", 4]}, {"y": ["n", 4]}) for op, own in nodes.items()}
    for op in ("Gemm", "Gather", "MatMul and Add", "BatchNormalization"):
        with pytest.raises(GraphError, match=r"layer \w+: its weight large contains 1e\+05"):
            to_fp16(models[op])
        assert types_of(to_fp16(models[op], keep=["n"]))["large"] == TensorProto.FLOAT
    assert types_of(to_fp16(models["Add"]))["large"] == TensorProto.FLOAT16
    assert types_of(to_fp16(models["mask"]))["square"] == TensorProto.FLOAT16
    assert types_of(to_fp16(models["suppressed"]))["off"] == TensorProto.FLOAT16


def test_an_infinite_bias_is_not_clamped():
    """It switches a class off, in fp16 as well."""
    weights = {"w": np.eye(4, dtype=np.float32), "b": np.array([-np.inf, 0, 0, 0], np.float32)}
    model = make_model([helper.make_node("Gemm", ["x", "w", "b"], ["y"], "n")], weights, {"x": ["n", 4]}, {"y": ["n", 4]})
    assert outputs_of(to_fp16(model), {"x": np.ones((1, 4), np.float32)})[0].tolist() == [-np.inf, 1, 1, 1]
