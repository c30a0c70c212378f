"""The fit of a whole factored network toward the outputs of the dense one."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from conftest import make_model
from onnx import helper, numpy_helper

from tensorrail_exporter import LayerPlan, Plan, decompose_graph, factorize
from tensorrail_exporter.calibrate.inputs import Calibration
from tensorrail_trainer.fit.augment import image_input, varied
from tensorrail_trainer.fit.network import NetworkFit, fit_network

PLAN = Plan(
    layers=(
        LayerPlan(name="two", format="tucker", modes=(16, 9, 12), ranks=(6, 6)),
        LayerPlan(name="fc", format="svd", modes=(10, 16), ranks=(5,)),
    )
)


@pytest.fixture(scope="module")
def dense():
    rng = np.random.default_rng(3)
    weights = {
        "one.weight": rng.standard_normal((12, 3, 3, 3)).astype(np.float32) / 3,
        "two.weight": rng.standard_normal((16, 12, 3, 3)).astype(np.float32) / 6,
        "fc.weight": rng.standard_normal((10, 16)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["image", "one.weight"], ["a"], "one", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], "r1"),
        helper.make_node("Conv", ["b", "two.weight"], ["c"], "two", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["d"], "r2"),
        helper.make_node("GlobalAveragePool", ["d"], ["e"], "pool"),
        helper.make_node("Flatten", ["e"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "fc.weight"], ["logits"], "fc", transB=1),
    ]
    return make_model(nodes, weights, {"image": ["n", 3, 12, 12]}, {"logits": ["n", 10]})


def images(seed, count):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, 3, 12, 12)) + rng.standard_normal((count, 3, 1, 1))).astype(np.float32)


def divergence(dense, other, x):
    """Return the mean Kullback-Leibler divergence of the classes' probabilities."""
    outputs = []
    for model in (dense, other):
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        outputs.append(torch.from_numpy(session.run(None, {"image": x})[0]).log_softmax(1))
    return float((outputs[0].exp() * (outputs[0] - outputs[1])).sum(1).mean())


@pytest.fixture(scope="module")
def factored(dense):
    return factorize(dense, PLAN, decompose_graph(dense, PLAN)).model


def test_a_network_is_nearer_to_the_dense_one_on_other_images(dense, factored):
    few = Calibration(({"image": images(1, 40)},))
    fitted = fit_network(dense, factored, PLAN, few, NetworkFit(steps=150, seconds=60))
    others = images(2, 300)
    assert divergence(dense, fitted, others) < 0.6 * divergence(dense, factored, others)


def test_the_same_seed_gives_the_same_network(dense, factored):
    few, settings = Calibration(({"image": images(1, 40)},)), NetworkFit(steps=25, seconds=60)
    fitted = [fit_network(dense, factored, PLAN, few, settings).SerializeToString() for _ in range(2)]
    assert fitted[0] == fitted[1]
    assert fitted[0] != factored.SerializeToString()


def test_without_time_for_a_few_steps_the_network_stays_as_it_is(dense, factored):
    few = Calibration(({"image": images(1, 40)},))
    assert fit_network(dense, factored, PLAN, few, NetworkFit(seconds=1e-4)) is factored


@pytest.mark.parametrize("end", ["Softmax", "LogSoftmax", "Sigmoid", "Relu"])
def test_outputs_of_any_kind_are_aimed_at(end, dense):
    nodes = [*dense.graph.node, helper.make_node(end, ["logits"], ["y"], "end")]
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in dense.graph.initializer}
    model = make_model(nodes, weights, {"image": ["n", 3, 12, 12]}, {"y": ["n", 10]})
    factored = factorize(model, PLAN, decompose_graph(model, PLAN)).model
    fitted = fit_network(model, factored, PLAN, Calibration(({"image": images(1, 40)},)), NetworkFit(steps=60, seconds=60))
    others = images(2, 200)
    runs = [
        ort.InferenceSession(each.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"image": others})[0]
        for each in (model, factored, fitted)
    ]
    assert np.linalg.norm(runs[2] - runs[0]) < 0.9 * np.linalg.norm(runs[1] - runs[0])


def test_variants_are_images_of_the_same_kind():
    generator = torch.Generator().manual_seed(0)
    x = torch.arange(6.0)[:, None, None, None] * 10 + torch.rand(6, 3, 16, 24)  # each image has its own ten
    variants = varied(x, generator)
    assert variants.shape == x.shape
    assert variants.is_contiguous(memory_format=torch.channels_last)
    tens = (variants / 10).floor()
    for k in range(6):
        own = float((tens[k] == k).float().mean())
        assert own >= 0.49  # at most half of an image is another one's
        assert len(tens[k].unique()) <= 2
    assert not torch.equal(variants, x)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 3, 4, 40), "float32"), ((2, 4, 16, 16), "float32"), ((2, 16), "float32"), ((2, 3, 16, 16), "int64")],
)
def test_what_is_no_image_is_not_varied(shape, dtype):
    feed = {"x": torch.zeros(shape, dtype=getattr(torch, dtype))}
    assert image_input(feed) is None
    assert image_input({"x": torch.zeros(2, 3, 16, 16), "y": torch.zeros(2)}) is None
    assert image_input({"x": torch.zeros(2, 3, 16, 16)}) == "x"
