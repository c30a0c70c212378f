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
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from tensorrail_exporter import (
    FORMATS,
    GraphError,
    LayerPlan,
    Plan,
    PlanError,
    decompose_graph,
    factorize,
    project,
    reconstruct,
)
from tensorrail_exporter.formats.ttm import padding, table_modes
from tensorrail_exporter.rewrite.survey import left_out, survey
from tensorrail_exporter.search.approximations import Approximations
from tensorrail_exporter.search.options import options_of
from tensorrail_exporter.search.planner import plan_network
from tensorrail_exporter.search.targets import Search
from tensorrail_runtime.errors import TargetError


def make(nodes, weights, inputs, outputs, opset=20):
    """Return a checked model; `inputs` and `outputs` map names to types and shapes."""

    def entries(tensors):
        return [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in tensors.items()]

    constants = [v if isinstance(v, onnx.TensorProto) else numpy_helper.from_array(v, k) for k, v in weights.items()]
    graph = helper.make_graph(nodes, "graph", entries(inputs), entries(outputs), constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
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


def only_table(table, dtype=np.int64, opset=20):
    """Return a model of ids → rows of a table."""
    node = helper.make_node("Gather", ["table", "ids"], ["out"], "embed")
    kind, of_ids = (helper.np_dtype_to_tensor_dtype(np.dtype(each)) for each in (table.dtype, dtype))
    return make([node], {"table": table}, {"ids": (of_ids, ["n"])}, {"out": (kind, ["n", table.shape[1]])}, opset)


def table_plan(table, count=2):
    """Return a plan of a table in `ttm` at full rank."""
    modes = table_modes(table.T.shape, count)
    return Plan(layers=(LayerPlan(name="table", format="ttm", modes=modes, ranks=(1, *[99] * (count - 1), 1), merge="none"),))


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


@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize(("count", "dtype"), [(2, np.int64), (3, np.int32)])
def test_a_padded_table_at_full_rank_has_the_rows_of_the_dense_one(count, dtype, kind, rng):
    table = rng.standard_normal((37, 12)).astype(kind)
    plan = table_plan(table, count)
    model = only_table(table, dtype)
    factored = factorize(model, plan, decompose_graph(model, plan))
    assert padding(table.T.shape, plan.layers[0].modes) == 3
    ids = np.arange(-37, 37, dtype=dtype)
    np.testing.assert_allclose(run(factored.model, ids), run(model, ids), atol=1e-2 if kind == np.float16 else 1e-5)
    assert sum(constant.dims[0] for constant in factored.model.graph.initializer if len(constant.dims) == 3) < 37
    (layer,) = factored.layers
    assert layer.steps.startswith("index 8×5 (padding 3), gather 5→" if count == 2 else "index 5×2×4 (padding 3), gather 4→")
    for index in (37, 100):
        with pytest.raises(InvalidArgument, match="out of data bounds"):
            run(factored.model, np.array([index], dtype))


def test_modes_of_entries_take_an_operator_of_opset_10(rng):
    table = rng.standard_normal((37, 12)).astype(np.float32)
    plan = table_plan(table)
    old = only_table(table, opset=9)
    with pytest.raises(GraphError, match=r"layer table: expected opset 10 or newer, .* the operator Mod, got opset 9"):
        factorize(old, plan, decompose_graph(old, plan))
    new = only_table(table, opset=13)
    factored = factorize(new, plan, decompose_graph(new, plan)).model
    np.testing.assert_allclose(run(factored, np.arange(37)), table, atol=1e-5)


@pytest.mark.parametrize(("form", "modes", "ranks"), [("svd", (32, 60), (16,)), ("ttm", (4, 8, 8, 8), (1, 16, 1))])
def test_a_tied_table_has_the_name_of_its_product(form, modes, ranks, rng):
    model = embedding(rng, tied=True)
    layers = {layer.name: layer.spec.gathers for layer in survey(model)}
    assert layers == {"embed": True, "table": False}
    rows = LayerPlan(name="embed", format=form, modes=modes, ranks=ranks)
    plan = Plan(layers=(rows, LayerPlan(name="table", format="svd", modes=(60, 32), ranks=(16,))))
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


def test_tables_are_offered_in_two_and_three_modes(rng):
    (layer, _) = survey(embedding(rng, entries=601, features=64))
    options = options_of(layer, ["svd", "ttm"], 8)
    assert {option.format for option in options} == {"svd", "ttm"}
    tables = [option for option in options if option.format == "ttm"]
    assert {option.modes for option in tables} == {(8, 8, 32, 19), (4, 4, 4, 5, 11, 11)}
    weight = rng.standard_normal((64, 601)).astype(np.float32)
    for option, share in zip(tables, map(Approximations(weight).share, tables), strict=True):
        assert option.merge == "none"
        assert option.params == option.plan("table").params((64, 601)) < weight.size
        real = relative(project("ttm", weight, option.modes, option.ranks), weight) ** 2
        assert real <= share * 1.01
        assert share <= len(option.ranks[1:-1]) * real * 1.05  # with padding of zeros, which the projection chooses


def test_embeddings_are_planned_for_a_target_on_size_alone(rng, tmp_path):
    model = embedding(rng, entries=601, features=64)
    formats = ("svd", "ttm")
    search = Search(grid=16, cache=tmp_path, seconds=0.5, check_seconds=0.5, allow_slower=True, formats=formats)
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


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_indices_of_a_type_that_the_graph_does_not_state(rng, kind):
    table = rng.standard_normal((13, 8)).astype(np.float32)
    model = only_table(table, kind)
    model.graph.node.insert(0, helper.make_node("Neg", ["ids"], ["others"]))
    model.graph.node[1].input[1] = "others"
    factored = factorize(model, table_plan(table), decompose_graph(model, table_plan(table))).model
    ids = np.arange(-12, 13, dtype=kind)
    np.testing.assert_allclose(run(factored, ids), table[-ids], atol=1e-5)
