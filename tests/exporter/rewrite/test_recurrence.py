"""Recurrent weights of LSTM and GRU nodes as layers of their own: their cores run in the body of a Scan."""

import re

import numpy as np
import onnxruntime as ort
import pytest
from cases import cases, draw_ranks, random_cores, relative
from conftest import make_model
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from recurrent_graphs import GATES, recurrent_model

from tensorrail_exporter import FORMATS, GraphError, LayerPlan, Plan, decompose_graph, factorize, reconstruct
from tensorrail_exporter.precision.fp16 import to_fp16
from tensorrail_exporter.precision.int8 import to_int8
from tensorrail_exporter.rewrite.survey import left_out, survey
from tensorrail_runtime.graphs.cost import cost

HIDDEN, INPUTS, STEPS, BATCH = 4, 6, 5, 3


def run(model, feeds):
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)


def feeds_for(model, rng, steps=STEPS, batch=BATCH):
    """Return random values for the inputs of a model of one node."""
    sizes = {"t": steps, "n": batch}
    shapes = {
        value.name: [sizes.get(axis.dim_param, axis.dim_value) for axis in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def rows_of(op, direction, hidden=HIDDEN):
    return GATES[op] * hidden * (2 if direction == "bidirectional" else 1)


def full_rank(name, shape, form_name="svd"):
    form = FORMATS[form_name]
    modes = form.default_modes(shape)
    return LayerPlan(name=name, format=form_name, modes=modes, ranks=form.clamp(shape, modes, form.uniform(shape, modes, 999)))


def low_rank(name, shape, rank=2):
    return LayerPlan(name=name, format="svd", modes=shape, ranks=(rank,))


def with_opset(model, opset):
    """Set the opset, and take away the attribute `layout`, which came with opset 14."""
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", opset))
    for node in model.graph.node:
        kept = [attribute for attribute in node.attribute if attribute.name != "layout"]
        del node.attribute[:]
        node.attribute.extend(kept)
    return model


def ops_of(model):
    return [node.op_type for node in model.graph.node]


@given(data=st.data())
@cases(60, 400)
def test_any_recurrent_weight_in_cores_equals_its_reconstruction(data):
    op = data.draw(st.sampled_from(sorted(GATES)))
    direction = data.draw(st.sampled_from(["forward", "reverse", "bidirectional"]))
    many = 2 if direction == "bidirectional" else 1
    form_name = data.draw(st.sampled_from(sorted(FORMATS)), "format")
    form, hidden = FORMATS[form_name], data.draw(st.sampled_from([1, 2, 4, 6]), "hidden")
    shape = (many * GATES[op] * hidden, hidden)
    halves = (2, hidden // 2) if hidden % 2 == 0 and form_name != "svd" and data.draw(st.booleans(), "two modes") else (hidden,)
    modes = (many * GATES[op] * halves[0], *halves[1:], *halves) if form_name == "ttm" else (many * GATES[op], hidden, *halves)
    modes = shape if form_name == "svd" else modes
    plans = [draw_ranks(data, "r", form, form_name, shape, modes, "recurrent")]
    shapes = {"r": shape}
    if data.draw(st.booleans(), "the input weight as well"):
        kind = data.draw(st.sampled_from(["svd", "tt", "ttm"]), "format of the input weight")
        inputs = (shape[0], data.draw(st.sampled_from([2, 4])))
        plans.append(draw_ranks(data, "w", FORMATS[kind], kind, inputs, FORMATS[kind].default_modes(inputs), "recurrent"))
        shapes["w"] = inputs
    options = {"linear_before_reset": data.draw(st.integers(0, 1))} if op == "GRU" else {}
    bias, state, cell = (data.draw(st.booleans(), name) for name in ("bias", "initial state", "last state"))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    width = shapes["w"][1] if "w" in shapes else 3
    model = recurrent_model(op, direction, hidden, width, rng, bias=bias, state=state, cell=cell, **options)
    model = with_opset(model, data.draw(st.sampled_from([9, 12, 13, 20]), "opset"))
    plan = Plan(layers=tuple(data.draw(st.permutations(plans), "order")))
    cores = {layer.name: random_cores(layer, shapes[layer.name], rng) for layer in plans}
    factored = factorize(model, plan, cores, block=data.draw(st.sampled_from([1, 4]), "block"))
    assert op not in ops_of(factored.model)
    assert next(layer for layer in factored.layers if layer.layer == "r").steps.endswith(", scan")
    dense = reconstruct(model, plan, cores)
    for batch in (1, 3):
        feeds = feeds_for(model, rng, steps=data.draw(st.integers(1, 4), "steps"), batch=batch)
        for a, b in zip(run(factored.model, feeds), run(dense, feeds), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("names", ["r", "rw"])
@pytest.mark.parametrize("form_name", sorted(set(FORMATS) - {"cp"}))
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("op", sorted(GATES))
def test_full_rank_equals_the_operator(op, direction, form_name, names, rng):
    model = recurrent_model(op, direction, HIDDEN, INPUTS, rng, state=True, cell=True)
    rows = rows_of(op, direction)
    shapes = {"r": (rows, HIDDEN), "w": (rows, INPUTS)}
    plan = Plan(layers=tuple(full_rank(name, shapes[name], form_name) for name in names))
    factored = factorize(model, plan, decompose_graph(model, plan)).model
    feeds = feeds_for(model, rng)
    for a, b in zip(run(factored, feeds), run(model, feeds), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_input_is_projected_before_the_loop_and_only_the_recurrence_is_in_it(rng):
    model = recurrent_model("LSTM", "bidirectional", 8, 64, rng)
    plan = Plan(layers=(low_rank("r", (64, 8)), low_rank("w", (64, 64), 3)))
    factored = factorize(model, plan, decompose_graph(model, plan))
    assert [op for op in ops_of(factored.model) if op in ("MatMul", "LSTM", "Scan")] == ["MatMul", "MatMul", "Scan", "Scan"]
    bodies = [node.attribute[0].g for node in factored.model.graph.node if node.op_type == "Scan"]
    assert all([node.op_type for node in body.node][:2] == ["MatMul", "Gemm"] for body in bodies)
    stored = {tensor.name: list(tensor.dims) for tensor in factored.model.graph.initializer}
    assert stored["r/1"] == [8, 2]  # both directions read the same input cores
    assert {"r", "w"} & set(stored) == set()
    assert [layer.stored_params for layer in factored.layers] == [8 * 2 + 2 * 64, 64 * 3 + 3 * 64]


def test_costs_are_those_of_the_written_graph(rng, tmp_path):
    model = recurrent_model("GRU", "bidirectional", 8, 4, rng, linear_before_reset=0, bias=False)
    plan = Plan(layers=(low_rank("r", (48, 8)),))
    factored = factorize(model, plan, decompose_graph(model, plan))
    (tmp_path / "model.onnx").write_bytes(factored.model.SerializeToString())
    counted = cost(tmp_path / "model.onnx", 1, {"x": (16, 1, 4)})  # 16 is the number of steps that an unknown one counts as
    assert factored.layers[0].flops == counted.flops - 2 * 16 * 48 * 4
    assert factored.layers[0].stored_params == counted.params - 48 * 4


@pytest.mark.parametrize(
    ("op", "options", "attrs", "reason"),
    [
        ("LSTM", {"lengths": True}, {}, "a node with sequence lengths"),
        ("GRU", {"layout": 1}, {}, r"a node with the batch as first axis \(layout 1\)"),
        ("GRU", {}, {"clip": 1.0}, "a node with the attribute clip"),
        ("GRU", {}, {"activations": ["Sigmoid", "Relu"]}, "a node with the activations Sigmoid, Relu"),
        ("LSTM", {}, {"input_forget": 1}, "a node with input_forget"),
    ],
)
def test_nodes_without_a_scan_keep_their_recurrent_weight_with_the_reason(op, options, attrs, reason, rng):
    model = recurrent_model(op, "forward", HIDDEN, INPUTS, rng, **options, **attrs)
    plan = Plan(layers=(low_rank("r", (GATES[op] * HIDDEN, HIDDEN)),))
    with pytest.raises(
        GraphError, match=f"layer r: cannot be rewritten: its cores run in a Scan, and none is written for {reason}; leave it"
    ):
        decompose_graph(model, plan)
    layers = survey(model, 2, {"x": (STEPS, 2, INPUTS)})
    assert [layer.name for layer in layers] == ["w"]
    _, (row,) = left_out(model, layers)
    assert (row.name, row.op, row.params) == ("r", op, GATES[op] * HIDDEN**2)
    assert re.match(f"its cores run in a Scan, and none is written for {reason}; leave it dense", row.reason)


def test_peepholes_keep_the_recurrent_weight(rng):
    model = recurrent_model("LSTM", "forward", HIDDEN, INPUTS, rng)
    (node,) = model.graph.node
    node.input.extend([""] * (7 - len(node.input)) + ["p"])
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1, 3 * HIDDEN), np.float32), "p"))
    with pytest.raises(GraphError, match="none is written for a node with peepholes"):
        decompose_graph(model, Plan(layers=(low_rank("r", (16, 4)),)))


def test_without_a_scan_a_planned_recurrent_weight_is_an_error(rng):
    model = recurrent_model("GRU", "forward", HIDDEN, INPUTS, rng)
    plan = Plan(layers=(low_rank("r", (12, 4)),))
    cores = decompose_graph(model, plan)
    with pytest.raises(GraphError, match="layer r: the cores of a recurrent weight run in a Scan, which is ruled out here"):
        factorize(model, plan, cores, scan=False)
    layers = survey(model, 2, {"x": (5, 2, 6)}, scan=False)
    assert [layer.name for layer in layers] == ["w"]
    _, (row,) = left_out(model, layers, scan=False)
    assert (row.name, row.params) == ("r", 48)
    assert row.reason.startswith("the cores of a recurrent weight run in a Scan, which is ruled out here")
    old = with_opset(model, 8)
    with pytest.raises(GraphError, match="expected opset 9 and IR version 4 or later, got opset 8 and IR version"):
        factorize(old, plan, cores)
    layers = survey(old, 2, {"x": (5, 2, 6)})
    assert [layer.name for layer in layers] == ["w"]
    _, (row,) = left_out(old, layers)
    assert "expected opset 9 and IR version 4 or later, got opset 8" in row.reason


def test_every_recurrent_weight_has_one_row_and_its_own_reason(rng):
    model = two_nodes(rng, "r")
    layers = survey(model, 1, {"x": (5, 1, 4)})
    assert [layer.name for layer in layers] == ["w", "r", "v"]
    assert left_out(model, layers) == (layers, ())
    for node in model.graph.node:
        if node.op_type == "GRU":
            node.attribute.append(helper.make_attribute("clip", 1.0))
    model.graph.node[0].input[2] = "made"  # a constant that the graph computes
    model.graph.node.insert(0, helper.make_node("Identity", ["r"], ["made"]))
    _, rows = left_out(model, survey(model, 1, {"x": (5, 1, 4)}))
    assert [(row.name, row.params) for row in rows] == [("r", 48)]
    assert "a node with the attribute clip" in rows[0].reason


def test_recurrent_weights_are_among_the_layers_that_a_message_lists(rng):
    model = two_nodes(rng, "q")
    with pytest.raises(GraphError, match=r"layer nowhere: not in the graph; its layers with weights are q, r, v, w$"):
        decompose_graph(model, Plan(layers=(low_rank("nowhere", (12, 4)),)))


@pytest.mark.parametrize("shape", [(1, 15, 4), (1, 16, 3), (16, 4)])
def test_a_recurrent_weight_of_another_shape_is_refused(shape, rng):
    model = recurrent_model("LSTM", "forward", HIDDEN, INPUTS, rng)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == "r"]
    tensor.CopyFrom(numpy_helper.from_array(np.ones(shape, np.float32), "r"))
    with pytest.raises(
        GraphError, match=r"(recurrent weight of shape \(1, 4 · hidden, hidden\), got .*; export .* again|does not pass)"
    ):
        decompose_graph(model, Plan(layers=(low_rank("r", (16, 4)),)))


def two_nodes(rng, second):
    """Return two GRU nodes in a row, the second one with another recurrent weight or with that of the first."""
    weights = {name: rng.standard_normal((1, 12, 4)).astype(np.float32) / 3 for name in ("w", "v", "r", "q")}
    nodes = [
        helper.make_node("GRU", ["x", "w", "r"], ["h"], "first", hidden_size=4),
        helper.make_node("Squeeze", ["h", "axis"], ["s"], "squeeze"),
        helper.make_node("GRU", ["s", "v", second], ["y"], "second", hidden_size=4),
    ]
    weights["axis"] = np.array([1])
    return make_model(nodes, weights, {"x": ["t", "n", 4]}, {"y": ["t", 1, "n", 4]})


def test_nodes_that_share_a_recurrent_weight_are_one_layer(rng):
    model = two_nodes(rng, "r")
    layer = next(layer for layer in survey(model, 1, {"x": (5, 1, 4)}) if layer.name == "r")
    assert (layer.nodes, layer.macs) == (2, 2 * 5 * 12 * 4)
    plan = Plan(layers=(low_rank("r", (12, 4)), low_rank("v", (12, 4))))
    cores = decompose_graph(model, plan)
    factored = factorize(model, plan, cores)
    assert ops_of(factored.model).count("Scan") == 2
    assert "GRU" not in ops_of(factored.model)
    feeds = feeds_for(model, rng)
    np.testing.assert_allclose(run(factored.model, feeds)[0], run(reconstruct(model, plan, cores), feeds)[0], atol=1e-5)


def test_the_name_of_a_node_is_that_of_its_input_weight(rng):
    model = two_nodes(rng, "q")
    assert [layer.name for layer in survey(model, 1, {"x": (5, 1, 4)})] == ["w", "r", "v", "q"]
    plan = Plan(layers=(low_rank("first", (12, 4)), low_rank("q", (12, 4))))
    factored = factorize(model, plan, decompose_graph(model, plan))
    assert [op for op in ops_of(factored.model) if op in ("GRU", "Scan")] == ["GRU", "Scan"]
    with pytest.raises(GraphError, match="layer first: is also planned as w"):
        decompose_graph(model, Plan(layers=(low_rank("w", (12, 4)), low_rank("first", (12, 4)))))


def test_one_constant_in_both_places_is_the_input_weight(rng):
    weights = {"both": rng.standard_normal((1, 16, 4)).astype(np.float32)}
    node = helper.make_node("LSTM", ["x", "both", "both"], ["y"], "n", hidden_size=4)
    model = make_model([node], weights, {"x": ["t", "n", 4]}, {"y": ["t", 1, "n", 4]})
    assert [layer.name for layer in survey(model, 1, {"x": (5, 1, 4)})] == ["both"]
    plan = Plan(layers=(low_rank("both", (16, 4)),))
    assert "LSTM" in ops_of(factorize(model, plan, decompose_graph(model, plan)).model)


def test_a_computed_recurrent_weight_is_folded_and_one_from_an_input_refused(rng):
    model = recurrent_model("LSTM", "forward", HIDDEN, INPUTS, rng)
    model.graph.node[0].input[2] = "made"
    model.graph.node.insert(0, helper.make_node("Identity", ["r"], ["made"]))
    plan = Plan(layers=(low_rank("r", (16, 4)),))
    cores = decompose_graph(model, plan)
    factored = factorize(model, plan, cores).model
    assert "LSTM" not in ops_of(factored)
    feeds = feeds_for(model, rng)
    np.testing.assert_allclose(run(factored, feeds)[0], run(reconstruct(model, plan, cores), feeds)[0], atol=1e-5)
    weights = {"w": np.ones((1, 16, 6), np.float32)}
    node = helper.make_node("LSTM", ["x", "w", "r"], ["y"], "n", hidden_size=4)
    given_one = make_model([node], weights, {"x": ["t", "n", 6], "r": [1, 16, 4]}, {"y": ["t", 1, "n", 4]})
    with pytest.raises(
        GraphError, match="its recurrent weight 'r' is computed in the graph, not a constant; store it in the model"
    ):
        decompose_graph(given_one, plan)


def stored_types(model):
    """Return the types of the constants of more than one axis, in the graph and in the bodies of its nodes, by name."""
    bodies = [attribute.g for node in model.graph.node for attribute in node.attribute if attribute.name == "body"]
    tensors = [tensor for graph in (model.graph, *bodies) for tensor in graph.initializer if len(tensor.dims) > 1]
    return {tensor.name: TensorProto.DataType.Name(tensor.data_type) for tensor in tensors}


@pytest.mark.parametrize(
    ("smaller", "types", "error"),
    [
        (to_fp16, {"r/input_weight": "FLOAT16", "r/1": "FLOAT16", "r/0": "FLOAT16", "r/0_2": "FLOAT16"}, 2e-3),
        # Nothing in the body of a node becomes int8, nor what bodies read.
        (to_int8, {"r/input_weight_quantized": "INT8", "r/1": "FLOAT", "r/0": "FLOAT", "r/0_2": "FLOAT"}, 0.03),
    ],
)
def test_cores_in_a_scan_survive_narrower_types(smaller, types, error, rng):
    model = recurrent_model("LSTM", "bidirectional", 8, 24, rng)
    plan = Plan(layers=(low_rank("r", (64, 8), 4),))
    factored = factorize(model, plan, decompose_graph(model, plan)).model
    assert set(stored_types(factored).values()) == {"FLOAT"}
    feeds = feeds_for(model, rng)
    narrow = to_int8(factored, [feeds]) if smaller is to_int8 else smaller(factored)
    assert stored_types(narrow) == types
    (got,), (exact,) = run(narrow, feeds), run(factored, feeds)
    assert got.shape == exact.shape
    assert 1e-6 < relative(got, exact) < error
