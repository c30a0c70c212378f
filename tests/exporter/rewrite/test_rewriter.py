import io

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from cases import MATRIX_ONLY, cases, draw_plan, random_cores
from conftest import make_model
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from tensorrail_exporter import FORMATS, GraphError, LayerPlan, Plan, PlanError, decompose_graph, factorize, reconstruct

CONV = LayerPlan(name="conv", format="tt", modes=(4, 8, 9, 4, 4), ranks=(1, 3, 6, 5, 2, 1))
FC = LayerPlan(name="fc", format="tt", modes=(2, 5, 4, 8), ranks=(1, 2, 6, 5, 1))


def run(model, x):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("merge", ["sides", "none"])
@pytest.mark.parametrize("batch", [1, 7])
def test_factored_graph_equals_the_graph_with_reconstructed_weights(small_model, merge, batch, rng):
    plan = Plan(layers=tuple(layer.model_copy(update={"merge": merge}) for layer in (CONV, FC)))
    cores = decompose_graph(small_model, plan)
    x = rng.standard_normal((batch, 16, 8, 8)).astype(np.float32)
    expected = run(reconstruct(small_model, plan, cores), x)
    assert relative(run(factorize(small_model, plan, cores).model, x), expected) < 1e-5
    assert relative(run(small_model, x), expected) > 1e-2  # the ranks are low: this is not the dense network


@given(data=st.data())
@cases(60, 900)
def test_any_convolution_equals_its_reconstruction(data):
    nd = data.draw(st.integers(1, 3), "spatial axes")
    draw = lambda low, high: [data.draw(st.integers(low, high)) for _ in range(nd)]  # noqa: E731
    kernel, strides, dilations = draw(1, 3), draw(1, 2), draw(1, 2)
    name = data.draw(st.sampled_from(sorted(set(FORMATS) - MATRIX_ONLY)))
    groups = data.draw(st.sampled_from([1, 1, 2, 3]), "groups")
    shape, plan = draw_plan(data, "w", name, kernel, groups=groups)
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    weights = {"w": rng.standard_normal(shape).astype(np.float32)}
    if data.draw(st.booleans(), "bias"):
        weights["b"] = rng.standard_normal(shape[0]).astype(np.float32)
    padding = data.draw(st.sampled_from(["explicit", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    attributes = {"pads": draw(0, 2) + draw(0, 2)} if padding == "explicit" else {"auto_pad": padding}
    if padding.startswith("SAME"):
        dilations = [1] * nd  # ONNX Runtime refuses to pad for a dilated kernel by itself
    attributes |= {"group": groups} if groups > 1 else {}
    node = helper.make_node("Conv", ["x", *weights], ["y"], "n", strides=strides, dilations=dilations, **attributes)
    inputs = [groups * shape[1], *[9] * nd]
    model = make_model([node], weights, {"x": ["n", *inputs]}, {"y": ["n", shape[0], *[None] * nd]})
    check_against_reconstruction(data, model, plan, shape, lambda n: rng.standard_normal((n, *inputs)), rng, groups)


@given(data=st.data())
@cases(40, 500)
def test_any_transposed_convolution_equals_its_reconstruction(data):
    nd = data.draw(st.integers(1, 3), "spatial axes")
    draw = lambda low, high: [data.draw(st.integers(low, high)) for _ in range(nd)]  # noqa: E731
    kernel, strides, dilations = draw(1, 3), draw(1, 3), draw(1, 2)
    name = data.draw(st.sampled_from(sorted(set(FORMATS) - MATRIX_ONLY)))
    shape, plan = draw_plan(data, "w", name, kernel)
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    weights = {"w": rng.standard_normal((shape[1], shape[0], *kernel)).astype(np.float32)}
    if data.draw(st.booleans(), "bias"):
        weights["b"] = rng.standard_normal(shape[0]).astype(np.float32)
    added = [data.draw(st.integers(0, stride - 1), "output padding") for stride in strides]  # ONNX Runtime takes no more
    attributes = {"strides": strides, "dilations": dilations, "output_padding": added}
    attributes |= data.draw(st.sampled_from([{"pads": draw(0, 2) + draw(0, 2)}, {"auto_pad": "VALID"}, {}]), "padding")
    node = helper.make_node("ConvTranspose", ["x", *weights], ["y"], "n", **attributes)
    model = make_model([node], weights, {"x": ["n", shape[1], *[5] * nd]}, {"y": ["n", shape[0], *[None] * nd]})
    check_against_reconstruction(data, model, plan, shape, lambda n: rng.standard_normal((n, shape[1], *[5] * nd)), rng)


@given(data=st.data())
@cases(40, 500)
def test_any_gemm_equals_its_reconstruction(data):
    trans_a, trans_b = data.draw(st.booleans()), data.draw(st.booleans())
    alpha, beta = (data.draw(st.sampled_from([1.0, 0.5, -2.0])) for _ in range(2))
    shape, plan = draw_plan(data, "w", data.draw(st.sampled_from(sorted(FORMATS))), op="linear")
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    weights = {"w": rng.standard_normal(shape if trans_b else shape[::-1]).astype(np.float32)}
    if data.draw(st.booleans(), "bias"):
        weights["b"] = rng.standard_normal(shape[0]).astype(np.float32)
    attributes = {"transA": int(trans_a), "transB": int(trans_b), "alpha": alpha, "beta": beta}
    node = helper.make_node("Gemm", ["x", *weights], ["y"], "n", **attributes)
    model = make_model([node], weights, {"x": [shape[1], "n"] if trans_a else ["n", shape[1]]}, {"y": ["n", shape[0]]})
    draw = lambda n: rng.standard_normal((shape[1], n) if trans_a else (n, shape[1]))  # noqa: E731
    check_against_reconstruction(data, model, plan, shape, draw, rng)


@given(data=st.data())
@cases(40, 500)
def test_any_matmul_equals_its_reconstruction(data):
    shape, plan = draw_plan(data, "w", data.draw(st.sampled_from(sorted(FORMATS))), op="linear")
    left = data.draw(st.booleans(), "constant on the left")
    lead = data.draw(st.lists(st.integers(1, 3), max_size=2), "axes between batch and the matrix")
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    weight = rng.standard_normal(shape if left else shape[::-1]).astype(np.float32)
    if data.draw(st.booleans(), "as [1, …]"):
        weight = weight[None]
    tail = [shape[1], 5] if left else [5, shape[1]]
    out = [shape[0], 5] if left else [5, shape[0]]
    node = helper.make_node("MatMul", ["w", "x"] if left else ["x", "w"], ["y"], "n")
    model = make_model([node], {"w": weight}, {"x": ["n", *lead, *tail]}, {"y": ["n", *lead, *out]})
    check_against_reconstruction(data, model, plan, shape, lambda n: rng.standard_normal((n, *lead, *tail)), rng)


def check_against_reconstruction(data, model, plan, shape, draw, rng, groups=1):
    """Assert that the factored graph equals the graph with the reconstructed weight, at two batch sizes, padded or not."""
    one = Plan(layers=(plan,))
    cores = {plan.name: random_cores(plan, shape, rng, groups=groups)}
    block = data.draw(st.sampled_from([1, 1, 4]), "block")
    factored, dense = factorize(model, one, cores, block=block).model, reconstruct(model, one, cores)
    for batch in (1, data.draw(st.integers(2, 4), "batch")):
        x = draw(batch).astype(np.float32)
        a, b = run(factored, x), run(dense, x)
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, np.abs(b).max()))


def test_the_optimized_graph_holds_cores_and_no_dense_weight(small_model, tmp_path):
    plan = Plan(layers=(CONV.model_copy(update={"merge": "sides"}), FC.model_copy(update={"merge": "sides"})))
    factored = factorize(small_model, plan, decompose_graph(small_model, plan)).model
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # it warns that the optimized file is for this machine only
    ort.InferenceSession(factored.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx")
    largest = max(int(np.prod(tensor.dims)) for tensor in optimized.graph.initializer)
    assert largest < 32 * 16 * 9 / 4  # the dense convolution's weight is nowhere, whatever its layout
    convolutions = [node for node in optimized.graph.node if "Conv" in node.op_type]
    products = [node for node in optimized.graph.node if "Gemm" in node.op_type or "MatMul" in node.op_type]
    assert (len(convolutions), len(products)) == (3, 2)


def test_trained_cores_are_in_the_file_exactly(small_model):
    plan = Plan(layers=(LayerPlan(name="conv", format="tt", modes=(32, 9, 16), ranks=(1, 6, 5, 1)),))
    cores = decompose_graph(small_model, plan)
    factored = factorize(small_model, plan, cores)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in factored.model.graph.initializer}
    np.testing.assert_array_equal(stored["conv/0"].reshape(32, 6), cores["conv"][0][0])
    np.testing.assert_array_equal(stored["conv/1"].transpose(0, 2, 3, 1).reshape(6, 9, 5), cores["conv"][1])
    np.testing.assert_array_equal(stored["conv/2"].reshape(5, 16), cores["conv"][2][..., 0])
    assert factored.layers[0].merged == ((2,), (1,), (0,))
    assert "conv.weight" not in stored


def test_merged_neighbours_are_recorded(small_model):
    plan = Plan(layers=(CONV.model_copy(update={"merge": "sides"}),))
    record = factorize(small_model, plan, decompose_graph(small_model, plan)).layers[0]
    assert record.merged == ((3, 4), (2,), (0, 1))
    assert record.core_params == sum(np.prod(shape) for shape in [(4, 3), (3, 8, 6), (6, 9, 5), (5, 4, 2), (2, 4)])


def test_a_shared_weight_is_rewritten_for_every_node_that_uses_it(rng):
    weights = {"w": rng.standard_normal((8, 8, 3, 3)).astype(np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "first", pads=[1] * 4),
        helper.make_node("Conv", ["a", "w"], ["y"], "second", pads=[1] * 4),
    ]
    model = make_model(nodes, weights, {"x": ["n", 8, 6, 6]}, {"y": ["n", 8, 6, 6]})
    plan = Plan(layers=(LayerPlan(name="w", format="tt", modes=(8, 9, 8), ranks=(1, 3, 3, 1)),))
    cores = decompose_graph(model, plan)
    factored = factorize(model, plan, cores)
    assert factored.layers[0].nodes == 2
    assert len(factored.model.graph.initializer) == 3
    x = rng.standard_normal((2, 8, 6, 6)).astype(np.float32)
    assert relative(run(factored.model, x), run(reconstruct(model, plan, cores), x)) < 1e-5


def test_the_argument_opset_and_ir_version_are_kept(small_model):
    before = small_model.SerializeToString()
    plan = Plan(layers=(CONV,))
    factored = factorize(small_model, plan, decompose_graph(small_model, plan)).model
    assert small_model.SerializeToString() == before
    assert (factored.ir_version, factored.opset_import[0].version) == (9, 20)


def test_a_layer_that_is_not_there_is_named_with_those_that_are(small_model):
    plan = Plan(layers=(CONV.model_copy(update={"name": "nowhere"}),))
    with pytest.raises(GraphError, match="layer nowhere: not in the graph; its layers with weights are conv, fc"):
        decompose_graph(small_model, plan)


def test_a_layer_that_no_rule_takes_is_named_with_the_reason(rng):
    weights = {"w": rng.standard_normal((8, 4, 3, 3)).astype(np.float32)}
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], "n", group=2)
    model = make_model([node], weights, {"x": ["n", 8, 6, 6]}, {"y": ["n", 8, 8, 8]})
    plan = Plan(layers=(LayerPlan(name="n", format="tt", modes=(8, 9, 4), ranks=(1, 3, 3, 1)),))
    with pytest.raises(GraphError, match="layer n: cannot be rewritten: it is a transposed convolution with group=2"):
        decompose_graph(model, plan)


def test_a_weight_that_is_computed_is_refused():
    nodes = [helper.make_node("Relu", ["v"], ["w"], "r"), helper.make_node("Gemm", ["x", "w"], ["y"], "n")]
    model = make_model(nodes, {}, {"x": ["n", 4], "v": [4, 6]}, {"y": ["n", 6]})
    plan = Plan(layers=(LayerPlan(name="n", format="tt", modes=(6, 4), ranks=(1, 2, 1)),))
    with pytest.raises(GraphError, match="'w' is computed in the graph"):
        decompose_graph(model, plan)


def test_cores_of_other_shapes_or_values_are_refused(small_model):
    plan = Plan(layers=(CONV,))
    cores = decompose_graph(small_model, plan)
    with pytest.raises(PlanError, match="layer conv: the plan expects cores of shapes"):
        factorize(small_model, plan, {"conv": cores["conv"][:-1]})
    cores["conv"][0] = cores["conv"][0] * np.nan
    with pytest.raises(PlanError, match="layer conv: core 0 contains NaN"):
        factorize(small_model, plan, cores)


def test_a_model_survives_a_round_trip_through_the_checker(small_model):
    plan = Plan(layers=(CONV, FC))
    factored = factorize(small_model, plan, decompose_graph(small_model, plan)).model
    onnx.checker.check_model(onnx.load(io.BytesIO(factored.SerializeToString())), full_check=True)


def with_norm(node, parameters, outputs, opset=20, extra=()):
    conv = helper.make_node("Conv", ["x", "c.weight"], ["h"], "c")
    weights = {"c.weight": np.ones((4, 4, 1, 1), np.float32)} | {
        name: np.ones(shape, np.float32) for name, shape in parameters.items()
    }
    return make_model([conv, *extra, node], weights, {"x": [2, 4, 5, 5]}, outputs, opset=opset)


def test_a_batch_norm_is_folded_only_where_it_scales_channels_behind_the_layer():
    plan = Plan(layers=(LayerPlan(name="c", format="svd", modes=(4, 4), ranks=(2,)),))
    names = ("s", "b", "m", "v")
    norm = helper.make_node("BatchNormalization", ["h", *names], ["y"], "bn")
    each = helper.make_node("BatchNormalization", ["h", *names], ["y"], "bn", spatial=0)
    out = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)]
    then = helper.make_graph([norm], "then", [], out)
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "else", [], out)
    branch = helper.make_node("If", ["is"], ["z"], then_branch=then, else_branch=other)
    small = dict.fromkeys(names, (4,))
    for model, folded in (
        (with_norm(norm, small, {"y": [2, 4, 5, 5]}), True),
        (with_norm(each, dict.fromkeys(names, (4, 5, 5)), {"y": [2, 4, 5, 5]}, opset=8), False),
        (
            with_norm(
                branch,
                small,
                {"z": ["a", "b", "c", "d"]},
                extra=[helper.make_node("Constant", [], ["is"], value=onnx.numpy_helper.from_array(np.array(True)))],
            ),
            False,
        ),
    ):
        cores = decompose_graph(model, plan)
        made = factorize(model, plan, cores, fold_batch_norm=True)
        assert made.layers[0].batch_norm == folded
        x = np.random.default_rng(0).standard_normal((2, 4, 5, 5)).astype(np.float32)
        assert relative(run(reconstruct(model, plan, cores), x), run(made.model, x)) < 1e-5
