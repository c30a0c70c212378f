"""com.microsoft.Attention in ONNX's operators computes the same, and its weight is planned under the same name."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from attention_graphs import BATCH, FEATURES, HEADS, MASKS, PADDED, TOKENS, attended, attention_model, feed_of
from cases import relative
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from tensorrail_exporter import GraphError, LayerPlan, Plan, decompose_graph, factorize
from tensorrail_exporter.precision.reduce import to_fp16
from tensorrail_exporter.rewrite.plain_attention import contrib_operators, plain_attention, require_equal
from tensorrail_exporter.rewrite.survey import survey, with_known_axes
from tensorrail_runtime.sessions.session import Session

ROUNDING = 1e-5  # relative L2: another order of sums in float32
ALL_HIDDEN = 1e-3  # the same where scores of some units are added to -10000, which float32 stores in steps of 1e-3
FULL = Plan(layers=(LayerPlan(name="qkv", format="svd", modes=(3 * FEATURES, FEATURES), ranks=(FEATURES,)),))


def run(model, feed):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0]


def chain(model, count):
    """Return the model with so many attentions, each of which reads the one before, with the same weight."""
    for number in range(1, count):
        again = onnx.NodeProto()
        again.CopyFrom(model.graph.node[0])
        again.name, again.input[0], again.output[0] = "", model.graph.node[-1].output[0], f"attended{number}"
        model.graph.node.append(again)
    model.graph.output[0].name = model.graph.node[-1].output[0]
    return model


@pytest.mark.parametrize("opset", [11, 13, 20])
@pytest.mark.parametrize("unidirectional", [0, 1])
@pytest.mark.parametrize("mask", MASKS)
def test_it_computes_the_same_whatever_the_mask(mask, unidirectional, opset, rng):
    model = attention_model(rng, mask=MASKS[mask], unidirectional=unidirectional, opset=opset)
    plain = plain_attention(model)
    assert contrib_operators(plain) == {}
    assert {entry.domain for entry in plain.opset_import} == {""}
    onnx.checker.check_model(plain, full_check=True)
    feed = feed_of(rng, MASKS[mask])
    hidden = mask in ("a sample without tokens", "padding on the left")
    assert relative(run(plain, feed), run(model, feed)) < (ALL_HIDDEN if hidden else ROUNDING)
    assert model.graph.node[0].op_type == "Attention"


@pytest.mark.parametrize(
    "attributes",
    [
        {"scale": 0.3},
        {"mask_filter_value": -3.0},
        {"mask_filter_value": -3.4028234663852886e38, "unidirectional": 1},
        {"sizes": (8, 8, 4)},
        {"sizes": (FEATURES, FEATURES, 2 * FEATURES)},
        {"scores": np.random.default_rng(1).standard_normal((1, HEADS, TOKENS, TOKENS))},
        {"scores": np.random.default_rng(1).standard_normal((BATCH, 1, TOKENS, TOKENS)), "unidirectional": 1},
    ],
    ids=", ".join,
)
def test_attributes_and_scores_are_kept(attributes, rng):
    model = attention_model(rng, mask=PADDED, **attributes)
    feed = feed_of(rng, PADDED, attributes.get("scores"))
    plain = plain_attention(model)
    assert relative(run(plain, feed), run(model, feed)) < ROUNDING
    assert relative(ReferenceEvaluator(plain).run(None, feed)[0], run(model, feed)) < ROUNDING  # without ONNX Runtime


def test_without_a_bias(rng):
    model = attention_model(rng, bias=False)
    feed = feed_of(rng)
    expected = attended(feed["x"], numpy_helper.to_array(model.graph.initializer[0]))
    assert relative(run(plain_attention(model), feed), expected) < ROUNDING


def test_its_weight_is_a_layer_of_the_same_name(rng):
    model = attention_model(rng, mask=PADDED, tail=True)
    plain = with_known_axes(plain_attention(model))
    shapes = {"x": (BATCH, TOKENS, FEATURES), "mask": PADDED.shape}
    assert [(a.name, a.spec.shape, a.macs) for a in survey(plain, 1, shapes)] == [
        (a.name, a.spec.shape, a.macs) for a in survey(model, 1, shapes)
    ]
    factored = factorize(plain, FULL, decompose_graph(model, FULL)).model
    feed = feed_of(rng, PADDED)
    assert relative(run(factored, feed), run(model, feed)) < ROUNDING
    assert contrib_operators(factored) == {"SkipLayerNormalization": 1}


def test_a_plan_may_call_it_by_the_name_of_its_node(rng):
    model = attention_model(rng)
    plan = Plan(layers=(FULL.layers[0].model_copy(update={"name": "attention"}),))
    feed = feed_of(rng)
    for one in (model, plain_attention(model)):
        assert relative(run(factorize(one, plan, decompose_graph(one, plan)).model, feed), run(model, feed)) < ROUNDING


@pytest.mark.parametrize("unidirectional", [0, 1])
@pytest.mark.filterwarnings("error")
def test_a_sample_without_tokens_in_float16(unidirectional, rng):
    """Scores near -40 are added to the lowest number: neither they nor the mask become infinite, which softmax makes NaN."""
    mask = MASKS["a sample without tokens"]
    low = np.full((1, 1, TOKENS, TOKENS), -40.0)
    attributes = {"mask_filter_value": -3.4028234663852886e38, "unidirectional": unidirectional}
    plain = plain_attention(to_fp16(attention_model(rng, mask=mask, scores=low, **attributes)))
    assert contrib_operators(plain) == {}
    assert np.isfinite(run(plain, feed_of(rng, mask, low))).all()


@pytest.mark.parametrize("sizes", [None, (8, 8, 4)])
@pytest.mark.parametrize("mask", ["none", "padding"])
def test_an_empty_batch(mask, sizes, rng):
    given = None if MASKS[mask] is None else MASKS[mask][:0]
    plain = plain_attention(attention_model(rng, mask=MASKS[mask], sizes=sizes))
    assert run(plain, feed_of(rng, given, batch=0)).shape == (0, TOKENS, sizes[2] if sizes else FEATURES)


def test_the_limit_of_rounding_grows_as_the_root_of_the_number_of_attentions(rng, tmp_path):
    onnx.save(chain(attention_model(rng), 9), tmp_path / "m.onnx")
    other = plain_attention(chain(attention_model(rng), 9))
    with pytest.raises(GraphError, match=r"to differ by at most 0\.003 \(relative L2\), got"):
        require_equal(tmp_path / "m.onnx", other, feed_of(rng), Session())


def test_another_function_is_found(rng, tmp_path):
    model = attention_model(rng)
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    plain = plain_attention(model)
    require_equal(path, plain, feed_of(rng), Session())
    scale = next(tensor for tensor in plain.graph.initializer if tensor.name.endswith("/scale"))
    scale.CopyFrom(numpy_helper.from_array(np.float32(0.1), scale.name))
    with pytest.raises(GraphError, match=r"in operators of ONNX to differ by at most 0\.001 \(relative L2\), got"):
        require_equal(path, plain, feed_of(rng), Session())


def test_what_cannot_be_written_so_stays(rng):
    past = attention_model(rng)
    past.graph.node[0].output.append("present")
    before = attention_model(rng, opset=10)
    for model in (past, before, plain_attention(attention_model(rng))):
        assert plain_attention(model) is model


def test_several_nodes_in_one_graph(rng):
    model = chain(attention_model(rng, mask=PADDED), 2)
    feed = feed_of(rng, PADDED)
    assert relative(run(plain_attention(model), feed), run(model, feed)) < ROUNDING
