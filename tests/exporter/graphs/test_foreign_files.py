"""Files that ONNX Runtime runs and onnx's checker refuses are rewritten; those that it refuses are refused when read."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import tensorrail as tr
from tensorrail_exporter.graphs.io import check_model
from tensorrail_runtime.sessions.session import open_session, run

RNG = np.random.default_rng(0)
A, B = (RNG.standard_normal(shape).astype(np.float32) / 7 for shape in ((48, 64), (64, 32)))
X = RNG.standard_normal((3, 48)).astype(np.float32)
PLAN = tr.Plan(layers=(tr.LayerPlan(name="a", format="svd", modes=(64, 48), ranks=(48,)),))


def two_products(middle="Relu", domain="", output=("n", 32), opset=17, names=("a", "r", "b"), **more):
    """Return x · A → an operator → · B."""
    nodes = [
        helper.make_node("MatMul", ["x", "a.weight"], ["h"], names[0]),
        helper.make_node(middle, ["h"], ["r"], names[1], domain=domain),
        helper.make_node("MatMul", ["r", "b.weight"], ["y"], names[2]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 48])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)]
    weights = [numpy_helper.from_array(array, name) for name, array in (("a.weight", A), ("b.weight", B))]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    domains = [helper.make_opsetid(name, 1) for name in more.pop("domains", ())]
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset), *domains], ir_version=8, **more)


def stale_inner_shape():
    model = two_products()
    model.graph.value_info.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, ["n", 48]))
    return model


def stale_inner_rank_and_output():
    model = two_products(output=["n", 7, 33])
    model.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["n", 1, 64]))
    return model


def sparse(places, linear):
    model = two_products()
    (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == "b.weight"]
    model.graph.initializer.remove(weight)
    indices = places if linear else np.stack(np.unravel_index(places, B.shape), 1)
    values = RNG.standard_normal(len(places)).astype(np.float32)
    tensors = numpy_helper.from_array(values, "b.weight"), numpy_helper.from_array(indices.astype(np.int64), "i")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(*tensors, B.shape))
    return model


def function_with_contributed_operator():
    body = [helper.make_node("Gelu", ["a"], ["o"], domain="com.microsoft")]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    function = helper.make_function("own", "act", ["a"], ["o"], body, opsets)
    return two_products("act", "own", domains=("own", "com.microsoft"), functions=[function])


def long_domain(nodes=True, imports=True):
    model = two_products(domain="ai.onnx" if nodes else "")
    if imports:
        model.opset_import[0].domain = "ai.onnx"
    return model


PLACES = np.sort(RNG.choice(B.size, 200, replace=False))
RUN_BY_RUNTIME = {
    "stale output rank": lambda: two_products(output=[]),
    "stale output size": lambda: two_products(output=["n", 31]),
    "stale inner shape": stale_inner_shape,
    "stale inner rank and output": stale_inner_rank_and_output,
    "sparse initializer, linear": lambda: sparse(PLACES, linear=True),
    "sparse initializer, by axis": lambda: sparse(PLACES, linear=False),
    "function with an operator of another domain": function_with_contributed_operator,
    "operator of another domain": lambda: two_products("Gelu", "com.microsoft", domains=("com.microsoft",)),
    "long domain": long_domain,
    "long domain of nodes": lambda: long_domain(imports=False),
    "long domain of the import": lambda: long_domain(nodes=False),
}


@pytest.mark.parametrize("name", RUN_BY_RUNTIME)
def test_what_the_runtime_runs_is_rewritten(name, tmp_path):
    path, out = tmp_path / "m.json", tmp_path / "o.onnx"  # with any extension
    path.write_bytes(RUN_BY_RUNTIME[name]().SerializeToString())
    expected = run(open_session(path), {"x": X})["y"]
    tr.export(path, out, PLAN)
    np.testing.assert_allclose(run(open_session(out), {"x": X})["y"], expected, rtol=1e-4, atol=1e-5)
    assert any(tensor.name == "a/0" for tensor in onnx.load(out).graph.initializer)
    tr.save_model(tr.load_model(path), tmp_path / "again.onnx")
    np.testing.assert_array_equal(run(open_session(tmp_path / "again.onnx"), {"x": X})["y"], expected)
    assert [(layer.name, layer.macs) for layer in tr.inspect(path).layers] == [("a", 48 * 64), ("b", 64 * 32)]


@pytest.mark.parametrize("kind", ["INT2", "UINT2", "INT4", "UINT4", "FLOAT4E2M1"])
def test_narrow_types_are_read_packed(kind, tmp_path):
    table = helper.make_tensor("table", getattr(TensorProto, kind), [7], [1, 0, 1, 0, 1, 0, 1])
    model = two_products(opset=25)
    model.ir_version = 13
    model.graph.initializer.append(table)
    model.graph.node.append(helper.make_node("Cast", ["table"], ["t"], "cast", to=TensorProto.FLOAT))
    model.graph.output.append(helper.make_tensor_value_info("t", TensorProto.FLOAT, [7]))
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    tr.export(path, tmp_path / "o.onnx", PLAN)
    (written,) = [tensor for tensor in tr.load_model(tmp_path / "o.onnx").graph.initializer if tensor.name == "table"]
    np.testing.assert_array_equal(numpy_helper.to_array(written).astype(np.float32), [1, 0, 1, 0, 1, 0, 1])
    table.int32_data.extend([0] * 9)
    model.graph.initializer[2].CopyFrom(table)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(tr.GraphError, match=r"tensor 'table' of shape \[7\] holds"):
        tr.load_model(path)


def sparse_out_of_range():
    model = sparse(PLACES, linear=True)
    model.graph.sparse_initializer[0].indices.CopyFrom(numpy_helper.from_array(PLACES + 2000, "i"))
    return model


def huge_sparse():
    model = sparse(PLACES, linear=True)
    model.graph.sparse_initializer[0].dims[:] = [2**20, 2**20]
    return model


REFUSED = {
    "two nodes named": (lambda: two_products(names=("same", "r", "same")), "two nodes have the name 'same', number 0 .MatMul."),
    "sparse out of range": (sparse_out_of_range, "sparse initializer 'b.weight' .* expected one index within that shape"),
    "sparse and huge": (huge_sparse, "sparse initializer 'b.weight' .* would exceed 2 GiB in dense form"),
    "no such operator": (lambda: two_products("Rleu"), "not a valid ONNX model .*Rleu"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_runtime_refuses_is_refused_when_it_is_read(name, tmp_path):
    make, reason = REFUSED[name]
    path = tmp_path / "m.onnx"
    path.write_bytes(make().SerializeToString())
    with pytest.raises(tr.GraphError, match=f"m.onnx: .*{reason}"):
        tr.load_model(path)
    with pytest.raises(tr.ModelError, match=r"m\.onnx"):
        tr.inspect(path)


def test_names_of_files_must_be_utf8(small_path, cli):
    other = small_path.with_name("m\udcff.onnx")
    other.write_bytes(small_path.read_bytes())
    for call in (lambda: tr.load_model(other), lambda: tr.inspect(other), lambda: tr.check(small_path, other)):
        with pytest.raises(tr.TensorrailError, match="the name is not valid UTF-8"):
            call()
    for arguments in (("inspect", other), ("check", small_path, other), ("inspect", small_path, "--json", "r\udcff.json")):
        code, _, err = cli(*arguments)
        assert (code, "the name is not valid UTF-8" in err) == (2, True)


def test_the_check_is_held_against_the_original():
    original = function_with_contributed_operator()
    check_model(original, original)
    with pytest.raises(tr.GraphError, match=r"the rewritten graph does not pass onnx\.checker"):
        check_model(original)
    broken = onnx.ModelProto()
    broken.CopyFrom(original)
    broken.graph.node[0].input[1] = "b.weight"
    with pytest.raises(tr.GraphError, match=r"the model as it was given does not pass onnx\.checker"):
        check_model(broken, original)
