"""Embeddings: rows of a table become rows of its first factor, and a product."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from cases import cases, draw_plan, random_cores, relative
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tensorrail_exporter import FORMATS, GraphError, LayerPlan, Plan, PlanError, decompose_graph, factorize, reconstruct
from tensorrail_exporter.rewrite.survey import left_out, survey
from tensorrail_exporter.search.planner import plan_network
from tensorrail_exporter.search.targets import Search
from tensorrail_runtime.errors import TargetError


def make(nodes, weights, inputs, outputs):
    """Return a checked model; `inputs` and `outputs` map names to types and shapes."""

    def entries(tensors):
        return [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in tensors.items()]

    constants = [v if isinstance(v, onnx.TensorProto) else numpy_helper.from_array(v, k) for k, v in weights.items()]
    graph = helper.make_graph(nodes, "graph", entries(inputs), entries(outputs), constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def embedding(rng, entries=60, features=32, *, tied=False):
    """Return a model of ids → table → product; `tied`: the product is that of the table, as in a language model."""
    weights = {"table": rng.standard_normal((entries, features)).astype(np.float32)}
    nodes = [helper.make_node("Gather", ["table", "ids"], ["rows"], "embed")]
    if tied:
        nodes += [helper.make_node("Transpose", ["table"], ["across"], perm=[1, 0])]
        nodes += [helper.make_node("MatMul", ["rows", "across"], ["out"], "head")]
    else:
        weights["head.weight"] = rng.standard_normal((features, 8)).astype(np.float32)
        nodes += [helper.make_node("MatMul", ["rows", "head.weight"], ["out"], "head")]
    last = entries if tied else 8
    return make(nodes, weights, {"ids": (TensorProto.INT64, ["n", 5])}, {"out": (TensorProto.FLOAT, ["n", 5, last])})


def run(model, ids):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"ids": ids})[0]


@given(data=st.data())
@cases(40, 400)
def test_any_embedding_equals_its_reconstruction(data):
    name = data.draw(st.sampled_from(sorted(FORMATS)))
    (features, entries), plan = draw_plan(data, "table", name, op="linear", gathers=True)
    axes = data.draw(st.lists(st.integers(1, 3), max_size=3), "axes of the indices")
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    weights = {"table": rng.standard_normal((entries, features)).astype(np.float32)}
    node = helper.make_node("Gather", ["table", "ids"], ["out"], "embed", axis=data.draw(st.sampled_from([0, -2])))
    kind = data.draw(st.sampled_from([TensorProto.INT32, TensorProto.INT64]))
    model = make([node], weights, {"ids": (kind, axes)}, {"out": (TensorProto.FLOAT, [*axes, features])})
    one, cores = Plan(layers=(plan,)), {"table": random_cores(plan, (features, entries), rng)}
    ids = np.asarray(rng.integers(-entries, entries, axes), helper.tensor_dtype_to_np_dtype(kind))
    try:
        expected = run(reconstruct(model, one, cores), ids)
        factored = factorize(model, one, cores).model
    except PlanError as error:
        assert "entries of an embedding as a single mode" in str(error)  # noqa: PT017 - whether it is raised depends on the plan
        assert plan.format not in ("svd", "ttm")
        return
    np.testing.assert_allclose(run(factored, ids), expected, atol=1e-4 * max(1.0, np.abs(expected).max()))
    assert "table" not in {tensor.name for tensor in factored.graph.initializer}


def test_at_full_rank_nothing_changes(rng):
    model = embedding(rng)
    plan = Plan(layers=(LayerPlan(name="table", format="svd", modes=(32, 60), ranks=(32,)),))
    ids = rng.integers(0, 60, (3, 5))
    factored = factorize(model, plan, decompose_graph(model, plan)).model
    assert relative(run(factored, ids), run(model, ids)) < 1e-5
    assert [node.op_type for node in factored.graph.node] == ["Gather", "MatMul", "MatMul"]


def test_a_tied_table_has_the_name_of_its_product(rng):
    model = embedding(rng, tied=True)
    layers = {layer.name: layer.spec.gathers for layer in survey(model)}
    assert layers == {"embed": True, "table": False}
    plan = Plan(
        layers=tuple(
            LayerPlan(name=name, format="svd", modes=modes, ranks=(16,))
            for name, modes in (("embed", (32, 60)), ("table", (60, 32)))
        )
    )
    cores = decompose_graph(model, plan)
    ids = rng.integers(0, 60, (2, 5))
    assert relative(run(factorize(model, plan, cores).model, ids), run(reconstruct(model, plan, cores), ids)) < 1e-5


def test_what_reads_no_table_of_floats_is_no_layer(rng):
    weights = {
        "table": rng.standard_normal((6, 4)).astype(np.float32),
        "sizes": np.array([[2, 3], [4, 5]], np.int64),
        "row": rng.standard_normal(6).astype(np.float32),
        "fixed": np.array([0, 2], np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["table", "fixed"], ["a"], "position"),  # folded by ONNX Runtime
        helper.make_node("Gather", ["sizes", "ids"], ["b"], "shape"),
        helper.make_node("Gather", ["row", "ids"], ["c"], "vector"),
        helper.make_node("Gather", ["table", "ids"], ["d"], "columns", axis=1),
    ]
    outputs = {"a": (1, [2, 4]), "b": (TensorProto.INT64, ["n", 2]), "c": (1, ["n"]), "d": (1, [6, "n"])}
    model = make(nodes, weights, {"ids": (TensorProto.INT64, ["n"])}, outputs)
    assert survey(model) == ()
    assert left_out(model, ()) == ((), ())
    with pytest.raises(GraphError, match="layer table: "):
        decompose_graph(model, Plan(layers=(LayerPlan(name="table", format="svd", modes=(4, 6), ranks=(1,)),)))


def test_embeddings_are_planned_for_a_target_on_size_alone(rng, tmp_path):
    model = embedding(rng, entries=600, features=64)
    search = Search(grid=8, cache=tmp_path, seconds=1.0, check_seconds=1.0, allow_slower=True)
    report = plan_network(model, {"params": 3.0}, search)
    assert "table" in {layer.name for layer in report.plan.layers}
    assert report.meets
    row = next(row for row in report.rows if row.layer == "table")
    assert row.dense_macs == 0 < row.macs
    with pytest.raises(TargetError, match="target flops=2 cannot be met"):
        plan_network(model, {"flops": 2.0}, search)


def test_a_table_of_another_type_is_left_out_with_the_reason(rng):
    table = helper.make_tensor("table", TensorProto.BFLOAT16, [6, 4], rng.standard_normal(24))
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], "embed"),
        helper.make_node("Cast", ["rows"], ["out"], to=TensorProto.FLOAT),
    ]
    model = make(nodes, {"table": table}, {"ids": (TensorProto.INT64, ["n"])}, {"out": (TensorProto.FLOAT, ["n", 4])})
    assert survey(model) == ()
    _, (row,) = left_out(model, ())
    assert (row.name, row.reason) == ("table", "its weight is of type bfloat16; expected float16, float32 or float64")
