"""Plans of whole networks, on times that are known: no test here depends on how fast the machine is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from conftest import make_model
from onnx import helper, numpy_helper
from recurrent_graphs import recurrent_model

from tensorrail_exporter import LayerPlan, Plan, PlanError, factorize
from tensorrail_exporter.calibrate.inputs import Calibration
from tensorrail_exporter.search import planner, selection, verification
from tensorrail_exporter.search.fastest_agreeing import _Tries, agrees, allowed_share, expected_share, independent
from tensorrail_exporter.search.fastest_form import Form, fastest_blocks
from tensorrail_exporter.search.guard import Guard
from tensorrail_exporter.search.latency_table import LatencyTable
from tensorrail_exporter.search.layer_profile import layer_times, slower_layers
from tensorrail_exporter.search.planner import plan_network
from tensorrail_exporter.search.report import PlanReport
from tensorrail_exporter.search.selection import macs_of
from tensorrail_exporter.search.targets import Search
from tensorrail_exporter.search.timed_layers import Timed, as_layers, key_of
from tensorrail_exporter.search.verification import Verification, random_cores
from tensorrail_runtime.errors import TargetError
from tensorrail_runtime.graphs.cost import cost
from tensorrail_runtime.measure import latency
from tensorrail_runtime.measure.accuracy import wilson
from tensorrail_runtime.measure.agreement import Agreement, compared
from tensorrail_runtime.measure.latency import Ratio
from tensorrail_runtime.measure.timing import Conditions, Timing
from tensorrail_runtime.sessions import halves
from tensorrail_runtime.sessions.session import Session


@pytest.fixture
def network(rng):
    """Three convolutions 64→64 in a row, and one 8→8 that no grid of 16 fits."""
    weights = {f"c{k}.weight": (rng.standard_normal((64, 64, 3, 3)) / 24).astype(np.float32) for k in range(3)}
    weights["narrow.weight"] = rng.standard_normal((8, 64, 1, 1)).astype(np.float32)
    nodes = []
    for k in range(3):
        nodes.append(helper.make_node("Conv", [f"x{k}", f"c{k}.weight"], [f"y{k}"], f"c{k}", pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"y{k}"], [f"x{k + 1}"], f"r{k}"))
    nodes.append(helper.make_node("Conv", ["x3", "narrow.weight"], ["out"], "narrow"))
    return make_model(nodes, weights, {"x0": ["batch", 64, 12, 12]}, {"out": ["batch", 8, 12, 12]})


@pytest.fixture
def known_times(monkeypatch):
    """Make every layer take a microsecond a thousand MACs, times a factor that a test may set by the steps' text."""
    factors: dict[str, float] = {}

    def measure(self, wanted, settings, *, seconds=0.0, whole=None, progress=None):
        for layer, options in wanted.items():
            for option in (None, *options):
                macs = layer.macs if option is None else macs_of(layer, option)
                factor = next((f for text, f in factors.items() if option is not None and text in option.steps), 1.0)
                milliseconds = 1e-6 * macs * factor * factors.get("table", 1.0)
                entry = Timed(key=key_of(layer, option), layer=layer.name, form="", milliseconds=milliseconds)
                self.times[entry.key] = entry

    monkeypatch.setattr(LatencyTable, "measure", measure)
    monkeypatch.setattr(LatencyTable, "sketch", lambda *_: None)

    def bench(paths, timing, settings, **options):
        here = replace(timing, seconds=0.0, warmup=0.0, processes=0)  # in this process, for its times are replaced
        run = latency.bench(paths, here, settings, **options)
        total = 1e-6 * (3 * 36864 + 512) * 144
        latencies = tuple(one.model_copy(update={"p50": total}) for one in run.latencies)
        value = factors.get(f"measured {paths[-1].name}", factors.get("measured", 2.01))
        ratios = tuple(Ratio(model=r.model, reference=r.reference, value=value, low=value, high=value) for r in run.ratios)
        return run.model_copy(update={"latencies": latencies, "ratios": ratios})

    def profiled(dense, factored, resolved, **_):
        return {name: (1.0, factors.get(f"profile {name}", 0.5)) for name in resolved.layers}

    monkeypatch.setattr(verification, "bench", bench)
    monkeypatch.setattr(verification, "layer_times", profiled)
    return factors


def search(tmp_path):
    return Search(grid=16, cache=tmp_path)


def test_a_plan_keeps_its_budget_and_says_why_a_layer_stays_dense(network, known_times, tmp_path):
    report = plan_network(network, {"latency": 2.0}, search(tmp_path))
    assert report.planned.milliseconds <= report.dense.milliseconds / 2.0 * (1 + 1e-9)
    assert report.meets
    reasons = {row.layer: row.reason for row in report.rows if row.format is None}
    assert reasons["narrow"] == "too narrow for a rank on the grid"
    assert PlanReport.model_validate_json(report.model_dump_json()) == report


def test_layers_never_take_longer_than_the_network(network, known_times, tmp_path):
    """Their table was made under load: it says four times what the whole network takes."""
    known_times["table"] = 4.0
    report = plan_network(network, {"latency": 2.0}, search(tmp_path))
    assert sum(row.dense_ms for row in report.rows) == pytest.approx(report.dense.milliseconds)
    assert 0 < report.planned.milliseconds <= report.dense.milliseconds / 2.0 * (1 + 1e-9)
    assert report.predicted > 1
    (warning,) = report.warnings
    assert "but the network takes" in warning
    assert "scaled by 0.25" in warning
    assert warning in " ".join(str(report).split())
    known_times["table"] = 1.0
    assert plan_network(network, {"latency": 2.0}, search(tmp_path)).warnings == ()


def test_what_is_promised_is_what_factorize_makes(network, known_times, tmp_path):
    report = plan_network(network, {"flops": 2.0}, search(tmp_path))
    made = factorize(network, report.plan, random_cores(network, report.plan))
    rows = {row.layer: row for row in report.rows if row.format}
    assert rows.keys() == {layer.layer for layer in made.layers}
    for layer in made.layers:
        assert layer.flops == 2 * rows[layer.layer].macs
        assert layer.stored_params == rows[layer.layer].params
        assert layer.steps == rows[layer.layer].steps
    assert report.planned.macs <= report.dense.macs / 2.0


def test_a_layer_that_is_not_faster_stays_dense(network, known_times, tmp_path):
    known_times["conv"] = 50.0  # whatever the form, it is slower
    with pytest.raises(PlanError, match=r"latency=2 cannot be met: at most 1.00× is reachable, .*; ask for less"):
        plan_network(network, {"latency": 2.0}, search(tmp_path))
    with pytest.raises(PlanError, match="allow slower layers"):
        plan_network(network, {"params": 2.0}, search(tmp_path))
    allowed = Search(grid=16, cache=tmp_path, allow_slower=True)
    report = plan_network(network, {"params": 2.0}, allowed)
    assert report.planned.params <= report.dense.params / 2.0


def test_a_plan_in_fp16_counts_from_the_dense_network_in_fp32(network, known_times, tmp_path, monkeypatch):
    monkeypatch.setattr(halves, "computes_in_fp16", lambda settings: settings.on_gpu)
    known_times |= {"measured start.onnx": 0.8, "measured chosen.onnx": 2.01}
    asked = replace(search(tmp_path), precision="fp16")
    report = plan_network(network, {"latency": 2.0}, asked)
    assert (report.precision, report.plan.precision, report.meets) == ("fp16", "fp16", True)
    assert report.planned.bytes < report.dense.bytes / 2
    assert sum(row.dense_ms for row in report.rows) == pytest.approx(report.dense.milliseconds)  # of the table
    (warning,) = report.warnings
    assert "computes fp16 as fp32 with casts" in warning
    report = plan_network(network, {"bytes": 1.9}, asked)
    assert report.plan == Plan(layers=(), precision="fp16")  # the dense network is small enough in fp16
    assert (report.meets, report.measured.value) == (True, 0.8)
    assert "the planned network is not faster" in str(report)


def test_a_plan_in_int8_counts_from_the_dense_network_in_fp32(network, known_times, tmp_path):
    known_times |= {"measured start.onnx": 2.0, "measured chosen.onnx": 4.02}
    asked = replace(search(tmp_path), precision="int8")
    report = plan_network(network, {"latency": 4.0}, asked)
    assert (report.precision, report.meets) == ("int8", True)
    assert report.predicted >= 4.0  # twice for int8, and twice for the ranks
    assert report.planned.bytes < report.dense.bytes / 4
    for row in report.rows:
        assert row.ms <= row.dense_ms
    assert len(list(tmp_path.glob("latency-*.json"))) == 0  # nothing was measured, so no file of fp32 is touched
    known_times["measured chosen.onnx"] = 2.0
    report = plan_network(network, {"latency": 1.9}, asked)
    assert report.plan.layers == ()  # the dense network is fast enough in int8
    assert (report.reached["latency"], report.meets) == (2.0, True)
    with pytest.raises(TargetError, match=r"latency=900 cannot be met: at most (\d+)\.\d\d× is reachable") as refused:
        plan_network(network, {"latency": 900.0}, asked)
    with pytest.raises(TargetError) as in_fp32:
        plan_network(network, {"latency": 900.0}, search(tmp_path))
    reachable = [float(str(error.value).partition("at most ")[2].partition("×")[0]) for error in (refused, in_fp32)]
    assert reachable[0] > 1.5 * reachable[1]


def test_layers_too_narrow_for_the_grid_are_named_as_the_reason(network, known_times, tmp_path):
    coarse = Search(grid=512, cache=tmp_path)
    with pytest.raises(TargetError, match=r"at most 1\.00× is reachable, .* or for ranks in steps of less than 512, for which"):
        plan_network(network, {"flops": 2.0}, coarse)
    with pytest.raises(TargetError, match=r"ask for less, or allow slower layers$"):
        plan_network(network, {"flops": 2.0}, replace(coarse, keep=("*",)))


def test_a_target_out_of_reach_is_refused_before_all_forms_are_timed_and_losses_measured(
    network, known_times, tmp_path, monkeypatch
):
    timed = []
    measure = LatencyTable.measure

    def counted(self, wanted, settings, **options):
        timed.append(sum(map(len, wanted.values())))
        measure(self, wanted, settings, **options)

    monkeypatch.setattr(LatencyTable, "measure", counted)
    monkeypatch.setattr(planner, "approximations_of", lambda *_: pytest.fail("losses were measured"))
    with pytest.raises(TargetError, match=r"latency=90 cannot be met: at most \d+\.\d\d× is reachable"):
        plan_network(network, {"latency": 90.0}, search(tmp_path))
    assert timed == [3 * 2]  # two forms of each layer
    timed.clear()
    with pytest.raises(TargetError, match="flops=90 cannot be met"):
        plan_network(network, {"flops": 90.0}, search(tmp_path))
    (at_once,) = timed
    assert at_once > 3 * 2  # the forms with the fewest MACs need not be those with the fewest parameters or bytes


@pytest.mark.parametrize(("slow_sketches", "refused"), [(2, True), (1, False)])
def test_two_rough_measurements_that_agree_refuse_a_target(slow_sketches, refused, network, known_times, tmp_path, monkeypatch):
    """No form is faster in the first sketches; if a second one finds faster forms, all are timed."""
    measure, sketched, timed = LatencyTable.measure, [], []

    def sketch(self, wanted, settings, seconds, progress):
        sketched.append(len(wanted))
        rough = LatencyTable(self.target)
        measure(rough, wanted, settings)
        if len(sketched) <= slow_sketches:
            rough.times = {key: timed.model_copy(update={"milliseconds": 1.0}) for key, timed in rough.times.items()}
        return rough

    monkeypatch.setattr(LatencyTable, "sketch", sketch)
    monkeypatch.setattr(LatencyTable, "measure", lambda *args, **options: (timed.append(1), measure(*args, **options)))
    if refused:
        with pytest.raises(TargetError, match=r"latency=1\.5 cannot be met: at most 1\.00× is reachable"):
            plan_network(network, {"latency": 1.5}, search(tmp_path))
        assert timed == []
    else:
        plan_network(network, {"latency": 1.5}, search(tmp_path))
        assert timed
    assert len(sketched) == 2


def test_a_layer_in_a_body_is_named_as_not_timed(network, known_times, tmp_path, rng):
    body = helper.make_graph(
        [helper.make_node("MatMul", ["out", "inner.weight"], ["inner"], "product")],
        "body",
        [],
        [helper.make_tensor_value_info("inner", onnx.TensorProto.FLOAT, ["n", 8, 12, 12])],
    )
    network.graph.node.append(helper.make_node("If", ["flag"], ["last"], "if", then_branch=body, else_branch=body))
    inner = rng.standard_normal((12, 12)).astype(np.float32)
    network.graph.initializer.extend(
        [numpy_helper.from_array(inner, "inner.weight"), numpy_helper.from_array(np.array(True), "flag")]
    )
    network.graph.output.append(helper.make_tensor_value_info("last", onnx.TensorProto.FLOAT, ["batch", 8, 12, 12]))
    report = plan_network(network, {"latency": 2.0}, search(tmp_path))
    assert [row.layer for row in report.rows] == ["c0", "c1", "c2", "narrow", "inner"]
    assert report.rows[-1].reason == "not timed: in the body of an If, Loop or Scan, whose runs are not known"
    assert report.rows[-1].dense_params == report.rows[-1].params == 144
    assert report.meets


def test_a_layer_slower_in_its_place_gets_another_form_or_stays_dense(network, known_times, tmp_path):
    known_times["measured"] = 1.4
    known_times["profile c1"] = 1.2  # the profile contradicts the table, whatever the form
    report = plan_network(network, {"latency": 1.4}, search(tmp_path))
    assert report.meets
    assert report.slower == ()
    assert "c1" not in {layer.name for layer in report.plan.layers}
    allowed = plan_network(network, {"params": 2.5}, Search(grid=16, cache=tmp_path, allow_slower=True))
    assert allowed.slower == ("c1",)


def test_times_of_layers_come_from_both_profiles(network, tmp_path):
    plan = Plan(layers=(LayerPlan(name="c0", format="tt", modes=(64, 9, 64), ranks=(1, 32, 32, 1)),))
    onnx.save(network, tmp_path / "dense.onnx")
    onnx.save(factorize(network, plan, random_cores(network, plan)).model, tmp_path / "factored.onnx")
    ((name, (dense, factored)),) = layer_times(tmp_path / "dense.onnx", tmp_path / "factored.onnx", plan).items()
    assert name == "c0"
    assert dense > 0
    assert factored > 0
    assert slower_layers({"a": (1.0, 2.0), "b": (2.0, 1.0)}) == ("a",)


def lstm(rng, hidden=64, inputs=64):
    return recurrent_model("LSTM", "forward", hidden, inputs, rng, bias=False)


def test_the_weights_of_one_node_are_planned_together(rng, known_times, tmp_path):
    conditions = Conditions(Timing(shapes={"x": (8, 1, 64)}), Session())
    report = plan_network(lstm(rng), {"flops": 3.0}, search(tmp_path), conditions=conditions)
    assert {layer.name for layer in report.plan.layers} == {"r", "w"}
    assert report.planned.macs <= report.dense.macs / 3.0
    assert sum(row.dense_macs for row in report.rows) == report.dense.macs
    assert {row.layer: row.what for row in report.rows} == {"w": "LSTM 64→256 on 8", "r": "LSTM recurrence 64→256 on 8"}
    assert "show the time of the whole node, which counts once" in str(report)
    without = report.model_copy(update={"rows": tuple(row for row in report.rows if row.layer == "w")})
    assert "whole node" not in str(without)


def test_a_recurrent_weight_that_stays_dense_has_the_reason_in_its_row(rng, known_times, tmp_path):
    model = recurrent_model("LSTM", "forward", 64, 64, rng, bias=False, clip=1.0)
    conditions = Conditions(Timing(shapes={"x": (8, 1, 64)}), Session())
    report = plan_network(model, {"flops": 1.5}, search(tmp_path), conditions=conditions)
    (row,) = (row for row in report.rows if row.layer == "r")
    assert row.reason.startswith(
        "cannot be rewritten: its cores run in a Scan, and none is written for a node with the attribute"
    )


def test_a_recurrent_weight_whose_scan_is_slower_than_the_operator_stays_dense(rng, known_times, tmp_path):
    known_times["scan"] = 50.0
    conditions = Conditions(Timing(shapes={"x": (8, 1, 64)}), Session())
    report = plan_network(lstm(rng), {"flops": 1.5}, search(tmp_path), conditions=conditions)
    assert {layer.name for layer in report.plan.layers} == {"w"}
    with pytest.raises(TargetError, match="target flops=3 cannot be met"):
        plan_network(lstm(rng), {"flops": 3.0}, search(tmp_path), conditions=conditions)


def test_two_weights_of_one_node_have_the_time_of_both(rng, tmp_path):
    model = lstm(rng, 8, 8)
    plan = Plan(layers=tuple(LayerPlan(name=name, format="svd", modes=(32, 8), ranks=(2,)) for name in "wr"))
    onnx.save(model, tmp_path / "dense.onnx")
    onnx.save(factorize(model, plan, random_cores(model, plan)).model, tmp_path / "factored.onnx")
    conditions = Conditions(Timing(shapes={"x": (8, 1, 8)}), Session())
    times = layer_times(tmp_path / "dense.onnx", tmp_path / "factored.onnx", plan, conditions=conditions)
    assert times["w"] == times["r"]
    assert min(times["w"]) > 0


def test_kept_layers_are_kept(network, known_times, tmp_path):
    known_times["measured"] = 1.31
    report = plan_network(network, {"latency": 1.3}, Search(grid=16, cache=tmp_path, keep=("c[01]",)))
    assert [row.layer for row in report.rows if row.reason == "kept as asked"] == ["c0", "c1"]
    assert {layer.name for layer in report.plan.layers} <= {"c2"}


def test_the_fastest_network_within_a_loss(network, known_times, tmp_path):
    small, large = (plan_network(network, {}, Search(grid=16, cache=tmp_path, max_loss=loss)) for loss in (0.2, 1.0))
    assert 0 < sum(row.loss for row in small.rows) <= 0.2
    assert sum(row.loss for row in large.rows) <= 1.0
    assert large.planned.milliseconds < small.planned.milliseconds < small.dense.milliseconds
    with pytest.raises(PlanError, match="max_loss: expected a positive number, got -1"):
        plan_network(network, {}, Search(max_loss=-1.0))


def inputs(rng, count=16):
    return Calibration(({"x0": rng.standard_normal((count, 64, 12, 12)).astype(np.float32)},))


def test_the_fastest_network_whose_outputs_agree(network, known_times, tmp_path, rng):
    calibration, least = inputs(rng), {"latency": 1.05}
    near, far = (
        plan_network(
            network,
            least,
            Search(grid=16, cache=tmp_path, guard=Guard(max_difference=limit), improve_seconds=1.0),
            calibration=calibration,
        )
        for limit in (0.4, 0.9)
    )
    for report, limit in ((near, 0.4), (far, 0.9)):
        assert report.verified.chosen.difference <= limit
        assert report.verified.aside.samples == 4
        assert "on the 4 inputs that networks were compared on: outputs differ by" in " ".join(str(report).split())
    assert far.planned.milliseconds < near.planned.milliseconds < near.dense.milliseconds / 1.05
    # The fastest choice of all agrees less.
    cheapest = plan_network(network, {"latency": 1.05}, Search(grid=16, cache=tmp_path, max_loss=1e3), calibration=calibration)
    assert cheapest.verified.aside.difference > 0.4


def test_where_no_fast_network_agrees_that_is_said(network, known_times, tmp_path, rng):
    for limit, when in ((1e-6, "before cores are fitted, on 8"), (0.12, "with fitted cores, on 4")):
        search = Search(grid=16, cache=tmp_path, guard=Guard(max_difference=limit))
        reason = rf"is 1.05× faster and agrees .*\(a difference .* {limit:g} of .*\): with the nearest .* {when} inputs"
        with pytest.raises(TargetError, match=reason):
            plan_network(network, {"latency": 1.05}, search, calibration=inputs(rng))


def test_an_agreement_that_cannot_be_measured_is_refused_at_once(network, tmp_path, rng):
    with pytest.raises(PlanError, match="is measured on calibration inputs, got none"):
        plan_network(network, {}, Search(guard=Guard()))
    with pytest.raises(PlanError, match=r"output 'out' holds no class scores.* give max_difference"):
        plan_network(network, {}, Search(guard=Guard()), calibration=inputs(rng))
    with pytest.raises(PlanError, match="too few calibration inputs to fit cores to some and to compare"):
        plan_network(network, {}, Search(guard=Guard(max_difference=0.1)), calibration=inputs(rng, 3))
    with pytest.raises(PlanError, match="limit on the loss or on the agreement of the outputs, got both"):
        plan_network(network, {}, Search(guard=Guard(), max_loss=1.0), calibration=inputs(rng))


def test_the_share_that_disagrees_is_in_proportion_to_the_difference():
    """Of 50 inputs, 2, 5 and 9 disagree where outputs differ by 0.1, 0.2 and 0.5; a ruined network says nothing."""
    networks = [measured_as(50, wrong, moved) for wrong, moved in ((2, 0.1), (5, 0.2), (9, 0.5), (48, 1.0))]
    assert expected_share(networks, 0.4) == pytest.approx(0.4 * (0.32 + 0.01) / 0.8)
    assert expected_share(networks[3:], 0.5) == pytest.approx(0.5 * (0.96 + 0.01))
    assert expected_share([measured_as(50, None, 0.3)], 0.3) is None
    assert expected_share([measured_as(5, 0, 0.2)], 0.4) == pytest.approx(0.2)  # none of five inputs is not none of all


@pytest.mark.parametrize(("wrong", "samples", "good"), [(6, 60, False), (4, 60, True), (0, 5, True), (560, 6000, True)])
def test_few_inputs_must_agree_better_than_the_limit(wrong, samples, good):
    """What is chosen for a share of exactly 90 % of 60 inputs has less on others as often as not."""
    scores = np.tile(np.eye(2)[1], (samples, 1)) - 0.5
    changed = np.where(np.arange(samples)[:, None] < wrong, -scores, scores)
    assert agrees(compared([[scores]], [[changed]], [samples]), Guard(min_agreement=0.9)) == good


@pytest.mark.parametrize("least", [0.9, 0.95, 0.99, 1.0])
@pytest.mark.parametrize("samples", [5, 62])
def test_what_is_aimed_at_is_what_is_accepted(samples, least):
    guard = Guard(min_agreement=least)
    accepted = [wrong for wrong in range(samples) if agrees(agreement_of(samples, wrong), guard)]
    assert accepted == list(range(len(accepted)))  # none is, or as many as there may be
    assert allowed_share(guard, samples) == pytest.approx(max(len(accepted) - 1, 0.5) / samples)


def agreement_of(samples, wrong):
    scores = np.tile(np.eye(2)[1], (samples, 1)) - 0.5
    return compared([[scores]], [[np.where(np.arange(samples)[:, None] < wrong, -scores, scores)]], [samples])


def test_what_is_expected_stays_within_what_the_network_showed():
    """By the others' ratio a tenth would disagree, but of this one's many classes between three and five of a hundred do."""

    def seen(agreement, low, high, difference):
        ends = {"agreement_low": low, "agreement_high": high, "difference_low": 0.0, "difference_high": 1.0}
        return Agreement(samples=64, agreement=agreement, difference=difference, **ends)

    tries = _Tries(None, {}, None, None, Guard(), None)
    tries.measured = [seen(0.8, 0.7, 0.9, 0.2), seen(0.9, 0.8, 0.95, 0.1)]
    assert tries.expected(seen(0.9, 0.5, 1.0, 0.1)) == pytest.approx(0.1, rel=0.1)
    assert tries.expected(seen(0.96, 0.95, 0.97, 0.1)) == pytest.approx(0.05)
    assert tries.expected(seen(0.6, 0.55, 0.65, 0.1)) == pytest.approx(0.35)
    assert tries.expected(seen(None, None, None, 0.1)) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize(
    ("share", "low", "high", "count"),
    [
        (0.95, *wilson(95, 100), 100),  # one class each
        (0.5, *wilson(50, 100), 100),
        (0.96, 0.952, 0.968, 2305),  # forty each: 1.96² · 0.96 · 0.04 / 0.008²
        (1.0, 0.94, 1.0, 64),
        (None, None, None, 64),
    ],
)
def test_inputs_with_many_classes_count_more(share, low, high, count):
    ends = {"agreement_low": low, "agreement_high": high, "difference_low": 0.0, "difference_high": 0.1}
    seen = Agreement(samples=100 if count == 100 else 64, agreement=share, difference=0.05, **ends)
    assert independent(seen) == count
    tries = _Tries(None, {}, None, None, Guard(), None)
    tries.measured = [seen, seen.model_copy(update={"agreement": 0.96, "agreement_low": 0.952, "agreement_high": 0.968})]
    assert tries.independent(seen) == (2305 if share == 1 else count)


def test_outputs_that_are_not_finite_are_never_enough():
    broken = compared([[np.ones((8, 3))]], [[np.full((8, 3), np.nan)]], [8])
    for guard in (Guard(), Guard(max_difference=10.0), Guard(min_agreement=0.0)):
        assert not agrees(broken, guard)
        assert "not finite" in guard.refusal(broken)


def test_the_fastest_network_by_best_classes(rng, known_times, tmp_path):
    """Two layers are of low rank and may be cut, the third is not: with it, classes change."""
    weights = {"head": (rng.standard_normal((64, 10)) / 8).astype(np.float32)}
    nodes = []
    for k, rank in enumerate((8, 8, 64)):
        low = rng.standard_normal((64, rank)) @ rng.standard_normal((rank, 64 * 9)) / np.sqrt(rank * 64 * 9 / 2)
        weights[f"c{k}.weight"] = low.reshape(64, 64, 3, 3).astype(np.float32)
        nodes.append(helper.make_node("Conv", [f"x{k}", f"c{k}.weight"], [f"y{k}"], f"c{k}", pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"y{k}"], [f"x{k + 1}"], f"r{k}"))
    nodes += [
        helper.make_node("GlobalMaxPool", ["x3"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flat"),
        helper.make_node("MatMul", ["f", "head"], ["scores"], "head"),
    ]
    model = make_model(nodes, weights, {"x0": ["batch", 64, 8, 8]}, {"scores": ["batch", 10]})
    calibration = Calibration(tuple({"x0": rng.standard_normal((25, 64, 8, 8)).astype(np.float32)} for _ in range(10)))
    strict, lenient = (
        plan_network(
            model,
            {"latency": 1.05},
            Search(grid=16, cache=tmp_path, guard=Guard(min_agreement=least), improve_seconds=0.2),
            calibration=calibration,
        )
        for least in (0.9, 0.4)
    )
    assert {"c0", "c1"} <= {layer.name for layer in strict.plan.layers}
    assert strict.verified.chosen.samples == 62
    assert strict.verified.chosen.agreement >= 0.9
    assert lenient.verified.chosen.agreement >= 0.4
    assert lenient.planned.milliseconds < strict.planned.milliseconds < strict.dense.milliseconds / 1.2


def test_steps_of_a_sequence_before_the_batch_are_no_scores_of_samples(rng, tmp_path):
    weights = {"w": rng.standard_normal((32, 32)).astype(np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], "w"),
        helper.make_node("Transpose", ["y"], ["t"], "time_first", perm=[1, 0, 2]),
        helper.make_node("Softmax", ["t"], ["p"], "softmax", axis=-1),
    ]
    model = make_model(nodes, weights, {"x": ["batch", 7, 32]}, {"p": [7, "batch", 32]})
    calibration = Calibration(({"x": rng.standard_normal((64, 7, 32)).astype(np.float32)},))
    with pytest.raises(PlanError, match="no class scores in rows of samples"):
        plan_network(model, {"latency": 1.05}, Search(guard=Guard(), cache=tmp_path), calibration=calibration)


def measured_as(samples, wrong, difference):
    share = None if wrong is None else 1 - wrong / samples
    moved = dict.fromkeys(("difference", "difference_low", "difference_high"), difference)
    return Agreement(samples=samples, agreement=share, agreement_low=share, agreement_high=share, **moved)


def test_several_targets_hold_together(network, known_times, tmp_path):
    known_times["measured"] = 1.51
    report = plan_network(network, {"latency": 1.5, "params": 3.0}, search(tmp_path))
    assert report.planned.params <= report.dense.params / 3.0
    assert report.planned.milliseconds <= report.dense.milliseconds / 1.5 * (1 + 1e-9)


@pytest.mark.parametrize(("measured", "meets"), [(1.8, False), (2.3, True)])
def test_what_was_measured_moves_the_budget(network, known_times, tmp_path, measured, meets):
    plain = plan_network(network, {"latency": 2.0}, search(tmp_path))
    known_times["measured"] = measured  # whatever is chosen: slower, or faster, than the table says
    moved = plan_network(network, {"latency": 2.0}, search(tmp_path))
    assert moved.meets == meets
    assert moved.measured.value == measured
    if meets:  # too fast: a looser budget loses less
        assert sum(row.loss for row in moved.rows) <= sum(row.loss for row in plain.rows)
    else:
        assert "latency" in moved.targets


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        ({}, "expected a target, such as latency=2.0"),
        ({"speed": 2.0}, "unknown target 'speed': expected one of latency, flops, params, bytes"),
        ({"latency": 0.5}, "target latency: expected a reduction factor between 1 and 10000"),
        ({"latency": float("nan")}, "target latency: expected a reduction factor between 1 and 10000"),
    ],
)
def test_targets_that_are_none(network, targets, reason):
    with pytest.raises(PlanError, match=reason):
        plan_network(network, targets)


def test_zeros_are_added_where_that_is_faster(network, known_times, tmp_path):
    plan = Plan(layers=(LayerPlan(name="c0", format="tt", modes=(64, 9, 64), ranks=(1, 30, 30, 1)),))
    assert fastest_blocks(network, plan, Form(block="auto", cache=tmp_path)) == {"c0": 1}  # fewer MACs are less time here
    known_times["64→30"] = 3.0
    assert fastest_blocks(network, plan, Form(block="auto", cache=tmp_path)) == {"c0": 4}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_forms_are_timed_in_the_precision_of_the_plan(precision, network, known_times, monkeypatch, tmp_path):
    """Zeros help in fp32 alone, or in the other precisions alone."""
    measure = LatencyTable.measure

    def in_precision(self, *arguments, **options):
        known_times["64→30"] = 3.0 if self.target.precision == precision else 1.0
        measure(self, *arguments, **options)

    monkeypatch.setattr(LatencyTable, "measure", in_precision)
    layer = LayerPlan(name="c0", format="tt", modes=(64, 9, 64), ranks=(1, 30, 30, 1))
    for planned in ("fp32", "fp16", "int8"):
        plan = Plan(layers=(layer,), precision=planned)
        assert fastest_blocks(network, plan, Form(block="auto", cache=tmp_path)) == {"c0": 4 if planned == precision else 1}


def test_a_layer_that_no_block_makes_faster_is_dense_again(network, known_times, tmp_path):
    plan = Plan(layers=(LayerPlan(name="c0", format="tt", modes=(64, 9, 64), ranks=(1, 30, 30, 1)),))
    assert fastest_blocks(network, plan, Form(block="auto", cache=tmp_path, dense_if_slower=True)) == {"c0": 1}
    known_times["→"] = 100.0
    assert fastest_blocks(network, plan, Form(block="auto", cache=tmp_path / "slow", dense_if_slower=True)) == {"c0": 0}
    assert fastest_blocks(network, plan, Form(block=8, cache=tmp_path / "slow")) == {"c0": 8}


def test_on_a_gpu_copies_are_not_timed_and_no_profile_is_believed(network, known_times, monkeypatch, tmp_path):
    asked = []
    timed = verification.bench

    def bench(paths, timing, settings, **options):
        asked.append((settings.provider, timing.io_binding))
        return timed(paths, replace(timing, io_binding=False), Session(), **options)  # on the CPU: there is no GPU here

    def refuse(*_, **__):
        raise AssertionError("a profile shows launches there, not kernels")

    monkeypatch.setattr(verification, "bench", bench)
    monkeypatch.setattr(verification, "layer_times", refuse)
    conditions = Conditions(settings=Session(provider="cuda"))
    report = plan_network(network, {"latency": 2.0}, search(tmp_path), conditions=conditions)
    assert report.plan.layers
    assert (report.slower, report.grid) == ((), 16)
    assert set(asked) == {("cuda", True)}


@pytest.mark.parametrize(
    ("form", "ranks"), [("tt", (1, 24, 40, 1)), ("tucker", (24, 40)), ("svd", (32,)), ("cp", (48,)), ("tr", (4, 6, 5, 4))]
)
def test_random_cores_keep_activations_as_they_are(form, ranks, network):
    modes = {"svd": (64 * 3, 64 * 3)}.get(form, (64, 9, 64))
    layer = LayerPlan(name="c1", format=form, modes=modes, ranks=ranks)
    (cores,) = random_cores(network, Plan(layers=(layer,))).values()
    weight = layer.reconstruct(cores, (64, 64, 3, 3))
    assert float(weight.std()) * (64 * 9) ** 0.5 == pytest.approx(1.0, rel=0.25)


def test_a_target_that_the_built_network_misses_is_missed(known_times, tmp_path, rng):
    """The matrix of an embedding is read by a Gather as well, and stays in the file beside its cores."""
    weights = {"emb.weight": rng.standard_normal((256, 64)).astype(np.float32), "ids": np.arange(8)}
    nodes = [
        helper.make_node("Gather", ["emb.weight", "ids"], ["e"]),
        helper.make_node("Transpose", ["emb.weight"], ["turned"], perm=[1, 0]),
        helper.make_node("Add", ["e", "x"], ["sum"]),
        helper.make_node("MatMul", ["sum", "turned"], ["y"], "head"),
    ]
    tied = make_model(nodes, weights, {"x": [8, 64]}, {"y": [8, 256]})
    report = plan_network(tied, {"params": 2.0}, search(tmp_path))
    assert report.planned.params > report.dense.params
    assert not report.meets
    assert report.missed["params"] < 1


def test_what_was_tried_stays_when_nothing_better_can_be_chosen(network, known_times, tmp_path, monkeypatch):
    known_times["measured"] = 2.5  # beyond the target: it is chosen anew
    real, calls = selection.choose, []

    def choose(*arguments):
        calls.append(1)
        if len(calls) > 1:
            raise TargetError("no choice of options meets them together")
        return real(*arguments)

    monkeypatch.setattr(selection, "choose", choose)
    report = plan_network(network, {"latency": 2.0}, search(tmp_path))
    assert len(calls) == 2
    assert report.meets


def test_where_no_try_meets_the_targets_the_nearest_is_returned(network, known_times, tmp_path, monkeypatch):
    tries = iter((1.6, 1.9, 1.7, 1.8))
    real = Verification.measured

    def measured(*arguments):
        report = real(*arguments)
        value = next(tries)
        return report.model_copy(update={"measured": report.measured.model_copy(update={"value": value})})

    monkeypatch.setattr(Verification, "measured", measured)
    report = plan_network(network, {"latency": 2.0}, search(tmp_path))
    assert not report.meets
    assert report.missed == {"latency": 1.9}


@pytest.fixture
def by_macs(known_times, monkeypatch):
    """Every layer takes a microsecond for a thousand MACs, the narrower ones as well."""

    def measure(self, wanted, settings, *, seconds=0.0, whole=None, progress=None):
        for layer, options in as_layers(wanted):
            for option in (None, *options):
                macs = layer.macs if option is None else macs_of(layer, option)
                key = key_of(layer, option)
                self.times[key] = Timed(key=key, layer=layer.name, form="", milliseconds=1e-6 * macs)

    monkeypatch.setattr(LatencyTable, "measure", measure)
    return known_times


@pytest.mark.parametrize("formats", [("width",), ("auto", "width")])
@pytest.mark.parametrize("target", ["flops", "latency", "params", "bytes"])
def test_layers_that_read_fewer_channels_save_in_two_layers(target, formats, network, by_macs, tmp_path):
    by_macs["measured"] = 1.31
    report = plan_network(network, {target: 1.3}, replace(search(tmp_path), formats=formats))
    made = factorize(network, report.plan, random_cores(network, report.plan)).model
    onnx.save(made, tmp_path / "made.onnx")
    counted = cost(tmp_path / "made.onnx", 1)
    assert sum(row.macs for row in report.rows) == counted.macs
    assert report.reached[target] >= 1.29
    narrow = [row for row in report.rows if row.format == "width"]
    if formats == ("width",):
        assert {row.layer for row in narrow} <= {"c1", "c2", "narrow"}  # the channels of the input are given
        assert narrow
        assert len(made.graph.node) == len(network.graph.node)
        read = [row for row in report.rows if " of 64 outputs" in row.reason]
        assert len(read) == len(narrow)
        assert all(row.ms < row.dense_ms for row in read)
    assert all(row.ms > 0 for row in report.rows)
    assert sum(row.dense_ms - row.ms for row in report.rows) == pytest.approx(
        report.dense.milliseconds - report.planned.milliseconds, rel=1e-6
    )
    chosen = {row.layer for row in report.rows if row.format}
    assert not any(
        {first, second} <= chosen
        for first, second in (("c0", "c1"), ("c1", "c2"), ("c2", "narrow"))
        if second in {row.layer for row in narrow}
    )
    assert PlanReport.model_validate_json(report.model_dump_json()) == report
    assert all(text in str(report) for text in (" of 64 channels: ",) if narrow)


def test_what_a_narrower_network_loses_is_measured(network, by_macs, tmp_path, rng):
    by_macs["measured"] = 1.31
    inputs = Calibration(tuple({"x0": rng.standard_normal((4, 64, 12, 12)).astype(np.float32)} for _ in range(20)))
    report = plan_network(network, {"flops": 1.3}, replace(search(tmp_path), formats=("width",)), calibration=inputs)
    assert report.verified is not None
    assert 0 < report.verified.loss < 1
    assert report.reached["flops"] >= 1.29
