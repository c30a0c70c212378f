"""LSTM and GRU nodes as ONNX defines them: directions, states, lengths, layouts; and weights that are still slices."""

import contextlib
from dataclasses import replace
from unittest import mock

import numpy as np
import onnxruntime as ort
import pytest
from cases import cases, draw_plan, random_cores
from conftest import make_model
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from recurrent_graphs import GATES, recurrent_model

from tensorrail_exporter import FORMATS, GraphError, LayerPlan, Plan, decompose_graph, factorize, reconstruct
from tensorrail_exporter.formats import contraction
from tensorrail_exporter.formats.contraction import LayerSpec
from tensorrail_exporter.precision.fp16 import to_fp16
from tensorrail_exporter.precision.int8 import to_int8
from tensorrail_exporter.rewrite.rules import scan


def run(model, feeds):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def draw_node(data):
    """Draw an operator, its direction and how many directions that are."""
    op = data.draw(st.sampled_from(sorted(GATES)))
    direction = data.draw(st.sampled_from(["forward", "reverse", "bidirectional"]))
    return op, direction, 2 if direction == "bidirectional" else 1


def states(op, many, batch, hidden, rng):
    """Return initial states by the names that `recurrent_model` gives them."""
    names = ("h", "c") if op == "LSTM" else ("h",)
    return {name: rng.standard_normal((many, batch, hidden)).astype(np.float32) for name in names}


@given(data=st.data())
@cases(40, 300)
def test_any_recurrent_node_equals_its_reconstruction(data):
    op, direction, many = draw_node(data)
    shape, plan = draw_plan(data, "w", data.draw(st.sampled_from(sorted(FORMATS))), op="recurrent")
    hidden = shape[0]
    shape = (many * GATES[op] * hidden, shape[1])
    if plan.format == "svd":
        modes = shape
    elif plan.format == "ttm":
        modes = (plan.modes[0] * many * GATES[op], *plan.modes[1:])
    else:
        modes = (many * GATES[op], *plan.modes)
    form = FORMATS[plan.format]
    wanted = form.uniform(shape, modes, data.draw(st.integers(1, 6)))
    plan = plan.model_copy(update={"modes": modes, "ranks": form.clamp(shape, modes, wanted)})
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    state, lengths = data.draw(st.booleans(), "initial state"), data.draw(st.booleans(), "lengths")
    options = {"linear_before_reset": data.draw(st.integers(0, 1))} if op == "GRU" else {}
    bias, cell = data.draw(st.booleans(), "bias"), data.draw(st.booleans(), "last state")
    model = recurrent_model(op, direction, hidden, shape[1], rng, bias=bias, state=state, lengths=lengths, cell=cell, **options)
    one = Plan(layers=(plan,))
    cores = {"w": random_cores(plan, shape, rng)}
    block = data.draw(st.sampled_from([1, 4]), "block")
    factored, dense = factorize(model, one, cores, block=block).model, reconstruct(model, one, cores)
    for batch in (1, 3):
        feeds = {"x": rng.standard_normal((5, batch, shape[1])).astype(np.float32)}
        if lengths:
            feeds["lengths_f"] = np.array([4, 1, 5][:batch], np.float32)
        if state:
            feeds |= states(op, many, batch, hidden, rng)
        for a, b in zip(run(factored, feeds), run(dense, feeds), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("form_name", FORMATS)
@pytest.mark.parametrize("op", sorted(GATES))
def test_full_rank_keeps_the_outputs(op, form_name, rng):
    model = recurrent_model(op, "bidirectional", 4, 6, rng, state=True, cell=True)
    form, shape = FORMATS[form_name], (2 * GATES[op] * 4, 6)
    modes = form.default_modes(shape)
    ranks = form.clamp(shape, modes, form.uniform(shape, modes, 6 if form_name == "cp" else 999))
    plan = Plan(layers=(LayerPlan(name="rnn", format=form_name, modes=modes, ranks=ranks),))
    factored = factorize(model, plan, decompose_graph(model, plan))
    feeds = {"x": rng.standard_normal((5, 2, 6)).astype(np.float32)}
    feeds |= states(op, 2, 2, 4, rng)
    if factored.layers[0].weight_error < 1e-5:  # cp stops where alternating least squares does
        for a, b in zip(run(factored.model, feeds), run(model, feeds), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
    else:
        assert form_name == "cp"
        assert factored.layers[0].weight_error < 0.5


@pytest.mark.parametrize("op", sorted(GATES))
def test_layout_1_has_the_batch_first(op, rng):
    """ONNX Runtime runs layout 0 only: the rewritten graph is checked and run by onnx's own reference instead."""
    from onnx.reference import ReferenceEvaluator

    model = recurrent_model(op, "forward", 4, 6, rng, layout=1)
    shape = (GATES[op] * 4, 6)
    plan = Plan(layers=(LayerPlan(name="w", format="tt", modes=shape, ranks=(1, 3, 1)),))
    cores = decompose_graph(model, plan)
    x = rng.standard_normal((2, 5, 6)).astype(np.float32)
    outputs = [
        ReferenceEvaluator(graph).run(None, {"x": x})[0]
        for graph in (factorize(model, plan, cores).model, reconstruct(model, plan, cores))
    ]
    np.testing.assert_allclose(*outputs, atol=1e-5)


def test_only_the_input_weight_is_replaced(rng):
    model = recurrent_model("LSTM", "forward", 8, 64, rng)
    plan = Plan(layers=(LayerPlan(name="w", format="tt", modes=(32, 8, 8), ranks=(1, 3, 3, 1)),))
    factored = factorize(model, plan, decompose_graph(model, plan))
    names = {tensor.name: list(tensor.dims) for tensor in factored.model.graph.initializer}
    assert {"r", "b"} <= set(names)
    assert "w" not in names
    (lstm,) = [node for node in factored.model.graph.node if node.op_type == "LSTM"]
    assert names[lstm.input[1]] == [1, 32, 3]  # the recurrence's input is 3 wide, not 64
    assert factored.layers[0].op == "LSTM"


def with_opset(model, opset):
    """Set the opset, and take away the attribute `layout`, which came with opset 14."""
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", opset))
    for node in model.graph.node:
        kept = [attribute for attribute in node.attribute if attribute.name != "layout"]
        del node.attribute[:]
        node.attribute.extend(kept)
    return model


def paired(op, direction, hidden, inputs):
    """Return a plan in the format without a boundary between input and output."""
    gates = GATES[op] * (2 if direction == "bidirectional" else 1)
    return Plan(layers=(LayerPlan(name="w", format="ttm", modes=(gates, hidden, inputs // 4, 4), ranks=(1, 2, 1)),))


@pytest.mark.parametrize("opset", [8, 14])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("op", sorted(GATES))
def test_the_identity_behind_a_ttm_is_made_by_the_graph_and_not_stored(op, direction, opset, rng):
    model = with_opset(recurrent_model(op, direction, 4, 24, rng), opset)
    rows = GATES[op] * 4 * (2 if direction == "bidirectional" else 1)
    plan = paired(op, direction, 4, 24)
    cores = decompose_graph(model, plan)
    factored = factorize(model, plan, cores).model
    stored = {t.name: int(np.prod(t.dims)) for t in factored.graph.initializer if t.data_type == TensorProto.FLOAT}
    assert sum(stored.values()) == (rows**2 if opset < 9 else 0) + sum(core.size for core in cores["w"]) + sum(
        int(np.prod(t.dims)) for t in model.graph.initializer if t.name in ("r", "b")
    )
    x = rng.standard_normal((5, 3, 24)).astype(np.float32)
    for a, b in zip(run(factored, {"x": x}), run(reconstruct(model, plan, cores), {"x": x}), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@given(data=st.data())
@cases(40, 300)
def test_a_scan_equals_the_node_in_whose_place_it_stands(data):
    op, direction, many = draw_node(data)
    hidden, steps = data.draw(st.integers(2, 5), "hidden"), data.draw(st.integers(1, 4), "steps")
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    options = {"linear_before_reset": data.draw(st.integers(0, 1))} if op == "GRU" else {}
    if data.draw(st.booleans(), "activations"):
        options["activations"] = ["Sigmoid", "Tanh", *(["Tanh"] if op == "LSTM" else [])] * many
    bias, state, cell = (data.draw(st.booleans(), name) for name in ("bias", "initial state", "last state"))
    model = recurrent_model(op, direction, hidden, 8, rng, bias=bias, state=state, cell=cell, **options)
    model = with_opset(model, data.draw(st.sampled_from([9, 12, 13, 20])))
    plan = paired(op, direction, hidden, 8)
    cores = decompose_graph(model, plan)
    with mock.patch.object(contraction, "SCAN_FROM", 1):
        factored = factorize(model, plan, cores)
    assert op not in {node.op_type for node in factored.model.graph.node}
    assert factored.layers[0].steps.endswith(", scan")
    dense = reconstruct(model, plan, cores)
    for batch in (1, 3):
        feeds = {"x": rng.standard_normal((steps, batch, 8)).astype(np.float32)}
        if state:
            feeds |= states(op, many, batch, hidden, rng)
        for a, b in zip(run(factored.model, feeds), run(dense, feeds), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("op", sorted(GATES))
def test_wide_layers_run_as_a_scan_unless_it_is_not_wanted_or_they_have_a_boundary(op, rng):
    def ops(hidden, plan, **options):
        model = recurrent_model(op, "forward", hidden, 24, rng)
        factored = factorize(model, plan, decompose_graph(model, plan), **options)
        return {node.op_type for node in factored.model.graph.node}, factored.layers[0].steps

    narrow, wide = contraction.SCAN_FROM // GATES[op] - 1, -(-contraction.SCAN_FROM // GATES[op])
    assert "Scan" in ops(wide, paired(op, "forward", wide, 24))[0]
    for hidden, plan, options in (
        (narrow, paired(op, "forward", narrow, 24), {}),
        (wide, paired(op, "forward", wide, 24), {"scan": False}),
        (wide, Plan(layers=(LayerPlan(name="w", format="tt", modes=(GATES[op] * wide, 24), ranks=(1, 4, 1)),)), {}),
    ):
        found, steps = ops(hidden, plan, **options)
        assert op in found
        assert "Scan" not in found
        assert "scan" not in steps


@pytest.mark.parametrize(
    ("op", "options", "attrs"),
    [
        ("LSTM", {"lengths": True}, {}),
        ("GRU", {}, {"clip": 1.0}),
        ("GRU", {}, {"activations": ["Sigmoid", "Relu"]}),
        ("LSTM", {}, {"activations": ["Sigmoid", "Tanh", "Sigmoid"]}),
        ("LSTM", {}, {"input_forget": 1}),
    ],
)
def test_what_a_scan_does_not_do_stays_the_node(op, options, attrs, rng, monkeypatch):
    monkeypatch.setattr(contraction, "SCAN_FROM", 1)
    model = recurrent_model(op, "forward", 4, 24, rng, **options, **attrs)
    plan = paired(op, "forward", 4, 24)
    cores = decompose_graph(model, plan)
    factored = factorize(model, plan, cores)
    assert op in {node.op_type for node in factored.model.graph.node}
    assert "scan" not in factored.layers[0].steps
    feeds = {"x": rng.standard_normal((5, 3, 24)).astype(np.float32)}
    if "lengths" in options:
        feeds["lengths_f"] = np.array([5, 2, 1], np.float32)
    for a, b in zip(run(factored.model, feeds), run(reconstruct(model, plan, cores), feeds), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "change"),
    [
        ("opset 8", lambda model: with_opset(model, 8)),
        ("IR version 3", lambda model: setattr(with_opset(model, 9), "ir_version", 3)),
    ],
)
def test_old_files_hold_no_scan(old, change, rng, monkeypatch):
    monkeypatch.setattr(contraction, "SCAN_FROM", 1)
    model = recurrent_model("GRU", "forward", 4, 24, rng)
    change(model)
    if model.ir_version < 4:
        known = {value.name for value in model.graph.input}
        model.graph.input.extend(
            helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer if t.name not in known
        )
    plan = paired("GRU", "forward", 4, 24)
    cores = decompose_graph(model, plan)
    factored = factorize(model, plan, cores)
    assert "GRU" in {node.op_type for node in factored.model.graph.node}
    assert not factored.layers[0].scan
    assert "scan" not in factored.layers[0].steps
    feeds = {"x": rng.standard_normal((5, 3, 24)).astype(np.float32)}
    np.testing.assert_allclose(run(factored.model, feeds)[0], run(reconstruct(model, plan, cores), feeds)[0], atol=1e-5)


@pytest.mark.parametrize(("name", "shape"), [("r", (16, 4)), ("r", (1, 15, 4)), ("b", (1, 16)), ("b", (32,))])
def test_weights_of_other_shapes_are_left_to_the_node(name, shape, rng, monkeypatch):
    monkeypatch.setattr(contraction, "SCAN_FROM", 1)
    model = recurrent_model("LSTM", "forward", 4, 24, rng)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    tensor.CopyFrom(numpy_helper.from_array(np.ones(shape, np.float32), name))
    plan = paired("LSTM", "forward", 4, 24)
    with contextlib.suppress(GraphError):  # which says that the graph does not pass onnx's checker
        factored = factorize(model, plan, decompose_graph(model, plan))
        assert "LSTM" in {node.op_type for node in factored.model.graph.node}


def test_a_computed_weight_of_another_shape_is_refused_by_name(rng, monkeypatch):
    monkeypatch.setattr(contraction, "SCAN_FROM", 1)
    model = recurrent_model("LSTM", "forward", 4, 24, rng)
    (node,) = model.graph.node
    for tensor in model.graph.initializer:
        if tensor.name == "r":
            tensor.CopyFrom(numpy_helper.from_array(np.ones((1, 16, 5), np.float32), "r"))
    node.input[2] = "made"
    kept = [helper.make_node("Identity", ["r"], ["made"]), node]
    body = list(kept)
    del model.graph.node[:]
    model.graph.node.extend(body)
    plan = paired("LSTM", "forward", 4, 24)
    cores = decompose_graph(model, plan)
    monkeypatch.setattr(scan, "_is", lambda *_: True)  # as where its shape cannot be inferred
    with pytest.raises(GraphError, match=r"layer w: 'made' is of shape \[1, 16, 5\]: expected a constant of shape \[1, 16, 4"):
        factorize(model, plan, cores)


@pytest.mark.parametrize("form", ["tucker", "tt", "cp"])
def test_a_scan_changes_no_choice_of_merge(form):
    spec = LayerSpec("recurrent", (1024, 1024), lead=2, size=(50,))
    for rank in (4, 8, 16):
        modes = (32, 32, 16, 64)
        kind = FORMATS[form]
        ranks = kind.clamp(spec.shape, modes, kind.uniform(spec.shape, modes, rank))
        plan = LayerPlan(name="w", format=form, modes=modes, ranks=ranks)
        assert plan.merge_for(replace(spec, scan=True)) == plan.merge_for(spec)


def test_a_scan_keeps_peepholes_out(rng, monkeypatch):
    monkeypatch.setattr(contraction, "SCAN_FROM", 1)
    model = recurrent_model("LSTM", "forward", 4, 24, rng)
    (node,) = model.graph.node
    node.input.extend([""] * (7 - len(node.input)) + ["p"])
    model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal((1, 12)).astype(np.float32), "p"))
    plan = paired("LSTM", "forward", 4, 24)
    cores = decompose_graph(model, plan)
    factored = factorize(model, plan, cores).model
    assert "LSTM" in {node.op_type for node in factored.graph.node}
    feeds = {"x": rng.standard_normal((5, 3, 24)).astype(np.float32)}
    np.testing.assert_allclose(run(factored, feeds)[0], run(reconstruct(model, plan, cores), feeds)[0], atol=1e-5)


@pytest.mark.parametrize("wanted", [(1,), (2,), (1, 2), (0, 2)])
def test_a_scan_gives_only_the_outputs_that_are_used(wanted, rng, monkeypatch):
    monkeypatch.setattr(contraction, "SCAN_FROM", 1)
    model = recurrent_model("LSTM", "bidirectional", 4, 24, rng)
    names = [name if place in wanted else "" for place, name in enumerate(("y", "h_last", "c_last"))]
    del model.graph.node[0].output[:]
    model.graph.node[0].output.extend(names)
    axes = {"y": ["t", 2, "n", 4], "h_last": [2, "n", 4], "c_last": [2, "n", 4]}
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, axes[name]) for name in names if name)
    plan = paired("LSTM", "bidirectional", 4, 24)
    cores = decompose_graph(model, plan)
    factored = factorize(model, plan, cores).model
    feeds = {"x": rng.standard_normal((5, 3, 24)).astype(np.float32)}
    for a, b in zip(run(factored, feeds), run(reconstruct(model, plan, cores), feeds), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    (first, _) = [node for node in factored.graph.node if node.op_type == "Scan"]
    assert len(first.output) == 2 + (0 in wanted)


@pytest.mark.parametrize("smaller", [to_fp16, lambda model: to_int8(model, [{"x": np.ones((5, 3, 24), np.float32)}])])
def test_a_scan_survives_narrower_types(smaller, rng, monkeypatch):
    monkeypatch.setattr(contraction, "SCAN_FROM", 1)
    model = recurrent_model("LSTM", "bidirectional", 4, 24, rng)
    plan = paired("LSTM", "bidirectional", 4, 24)
    factored = factorize(model, plan, decompose_graph(model, plan)).model
    feeds = {"x": np.ones((5, 3, 24), np.float32)}
    (made,), (exact,) = run(smaller(factored), feeds), run(factored, feeds)
    assert made.shape == exact.shape
    assert np.linalg.norm(made - exact) < 0.1 * np.linalg.norm(exact)


def batch_first(rng, *, perm=(1, 0, 2), used_again=False):
    """Return a GRU behind a Transpose, as torch writes one with `batch_first`."""
    inner = recurrent_model("GRU", "forward", 4, 24, rng)
    turned = helper.make_node("Transpose", ["x_first"], ["x"], "first", perm=list(perm))
    nodes, outputs = [turned, *inner.graph.node], {"y": ["t", 1, "n", 4]}
    if used_again:
        nodes.append(helper.make_node("ReduceMax", ["x"], ["largest"], "largest", keepdims=0))
        outputs["largest"] = []
    axes = ["n", "t"] if tuple(perm) == (1, 0, 2) else ["t", "n"]
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in inner.graph.initializer}
    return make_model(nodes, weights, {"x_first": [*axes, 24]}, outputs)


@pytest.mark.parametrize(
    ("options", "form", "moved"),
    [
        ({}, "tt", True),
        ({}, "ttm", True),
        ({"used_again": True}, "tt", False),
        ({"perm": (0, 1, 2)}, "tt", False),
    ],
)
def test_a_transpose_of_batch_and_time_moves_behind_the_projection(options, form, moved, rng):
    model = batch_first(rng, **options)
    tt = Plan(layers=(LayerPlan(name="w", format="tt", modes=(12, 24), ranks=(1, 3, 1)),))
    plan = tt if form == "tt" else paired("GRU", "forward", 4, 24)
    cores = decompose_graph(model, plan)
    factored = factorize(model, plan, cores).model
    (turn,) = [node for node in factored.graph.node if node.op_type == "Transpose"]
    assert (turn.input[0] != "x_first") == moved
    feeds = {"x_first": rng.standard_normal((3, 5, 24)).astype(np.float32)}
    for a, b in zip(run(factored, feeds), run(reconstruct(model, plan, cores), feeds), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_transpose_stays_where_the_gates_are_more_than_the_inputs(rng):
    wide = recurrent_model("GRU", "forward", 16, 24, rng)
    turned = helper.make_node("Transpose", ["x_first"], ["x"], "first", perm=[1, 0, 2])
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in wide.graph.initializer}
    model = make_model([turned, *wide.graph.node], weights, {"x_first": ["n", "t", 24]}, {"y": ["t", 1, "n", 16]})
    plan = paired("GRU", "forward", 16, 24)  # 48 gates
    factored = factorize(model, plan, decompose_graph(model, plan)).model
    (turn,) = [node for node in factored.graph.node if node.op_type == "Transpose"]
    assert turn.input[0] == "x_first"


def test_weights_that_are_slices_of_parameters_are_folded(rng):
    """As an exporter writes them that has not folded constants: torch's gates i f g o, put in ONNX's order i o f g."""
    hidden, inputs = 4, 6
    model = recurrent_model("LSTM", "forward", hidden, inputs, rng)
    (node,) = model.graph.node
    parameter = rng.standard_normal((4 * hidden, inputs)).astype(np.float32)
    kept = [tensor for tensor in model.graph.initializer if tensor.name != "w"]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, numpy_helper.from_array(parameter, "rnn.weight_ih_l0")])
    gates = {name: [k * hidden, (k + 1) * hidden] for k, name in enumerate("ifgo")}
    for name, (start, end) in gates.items():
        for suffix, value in (("from", start), ("to", end)):
            model.graph.initializer.append(numpy_helper.from_array(np.array([value]), f"{name}_{suffix}"))
    for name in ("axis0", "zero"):
        model.graph.initializer.append(numpy_helper.from_array(np.array([0]), name))
    nodes = [helper.make_node("Slice", ["rnn.weight_ih_l0", f"{name}_from", f"{name}_to", "axis0"], [name]) for name in gates]
    nodes.append(helper.make_node("Concat", list("iofg"), ["joined"], axis=0))
    nodes.append(helper.make_node("Unsqueeze", ["joined", "zero"], ["whole"]))
    node.input[1] = "whole"
    body = [*nodes, node]
    del model.graph.node[:]
    model.graph.node.extend(body)
    plan = Plan(layers=(LayerPlan(name="rnn.weight_ih_l0", format="svd", modes=(16, 6), ranks=(6,)),))
    cores = decompose_graph(model, plan)
    np.testing.assert_allclose(plan.layers[0].reconstruct(cores["rnn.weight_ih_l0"], (16, 6)), parameter, atol=1e-5)
    factored = factorize(model, plan, cores).model
    assert {node.op_type for node in factored.graph.node} == {"MatMul", "LSTM"}
    feeds = {"x": rng.standard_normal((5, 2, 6)).astype(np.float32)}
    np.testing.assert_allclose(run(factored, feeds)[0], run(model, feeds)[0], atol=1e-5)


def test_a_plain_rnn_and_a_computed_weight_are_refused(rng):
    weights = {"w": np.ones((1, 4, 6), np.float32), "r": np.ones((1, 4, 4), np.float32)}
    plan = Plan(layers=(LayerPlan(name="n", format="tt", modes=(4, 6), ranks=(1, 2, 1)),))
    node = helper.make_node("RNN", ["x", "w", "r"], ["y"], "n", hidden_size=4)
    model = make_model([node], weights, {"x": ["t", "n", 6]}, {"y": ["t", 1, "n", 4]})
    with pytest.raises(GraphError, match="layer n: cannot be rewritten: it is a plain RNN"):
        decompose_graph(model, plan)
    node = helper.make_node("GRU", ["x", "v", "r"], ["y"], "n", hidden_size=4)
    model = make_model(
        [node], {"r": np.ones((1, 12, 4), np.float32)}, {"x": ["t", "n", 6], "v": [1, 12, 6]}, {"y": ["t", 1, "n", 4]}
    )
    with pytest.raises(GraphError, match="its input weight 'v' is computed in the graph"):
        decompose_graph(model, plan)
