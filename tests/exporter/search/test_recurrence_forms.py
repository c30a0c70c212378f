"""Forms of a recurrent weight: timed as a Scan against the operator, and not chosen beside another Scan of the same node."""

import numpy as np
import onnxruntime as ort
import pytest
from conftest import make_model
from onnx import helper
from recurrent_graphs import recurrent_model

from tensorrail_exporter.rewrite.survey import survey
from tensorrail_exporter.search.context import dense_context, factored_context
from tensorrail_exporter.search.latency_table import LatencyTable, Target
from tensorrail_exporter.search.losses import Losses
from tensorrail_exporter.search.options import options_of
from tensorrail_exporter.search.report import Size
from tensorrail_exporter.search.selection import Candidates
from tensorrail_runtime.sessions.session import Session


def ops_of(model):
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("form", ["svd", "tt", "ttm"])
@pytest.mark.parametrize(("op", "direction"), [("LSTM", "bidirectional"), ("GRU", "forward")])
def test_a_scan_is_timed_against_the_operator(op, direction, form, copies, rng):
    model = recurrent_model(op, direction, 32, 24, rng)
    _, loop = survey(model, 2, {"x": (5, 2, 24)})
    dense = dense_context(loop, copies)
    factored = factored_context(loop, dense, options_of(loop, [form], 8, most=50.0)[0])
    scans = copies * (2 if direction == "bidirectional" else 1)
    assert (ops_of(dense).count(op), ops_of(dense).count("Scan")) == (copies, 0)
    assert (ops_of(factored).count(op), ops_of(factored).count("Scan")) == (0, scans)
    session = ort.InferenceSession(factored.SerializeToString(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"x": rng.standard_normal((5, 2, 24)).astype(np.float32)})
    assert out.shape == loop.output
    assert np.isfinite(out).all()


def test_forms_of_a_recurrent_weight_of_two_nodes_are_kept_apart_from_those_of_either_input_weight(rng):
    weights = {name: rng.standard_normal((1, 1024, 256)).astype(np.float32) for name in ("w", "v", "r")}
    nodes = [
        helper.make_node("LSTM", ["x", "w", "r"], ["h"], "first", hidden_size=256),
        helper.make_node("Squeeze", ["h", "axis"], ["s"], "squeeze"),
        helper.make_node("LSTM", ["s", "v", "r"], ["y"], "second", hidden_size=256),
    ]
    model = make_model(nodes, {**weights, "axis": np.array([1])}, {"x": ["t", "n", 256]}, {"y": ["t", 1, "n", 256]})
    layers = survey(model, 1, {"x": (5, 1, 256)})
    assert [layer.name for layer in layers] == ["w", "r", "v"]
    options = {layer: options_of(layer, ["ttm"], 16, most=20.0)[:1] for layer in layers}
    size = Size(params=0, macs=0, flops=0, bytes=0, milliseconds=0.0)
    candidates = Candidates(options, options, Losses("", {}), LatencyTable(Target.here(Session())), size, size)
    assert candidates.apart == [([(0, 1)], [(1, 1)]), ([(2, 1)], [(1, 1)])]


def test_two_forms_that_make_a_scan_of_one_node_are_not_chosen_together(rng):
    model = recurrent_model("LSTM", "forward", 256, 64, rng)
    layers = survey(model, 1, {"x": (5, 1, 64)})
    options = {layer: options_of(layer, ["svd", "ttm"], 16, most=20.0) for layer in layers}
    size = Size(params=0, macs=0, flops=0, bytes=0, milliseconds=0.0)
    candidates = Candidates(options, options, Losses("", {}), LatencyTable(Target.here(Session())), size, size)
    inputs, loops = (options[layer] for layer in layers)
    assert {option.format for option in inputs} == {"svd", "ttm"}
    ((scans, all_loops),) = candidates.apart
    assert [inputs[k - 1].format for place, k in scans if place == 0] == ["ttm"] * len(scans)
    assert all_loops == [(1, k) for k in range(1, 1 + len(loops))]
