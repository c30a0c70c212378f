"""Weights that are rounded by the outputs of their layers: on the same integers, with less error on inputs not seen."""

import numpy as np
import onnx
import pytest
from cases import relative
from conftest import make_model
from onnx import helper, numpy_helper

from tensorrail_exporter import GraphError
from tensorrail_exporter.precision.int8 import Quantizer, to_int8
from tensorrail_exporter.precision.rounding import Grid, _inverse_factor, _one_by_one, rounded
from tensorrail_exporter.precision.weights import with_names
from tensorrail_runtime.sessions.session import Session, open_session, run


def images(rng, *batches):
    """Return smooth images whose channels vary together, as inside a trained network."""
    mix = np.random.default_rng(7).standard_normal((12, 3))
    found = []
    for count in batches:
        coarse = rng.standard_normal((count, 3, 4, 4)).repeat(2, 2).repeat(2, 3)
        values = np.einsum("cm,nmhw->nchw", mix, coarse) + 0.1 * rng.standard_normal((count, 12, 8, 8)) + 1.0
        found.append({"x": values.astype(np.float32)})
    return found


def normal(rng, *shape):
    return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


@pytest.fixture
def network(rng):
    """A convolution with a bias, one without, and a Gemm and a MatMul."""
    weights = {
        "a.weight": normal(rng, 16, 12, 3, 3),
        "a.bias": normal(rng, 16, 1)[:, 0],
        "b.weight": normal(rng, 24, 16, 1, 1),
        "g.weight": normal(rng, 20, 24),
        "g.bias": normal(rng, 20, 1)[:, 0],
        "m.weight": normal(rng, 20, 10),
    }
    nodes = [
        helper.make_node("Conv", ["x", "a.weight", "a.bias"], ["a"], "a", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["r"], "r"),
        helper.make_node("Conv", ["r", "b.weight"], ["b"], "b"),
        helper.make_node("GlobalAveragePool", ["b"], ["p"], "p"),
        helper.make_node("Flatten", ["p"], ["f"], "f"),
        helper.make_node("Gemm", ["f", "g.weight", "g.bias"], ["g"], "g", transB=1),
        helper.make_node("Tanh", ["g"], ["t"], "t"),
        helper.make_node("MatMul", ["t", "m.weight"], ["y"], "m"),
    ]
    return make_model(nodes, weights, {"x": ["n", 12, 8, 8]}, {"y": ["n", 10]})


def outputs(model, feed, tmp_path):
    path = tmp_path / "run.onnx"
    onnx.save(model, path)
    return run(open_session(path, settings=Session(level="none")), feed)  # in floats: the same on every processor


def stored(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize("per_channel", [True, False])
def test_outputs_differ_less_than_with_the_nearest_integers(per_channel, network, rng, tmp_path):
    feeds, (others,) = images(rng, 16, 16, 16, 16), images(rng, 64)
    dense = outputs(network, others, tmp_path)["y"]
    differences = []
    for rounding in ("nearest", "outputs"):
        small = to_int8(network, feeds, per_channel=per_channel, reduce_range=True, gauge=False, rounding=rounding)
        differences.append(relative(outputs(small, others, tmp_path)["y"], dense))
    assert differences[1] < 0.8 * differences[0]


@pytest.mark.parametrize(("per_channel", "steps"), [(True, 127), (True, 64), (False, 127)])
def test_weights_stand_on_the_integers_of_the_nearest_rounding(per_channel, steps, network, rng):
    feeds = images(rng, 16, 16, 16, 16)
    found = rounded(with_names(network), feeds, grid=Grid(per_channel, steps))
    assert {"a", "b"} <= set(found) <= {"a", "b", "g", "m"}
    options = {"per_channel": per_channel, "reduce_range": steps == 64, "gauge": False}
    nearest, by_outputs = (stored(to_int8(network, feeds, rounding=rounding, **options)) for rounding in ("nearest", "outputs"))
    for node, tensors in found.items():
        name, axis = f"{node}.weight", 1 if node == "m" else 0
        scale = by_outputs[f"{name}_scale"]
        np.testing.assert_array_equal(scale, nearest[f"{name}_scale"])
        shape = [-1 if k == axis else 1 for k in range(tensors[name].ndim)] if scale.ndim else []
        integers = by_outputs[f"{name}_quantized"]
        assert np.abs(integers.astype(int)).max() <= steps
        assert (integers != nearest[f"{name}_quantized"]).any()
        np.testing.assert_allclose(integers * scale.reshape(shape), tensors[name], atol=1e-6)


def test_the_bias_takes_up_the_mean_of_what_is_left(network, rng, tmp_path):
    feeds = images(rng, 64, 64, 64, 64)
    changed = rounded(with_names(network), feeds, grid=Grid(steps=7))["a"]
    assert set(changed) == {"a.weight", "a.bias"}
    copy = onnx.ModelProto()
    copy.CopyFrom(network)
    copy.graph.output[0].name = "a"
    for tensor in copy.graph.initializer:
        if tensor.name in changed:
            tensor.CopyFrom(numpy_helper.from_array(changed[tensor.name], tensor.name))
    first = onnx.ModelProto()
    first.CopyFrom(network)
    for model in (first, copy):
        del model.graph.node[1:], model.graph.output[:]
        model.graph.output.append(helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, ["n", 16, 8, 8]))
    before, after = (outputs(model, feeds[0], tmp_path)["a"] for model in (first, copy))
    wrong = after - before
    assert np.abs(wrong.mean((0, 2, 3))).max() < 0.1 * wrong.std()


def test_where_the_nearest_are_better_the_bias_alone_is_changed(rng):
    """Inputs that do not vary together: nothing is gained by other integers, but their mean is not 0."""
    weights = {"g": normal(rng, 8, 12), "b": normal(rng, 8, 1)[:, 0]}
    nodes = [helper.make_node("Gemm", ["x", "g", "b"], ["y"], "g", transB=1)]
    model = make_model(nodes, weights, {"x": ["n", 12]}, {"y": ["n", 8]})
    feeds = [{"x": (3 + rng.standard_normal((500, 12))).astype(np.float32)} for _ in range(8)]
    found = rounded(with_names(model), feeds, grid=Grid(steps=7)).get("g", {})
    weight = found.get("g", weights["g"] + Grid(steps=7).error(weights["g"], 0))
    mean = np.concatenate([feed["x"] for k, feed in enumerate(feeds) if k % 4 != 3]).mean(0)
    np.testing.assert_allclose(found["b"] + weight @ mean, weights["b"] + weights["g"] @ mean, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_inputs_that_do_not_vary(value, rng, tmp_path):
    """Their moments about the mean are rounding noise."""
    weights = {"g": normal(rng, 24, 16), "b": normal(rng, 16, 1)[:, 0]}
    nodes = [helper.make_node("Gemm", ["x", "g", "b"], ["y"], "g")]
    model = make_model(nodes, weights, {"x": ["n", 24]}, {"y": ["n", 16]})
    feeds = [{"x": np.full((16, 24), value, np.float32)} for _ in range(4)]
    small = to_int8(model, feeds, rounding="outputs")
    assert relative(outputs(small, feeds[0], tmp_path)["y"], outputs(model, feeds[0], tmp_path)["y"]) < 0.02


def test_a_column_with_a_large_mean(rng, tmp_path):
    weights = {"g": normal(rng, 24, 16), "b": normal(rng, 16, 1)[:, 0]}
    nodes = [helper.make_node("Gemm", ["x", "g", "b"], ["y"], "g")]
    model = make_model(nodes, weights, {"x": ["n", 24]}, {"y": ["n", 16]})
    shift = np.where(np.arange(24) == 5, 1000.0, 0.0)
    feeds = [{"x": (shift + rng.standard_normal((64, 24))).astype(np.float32)} for _ in range(4)]
    changed = rounded(with_names(model), feeds)["g"]
    before = feeds[0]["x"] @ weights["g"] + weights["b"]
    weight = changed.get("g", weights["g"] + Grid().error(weights["g"], 1))
    after = feeds[0]["x"] @ weight + changed["b"]
    assert np.abs((after - before).mean(0)).max() < 0.05


def test_products_with_factors_are_left_as_they_are(rng):
    weights = {"g": normal(rng, 12, 8), "b": normal(rng, 8, 1)[:, 0]}
    for more in ({"alpha": 0.125}, {"beta": 2.0}):
        nodes = [helper.make_node("Gemm", ["x", "g", "b"], ["y"], "g", **more)]
        model = make_model(nodes, weights, {"x": ["n", 12]}, {"y": ["n", 8]})
        assert rounded(with_names(model), [{"x": normal(rng, 64, 12)}] * 4) == {}


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("transposed", [0, 1])
def test_few_inputs_of_several_rows(count, transposed, rng, tmp_path):
    """One output channel, a channel of zeros, data of three axes, and the weight of a Gemm in both layouts."""
    weight = normal(rng, 6, 12)
    weight[2] = 0
    weights = {"m": normal(rng, 12, 12), "g": weight if transposed else weight.T.copy(), "one": normal(rng, 6, 1)}
    nodes = [
        helper.make_node("MatMul", ["x", "m"], ["h"], "m"),
        helper.make_node("ReduceMean", ["h"], ["p"], "pool", axes=[1], keepdims=0),
        helper.make_node("Gemm", ["p", "g"], ["q"], "g", transB=transposed),
        helper.make_node("MatMul", ["q", "one"], ["y"], "one"),
    ]
    model = make_model(nodes, weights, {"x": ["n", 5, 12]}, {"y": ["n", 1]}, opset=17)
    feeds = [{"x": rng.standard_normal((3, 5, 12)).astype(np.float32)} for _ in range(count)]
    small = to_int8(model, feeds, rounding="outputs", reduce_range=False)
    assert relative(outputs(small, feeds[0], tmp_path)["y"], outputs(model, feeds[0], tmp_path)["y"]) < 0.1


def test_layers_in_fp32_keep_their_weights(network, rng):
    feeds = images(rng, 16, 16, 16, 16)
    with Quantizer(network, feeds, gauge=False) as quantizer:
        all_int8, without_a = quantizer(), quantizer(["a"])
    assert "a.weight" not in stored(all_int8)
    np.testing.assert_array_equal(stored(without_a)["a.weight"], stored(network)["a.weight"])
    np.testing.assert_array_equal(stored(without_a)["a.bias"], stored(network)["a.bias"])
    np.testing.assert_array_equal(stored(without_a)["b.weight_quantized"], stored(all_int8)["b.weight_quantized"])
    assert "a" not in rounded(with_names(network), feeds, skip=frozenset({"a"}))


def test_what_does_not_help_on_other_inputs_stays_the_nearest(rng):
    """Each input of the layer is of one kind in the batches that count, and of another one in those held out."""
    weights = {"m.weight": normal(rng, 16, 8)}
    model = make_model([helper.make_node("MatMul", ["x", "m.weight"], ["y"], "m")], weights, {"x": ["n", 16]}, {"y": ["n", 8]})
    along, across = np.linalg.qr(rng.standard_normal((16, 16)))[0][:, :2].T
    feeds = [{"x": np.outer(rng.standard_normal(64), along).astype(np.float32)} for _ in range(4)]
    assert "m" in rounded(with_names(model), feeds)
    feeds[3] = {"x": np.outer(rng.standard_normal(64), across).astype(np.float32)}
    assert "m" not in rounded(with_names(model), feeds)


def test_shared_weights_and_groups_are_left_as_they_are(rng):
    weights = {"s": normal(rng, 12, 12, 1, 1), "d": normal(rng, 12, 1, 3, 3)}
    nodes = [
        helper.make_node("Conv", ["x", "s"], ["u"], "first"),
        helper.make_node("Conv", ["u", "s"], ["v"], "second"),
        helper.make_node("Conv", ["v", "d"], ["y"], "depthwise", group=12, pads=[1] * 4),
    ]
    model = make_model(nodes, weights, {"x": ["n", 12, 8, 8]}, {"y": ["n", 12, 8, 8]})
    assert rounded(with_names(model), images(rng, 8, 8, 8, 8)) == {}


def test_inputs_that_do_not_vary_together_are_rounded_to_the_nearest(rng):
    weight = rng.standard_normal((6, 20))
    scale = np.abs(weight).max(1, keepdims=True) / 127
    found = _one_by_one(weight, np.diag(rng.uniform(0.5, 2, 20)), scale, 127)
    np.testing.assert_allclose(found, np.round(weight / scale) * scale)


def test_the_factor_of_the_inverse(rng):
    rows = rng.standard_normal((40, 9))
    matrix = rows.T @ rows
    factor = _inverse_factor(matrix)
    assert not np.tril(factor, -1).any()
    np.testing.assert_allclose(factor.T @ factor, np.linalg.inv(matrix))


def test_an_unknown_rounding_is_refused(network, rng):
    with pytest.raises(GraphError, match="unknown rounding 'stochastic': expected one of outputs, nearest"):
        to_int8(network, images(rng, 4), rounding="stochastic")
