"""Convolutions in groups in ONNX graphs: exact at full rank, and of convolutions alone."""

import numpy as np
import onnxruntime as ort
import pytest
from cases import relative
from conftest import make_model
from onnx import helper

from tensorrail_exporter import GraphError, LayerPlan, Plan, decompose_graph, factorize, load_cores, reconstruct, save_cores
from tensorrail_exporter.formats import format_of
from tensorrail_exporter.precision.reduce import to_int8

FORMS = ["tt", "svd", "tucker", "cp", "tr"]
CASES = {
    "1d": ((24, 8, 5), 3, (17,), {"strides": [2], "pads": [2, 1], "dilations": [2]}),
    "2d": ((32, 8, 3, 3), 4, (9, 8), {"strides": [2, 1], "pads": [1, 0, 1, 2], "dilations": [1, 2]}),
    "2d SAME": ((32, 8, 3, 3), 2, (9, 9), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    "2d 1×1": ((24, 16, 1, 1), 2, (5, 5), {"strides": [2, 2]}),
    "3d": ((8, 4, 2, 3, 3), 2, (5, 5, 5), {"pads": [0, 1, 1, 1, 1, 1]}),
}


def model_of(case, rng):
    """Return a convolution with a bias, its spec's shape, the number of groups and an input."""
    shape, groups, size, attributes = CASES[case]
    weights = {"w": rng.standard_normal(shape).astype(np.float32), "b": rng.standard_normal(shape[0]).astype(np.float32)}
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], "n", group=groups, **attributes)
    inputs = [groups * shape[1], *size]
    model = make_model([node], weights, {"x": ["n", *inputs]}, {"y": ["n", shape[0], *[None] * len(size)]})
    return model, shape, groups, rng.standard_normal((2, *inputs)).astype(np.float32)


def plan_of(form_name, shape, groups, rank):
    form = format_of(form_name, groups)
    modes = form.default_modes(shape)
    ranks = form.clamp(shape, modes, form.uniform(shape, modes, rank))
    return Plan(layers=(LayerPlan(name="w", format=form_name, modes=modes, ranks=ranks),))


def run(model, x):
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form_name", FORMS)
def test_full_rank_is_the_dense_layer_and_low_rank_its_reconstruction(form_name, case, rng):
    model, shape, groups, x = model_of(case, rng)
    dense = run(model, x)
    full = plan_of(form_name, shape, groups, 10**6)
    made = factorize(model, full, decompose_graph(model, full))
    tolerance = 0.05 if form_name == "cp" else 1e-5  # alternating least squares comes near a tensor of full rank
    assert relative(run(made.model, x), dense) < tolerance
    low = plan_of(form_name, shape, groups, 2)
    cores = decompose_graph(model, low)
    factored = factorize(model, low, cores)
    assert relative(run(factored.model, x), run(reconstruct(model, low, cores), x)) < 1e-5
    assert {node.op_type for node in factored.model.graph.node} == {"Conv"}
    assert all(attr.i % groups == 0 for node in factored.model.graph.node for attr in node.attribute if attr.name == "group")
    assert factored.layers[0].core_params == low.layers[0].params(shape, groups)


def test_plan_and_cores_are_files(rng, tmp_path):
    model, shape, groups, x = model_of("2d", rng)
    plan = plan_of("tt", shape, groups, 4)
    cores = decompose_graph(model, plan)
    plan.save(tmp_path / "plan.json")
    save_cores(tmp_path / "cores.safetensors", cores)
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    made = factorize(model, again, load_cores(tmp_path / "cores.safetensors", again)).model
    np.testing.assert_array_equal(run(made, x), run(factorize(model, plan, cores).model, x))


def test_ranks_are_padded_in_every_group(rng):
    model, shape, groups, x = model_of("2d", rng)
    plan = plan_of("tucker", shape, groups, 3)
    cores = decompose_graph(model, plan)
    padded = factorize(model, plan, cores, block=4)
    assert padded.layers[0].steps == "conv 32→16 /4, conv 3×3 16→16 /4, conv 16→32 /4"
    assert relative(run(padded.model, x), run(factorize(model, plan, cores).model, x)) < 1e-5


def test_a_factored_layer_runs_in_int8(rng):
    model, shape, groups, x = model_of("2d", rng)
    plan = plan_of("tt", shape, groups, 6)
    factored = factorize(model, plan, decompose_graph(model, plan)).model
    copy = to_int8(factored, [{"x": x}])
    assert relative(run(copy, x), run(factored, x)) < 0.05  # eight bits a value, three layers


@pytest.mark.parametrize(
    ("shape", "groups", "reason"),
    [
        ((16, 1, 3, 3), 8, r"it is a depthwise convolution \(group=8\), of one input channel per group"),
        ((16, 2, 3, 3), 4, r"in 4 groups, .*: modes \[16, 9, 2\] do not fit a weight of shape \[4, 2, 3, 3\]"),
    ],
)
def test_what_cannot_be_factored_says_why(shape, groups, reason, rng):
    node = helper.make_node("Conv", ["x", "w"], ["y"], "n", group=groups)
    weights = {"w": rng.standard_normal(shape).astype(np.float32)}
    model = make_model([node], weights, {"x": ["n", groups * shape[1], 6, 6]}, {"y": ["n", shape[0], 4, 4]})
    plan = Plan(layers=(LayerPlan(name="w", format="tt", modes=(16, 9, shape[1]), ranks=(1, 2, 2, 1)),))
    with pytest.raises((GraphError, LookupError, ValueError), match=f"layer w: .*{reason}"):
        decompose_graph(model, plan)


def test_outputs_that_are_no_multiple_of_the_groups_are_refused_with_what_to_do(rng):
    node = helper.make_node("Conv", ["x", "w"], ["y"], "n", group=4)
    weights = {"w": rng.standard_normal((18, 2, 3, 3)).astype(np.float32)}
    model = make_model([node], weights, {"x": ["n", 8, 6, 6]}, {"y": ["n", 18, 4, 4]})
    plan = Plan(layers=(LayerPlan(name="w", format="svd", modes=(18, 18), ranks=(1,)),))
    with pytest.raises(GraphError, match="got 18 outputs with group=4; leave it out of the plan"):
        decompose_graph(model, plan)


def test_nodes_that_share_a_weight_in_different_groups_are_planned_by_their_own_names(rng):
    weights = {"w": rng.standard_normal((8, 4, 1, 1)).astype(np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "whole"),
        helper.make_node("Conv", ["a", "w"], ["y"], "halves", group=2),
    ]
    model = make_model(nodes, weights, {"x": ["n", 4, 6, 6]}, {"y": ["n", 8, 6, 6]})
    plan = Plan(
        layers=(
            LayerPlan(name="halves", format="svd", modes=(4, 4), ranks=(2,)),
            LayerPlan(name="whole", format="svd", modes=(8, 4), ranks=(2,)),
        )
    )
    cores = decompose_graph(model, plan)
    assert [core.shape for core in cores["halves"]] == [(2, 4, 2), (2, 2, 4)]
    x = rng.standard_normal((2, 4, 6, 6)).astype(np.float32)
    assert relative(run(factorize(model, plan, cores).model, x), run(reconstruct(model, plan, cores), x)) < 1e-5
