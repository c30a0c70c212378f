"""A network whose layers take other weights: the same as a graph with these weights."""

import numpy as np
import onnxruntime as ort
import pytest
from conftest import make_model
from onnx import helper

from tensorrail_exporter import LayerPlan, Plan
from tensorrail_exporter.formats import format_of
from tensorrail_exporter.rewrite.biases import add_biases
from tensorrail_exporter.rewrite.resolve import resolve
from tensorrail_exporter.rewrite.rewriter import with_weights
from tensorrail_exporter.search.stitched import Change, StitchedNetwork
from tensorrail_runtime.sessions.session import Session


def weights(rng, **shapes):
    return {
        name: (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32) for name, shape in shapes.items()
    }


@pytest.fixture
def model(rng):
    """Two branches from one input, a residual sum, a shared weight, a Gemm with a scaled bias and a product with a bias."""
    named = weights(rng, a=(16, 16, 3, 3), b=(16, 16, 1, 1), c=(24, 16), d=(24, 12)) | {"cb": np.ones(24, np.float32)}
    named |= {"db": np.zeros(12, np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["left"], "left", pads=[1] * 4),
        helper.make_node("Conv", ["x", "b"], ["right"], "right"),
        helper.make_node("Relu", ["left"], ["rl"]),
        helper.make_node("Add", ["rl", "right"], ["sum"]),
        helper.make_node("Conv", ["sum", "a"], ["again"], "again", pads=[1] * 4),
        helper.make_node("GlobalAveragePool", ["again"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "c", "cb"], ["hidden"], "hidden", transB=1, alpha=0.5, beta=2.0),
        helper.make_node("MatMul", ["hidden", "d"], ["product"], "product"),
        helper.make_node("Add", ["product", "db"], ["y"], "shift"),
    ]
    outputs = {"y": ["batch", 12], "sum": ["batch", 16, 6, 6]}
    return make_model(nodes, named, {"x": ["batch", 16, 6, 6]}, outputs)


def plan_of(model):
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer if len(tensor.dims) > 1}
    shapes["d"] = shapes["d"][::-1]  # a product's weight stands as (I, O)
    layers = []
    for name, shape in shapes.items():
        modes = format_of("svd").default_modes(shape)
        layers.append(LayerPlan(name=name, format="svd", modes=modes, ranks=(2,)))
    return Plan(layers=tuple(layers))


def outputs_of(model, feeds):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [list(parts) for parts in zip(*(session.run(None, feed) for feed in feeds), strict=True)]


def close(found, expected):
    for parts, others in zip(found, expected, strict=True):
        for part, other in zip(parts, others, strict=True):
            np.testing.assert_allclose(part, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


@pytest.fixture
def feeds(rng):
    return [{"x": rng.standard_normal((size, 16, 6, 6)).astype(np.float32)} for size in (3, 2)]


def changes_of(resolved, rng):
    """Another weight for every layer, and another bias for those that take one."""
    changes = {}
    for name, layer in resolved.layers.items():
        weight = np.asarray(layer.weight, np.float32)
        bias = rng.standard_normal(weight.shape[0]) if name != "a" else None  # two nodes share it
        changes[name] = Change((weight + 0.3 * rng.standard_normal(weight.shape) * weight.std()).astype(np.float32), bias)
    return changes


def changed_graph(resolved, changes):
    biases = {name: change.bias for name, change in changes.items() if change.bias is not None}
    return with_weights(add_biases(resolved, biases), {name: change.weight for name, change in changes.items()})


def test_it_computes_what_a_graph_with_these_weights_computes(model, feeds, rng, tmp_path):
    resolved = resolve(model, plan_of(model))
    network = StitchedNetwork(resolved, feeds, Session(), tmp_path)
    assert set(network.layers) == {"a", "b", "c", "d"}
    close(network.dense(), outputs_of(model, feeds))
    changes = changes_of(resolved, rng)
    close(network.with_changes(changes), outputs_of(changed_graph(resolved, changes), feeds))
    some = {name: changes[name] for name in ("a", "d")}
    close(network.with_changes(some), outputs_of(changed_graph(resolved, some), feeds))
    close(network.with_changes({}), outputs_of(model, feeds))
    assert not np.allclose(network.with_changes(some)[0][0], network.dense()[0][0], rtol=0.05)


def test_one_layer_at_a_time_runs_from_kept_activations(model, feeds, rng, tmp_path):
    resolved = resolve(model, plan_of(model))
    changes = changes_of(resolved, rng)
    network = StitchedNetwork(resolved, feeds, Session(), tmp_path)
    for name in network.layers:
        one = changes[name]
        half = Change((0.5 * one.weight).astype(np.float32), one.bias)
        first, second = network.with_each(name, [one, half])
        close(first, outputs_of(changed_graph(resolved, {name: one}), feeds))
        close(second, outputs_of(changed_graph(resolved, {name: half}), feeds))


def test_no_node_before_a_layer_runs_twice(rng, tmp_path, monkeypatch):
    """Sixteen equal layers in a row: as many nodes run in front of layers as there are, and not half their square."""
    names = [f"w{k}" for k in range(16)]
    nodes = [helper.make_node("MatMul", [f"t{k}", name], [f"t{k + 1}"], f"n{k}") for k, name in enumerate(names)]
    named = weights(rng, **dict.fromkeys(names, (8, 8)))
    chain = make_model(nodes, named, {"t0": ["batch", 8]}, {"t16": ["batch", 8]})
    layers = [LayerPlan(name=name, format="svd", modes=format_of("svd").default_modes((8, 8)), ranks=(2,)) for name in names]
    resolved = resolve(chain, Plan(layers=tuple(layers)))
    network = StitchedNetwork(resolved, [{"t0": rng.standard_normal((4, 8)).astype(np.float32)}], Session(), tmp_path)
    ahead, session = [], network._session

    def counting(places, changed, outputs):
        ahead.append(0 if changed else len(places))
        return session(places, changed, outputs)

    monkeypatch.setattr(network, "_session", counting)
    for name in network.layers:
        network.with_each(name, [Change(np.zeros((8, 8), np.float32))])
    assert sum(ahead) == 15
