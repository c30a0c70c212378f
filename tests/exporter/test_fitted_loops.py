"""Networks with a factored recurrent weight are fitted layer by layer only, and say so."""

import numpy as np
import onnxruntime as ort
import pytest
from cases import listener, relative
from conftest import make_model
from onnx import helper
from recurrent_graphs import recurrent_model

from tensorrail_exporter import GraphError, LayerPlan, Plan
from tensorrail_exporter.calibrate.inputs import Calibration
from tensorrail_exporter.calibrate.split import split
from tensorrail_exporter.fitted import Fitting, fitted
from tensorrail_exporter.rewrite.resolve import resolve
from tensorrail_exporter.rewrite.rewriter import decompose, with_cores
from tensorrail_exporter.workflow import Compression, compress
from tensorrail_runtime.measure.timing import Conditions
from tensorrail_runtime.sessions.session import Session


@pytest.mark.parametrize("gpu", [False, True])
def test_a_plan_that_needs_a_scan_where_there_is_none_is_refused_before_anything_is_fitted(gpu, rng, tmp_path, monkeypatch):
    model = recurrent_model("GRU", "forward", 4, 6, rng)
    if gpu:
        monkeypatch.setattr(Session, "on_gpu", property(lambda _: True))
    else:  # no Scan without a batch axis
        del model.opset_import[:]
        model.opset_import.append(helper.make_opsetid("", 8))
        model.graph.node[0].attribute.pop()
    plan = Plan(layers=(LayerPlan(name="r", format="svd", modes=(12, 4), ranks=(2,)),))
    calibration = Calibration(tuple({"x": rng.standard_normal((5, 2, 6)).astype(np.float32)} for _ in range(16)))
    conditions = Conditions(progress=lambda stage, *_: pytest.fail(f"{stage}: it was to be refused"))
    what = "which is ruled out here" if gpu else "expected opset 9 and IR version 4 or later, got opset 8"
    with pytest.raises(GraphError, match=f"layer r: the cores of a recurrent weight run in a Scan.*{what}.*out of the plan$"):
        compress(model, plan, tmp_path / "out.onnx", Compression(calibration=calibration, conditions=conditions))
    assert not (tmp_path / "out.onnx").exists()


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
