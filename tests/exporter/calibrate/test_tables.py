"""Embeddings are decomposed by how often their rows are read."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from tensorrail_exporter import LayerPlan, Plan, decompose_graph, factorize
from tensorrail_exporter.calibrate import tables
from tensorrail_exporter.calibrate.inputs import Calibration
from tensorrail_exporter.calibrate.layerwise import fit_layers
from tensorrail_exporter.formats import FORMATS
from tensorrail_exporter.formats.ttm import table_modes
from tensorrail_exporter.search.approximations import Approximations, InputMoments
from tensorrail_exporter.search.options import Option

ENTRIES, FEATURES = 400, 24


@pytest.fixture
def table(rng):
    return rng.standard_normal((ENTRIES, FEATURES)).astype(np.float32)


def words(rng, count):
    """Return indices, of which some are drawn often and most are not, in no order of the table."""
    order = np.random.default_rng(5).permutation(ENTRIES)
    shares = 1 / np.arange(1, ENTRIES + 1)
    return order[rng.choice(ENTRIES, (count, 10), p=shares / shares.sum())]


def network(table):
    node = helper.make_node("Gather", ["table", "ids"], ["y"], "embed")
    entries = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", 10])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10, FEATURES])]
    graph = helper.make_graph([node], "graph", entries, outputs, [numpy_helper.from_array(table, "table")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def plan_of(name="svd", modes=(FEATURES, ENTRIES), ranks=(6,)):
    return Plan(layers=(LayerPlan(name="table", format=name, modes=modes, ranks=ranks),))


def outputs(model: onnx.ModelProto, ids):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"ids": ids})[0]


def test_reads_counts_indices_of_all_batches_also_from_the_end():
    counts = tables.reads([np.array([[0, 2], [2, -1]]), np.array([-5, 1], np.int32)], 5)
    np.testing.assert_array_equal(counts, [2, 1, 2, 0, 1])


def test_weights_have_the_mean_1_and_rows_that_are_not_read_keep_the_shrinkage():
    weights = tables.row_weights(np.array([3.0, 1.0, 0.0, 0.0]), 0.2)
    np.testing.assert_allclose(weights, [0.8 * 3 + 0.2, 0.8 + 0.2, 0.2, 0.2])
    np.testing.assert_allclose(tables.row_weights(np.zeros(4), 0.2), 1)


def test_svd_is_the_exact_minimum_of_the_weighted_error(rng, table):
    counts, weight = tables.reads([words(rng, 40)], ENTRIES), table.T
    layer = plan_of().layers[0]
    approximated = layer.reconstruct(tables.decompose(layer, weight, counts, 0.3), weight.shape)
    root = np.sqrt(tables.row_weights(counts, 0.3))
    least = np.square(np.linalg.svd(weight * root, compute_uv=False)[6:]).sum()
    assert np.square((weight - approximated) * root).sum() == pytest.approx(least, rel=1e-4)


def test_without_shrinkage_rows_that_are_not_read_stay_finite(rng, table):
    layer, counts = plan_of().layers[0], tables.reads([words(rng, 40)], ENTRIES)
    assert not counts.all()
    assert all(np.isfinite(core).all() for core in tables.decompose(layer, table.T, counts, 0.0))


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "ttm"])
def test_at_full_rank_no_format_changes_the_table(rng, table, name):
    weight, small = table.T[:, :12].copy(), np.arange(12.0)
    form = FORMATS[name]
    modes = form.default_modes(weight.shape)
    layer = LayerPlan(name="table", format=name, modes=modes, ranks=form.uniform(weight.shape, modes, 24))
    cores = tables.decompose(layer, weight, small, 0.1)
    np.testing.assert_allclose(layer.reconstruct(cores, weight.shape), weight, atol=2e-3)


def test_other_inputs_are_nearer_to_the_dense_table(rng, table):
    model, plan, ids = network(table), plan_of(), words(rng, 40)
    fitted = fit_layers(model, plan, Calibration(({"ids": ids[:30]},)), held_out=Calibration(({"ids": ids[30:]},)))
    (row,) = fitted.layers
    assert row.rows == 300
    assert row.fitted < 0.7 * row.plain
    aside = words(rng, 100)
    alone, weighted = (
        outputs(factorize(model, plan, cores).model, aside) for cores in (decompose_graph(model, plan), fitted.cores)
    )
    dense = table[aside]
    assert np.square(weighted - dense).sum() < 0.85 * np.square(alone - dense).sum()


def test_inputs_that_are_held_out_choose_how_far_rows_count_alike(rng, table):
    """Few words that say nothing about the others need more shrinkage than many that do."""
    model, plan = network(table), plan_of()

    def shrinkage(fitted, held_out):
        fit = fit_layers(model, plan, Calibration(({"ids": fitted},)), held_out=Calibration(({"ids": held_out},)))
        return fit.layers[0].shrinkage

    many = words(rng, 300)
    anything = rng.integers(0, ENTRIES, (100, 10))
    assert shrinkage(words(rng, 3), anything) > shrinkage(many[:200], many[200:])


def test_a_table_in_ttm_is_decomposed_by_its_weight(rng, table):
    modes = table_modes((FEATURES, ENTRIES))
    plan = Plan(layers=(LayerPlan(name="table", format="ttm", modes=modes, ranks=(1, 20, 1), merge="none"),))
    fitted = fit_layers(network(table), plan, Calibration(({"ids": words(rng, 10)},)))
    assert "several modes" in fitted.layers[0].why


def test_losses_of_options_follow_the_rows_that_are_read(rng, table):
    weight = table.T
    root = np.sqrt(tables.row_weights(tables.reads([words(rng, 40)], ENTRIES), 0.3))
    weighted = Approximations(weight, InputMoments(root, 1 / root, np.zeros(ENTRIES)))
    option = Option("svd", (FEATURES, ENTRIES), (6,), "sides", "", 1, 1)
    pairs = Option("ttm", table_modes((FEATURES, ENTRIES)), (1, 40, 1), "none", "", 1, 1)
    for one in (option, pairs):
        approximated = weighted.approximated(one)
        lost = np.square((weight - approximated) * root).sum() / np.square(weight * root).sum()
        assert weighted.share(one) == pytest.approx(lost, rel=1e-3)
    assert weighted.share(option) < Approximations(weight).share(option)
    np.testing.assert_allclose(weighted.approximated(pairs), Approximations(weight).approximated(pairs), atol=1e-5)
