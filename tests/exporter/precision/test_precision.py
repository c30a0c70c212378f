"""fp16 and int8 copies: the weights are right channel by channel, what must stay fp32 does, and failures name the layer."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
from attention_graphs import attention_model, feed_of
from cases import relative
from conftest import make_model
from onnx import TensorProto, helper, numpy_helper

from tensorrail_exporter import GraphError, LayerPlan, Plan, decompose_graph, factorize
from tensorrail_exporter.precision.int8 import with_assumed_ranges
from tensorrail_exporter.precision.ranges import RangeError, layer_ranges, require_finite
from tensorrail_exporter.precision.reduce import (
    METHODS,
    TOLERANCES,
    PrecisionReport,
    Quantization,
    reduced,
    to_fp16,
    to_int8,
)
from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.measure.accuracy import Labelled
from tensorrail_runtime.measure.parity import parity
from tensorrail_runtime.measure.placement import placement
from tensorrail_runtime.measure.timing import Conditions, Timing
from tensorrail_runtime.sessions.kernels import contents_of
from tensorrail_runtime.sessions.machine import Processor, processor
from tensorrail_runtime.sessions.session import Session, open_session, run

FP16 = 5e-3  # relative L2: eleven bits a value, a few layers
INT8 = 5e-2  # relative L2: eight bits a value, a few layers
KERNELS = 3e-3  # relative L2: integer kernels against the same graph in floats, which may round single values the other way
HALF = 0.5 + 1e-3  # steps: rounding to the nearest one
LARGEST = {8: 127, 7: 64}  # of the integers of a symmetric weight: what ONNX Runtime's quantizer takes for each width
TT = Plan(layers=(LayerPlan(name="conv", format="tt", modes=(32, 9, 16), ranks=(1, 16, 16, 1)),))


def outputs(model, feeds, tmp_path, level="all"):
    path = tmp_path / "run.onnx"
    onnx.save(model, path)
    session = open_session(path, settings=Session(level=level))
    return [run(session, feed) for feed in feeds]


def difference(model, other, feeds, tmp_path, level="all"):
    first, second = outputs(model, feeds, tmp_path), outputs(other, feeds, tmp_path, level)
    return max(relative(b[name], a[name]) for a, b in zip(first, second, strict=True) for name in a)


def ops(model):
    return [node.op_type for node in model.graph.node]


def initializers(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def feeds_of(rng, shape=(16, 8, 8), batches=(4, 4, 3), name="x", scale=1.0):
    return [{name: (scale * rng.standard_normal((batch, *shape))).astype(np.float32)} for batch in batches]


def dequantized(model, name, axis):
    """Return the float values of an int8 copy, and its scales along `axis`."""
    stored = initializers(model)
    scale, zero = stored[f"{name}_scale"], stored[f"{name}_zero_point"]
    values = stored[f"{name}_quantized"]
    assert not zero.any()
    shape = [-1 if k == axis else 1 for k in range(values.ndim)]
    return values.astype(np.float32) * scale.reshape(shape if scale.ndim else []), scale


def assert_per_channel(model, name, axis, weight, bits=8):
    copy, scale = dequantized(model, name, axis)
    assert scale.shape == (weight.shape[axis],)
    others = tuple(k for k in range(weight.ndim) if k != axis)
    np.testing.assert_allclose(scale, np.abs(weight).max(others) / LARGEST[bits], rtol=1e-2)
    steps = np.abs(copy - weight) / scale.reshape([-1 if k == axis else 1 for k in range(weight.ndim)])
    assert steps.max() <= HALF


@pytest.fixture
def factored(small_model):
    return factorize(small_model, TT, decompose_graph(small_model, TT)).model


def int8_in_both_widths(model, feeds, tmp_path):
    """Return int8 copies with weights of 8 and of 7 bits, both checked.

    Both are right where their QDQ form runs in floats (level none): that is what the copy stands for, and is the same on every
    processor. Integer kernels (level all) must give the same for 7 bits everywhere, for 8 bits where no product saturates.
    """
    copies = {bits: to_int8(model, feeds, reduce_range=bits == 7, gauge=False, rounding="nearest") for bits in (8, 7)}
    for bits, copy in copies.items():
        assert difference(model, copy, feeds, tmp_path, "none") < INT8 * 2 ** (8 - bits)
        if bits == 7 or not processor().saturates:
            in_floats, in_integers = outputs(copy, feeds, tmp_path, "none"), outputs(copy, feeds, tmp_path)
            for expected, got in zip(in_floats, in_integers, strict=True):
                assert max(relative(got[name], expected[name]) for name in expected) < KERNELS
    return copies[8], copies[7]


@pytest.mark.parametrize("which", ["small_model", "factored"])
def test_fp16_halves_the_weights_and_keeps_inputs_outputs_and_the_dynamic_batch(which, request, rng, tmp_path):
    model = request.getfixturevalue(which)
    half = to_fp16(model)
    assert {str(values.dtype) for values in initializers(half).values()} == {"float16"}
    assert half.graph.input == model.graph.input
    assert [value.name for value in half.graph.output] == ["y"]
    assert half.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert 0 < difference(model, half, feeds_of(rng, batches=(1, 5)), tmp_path) < FP16


def test_fp16_keeps_a_layer_in_fp32_and_leaves_no_cast_between_its_nodes(factored, rng, tmp_path):
    half = to_fp16(factored, keep=["conv"])
    stored = initializers(half)
    assert all(stored[name].dtype == np.float32 for name in ("conv/0", "conv/1", "conv/2", "conv.bias"))
    assert stored["fc.weight"].dtype == np.float16
    nodes = {node.name: node for node in half.graph.node}
    assert nodes["conv/conv1"].input[0] == nodes["conv/conv0"].output[0]
    assert nodes["conv/conv0"].input[0] == "x"  # no cast to fp16 and back at the graph's input either
    assert difference(factored, half, feeds_of(rng), tmp_path) < FP16
    last = to_fp16(factored, keep=["fc"])
    assert next(node for node in last.graph.node if node.op_type == "Gemm").output[0] == "y"
    assert difference(factored, last, feeds_of(rng), tmp_path) < FP16
    everything = to_fp16(factored, keep=[node.name for node in factored.graph.node])
    assert difference(factored, everything, feeds_of(rng), tmp_path) == 0
    assert "Cast" not in ops(everything)


@pytest.mark.parametrize("reduce", [lambda m, f: to_fp16(m, keep=["nowhere"]), lambda m, f: to_int8(m, f, keep=["nowhere"])])
def test_keep_of_a_layer_that_is_not_there_names_those_that_are(reduce, factored, rng):
    with pytest.raises(GraphError, match=r"layer nowhere: .* not in the graph; its layers with weights are conv, fc"):
        reduce(factored, feeds_of(rng))


def scaled(rng, factor):
    """Two products; the values between them are `factor` times too large, those behind them are not."""
    weights = {
        "a.weight": (factor * rng.standard_normal((8, 8))).astype(np.float32),
        "b.weight": (rng.standard_normal((8, 8)) / factor).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "a.weight"], ["h"], "first"),
        helper.make_node("MatMul", ["h", "b.weight"], ["y"], "second"),
    ]
    return make_model(nodes, weights, {"x": ["n", 8]}, {"y": ["n", 8]})


def test_overflow_in_fp16_names_the_layer_the_ranges_and_the_keep_that_helps(rng, tmp_path):
    model, feeds = scaled(rng, 2e4), feeds_of(rng, (8,), scale=4.0)
    half = to_fp16(model)
    with pytest.raises(RangeError, match=r"layer a: overflows in fp16, .*in fp32: a, b") as caught:
        require_finite(model, half, feeds)
    assert caught.value.keep == ("a", "b")
    first, second = caught.value.ranges
    assert (first.layer, first.overflows) == ("a", True)
    assert first.output_max > 65504
    assert (second.layer, second.overflows) == ("b", False)
    assert second.core_subnormal > 0.1  # values of about 5e-5, below 2⁻¹⁴
    with pytest.raises(RangeError, match="in fp32: a, b"):  # the producer alone is followed by a cast to fp16
        require_finite(model, to_fp16(model, keep=["a"]), feeds)
    cpu = outputs(half, feeds, tmp_path)  # the CPU provider leaves out the cast to fp16 between: it shows nothing
    assert all(np.isfinite(one["y"]).all() for one in cpu)
    helped = to_fp16(model, keep=["a", "b"])
    require_finite(model, helped, feeds)
    assert difference(model, helped, feeds, tmp_path) < FP16


def test_a_weight_that_fp16_does_not_hold_is_an_error_and_a_mask_is_not(rng):
    model = scaled(rng, 1e6)
    with pytest.raises(
        GraphError, match=r"layer a: its weight a\.weight contains .* fp16 range of ±65504; keep layer a in fp32"
    ):
        to_fp16(model)
    to_fp16(model, keep=["a"])
    nodes = [helper.make_node("Add", ["x", "mask"], ["s"], "add"), helper.make_node("Softmax", ["s"], ["y"], "softmax")]
    masked = make_model(nodes, {"mask": np.array([0, 0, 0, -1e9], np.float32)}, {"x": ["n", 4]}, {"y": ["n", 4]})
    feeds = [{"x": np.full((2, 4), -100, np.float32)}]
    require_finite(masked, to_fp16(masked), feeds)


def test_infinities_of_the_fp32_graph_do_not_overflow(rng, tmp_path):
    """Where(m, x, −∞) → Add → Softmax: the usual mask of an attention."""
    weights = {"none": np.float32(-np.inf), "limit": np.float32(-0.5), "bias": rng.standard_normal(6).astype(np.float32)}
    nodes = [
        helper.make_node("Less", ["x", "limit"], ["m"], "less"),
        helper.make_node("Where", ["m", "none", "x"], ["w"], "where"),
        helper.make_node("Add", ["w", "bias"], ["s"], "add"),
        helper.make_node("Mul", ["s", "s"], ["also"], "square"),
        helper.make_node("Softmax", ["s"], ["p"], "softmax"),
        helper.make_node("Relu", ["also"], ["unused"], "relu"),
        helper.make_node("Add", ["p", "bias"], ["y"], "last"),
    ]
    model = make_model(nodes, weights, {"x": ["n", 6]}, {"y": ["n", 6]})
    feeds = [{"x": np.array([[-1, 0.2, 0.3, -2, 1, 0]], np.float32)}]
    half = to_fp16(model)
    require_finite(model, half, feeds)
    assert difference(model, half, feeds, tmp_path) < FP16
    with pytest.raises(RangeError):  # what is finite in fp32 overflows still
        require_finite(model, half, [{"x": np.array([[7e4, 0, 0, 0, 0, 0]], np.float32)}])


def test_scores_that_overflow_before_a_softmax_are_an_overflow_unless_they_are_minus_infinity():
    weights = {"w": np.array([[7e4, 0.0], [0.0, 1.0]], np.float32) / 2, "by": np.float32(2.0)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "product"),
        helper.make_node("Mul", ["h", "by"], ["s"], "twice"),
        helper.make_node("Softmax", ["s"], ["y"], "softmax"),
    ]
    model = make_model(nodes, weights, {"x": ["n", 2]}, {"y": ["n", 2]})
    half = to_fp16(model)
    require_finite(model, half, [{"x": np.array([[-1.0, 1.0]], np.float32)}])  # −∞ in fp16: a probability of 0
    with pytest.raises(RangeError, match="overflows in fp16"):
        require_finite(model, half, [{"x": np.array([[1.0, 1.0]], np.float32)}])


def test_a_model_without_layers_that_is_out_of_tolerance_is_reported(tmp_path):
    nodes = [helper.make_node("Mul", ["x", "by"], ["h"]), helper.make_node("Sub", ["h", "less"], ["y"])]
    weights = {"by": np.float32(1.001), "less": np.float32(1000.0)}
    onnx.save(make_model(nodes, weights, {"x": ["n", 4]}, {"y": ["n", 4]}), tmp_path / "m.onnx")
    x = (1000 / 1.001 + np.random.default_rng(0).random((8, 4))).astype(np.float32)
    report = reduced(tmp_path / "m.onnx", tmp_path / "h.onnx", Quantization("fp16"), calibration=[{"x": x}])
    assert not report.holds
    assert report.ranges == ()


def test_fp16_behind_a_turned_sequence_runs(rng, tmp_path):
    """Transpose(1, 0, 2) → MatMul in fp16 ends the process where ONNX Runtime fuses it, so it is not let."""
    weights = {"w": rng.standard_normal((8, 6)).astype(np.float32)}
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], "turn", perm=[1, 0, 2]),
        helper.make_node("MatMul", ["t", "w"], ["y"], "product"),
    ]
    model = make_model(nodes, weights, {"x": ["n", "t", 8]}, {"y": ["t", "n", 6]})
    feeds = [{"x": rng.standard_normal((2, 5, 8)).astype(np.float32)}]
    onnx.save(to_fp16(model), tmp_path / "half.onnx")
    assert contents_of(tmp_path / "half.onnx").fp16
    script = "import sys; from tensorrail_runtime import open_session; open_session(sys.argv[1])"  # it would take pytest along
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "half.onnx")], check=False)
    assert done.returncode == 0
    assert difference(model, to_fp16(model), feeds, tmp_path) < FP16
    onnx.save(model, tmp_path / "single.onnx")
    assert not contents_of(tmp_path / "single.onnx").fp16


@pytest.mark.parametrize("keep", [(), ("qkv",)])
def test_an_attention_that_stays_fp32_is_named(keep, rng, tmp_path):
    """int8 has no kernel for it here, and `keep` accepts its name."""
    onnx.save(attention_model(rng, tail=True), tmp_path / "m.onnx")
    report = reduced(
        tmp_path / "m.onnx",
        tmp_path / "small.onnx",
        Quantization("int8", keep=keep),
        calibration=[feed_of(rng) for _ in range(4)],
        conditions=Conditions(Timing(seconds=0.1)),
    )
    assert [(layer.layer, layer.op, layer.kept) for layer in report.fp32] == [("qkv", "Attention", bool(keep))]
    half = initializers(to_fp16(onnx.load(tmp_path / "m.onnx"), keep=keep))
    assert half["qkv.weight"].dtype == (np.float32 if keep else np.float16)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (1,), ()])
def test_int8_of_a_gemm_whose_bias_is_scaled_or_broadcast(beta, shape, rng, tmp_path):
    weights = {"w": rng.standard_normal((8, 6)).astype(np.float32), "b": rng.standard_normal(shape).astype(np.float32)}
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "fc", beta=beta)]
    model = make_model(nodes, weights, {"x": ["n", 8]}, {"y": ["n", 6]})
    feeds = feeds_of(rng, (8,), (32,))
    small = to_int8(model, feeds)
    assert "DequantizeLinear" in ops(small)
    assert difference(model, small, feeds, tmp_path) < INT8


def test_int8_of_a_gemm_whose_bias_is_a_matrix_stays_fp32_there(rng, tmp_path):
    weights = {name: rng.standard_normal((8, 8)).astype(np.float32) for name in ("a", "w", "b")}
    nodes = [helper.make_node("MatMul", ["x", "a"], ["h"], "first"), helper.make_node("Gemm", ["h", "w", "b"], ["y"], "fc")]
    model = make_model(nodes, weights, {"x": [8, 8]}, {"y": [8, 8]})
    feeds = feeds_of(rng, (8,), (8,))
    assert difference(model, to_int8(model, feeds), feeds, tmp_path) < INT8


def test_int8_of_a_weight_that_is_used_both_ways(rng, tmp_path):
    """A tied autoencoder: the channels lie along one axis going in, and along the other coming out."""
    weight = rng.standard_normal((16, 12)).astype(np.float32) * np.geomspace(0.3, 3, 12, dtype=np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "encode"),
        helper.make_node("Gemm", ["h", "w"], ["y"], "decode", transB=1),
    ]
    model = make_model(nodes, {"w": weight}, {"x": ["n", 16]}, {"y": ["n", 16]})
    feeds = feeds_of(rng, (16,), (64,))
    for level in ("none", "all"):
        assert difference(model, to_int8(model, feeds), feeds, tmp_path, level) < INT8


@pytest.mark.parametrize("op", ["Relu", "Clip"])
def test_int8_of_a_feature_that_is_an_output_before_its_activation(op, rng, tmp_path):
    weights = {
        "w": rng.standard_normal((8, 4, 3, 3)).astype(np.float32),
        "v": rng.standard_normal((8, 8, 3, 3)).astype(np.float32),
    }
    if op == "Clip":
        weights |= {"low": np.float32(0), "high": np.float32(6)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["feature"], "a"),
        helper.make_node(op, ["feature", *(["low", "high"] if op == "Clip" else [])], ["r"], "act"),
        helper.make_node("Conv", ["r", "v"], ["y"], "b"),
    ]
    model = make_model(nodes, weights, {"x": ["n", 4, 9, 9]}, {"feature": ["n", 8, 7, 7], "y": ["n", 8, 5, 5]})
    feeds = feeds_of(rng, (4, 9, 9), (16,))
    assert difference(model, to_int8(model, feeds), feeds, tmp_path) < INT8


def test_ranges_show_channels_subnormals_and_the_worst_first(rng):
    model = scaled(rng, 1.0)
    weights = initializers(model)
    weight = weights["a.weight"].copy()
    weight[:, 3] *= 1e-3
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "a.weight"))
    feeds = feeds_of(rng, (8,))
    feeds[0]["x"][0] *= 100  # an outlier: 256 steps over a range that nearly nothing fills
    by_name = {one.layer: one for one in layer_ranges(model, feeds)}
    largest = np.abs(weight).max(0)
    assert by_name["a"].channel_ratio == pytest.approx(largest.max() / largest.min(), rel=1e-6)
    assert (by_name["a"].core_min, by_name["a"].core_max) == (weight.min(), weight.max())
    products = np.concatenate([feed["x"] @ weight for feed in feeds])
    assert by_name["a"].output_max == pytest.approx(products.max(), rel=1e-5)
    step = (products.max() - products.min()) / 255
    assert by_name["a"].output_int8_error == pytest.approx(step / 12**0.5 / np.sqrt((products**2).mean()), rel=1e-3)
    ordered = layer_ranges(model, feeds, to="int8")
    assert [one.suspicion[1] for one in ordered] == sorted((one.suspicion[1] for one in ordered), reverse=True)
    with pytest.raises(GraphError, match="no inputs were given"):
        layer_ranges(model, [])


@pytest.mark.parametrize("form_name", ["tt", "tucker", "cp", "svd", "tr"])
def test_int8_cores_of_convolutions_are_right_channel_by_channel(form_name, small_model, rng, tmp_path):
    """onnxruntime#18668: a weight behind a Reshape gets scales along the wrong axis. Cores are stored as they run."""
    modes = (96, 48) if form_name == "svd" else (32, 9, 16)
    ranks = {"tt": (1, 8, 8, 1), "tr": (2, 6, 8, 2), "tucker": (8, 8), "cp": (12,), "svd": (16,)}[form_name]
    plan = Plan(layers=(LayerPlan(name="conv", format=form_name, modes=modes, ranks=ranks),))
    model = factorize(small_model, plan, decompose_graph(small_model, plan)).model
    int8, narrow = int8_in_both_widths(model, feeds_of(rng), tmp_path)
    weights = {
        n.input[1]: (n.op_type, initializers(model)[n.input[1]]) for n in model.graph.node if n.op_type in ("Conv", "Gemm")
    }
    assert len(weights) >= 3
    for name, (_, weight) in weights.items():
        assert_per_channel(int8, name, 0, weight)  # Conv (O, I, Kh, Kw), Gemm with transB (O, I)
        assert_per_channel(narrow, name, 0, weight, bits=7)
    assert int8.graph.input == model.graph.input  # the dynamic batch with it


def test_int8_of_linear_layers_takes_the_scales_along_the_outputs(rng, tmp_path):
    weight = rng.standard_normal((36, 16)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w.weight"], ["y"], "product")]
    dense = make_model(nodes, {"w.weight": weight.T.copy()}, {"x": ["n", 7, 16]}, {"y": ["n", 7, 36]})
    feeds = feeds_of(rng, (7, 16))
    int8, narrow = int8_in_both_widths(dense, feeds, tmp_path)
    assert_per_channel(int8, "w.weight", 1, weight.T)
    assert_per_channel(narrow, "w.weight", 1, weight.T, bits=7)
    plan = Plan(layers=(LayerPlan(name="w", format="tt", modes=(6, 6, 4, 4), ranks=(1, 6, 8, 4, 1), merge="none"),))
    model = factorize(dense, plan, decompose_graph(dense, plan)).model
    int8, _ = int8_in_both_widths(model, feeds, tmp_path)
    stored = initializers(model)
    for node in (node for node in model.graph.node if node.op_type == "MatMul"):
        if node.input[1] in stored:
            assert_per_channel(int8, node.input[1], 1, stored[node.input[1]])
    left = [node.input[0] for node in model.graph.node if node.op_type == "MatMul" and node.input[0] in stored]
    assert left  # one scale, as uint8: the only form that an integer kernel takes there
    assert all(initializers(int8)[f"{name}_quantized"].dtype == np.uint8 for name in left)
    assert all(initializers(int8)[f"{name}_scale"].ndim == 0 for name in left)
    onnx.save(int8, tmp_path / "int8.onnx")
    assert "MatMul" not in {node.op for node in placement(tmp_path / "int8.onnx").nodes}  # every product in integers


def test_int8_folds_a_weight_behind_a_reshape_and_a_transpose(rng, tmp_path):
    weight = rng.standard_normal((6, 16)).astype(np.float32) * np.logspace(0, 2, 6, dtype=np.float32)[:, None]
    nodes = [
        helper.make_node("Reshape", ["flat", "shape"], ["w"], "reshape"),
        helper.make_node("Transpose", ["w"], ["wt"], "transpose", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "wt"], ["y"], "product"),
    ]
    weights = {"flat": weight.ravel(), "shape": np.array([6, 16])}
    model = make_model(nodes, weights, {"x": ["n", 16]}, {"y": ["n", 6]})
    feeds = feeds_of(rng, (16,))
    for bits, copy in zip((8, 7), int8_in_both_widths(model, feeds, tmp_path), strict=True):
        scales = next(values for name, values in initializers(copy).items() if name.endswith("_scale") and values.ndim)
        np.testing.assert_allclose(scales, np.abs(weight).max(1) / LARGEST[bits], rtol=1e-2)


def test_int8_of_a_layer_that_only_the_body_of_an_if_reads(rng, tmp_path):
    def body(op):
        made = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 8])
        return helper.make_graph([helper.make_node(op, ["h"], ["out"], op)], op, [], [made])

    nodes = [
        helper.make_node("Tanh", ["x"], ["t"], "before"),
        helper.make_node("Gemm", ["t", "w"], ["h"], "layer"),
        helper.make_node("ReduceMax", ["x"], ["top"], "top", keepdims=0),
        helper.make_node("Greater", ["top", "zero"], ["some"], "some"),
        helper.make_node("If", ["some"], ["y"], "either", then_branch=body("Tanh"), else_branch=body("Neg")),
    ]
    weights = {"w": rng.standard_normal((16, 8)).astype(np.float32), "zero": np.float32(0)}
    model = make_model(nodes, weights, {"x": ["n", 16]}, {"y": ["n", 8]})
    feeds = feeds_of(rng, (16,))
    for feed in (feeds, [{"x": -np.abs(one["x"])} for one in feeds]):
        assert difference(model, to_int8(model, feeds), feed, tmp_path) < INT8


@pytest.mark.parametrize(
    ("where", "largest"),
    [
        (Processor("x86_64", frozenset({"avx", "avx2"})), 64),
        (Processor("AMD64", frozenset({"avx2", "avx512f", "avx512bw"})), 64),
        (Processor("x86_64", frozenset({"avx2", "avx_vnni"})), 127),
        (Processor("x86_64", frozenset({"avx2", "avx512f", "avx512_vnni"})), 127),
        (Processor("aarch64", frozenset()), 127),
    ],
    ids=["avx2", "avx512", "avx_vnni", "avx512_vnni", "arm"],
)
def test_int8_weights_have_seven_bits_where_products_saturate(where, largest, small_model, rng):
    assert where.saturates == (largest == 64)
    weight = initializers(to_int8(small_model, feeds_of(rng), reduce_range=where.saturates))["conv.weight_quantized"]
    assert np.abs(weight).max() == largest


def test_int8_weights_have_the_bits_of_this_processor_where_none_are_named(small_model, rng):
    feeds = feeds_of(rng)
    assert to_int8(small_model, feeds) == to_int8(small_model, feeds, reduce_range=processor().saturates)


def saturating_products(x, w):
    """Return x @ w as VPMADDUBSW sums it: products of neighbours in 16 bits that saturate, these sums in 32 bits."""
    x, w = x.astype(np.int32), w.astype(np.int32)
    pairs = x[:, 0::2, None] * w[None, 0::2] + x[:, 1::2, None] * w[None, 1::2]
    return np.clip(pairs, -(2**15), 2**15 - 1).sum(1)


@pytest.mark.parametrize("bits", [7, 8])
def test_integer_products_are_those_that_the_rule_for_this_processor_expects(bits, rng, tmp_path):
    """uint8 × int8 at its largest values: exact by 7 bits, and by 8 where the rule says that nothing saturates."""
    largest = LARGEST[bits]
    x = rng.integers(200, 256, (3, 32)).astype(np.uint8)
    w = rng.integers(largest - 8, largest + 1, (32, 16)).astype(np.int8) * rng.choice([-1, 1], 16).astype(np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [3, 32])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [3, 16])],
        [numpy_helper.from_array(w, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    got = outputs(model, [{"x": x}], tmp_path)[0]["y"]
    exact = x.astype(np.int32) @ w.astype(np.int32)
    if bits == 7 or not processor().saturates:
        np.testing.assert_array_equal(got, exact)
    else:
        assert (saturating_products(x, w) != exact).all()
        assert (got == exact).all() or (got == saturating_products(x, w)).all()


def test_int8_by_one_scale_where_asked(small_model, rng):
    one = initializers(to_int8(small_model, feeds_of(rng), per_channel=False, reduce_range=False))
    assert one["conv.weight_scale"].shape == ()
    assert np.abs(one["conv.weight_quantized"]).max() == 127


@pytest.mark.parametrize("method", METHODS)
def test_every_calibration_method_takes_batches_of_unequal_size(method, factored, rng, tmp_path):
    feeds = feeds_of(rng, batches=(16, 16, 5))
    int8 = to_int8(factored, feeds, method=method)
    assert difference(factored, int8, feeds, tmp_path) < 2 * INT8  # the two histograms cut off what is rare


def test_methods_differ_and_the_result_is_the_same_every_time(small_model, rng):
    feeds = feeds_of(rng, batches=(64,))
    feeds[0]["x"][0, 0, 0, 0] = 40.0  # one outlier among 65,536 values
    scales = [float(initializers(to_int8(small_model, feeds, method=method))["x_scale"]) for method in METHODS]
    assert scales[0] > 1.5 * scales[1]
    assert scales[0] > scales[2]
    assert to_int8(small_model, feeds) == to_int8(small_model, feeds)


def test_int8_keeps_a_layer_in_fp32_and_prints_nothing(factored, rng, tmp_path, capfd):
    feeds = feeds_of(rng)
    int8 = to_int8(factored, feeds, keep=["conv"])
    assert initializers(int8)["conv/1"].dtype == np.float32
    assert "fc.weight_quantized" in initializers(int8)
    assert difference(factored, int8, feeds, tmp_path) < INT8
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("which", ["small_model", "factored"])
def test_with_assumed_ranges_the_same_runs_as_with_measured_ones(which, request, rng):
    model = request.getfixturevalue(which)
    assumed, measured = with_assumed_ranges(model), to_int8(model, feeds_of(rng), gauge=False)
    assert sorted(ops(assumed)) == sorted(ops(measured))
    shapes = [sorted((a.dtype.str, a.shape) for a in initializers(m).values() if a.ndim > 1) for m in (assumed, measured)]
    assert shapes[0] == shapes[1]


def test_what_cannot_be_quantized_keeps_its_operators_with_assumed_ranges(rng):
    weights = {"w": rng.standard_normal((1, 32, 4)).astype(np.float32), "r": rng.standard_normal((1, 32, 8)).astype(np.float32)}
    node = helper.make_node("LSTM", ["x", "w", "r"], ["y"], "l", hidden_size=8)
    model = make_model([node], weights, {"x": [5, 1, 4]}, {"y": [5, 1, 1, 8]})
    assert with_assumed_ranges(model) is model


def test_a_layer_is_kept_whose_node_is_named_like_its_output(rng):
    weights = {name: (rng.standard_normal((16, 16, 3, 3)) / 12).astype(np.float32) for name in ("v", "w")}
    nodes = [
        helper.make_node("Conv", ["x", "v"], ["a"], "a", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["a", "w"], ["b"], "b", pads=[1, 1, 1, 1]),
    ]
    model = make_model(nodes, weights, {"x": ["n", 16, 8, 8]}, {"b": ["n", 16, 8, 8]})
    int8 = initializers(to_int8(model, feeds_of(rng), keep=["a"]))
    assert ("v" in int8, "w" in int8, "w_quantized" in int8) == (True, False, True)
    half = initializers(to_fp16(model, keep=["a"]))
    assert (half["v"].dtype, half["w"].dtype) == (np.float32, np.float16)


def test_int8_folds_a_batch_norm_and_joins_residual_sums(rng, tmp_path):
    weights = {f"{k}.weight": (rng.standard_normal((16, 16, 3, 3)) / 12).astype(np.float32) for k in "ab"}
    weights |= {name: (rng.random(16) + 0.5).astype(np.float32) for name in ("scale", "shift", "mean", "variance")}
    nodes = [
        helper.make_node("Conv", ["x", "a.weight"], ["a"], "", pads=[1, 1, 1, 1]),  # nodes without names
        helper.make_node("BatchNormalization", ["a", "scale", "shift", "mean", "variance"], ["n"], ""),
        helper.make_node("Relu", ["n"], ["r"], ""),
        helper.make_node("Conv", ["r", "b.weight"], ["b"], "", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["b", "r"], ["s"], ""),
        helper.make_node("Relu", ["s"], ["y"], ""),
    ]
    model = make_model(nodes, weights, {"x": ["n", 16, 8, 8]}, {"y": ["n", 16, 8, 8]})
    feeds = feeds_of(rng)
    int8 = to_int8(model, feeds)
    assert "BatchNormalization" not in ops(int8)
    assert difference(model, int8, feeds, tmp_path) < INT8
    onnx.save(int8, tmp_path / "int8.onnx")
    ran = {node.op for node in placement(tmp_path / "int8.onnx").nodes}
    assert {"QLinearConv", "QLinearAdd"} <= ran
    assert not {"Conv", "Add", "Relu"} & ran


def attention(rng):
    """A head of attention with a residual on (n, 5, 16): q·kᵀ and p·v are products of activations."""
    weights = {f"{name}.weight": (rng.standard_normal((16, 16)) / 4).astype(np.float32) for name in "qkvo"}
    nodes = [helper.make_node("MatMul", ["x", f"{name}.weight"], [name], name) for name in "qkv"]
    nodes += [
        helper.make_node("Transpose", ["k"], ["kt"], "kt", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["scores"], "scores"),
        helper.make_node("Softmax", ["scores"], ["p"], "softmax"),
        helper.make_node("MatMul", ["p", "v"], ["mixed"], "values"),
        helper.make_node("MatMul", ["mixed", "o.weight"], ["o"], "o"),
        helper.make_node("Add", ["x", "o"], ["y"], "residual"),
    ]
    return make_model(nodes, weights, {"x": ["n", 5, 16]}, {"y": ["n", 5, 16]})


def test_int8_leaves_products_of_activations_their_softmax_and_the_residual_fp32(rng, tmp_path):
    """With its output rounded, ONNX Runtime computes a Softmax for another scale: an error of 0.96, not of 0.04."""
    model, feeds = attention(rng), feeds_of(rng, (5, 16))
    int8 = to_int8(model, feeds)
    inputs = {node.name: list(node.input) for node in int8.graph.node}
    assert inputs["values"] == ["p", "v"]
    assert inputs["residual"] == ["x", "o"]
    assert {"q.weight_quantized", "o.weight_quantized"} <= set(initializers(int8))
    for level in ("none", "all"):
        assert difference(model, int8, feeds, tmp_path, level) < INT8


def recurrent(rng):
    weights = {
        "rnn.W": (rng.standard_normal((1, 32, 16)) / 4).astype(np.float32),
        "rnn.R": (rng.standard_normal((1, 32, 8)) / 4).astype(np.float32),
        "fc.weight": rng.standard_normal((4, 8)).astype(np.float32),
    }
    nodes = [
        helper.make_node("LSTM", ["x", "rnn.W", "rnn.R"], ["", "h"], "rnn", hidden_size=8),
        helper.make_node("Squeeze", ["h", "zero"], ["s"], "squeeze"),
        helper.make_node("Gemm", ["s", "fc.weight"], ["y"], "fc", transB=1),
    ]
    return make_model(nodes, weights | {"zero": np.array([0])}, {"x": [6, "n", 16]}, {"y": ["n", 4]})


def test_lstm_is_converted_to_fp16_and_left_fp32_by_int8_and_the_report_says_so(rng, tmp_path):
    model = recurrent(rng)
    feeds = [{"x": rng.standard_normal((6, batch, 16)).astype(np.float32)} for batch in (3, 2)]
    half = to_fp16(model)
    assert initializers(half)["rnn.W"].dtype == np.float16
    assert difference(model, half, feeds, tmp_path) < FP16
    int8 = to_int8(model, feeds)
    assert initializers(int8)["rnn.W"].dtype == np.float32
    assert "fc.weight_quantized" in initializers(int8)
    onnx.save(model, tmp_path / "m.onnx")
    report = reduced(tmp_path / "m.onnx", tmp_path / "o.onnx", Quantization("int8"), calibration=feeds, conditions=QUICK)
    assert [(one.layer, one.op, one.kept) for one in report.fp32] == [("rnn", "LSTM", False)]
    kept = reduced(
        tmp_path / "m.onnx", tmp_path / "o.onnx", Quantization("fp16", keep=("fc",)), calibration=feeds, conditions=QUICK
    )
    assert [(one.layer, one.op, one.kept) for one in kept.fp32] == [("fc", "Gemm", True)]


def transposed_convolutions(rng):
    weights = {f"up{k}.weight": (rng.standard_normal((16, 16, 1, 1)) / 4).astype(np.float32) for k in range(9)}
    names = ["x", *(f"a{k}" for k in range(8)), "y"]
    nodes = [helper.make_node("ConvTranspose", [names[k], f"up{k}.weight"], [names[k + 1]], f"n{k}") for k in range(9)]
    return make_model(nodes, weights, {"x": ["n", 16, 8, 8]}, {"y": ["n", 16, 8, 8]})


def test_bad_inputs_are_one_clear_line(small_model, rng):
    feeds = feeds_of(rng)
    int8, half = to_int8(small_model, feeds), to_fp16(small_model)
    holes = [{"x": np.full((2, 16, 8, 8), np.nan, np.float32)}]
    relu = make_model([helper.make_node("Relu", ["x"], ["y"])], {}, {"x": ["n", 4]}, {"y": ["n", 4]})
    only_lstm = recurrent(rng)
    del only_lstm.graph.node[1:]
    only_lstm.graph.output[0].CopyFrom(helper.make_tensor_value_info("h", TensorProto.FLOAT, [1, "n", 8]))
    cases = [
        (lambda: to_int8(int8, feeds), GraphError, "already quantized: .* needs the fp32 model"),
        (lambda: to_fp16(int8), GraphError, "already quantized: .* needs the fp32 model"),
        (lambda: to_fp16(half), GraphError, "fp16 expects .* float32 weights, got constants of type float16"),
        (lambda: to_int8(half, feeds), GraphError, "int8 expects .* float32 weights, got constants of type float16"),
        (lambda: to_fp16(relu), GraphError, "got constants of type none at all"),
        (lambda: to_int8(small_model, []), GraphError, "needs calibration data"),
        (lambda: to_int8(small_model, [{"z": feeds[0]["x"]}]), GraphError, "inputs x, got z"),
        (lambda: to_int8(small_model, holes), GraphError, "input 'x' contains NaN"),
        (lambda: to_int8(small_model, feeds_of(rng, (16, 8))), ModelError, "cannot run the model on these inputs"),
        (lambda: to_int8(small_model, feeds, method="mean"), GraphError, "unknown calibration method 'mean': .* minmax"),
        (lambda: to_int8(small_model, feeds, keep=["conv", "fc"]), GraphError, "nothing in the graph can be quantized"),
        (
            lambda: to_int8(only_lstm, [{"x": np.zeros((6, 1, 16), np.float32)}]),
            GraphError,
            r"nothing in the graph can be quantized: .*; these stay fp32: rnn \(LSTM\)$",
        ),
        (
            lambda: to_int8(transposed_convolutions(rng), feeds),
            GraphError,
            r"; these stay fp32: up0 \(ConvTranspose\), .*up7 \(ConvTranspose\) and 1 more$",
        ),
    ]
    for call, kind, reason in cases:
        with pytest.raises(kind, match=reason) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_the_arguments_are_not_changed_and_metadata_and_old_opsets_survive(rng, tmp_path):
    weight = rng.standard_normal((8, 16, 3, 3)).astype(np.float32)
    node = helper.make_node("Conv", ["x", "conv.weight"], ["y"], "conv")
    model = make_model([node], {"conv.weight": weight}, {"x": ["n", 16, 8, 8]}, {"y": ["n", 8, 6, 6]}, opset=11)
    helper.set_model_props(model, {"author": "somebody"})
    before, feeds = model.SerializeToString(), feeds_of(rng)
    for small, version, bound in ((to_fp16(model), 11, FP16), (to_int8(model, feeds), 13, INT8)):
        assert [(entry.domain, entry.version) for entry in small.opset_import] == [("", version)]
        assert {entry.key: entry.value for entry in small.metadata_props} == {"author": "somebody"}
        assert difference(model, small, feeds, tmp_path) < bound
    assert model.SerializeToString() == before


def test_int8_of_an_old_file_that_lists_its_weights_as_inputs(rng, tmp_path):
    weight = rng.standard_normal((8, 16, 3, 3)).astype(np.float32)
    model = make_model(
        [helper.make_node("Conv", ["x", "w"], ["y"], "conv")],
        {"w": weight},
        {"x": ["n", 16, 8, 8]},
        {"y": ["n", 8, 6, 6]},
        opset=9,
    )
    model.ir_version = 3
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, weight.shape))
    onnx.checker.check_model(model)
    feeds = feeds_of(rng)
    int8 = to_int8(model, feeds)
    assert [value.name for value in int8.graph.input] == ["x"]
    assert difference(model, int8, feeds, tmp_path) < INT8


def test_int8_by_way_of_external_data_is_the_same(factored, rng, monkeypatch):
    feeds = feeds_of(rng)
    whole = initializers(to_int8(factored, feeds))
    monkeypatch.setattr("tensorrail_exporter.precision.int8._LARGE", 0)
    monkeypatch.setattr("tensorrail_exporter.graphs.io._LARGEST_FILE", 0)
    monkeypatch.setattr("tensorrail_exporter.graphs.io._SMALL", 0)
    half = to_fp16(factored)
    apart = initializers(to_int8(factored, feeds))
    assert {name: values.tolist() for name, values in apart.items()} == {name: v.tolist() for name, v in whole.items()}
    assert {values.dtype for values in initializers(half).values()} == {np.dtype(np.float16)}


QUICK = Conditions(Timing(seconds=0.1))


def test_reduced_measures_and_its_record_is_strict(small_path, small_model, rng, tmp_path):
    feeds = feeds_of(rng, batches=(20,))
    labels = outputs(small_model, feeds, tmp_path)[0]["y"].argmax(1)
    out = tmp_path / "small.onnx"
    report = reduced(
        small_path,
        out,
        Quantization("int8", method="percentile"),
        calibration=feeds,
        test=Labelled(feeds[0], labels),
        conditions=QUICK,
    )
    assert report.holds
    assert report.accuracy.reference.mean == 1.0
    assert report.parity.worst < INT8
    assert (report.bytes_before, report.bytes_after) == (small_path.stat().st_size, out.stat().st_size)
    assert (report.inputs, report.samples, report.method, report.ranges) == ("given", 20, "percentile", ())
    assert [latency.model for latency in report.latency.latencies] == ["fp32", "int8"]
    assert PrecisionReport.model_validate_json(report.model_dump_json()) == report
    with pytest.raises(ValueError, match="extra"):
        PrecisionReport.model_validate(report.model_dump() | {"more": 1})
    with pytest.raises(ValueError, match="version"):
        PrecisionReport.model_validate(report.model_dump() | {"version": 2})
    for narrow, largest in ((True, 64), (False, 127)):
        reduced(small_path, out, Quantization("int8", reduce_range=narrow), calibration=feeds, conditions=QUICK)
        assert np.abs(initializers(onnx.load(out))["conv.weight_quantized"]).max() == largest
    missed = reduced(small_path, out, Quantization("fp16", tolerance=1e-9), conditions=QUICK)
    assert not missed.holds
    assert {one.layer for one in missed.ranges} == {"conv", "fc"}
    ratio = missed.ratio
    for low, high, verdict in ((1.1, 1.3, "faster"), (0.7, 0.9, "slower"), (0.9, 1.1, "not proven faster")):
        told = missed.latency.model_copy(update={"ratios": (ratio.model_copy(update={"low": low, "high": high}),)})
        assert missed.model_copy(update={"latency": told}).verdict == verdict


def test_reduced_is_judged_on_inputs_that_int8_was_not_fitted_to(small_path, rng, tmp_path):
    feeds, others = feeds_of(rng, batches=(8, 8)), feeds_of(rng, batches=(5,), scale=2.0)
    out, record = tmp_path / "small.onnx", Quantization("int8", reduce_range=True)
    report = reduced(small_path, out, record, calibration=feeds, judged=others, conditions=QUICK)
    assert (report.inputs, report.samples) == ("held out", 5)
    assert report.parity.outputs == parity(small_path, out, inputs=others, tolerance=TOLERANCES["int8"]).outputs
    assert "5 held-out samples" in " ".join(str(report).split())
    alone = reduced(small_path, tmp_path / "alone.onnx", record, calibration=feeds, conditions=QUICK)
    assert (alone.inputs, alone.samples) == ("given", 16)
    assert (tmp_path / "alone.onnx").read_bytes() == out.read_bytes()  # the others changed nothing in it
    assert alone.parity.worst < report.parity.worst
    told = "int8 was fitted to these samples, since none were held out"
    assert (told in " ".join(str(alone).split()), told in " ".join(str(report).split())) == (True, False)


@pytest.mark.parametrize("loud", ["calibration", "judged"])
def test_reduced_looks_for_overflow_on_all_inputs(loud, rng, tmp_path):
    onnx.save(scaled(rng, 1e3), tmp_path / "m.onnx")
    inputs = {name: feeds_of(rng, (8,), scale=100.0 if name == loud else 1.0) for name in ("calibration", "judged")}
    with pytest.raises(RangeError, match="layer a: overflows in fp16"):
        reduced(tmp_path / "m.onnx", tmp_path / "o.onnx", Quantization("fp16"), conditions=QUICK, **inputs)
    inputs[loud] = feeds_of(rng, (8,))
    report = reduced(tmp_path / "m.onnx", tmp_path / "o.onnx", Quantization("fp16"), conditions=QUICK, **inputs)
    assert (report.inputs, report.holds) == ("held out", True)


def test_reduced_writes_nothing_when_it_fails(small_path, rng, tmp_path):
    out = tmp_path / "small.onnx"
    onnx.save(scaled(rng, 2e4), tmp_path / "large.onnx")
    wrong = Labelled({"x": np.zeros((3, 16, 8, 8), np.float32)}, np.zeros(2, np.int64))
    cases = [
        (lambda: reduced(small_path, out, Quantization("bf16")), "unknown precision 'bf16': expected one of fp16, int8"),
        (lambda: reduced(small_path, out, Quantization("int8")), "needs calibration data"),
        (lambda: reduced(small_path, out, Quantization("fp16", method="minmax")), "fp16 needs no calibration"),
        (lambda: reduced(small_path, out, Quantization("fp16", reduce_range=True)), "a choice for int8 weights, got fp16"),
        (lambda: reduced(small_path, small_path, Quantization("fp16")), "is the fp32 model itself"),
        (lambda: reduced(small_path, out, Quantization("fp16"), test=wrong), "as many labels as samples"),
        (lambda: reduced(tmp_path / "large.onnx", out, Quantization("fp16")), "layer a: overflows in fp16"),
    ]
    before = small_path.read_bytes()
    for call, reason in cases:
        with pytest.raises((GraphError, ModelError), match=reason):
            call()
    assert not out.exists()
    assert small_path.read_bytes() == before


def test_int8_keeps_the_operators_of_others_that_only_a_body_uses(rng, tmp_path):
    weight = rng.standard_normal((8, 8)).astype(np.float32)
    out = [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)]
    then = helper.make_graph([helper.make_node("Tanh", ["h"], ["t"])], "then", [], out)
    other = helper.make_graph([helper.make_node("Relu", ["h"], ["t"])], "else", [], out)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "fc"),
        helper.make_node("If", ["yes"], ["y"], then_branch=then, else_branch=other),
    ]
    model = make_model(nodes, {"w": weight, "yes": np.array(True)}, {"x": ["n", 8]}, {"y": ["n", 8]})
    foreign = next(a.g.node[0] for a in model.graph.node[1].attribute if a.name == "then_branch")
    foreign.op_type, foreign.domain = "FastGelu", "com.microsoft"  # which onnx's checker does not know
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    feeds = feeds_of(rng, (8,))
    assert difference(model, to_int8(model, feeds), feeds, tmp_path) < 0.05
