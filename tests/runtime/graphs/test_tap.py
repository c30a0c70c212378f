import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import make_model
from onnx import helper

from tensorrail_runtime.errors import GraphError
from tensorrail_runtime.graphs.tap import with_outputs


@pytest.fixture
def model(rng):
    weights = {name: rng.standard_normal((4, 4)).astype(np.float32) for name in ("a.weight", "b.weight")}
    nodes = [
        helper.make_node("MatMul", ["x", "a.weight"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["r"], "relu"),
        helper.make_node("MatMul", ["r", "b.weight"], ["y"], "second"),
    ]
    return make_model(nodes, weights, {"x": ["n", 4]}, {"y": ["n", 4]})


def run(model, feed):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def test_tensors_are_added_behind_the_outputs(model, rng):
    x = rng.standard_normal((3, 4)).astype(np.float32)
    before = model.SerializeToString()
    values = run(with_outputs(model, ["r", "a", "r", "y"]), {"x": x})
    assert model.SerializeToString() == before
    assert list(values) == ["y", "r", "a"]
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    np.testing.assert_allclose(values["a"], x @ weights["a.weight"], atol=1e-5)
    np.testing.assert_array_equal(values["r"], np.maximum(values["a"], 0))
    np.testing.assert_array_equal(values["y"], run(model, {"x": x})["y"])


def test_an_output_that_no_node_computes_is_a_tensor_of_the_graph(model, rng):
    stored = rng.standard_normal((2, 2)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(stored, "stored"))
    model.graph.output.append(helper.make_tensor_value_info("stored", onnx.TensorProto.FLOAT, [2, 2]))
    x = rng.standard_normal((3, 4)).astype(np.float32)
    np.testing.assert_array_equal(run(with_outputs(model, ["stored", "a"]), {"x": x})["stored"], stored)


def test_an_unknown_tensor_is_named(model):
    with pytest.raises(GraphError, match="tensor 'nowhere' is not in the graph: expected the input or output of one of its"):
        with_outputs(model, ["a", "nowhere"])
