"""Decomposition without training: what the compressed network loses on inputs that the fit has not seen."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import make_model
from onnx import TensorProto, helper, numpy_helper

from tensorrail_exporter import FORMATS, GraphError, LayerPlan, Plan, decompose_graph, factorize, reconstruct
from tensorrail_exporter.calibrate import layerwise
from tensorrail_exporter.calibrate.inputs import Calibration
from tensorrail_exporter.calibrate.layerwise import dense_weights, fit, fit_layers
from tensorrail_exporter.rewrite.biases import add_biases, takes_bias
from tensorrail_exporter.rewrite.resolve import resolve
from tensorrail_runtime.sessions.session import Session

CPU = Session(threads=1)
SAME = 1e-5  # relative, between two graphs that compute the same


def weight(rng, *shape):
    return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def plan_of(**ranks):
    """Return a plan of svd and tt layers: a number is the rank of a matrix, a pair those of a convolution's train."""
    shapes = {"conv1": (16, 3, 3, 3), "conv2": (24, 16, 3, 3), "fc": (32, 24), "head": (32, 32), "lstm": (64, 24)}
    layers = []
    for name, rank in ranks.items():
        shape = shapes[name]
        tt = isinstance(rank, tuple)
        modes = (shape[0], 9, shape[1]) if tt else FORMATS["svd"].default_modes(shape)
        layers.append(LayerPlan(name=name, format="tt" if tt else "svd", modes=modes, ranks=(1, *rank, 1) if tt else (rank,)))
    return Plan(layers=tuple(layers))


PLAN = plan_of(conv2=(12, 8), fc=10, head=10, lstm=8)


def test_each_group_of_a_convolution_is_fitted_to_its_inputs(rng):
    """The inputs of a group vary in few directions, which are others in each group; there is a bias."""
    weights = {"grouped": weight(rng, 16, 8, 3, 3), "grouped.bias": weight(rng, 16)}
    node = helper.make_node("Conv", ["x", *weights], ["y"], "g", group=2, pads=[1] * 4)
    model = make_model([node], weights, {"x": ["n", 16, 6, 6]}, {"y": ["n", 16, 6, 6]})
    plan = Plan(layers=(LayerPlan(name="grouped", format="tt", modes=(8, 9, 8), ranks=(1, 6, 3, 1)),))
    mixing = weight(rng, 2, 8, 3)
    draw = lambda count: np.einsum("gck,ngkhw->ngchw", mixing, weight(rng, count, 2, 3, 6, 6)).reshape(-1, 16, 6, 6) + 0.5  # noqa: E731
    fitted = fit_layers(model, plan, Calibration(({"x": draw(64)}, {"x": draw(64)})), CPU)
    (row,) = fitted.layers
    assert (row.why, row.bias) == ("", True)
    assert row.fitted < 0.5 * row.plain
    assert [core.shape for core in fitted.cores["grouped"]] == list(plan.layers[0].core_shapes((16, 8, 3, 3), 2))
    x = {"x": draw(32)}
    plain = decompose_graph(model, plan)
    graphs = model, reconstruct(model, plan, plain), reconstruct(fitted.model, plan, fitted.cores)
    dense, alone, calibrated = (
        ort.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, x)[0] for one in graphs
    )
    assert np.linalg.norm(calibrated - dense) < 0.8 * np.linalg.norm(alone - dense)


def test_transposed_convolutions_are_decomposed_by_their_weights_and_embeddings_by_the_rows_that_are_read(rng):
    weights = {
        "table": weight(rng, 20, 16),
        "up": weight(rng, 16, 12, 2, 2),
        "up.bias": weight(rng, 12),
        "square": np.array([-1, 16, 1, 1], np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], "embed"),
        helper.make_node("Reshape", ["rows", "square"], ["image"], "reshape"),
        helper.make_node("ConvTranspose", ["image", "up", "up.bias"], ["y"], "up", strides=[2, 2]),
    ]
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 12, 2, 2])]
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    plan = Plan(
        layers=(
            LayerPlan(name="table", format="svd", modes=(16, 20), ranks=(4,)),
            LayerPlan(name="up", format="tt", modes=(12, 4, 16), ranks=(1, 6, 6, 1)),
        )
    )
    data = Calibration(({"ids": rng.integers(0, 20, 32)},))
    fitted = fit_layers(model, plan, data, CPU)
    assert {row.layer: (row.rows, row.why) for row in fitted.layers} == {
        "table": (32, ""),
        "up": (0, "a transposed convolution"),
    }
    resolved = resolve(model, plan)
    assert takes_bias(resolved.layers["up"])
    assert not takes_bias(resolved.layers["table"])
    shifted = add_biases(resolved, {"up": np.ones(12)}).model
    before, after = (
        ort.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, dict(data.feeds[0]))[0]
        for one in (model, shifted)
    )
    np.testing.assert_allclose(after, before + 1, rtol=1e-5, atol=1e-6)


@pytest.fixture
def network(rng):
    """Two convolutions, a Gemm, a MatMul and its Add on one side, and an LSTM over the rows on the other."""
    weights = {
        "conv1.weight": weight(rng, 16, 3, 3, 3),
        "conv1.bias": weight(rng, 16),
        "conv2.weight": weight(rng, 24, 16, 3, 3),
        "fc.weight": weight(rng, 32, 24),
        "fc.bias": weight(rng, 32),
        "head.weight": weight(rng, 32, 32),
        "head.bias": weight(rng, 32),
        "lstm.weight": 2 * weight(rng, 1, 64, 24),
        "lstm.recurrent": weight(rng, 1, 64, 16),
    }
    nodes = [
        helper.make_node("Conv", ["x", "conv1.weight", "conv1.bias"], ["a"], "c1", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["ra"], "r1"),
        helper.make_node("Conv", ["ra", "conv2.weight"], ["b"], "c2", pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Relu", ["b"], ["rb"], "r2"),
        helper.make_node("GlobalAveragePool", ["rb"], ["pool"], "p"),
        helper.make_node("Flatten", ["pool"], ["flat"], "f"),
        helper.make_node("Gemm", ["flat", "fc.weight", "fc.bias"], ["g"], "fcn", transB=1, alpha=0.5, beta=2.0),
        helper.make_node("Relu", ["g"], ["rg"], "r3"),
        helper.make_node("MatMul", ["rg", "head.weight"], ["h"], "m"),
        helper.make_node("Add", ["head.bias", "h"], ["y"], "add"),
        helper.make_node("ReduceMean", ["rb", "axis"], ["rows"], "rm", keepdims=0),
        helper.make_node("Transpose", ["rows"], ["sequence"], "t", perm=[2, 0, 1]),
        helper.make_node("LSTM", ["sequence", "lstm.weight", "lstm.recurrent"], ["", "z"], "rnn", hidden_size=16),
    ]
    weights["axis"] = np.array([3])
    return make_model(nodes, weights, {"x": ["n", 3, 12, 12]}, {"y": ["n", 32], "z": [1, "n", 16]})


def images(rng, count):
    """Return smooth images that are correlated and not centred."""
    base = np.random.default_rng(7).standard_normal((6, 3, 12, 12))  # the same distribution for every draw
    for axis in (2, 3):
        base = (base + np.roll(base, 1, axis) + np.roll(base, 2, axis)) / 2
    mixed = np.einsum("nk,kchw->nchw", rng.standard_normal((count, 6)), base)
    return (mixed + 0.2 * rng.standard_normal(mixed.shape) + 0.5).astype(np.float32)


def calibration(rng, count=400, batch=25):
    x = images(rng, count)
    return Calibration(tuple({"x": x[k : k + batch]} for k in range(0, count, batch)))


def run(model, x):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def loss(model, other, x):
    """Return the error of each output as a share of its variance."""
    pairs = zip(run(other, x), run(model, x), strict=True)
    return [float(np.square(mine - own).sum() / np.square(own - own.mean()).sum()) for mine, own in pairs]


def test_fitted_cores_and_biases_lose_less_on_inputs_not_seen(network, rng):
    fitted = fit_layers(network, PLAN, calibration(rng), CPU)
    unseen = images(np.random.default_rng(99), 300)
    plain = loss(network, reconstruct(network, PLAN, decompose_graph(network, PLAN)), unseen)
    mine = loss(network, reconstruct(fitted.model, PLAN, fitted.cores), unseen)
    assert mine[0] < 0.3 * plain[0]
    assert mine[1] < 0.5 * plain[1]
    assert [row.layer for row in fitted.layers] == ["conv2", "fc", "head", "lstm"]
    assert [row.bias for row in fitted.layers] == [True, True, True, False]
    for row in fitted.layers:
        assert row.why == ""
        assert row.rows > 0
        assert row.fitted < row.plain


def test_the_fitted_model_is_factored_as_any_other(network, rng):
    fitted = fit_layers(network, PLAN, calibration(rng, 100), CPU)
    x = images(rng, 8)
    factored = factorize(fitted.model, PLAN, fitted.cores).model
    assert max(loss(reconstruct(fitted.model, PLAN, fitted.cores), factored, x)) < SAME
    onnx.checker.check_model(fitted.model, full_check=True)


@pytest.mark.parametrize("form", ["tt", "tr", "tucker", "cp", "svd"])
def test_every_format_gains_on_a_convolution(form, network, rng):
    modes = FORMATS[form].default_modes((24, 16, 3, 3))
    rank = {"tr": 3, "cp": 16, "svd": 10}.get(form, 8)
    ranks = FORMATS[form].clamp((24, 16, 3, 3), modes, FORMATS[form].uniform((24, 16, 3, 3), modes, rank))
    plan = Plan(layers=(LayerPlan(name="conv2", format=form, modes=modes, ranks=ranks),))
    fitted = fit_layers(network, plan, calibration(rng, 200), CPU)
    unseen = images(np.random.default_rng(99), 200)
    plain = loss(network, reconstruct(network, plan, decompose_graph(network, plan)), unseen)
    assert max(loss(network, reconstruct(fitted.model, plan, fitted.cores), unseen)) < max(plain)
    assert fitted.layers[0].fitted < fitted.layers[0].plain


def test_full_ranks_keep_the_network(network, rng):
    plan = plan_of(conv2=(24, 16), fc=24, head=32, lstm=24)
    fitted = fit_layers(network, plan, calibration(rng, 100), CPU)
    x = images(rng, 20)
    assert max(loss(network, reconstruct(fitted.model, plan, fitted.cores), x)) < 1e-3  # inputs of a low rank: a ridge's bias


def test_moments_that_are_shrunk_completely_decompose_the_weight_alone(network, rng):
    """No layer then loses more of its weight than the plain decomposition does."""
    fitted = fit_layers(network, PLAN, calibration(rng, 100), CPU, shrinkage=1.0)
    alone = decompose_graph(network, PLAN)
    weights = dense_weights(resolve(network, PLAN))
    for layer in PLAN.layers:
        lost = [
            np.square(layer.reconstruct(cores[layer.name], weights[layer.name].shape) - weights[layer.name]).sum()
            for cores in (fitted.cores, alone)
        ]
        assert lost[0] <= 1.01 * lost[1]


def test_the_shrinkage_is_chosen_by_inputs_that_are_held_out(network, rng):
    """Few inputs need much shrinkage, many hardly any; either way the network is better than with the wrong one."""
    unseen = images(np.random.default_rng(99), 300)
    held_out = calibration(rng, 50)
    chosen = {}
    for count, wrong in ((4, 0.0), (400, 0.9)):
        data = calibration(rng, count)
        fitted = fit_layers(network, PLAN, data, CPU, held_out=held_out)
        other = fit_layers(network, PLAN, data, CPU, shrinkage=wrong)
        errors = [sum(loss(network, reconstruct(each.model, PLAN, each.cores), unseen)) for each in (fitted, other)]
        assert errors[0] < errors[1]
        chosen[count] = {row.layer: row.shrinkage for row in fitted.layers}
    assert chosen[4]["fc"] > chosen[400]["fc"]


def test_refitting_takes_the_inputs_that_were_held_out_as_well(network, rng):
    data, other = calibration(rng, 60), calibration(rng, 40)
    rows = [fit(resolve(network, PLAN), data, CPU, held_out=other, refit=refit).layers[0].rows for refit in (False, True)]
    assert rows[0] == pytest.approx(0.6 * rows[1], rel=0.01)


def test_the_arguments_are_not_changed(network, rng):
    before = network.SerializeToString()
    data = calibration(rng, 50)
    kept = [feed["x"].copy() for feed in data.feeds]
    fit_layers(network, PLAN, data, CPU)
    assert network.SerializeToString() == before
    for feed, values in zip(data.feeds, kept, strict=True):
        np.testing.assert_array_equal(feed["x"], values)


def test_the_fit_is_the_same_twice(network, rng):
    data = calibration(rng, 50)
    one, other = (fit_layers(network, PLAN, data, CPU) for _ in range(2))
    assert one.layers == other.layers
    for name, cores in one.cores.items():
        for mine, theirs in zip(cores, other.cores[name], strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_layers_are_fitted_in_the_graphs_order_whatever_the_plans(network, rng):
    seen = []
    backwards = Plan(layers=PLAN.layers[::-1])
    fitted = fit_layers(
        network, backwards, calibration(rng, 50), CPU, progress=lambda _, share, name="": seen.append((share, name))
    )
    assert seen == [(0.0, "conv2"), (0.25, "fc"), (0.5, "head"), (0.75, "lstm"), (1.0, "")]
    assert [row.layer for row in fitted.layers] == ["conv2", "fc", "head", "lstm"]


def test_a_layer_may_be_planned_under_its_nodes_name(network, rng):
    data = calibration(rng, 50)
    plan = plan_of(fc=10)
    alias = Plan(layers=(plan.layers[0].model_copy(update={"name": "fcn"}),))
    (one,), (other,) = fit_layers(network, plan, data, CPU).layers, fit_layers(network, alias, data, CPU).layers
    assert other == one.model_copy(update={"layer": "fcn"})
    assert one.rows > 0


def conv_only(rng, *, bias=False):
    names = ["x", "w", *(["bias"] if bias else [])]
    node = helper.make_node("Conv", names, ["y"], "c", pads=[1] * 4)
    weights = {"w": weight(rng, 16, 3, 3, 3)} | ({"bias": weight(rng, 16)} if bias else {})
    return make_model([node], weights, {"x": ["n", 3, 12, 12]}, {"y": ["n", 16, 12, 12]})


ONE = Plan(layers=(LayerPlan(name="w", format="tt", modes=(16, 9, 3), ranks=(1, 6, 3, 1)),))


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_without_a_bias_gets_one_and_means_are_kept(bias, rng):
    model = conv_only(rng, bias=bias)
    fitted = fit_layers(model, ONE, calibration(rng), CPU)
    assert len(fitted.model.graph.node[0].input) == 3
    unseen = images(np.random.default_rng(99), 500)
    own = run(model, unseen)[0]
    mine = run(reconstruct(fitted.model, ONE, fitted.cores), unseen)[0]
    np.testing.assert_allclose(mine.mean((0, 2, 3)), own.mean((0, 2, 3)), atol=0.05 * own.std())


def test_a_matrix_without_a_bias_stays_without(rng):
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "m")
    model = make_model([node], {"w": weight(rng, 12, 16)}, {"x": ["n", 3, 12, 12]}, {"y": ["n", 3, 12, 16]})
    plan = Plan(layers=(LayerPlan(name="w", format="svd", modes=(16, 12), ranks=(5,)),))
    fitted = fit_layers(model, plan, calibration(rng, 100), CPU)
    assert fitted.model.SerializeToString() == model.SerializeToString()
    assert (fitted.layers[0].bias, fitted.layers[0].fitted < fitted.layers[0].plain) == (False, True)


def test_a_transposed_gemm_is_fitted_on_its_own_rows(rng):
    """The features are the first axis: with rows and columns mixed up the fit would be to nonsense."""
    flat = images(rng, 200).reshape(200, -1)[:, :48]
    node = helper.make_node("Gemm", ["x", "w"], ["y"], "g", transA=1)
    model = make_model([node], {"w": weight(rng, 48, 40)}, {"x": [48, 200]}, {"y": [200, 40]})
    plan = Plan(layers=(LayerPlan(name="w", format="svd", modes=(40, 48), ranks=(4,)),))
    fitted = fit_layers(model, plan, Calibration(({"x": np.ascontiguousarray(flat.T)},)), CPU)
    plain = loss(model, reconstruct(model, plan, decompose_graph(model, plan)), flat.T)
    assert loss(model, reconstruct(fitted.model, plan, fitted.cores), flat.T)[0] < 0.5 * plain[0]


def test_a_layer_in_a_body_is_decomposed_from_its_weight_and_says_so(rng):
    body = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["inner"], "product")],
        "body",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, ["n", 3, 12, 16])],
    )
    node = helper.make_node("If", ["flag"], ["y"], "if", then_branch=body, else_branch=body)
    weights = {"w": weight(rng, 12, 16), "flag": np.array(True)}
    model = make_model([node], weights, {"x": ["n", 3, 12, 12]}, {"y": ["n", 3, 12, 16]})
    plan = Plan(layers=(LayerPlan(name="w", format="svd", modes=(16, 12), ranks=(5,)),))
    fitted = fit_layers(model, plan, calibration(rng, 50), CPU)
    (row,) = fitted.layers
    assert (row.rows, row.plain, row.fitted, row.bias, row.why) == (0, None, None, False, "in the body of a node")
    for mine, plain in zip(fitted.cores["w"], decompose_graph(model, plan)["w"], strict=True):
        np.testing.assert_array_equal(mine, plain)


def test_a_layer_that_is_too_wide_is_decomposed_from_its_weight_and_says_so(network, rng, monkeypatch):
    monkeypatch.setattr(layerwise, "fits", lambda spec: spec.op != "conv")
    fitted = fit_layers(network, PLAN, calibration(rng, 50), CPU)
    assert [row.why for row in fitted.layers] == ["its patches are too wide for a full second moment", "", "", ""]
    for mine, plain in zip(fitted.cores["conv2"], decompose_graph(network, PLAN)["conv2"], strict=True):
        np.testing.assert_array_equal(mine, plain)


def test_a_weight_shared_in_depth_is_fitted_to_all_its_uses(rng):
    """Block by block the same convolution: what helps its first use alone would harm the others."""
    weights = {"w": 1.3 * weight(rng, 16, 16, 3, 3), "stem": weight(rng, 16, 3, 3, 3)}
    nodes = [helper.make_node("Conv", ["x", "stem"], ["h0"], "stem_conv", pads=[1] * 4)]
    for k in range(3):
        nodes.append(helper.make_node("Relu", [f"h{k}"], [f"r{k}"], f"relu{k}"))
        nodes.append(helper.make_node("Conv", [f"r{k}", "w"], [f"h{k + 1}"], f"block{k}", pads=[1] * 4))
    model = make_model(nodes, weights, {"x": ["n", 3, 12, 12]}, {"h3": ["n", 16, 12, 12]})
    plan = Plan(layers=(LayerPlan(name="w", format="tt", modes=(16, 9, 16), ranks=(1, 8, 8, 1)),))
    fitted = fit_layers(model, plan, calibration(rng), CPU)
    (row,) = fitted.layers
    assert (row.bias, row.fitted < row.plain) == (False, True)
    unseen = images(np.random.default_rng(99), 200)
    plain = loss(model, reconstruct(model, plan, decompose_graph(model, plan)), unseen)
    assert loss(model, reconstruct(fitted.model, plan, fitted.cores), unseen)[0] < 0.7 * plain[0]
    assert factorize(fitted.model, plan, fitted.cores).layers[0].nodes == 3


def test_later_layers_make_up_for_earlier_ones(network, rng):
    """The second convolution, at full rank, is fitted to the outputs that the dense network had."""
    plan = plan_of(conv1=(4, 3), conv2=(24, 16))
    data, unseen = calibration(rng), images(np.random.default_rng(99), 200)
    fitted = fit_layers(network, plan, data, CPU)
    first = Plan(layers=plan.layers[:1])
    alone = {"conv1": fitted.cores["conv1"]}
    only_first = loss(network, reconstruct(fit_layers(network, first, data, CPU).model, first, alone), unseen)
    assert max(loss(network, reconstruct(fitted.model, plan, fitted.cores), unseen)) < max(only_first)


def test_half_precision_stays(network, rng):
    model = onnx.ModelProto()
    model.CopyFrom(conv_only(rng))
    stored = numpy_helper.to_array(model.graph.initializer[0]).astype(np.float16)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(stored, "w"))
    for node in model.graph.node:
        node.input[0], node.output[0] = "xh", "yh"
    model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["xh"], "in", to=TensorProto.FLOAT16))
    model.graph.node.append(helper.make_node("Cast", ["yh"], ["y"], "out", to=TensorProto.FLOAT))
    fitted = fit_layers(model, ONE, calibration(rng, 50), CPU)
    kinds = {tensor.name: tensor.data_type for tensor in fitted.model.graph.initializer}
    assert set(kinds.values()) == {TensorProto.FLOAT16}
    assert len(kinds) == 2
    assert np.isfinite(run(reconstruct(fitted.model, ONE, fitted.cores), images(rng, 2))[0]).all()


def gemm(rng, third, **attributes):
    weights = {"w": weight(rng, 8, 12)} | ({"c": third} if isinstance(third, np.ndarray) else {})
    names = ["x", "w", *([] if third is None else ["c" if isinstance(third, np.ndarray) else ""])]
    node = helper.make_node("Gemm", names, ["y"], "g", transB=1, **attributes)
    return make_model([node], weights, {"x": ["n", 12]}, {"y": ["n", 8]})


@pytest.mark.parametrize(
    ("third", "attributes", "able"),
    [
        (None, {}, True),
        ("", {"alpha": 2.0}, True),
        (np.ones(8, np.float32), {"alpha": 0.5, "beta": 4.0}, True),
        (np.ones((1, 8), np.float32), {}, True),
        (np.ones(8, np.float32), {"beta": 0.0}, False),
        (None, {"beta": 0.0}, False),
        (np.ones(1, np.float32), {}, False),
    ],
)
def test_a_bias_is_added_to_what_a_gemm_gives(third, attributes, able, rng):
    model = gemm(rng, third, **attributes)
    layer = LayerPlan(name="w", format="svd", modes=(8, 12), ranks=(4,))
    resolved = resolve(model, Plan(layers=(layer,)))
    assert takes_bias(resolved.layers["w"]) is able
    if not able:
        with pytest.raises(
            GraphError,
            match="layer w: has no bias that can be changed; expected one Conv, ConvTranspose, Gemm or Attention node, or",
        ):
            add_biases(resolved, {"w": np.ones(8)})
        return
    bias = rng.standard_normal(8)
    changed = add_biases(resolved, {"w": bias}).model
    x = weight(rng, 5, 12)
    alpha = attributes.get("alpha", 1.0)  # what is added is in the units of the product x W
    np.testing.assert_allclose(run(changed, x)[0], run(model, x)[0] + alpha * bias, atol=1e-5)


@pytest.mark.parametrize("outputs", [["y"], ["h", "y"]])
def test_a_product_that_is_an_output_does_not_use_the_bias_behind_it(outputs, rng):
    """The Add changes one of the two outputs only."""
    weights = {"w": weight(rng, 12, 8), "b": weight(rng, 8)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "w"), helper.make_node("Add", ["h", "b"], ["y"], "add")]
    model = make_model(nodes, weights, {"x": ["n", 12]}, {name: ["n", 8] for name in outputs})
    plan = Plan(layers=(LayerPlan(name="w", format="svd", modes=(8, 12), ranks=(2,)),))
    assert takes_bias(resolve(model, plan).layers["w"]) is (outputs == ["y"])
    x = weight(rng, 64, 12) + 5  # a large mean, which the bias would take up
    fitted = fit_layers(model, plan, Calibration(({"x": x},)), CPU)
    bias = next(numpy_helper.to_array(t) for t in fitted.model.graph.initializer if list(t.dims) == [8])
    assert np.allclose(bias, weights["b"]) is (outputs != ["y"])


def test_data_that_are_not_finite_and_no_data_are_refused(network, rng):
    data = calibration(rng, 50)
    data.feeds[1]["x"][3] = np.nan
    with pytest.raises(
        GraphError, match="layer conv2: its inputs or outputs on the calibration data hold NaN or infinite values"
    ):
        fit_layers(network, PLAN, data, CPU)
    with pytest.raises(GraphError, match="expected one or more batches of calibration inputs, got none"):
        fit_layers(network, PLAN, Calibration(()), CPU)


def test_a_layer_that_is_not_there_is_named(network, rng):
    plan = Plan(layers=(PLAN.layers[0].model_copy(update={"name": "nowhere"}),))
    with pytest.raises(GraphError, match="layer nowhere: not in the graph; its layers with weights are conv1, conv2"):
        fit_layers(network, plan, calibration(rng, 25), CPU)


def test_the_record_counts_what_is_lost(rng):
    """`plain` and `fitted` are shares of the variance of the layer's own output, each channel about its mean."""
    model, data = conv_only(rng, bias=True), calibration(rng, 50)
    fitted = fit_layers(model, ONE, data, CPU)
    (row,) = fitted.layers
    assert row.rows == 50 * 144  # every place of every image
    x = np.concatenate([feed["x"] for feed in data.feeds])
    own = run(model, x)[0]
    spread = np.square(own - own.mean((0, 2, 3), keepdims=True)).sum()
    plain = run(reconstruct(model, ONE, decompose_graph(model, ONE)), x)[0]
    mine = run(reconstruct(fitted.model, ONE, fitted.cores), x)[0]
    assert row.plain == pytest.approx(np.square(plain - own).sum() / spread, rel=1e-3)
    assert row.fitted == pytest.approx(np.square(mine - own).sum() / spread, rel=1e-2)


def test_known_shrinkages_are_taken_and_not_chosen_again(network, rng):
    resolved, data, held_out = resolve(network, PLAN), calibration(rng, 40), calibration(rng, 20)
    chosen = fit(resolved, data, CPU, held_out=held_out)
    again = fit(resolved, data, CPU, held_out=held_out, shrinkage={row.layer: row.shrinkage for row in chosen.layers})
    assert again.layers == chosen.layers
    name = chosen.layers[0].layer
    other = fit(resolved, data, CPU, held_out=held_out, shrinkage={name: 0.9})
    assert [row.shrinkage for row in other.layers if row.layer == name] == [0.9]


def test_a_layer_that_nothing_uses_is_no_trouble(rng):
    weights = {name: rng.standard_normal((8, 8)).astype(np.float32) for name in ("used", "dead")}
    weights["bias"] = np.zeros(8, np.float32)
    nodes = [
        helper.make_node("Gemm", ["x", "used", "bias"], ["y"], "used"),
        helper.make_node("MatMul", ["x", "dead"], ["z"], "dead"),
    ]
    model = make_model(nodes, weights, {"x": ["n", 8]}, {"y": ["n", 8]})
    plan = Plan(layers=tuple(LayerPlan(name=name, format="svd", modes=(8, 8), ranks=(4,)) for name in ("used", "dead")))
    fitted = fit_layers(model, plan, Calibration(({"x": rng.standard_normal((64, 8)).astype(np.float32)},)))
    assert {use.plan.name for use in fitted.resolved.copy().layers.values()} == {"used", "dead"}
    assert {row.layer for row in fitted.layers} == {"used", "dead"}
