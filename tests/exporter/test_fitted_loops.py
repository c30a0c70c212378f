"""Networks with a factored recurrent weight are fitted layer by layer only, and say so."""

import numpy as np
import onnxruntime as ort
import pytest
from cases import listener, relative
from conftest import make_model
from onnx import helper

from tensorrail_exporter import LayerPlan, Plan
from tensorrail_exporter.calibrate.inputs import Calibration
from tensorrail_exporter.calibrate.split import split
from tensorrail_exporter.fitted import Fitting, fitted
from tensorrail_exporter.rewrite.resolve import resolve
from tensorrail_exporter.rewrite.rewriter import decompose, with_cores


def test_a_recurrent_weight_is_not_fitted_and_a_further_fit_is_left_out(rng):
    weights = {
        "w": rng.standard_normal((1, 32, 24)).astype(np.float32) / 5,
        "r": rng.standard_normal((1, 32, 8)).astype(np.float32) / 5,
    }
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], "turn", perm=[1, 0, 2]),
        helper.make_node("LSTM", ["t", "w", "r"], ["", "h"], "rnn", hidden_size=8),
    ]
    model = make_model(nodes, weights, {"x": ["n", 5, 24]}, {"h": [1, "n", 8]})
    plans = (
        LayerPlan(name="r", format="svd", modes=(32, 8), ranks=(4,)),
        LayerPlan(name="w", format="svd", modes=(32, 24), ranks=(8,)),
    )
    resolved = resolve(model, Plan(layers=plans))
    calibration = Calibration(({"x": rng.standard_normal((64, 5, 24)).astype(np.float32)},))
    notes = []
    refine = {"a further fit": lambda *_: pytest.fail("a Scan cannot be fitted in torch")}
    how = Fitting(refine=refine, judge=object(), progress=listener(note=notes.append))
    network = fitted(resolved, split(calibration, model), how)
    assert notes == ["cores are not fitted further: those of r run in a Scan, which no fit in torch runs"]
    assert {row.layer: row.why for row in network.layers} == {
        "r": "a recurrent weight, of which the states are not known outside of its node",
        "w": "",
    }
    plain = decompose(resolved)
    assert all(np.array_equal(a, b) for a, b in zip(network.cores["r"], plain["r"], strict=True))
    assert not np.array_equal(network.cores["w"][0], plain["w"][0])
    feeds = {"x": rng.standard_normal((3, 5, 24)).astype(np.float32)}
    models = network.model, with_cores(network.resolved, network.cores)
    outputs = [ort.InferenceSession(one.SerializeToString()).run(None, feeds)[0] for one in models]
    assert relative(*outputs) < 1e-5
