"""From an ONNX file to a factored one: what is written, and what the report says of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from cases import listener
from conftest import make_model
from onnx import helper, numpy_helper

from tensorrail_exporter import GraphError, LayerPlan, Plan, PlanError, fitted
from tensorrail_exporter import workflow as compressing
from tensorrail_exporter.calibrate.inputs import Calibration
from tensorrail_exporter.calibrate.split import split
from tensorrail_exporter.choice import Wanted
from tensorrail_exporter.choice import best as best_of
from tensorrail_exporter.compressed import CompressReport, Point, Ratios
from tensorrail_exporter.formats import contraction
from tensorrail_exporter.precision.planned import PRECISIONS
from tensorrail_exporter.search.guard import Guard
from tensorrail_exporter.search.report import PlanReport, Size
from tensorrail_exporter.workflow import Compression, compress
from tensorrail_runtime.errors import TargetError, UsageError
from tensorrail_runtime.measure.accuracy import Labelled
from tensorrail_runtime.measure.agreement import Agreement
from tensorrail_runtime.measure.timing import Conditions, Timing
from tensorrail_runtime.sessions import halves
from tensorrail_runtime.sessions.machine import machine

pytestmark = pytest.mark.usefixtures("in_this_process")  # no time is looked at


@pytest.fixture
def network(rng):
    """Two convolutions with a batch-norm between, pooling and a Gemm; inputs whose channels are correlated."""
    weights = {
        "a.weight": rng.standard_normal((32, 16, 3, 3)).astype(np.float32) / 12,
        "scale": rng.random(32).astype(np.float32) + 0.5,
        "shift": rng.standard_normal(32).astype(np.float32) / 4,
        "mean": rng.standard_normal(32).astype(np.float32) / 4,
        "var": rng.random(32).astype(np.float32) + 0.5,
        "b.weight": rng.standard_normal((32, 32, 3, 3)).astype(np.float32) / 17,
        "fc.weight": rng.standard_normal((10, 32)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "a.weight"], ["a"], "a", pads=[1] * 4),
        helper.make_node("BatchNormalization", ["a", "scale", "shift", "mean", "var"], ["n"], "bn"),
        helper.make_node("Relu", ["n"], ["ra"], "ra"),
        helper.make_node("Conv", ["ra", "b.weight"], ["b"], "b", pads=[1] * 4),
        helper.make_node("Relu", ["b"], ["rb"], "rb"),
        helper.make_node("GlobalAveragePool", ["rb"], ["p"], "p"),
        helper.make_node("Flatten", ["p"], ["f"], "f"),
        helper.make_node("Gemm", ["f", "fc.weight"], ["y"], "fc", transB=1),
    ]
    return make_model(nodes, weights, {"x": ["batch", 16, 8, 8]}, {"y": ["batch", 10]})


def images(seed, count=96):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)
    x = np.einsum("ck,nkhw->nchw", mixing, rng.standard_normal((count, 4, 8, 8)).astype(np.float32))
    return x + 0.05 * rng.standard_normal(x.shape).astype(np.float32)


PLAN = Plan(
    layers=(
        LayerPlan(name="a", format="tt", modes=(32, 9, 16), ranks=(1, 8, 4, 1)),
        LayerPlan(name="b", format="svd", modes=(96, 96), ranks=(16,)),
    )
)


IN_INT8 = PLAN.model_copy(update={"precision": "int8"})
QUICK = Conditions(Timing(seconds=0.05, processes=5))


def run(network, out, plan=PLAN, **options):
    return compress(network, plan, out, Compression(**{"conditions": QUICK} | options))


def test_calibration_makes_the_outputs_nearer(network, tmp_path):
    feeds = tuple({"x": images(1)[k : k + 24]} for k in range(0, 96, 24))
    plain = run(network, tmp_path / "plain.onnx")
    fitted = run(network, tmp_path / "fitted.onnx", calibration=Calibration(feeds))
    held = {"x": images(2)}
    errors = []
    from tensorrail_runtime.sessions.session import open_session
    from tensorrail_runtime.sessions.session import run as run_session

    onnx.save(network, tmp_path / "dense.onnx")
    outputs = [run_session(open_session(tmp_path / f"{n}.onnx"), held)["y"] for n in ("dense", "plain", "fitted")]
    errors = [np.linalg.norm(one - outputs[0]) for one in outputs[1:]]
    assert errors[1] < 0.5 * errors[0]
    assert fitted.approximation < plain.approximation
    assert [fit.layer for fit in fitted.fits] == ["a", "b"]
    assert all(fit.fitted < fit.plain for fit in fitted.fits)
    assert plain.fits == ()


def test_the_report_holds_what_was_measured(network, tmp_path):
    x = images(3, 40)
    labels = np.arange(40) % 10
    size = Size(params=2, macs=2, flops=4, bytes=8, milliseconds=1.0)
    planning = PlanReport(
        targets={"params": 1.5, "flops": 50.0},
        provider="cpu",
        batch=1,
        grid=1,
        loss_from="weights",
        dense=size,
        planned=size,
        rows=(),
        measured=None,
        machine=machine(),
        plan=PLAN,
    )
    report = run(network, tmp_path / "out.onnx", planning, test=Labelled({"x": x}, labels))
    assert report.ratios.flops == report.dense.flops / report.factored.flops
    assert report.ratios.params > 1.5
    assert not report.meets  # FLOPs do not fall 50 times
    assert report.numerical < 1e-5
    assert report.accuracy is not None
    assert len(report.accuracy.reference.scores) == 40
    assert report.latency.latencies[0].model == "dense"
    assert report.ratios.latency_low <= report.ratios.latency <= report.ratios.latency_high
    assert CompressReport.model_validate_json(report.model_dump_json()) == report


@pytest.fixture(autouse=True)
def no_islands(monkeypatch):
    """Leave out the search for layers that are faster in fp32: which ones are depends on the processor."""
    monkeypatch.setattr(compressing, "fastest_islands", lambda layers, start, *_: tuple(start))


def test_layers_that_are_faster_in_fp32_make_a_further_model_and_are_in_the_plan(network, tmp_path, monkeypatch):
    feeds = Calibration(tuple({"x": images(1)[k : k + 24]} for k in range(0, 96, 24)))
    asked = []

    def first(layers, start, convert, timer, progress):
        asked.append([layer.name for layer in layers])
        return (layers[0].name,)

    monkeypatch.setattr(compressing, "fastest_islands", first)
    report = run(network, tmp_path / "out.onnx", IN_INT8, calibration=feeds)
    assert [one.name for one in report.front] == [
        "dense in int8",
        "dense in int8, 1 layer in fp32",
        "low rank in int8, 1 layer in fp32",
    ]
    names = report.front[2].spared
    assert names == (asked[1][0],)
    monkeypatch.setattr(compressing, "fastest_islands", lambda layers, start, *_: tuple(start))
    given = IN_INT8.model_copy(update={"fp32": names})
    again = run(network, tmp_path / "again.onnx", given, calibration=feeds)
    assert [one.spared for one in again.front] == [(), names]
    assert again.written == 1
    nodes = {node.name: node for node in onnx.load(tmp_path / "again.onnx").graph.node}
    made_by = {name: node.op_type for node in nodes.values() for name in node.output}
    assert made_by.get(nodes[names[0]].input[1]) != "DequantizeLinear"
    assert "DequantizeLinear" in made_by.values()
    dense = run(network, tmp_path / "dense.onnx", [given, Plan(layers=(), precision="int8", fp32=("a",))], calibration=feeds)
    assert [one.spared for one in dense.front] == [("a",), names]
    with pytest.raises(GraphError, match="fp32 of the plan: layer nobody: "):
        run(network, tmp_path / "none.onnx", IN_INT8.model_copy(update={"fp32": ("nobody",)}), calibration=feeds)


def test_of_several_precisions_the_best_model_is_written(network, tmp_path):
    feeds = tuple({"x": images(1)[k : k + 24]} for k in range(0, 96, 24))
    out = tmp_path / "out.onnx"
    report = run(network, out, [PLAN, IN_INT8], calibration=Calibration(feeds), guard=Guard(min_agreement=0))
    assert [point.name for point in report.front] == ["dense in int8", "low rank in fp32", "low rank in int8"]
    assert [point.layers for point in report.front] == [0, 2, 2]
    assert all(point.loss > 0 and point.aside.samples == 32 for point in report.front)
    assert report.front[2].size.bytes < report.front[1].size.bytes
    assert report.front[2].size.params == report.front[1].size.params < report.front[0].size.params == report.dense.params
    (written,) = (point for point in report.front if point.ratios == report.ratios)
    assert (written.precision, written.aside, written.size) == (report.precision, report.aside, report.factored)
    kinds = {node.op_type for node in onnx.load(out).graph.node}
    assert ("DequantizeLinear" in kinds) == (report.precision == "int8")
    assert len(report.layers) == written.layers
    printed = " ".join(str(report).split())
    assert f"{written.name} (written)" in printed
    assert CompressReport.model_validate_json(report.model_dump_json()) == report


def test_a_plan_for_int8_is_followed_though_the_dense_network_loses_less(network, tmp_path):
    feeds = tuple({"x": images(1)[k : k + 24]} for k in range(0, 96, 24))
    report = run(network, tmp_path / "out.onnx", IN_INT8, calibration=Calibration(feeds))
    assert [one.name for one in report.front] == ["dense in int8", "low rank in int8"]
    assert report.front[0].loss < report.front[1].loss
    assert (report.written, report.precision, len(report.layers)) == (1, "int8", 2)
    tight = run(network, tmp_path / "o.onnx", IN_INT8, calibration=Calibration(feeds), max_loss=report.loss / 2)
    assert not tight.accepted
    assert "NOT accurate enough: the loss is" in str(tight)
    stored = {tensor.name for tensor in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert any(name.startswith("a/") and name.endswith("_quantized") for name in stored)


def test_a_model_that_cannot_be_made_is_left_out(network, tmp_path, monkeypatch):
    feeds = tuple({"x": images(1)[k : k + 24]} for k in range(0, 96, 24))
    notes = []
    told = replace(QUICK, progress=lambda stage, share, detail="": notes.append(detail) if stage == "note" else None)

    def fails(*_, **__):
        raise GraphError("no int8 today")

    monkeypatch.setitem(PRECISIONS, "int8", replace(PRECISIONS["int8"], converter=fails))
    report = run(network, tmp_path / "o.onnx", [PLAN, IN_INT8], calibration=Calibration(feeds), conditions=told)
    assert [one.name for one in report.front] == ["low rank in fp32"]
    assert notes[:2] == ["the dense network in int8 is left out: no int8 today", "a plan for int8 is left out: no int8 today"]
    with pytest.raises(GraphError, match="no int8 today"):
        run(network, tmp_path / "p.onnx", IN_INT8, calibration=Calibration(feeds))
    with pytest.raises(PlanError, match="names no layer"):
        run(network, tmp_path / "p.onnx", [])
    monkeypatch.undo()
    elsewhere = Plan(layers=(PLAN.layers[0].model_copy(update={"name": "nowhere"}),), precision="int8")
    with pytest.raises(GraphError, match="nowhere"):
        run(network, tmp_path / "p.onnx", elsewhere, calibration=Calibration(feeds))
    assert not (tmp_path / "p.onnx").exists()


def test_a_refusal_stands_unless_the_best_model_is_good(network, tmp_path):
    feeds = tuple({"x": images(1)[k : k + 24]} for k in range(0, 96, 24))
    options = {"calibration": Calibration(feeds), "refusal": TargetError("nothing agrees"), "fastest": True}
    alone = [Plan(layers=(), precision="int8")]
    with pytest.raises(TargetError, match="nothing agrees"):
        run(network, tmp_path / "out.onnx", alone, targets={"latency": 900.0}, **options)
    assert not (tmp_path / "out.onnx").exists()
    run(network, tmp_path / "out.onnx", alone, targets={"params": 0.9}, guard=Guard(min_agreement=0), **options)
    assert (tmp_path / "out.onnx").exists()


def test_int8_needs_inputs(network, tmp_path):
    with pytest.raises(PlanError, match=r"int8 needs typical inputs .*: give calibration inputs"):
        run(network, tmp_path / "out.onnx", IN_INT8)
    assert list(tmp_path.iterdir()) == []


def point(name, speed, loss, agreement=1.0):
    ratios = Ratios(params=1, macs=1, flops=1, bytes=1, latency=speed, latency_low=speed - 0.01, latency_high=speed + 0.01)
    size = Size(params=1, macs=1, flops=2, bytes=4, milliseconds=1.0)
    ends = {"agreement_low": agreement - 0.02, "agreement_high": agreement, "difference_low": 0.0, "difference_high": 0.02}
    seen = Agreement(samples=400, agreement=agreement, difference=0.01, **ends)
    return Point(name=name, precision="int8", layers=0, size=size, ratios=ratios, approximation=0.01, loss=loss, chosen=seen)


@pytest.mark.parametrize(
    ("target", "best"),
    [
        (1.5, "int8"),  # three are fast enough: the one with the least loss
        (2.5, "low rank in int8"),
        (5.0, "low rank in int8"),  # none is: the fastest of those that agree
        (None, "low rank in int8"),  # the fastest of those that agree
    ],
)
def test_which_model_is_best(target, best):
    points = [
        point("int8", 2.0, 0.01),
        point("low rank", 1.7, 0.05),
        point("low rank in int8", 3.0, 0.06, 0.95),
        point("very low rank in int8", 4.0, 0.5, 0.6),
    ]
    wanted = Wanted({} if target is None else {"latency": target}, fastest=target is None)
    assert points[best_of(points, wanted)].name == best


def test_targets_on_size_are_met_before_speed_counts():
    """Dense int8 is faster, and reaches nothing of what was asked for."""
    small, fast = point("small", 0.9, 0.1), point("fast", 2.0, 0.01)
    small = small.model_copy(update={"ratios": small.ratios.model_copy(update={"flops": 3.9})})
    for target in (2.0, 4.0):  # met, and not quite
        assert best_of([fast, small], Wanted({"flops": target})) == 1
    lossy = point("lossy", 3.0, 0.5, 0.4)
    assert best_of([lossy, point("near", 1.2, 0.3, 0.85)], Wanted({}, fastest=True)) == 1  # neither agrees
    unstable = fast.model_copy(update={"unstable": True})
    assert best_of([unstable, point("steady", 1.995, 0.5)], Wanted({"latency": 2.015})) == 1
    assert best_of([fast, point("lossy", 3.0, 0.5)], Wanted({}, max_loss=0.1, fastest=True)) == 0


def test_without_a_target_on_latency_loss_counts_before_speed():
    exact, fast = point("exact", 0.9, 0.01), point("fast", 1.2, 0.3)
    small = [one.model_copy(update={"ratios": one.ratios.model_copy(update={"bytes": 2.0})}) for one in (fast, exact)]
    assert best_of(small, Wanted({"bytes": 1.5})) == 1
    assert best_of([small[1], small[0].model_copy(update={"loss": 0.01})], Wanted({"bytes": 1.5})) == 1  # equal: the faster one
    near = point("near", 1.005, 0.01)  # not proven to be faster
    assert best_of([near, fast], Wanted({"latency": 1.0, "params": 1.0})) == 1


@pytest.fixture
def wrong(monkeypatch):
    """Return a function from which on graphs are written with other cores than came."""
    real = fitted.rewrite

    def rewrite(resolved, cores, **options):
        return real(resolved, {name: [core * 1.01 for core in found] for name, found in cores.items()}, **options)

    return lambda: monkeypatch.setattr(fitted, "rewrite", rewrite)


def test_a_rewriting_that_is_wrong_writes_nothing(network, tmp_path, wrong):
    wrong()
    with pytest.raises(GraphError, match="expected the factored graph to differ by at most"):
        run(network, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def half_precision(rng):
    """One Gemm 64→64 whose input, weight and output are float16."""
    half = numpy_helper.from_array((rng.standard_normal((64, 64)) / 8).astype(np.float16), "c.weight")
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, ["n", 64]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Gemm", ["x", "c.weight"], ["y"], transB=1)], "g", ends[:1], ends[1:], [half])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_float16_model_may_differ_by_its_own_rounding_and_no_more(tmp_path, rng, wrong):
    plan = Plan(layers=(LayerPlan(name="c", format="svd", modes=(64, 64), ranks=(32,)),))
    report = run(half_precision(rng), tmp_path / "out.onnx", plan)
    assert 1e-4 < report.numerical < 8 * 2**-11  # eight unit roundoffs
    wrong()
    with pytest.raises(GraphError, match=r"expected the factored graph to differ by at most 0\.004 \(relative L2\) .*, got "):
        run(half_precision(rng), tmp_path / "wrong.onnx", plan)
    assert not (tmp_path / "wrong.onnx").exists()


def test_inputs_set_aside_change_nothing_in_the_model(network, tmp_path):
    """Neither cores nor biases depend on them; the agreement that is reported is of them alone."""
    values = images(1)
    aside = split(Calibration(({"x": values},)), network).judged.feeds
    rows = [k for k in range(len(values)) if any((values[k] == row).all() for feed in aside for row in feed["x"])]
    assert len(rows) == 32
    others = values.copy()
    others[rows] = 3.0 * images(9)[rows]
    reports = []
    for name, inputs in (("a", values), ("b", others)):
        reports.append(run(network, tmp_path / f"{name}.onnx", calibration=Calibration(({"x": inputs},))))
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    first, second = (report.aside for report in reports)
    assert first.samples == second.samples == 32
    assert first.difference != second.difference
    dense, factored = (ort.InferenceSession(network.SerializeToString()), ort.InferenceSession(tmp_path / "a.onnx"))
    before, after = (session.run(None, {"x": values[rows]})[0] for session in (dense, factored))
    assert first.agreement == pytest.approx((before.argmax(1) == after.argmax(1)).mean())
    assert first.difference == pytest.approx(np.linalg.norm(after - before) / np.linalg.norm(before - before.mean(0)), rel=1e-4)


def test_a_latency_target_is_not_met_on_unstable_times(network, tmp_path, monkeypatch):
    """Three times faster in the median, but the times vary: only the lower end of the interval counts."""
    real = compressing.bench
    size = Size(params=2, macs=2, flops=4, bytes=8, milliseconds=1.0)
    planning = PlanReport(
        targets={"latency": 2.0}, provider="cpu", batch=1, grid=8, loss_from="weights", dense=size, planned=size, rows=(),
        measured=None, machine=machine(), plan=PLAN,
    )  # fmt: skip
    for warnings, meets in (((), True), (("factored: unstable times",), False)):

        def bench(*arguments, warnings=warnings, **options):
            report = real(*arguments, **options)
            ratio = report.ratios[0].model_copy(update={"value": 3.0, "low": 1.5, "high": 6.0})
            return report.model_copy(update={"ratios": (ratio,), "warnings": warnings})

        monkeypatch.setattr(compressing, "bench", bench)
        report = run(network, tmp_path / "out.onnx", planning)
        assert report.meets == meets
        assert ("warning: factored: unstable times" in str(report)) == (not meets)


def test_too_little_agreement_is_said_and_not_accepted(network, tmp_path):
    calibration = Calibration(({"x": images(1)},))
    strict = run(network, tmp_path / "a.onnx", calibration=calibration, guard=Guard(max_difference=1e-4))
    assert not strict.accepted
    text = str(strict)
    assert "NOT accurate enough: outputs differ by" in text
    assert "ask for a smaller target, give more calibration inputs, or train" in text
    lenient = run(network, tmp_path / "a.onnx", calibration=calibration, guard=Guard(min_agreement=0.0))
    assert lenient.accepted
    assert "NOT accurate enough" not in str(lenient)
    unknown = run(network, tmp_path / "a.onnx")
    assert unknown.accepted
    assert "nothing is known about the accuracy of this model: no calibration inputs were given" in str(unknown)
    few = run(network, tmp_path / "a.onnx", calibration=Calibration(({"x": images(1, 3)},)))
    assert "too few calibration inputs to hold some out" in str(few)
    assert "no calibration inputs were given" in str(few.model_copy(update={"calibrated": False}))
    with pytest.raises(UsageError, match="min_agreement: expected a share from 0 to 1, got 90"):
        run(network, tmp_path / "a.onnx", guard=Guard(min_agreement=90))


def test_a_limit_on_the_loss_holds_for_a_single_model(network, tmp_path):
    """It is judged on inputs that the model was not fitted to, also where there is one plan in fp32."""
    feeds = tuple({"x": images(1)[k : k + 24]} for k in range(0, 96, 24))
    loose = run(network, tmp_path / "a.onnx", calibration=Calibration(feeds), max_loss=10.0)
    assert 0 < loose.loss <= 10.0
    assert loose.front[0].chosen.samples > 0
    tight = run(network, tmp_path / "a.onnx", calibration=Calibration(feeds), max_loss=loose.loss / 2)
    assert (loose.accepted, tight.accepted) == (True, False)
    assert f"NOT accurate enough: the loss is {tight.loss:.3g}, expected at most" in str(tight)


def test_outputs_of_another_shape_than_the_dense_models_are_no_error(rng, tmp_path):
    """A list of places, as NonZero and NonMaxSuppression give it: low rank finds other ones."""
    weights = {"w": rng.standard_normal((16, 16)).astype(np.float32), "limit": np.float32(4.0)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], "w"),
        helper.make_node("Greater", ["y", "limit"], ["above"]),
        helper.make_node("NonZero", ["above"], ["where"]),
        helper.make_node("Cast", ["where"], ["places"], to=1),
    ]
    model = make_model(nodes, weights, {"x": ["n", 16]}, {"y": ["n", 16], "places": [2, "found"]})
    plan = Plan(layers=(LayerPlan(name="w", format="svd", modes=(16, 16), ranks=(4,)),))
    feeds = tuple({"x": rng.standard_normal((24, 16)).astype(np.float32)} for _ in range(4))
    report = run(model, tmp_path / "a.onnx", plan, calibration=Calibration(feeds))
    assert report.approximation is None
    assert report.aside is not None
    assert CompressReport.model_validate_json(report.model_dump_json()).approximation is None


@pytest.mark.parametrize("better", [True, False])
def test_a_refinement_is_written_if_it_is_better_on_other_inputs(better, network, tmp_path):
    fitted_to, notes = [], []

    def refine(dense, factored, plan, calibration):
        fitted_to.append(calibration.count)
        changed = onnx.ModelProto()
        changed.CopyFrom(dense if better else factored)  # the dense network itself is better than any
        changed.producer_name = "refined"
        return changed

    def progress(stage, share, detail=""):
        if stage == "note":
            notes.append(detail)

    conditions = replace(QUICK, progress=progress)
    calibration = Calibration(({"x": images(1)},))
    report = run(network, tmp_path / "out.onnx", calibration=calibration, refine={"the fit": refine}, conditions=conditions)
    assert (onnx.load(tmp_path / "out.onnx").producer_name == "refined") == better
    assert fitted_to == [calibration.count - report.aside.samples - round((calibration.count - report.aside.samples) // 3)]
    assert [note.startswith("the fit is left out") for note in notes] == [True] * (not better)


def in_batches(count):
    """Inputs for a model with a fixed batch size of 32."""
    return Calibration(tuple({"x": images(k, 32)} for k in range(count)), batch=32)


@pytest.mark.parametrize("calibration", [Calibration(({"x": images(1, 3)},)), in_batches(3)], ids=["samples", "batches"])
def test_with_too_few_inputs_to_judge_on_there_is_no_further_fit(calibration, network, tmp_path):
    """It would be accepted on the inputs that it was fitted to."""
    notes = []
    refine = {"the fit": lambda *_: pytest.fail("nothing could judge it")}
    told = replace(QUICK, progress=listener(note=notes.append))
    report = run(network, tmp_path / "out.onnx", calibration=calibration, refine=refine, conditions=told)
    assert [note.partition(":")[0] for note in notes] == ["cores are not fitted further"]
    assert "too few calibration inputs to hold some out" in notes[0]
    assert report.aside is None
    assert [fit.layer for fit in report.fits] == ["a", "b"]  # layer by layer they are fitted all the same


@pytest.mark.parametrize(("batches", "held_out"), [(3, False), (5, True)])
def test_models_that_are_chosen_by_the_inputs_they_were_fitted_to_come_with_a_warning(batches, held_out, network, tmp_path):
    report = run(network, tmp_path / "out.onnx", IN_INT8, calibration=in_batches(batches), guard=Guard(min_agreement=0))
    assert report.held_out == held_out
    assert report.loss > 0
    warned = "were chosen by the inputs that it was fitted to" in " ".join(str(report).split())
    assert warned == (not held_out)
    assert ("nothing is known about the accuracy of this model" in str(report)) == (not held_out)


def test_labels_that_do_not_apply_are_told_with_a_plan_too(rng, tmp_path):
    """One class per sample, for scores of every step of a sequence."""
    weight = rng.standard_normal((16, 16)).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "fc"], ["y"], "fc")
    model = make_model([node], {"fc": weight}, {"x": ["n", 3, 16]}, {"y": ["n", 3, 16]})
    plan = Plan(layers=(LayerPlan(name="fc", format="svd", modes=(16, 16), ranks=(4,)),))
    notes = []
    told = replace(QUICK, progress=listener(note=notes.append))
    x = rng.standard_normal((40, 3, 16)).astype(np.float32)
    calibration = Calibration(({"x": x},), np.arange(40) % 16)
    same = {"the fit": lambda dense, factored, *_: factored}
    run(model, tmp_path / "out.onnx", plan, calibration=calibration, refine=same, conditions=told)
    assert "the labels of the calibration inputs are not used: expected scores (samples, classes)" in notes[0]


@pytest.mark.parametrize("metric", [None, "first_output_alone:score"])
def test_a_refinement_is_judged_by_the_metric(metric, network, tmp_path, monkeypatch):
    """The refined network is exact in its first output, which alone is scored, and wrong in all others."""
    (tmp_path / "first_output_alone.py").write_text(
        "def score(outputs, labels):\n    return -abs(outputs['y'][:, 0] - labels)\n"
    )
    monkeypatch.chdir(tmp_path)
    onnx.save(network, tmp_path / "dense.onnx")
    labels = ort.InferenceSession(tmp_path / "dense.onnx").run(None, {"x": images(1)})[0][:, 0]

    def refine(dense, factored, plan, calibration):
        changed = onnx.ModelProto()
        changed.CopyFrom(dense)
        weight = next(tensor for tensor in changed.graph.initializer if tensor.name == "fc.weight")
        values = numpy_helper.to_array(weight).copy()
        values[1:] = 0
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))
        changed.producer_name = "refined"
        return changed

    calibration = Calibration(({"x": images(1)},), labels if metric else None)
    run(network, tmp_path / "out.onnx", calibration=calibration, refine={"the fit": refine}, metric=metric)
    assert (onnx.load(tmp_path / "out.onnx").producer_name == "refined") == (metric is not None)


def test_a_metric_without_labels_is_refused(network, tmp_path):
    for calibration, reason in (
        (None, "metric top1 is a loss that is measured, got no calibration inputs"),
        (Calibration(({"x": images(1)},)), "metric top1 scores outputs by labels, got calibration inputs without labels"),
    ):
        with pytest.raises(PlanError, match=reason):
            run(network, tmp_path / "out.onnx", calibration=calibration, metric="top1")
    assert not (tmp_path / "out.onnx").exists()


def test_scores_of_a_metric_are_shown_as_they_are(network, tmp_path, monkeypatch):
    (tmp_path / "sum_of_scores.py").write_text("def score(outputs, labels):\n    return outputs['y'].sum(1) + labels\n")
    monkeypatch.chdir(tmp_path)
    report = run(network, tmp_path / "out.onnx", test=Labelled({"x": images(1)}, np.full(96, 1000.0), "sum_of_scores:score"))
    assert 900 < report.accuracy.reference.mean < 1100
    row = next(line for line in str(report).splitlines() if "mean score sum_of_scores:score" in line)
    assert f" {report.accuracy.reference.mean:.4f} " in row
    assert f" {report.accuracy.difference:+.4f} " in row
    assert "points" not in str(report)


def test_a_refinement_of_a_layer_that_becomes_a_scan_sees_its_node(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(contraction, "SCAN_FROM", 1)
    weights = {
        "w": rng.standard_normal((1, 16, 24)).astype(np.float32) / 5,
        "r": rng.standard_normal((1, 16, 4)).astype(np.float32) / 2,
    }
    node = helper.make_node("LSTM", ["x", "w", "r"], ["y"], "rnn", hidden_size=4)
    model = make_model([node], weights, {"x": [5, "n", 24]}, {"y": [5, 1, "n", 4]})
    plan = Plan(layers=(LayerPlan(name="w", format="ttm", modes=(4, 4, 6, 4), ranks=(1, 2, 1)),))
    seen, refined = [], []

    def refine(dense, factored, plan, calibration):
        seen.append({node.op_type for node in factored.graph.node})
        changed = onnx.ModelProto()
        changed.CopyFrom(factored)
        (core,) = [tensor for tensor in changed.graph.initializer if tensor.name == "w/0"]
        values, (target,) = numpy_helper.to_array(core), outputs(dense)
        tried = {}
        for factor in (*np.linspace(0.7, 0.98, 15), *np.linspace(1.02, 1.3, 15)):
            core.CopyFrom(numpy_helper.from_array((factor * values).astype(np.float32), core.name))
            tried[float(np.square(outputs(changed)[0] - target).sum())] = core.SerializeToString()
        core.ParseFromString(tried[min(tried)])
        refined.append(numpy_helper.to_array(core))
        return changed

    def outputs(model):
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(None, feeds[0])

    feeds = ({"x": rng.standard_normal((5, 2, 24)).astype(np.float32)},) * 4  # alike: what is better on one is so on all
    run(model, tmp_path / "out.onnx", plan, calibration=Calibration(feeds), refine={"the fit": refine})
    (ops,) = seen
    assert "LSTM" in ops
    assert "Scan" not in ops
    written = onnx.load(tmp_path / "out.onnx").graph
    assert "Scan" in {node.op_type for node in written.node}
    (core,) = [tensor for tensor in written.initializer if tensor.name == "w/0"]
    np.testing.assert_array_equal(numpy_helper.to_array(core), refined[0])


def test_a_plan_without_layers_is_refused_and_products_in_bodies_count_as_none(tmp_path, rng):
    weight = rng.standard_normal((16, 16)).astype(np.float32)
    out = [helper.make_tensor_value_info("t", onnx.TensorProto.FLOAT, None)]
    then = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["t"], "fc")], "then", [], out)
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["t"])], "else", [], out)
    node = helper.make_node("If", ["yes"], ["y"], then_branch=then, else_branch=other)
    model = make_model([node], {"w": weight, "yes": np.array(True)}, {"x": ["n", 16]}, {"y": ["n", 16]})
    plan = Plan(layers=(LayerPlan(name="fc", format="svd", modes=(16, 16), ranks=(4,)),))
    report = run(model, tmp_path / "m.onnx", plan)
    assert (report.ratios.macs, report.ratios.params) == (1.0, 2.0)
    with pytest.raises(PlanError, match="it names no layer"):
        compress(model, Plan(layers=()), tmp_path / "n.onnx")


def test_layers_stay_in_fp32_where_int8_alone_would_not_agree(network, tmp_path):
    """One input channel is a thousand times as large as the others, which one scale for all of them rounds away."""
    feeds = []
    for k in range(4):
        x = images(k, 32)
        x[:, 0] *= 3000.0
        feeds.append({"x": x})
    with_outlier = onnx.ModelProto.FromString(network.SerializeToString())
    weight = next(tensor for tensor in with_outlier.graph.initializer if tensor.name == "a.weight")
    values = numpy_helper.to_array(weight).copy()
    values[:, 0] /= 3000.0
    weight.CopyFrom(numpy_helper.from_array(values, "a.weight"))
    limits = Guard(min_agreement=0, max_difference=0.1)
    no_layers = Plan(layers=(), precision="int8")
    report = run(with_outlier, tmp_path / "o.onnx", [no_layers, PLAN], calibration=Calibration(tuple(feeds)), guard=limits)
    point = report.front[0]
    assert point.spared == ("a",)
    assert point.name == "dense in int8, 1 layer in fp32"
    assert point.aside.difference < 0.1
    alone = run(
        with_outlier,
        tmp_path / "p.onnx",
        [no_layers, PLAN],
        calibration=Calibration(tuple(feeds)),
        guard=Guard(min_agreement=0),
    )
    assert alone.front[0].spared == ()
    assert alone.front[0].aside.difference > 0.1


def test_where_only_fp32_agrees_the_network_in_int8_is_measured_all_the_same(rng, tmp_path):
    """Its only layer would have to stay in fp32, and then nothing is in int8."""
    weights = {"head.weight": rng.standard_normal((10, 16)).astype(np.float32)}
    nodes = [helper.make_node("Tanh", ["x"], ["t"]), helper.make_node("Gemm", ["t", "head.weight"], ["y"], "head", transB=1)]
    model = make_model(nodes, weights, {"x": ["n", 16]}, {"y": ["n", 10]})
    feeds = Calibration(tuple({"x": rng.standard_normal((24, 16)).astype(np.float32)} for _ in range(4)))
    limits = Guard(min_agreement=0, max_difference=1e-5)
    report = run(model, tmp_path / "o.onnx", Plan(layers=(), precision="int8"), calibration=feeds, guard=limits)
    assert [one.name for one in report.front] == ["dense in int8"]
    assert report.front[0].aside.difference > 1e-5
    assert not report.accepted


IN_FP16 = PLAN.model_copy(update={"precision": "fp16"})
FP16 = 5e-3  # relative L2: eleven bits a value, a few layers


def scaled(network, factor):
    """Return the network with larger values between its first two layers, and the same outputs."""
    changed = onnx.ModelProto.FromString(network.SerializeToString())
    for tensor in changed.graph.initializer:
        if tensor.name in ("scale", "shift", "b.weight"):
            by = 1 / factor if tensor.name == "b.weight" else factor
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(by), tensor.name))
    return changed


def stored(path):
    return {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}


def test_a_plan_for_fp16_is_measured_and_written_in_fp16(network, tmp_path, monkeypatch):
    feeds = Calibration(tuple({"x": images(1)[k : k + 24]} for k in range(0, 96, 24)))
    monkeypatch.setattr(halves, "computes_in_fp16", lambda settings: settings.on_gpu)
    report = run(network, tmp_path / "half.onnx", IN_FP16, calibration=feeds)
    single = run(network, tmp_path / "single.onnx", PLAN, calibration=feeds)
    assert [point.name for point in report.front] == ["dense in fp16", "low rank in fp16"]
    assert (report.written, report.precision, len(report.layers)) == (1, "fp16", 2)
    dense, low_rank = report.front
    assert dense.approximation < FP16  # nothing but rounding
    assert all(point.aside.samples == 32 and point.loss > 0 for point in report.front)
    assert dense.size.bytes < 0.6 * report.dense.bytes
    assert low_rank.size.bytes < 0.7 * single.factored.bytes
    assert low_rank.size.params == single.factored.params
    types = set(stored(tmp_path / "half.onnx").values())
    assert onnx.TensorProto.FLOAT16 in types
    assert onnx.TensorProto.FLOAT not in types
    graph = onnx.load(tmp_path / "half.onnx").graph
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    assert report.with_casts
    slow = report.model_copy(update={"ratios": report.ratios.model_copy(update={"latency_low": 0.9})})
    assert "NOT measured to be faster than the dense model: this processor computes in fp32" in " ".join(str(slow).split())
    assert CompressReport.model_validate_json(report.model_dump_json()) == report


def test_fp16_needs_no_inputs(network, tmp_path):
    report = run(network, tmp_path / "out.onnx", IN_FP16)
    assert [point.name for point in report.front] == ["dense in fp16", "low rank in fp16"]
    assert "no calibration inputs were given" in str(report)
    assert onnx.TensorProto.FLOAT16 in stored(tmp_path / "out.onnx").values()


def test_layers_that_overflow_stay_in_fp32_and_are_in_the_plan(network, tmp_path):
    feeds = Calibration(tuple({"x": images(1)[k : k + 24]} for k in range(0, 96, 24)))
    report = run(scaled(network, 1e5), tmp_path / "out.onnx", IN_FP16, calibration=feeds)
    dense, low_rank = report.front
    assert "b" in dense.spared
    assert dense.approximation < FP16
    assert dense.name.startswith("dense in fp16, ")
    assert f"layers that stay in fp32: {', '.join(low_rank.spared)}" in " ".join(str(report).split())
    types = stored(tmp_path / "out.onnx")
    assert set(types.values()) == {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
    assert types["a/0"] == onnx.TensorProto.FLOAT16
    given = IN_FP16.model_copy(update={"fp32": (*low_rank.spared, "fc")})
    again = run(scaled(network, 1e5), tmp_path / "again.onnx", given, calibration=feeds)
    assert again.front[1].spared == given.fp32
    assert {name: kind for name, kind in stored(tmp_path / "again.onnx").items() if name != "fc.weight"} == {
        name: kind for name, kind in types.items() if name != "fc.weight"
    }
    assert stored(tmp_path / "again.onnx")["fc.weight"] == onnx.TensorProto.FLOAT


def test_a_model_that_overflows_on_inputs_set_aside_is_left_out(network, tmp_path):
    """Its values stay in the range on all inputs that it was made with, and leave it on another one."""
    x = images(1)
    calibration = Calibration(tuple({"x": x[k : k + 24]} for k in range(0, 96, 24)))
    judged = split(calibration, network).judged
    place = int(np.flatnonzero((x == judged.feeds[0]["x"][0]).all((1, 2, 3)))[0])
    x[place] *= 1e3
    notes = []
    told = replace(QUICK, progress=lambda stage, share, detail="": notes.append(detail) if stage == "note" else None)
    loud = scaled(network, 1e2)
    report = run(loud, tmp_path / "out.onnx", [PLAN, IN_FP16], calibration=calibration, conditions=told)
    assert [point.name for point in report.front] == ["low rank in fp32"]
    assert "overflows in fp16" in notes[0]
    assert notes[0].startswith("the dense network in fp16 is left out: layer ")
    assert "give more calibration inputs" in notes[0]
    with pytest.raises(GraphError, match="Only inputs that were held out show it"):
        run(loud, tmp_path / "none.onnx", IN_FP16, calibration=calibration)
    assert not (tmp_path / "none.onnx").exists()
