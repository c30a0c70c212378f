"""Cores fitted to activations: where a graph is cut, what is trained, and that it helps."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import make_model
from onnx import helper, numpy_helper

from tensorrail_exporter import GraphError, LayerPlan, Plan, decompose_graph, factorize
from tensorrail_exporter.calibrate.inputs import Calibration
from tensorrail_trainer.fit.blocks import FitSettings, cut_points, fit_blocks, trainable_names
from tensorrail_trainer.fit.module import OnnxModule
from tensorrail_trainer.networks.resnets import resnet18
from tensorrail_trainer.run.export import to_onnx


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    model = resnet18(classes=10, stem="small", width=8)
    with torch.no_grad():
        model(torch.randn(64, 3, 32, 32))  # batch-norm statistics that are not the initial ones
    return to_onnx(model.eval(), torch.randn(2, 3, 32, 32))


@pytest.fixture(scope="module")
def plan():
    return Plan(
        layers=tuple(
            LayerPlan(name=f"layer{stage}.1.conv{k}", format="tt", modes=(c, 9, c), ranks=(1, c // 2, c // 2, 1))
            for stage, c in ((1, 8), (2, 16), (3, 32))
            for k in (1, 2)
        )
    )


def inputs(seed, count=64):
    return np.random.default_rng(seed).standard_normal((count, 3, 32, 32)).astype(np.float32)


def outputs(model, x):
    import onnxruntime as ort

    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"image": x})[0]


def test_a_residual_network_is_cut_behind_its_blocks(dense):
    cuts = set(cut_points(dense))
    by_output = {name: node for node in dense.graph.node for name in node.output}
    # Behind a block everything later needs one tensor; within a block the shortcut is needed as well.
    adds = [node for node in dense.graph.node if node.op_type == "Add"]
    assert len(adds) == 8
    assert all(node.output[0] in cuts for node in adds)
    within = [n.output[0] for n in dense.graph.node if n.op_type == "Conv" and n.input[1] == "layer1.1.conv1.weight"]
    assert within
    assert not set(within) & cuts
    assert all(name in by_output for name in cuts)


def test_what_is_trained_belongs_to_the_plan(dense, plan):
    factored = factorize(dense, plan, decompose_graph(dense, plan)).model
    names = trainable_names(factored, plan)
    for layer in plan.layers:
        assert {f"{layer.name}/{k}" for k in range(3)} <= set(names)
        assert f"{layer.name.replace('conv', 'bn')}.weight" in names
    assert not [name for name in names if name.startswith(("layer4", "conv1", "fc"))]


def test_the_fit_brings_held_out_outputs_nearer_and_leaves_the_rest(dense, plan):
    factored = factorize(dense, plan, decompose_graph(dense, plan)).model
    feeds = tuple({"image": inputs(1, 128)[k : k + 32]} for k in range(0, 128, 32))
    fit = fit_blocks(dense, factored, plan, Calibration(feeds), FitSettings(epochs=4))
    held = inputs(2)
    wanted, before, after = (outputs(one, held) for one in (dense, factored, fit.model))
    assert np.linalg.norm(after - wanted) < 0.8 * np.linalg.norm(before - wanted)
    assert all(block.after < block.before for block in fit.blocks)
    onnx.checker.check_model(fit.model, full_check=True)
    old, new = ({t.name: numpy_helper.to_array(t) for t in one.graph.initializer} for one in (factored, fit.model))
    trained = set(trainable_names(factored, plan))
    assert old.keys() == new.keys()
    for name, value in old.items():
        assert value.shape == new[name].shape
        if name not in trained:
            np.testing.assert_array_equal(value, new[name])


def test_the_same_seed_gives_the_same_model(dense, plan):
    factored = factorize(dense, plan, decompose_graph(dense, plan)).model
    feeds = ({"image": inputs(1, 32)},)
    short = FitSettings(epochs=1)
    made = [fit_blocks(dense, factored, plan, Calibration(feeds), short).model.SerializeToString() for _ in range(2)]
    assert made[0] == made[1]


def test_a_graph_with_two_outputs_is_fitted_to_both(rng):
    """A trunk that is an output too, and two heads: nothing behind the trunk can be cut off."""
    weights = {name: rng.standard_normal((16, 16)).astype(np.float32) / 4 for name in ("a", "b", "c")}
    nodes = [
        helper.make_node("MatMul", ["image", "a"], ["h"], "a"),
        helper.make_node("Relu", ["h"], ["trunk"]),
        helper.make_node("MatMul", ["trunk", "b"], ["one"], "b"),
        helper.make_node("MatMul", ["trunk", "c"], ["two"], "c"),
    ]
    model = make_model(nodes, weights, {"image": ["n", 16]}, {"one": ["n", 16], "two": ["n", 16]})
    plan = Plan(layers=tuple(LayerPlan(name=name, format="svd", modes=(16, 16), ranks=(8,)) for name in weights))
    calibration = Calibration(feeds=({"image": rng.standard_normal((64, 16)).astype(np.float32)},))
    fitted = fit_blocks(model, factorize(model, plan, decompose_graph(model, plan)).model, plan, calibration)
    assert fitted.blocks[-1].block == "one, two"
    assert all(block.after < block.before for block in fitted.blocks)


def sequence(rng, batch, turned):
    """An LSTM over (time, batch, features), or a batch of 1 that a Reshape has written in it."""
    if turned:
        weights = {
            "W": rng.standard_normal((1, 32, 12)).astype(np.float32) / 3,
            "R": rng.standard_normal((1, 32, 8)).astype(np.float32) / 3,
        }
        nodes = [helper.make_node("LSTM", ["x", "W", "R"], ["", "y"], "lstm", hidden_size=8)]
        model = make_model(nodes, weights, {"x": [6, "batch", 12]}, {"y": [1, "batch", 8]})
        return model, Plan(layers=(LayerPlan(name="lstm", format="svd", modes=(32, 12), ranks=(4,)),))
    weights = {"shape": np.array([batch, -1, 12]), "w": rng.standard_normal((12, 10)).astype(np.float32)}
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["y"], "fc"),
    ]
    model = make_model(nodes, weights, {"x": [batch, 4, 18]}, {"y": [batch, 6, 10]})
    return model, Plan(layers=(LayerPlan(name="fc", format="svd", modes=(10, 12), ranks=(4,)),))


@pytest.mark.parametrize(("batch", "turned"), [(1, False), (2, False), (6, True)])
def test_graphs_with_a_fixed_batch_or_time_first_are_fitted_in_their_own_batches(batch, turned, rng):
    model, plan = sequence(rng, batch, turned)
    shape = (6, 3, 12) if turned else (batch, 4, 18)
    feeds = tuple({"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(24))
    factored = factorize(model, plan, decompose_graph(model, plan)).model
    fit = fit_blocks(model, factored, plan, Calibration(feeds), FitSettings(epochs=8))
    assert [block.after < block.before for block in fit.blocks] == [True]
    onnx.checker.check_model(fit.model, full_check=True)


def test_a_graph_that_is_not_one_row_a_sample_is_refused(rng):
    weights = {"w": rng.standard_normal((8, 8)).astype(np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "fc"), helper.make_node("Softmax", ["h"], ["y"], axis=0)]
    model = make_model(nodes, weights, {"x": ["n", 8]}, {"y": ["n", 8]})
    plan = Plan(layers=(LayerPlan(name="fc", format="svd", modes=(8, 8), ranks=(2,)),))
    factored = factorize(model, plan, decompose_graph(model, plan)).model
    feeds = ({"x": rng.standard_normal((16, 8)).astype(np.float32)},)
    with pytest.raises(GraphError, match="expected outputs with one row per sample"):
        fit_blocks(model, factored, plan, Calibration(feeds))


def test_a_fit_that_loses_is_taken_back(rng):
    """Rates a thousand times too high make the block worse than it was."""
    weights = {name: rng.standard_normal((16, 16)).astype(np.float32) / 4 for name in ("a", "b")}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], "a"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["y"], "b"),
    ]
    model = make_model(nodes, weights, {"x": ["n", 16]}, {"y": ["n", 16]})
    plan = Plan(layers=tuple(LayerPlan(name=name, format="svd", modes=(16, 16), ranks=(12,)) for name in weights))
    factored = factorize(model, plan, decompose_graph(model, plan)).model
    feeds = ({"x": rng.standard_normal((64, 16)).astype(np.float32)},)
    fit = fit_blocks(model, factored, plan, Calibration(feeds), FitSettings(epochs=1, rate=30.0))
    assert all(block.after <= block.before for block in fit.blocks)
    before, after = ({t.name: numpy_helper.to_array(t) for t in one.graph.initializer} for one in (factored, fit.model))
    kept = [name for name in before if np.array_equal(before[name], after[name])]
    assert kept


def test_constants_that_other_layers_read_are_not_trained(rng):
    weights = {name: rng.standard_normal((8, 8)).astype(np.float32) / 3 for name in ("a", "b")} | {"c": np.ones(8, np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["p"], "a"),
        helper.make_node("Add", ["p", "c"], ["q"], "first"),
        helper.make_node("MatMul", ["q", "b"], ["r"], "b"),
        helper.make_node("Add", ["r", "c"], ["y"], "second"),
    ]
    model = make_model(nodes, weights, {"x": ["n", 8]}, {"y": ["n", 8]})
    plan = Plan(layers=(LayerPlan(name="b", format="svd", modes=(8, 8), ranks=(4,)),))
    factored = factorize(model, plan, decompose_graph(model, plan)).model
    assert sorted(trainable_names(factored, plan)) == ["b/0", "b/1"]


@pytest.mark.parametrize("kind", ["left", "embedding"])
def test_cores_are_trained_on_either_side_of_a_product(kind, rng):
    """A weight that is the first input of its node: a product from the left, and the table of an embedding."""
    weights = {"w": rng.standard_normal((24, 16)).astype(np.float32)}
    if kind == "left":
        node = helper.make_node("MatMul", ["w", "x"], ["y"], "w")
        model = make_model([node], weights, {"x": ["n", 16, 3]}, {"y": ["n", 24, 3]})
        feeds = ({"x": rng.standard_normal((32, 16, 3)).astype(np.float32)},)
    else:
        nodes = [helper.make_node("Cast", ["x"], ["ids"], to=7), helper.make_node("Gather", ["w", "ids"], ["y"], "w")]
        model = make_model(nodes, weights, {"x": ["n", 5]}, {"y": ["n", 5, 16]})
        feeds = ({"x": rng.integers(0, 24, (32, 5)).astype(np.float32)},)
    modes = (24, 16) if kind == "left" else (16, 24)
    plan = Plan(layers=(LayerPlan(name="w", format="svd", modes=modes, ranks=(6,)),))
    factored = factorize(model, plan, decompose_graph(model, plan)).model
    assert sorted(trainable_names(factored, plan)) == ["w/0", "w/1"]
    fit = fit_blocks(model, factored, plan, Calibration(feeds))
    before, after = ({t.name: numpy_helper.to_array(t) for t in one.graph.initializer} for one in (factored, fit.model))
    assert fit.blocks[0].after < fit.blocks[0].before
    assert not any(np.array_equal(before[name], after[name]) for name in ("w/0", "w/1"))


def test_a_weight_of_two_blocks_is_trained_in_the_first(rng):
    """The second block would change the outputs of the first, to which it was fitted itself."""
    weights = {name: rng.standard_normal((16, 16)).astype(np.float32) / 4 for name in ("w", "b")}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], "one"),
        helper.make_node("Relu", ["p"], ["q"]),
        helper.make_node("MatMul", ["q", "b"], ["r"], "b"),
        helper.make_node("Relu", ["r"], ["s"]),
        helper.make_node("MatMul", ["s", "w"], ["y"], "two"),
    ]
    model = make_model(nodes, weights, {"x": ["n", 16]}, {"y": ["n", 16]})
    plan = Plan(layers=tuple(LayerPlan(name=name, format="svd", modes=(16, 16), ranks=(8,)) for name in ("w", "b")))
    factored = factorize(model, plan, decompose_graph(model, plan)).model
    feeds = ({"x": rng.standard_normal((64, 16)).astype(np.float32)},)
    fit = fit_blocks(model, factored, plan, Calibration(feeds))
    assert [block.tensors for block in fit.blocks] == [2, 2]
    dense, fitted = (OnnxModule(m)({"x": torch.from_numpy(feeds[0]["x"])}, ["q"])["q"].numpy() for m in (model, fit.model))
    lost = np.square(fitted - dense).mean() / np.square(dense - dense.mean(0)).mean()
    assert lost == pytest.approx(fit.blocks[0].after, rel=0.02)


def test_selu_is_computed_with_the_nodes_own_numbers(rng):
    for numbers in ({}, {"alpha": 1.0, "gamma": 2.0}):
        model = make_model([helper.make_node("Selu", ["x"], ["y"], **numbers)], {}, {"x": ["n", 8]}, {"y": ["n", 8]})
        x = rng.standard_normal((3, 8)).astype(np.float32)
        wanted = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        np.testing.assert_allclose(OnnxModule(model)({"x": torch.from_numpy(x)})["y"].numpy(), wanted, atol=1e-5)
