"""Layers in the functions of a model are layers, and malformed files and cores end in one line."""

import numpy as np
import onnx
import pytest
from cases import relative
from conftest import make_model
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

import tensorrail as tr
from tensorrail_exporter import LayerPlan, Plan, PlanError, decompose_graph, factorize
from tensorrail_exporter.graphs.io import load_model
from tensorrail_exporter.plans.cores import load_cores
from tensorrail_exporter.rewrite.survey import left_out, survey
from tensorrail_runtime.errors import GraphError
from tensorrail_runtime.sessions.session import open_session, run


@pytest.fixture
def with_function(tmp_path, rng):
    """Return the file of a model that calls the same product in a function twice."""
    product = helper.make_node("MatMul", ["a", "b"], ["c"], "product")
    function = helper.make_function("own", "Product", ["a", "b"], ["c"], [product], [helper.make_opsetid("", 17)])
    nodes = [
        helper.make_node("Product", ["x", "w"], ["h"], "first", domain="own"),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
        helper.make_node("Product", ["r", "w2"], ["y"], "second", domain="own"),
    ]
    weights = {"w": rng.standard_normal((16, 24)), "w2": rng.standard_normal((24, 8))}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=[function]), path)
    return path


def test_layers_in_functions_are_planned_and_factored(with_function, tmp_path, rng):
    model = load_model(with_function)
    assert [layer.name for layer in survey(model)] == ["w", "w2"]
    plan = Plan(layers=(LayerPlan(name="w", format="svd", modes=(24, 16), ranks=(16,)),))
    plan.save(tmp_path / "plan.json")
    tr.export(with_function, tmp_path / "out.onnx", tmp_path / "plan.json")
    x = {"x": rng.standard_normal((3, 16)).astype(np.float32)}
    before, after = (run(open_session(path), x)["y"] for path in (with_function, tmp_path / "out.onnx"))
    assert relative(after, before) < 1e-5
    assert len(onnx.load(tmp_path / "out.onnx").graph.initializer) == 3


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("strides", [2], "expected 2 strides for a kernel of 2 axes, got [2]"),
        ("dilations", [1, 1, 1], "expected 2 dilations for a kernel of 2 axes, got [1, 1, 1]"),
        ("pads", [1, 1, 1], "expected 4 pads for a kernel of 2 axes, got [1, 1, 1]"),
    ],
)
def test_a_convolution_of_too_few_values_stays_dense_with_the_reason(attribute, value, reason, rng):
    weight = numpy_helper.from_array(rng.standard_normal((8, 8, 3, 3)).astype(np.float32), "w")
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8, None, None]) for name in ("x", "y")]
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv", **{attribute: value})
    model = helper.make_model(helper.make_graph([node], "g", shapes[:1], shapes[1:], [weight]), ir_version=8)
    model.opset_import[0].version = 17
    assert [row.reason for row in left_out(model, survey(model))[1]] == [reason]


def dense(rng):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "w")]
    return make_model(nodes, {"w": rng.standard_normal((6, 8)).astype(np.float32)}, {"x": ["n", 6]}, {"y": ["n", 8]})


PLAN = Plan(layers=(LayerPlan(name="w", format="svd", modes=(8, 6), ranks=(2,)),))


def test_cores_that_overflow_are_refused(rng):
    model = dense(rng)
    cores = decompose_graph(model, PLAN)
    wide = {"w": [core.astype(np.float64) for core in cores["w"]]}
    wide["w"][0] *= 1e60
    with pytest.raises(GraphError, match="layer w: its cores hold values that are too large for float32"):
        factorize(model, PLAN, wide)


@pytest.mark.parametrize("kind", [np.int32, np.complex64, np.bool_])
def test_cores_that_are_no_floats_are_refused(kind, tmp_path, rng):
    cores = decompose_graph(dense(rng), PLAN)["w"]
    if kind is np.complex64:
        pytest.importorskip("safetensors", minversion="0.6", reason="it writes no complex numbers")
    try:
        save_file({f"w/{k}": core.astype(kind) for k, core in enumerate(cores)}, tmp_path / "c", {"tensorrail-cores": "1"})
    except Exception:  # noqa: BLE001 - of safetensors, for types that it does not have
        pytest.skip("safetensors writes no such type")
    with pytest.raises(PlanError, match="expected cores of floats, got 'w/0' of"):
        load_cores(tmp_path / "c", PLAN)
