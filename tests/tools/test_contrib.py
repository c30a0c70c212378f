"""export and compress without the operators of com.microsoft: in Python and on the command line."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from attention_graphs import FEATURES, MASKS, PADDED, TOKENS, attention_model, behind_an_embedding, feed_of
from cases import relative
from onnx import numpy_helper

import tensorrail as tr

ROUNDING = 1e-5  # relative L2: another order of sums in float32
FULL = tr.Plan(layers=(tr.LayerPlan(name="qkv", format="svd", modes=(3 * FEATURES, FEATURES), ranks=(FEATURES,)),))


def run(model, feed):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0]


def written(path):
    model = onnx.load(path)
    return model, {node.domain for node in model.graph.node}


def test_export_without_contrib_operators(rng, tmp_path):
    model, notes = attention_model(rng, mask=PADDED), []
    report = tr.export(model, tmp_path / "o.onnx", FULL, options=tr.Options(contrib=False, progress=lambda *a: notes.append(a)))
    factored, domains = written(tmp_path / "o.onnx")
    assert domains == {""}
    assert report.layers[0].op == "MatMul"
    assert not [note for note in notes if "com.microsoft" in note[2]]
    feed = feed_of(rng, PADDED)
    assert relative(run(factored, feed), run(model, feed)) < ROUNDING


def test_export_of_the_default_fusion_of_bert(rng, tmp_path):
    """onnx does not infer how many axes the mask has, which EmbedLayerNormalization makes."""
    model, feed = behind_an_embedding(rng, attention_model(rng, mask=MASKS["lengths"]))
    report = tr.export(model, tmp_path / "o.onnx", FULL, options=tr.Options(contrib=False))
    factored, _ = written(tmp_path / "o.onnx")
    assert [node.op_type for node in factored.graph.node if node.domain] == ["EmbedLayerNormalization"]
    assert report.layers[0].op == "MatMul"
    assert relative(run(factored, feed), run(model, feed)) < ROUNDING


@pytest.mark.parametrize("cores", ["decomposed", "given"])
@pytest.mark.parametrize("inputs", ["random", "given"])
def test_check_of_layers_behind_the_default_fusion_of_bert(inputs, cores, rng, tmp_path):
    model, feed = behind_an_embedding(rng, attention_model(rng, mask=MASKS["lengths"]))
    tr.export(model, tmp_path / "o.onnx", FULL)
    weight = numpy_helper.to_array(next(tensor for tensor in model.graph.initializer if tensor.name == "qkv.weight"))
    layers = tr.Layers(FULL, {"qkv": FULL.layers[0].decompose(weight.T)} if cores == "given" else None)
    timing = tr.Timing(shapes={name: array.shape for name, array in feed.items()})
    given = feed if inputs == "given" else None
    report = tr.check(model, tmp_path / "o.onnx", inputs=given, layers=layers, options=tr.Options(timing=timing))
    (row,) = report.layers
    assert row.layer == "qkv"
    assert row.approximation < ROUNDING
    assert row.numerical < ROUNDING


def test_export_names_the_other_contrib_operators(rng, tmp_path):
    model, notes = attention_model(rng, mask=PADDED, tail=True), []
    tr.export(model, tmp_path / "o.onnx", FULL, options=tr.Options(contrib=False, progress=lambda *a: notes.append(a)))
    (note,) = [note[2] for note in notes if note[0] == "note"]
    assert note == "the graph still has operators of com.microsoft, which ONNX Runtime alone runs: SkipLayerNormalization (1)"


def test_compress_without_contrib_operators(rng, tmp_path):
    model, notes = attention_model(rng, mask=PADDED), []
    inputs = {"x": rng.standard_normal((64, TOKENS, FEATURES)).astype(np.float32), "mask": np.tile(PADDED, (32, 1))}
    options = tr.Options(
        timing=tr.Timing(seconds=0.3),
        fit=tr.Fit(seconds=0),
        contrib=False,
        progress=lambda *a: notes.append(a),
    )
    report = tr.compress(model, tmp_path / "o.onnx", FULL, calibration=inputs, options=options)
    factored, domains = written(tmp_path / "o.onnx")
    assert domains == {""}
    assert report.layers[0].op == "MatMul"
    assert any("written as operators of ONNX" in note[2] for note in notes)
    feed = feed_of(rng, PADDED)
    assert relative(run(factored, feed), run(model, feed)) < ROUNDING


@pytest.mark.parametrize(
    ("option", "domains"), [("--no-contrib", {""}), ("--contrib", {"", "com.microsoft"}), (None, {"", "com.microsoft"})]
)
def test_the_option_of_export(option, domains, rng, tmp_path, cli):
    onnx.save(attention_model(rng, mask=PADDED), tmp_path / "m.onnx")
    FULL.save(tmp_path / "plan.json")
    given = [option] if option else []
    code, _, _ = cli("export", tmp_path / "m.onnx", "--plan", tmp_path / "plan.json", "-o", tmp_path / "o.onnx", *given)
    assert code == 0
    assert written(tmp_path / "o.onnx")[1] == domains
