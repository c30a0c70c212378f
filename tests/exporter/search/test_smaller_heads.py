"""`compress` and `plan` narrow the heads of attentions when asked to, before layers are planned."""

import numpy as np
import onnx
import pytest
from conftest import make_model
from onnx import helper

import tensorrail as tr
from tensorrail_exporter.plans.plan import HeadPlan
from tensorrail_runtime.errors import PlanError, UsageError

WIDTH, HEADS, SIZE, LENGTH = 32, 2, 16, 6
PAIRS = (("q", "k"), ("v", "o"))


@pytest.fixture
def dense(rng, tmp_path):
    """An attention and a layer behind it, as a file."""
    weights = {f"{name}.weight": rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 5 for name in (*"qkvo", "up")}
    weights |= {f"{name}.bias": rng.standard_normal(WIDTH).astype(np.float32) / 5 for name in "qkv"}
    weights |= {"apart": np.array([0, 0, HEADS, SIZE], np.int64), "flat": np.array([0, 0, WIDTH], np.int64)}
    weights |= {"head.weight": rng.standard_normal((WIDTH, 10)).astype(np.float32), "scale": np.float32(SIZE**-0.5)}
    nodes = []
    for name in "qkv":
        nodes += [
            helper.make_node("MatMul", ["x", f"{name}.weight"], [f"{name}0"]),
            helper.make_node("Add", [f"{name}0", f"{name}.bias"], [name]),
            helper.make_node("Reshape", [name, "apart"], [f"{name}h"]),
            helper.make_node("Transpose", [f"{name}h"], [f"{name}t"], perm=[0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]),
        ]
    nodes += [
        helper.make_node("MatMul", ["qt", "kt"], ["scores"]),
        helper.make_node("Mul", ["scores", "scale"], ["scaled"]),
        helper.make_node("Softmax", ["scaled"], ["shares"]),
        helper.make_node("MatMul", ["shares", "vt"], ["mixed"]),
        helper.make_node("Transpose", ["mixed"], ["back"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["back", "flat"], ["together"]),
        helper.make_node("MatMul", ["together", "o.weight"], ["attended"]),
        helper.make_node("Add", ["x", "attended"], ["sum"]),
        helper.make_node("MatMul", ["sum", "up.weight"], ["up"]),
        helper.make_node("Relu", ["up"], ["relu"]),
        helper.make_node("ReduceMean", ["relu"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["mean", "head.weight"], ["y"]),
    ]
    onnx.save(make_model(nodes, weights, {"x": ["n", LENGTH, WIDTH]}, {"y": ["n", 10]}, opset=13), tmp_path / "dense.onnx")
    return tmp_path / "dense.onnx"


@pytest.fixture
def inputs(rng):
    """Inputs of eight directions."""
    return {"x": (rng.standard_normal((80, LENGTH, 8)) @ rng.standard_normal((8, WIDTH)) / 3).astype(np.float32)}


def options(tmp_path, **search):
    quick = {"seconds": 1.0, "check_seconds": 0.5, "improve_seconds": 0.0, "allow_slower": True, "cache": tmp_path / "cache"}
    return tr.Options(
        search=tr.Search(**{**quick, **search}),
        timing=tr.Timing(seconds=0.3, processes=1),
        fit=tr.Fit(seconds=0),
        session=tr.Session(threads=1),
    )


def test_compress_narrows_heads_and_verifies_them(dense, inputs, tmp_path):
    report = tr.compress(
        dense, tmp_path / "model.onnx", {"flops": 1.3}, calibration=inputs, options=options(tmp_path, heads=8, joint=False)
    )
    plan = report.planning.plan
    assert plan.heads == tuple(HeadPlan(weights=pair, size=8) for pair in PAIRS)
    assert report.meets
    assert [(row.layers, row.before, row.after) for row in report.heads] == [(pair, SIZE, 8) for pair in PAIRS]
    assert str(report).count("narrowed to") == 1
    written = onnx.load(tmp_path / "model.onnx")
    assert next(value for value in written.graph.initializer if value.name == "k.bias").dims == [HEADS * 8]
    checked = tr.check(dense, tmp_path / "model.onnx", inputs=inputs, tolerance=None)
    assert checked.worst < 0.2  # relative L2; half the values of every head suffice for eight directions
    assert report.aside.samples == 32


def test_a_plan_with_heads_is_followed_in_the_metric_of_the_inputs(dense, inputs, tmp_path):
    plan = tr.Plan(layers=(), heads=tuple(HeadPlan(weights=pair, size=9) for pair in PAIRS))
    report = tr.compress(dense, tmp_path / "fitted.onnx", plan, calibration=inputs, options=options(tmp_path))
    assert report.exact == "smaller heads"
    assert "narrowed to" in str(report)
    tr.export(dense, tmp_path / "plain.onnx", plan)
    fitted, plain = (
        tr.check(dense, tmp_path / name, inputs=inputs, tolerance=None).worst for name in ("fitted.onnx", "plain.onnx")
    )
    assert fitted < 0.5 * plain
    assert report.ratios.flops > 1.2


def test_plan_records_two_sizes_and_layers_of_the_new_shapes(dense, tmp_path):
    report = tr.plan(dense, {"flops": 1.2}, options=options(tmp_path, heads=(4, 12), joint=False))
    assert [pair.size for pair in report.plan.heads] == [4, 12]
    assert {row.layer: row.dense_params for row in report.rows}["q"] == WIDTH * HEADS * 4
    assert report.reached["flops"] >= 1.2 * 0.99
    assert "with smaller heads" in str(report) or report.plan.layers


def test_layers_to_keep_keep_their_heads(dense, tmp_path):
    report = tr.plan(dense, {"flops": 1.05}, options=options(tmp_path, heads=8, keep=("k",), joint=False))
    assert [pair.weights for pair in report.plan.heads] == [("v", "o")]


@pytest.mark.parametrize(
    ("search", "reason"),
    [
        ({"heads": 16}, r"expected a size below that of the model's heads \(16\), got 16"),
        ({"heads": 0}, "expected a positive number of values, or two, got 0"),
        ({"heads": (4, -1)}, r"got \(4, -1\)"),
        ({"heads": 8, "max_loss": 0.1}, "heads: expected no max_loss with it, got both"),
    ],
)
def test_sizes_that_change_nothing_are_refused(dense, search, reason, tmp_path):
    with pytest.raises(PlanError, match=reason):
        tr.plan(dense, {"flops": 1.2}, options=options(tmp_path, **search))


def test_a_model_without_attention_is_refused(small_path, tmp_path):
    with pytest.raises(PlanError, match="no attention was found whose heads can become smaller"):
        tr.plan(small_path, {"flops": 1.2}, options=options(tmp_path, heads=4))


def test_sizes_on_the_command_line():
    from tensorrail.commands.arguments import read_heads

    assert (read_heads(None), read_heads("48"), read_heads("32,48")) == (None, 48, (32, 48))
    for text in ("", "a", "1,2,3", "0"):
        with pytest.raises(UsageError, match="expected one or two positive numbers"):
            read_heads(text)
