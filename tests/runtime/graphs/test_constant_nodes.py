"""Weights in Constant nodes are read as initializers; shapes, scalars and outputs stay nodes."""

import numpy as np
import onnx
import pytest
from conftest import make_model
from onnx import TensorProto, helper, numpy_helper

from tensorrail_runtime.graphs.constants import file_fault
from tensorrail_runtime.graphs.reading import standardized


def constant_model(ir_version=9):
    weight = numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(2, 3), "other name")
    nodes = [
        helper.make_node("Constant", [], ["w"], "weight", value=weight),
        helper.make_node("Constant", [], ["b"], "bias", value_floats=[1.0, 2.0, 3.0]),
        helper.make_node("Constant", [], ["s"], "scalar", value_float=2.0),
        helper.make_node("Constant", [], ["shape"], "shape", value_ints=[-1, 3]),
        helper.make_node("Constant", [], ["c"], "output", value_floats=[4.0]),
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "b"], ["d"]),
        helper.make_node("Mul", ["d", "s"], ["e"]),
        helper.make_node("Reshape", ["e", "shape"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "c")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=ir_version)


def test_weights_become_initializers():
    model = constant_model()
    assert standardized(model)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert stored.keys() == {"w", "b"}
    np.testing.assert_array_equal(stored["w"], np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(stored["b"], [1, 2, 3])
    constants = [node.output[0] for node in model.graph.node if node.op_type == "Constant"]
    assert constants == ["s", "shape", "c"]
    assert not standardized(model)


def test_before_initializers_were_free_they_stay_nodes():
    model = constant_model(ir_version=3)
    before = model.SerializeToString()
    assert not standardized(model)
    assert model.SerializeToString() == before


def test_in_bodies():
    inner = constant_model().graph
    del inner.input[:]
    branch = onnx.GraphProto.FromString(inner.SerializeToString())
    node = helper.make_node("If", ["yes"], ["y", "c"], then_branch=inner, else_branch=branch)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2]), helper.make_tensor_value_info("yes", 9, [])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "c")]
    model = helper.make_model(
        helper.make_graph([node], "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    )
    assert standardized(model)
    for attribute in model.graph.node[0].attribute:
        assert {tensor.name for tensor in attribute.g.initializer} == {"w", "b"}


@pytest.mark.parametrize(
    "attribute",
    [
        helper.make_attribute("value_int", 1),
        helper.make_attribute("value_string", "text"),
    ],
)
def test_a_damaged_constant_is_left_to_opening_the_file(attribute, tmp_path):
    """Attributes whose type is lost: they cannot be read, and the fault of the file is not that of a weight."""
    nodes = [helper.make_node("Constant", [], ["one"], value_int=1), helper.make_node("Identity", ["x"], ["y"])]
    model = make_model(nodes, {}, {"x": ["n"]}, {"y": ["n"]})
    model.graph.node[0].attribute[0].CopyFrom(attribute)
    model.graph.node[0].attribute[0].type = onnx.AttributeProto.INT if attribute.name == "value_string" else 0
    onnx.save(model, tmp_path / "m.onnx")
    assert file_fault(tmp_path / "m.onnx") == ""
