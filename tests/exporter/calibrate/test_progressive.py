"""Layers are fitted on what the network before them gives, piece by piece: the same as running it whole for every layer."""

import numpy as np
import onnx
import pytest
from conftest import make_model
from onnx import TensorProto, helper

from tensorrail_exporter import FORMATS, LayerPlan, Plan, decompose_graph
from tensorrail_exporter.calibrate import metric, progressive
from tensorrail_exporter.calibrate.inputs import Calibration, Sampler, Statistics, run_to
from tensorrail_exporter.calibrate.layerwise import dense_weights, fit_layers
from tensorrail_exporter.calibrate.progressive import ProgressiveNetwork
from tensorrail_exporter.rewrite.biases import add_biases, takes_bias
from tensorrail_exporter.rewrite.resolve import resolve
from tensorrail_exporter.rewrite.rewriter import with_weights
from tensorrail_exporter.rewrite.survey import dense_layer
from tensorrail_runtime.sessions.session import Session

CPU = Session(threads=1)
SAME = 2e-3  # relative: rounding in sessions that fuse other nodes, through the solution of a linear system


def weight(rng, *shape):
    return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def layer(name, shape, rank):
    return LayerPlan(name=name, format="svd", modes=FORMATS["svd"].default_modes(shape), ranks=(rank,))


def residual(rng, *, tied=False):
    """Three convolutions with a skip around the second, then a Gemm on rows that a computed shape makes; x (n, 3, 8, 8).

    With `tied` the third convolution has the weight of the first but one, with a layer between them.
    """
    third = "w1" if tied else "w2"
    weights = {
        "w0": weight(rng, 8, 3, 3, 3),
        "w1": weight(rng, 8, 8, 3, 3),
        "w2": weight(rng, 8, 8, 3, 3),
        "w3": weight(rng, 6, 8),
        "w4": weight(rng, 8, 8, 1, 1),
        "minus": np.array([-1], np.int64),
        "first": np.array([0], np.int64),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c0"], pads=[1] * 4),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("Conv", ["r0", "w1"], ["c1"], pads=[1] * 4),
        helper.make_node("Add", ["c1", "r0"], ["s1"]),
        helper.make_node("Relu", ["s1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w4"], ["c4"]),
        helper.make_node("Relu", ["c4"], ["r4"]),
        helper.make_node("Conv", ["r4", third], ["c2"], pads=[1] * 4),
        helper.make_node("Add", ["c2", "r0"], ["s2"]),
        helper.make_node("GlobalAveragePool", ["s2"], ["p"]),
        helper.make_node("Shape", ["x"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "first"], ["batch"]),
        helper.make_node("Concat", ["batch", "minus"], ["flat"], axis=0),
        helper.make_node("Reshape", ["p", "flat"], ["rows"]),
        helper.make_node("Gemm", ["rows", "w3"], ["y"], transB=1),
    ]
    used = {name for node in nodes for name in node.input}
    weights = {name: values for name, values in weights.items() if name in used}
    model = make_model(nodes, weights, {"x": ["n", 3, 8, 8]}, {"y": ["n", 6]})
    shapes = {"w0": (8, 3, 3, 3), "w1": (8, 8, 3, 3), "w4": (8, 8, 1, 1), "w2": (8, 8, 3, 3), "w3": (6, 8)}
    return model, Plan(layers=tuple(layer(name, shapes[name], 4) for name in shapes if name in weights)), (3, 8, 8)


def recurrent(rng):
    """LSTM, then a product and its bias, both planned; x (n, 5, 10), turned so that time comes first."""
    weights = {
        "w": 2 * weight(rng, 1, 32, 10),
        "r": weight(rng, 1, 32, 8),
        "axes": np.array([1], np.int64),
        "m": weight(rng, 8, 8),
        "b": weight(rng, 8),
    }
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        helper.make_node("LSTM", ["t", "w", "r"], ["sequence"], hidden_size=8),
        helper.make_node("Squeeze", ["sequence", "axes"], ["h"]),
        helper.make_node("MatMul", ["h", "m"], ["g"]),
        helper.make_node("Add", ["g", "b"], ["y"]),
    ]
    model = make_model(nodes, weights, {"x": ["n", 5, 10]}, {"y": [5, "n", 8]})
    return model, Plan(layers=(layer("m", (8, 8), 4), layer("w", (32, 10), 5))), (5, 10)


def behind_a_choice(rng):
    """A product, an If whose branches read it and a weight of the plan, and a sequence of both before the next products."""
    branches = {}
    for name, op in (("else_branch", "Tanh"), ("then_branch", "Sigmoid")):
        inner = [helper.make_node("MatMul", ["h", "wb"], ["m"]), helper.make_node(op, ["m"], ["out"])]
        result = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 8])
        branches[name] = helper.make_graph(inner, name, [], [result])
    nodes = [
        helper.make_node("Gemm", ["x", "w0"], ["g"], transB=1),
        helper.make_node("Softplus", ["g"], ["h"]),
        helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
        helper.make_node("Greater", ["top", "limit"], ["condition"]),
        helper.make_node("If", ["condition"], ["c"], **branches),
        helper.make_node("SequenceConstruct", ["c", "h"], ["both"]),
        helper.make_node("ConcatFromSequence", ["both"], ["joined"], axis=1),
        helper.make_node("Gemm", ["joined", "w1"], ["k"], transB=1),
        helper.make_node("SequenceAt", ["both", "first"], ["again"]),
        helper.make_node("Add", ["k", "again"], ["s"]),
        helper.make_node("Gemm", ["s", "w2"], ["y"], transB=1),
    ]
    weights = {
        "w0": weight(rng, 8, 8),
        "wb": weight(rng, 8, 8),
        "w1": weight(rng, 8, 16),
        "w2": weight(rng, 8, 8),
        "limit": np.array(2.5, np.float32),
        "first": np.array(0, np.int64),
    }
    model = make_model(nodes, weights, {"x": ["n", 8]}, {"y": ["n", 8]})
    names = {"w0": (8, 8), "wb": (8, 8), "w1": (8, 16), "w2": (8, 8)}
    return model, Plan(layers=tuple(layer(name, shape, 5) for name, shape in names.items())), (8,)


def fitted_whole(model, plan, data):
    """Fit as `fit_layers` does, and run the whole network from its inputs for every layer."""
    resolved = resolve(model, plan)
    weights, plain, cores, biases = dense_weights(resolved), decompose_graph(model, plan), {}, {}
    for part in resolved.in_graph_order:
        name, shape = part.plan.name, part.spec.shape
        copy = resolved.copy()
        sites = [site for site in copy.layers[name].sites if site.graph is copy.graph]
        uses = [dense_layer(name, copy.graph, part.rule, [site]) for site in sites]
        cores[name] = plain[name]
        if uses:
            done = {other: resolved.layers[other].plan.reconstruct(own, weights[other].shape) for other, own in cores.items()}
            del done[name]
            current = with_weights(add_biases(resolved, biases), done)
            samplers = [Sampler(use, data.samples, len(uses)) for use in uses]
            runs = [run_to(one, [use.input_name for use in uses], CPU) for one in (current, model)]
            statistics = Statistics(weights[name][0].size, len(weights[name]))
            for k, feed in enumerate(data.feeds):
                x, own = (np.concatenate([s.rows(v, k) for s, v in zip(samplers, run(feed), strict=True)]) for run in runs)
                statistics.add(x, own @ weights[name].reshape(len(weights[name]), -1).T)
            biased = takes_bias(part)
            moments = statistics.moments(centred=biased).shrunk(0.1)
            target = statistics.best(weights[name], moments, centred=biased, shrinkage=0.1)
            found = metric.decompose(part.plan, target, moments)
            lost = [statistics.lost(part.plan.reconstruct(one, shape), centred=biased) for one in (found, plain[name])]
            cores[name] = found if lost[0] <= lost[1] else plain[name]
            if biased:
                biases[name] = statistics.bias(part.plan.reconstruct(cores[name], shape))
    return add_biases(resolved, biases).model, cores


CASES = {
    "a residual network": residual,
    "a residual network with a tied weight": lambda rng: residual(rng, tied=True),
    "an LSTM before a product": recurrent,
    "bodies and sequences": behind_a_choice,
}


@pytest.mark.parametrize("memory", [2**30, 0])
@pytest.mark.parametrize("case", CASES)
def test_pieces_give_what_the_whole_network_gives(case, memory, rng, monkeypatch):
    """The same cores and biases, with the tensors between the pieces in memory or in files."""
    monkeypatch.setattr(progressive, "_MEMORY", memory)
    monkeypatch.setattr(progressive, "_SMALL", memory)
    model, plan, shape = CASES[case](rng)
    sizes = (20, 20, 7)  # the last batch is smaller
    data = Calibration(tuple({"x": rng.standard_normal((size, *shape)).astype(np.float32)} for size in sizes))
    mine = fit_layers(model, plan, data, CPU)
    expected, cores = fitted_whole(model, plan, data)
    shapes = {name: part.spec.shape for name, part in resolve(model, plan).layers.items()}
    for part in plan.layers:
        dense = [part.reconstruct(own[part.name], shapes[part.name]) for own in (mine.cores, cores)]
        assert np.linalg.norm(dense[0] - dense[1]) < SAME * np.linalg.norm(dense[1]), part.name
    stored = [{t.name: onnx.numpy_helper.to_array(t) for t in one.graph.initializer} for one in (mine.model, expected)]
    assert stored[0].keys() == stored[1].keys()
    for name, values in stored[1].items():
        np.testing.assert_allclose(stored[0][name], values, atol=SAME * max(1.0, float(np.abs(values).max())))


def test_what_no_later_layer_needs_is_not_kept(rng, tmp_path):
    model, plan, shape = residual(rng)
    feeds = [{"x": rng.standard_normal((4, *shape)).astype(np.float32)}]
    inputs = {"w0": ["x"], "w1": ["r0"], "w4": ["r1"], "w2": ["r4"], "w3": ["rows"]}
    resolved = resolve(model, plan)
    network = ProgressiveNetwork(resolved, inputs, feeds, CPU, tmp_path)
    kept = {}
    for name, read in inputs.items():
        (values,) = network.inputs_of(name)
        assert list(values) == read
        kept[name] = set(network.kept)
        network.replace(name, resolved.layers[name].weight)
    assert kept == {"w0": set(), "w1": {"r0"}, "w4": {"r0", "r1"}, "w2": {"r0", "r4"}, "w3": set()}
