"""The models that a layer is timed in: they run, each copy has weights of its own, and a factored copy has its steps."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from attention_graphs import attention_model
from conftest import make_model
from onnx import TensorProto, helper, numpy_helper
from recurrent_graphs import recurrent_model

from tensorrail_exporter import GraphError, LayerSpec
from tensorrail_exporter.rewrite.survey import survey
from tensorrail_exporter.search.context import copies_of, dense_context, factored_context
from tensorrail_exporter.search.options import option_for, options_of

SMALLEST = float(np.finfo(np.float32).tiny)  # below it numbers are denormal, and slow


def weight(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def conv(rng, outputs=32, inputs=32, kernel=(3, 3), behind=True, bias=False, **attributes):
    """Return a convolution behind a Relu, or as the first layer."""
    weights = {"w": weight(rng, outputs, inputs // attributes.get("group", 1), *kernel)} | (
        {"b": weight(rng, outputs)} if bias else {}
    )
    nodes = [helper.make_node("Relu", ["x"], ["a"], "relu")] if behind else []
    nodes.append(helper.make_node("Conv", ["a" if behind else "x", *weights], ["y"], "n", **attributes))
    nd = len(kernel)
    return make_model(nodes, weights, {"x": ["n", inputs, *[8] * nd]}, {"y": ["n", outputs, *[None] * nd]})


def transposed(rng, outputs=32, inputs=32, kernel=(3, 3), **attributes):
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], "n", **attributes)
    nd = len(kernel)
    shapes = {"x": ["n", inputs, *[8] * nd]}, {"y": ["n", outputs, *[None] * nd]}
    return make_model([node], {"w": weight(rng, inputs, outputs, *kernel)}, *shapes)


def behind_a_pad(rng, kernel=(3, 3), **attributes):
    """Return a convolution that keeps the size, because a Pad node of its own adds two rows and columns."""
    model = conv(rng, kernel=kernel, **attributes)
    edges = numpy_helper.from_array(np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64), "edges")
    model.graph.initializer.append(edges)
    model.graph.node.insert(1, helper.make_node("Pad", ["a", "edges"], ["padded"], "pad"))
    model.graph.node[-1].input[0] = "padded"
    return model


def linear(rng, op, outputs=32, inputs=48, tokens=(), left=False, **attributes):
    values = weight(rng, *((outputs, inputs) if left or attributes.get("transB") else (inputs, outputs)))
    node = helper.make_node(op, ["w", "x"] if left else ["x", "w"], ["y"], "n", **attributes)
    tail, out = ([inputs, 6], [outputs, 6]) if left else ([inputs], [outputs])
    free = [inputs, "n"] if attributes.get("transA") else ["n", *tokens, *tail]
    return make_model([node], {"w": values}, {"x": free}, {"y": ["n", *tokens, *out]})


def with_lengths(rng):
    """Return an LSTM with lengths, a bias and initial states that the graph computes."""
    model = recurrent_model("LSTM", "forward", 16, 48, rng, state=True, lengths=True)
    return model, {"x": (5, 2, 48), "h": (1, 2, 16), "c": (1, 2, 16)}


def attention(rng, **inputs):
    """Return an attention of two samples of five tokens; without a mask, what it reads and what it gives have equal shapes."""
    shapes = {name: inputs[name].shape for name in ("mask", "scores") if name in inputs}
    return attention_model(rng, **inputs), {"x": (2, 5, 16), **shapes}


MODELS = {
    "conv": lambda rng: (conv(rng, pads=[1] * 4), None),
    "conv with bias": lambda rng: (conv(rng, pads=[1] * 4, bias=True), None),
    "conv stride 2": lambda rng: (conv(rng, pads=[1] * 4, strides=[2, 2]), None),
    "conv behind a Pad": lambda rng: (behind_a_pad(rng), None),
    "conv in groups": lambda rng: (conv(rng, 64, 64, pads=[1] * 4, group=2), None),
    "conv in groups, stride 2": lambda rng: (conv(rng, 64, 32, pads=[1] * 4, strides=[2, 2], group=4), None),
    "conv I≠O": lambda rng: (conv(rng, 64, 32, pads=[1] * 4), None),
    "conv 1×1": lambda rng: (conv(rng, 64, 32, (1, 1)), None),
    "conv 1d SAME": lambda rng: (conv(rng, kernel=(3,), auto_pad="SAME_UPPER"), None),
    "first conv": lambda rng: (conv(rng, 48, 32, (7, 7), behind=False, pads=[3] * 4, strides=[2, 2]), None),
    "transposed conv": lambda rng: (transposed(rng, 48, strides=[2, 2], pads=[1] * 4, output_padding=[1, 1]), None),
    "transposed conv 1d": lambda rng: (transposed(rng, kernel=(4,), dilations=[2]), None),
    "gemm": lambda rng: (linear(rng, "Gemm", transB=1), None),
    "square gemm": lambda rng: (linear(rng, "Gemm", 48, 48), None),
    "gemm transA alpha": lambda rng: (linear(rng, "Gemm", transA=1, alpha=0.5), None),
    "matmul with tokens": lambda rng: (linear(rng, "MatMul", tokens=(5,)), None),
    "matmul left": lambda rng: (linear(rng, "MatMul", left=True), None),
    "lstm": lambda rng: (recurrent_model("LSTM", "bidirectional", 16, 48, rng), {"x": (5, 2, 48)}),
    "lstm with lengths": with_lengths,
    "attention": attention,
    "attention with lengths": lambda rng: attention(rng, mask=np.array([5, 5], np.int32)),
    "attention with scores": lambda rng: attention(rng, sizes=(16, 16, 8), scores=rng.standard_normal((2, 1, 5, 5))),
    "gru": lambda rng: (recurrent_model("GRU", "forward", 16, 48, rng), {"x": (5, 2, 48)}),
}
COPIES = [1, 2, 4]


def run(model):
    """Return the output of a context on random inputs."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    (out,) = session.run(None, {entry.name: np.random.default_rng(0).standard_normal(entry.shape).astype(np.float32)})
    return out


def layer_of(name, rng, batch=2):
    model, shapes = MODELS[name](rng)
    return survey(model, batch, shapes)[0]  # of an LSTM or GRU the input weight


def weights_of(model, op, index):
    """Return the constants at one input of all the nodes of an operator."""
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return [values[node.input[index]] for node in model.graph.node if node.op_type == op and node.name.startswith("copy")]


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("name", MODELS)
def test_dense_context_runs_and_gives_the_layers_shape(name, copies, rng):
    layer = layer_of(name, rng)
    model = dense_context(layer, copies)
    out = run(model)
    assert out.shape == layer.output
    assert np.isfinite(out).all()
    assert np.abs(out).max() > SMALLEST
    placed = weights_of(model, layer.op, 1 - layer.data if layer.op == "MatMul" else 1)
    assert len(placed) == copies
    assert all(one.shape == layer.inputs[1 - layer.data if layer.op == "MatMul" else 1] for one in placed)
    assert len({one.tobytes() for one in placed}) == copies  # each has weights of its own


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_factored_context_runs_and_every_copy_has_the_steps(name, copies, rng):
    layer = layer_of(name, rng)
    dense = dense_context(layer, copies)
    before = dense.SerializeToString()
    forms = ["tt", "tr", "tucker", "cp", "svd", *(["ttm"] if not layer.spec.kernel else [])]
    for form in forms:
        option = options_of(layer, [form], 8, most=50.0)[0]
        model = factored_context(layer, dense, option)
        out = run(model)
        assert out.shape == layer.output, form
        assert np.isfinite(out).all()
        assert np.abs(out).max() > SMALLEST, form
        constants = [tensor for tensor in model.graph.initializer if tensor.name.startswith("copy")]
        steps = option.steps.split(", ")
        for copy in range(copies):
            own = [node for node in model.graph.node if node.name.startswith(f"copy{copy}/")]
            products = [node for node in own if node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm")]
            # The last product of a recurrent layer is inside its node: it is the input weight. A train of pairs has none.
            assert len(products) == len(steps) - (layer.spec.op == "recurrent" and form != "ttm"), (form, option.steps)
        stored = [numpy_helper.to_array(tensor) for tensor in constants if tensor.data_type == TensorProto.FLOAT]
        distinct = {(one.shape, one.tobytes()) for one in stored if one.size > 1}
        cores = [one for one in stored if one.size > 1]
        identities = copies - 1 if layer.spec.op == "recurrent" and form == "ttm" else 0
        assert len(distinct) >= len(cores) - identities, form  # no copy shares its cores with another
    assert dense.SerializeToString() == before


def test_convolutions_of_equal_input_and_output_stand_in_a_chain(rng):
    model = dense_context(layer_of("conv", rng), 3)
    assert [node.op_type for node in model.graph.node] == ["Conv", "Relu"] * 4  # the first brings the data into the layout
    for before, after in zip(model.graph.node, model.graph.node[1:], strict=False):
        assert after.input[0] == before.output[0]


def test_other_convolutions_stand_side_by_side_and_are_all_used(rng):
    model = dense_context(layer_of("conv stride 2", rng), 3)
    sources = {node.input[0] for node in model.graph.node if node.name.startswith("copy")}
    assert len(sources) == 1
    (total,) = [node for node in model.graph.node if node.op_type == "Sum"]
    assert len(total.input) == 3


def test_the_first_layer_reads_the_callers_data_and_another_does_not(rng):
    first = dense_context(layer_of("first conv", rng), 2)
    assert {node.input[0] for node in first.graph.node if node.op_type == "Conv"} == {"x"}
    later = dense_context(layer_of("conv stride 2", rng), 2)
    assert all("x" not in node.input for node in later.graph.node if node.name.startswith("copy"))


def test_padded_ranks_run(rng):
    layer = layer_of("conv I≠O", rng)
    option = option_for(options_of(layer, ["tt"], 8)[0].plan("w").model_copy(update={"ranks": (1, 5, 7, 1)}), layer.spec, 8)
    model = factored_context(layer, dense_context(layer, 2), option)
    assert run(model).shape == layer.output
    kernels = [t.dims for t in model.graph.initializer if len(t.dims) == 4 and t.dims[2] == 3]
    assert [list(dims) for dims in kernels] == [[8, 8, 3, 3]] * 2


def test_a_chain_keeps_the_scale_of_its_values(rng):
    layer = layer_of("conv", rng)
    dense = dense_context(layer, 4)
    assert 0.05 < run(dense).std() < 20.0
    for form in ("tt", "svd", "cp"):
        factored = factored_context(layer, dense, options_of(layer, [form], 8)[0])
        assert np.abs(run(factored)).max() > 1e-6, form


def test_half_precision_is_kept(rng):
    layer = layer_of("conv", rng)
    layer = replace(layer, dtype=np.dtype(np.float16))
    model = dense_context(layer, 2)
    factored = factored_context(layer, model, options_of(layer, ["tt"], 8)[0])
    for one in (model, factored):
        kinds = {tensor.data_type for tensor in one.graph.initializer if tensor.data_type != TensorProto.INT64}
        assert kinds == {TensorProto.FLOAT16}


def test_fewer_copies_of_very_large_weights(rng):
    layer = layer_of("gemm", rng)
    assert copies_of(layer) == 4
    wide = LayerSpec("linear", (4096, 25088))
    assert copies_of(replace(layer, spec=wide, inputs=(layer.inputs[0], (25088, 4096)))) == 1


def test_copies_of_a_recurrent_weight_count_both_weights_of_its_node(rng):
    model = recurrent_model("LSTM", "forward", 16, 48, rng)
    shapes = {"x": (5, 2, 48)}
    for layer in survey(model, 2, shapes):
        assert layer.bytes == 4 * (64 * 48 + 64 * 16 + 2 * 64)
        assert layer.node_macs == 5 * 2 * 64 * (48 + 16)
        x, _, *others = layer.inputs
        assert copies_of(layer) == 4
        assert copies_of(replace(layer, inputs=(x, (1, 64, 10**6), *others))) == 1  # 256 MB
        assert copies_of(replace(layer, macs=2000 * layer.macs)) == 4  # 82 million of the node
        assert copies_of(replace(layer, macs=6000 * layer.macs)) == 2


def test_fewer_copies_of_a_layer_that_takes_long(rng):
    (layer,) = survey(conv(rng, pads=[1] * 4))
    assert copies_of(layer) == copies_of(replace(layer, macs=400_000_000, nodes=2)) == 4
    assert copies_of(replace(layer, macs=400_000_002, nodes=2)) == 2


def test_the_same_context_is_made_twice(rng):
    layer = layer_of("conv", rng)
    assert dense_context(layer, 2).SerializeToString() == dense_context(layer, 2).SerializeToString()


def test_a_layer_of_unknown_shape_is_refused_in_one_line(rng):
    layer = layer_of("gemm", rng)
    unknown = replace(layer, output=None)
    with pytest.raises(
        GraphError, match=r"layer w: cannot be timed, because the shape of its input 'x' .*leave the layer dense$"
    ):
        dense_context(unknown, 2)


def test_contexts_pass_the_checker(rng):
    for name in MODELS:
        layer = layer_of(name, rng)
        dense = dense_context(layer, 2)
        onnx.checker.check_model(dense)
        onnx.checker.check_model(factored_context(layer, dense, options_of(layer, ["svd"], 8, most=50.0)[0]))


def test_a_pad_node_stands_before_every_copy_as_in_the_network(rng):
    """ONNX Runtime computes both as one, in another time than the convolution of data that were padded before."""
    (layer,) = survey(behind_a_pad(rng))
    assert (layer.inputs[0], layer.source, layer.padding) == ((1, 32, 10, 10), (1, 32, 8, 8), (0, 0, 1, 1, 0, 0, 1, 1))
    dense = dense_context(layer, 2)
    assert [node.op_type for node in dense.graph.node] == ["Conv", "Relu", *["Pad", "Conv", "Relu"] * 2]
    option = options_of(layer, ["svd"], 8)[0]
    assert [node.op_type for node in factored_context(layer, dense, option).graph.node].count("Pad") == 2
    (other,) = survey(conv(rng, pads=[1] * 4))
    assert layer.signature != other.signature


@pytest.mark.parametrize(
    ("edges", "mode", "auto_pad"),
    [
        ([0, 1, 1, 1, 0, 1, 1, 1], "constant", "NOTSET"),  # channels
        ([0, 0, 1, 1, 0, 0, -1, 1], "constant", "NOTSET"),  # a crop
        ([0, 0, 1, 1, 0, 0, 1, 1], "reflect", "NOTSET"),
        ([0, 0, 1, 1, 0, 0, 1, 1], "constant", "SAME_UPPER"),
        ([], "constant", "NOTSET"),  # which no model that runs has
    ],
)
def test_a_pad_node_that_is_computed_by_itself_is_left_out(edges, mode, auto_pad, rng):
    model = behind_a_pad(rng, auto_pad=auto_pad)
    model.graph.initializer[-1].CopyFrom(numpy_helper.from_array(np.array(edges, np.int64), "edges"))
    next(node for node in model.graph.node if node.op_type == "Pad").attribute.append(helper.make_attribute("mode", mode))
    if edges[1:2] == [1]:
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight(rng, 32, 34, 3, 3), "w"))
    (layer,) = survey(model)
    assert (layer.padding, layer.source) == ((), layer.inputs[0])
