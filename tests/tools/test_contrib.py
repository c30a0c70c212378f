"""export and compress without the operators of com.microsoft: in Python and on the command line."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from attention_graphs import FEATURES, PADDED, TOKENS, attention_model, feed_of
from cases import relative

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
