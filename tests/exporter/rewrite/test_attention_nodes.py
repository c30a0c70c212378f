"""com.microsoft.Attention becomes steps, a Split and a MultiHeadAttention that computes the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from attention_graphs import (
    BATCH,
    FEATURES,
    HEADS,
    MASKS,
    PADDED,
    TOKENS,
    attended,
    attention_model,
    behind_an_embedding,
    feed_of,
)
from cases import cases, draw_ranks, random_cores, relative
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tensorrail_exporter import FORMATS, GraphError, LayerPlan, Plan, decompose_graph, factorize, reconstruct
from tensorrail_exporter.precision.reduce import to_int8
from tensorrail_exporter.rewrite.biases import add_biases, takes_bias
from tensorrail_exporter.rewrite.layer_errors import layer_errors
from tensorrail_exporter.rewrite.resolve import resolve
from tensorrail_exporter.rewrite.survey import left_out, survey, with_known_axes
from tensorrail_exporter.search.planner import plan_network
from tensorrail_exporter.search.stitched import Change, StitchedNetwork
from tensorrail_exporter.search.targets import Search
from tensorrail_runtime.measure.timing import Conditions, Timing
from tensorrail_runtime.sessions.session import Session

ROUNDING = 1e-5  # relative L2: another order of sums in float32
SHAPES = {"x": (BATCH, TOKENS, FEATURES)}
FULL = Plan(layers=(LayerPlan(name="qkv", format="svd", modes=(3 * FEATURES, FEATURES), ranks=(FEATURES,)),))


def run(model, feed):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0]


def ops(model):
    return [node.op_type for node in model.graph.node]


def full_rank(model):
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "qkv.weight")
    layer = LayerPlan(name="qkv", format="svd", modes=tuple(reversed(weight.dims)), ranks=(FEATURES,))
    plan = Plan(layers=(layer,))
    return factorize(model, plan, decompose_graph(model, plan)).model


@pytest.mark.parametrize("unidirectional", [0, 1])
@pytest.mark.parametrize("mask", MASKS)
def test_at_full_rank_nothing_changes_whatever_the_mask(mask, unidirectional, rng):
    model = attention_model(rng, mask=MASKS[mask], unidirectional=unidirectional)
    factored = full_rank(model)
    assert ops(factored) == ["MatMul", "MatMul", "Split", "MultiHeadAttention"]
    assert "qkv.weight" not in {tensor.name for tensor in factored.graph.initializer}
    feed = feed_of(rng, MASKS[mask])
    assert relative(run(factored, feed), run(model, feed)) < ROUNDING


@pytest.mark.parametrize("shape", [(BATCH, HEADS), (1, HEADS), (BATCH, 1), (1, 1)])
@pytest.mark.parametrize("mask", ["none", "padding"])
def test_what_is_added_to_the_scores_is_kept(mask, shape, rng):
    scores = rng.standard_normal((*shape, TOKENS, TOKENS))
    model = attention_model(rng, mask=MASKS[mask], scores=scores)
    feed = feed_of(rng, MASKS[mask], scores)
    assert relative(run(full_rank(model), feed), run(model, feed)) < ROUNDING


@pytest.mark.parametrize("opset", [11, 12, 13, 17, 20])
@pytest.mark.parametrize(
    "attributes",
    [
        {"scale": 0.3},
        {"mask_filter_value": -3.0},
        {"mask_filter_value": -3.4028234663852886e38},
        {"sizes": (FEATURES, FEATURES, 2 * FEATURES)},
        {"sizes": (8, 8, 4)},
        {"do_rotary": 0, "past_present_share_buffer": 0},
    ],
    ids=lambda attributes: ", ".join(f"{name} {value}" for name, value in attributes.items()),
)
def test_attributes_are_kept(attributes, opset, rng):
    model = attention_model(rng, mask=PADDED, opset=opset, **attributes)
    feed = feed_of(rng, PADDED)
    assert relative(run(full_rank(model), feed), run(model, feed)) < ROUNDING


def test_without_a_bias(rng):
    model = attention_model(rng, bias=False)
    feed = feed_of(rng)
    weight = numpy_helper.to_array(model.graph.initializer[0])
    # The dense node is not run: the CPU kernel of ONNX Runtime 1.31 ends the process if there is no bias.
    assert relative(run(full_rank(model), feed), attended(feed["x"], weight)) < ROUNDING


def test_lengths_that_an_embedding_counts(rng):
    model, feed = behind_an_embedding(rng, attention_model(rng, mask=MASKS["lengths"]))
    factored = full_rank(with_known_axes(model))
    assert "MultiHeadAttention" in ops(factored)
    assert relative(run(factored, feed), run(model, feed)) < ROUNDING


@given(data=st.data())
@cases(30, 300)
def test_any_form_equals_its_reconstruction(data):
    name = data.draw(st.sampled_from(sorted(FORMATS)))
    shape = (3 * FEATURES, FEATURES)
    modes = {"svd": shape, "width": shape[1:], "ttm": (12, 4, 4, 4)}.get(name, (6, 8, 4, 4))
    plan = draw_ranks(data, "qkv", FORMATS[name], name, shape, modes, "linear")
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    model, one = attention_model(rng, mask=PADDED), Plan(layers=(plan,))
    cores = decompose_graph(model, one) if name == "width" else {"qkv": random_cores(plan, shape, rng)}
    feed = feed_of(rng, PADDED)
    expected, factored = run(reconstruct(model, one, cores), feed), factorize(model, one, cores).model
    np.testing.assert_allclose(run(factored, feed), expected, rtol=1e-4, atol=1e-4 * max(1.0, np.abs(expected).max()))


def with_past(model, *, present=True):
    past = helper.make_tensor_value_info("past", TensorProto.FLOAT, [2, "batch", HEADS, "before", FEATURES // HEADS])
    node = model.graph.node[0]
    if present:
        node.output.append("present")
        model.graph.output.append(helper.make_tensor_value_info("present", TensorProto.FLOAT, [2, None, None, None, None]))
    else:
        model.graph.input.append(past)
        node.input.extend([""] * (4 - len(node.input)) + ["past"])
    return model


def with_attribute(model, name, value):
    model.graph.node[0].attribute.append(helper.make_attribute(name, value))
    return model


def with_mask_of(model, shape):
    model.graph.input[1].CopyFrom(helper.make_tensor_value_info("mask", TensorProto.INT32, shape))
    return model


REFUSED = {
    "past": (lambda rng: with_past(attention_model(rng), present=False), "it keeps past keys and values"),
    "present": (lambda rng: with_past(attention_model(rng)), "it keeps past keys and values"),
    "rotary": (lambda rng: with_attribute(attention_model(rng), "do_rotary", 1), r"rotates queries and keys \(do_rotary\)"),
    "new": (lambda rng: with_attribute(attention_model(rng), "other", 1), "it has the attribute other, which"),
    "sizes": (lambda rng: attention_model(rng, sizes=(8, 16, 24)), r"shape \[16, 48\] for hidden sizes \[8, 16, 24\]"),
    "ends and starts": (lambda rng: attention_model(rng, mask=np.zeros(4, np.int32)), "'mask' of shape .4. is not known to"),
    "one value": (lambda rng: with_mask_of(attention_model(rng, mask=PADDED), ["batch", 1]), "one value for each sample"),
    "4 axes": (lambda rng: attention_model(rng, mask=np.ones((1, 1, 8, 8), np.int32)), "4 axes, and MultiHeadAttention"),
    "unknown axes": (lambda rng: with_mask_of(attention_model(rng, mask=PADDED), None), "axes of its mask 'mask' is unknown"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_multi_head_attention_does_not_compute_is_refused_with_the_reason(name, rng):
    make, reason = REFUSED[name]
    model = make(rng)
    with pytest.raises(GraphError, match=f"layer qkv: cannot be rewritten: .*{reason}"):
        decompose_graph(model, FULL)
    _, (row,) = left_out(model, ())
    assert (row.name, row.op, row.params) == ("qkv", "com.microsoft:Attention", 3 * FEATURES**2)
    assert row.reason.startswith(("it ", "its ", "expected", "the number"))
    assert row.reason.endswith(("leave it out of the plan", "give the shapes of the inputs"))  # what to do


def test_another_attention_is_no_layer(rng):
    model = attention_model(rng)
    model.graph.node[0].domain = "mine"
    model.opset_import.append(helper.make_opsetid("mine", 1))
    assert survey(model) == ()
    with pytest.raises(GraphError, match="layer qkv: not in the graph"):
        decompose_graph(model, FULL)


def test_the_survey_counts_the_product(rng):
    model = attention_model(rng, mask=PADDED, sizes=(FEATURES, FEATURES, 32), tail=True)
    attention, out = survey(model, 1, SHAPES | {"mask": PADDED.shape})
    assert (attention.name, attention.op, attention.spec.shape) == ("qkv", "Attention", (64, FEATURES))
    assert attention.macs == BATCH * TOKENS * 64 * FEATURES
    assert attention.output == (BATCH, TOKENS, 32)
    assert attention.describe() == "Attention 16→64 on 6"
    assert out.macs == BATCH * TOKENS * 32 * FEATURES
    kept, others = left_out(with_known_axes(model), (attention, out))
    assert ([layer.name for layer in kept], others) == (["qkv", "out"], ())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_it_is_planned_by_measured_times(precision, rng, tmp_path):
    model = attention_model(rng, mask=PADDED, tail=True)
    timing = Timing(shapes=SHAPES | {"mask": PADDED.shape})
    search = Search(
        grid=8, cache=tmp_path, seconds=1.0, check_seconds=1.0, allow_slower=True, formats=("svd",), precision=precision
    )
    report = plan_network(model, {"params": 1.2}, search, conditions=Conditions(timing))
    assert report.meets
    row = next(row for row in report.rows if row.layer == "qkv")
    assert (row.format, row.what) == ("svd", "Attention 16→48 on 6")
    assert row.ms > 0
    feed = feed_of(rng, PADDED)
    cores = decompose_graph(known := with_known_axes(model), report.plan)
    factored = run(factorize(known, report.plan, cores).model, feed)
    assert relative(factored, run(reconstruct(known, report.plan, cores), feed)) < ROUNDING


def test_other_weights_run_without_a_new_model(rng, tmp_path):
    model = attention_model(rng)
    feeds = [feed_of(rng) for _ in range(2)]
    network = StitchedNetwork(resolve(model, FULL), feeds, Session(), tmp_path)
    weight = rng.standard_normal((3 * FEATURES, FEATURES)).astype(np.float32)
    change = Change(weight, rng.standard_normal(3 * FEATURES))
    bias = numpy_helper.to_array(model.graph.initializer[1]) + change.bias
    for (outputs,) in (network.with_changes({"qkv": change}), *network.with_each("qkv", [change])):
        for feed, out in zip(feeds, outputs, strict=True):
            assert relative(out, attended(feed["x"], weight.T, bias)) < ROUNDING


def test_errors_of_layers_are_those_behind_the_attention(rng):
    model = attention_model(rng, tail=True)
    plan = Plan(layers=(FULL.layers[0].model_copy(update={"ranks": (4,)}),))
    cores = decompose_graph(model, plan)
    (row,) = layer_errors(model, factorize(model, plan, cores).model, plan, cores, [feed_of(rng)])
    assert (row.layer, row.tensor) == ("qkv", "attended")
    assert row.approximation > 0.01
    assert row.numerical < ROUNDING


@pytest.mark.parametrize("bias", [True, False])
def test_its_bias_can_be_changed(bias, rng):
    model = attention_model(rng, bias=bias)
    resolved = resolve(model, FULL)
    assert takes_bias(resolved.layers["qkv"])
    added = rng.standard_normal(3 * FEATURES)
    changed = add_biases(resolved, {"qkv": added}).model
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in changed.graph.initializer}
    before = numpy_helper.to_array(model.graph.initializer[1]) if bias else 0
    np.testing.assert_allclose(constants[changed.graph.node[0].input[2]], before + added, rtol=1e-6, atol=1e-6)
    feed = feed_of(rng)
    expected = attended(feed["x"], constants["qkv.weight"], before + added)
    assert relative(run(changed, feed), expected) < ROUNDING


def test_a_shared_weight_is_rewritten_at_all_its_nodes(rng):
    model = attention_model(rng)
    again = onnx.NodeProto()
    again.CopyFrom(model.graph.node[0])
    again.name, again.input[0], again.output[0] = "again", "attended", "twice"
    model.graph.node.append(again)
    model.graph.output[0].name = "twice"
    factored = full_rank(with_known_axes(model))
    assert ops(factored).count("MultiHeadAttention") == 2
    assert sum(tensor.name.startswith("qkv/") for tensor in factored.graph.initializer) == 3  # two cores and the sizes
    feed = feed_of(rng)
    assert relative(run(factored, feed), run(model, feed)) < ROUNDING


def test_a_factored_attention_runs_in_int8(rng):
    model = attention_model(rng, mask=PADDED, tail=True)
    factored = full_rank(model)
    feeds = [feed_of(rng, PADDED) for _ in range(8)]
    quantized = to_int8(factored, feeds)
    assert "MultiHeadAttention" in ops(quantized)
    stored = {tensor.name: tensor.data_type for tensor in quantized.graph.initializer}
    assert sum(kind == TensorProto.INT8 and name.startswith("qkv/") for name, kind in stored.items()) >= 2
    assert relative(run(quantized, feeds[0]), run(model, feeds[0])) < 5e-2  # eight bits a value, a few layers


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_graph_of_onnxruntimes_optimizer(rng, tmp_path):
    """A block in ONNX's operators, whose attention the optimizer finds; it counts the tokens of each sample in the mask."""
    torch = pytest.importorskip("torch")
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(20, FEATURES)
            self.norm = torch.nn.LayerNorm(FEATURES)
            self.query, self.key, self.value, self.out = (torch.nn.Linear(FEATURES, FEATURES) for _ in range(4))

        def forward(self, ids, mask):
            x = self.norm(self.table(ids))
            query, key, value = (
                part(x).view(*x.shape[:2], HEADS, FEATURES // HEADS).permute(0, 2, 1, 3)
                for part in (self.query, self.key, self.value)
            )
            scores = query @ key.transpose(-1, -2) / 2.0 + (1.0 - mask[:, None, None, :].float()) * -10000.0
            seen = (torch.softmax(scores, -1) @ value).permute(0, 2, 1, 3).contiguous()
            return self.norm(self.out(seen.view(*x.shape[:2], FEATURES)) + x)

    torch.manual_seed(0)
    feed = {"ids": rng.integers(0, 20, (BATCH, TOKENS)), "mask": PADDED.astype(np.int64)}
    plain = tmp_path / "plain.onnx"
    axes = {name: {0: "batch", 1: "tokens"} for name in feed}
    examples = tuple(torch.from_numpy(array) for array in feed.values())
    torch.onnx.export(
        Block().eval(), examples, plain, input_names=list(feed), dynamic_axes=axes, opset_version=17, dynamo=False
    )
    options = FusionOptions("bert")
    options.enable_embed_layer_norm = False
    model = optimize_model(str(plain), "bert", HEADS, FEATURES, optimization_options=options, opt_level=0).model
    assert {"Attention", "SkipLayerNormalization"} <= set(ops(model))
    known = with_known_axes(model)
    layers = {layer.op: layer for layer in left_out(known, survey(model, BATCH))[0]}
    assert layers["Attention"].spec.shape == (3 * FEATURES, FEATURES)
    plan = Plan(layers=(FULL.layers[0].model_copy(update={"name": layers["Attention"].name}),))
    factored = factorize(known, plan, decompose_graph(known, plan)).model
    assert "MultiHeadAttention" in ops(factored)
    assert relative(run(factored, feed), run(model, feed)) < ROUNDING
