"""Every layer that a plan may name: its shapes and MACs at a batch size, and what makes two layers equal."""

import math

import numpy as np
import onnx
import pytest
import torch
from conftest import make_model
from onnx import TensorProto, helper
from recurrent_graphs import GATES, recurrent_model

from tensorrail_exporter import LayerPlan, Plan, decompose_graph, factorize
from tensorrail_exporter.graphs.io import import_graph
from tensorrail_exporter.rewrite import sites
from tensorrail_exporter.rewrite.resolve import resolve
from tensorrail_exporter.rewrite.sites import NamedLayers
from tensorrail_exporter.rewrite.survey import left_out, survey, with_known_axes
from tensorrail_runtime.errors import GraphError, ModelError
from tensorrail_runtime.graphs.cost import cost
from tensorrail_trainer import to_onnx

BATCHES = [1, 3]


def weight(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def one_node(node, weights, inputs, outputs):
    return make_model([node], weights, inputs, outputs)


def gemm(rng, **attributes):
    trans_a, trans_b = attributes.get("transA", 0), attributes.get("transB", 0)
    node = helper.make_node("Gemm", ["x", "fc.weight", "b"], ["y"], "fc", **attributes)
    weights = {"fc.weight": weight(rng, *((6, 10) if trans_b else (10, 6))), "b": weight(rng, 6)}
    return one_node(node, weights, {"x": [10, "n"] if trans_a else ["n", 10]}, {"y": ["n", 6]})


def conv(rng, kernel, name="conv", size=9, **attributes):
    nd = len(kernel)
    node = helper.make_node("Conv", ["x", f"{name}.weight"], ["y"], name, **attributes)
    free = {"x": ["n", 4, *[size] * nd]}
    return one_node(node, {f"{name}.weight": weight(rng, 6, 4, *kernel)}, free, {"y": ["n", 6, *[None] * nd]})


def matmul(rng, left=False, lead=(5,)):
    node = helper.make_node("MatMul", ["w", "x"] if left else ["x", "w"], ["y"], "product")
    tail, out = ([10, 7], [6, 7]) if left else ([7, 10], [7, 6])
    values = {"w": weight(rng, *((6, 10) if left else (10, 6)))}
    return one_node(node, values, {"x": ["n", *lead, *tail]}, {"y": ["n", *lead, *out]})


MODELS = {
    "conv 1d": lambda rng: conv(rng, (3,), strides=[2], pads=[1, 1]),
    "conv 2d": lambda rng: conv(rng, (3, 3), strides=[2, 1], pads=[1, 0, 1, 2], dilations=[1, 2]),
    "conv 2d SAME": lambda rng: conv(rng, (3, 2), strides=[2, 2], auto_pad="SAME_UPPER"),
    "gemm": lambda rng: gemm(rng, transB=1),
    "gemm transA alpha": lambda rng: gemm(rng, transA=1, alpha=0.5),
    "matmul": matmul,
    "matmul left": lambda rng: matmul(rng, left=True),
    "matmul left, no lead": lambda rng: matmul(rng, left=True, lead=()),
}


def measured(model, tmp_path, batch):
    onnx.save(model, tmp_path / "model.onnx")
    return cost(tmp_path / "model.onnx", batch)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_macs_and_params_are_the_runtimes_own(name, batch, rng, tmp_path):
    model = MODELS[name](rng)
    (layer,) = survey(model, batch)
    (expected,) = measured(model, tmp_path, batch).layers
    assert (layer.macs, layer.params) == (expected.macs, expected.params)
    assert layer.output == expected.output
    stored = sum(math.prod(tensor.dims) for tensor in model.graph.initializer)  # with a bias
    assert (layer.first, layer.nodes, layer.bytes) == (True, 1, 4 * stored)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("op", sorted(GATES))
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_macs_of_a_recurrent_layer_are_those_of_its_input_projection_and_of_its_loop(op, direction, batch, rng, tmp_path):
    model = recurrent_model(op, direction, 5, 8, rng)
    layer, loop = survey(model, batch, {"x": (7, batch, 8)})
    onnx.save(model, tmp_path / "model.onnx")
    (whole,) = cost(tmp_path / "model.onnx", batch, {"x": (7, batch, 8)}).layers
    rows = layer.spec.shape[0]  # directions · gates · hidden
    assert (layer.macs, loop.macs) == (7 * batch * rows * 8, 7 * batch * rows * 5)
    assert layer.macs + loop.macs == whole.macs
    assert (layer.spec.op, layer.spec.shape[1], layer.spec.size) == ("recurrent", 8, (7,))
    assert (loop.name, loop.op, loop.spec.shape, loop.spec.size) == ("r", op, (rows, 5), (7,))
    assert layer.output == loop.output == (7, 2 if direction == "bidirectional" else 1, batch, 5)
    assert loop.describe() == f"{op} recurrence 5→{rows} on 7"
    assert loop.signature != layer.signature


def test_a_recurrent_layer_of_which_only_the_last_state_is_used_has_the_shape_of_its_sequence(rng):
    weights = {"w": weight(rng, 1, 20, 8), "r": weight(rng, 1, 20, 5)}
    node = helper.make_node("LSTM", ["x", "w", "r"], ["", "last"], "rnn", hidden_size=5)
    model = one_node(node, weights, {"x": [7, "n", 8]}, {"last": [1, "n", 5]})
    layer, _ = survey(model, 3)
    assert layer.output == (7, 1, 3, 5)
    assert (layer.input_name, layer.output_names) == ("x", ("last",))


def test_a_network_is_listed_in_its_order_with_its_dynamic_batch(small_model):
    layers = survey(small_model, 3)
    assert [(layer.name, layer.op, layer.first) for layer in layers] == [("conv", "Conv", True), ("fc", "Gemm", False)]
    assert [layer.inputs[0] for layer in layers] == [(3, 16, 8, 8), (3, 32)]
    assert [layer.output for layer in layers] == [(3, 32, 8, 8), (3, 10)]
    assert [layer.describe() for layer in layers] == ["Conv 3×3 16→32 on 8×8", "Gemm 32→10"]
    assert layers[0].macs == 3 * survey(small_model, 1)[0].macs


def test_the_argument_is_not_changed(small_model):
    before = small_model.SerializeToString()
    survey(small_model, 3)
    assert small_model.SerializeToString() == before


def test_a_shared_weight_is_one_layer_with_the_macs_of_all_its_nodes(rng):
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "first", pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Conv", ["a", "w"], ["y"], "second", pads=[1] * 4),
    ]
    model = make_model(nodes, {"w": weight(rng, 8, 8, 3, 3)}, {"x": ["n", 8, 6, 6]}, {"y": ["n", 8, 3, 3]})
    (layer,) = survey(model)
    assert (layer.name, layer.nodes, layer.input_name) == ("w", 2, "x")
    assert layer.macs == 2 * 3 * 3 * 8 * 8 * 9


def test_a_layer_that_cannot_be_rewritten_is_left_out_and_the_others_are_listed(rng):
    weights = {"w": weight(rng, 4, 1, 1, 1), "v": weight(rng, 4, 4, 3, 3)}
    nodes = [
        helper.make_node("Conv", ["x", "v"], ["a"], "c"),
        helper.make_node("ReduceSum", ["a", "channels"], ["s"], "sum"),
        helper.make_node("Conv", ["s", "w"], ["b"], "plain"),
        helper.make_node("Conv", ["b", "w"], ["y"], "depthwise", group=4),  # the same weight, in a way that no rule takes
    ]
    weights["channels"] = np.array([1], np.int64)
    model = make_model(nodes, weights, {"x": ["n", 4, 6, 6]}, {"y": ["n", 4, 4, 4]})
    layers = survey(model)
    assert [layer.name for layer in layers] == ["v"]
    assert [(row.name, "depthwise" in row.reason) for row in left_out(model, layers)[1]] == [("w", True)]


def test_a_convolution_in_groups_has_the_macs_of_its_groups(rng):
    node = helper.make_node("Conv", ["x", "w"], ["y"], "c", group=4, strides=[2, 2], pads=[1] * 4)
    model = make_model([node], {"w": weight(rng, 24, 8, 3, 3)}, {"x": ["n", 32, 8, 8]}, {"y": ["n", 24, 4, 4]})
    (layer,) = survey(model)
    assert (layer.spec.shape, layer.spec.groups, layer.spec.inputs) == ((24, 8, 3, 3), 4, 32)
    assert layer.macs == 4 * 4 * 24 * 8 * 9
    assert layer.params == 24 * 8 * 9
    assert layer.describe() == "Conv 3×3 32→24 in 4 groups /2 on 8×8"


def test_nodes_that_share_a_weight_in_different_groups_are_different_layers(rng):
    weights = {"w": weight(rng, 8, 4, 1, 1)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "whole"),
        helper.make_node("Conv", ["a", "w"], ["y"], "halves", group=2),
    ]
    model = make_model(nodes, weights, {"x": ["n", 4, 6, 6]}, {"y": ["n", 8, 6, 6]})
    assert {layer.name: layer.spec.groups for layer in survey(model)} == {"whole": 1, "halves": 2}
    with pytest.raises(GraphError, match=r"2 nodes with 2 different weights or numbers of groups; .*: whole, halves"):
        NamedLayers(import_graph(model)).find("w")


@pytest.mark.slow
def test_layers_behind_computed_initial_states_have_their_shapes():
    """As torch writes a recurrent network: no shape can be inferred behind its first layer."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = torch.nn.LSTM(12, 8, num_layers=2, batch_first=True)
            self.head = torch.nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    model = to_onnx(Net(), torch.randn(2, 7, 12))
    found = survey(model, 3, {model.graph.input[0].name: (3, 7, 12)})
    assert [layer.op for layer in found] == ["LSTM"] * 4 + ["MatMul"]  # input and recurrent weights
    assert all(layer.output is not None and layer.macs for layer in found)


def test_the_work_grows_with_the_layers_and_not_with_their_square(rng, monkeypatch):
    asked = []
    real = sites.names_of
    monkeypatch.setattr(sites, "names_of", lambda node: asked.append(node) or real(node))

    def count(layers):
        chain = [helper.make_node("MatMul", [f"x{k}", f"w{k}"], [f"x{k + 1}"]) for k in range(layers)]
        weights = {f"w{k}": weight(rng, 8, 8) for k in range(layers)}
        model = make_model(chain, weights, {"x0": ["n", 8]}, {f"x{layers}": ["n", 8]})
        asked.clear()
        assert len(survey(model)) == layers
        factorize(model, plan := Plan(layers=tuple(svd(f"w{k}") for k in range(layers))), decompose_graph(model, plan))
        return len(asked)

    assert count(40) == 4 * count(10)


def svd(name):
    return LayerPlan(name=name, format="svd", modes=(8, 8), ranks=(2,))


@pytest.mark.parametrize("rows", ["n", 4])
def test_layers_in_a_body_have_no_known_shapes(rng, rows):
    """Nor do they if the body says its shapes: how often it runs is not known."""
    body = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["inner"], "product")],
        "body",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [rows, 8])],
    )
    nodes = [helper.make_node("If", ["flag"], ["y"], "if", then_branch=body, else_branch=body)]
    model = make_model(nodes, {"w": weight(rng, 8, 8), "flag": np.array(True)}, {"x": [rows, 8]}, {"y": [rows, 8]})
    (layer,) = survey(model)
    assert (layer.name, layer.output, layer.nodes, layer.in_body) == ("w", None, 2, True)


def test_shapes_of_inputs_are_taken_and_wrong_ones_refused(rng):
    model = recurrent_model("GRU", "forward", 5, 8, rng)
    for layer in survey(model, 2, {"x": (11, 2, 8)}):
        assert layer.inputs[0] == (11, 2, 8)
    with pytest.raises(ModelError, match="shapes: unknown input 'z'; the model's inputs are x"):
        survey(model, 2, {"z": (1, 2)})


def test_equal_layers_have_one_signature_and_everything_that_matters_is_in_it(rng):
    def signature(model, batch=1):
        return survey(model, batch)[0].signature

    base = signature(conv(rng, (3, 3), pads=[1] * 4))
    assert signature(conv(rng, (3, 3), "other", pads=[1] * 4)) == base  # another name, other values
    others = [
        signature(conv(rng, (3, 3), pads=[1] * 4), batch=2),
        signature(conv(rng, (3, 3), pads=[1] * 4, strides=[2, 2])),
        signature(conv(rng, (3, 3), pads=[0] * 4)),
        signature(conv(rng, (3, 3), pads=[1] * 4, dilations=[2, 2])),
        signature(conv(rng, (3, 3), pads=[1] * 4, size=10)),
        signature(conv(rng, (3, 1), pads=[1, 0, 1, 0])),
        signature(gemm(rng)),
        signature(gemm(rng, transA=1)),
        signature(matmul(rng)),
        signature(matmul(rng, left=True)),
    ]
    half = conv(rng, (3, 3), pads=[1] * 4)
    for value in (*half.graph.input, *half.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    stored = onnx.numpy_helper.to_array(half.graph.initializer[0]).astype(np.float16)
    half.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(stored, "conv.weight"))
    others.append(signature(half))
    behind = make_model(
        [
            helper.make_node("Relu", ["x"], ["a"], "relu"),
            helper.make_node("Conv", ["a", "conv.weight"], ["y"], "conv", pads=[1] * 4),
        ],
        {"conv.weight": weight(rng, 6, 4, 3, 3)},
        {"x": ["n", 4, 9, 9]},
        {"y": ["n", 6, 9, 9]},
    )
    others.append(signature(behind))  # not the first layer: its data are in the kernels' own layout
    assert all(other != base for other in others)
    assert len({str(other) for other in others}) == len(others)


def test_a_product_whose_data_have_an_unknown_number_of_axes_is_resolved_after_one_run(rng):
    """Squeeze without axes removes those of size 1, and which these are is known in a run only."""
    nodes = [helper.make_node("Squeeze", ["x"], ["row"]), helper.make_node("MatMul", ["row", "w"], ["y"], "product")]
    model = make_model(nodes, {"w": weight(rng, 10, 6)}, {"x": ["n", 1, "m", 10]}, {"y": [None, None, 6]})
    plan = Plan(layers=(LayerPlan(name="w", format="svd", modes=(6, 10), ranks=(4,)),))
    with pytest.raises(GraphError, match="number of axes of its input 'row' is unknown: give the shapes of the inputs"):
        resolve(model, plan)
    before = model.SerializeToString()
    completed = with_known_axes(model, shapes={"x": (2, 1, 3, 10)})
    assert resolve(completed, plan).layers["w"].spec.lead == 2
    assert model.SerializeToString() == before
    assert with_known_axes(completed) is completed
    assert with_known_axes(model) is model  # with sizes of 1, other axes would be removed as well
