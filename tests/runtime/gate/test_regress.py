"""The gate's decisions on times that are known, its hard limits, and what it writes for CI. No test of time itself."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import onnx
import pytest
from conftest import make_model, small_network
from onnx import TensorProto, helper, numpy_helper

from tensorrail_runtime import ModelError, Session, bench, open_session, parity, random_inputs
from tensorrail_runtime.errors import UsageError
from tensorrail_runtime.feeds.rules import InputRules
from tensorrail_runtime.gate.checks import Output, _drawn, facts_of, held, sketch
from tensorrail_runtime.gate.outputs import junit, markdown, smaller_is_better
from tensorrail_runtime.gate.regress import Baseline, Limits, check, checked, record
from tensorrail_runtime.gate.times import compare_times, imprecision, needs_more
from tensorrail_runtime.measure.accuracy import Labelled
from tensorrail_runtime.measure.timing import Conditions, Timing

pytestmark = pytest.mark.usefixtures("in_this_process")  # but for the module's own baseline and verdicts
QUICK = Conditions(Timing(seconds=0.05, processes=2))
LENIENT = Limits(max_slowdown=9.0)  # times are not what is tested


def timed(**settings):
    """Return the quick conditions with other settings of the timing."""
    return replace(QUICK, timing=replace(QUICK.timing, **settings))


def times(rng, scale, processes=6, count=100):
    """Return log-normal times with a share of outliers, each process with a bit of luck of its own."""
    luck = 1 + 0.003 * rng.standard_normal(processes)
    return [scale * own * np.exp(0.05 * rng.standard_normal(count)) * (1 + (rng.random(count) < 0.02)) for own in luck]


@pytest.mark.parametrize("paired", [True, False])
def test_processes_with_equal_medians_give_an_interval_and_no_warning(paired, rng):
    """Clocks are coarse, and two of two processes may agree."""
    old, new = ([[value, value + 1e-3] * 50] * 3 for value in (1.0, 1.1))
    value, low, high, p = compare_times(old, new, paired=paired)
    assert value == pytest.approx(0.1, rel=0.01)
    assert low == pytest.approx(value)
    assert high == pytest.approx(value)
    assert p < 0.01


@pytest.mark.parametrize("paired", [True, False])
def test_an_estimate_covers_the_injected_slowdown(paired, rng):
    value, low, high, p = compare_times(times(rng, 1.0), times(rng, 1.05), paired=paired)
    assert value == pytest.approx(0.05, abs=0.015)
    assert low <= value <= high
    assert p < 0.01


def test_an_interval_lies_around_the_slowdown_of_most_processes(rng):
    """Eight of twelve processes differ by nothing, and four by a tenth: the mean is no median."""
    old = [np.exp(0.001 * rng.standard_normal(100)) for _ in range(12)]
    new = [np.exp(0.001 * rng.standard_normal(100) + (0.1 if k < 4 else 0.0)) for k in range(12)]
    for paired in (True, False):
        value, low, high, _ = compare_times(old, new, paired=paired)
        assert value == pytest.approx(0.0, abs=0.001)
        assert low < value < high
        assert high == pytest.approx(0.04, abs=0.01)  # 1.2533 · 2.2 · 0.049 / √12


def test_equal_times_raise_no_alarm(rng):
    found = [compare_times(times(rng, 1.0), times(rng, 1.0), paired=True) for _ in range(50)]
    assert sum(value > 0.025 and p < 0.01 for value, _, _, p in found) == 0


def test_recorded_times_raise_no_more_alarms_than_the_level_allows(rng):
    """Processes differ by 4 %: that of the recorded ones is half of the uncertainty."""
    alarms = 0
    for _ in range(200):
        old, new = (
            [own * np.exp(0.01 * rng.standard_normal(100)) for own in np.exp(0.04 * rng.standard_normal(6))] for _ in range(2)
        )
        value, _, _, p = compare_times(old, new, paired=False)
        alarms += value > 0.025 and p < 0.01
    assert alarms <= 8  # 1 % nominal


def test_the_spread_of_recorded_processes_counts(rng):
    steady = [[[1.0 + 1e-4 * k] * 20] for k in range(6)]
    even, spread = [[1.0] * 20] * 6, [[own] * 20 for own in (0.9, 0.95, 1.0, 1.0, 1.05, 1.1)]
    assert needs_more([], 6, 0.005)
    assert not needs_more(steady, 6, 0.005, even)
    assert not needs_more(steady, 6, 0.005, spread)  # more processes would not help
    noisy = [[[own] * 20] for own in (0.9, 0.95, 1.0, 1.0, 1.05, 1.1)]
    assert needs_more(noisy, 6, 0.005, even)
    assert imprecision(steady, 0.05, even) == ""
    assert "a test over 6 recorded and 2 new processes can hardly show a slow-down" in imprecision(steady[:2], 0.05, even)
    mixed = compare_times([[1.0] * 40] * 3, [[1.5, 1.5001] * 20, [1.5002] * 40, [1.5001] * 40], paired=False)
    assert mixed[3] < 0.01
    for runs, recorded in ((steady, spread), (noisy, even), (noisy, ())):
        assert "the standard error of the slow-down is" in imprecision(runs, 0.05, recorded)


def test_what_is_common_to_both_falls_out_when_they_ran_in_turns(rng):
    busy = np.linspace(1, 3, 6)  # processes on a machine that gets busier
    old = [b * t for b, t in zip(busy, times(rng, 1.0), strict=True)]
    new = [b * t for b, t in zip(busy, times(rng, 1.0), strict=True)]
    value, *_ = compare_times(old, new, paired=True)
    assert abs(value) < 0.02


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A folder with `dense.onnx`, its baseline, and `changed.onnx`, whose outputs are others; tests read it alone."""
    folder = tmp_path_factory.mktemp("recorded")
    onnx.save(small_network(np.random.default_rng(0)), folder / "dense.onnx")
    record(folder / "dense.onnx", folder / "baseline.json", conditions=QUICK)
    changed(folder / "dense.onnx", "fc.bias", lambda bias: bias + np.float32(1))
    return folder


@pytest.fixture(scope="module")
def same_verdict(recorded):
    """What a check says of a model against its own baseline."""
    return check(recorded / "baseline.json", recorded / "dense.onnx", limits=LENIENT, conditions=QUICK)


@pytest.fixture(scope="module")
def other_verdict(recorded):
    """What a check says of a model with other outputs."""
    return check(recorded / "baseline.json", recorded / "changed.onnx", limits=LENIENT, conditions=QUICK)


@pytest.fixture
def baseline(recorded, small_path, tmp_path):
    """A baseline beside its model, `small_path`: a copy, which a test may change."""
    shutil.copy(recorded / "dense.onnx", small_path)
    return Path(shutil.copy(recorded / "baseline.json", tmp_path))


@pytest.fixture
def untimed(recorded):
    """Write a baseline as `record` does, with the facts of its model and the times of another: they are not looked at."""

    def write(path, out, batch=1, data=None):
        facts = {"model": path.name, "batch": batch, "facts": facts_of(path, Session(), batch, data)}
        made = Baseline.load(recorded / "baseline.json").model_copy(update=facts)
        made.save(out)
        return made

    return write


def changed(path, name, change):
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))
    other = path.with_name("changed.onnx")
    onnx.save(model, other)
    return other


def test_a_model_holds_against_its_own_baseline(recorded, same_verdict):
    again = Baseline.load(recorded / "baseline.json")
    assert again.model == "dense.onnx"  # relative to the baseline's folder
    assert len(again.processes) == 2
    verdict = same_verdict
    assert verdict.interleaved
    assert verdict.holds
    assert verdict.reason == "dense.onnx: no regression"
    assert [f.name for f in verdict.findings] == [
        "latency",
        "flops",
        "params",
        "bytes",
        "nodes",
        "placement",
        "interface",
        "parity",
    ]


def test_without_its_model_a_baseline_still_has_its_times(baseline, small_path):
    moved = small_path.with_name("moved.onnx")
    small_path.rename(moved)
    assert not check(baseline, moved, limits=LENIENT, conditions=QUICK).interleaved


def test_other_outputs_fall_short_with_the_reason_and_a_retrained_model_may_have_them(recorded, other_verdict):
    assert not other_verdict.holds
    assert other_verdict.reason.startswith("changed.onnx: parity ")
    retrained = LENIENT.model_copy(update={"tolerance": None})
    assert check(recorded / "baseline.json", recorded / "changed.onnx", limits=retrained, conditions=QUICK).holds


def test_a_larger_model_falls_short(small_path, rng):
    model = onnx.load(small_path)
    for node in model.graph.node:
        if node.op_type == "Flatten":
            node.input[0] = "wide"
    weights = {f"w{k}": rng.standard_normal((32, 32, 1, 1)).astype(np.float32) / 6 for k in range(30)}
    names = ["c", *[f"t{k}" for k in range(29)], "wide"]
    chain = [onnx.helper.make_node("Conv", [names[k], f"w{k}"], [names[k + 1]]) for k in range(30)]
    nodes = [*model.graph.node[:3], *chain, *model.graph.node[3:]]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    other = small_path.with_name("larger.onnx")
    onnx.save(model, other)
    limits = LENIENT.model_copy(update={"tolerance": None})
    verdict = check(small_path, other, limits=limits, conditions=QUICK)  # two models, on the spot
    short = {finding.name for finding in verdict.findings if not finding.holds}
    assert short >= {"flops", "params", "bytes", "nodes"}


def test_accuracy_is_a_hard_limit(untimed, small_path, tmp_path, rng):
    x = rng.standard_normal((40, 16, 8, 8)).astype(np.float32)
    labels = open_session(small_path).run(None, {"x": x})[0].argmax(1)
    data = Labelled({"x": x}, labels, "top1")
    untimed(small_path, tmp_path / "b.json", data=data)
    other = changed(small_path, "fc.bias", lambda bias: bias + np.arange(10, dtype=np.float32) * 9)
    limits = LENIENT.model_copy(update={"tolerance": None})
    verdict = check(tmp_path / "b.json", other, limits=limits, conditions=QUICK, data=data)
    assert "accuracy (top1)" in verdict.reason


def test_a_score_may_drop_by_just_its_limit(untimed, small_path, tmp_path):
    facts = untimed(small_path, tmp_path / "b.json").facts
    before, after, lower = (facts.model_copy(update={"score": score, "metric": "top1"}) for score in (0.8, 0.7, 0.699))
    assert found(before, after, limits=Limits(score=0.1))["accuracy (top1)"].holds  # 0.8 - 0.1 > 0.7
    assert not found(before, lower, limits=Limits(score=0.1))["accuracy (top1)"].holds


def test_a_score_that_cannot_be_compared_is_refused(baseline, small_path, tmp_path, rng):
    x = rng.standard_normal((12, 16, 8, 8)).astype(np.float32)
    labels = open_session(small_path).run(None, {"x": x})[0].argmax(1)
    data, scored = Labelled({"x": x}, labels, "top1"), tmp_path / "scored.json"
    record(small_path, scored, conditions=QUICK, data=data)
    for file, given, reason in (
        (baseline, data, r"dense.onnx contains no score: record it with data"),
        (scored, None, r"contains a score \(top1\), got no data: give the data that it was recorded with"),
        (scored, Labelled({"x": x}, labels, "top5"), "contains a top1 score, got metric top5: give metric top1"),
        (scored, Labelled({"x": x[:6]}, labels[:6], "top1"), "a score on different data"),
        (scored, Labelled({"x": x}, (labels + 1) % 10, "top1"), "a score on different data"),
    ):
        with pytest.raises(ModelError, match=reason):
            check(file, small_path, limits=LENIENT, conditions=QUICK, data=given)
    verdict = check(scored, small_path, limits=LENIENT, conditions=QUICK, data=data)
    assert "accuracy (top1)" in {finding.name for finding in verdict.findings}
    before = json.loads(scored.read_text())  # as it was recorded before the data's hash was
    del before["facts"]["data"]
    scored.write_text(json.dumps(before))
    assert check(scored, small_path, limits=LENIENT, conditions=QUICK, data=data).holds


def test_a_baseline_is_checked_as_it_was_recorded(baseline, small_path):
    for asked, reason in (
        (replace(QUICK, settings=Session(threads=1)), "recorded with threads 0, got threads 1: omit it"),
        (replace(QUICK, settings=Session(provider="cuda")), "recorded with provider cpu, got provider cuda"),
        (timed(batch=2), "recorded with batch 1, got batch 2"),
    ):
        with pytest.raises(ModelError, match=reason):
            check(baseline, small_path, limits=LENIENT, conditions=asked)
    assert check(baseline, small_path, limits=LENIENT, conditions=QUICK).holds


def test_what_a_timing_leaves_out_has_the_gates_defaults():
    for asked, seconds, processes in (
        (None, 1.0, 6),
        (Timing(batch=8), 1.0, 6),
        (Timing(seconds=10.0), 10.0, 6),
        (Timing(processes=2), 1.0, 2),
    ):
        timing = checked(None if asked is None else Conditions(asked)).timing
        assert (timing.seconds, timing.processes) == (seconds, processes)
    assert Timing(batch=8).duration == 10.0  # of all other measurements


def test_too_few_processes_and_no_time_are_refused(baseline, small_path):
    for asked, reason in (
        ({"processes": 1}, "got processes=1, seconds=0.05"),
        ({"seconds": 0.0}, "got processes=2, seconds=0"),
    ):
        with pytest.raises(UsageError, match=f"expected at least 2 fresh processes .*, {reason}"):
            check(baseline, small_path, conditions=timed(**asked))


def test_weights_beside_the_file_are_held_to_the_limits_and_are_part_of_the_model(untimed, small_path, tmp_path):
    path, data = tmp_path / "apart.onnx", tmp_path / "apart.data"
    onnx.save(onnx.load(small_path), path, save_as_external_data=True, location=data.name, size_threshold=0)
    made = untimed(path, tmp_path / "apart.json")
    assert made.facts.bytes == path.stat().st_size + data.stat().st_size
    assert check(tmp_path / "apart.json", path, limits=LENIENT, conditions=QUICK).interleaved
    data.write_bytes(b"\0" * data.stat().st_size)  # another model, by the same .onnx
    assert not check(tmp_path / "apart.json", small_path, limits=LENIENT, conditions=QUICK).interleaved
    data.unlink()
    assert not check(tmp_path / "apart.json", small_path, limits=LENIENT, conditions=QUICK).interleaved


def test_ci_formats_say_what_was_found(other_verdict):
    verdict = other_verdict
    suite = ET.fromstring(junit(verdict)).find("testsuite")  # noqa: S314 - our own text
    assert (suite.get("tests"), suite.get("failures")) == ("8", "1")
    (failure,) = suite.iter("failure")
    assert "relative difference" in failure.get("message")
    rows = json.loads(smaller_is_better(verdict))
    assert [row["unit"] for row in rows] == ["ms", "×"]
    assert rows[0]["value"] == verdict.timing.p50_ms


@pytest.mark.parametrize("content", ["{", '{"version": 1}', "[]"])
def test_a_file_that_is_no_baseline_is_refused(tmp_path, small_path, content):
    (tmp_path / "b.json").write_text(content)
    with pytest.raises(ModelError, match=r"b\.json: not a baseline"):
        check(tmp_path / "b.json", small_path)
    with pytest.raises(ModelError, match="expected a baseline"):
        check(tmp_path / "none.json", small_path)


@pytest.mark.parametrize("processes", [[], [[]], [[1.0] * 20, [0.0] * 20], [[1.0] * 19 + [float("nan")]]])
def test_a_baseline_without_times_is_refused(baseline, small_path, processes):
    content = json.loads(baseline.read_text())
    content["processes"] = processes
    baseline.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="not a baseline: processes"):
        check(baseline, small_path)


def product(path, weight, inputs=("x",), outputs=("y",), axes=("n", 4)):
    """Write a model of one product."""
    node = onnx.helper.make_node("MatMul", [inputs[0], "w"], [outputs[0]], "n")
    model = make_model([node], {"w": weight}, {inputs[0]: list(axes)}, {outputs[0]: [axes[0], weight.shape[1]]})
    onnx.save(model, path)
    return path


def found(before, after, provider="cpu", limits=None):
    return {one.name: one for one in held(before, after, limits or Limits(), provider)}


def test_every_value_of_a_large_output_is_held_to_the_baseline(tmp_path, rng):
    weight = rng.standard_normal((4, 5000)).astype(np.float32)
    before = facts_of(product(tmp_path / "a.onnx", weight), Session())
    other = weight.copy()
    other[:, 4999] += 50.0
    after = facts_of(product(tmp_path / "b.onnx", other), Session())
    x = open_session(tmp_path / "a.onnx")
    true = {name: x_.run(None, random_inputs(x))[0] for name, x_ in (("a", x), ("b", open_session(tmp_path / "b.onnx")))}
    apart = np.linalg.norm(true["b"] - true["a"]) / np.linalg.norm(true["a"])
    parity = found(before, after)["parity"]
    assert not parity.holds
    assert float(parity.measured.split()[0]) == pytest.approx(apart, rel=0.1)  # the sketch's own error: √(1/1024), thrice


def test_a_sketch_has_the_norm_of_what_it_was_made_of(rng):
    values = rng.standard_normal((300, 411))
    assert np.linalg.norm(sketch(values)) == pytest.approx(np.linalg.norm(values), rel=0.1)
    np.testing.assert_array_equal(sketch(values[:1]), values[0])  # few enough to be kept
    big = np.ones(2**20 + 5)  # more than one chunk
    np.testing.assert_allclose(sketch(big) + sketch(-big), 0, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"inputs": ("z",)}, "z(float) ?×4 → y(float) ?×8"),
        ({"outputs": ("z",)}, "x(float) ?×4 → z(float) ?×8"),
        ({"axes": (1, 4)}, "x(float) 1×4 → y(float) 1×8"),  # a batch of 1 alone
    ],
)
def test_another_interface_falls_short(change, said, tmp_path):
    weight = np.ones((4, 8), np.float32)
    before = facts_of(product(tmp_path / "a.onnx", weight), Session())
    after = facts_of(product(tmp_path / "b.onnx", weight, **change), Session())
    interface = found(before, after)["interface"]
    assert not interface.holds
    assert interface.measured.replace(" (", "(") == said
    narrower = facts_of(product(tmp_path / "c.onnx", weight[:, :7]), Session())
    assert not found(before, narrower, limits=Limits(tolerance=None))["interface"].holds
    if "axes" in change:  # more batches than before are no harm
        assert found(after, before)["interface"].holds


def test_nodes_that_move_to_another_provider_and_products_that_cannot_be_counted_fall_short(small_path):
    cuda, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    facts = facts_of(small_path, Session()).model_copy(update={"placement": {cuda: 50, cpu: 2}})
    for placement, holds in (({cuda: 52}, True), ({cuda: 49, cpu: 2}, True), ({cuda: 2, cpu: 50}, False)):
        moved = facts.model_copy(update={"placement": placement})
        assert found(facts, moved, "cuda")["placement"].holds == holds
    hidden = facts.model_copy(update={"flops": 0, "uncounted": ("Det",)})
    flops = found(facts, hidden)["flops"]
    assert (flops.holds, flops.measured) == (False, "0 plus operators that cannot be counted: Det")


def test_a_model_of_several_dynamic_axes_is_gated_at_the_shape_given(tmp_path):
    weight = np.ones((4, 8), np.float32)
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], "n")
    onnx.save(make_model([node], {"w": weight}, {"x": ["n", "t", 4]}, {"y": ["n", "t", 8]}), tmp_path / "m.onnx")
    made = record(tmp_path / "m.onnx", tmp_path / "b.json", conditions=timed(shapes={"x": (2, 50, 4)}))
    assert made.facts.flops == 2 * 2 * 50 * 4 * 8
    assert check(tmp_path / "b.json", tmp_path / "m.onnx", limits=LENIENT, conditions=QUICK).holds
    with pytest.raises(ModelError, match="recorded with shapes x=2,50,4, got x=2,60,4: omit the shapes"):
        check(tmp_path / "b.json", tmp_path / "m.onnx", conditions=timed(shapes={"x": (2, 60, 4)}))


@pytest.mark.parametrize("axes", [(1, 3, "h", "w"), (8, 3, 16, 16)])
def test_a_baseline_is_held_against_its_own_model_whatever_its_batch(axes, tmp_path):
    model = make_model([onnx.helper.make_node("Relu", ["x"], ["y"])], {}, {"x": list(axes)}, {"y": list(axes)})
    onnx.save(model, tmp_path / "m.onnx")
    record(tmp_path / "m.onnx", tmp_path / "b.json", conditions=timed(batch=8))
    for conditions in (QUICK, timed(batch=8)):
        assert check(tmp_path / "b.json", tmp_path / "m.onnx", limits=LENIENT, conditions=conditions).holds


def test_a_retrained_detector_may_find_another_number(tmp_path):
    facts = {}
    for name, shift in (("a", 0.0), ("b", 1.0)):
        nodes = [
            onnx.helper.make_node("Add", ["x", "shift"], ["s"]),
            onnx.helper.make_node("Relu", ["s"], ["r"]),
            onnx.helper.make_node("NonZero", ["r"], ["y"]),
        ]
        model = make_model(nodes, {"shift": np.float32(shift)}, {"x": ["n", 50]}, {})
        model.graph.output.append(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT64, [2, "found"]))
        onnx.save(model, tmp_path / f"{name}.onnx")
        facts[name] = facts_of(tmp_path / f"{name}.onnx", Session())
    assert all(one.holds for one in found(facts["a"], facts["b"], limits=Limits(tolerance=None)).values())
    assert not found(facts["a"], facts["b"])["parity"].holds


def one_node(path, kind, axes, out, weights=None, inputs=("x",), **attributes):
    """Write a model of one node whose output has these axes, in int64 where `out` says so."""
    kinds = {"y": onnx.TensorProto.INT64 if out[0] == "int64" else onnx.TensorProto.FLOAT}
    node = onnx.helper.make_node(kind, [*inputs, *(weights or {})], ["y"], "n", **attributes)
    model = make_model([node], weights or {}, {inputs[0]: list(axes)}, {})
    model.graph.output.append(onnx.helper.make_tensor_value_info("y", kinds["y"], list(out[1:])))
    onnx.save(model, path)
    return path


def test_both_models_run_on_the_shapes_of_the_baselines(untimed, tmp_path, rng):
    """A model whose fixed axes became dynamic is no smaller, and computes the same."""
    weight = {"w": rng.standard_normal((8, 3, 3, 3)).astype(np.float32)}
    pads = {"pads": [1, 1, 1, 1]}
    fixed = one_node(tmp_path / "f.onnx", "Conv", (1, 3, 64, 64), ("float", 1, 8, 64, 64), weight, **pads)
    moving = one_node(tmp_path / "d.onnx", "Conv", ("n", 3, "h", "w"), ("float", "n", 8, "h", "w"), weight, **pads)
    made = untimed(fixed, tmp_path / "f.json")
    verdict = check(tmp_path / "f.json", moving, limits=LENIENT, conditions=QUICK)
    assert verdict.holds, verdict.reason
    flops = next(one for one in verdict.findings if one.name == "flops")
    assert flops.baseline == flops.measured == f"{made.facts.flops:,}"
    assert (
        "the models did not do the same work; give the shape x=1,3,64,64"
        in bench([fixed, moving], Timing(seconds=0.1)).warnings[0]
    )


def test_a_model_that_does_not_run_as_the_baselines_did_falls_short(untimed, tmp_path):
    weight = {"w": np.ones((4, 4), np.float32)}
    four = one_node(tmp_path / "a.onnx", "MatMul", ("n", 4), ("float", "n", 4), weight)
    untimed(four, tmp_path / "b.json", batch=4)
    one = one_node(tmp_path / "one.onnx", "MatMul", (1, 4), ("float", 1, 4), weight)
    renamed = one_node(tmp_path / "z.onnx", "MatMul", ("n", 4), ("float", "n", 4), weight, inputs=("z",))
    nothing = one_node(tmp_path / "0.onnx", "Pow", ("n", 4), ("float", "n", 4), {"half": np.full(4, 0.5, np.float32)})
    bad = one_node(tmp_path / "nan.onnx", "MatMul", ("n", 4), ("float", "n", 4), {"w": np.full((4, 4), np.nan, np.float32)})
    for path, reason in (
        (one, r"interface x \(float\) 1×4"),
        (renamed, r"interface z"),
        (nothing, "run .*output 'y' holds NaN"),
        (bad, r"run weight 'w' holds NaN at \[0, 0\]"),
    ):
        verdict = check(tmp_path / "b.json", path, limits=LENIENT, conditions=QUICK)
        assert not verdict.holds
        assert verdict.timing is None
        assert re.search(reason, verdict.reason)
        assert json.loads(smaller_is_better(verdict)) == []
        assert "Not timed" in markdown(verdict)
        assert f"{path.name}, not timed" in str(verdict)
        assert 'failures="1"' in junit(verdict)


def test_indices_are_right_or_wrong(tmp_path):
    """ArgMax over many entries whose answers are all one off: their relative difference is small."""
    weight = np.random.default_rng(0).standard_normal((4, 32_000)).astype(np.float32)
    facts = {}
    for name, one in (("a", weight), ("b", np.roll(weight, 1, axis=1))):
        nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["s"]), onnx.helper.make_node("ArgMax", ["s"], ["y"], axis=1)]
        model = make_model(nodes, {"w": one}, {"x": ["n", 4]}, {})
        model.graph.output.append(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT64, ["n", 1]))
        onnx.save(model, tmp_path / f"{name}.onnx")
        facts[name] = facts_of(tmp_path / f"{name}.onnx", Session(), batch=8)
    assert found(facts["a"], facts["b"])["parity"].measured == "1.0e+00 relative difference"
    assert found(facts["a"], facts["a"])["parity"].measured == "0.0e+00 relative difference"


def test_of_many_indices_the_share_that_differs_is_estimated(rng):
    values = rng.integers(0, 9, 20_000)
    other = np.where(rng.random(20_000) < 0.2, values + 1, values)
    one, two = (
        Output(type="t", shape=(20_000,), declared=(None,), values=tuple(sketch(_drawn(v)).tolist()), exact=True)
        for v in (values, other)
    )
    assert one.apart(two) == pytest.approx(np.mean(values != other), rel=0.2)
    assert one.apart(one) == 0


def test_a_model_that_varies_and_one_without_values_are_compared_only_when_told_so(untimed, tmp_path):
    noise = one_node(tmp_path / "n.onnx", "RandomNormalLike", ("n", 4), ("float", "n", 4))
    none = one_node(tmp_path / "none.onnx", "NonZero", ("n", 4), ("int64", 2, "found"))
    model = onnx.load(none)
    model.graph.node.insert(0, onnx.helper.make_node("Sub", ["x", "x"], ["zero"]))
    model.graph.node[1].input[0] = "zero"
    onnx.save(model, none)
    for path, reason in (
        (noise, "y vary from run to run; for a retrained model, skip this check"),
        (none, "no output has a value on random inputs"),
    ):
        untimed(path, tmp_path / "b.json")
        assert reason in check(tmp_path / "b.json", path, limits=LENIENT, conditions=QUICK).reason
        retrained = LENIENT.model_copy(update={"tolerance": None})
        assert check(tmp_path / "b.json", path, limits=retrained, conditions=QUICK).holds
    with pytest.raises(ModelError, match="nothing to compare"):
        parity(none, none)


def test_a_fixed_axis_that_became_dynamic_is_held_to_what_ran(tmp_path):
    facts = [
        facts_of(one_node(tmp_path / f"{k}.onnx", "MatMul", ("n", 4), out, {"w": np.ones((4, k), np.float32)}), Session())
        for k, out in ((10, ("float", "n", 10)), (11, ("float", "n", "c")))
    ]
    assert not found(*facts, limits=Limits(tolerance=None))["interface"].holds


def test_an_output_of_any_number_of_axes_is_held_to_what_ran(tmp_path):
    path, x = tmp_path / "any.onnx", np.ones((2, 4), np.float32)
    model = onnx.load(product(path, np.ones((4, 8), np.float32)))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    model.graph.node.append(helper.make_node("Reshape", ["y", "shape"], ["z"]))
    model.graph.input.append(helper.make_tensor_value_info("shape", TensorProto.INT64, ["axes"]))
    model.graph.output[0].name = "z"
    onnx.save(model, path)
    facts = facts_of(path, Session(), 2, None, {}, {"x": x, "shape": np.array([2, 8])})
    assert (facts.outputs["z"].declared, facts.outputs["z"].shape) == ((), (2, 8))
    assert found(facts, facts)["interface"].holds
    other = facts_of(path, Session(), 2, None, {"shape": (3,)}, {"x": x, "shape": np.array([4, 2, 2])})
    assert not found(facts, other)["interface"].holds


def test_settings_that_a_baseline_does_not_hold_are_refused(small_path, tmp_path):
    with pytest.raises(UsageError, match="the provider and the number of threads of a session, and no other settings"):
        record(small_path, tmp_path / "b.json", conditions=replace(QUICK, settings=Session(level="none")))
    assert not (tmp_path / "b.json").exists()
    record(small_path, tmp_path / "b.json", conditions=QUICK)
    with pytest.raises(UsageError, match="no other settings: leave these out"):
        check(tmp_path / "b.json", small_path, conditions=replace(QUICK, settings=Session(level="none")))


def test_times_of_another_machine_are_said_to_be(baseline, small_path):
    content = json.loads(baseline.read_text())
    content["machine"]["processor"] = "Cortex-A53"
    baseline.write_text(json.dumps(content))
    moved = small_path.with_name("moved.onnx")
    small_path.rename(moved)
    verdict = check(baseline, moved, limits=LENIENT, conditions=QUICK)
    assert "times of another machine (Cortex-A53, " in verdict.warnings[0]
    assert "Cortex" in markdown(verdict)


@pytest.mark.parametrize(("paired", "processes"), [(True, 2), (True, 6), (False, 2), (False, 6)])
def test_the_interval_over_few_processes_covers_the_truth(paired, processes, rng):
    covered = 0
    for _ in range(200):
        _, low, high, _ = compare_times(times(rng, 1.0, processes), times(rng, 1.05, processes), paired=paired)
        covered += low <= 0.05 <= high
    assert covered >= 180  # 95 % nominal; fewer would come up once in some 500 times


def test_a_baseline_never_takes_a_models_place(small_path, tmp_path):
    content = small_path.read_bytes()
    for out in (small_path, tmp_path / "none" / "b.json"):
        with pytest.raises(ModelError, match="expected a JSON file in an existing folder"):
            record(small_path, out, conditions=QUICK)
    assert small_path.read_bytes() == content


def test_infinities_are_held_to_their_places(tmp_path):
    facts = {}
    for name, limit in (("a", 0.5), ("same", 0.5), ("other", -0.5)):
        nodes = [
            onnx.helper.make_node("Less", ["x", "limit"], ["m"]),
            onnx.helper.make_node("Where", ["m", "none", "x"], ["y"]),
        ]
        weights = {"limit": np.float32(limit), "none": np.float32(-np.inf)}
        onnx.save(make_model(nodes, weights, {"x": ["n", 50]}, {"y": ["n", 50]}), tmp_path / f"{name}.onnx")
        facts[name] = facts_of(tmp_path / f"{name}.onnx", Session())
    assert found(facts["a"], facts["same"])["parity"].holds
    assert not found(facts["a"], facts["other"])["parity"].holds


def test_outputs_that_are_no_numbers_are_refused(tmp_path):
    node = onnx.helper.make_node("Cast", ["x"], ["y"], to=onnx.TensorProto.STRING)
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.STRING, [1])],
    )
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9), tmp_path / "s.onnx"
    )
    with pytest.raises(ModelError, match=r"output 'y' has type tensor\(string\): only numbers can be compared"):
        facts_of(tmp_path / "s.onnx", Session())


def test_runs_after_oneself_and_after_the_other_count_alike(rng):
    """Warm runs of 1 ms and cold ones of 2 ms: the median of single rounds lies on either side of the gap by chance."""
    kinds = np.tile([1.0, 2.0], 100)
    for slower, true in (([1.05, 1.05], 0.05), ([1.2, 1.0], 0.2 / 3)):
        old = [kinds * np.exp(0.01 * rng.standard_normal(200)) for _ in range(6)]
        new = [kinds * np.tile(slower, 100) * np.exp(0.01 * rng.standard_normal(200)) for _ in range(6)]
        value, _, _, p = compare_times(old, new, paired=True)
        assert value == pytest.approx(true, abs=0.005)
        assert p < 0.01


def test_names_that_xml_cannot_write_are_replaced(same_verdict):
    verdict = same_verdict
    strange = verdict.findings[-1].model_copy(update={"name": "y\x01\x1b<&"})
    suite = ET.fromstring(junit(verdict.model_copy(update={"findings": (strange,)}))).find("testsuite")  # noqa: S314 - our own
    assert suite.find("testcase").get("name") == "y\ufffd\ufffd<&"


def test_the_pytest_fixture_fails_a_test_with_the_reason(pytester, recorded):
    model, other, baseline = (str(recorded / name) for name in ("dense.onnx", "changed.onnx", "baseline.json"))
    pytester.makepyfile(
        f"""
        from tensorrail_runtime.gate.regress import Limits
        from tensorrail_runtime.measure.timing import Conditions, Timing
        OPTIONS = dict(limits=Limits(max_slowdown=9.0), conditions=Conditions(Timing(seconds=0.05, processes=2)))
        def test_same(latency_gate):
            latency_gate({model!r}, {baseline!r}, **OPTIONS)
        def test_other(latency_gate):
            latency_gate({other!r}, {baseline!r}, **OPTIONS)
        def test_none(latency_gate):
            latency_gate("none.onnx", {baseline!r}, **OPTIONS)
        """
    )
    result = pytester.runpytest("-p", "no:cacheprovider", "-p", "no:randomly")  # its lines are looked for in order
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(["*changed.onnx: parity*", "*none.onnx*cannot be read*"])


def test_recording_again_keeps_what_is_measured(pytester, tmp_path):
    node = onnx.helper.make_node("Mul", ["x", "s"], ["y"])
    onnx.save(make_model([node], {}, {"x": ["n", "t"], "s": []}, {"y": ["n", "t"]}), tmp_path / "m.onnx")
    model, out = tmp_path / "m.onnx", tmp_path / "b.json"
    own = Timing(batch=3, shapes={"x": (3, 7)}, seconds=0.05, processes=2)
    before = record(model, out, conditions=Conditions(own, Session(threads=1)), rules=InputRules({"s": 2.0}))
    pytester.makepyfile(
        f"""
        from tensorrail_runtime.measure.timing import Conditions, Timing
        def test_same(latency_gate):
            latency_gate({str(model)!r}, {str(out)!r}, conditions=Conditions(Timing(seconds=0.05, processes=2)))
        """
    )
    recorded = ("batch", "shapes", "threads", "provider", "constants", "batch_axes", "states", "facts")
    pytester.runpytest("-p", "no:cacheprovider", "--latency-record").assert_outcomes(passed=1)
    again = Baseline.load(out)
    assert again.processes != before.processes
    assert {name: getattr(again, name) for name in recorded} == {name: getattr(before, name) for name in recorded}
    other = record(model, out, conditions=timed(batch=5, shapes={"x": (5, 2)}), rules=InputRules({"s": 3.0}), again=True)
    assert (other.batch, other.shapes, other.threads, other.constants) == (5, {"x": (5, 2)}, 1, {"s": 3.0})
    out.write_text("{}")
    with pytest.raises(ModelError, match=r"b\.json: not a baseline: .*; remove the file to record one under the given"):
        record(model, out, conditions=QUICK, again=True)
    out.unlink()
    assert record(model, out, conditions=QUICK, rules=InputRules({"s": 2.0}), again=True).batch == 1


@pytest.mark.parametrize("given", [{"io_binding": True}, {"seed": 3}, {"warmup": 1.0}])
def test_what_the_gate_does_in_its_own_way_is_refused(given, tmp_path):
    with pytest.raises(UsageError, match="leave out warmup, seed and io_binding"):
        checked(Conditions(Timing(seconds=0.05, processes=2, **given)))
    values = Timing(seconds=0.05, processes=2, values={"x": np.zeros((1, 2), np.float32)})
    with pytest.raises(UsageError, match="a baseline keeps no values of inputs"):
        record(tmp_path / "m.onnx", tmp_path / "b.json", conditions=Conditions(values))


def test_a_score_is_not_lost_when_a_baseline_is_recorded_again(small_path, tmp_path, rng):
    data = Labelled({"x": rng.standard_normal((8, 16, 8, 8)).astype(np.float32)}, rng.integers(0, 10, 8), "top1")
    record(small_path, tmp_path / "b.json", conditions=QUICK, data=data)
    with pytest.raises(ModelError, match="was recorded with a score on labelled data, got no data"):
        record(small_path, tmp_path / "b.json", conditions=QUICK, again=True)


METRICS = """
def named(outputs, labels):
    return (outputs["y"].argmax(1) == labels) * 1.0

def positive(outputs, labels):
    if (outputs["y"] < -1000).any():
        raise ValueError("a score below -1000")
    return named(outputs, labels)

def broken(outputs, labels):
    return 1 / 0
"""


def test_a_metric_that_fails_is_no_fault_of_the_model(untimed, small_path, tmp_path, rng, monkeypatch):
    (tmp_path / "gate_metrics.py").write_text(METRICS)
    monkeypatch.syspath_prepend(tmp_path)
    x = rng.standard_normal((12, 16, 8, 8)).astype(np.float32)
    labels, baseline = np.zeros(12, np.int64), tmp_path / "b.json"
    data = Labelled({"x": x}, labels, "gate_metrics:named")
    made = untimed(small_path, baseline, data=data)
    for metric, reason in (
        ("gate_metrics:gone", r"metric 'gate_metrics:gone' cannot be imported"),
        ("no_module:f", r"metric 'no_module:f' cannot be imported"),
        ("gate_metrics:broken", r"metric gate_metrics:broken: failed on 12 samples \(ZeroDivisionError"),
    ):
        facts = made.facts.model_copy(update={"metric": metric})
        made.model_copy(update={"facts": facts}).save(baseline)
        for reference in (baseline, small_path):
            with pytest.raises(ModelError, match=reason):
                check(reference, small_path, limits=LENIENT, conditions=QUICK, data=replace(data, metric=metric))


def test_a_metric_that_fails_for_one_model_alone_is_a_finding(untimed, small_path, tmp_path, rng, monkeypatch):
    (tmp_path / "gate_metrics.py").write_text(METRICS)
    monkeypatch.syspath_prepend(tmp_path)
    data = Labelled({"x": rng.standard_normal((12, 16, 8, 8)).astype(np.float32)}, np.zeros(12, np.int64))
    named, positive = (replace(data, metric=f"gate_metrics:{name}") for name in ("named", "positive"))
    untimed(small_path, tmp_path / "b.json", data=named)
    model = onnx.load(small_path)
    model.graph.node[-1].output[0] = model.graph.output[0].name = "z"
    onnx.save(model, tmp_path / "renamed.onnx")
    for reference in (tmp_path / "b.json", small_path):
        verdict = check(reference, tmp_path / "renamed.onnx", limits=LENIENT, conditions=QUICK, data=named)
        assert [(finding.name, finding.holds) for finding in verdict.findings] == [("interface", False)]
    low = changed(small_path, "fc.bias", lambda bias: bias - np.float32(5000))
    verdict = check(small_path, low, limits=LENIENT, conditions=QUICK, data=positive)
    assert re.search(r"run metric gate_metrics:positive: failed .*a score below -1000", verdict.reason)


@pytest.fixture
def two_inputs(tmp_path, rng):
    """Return a model with two inputs, and the same one with them in another order."""
    nodes = [onnx.helper.make_node("MatMul", ["image", "w"], ["h"]), onnx.helper.make_node("Mul", ["h", "mask"], ["y"])]
    weights = {"w": rng.standard_normal((8, 8)).astype(np.float32)}
    first = make_model(nodes, weights, {"image": ["n", 8], "mask": ["n", 8]}, {"y": ["n", 8]})
    paths = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(first, paths[0])
    inputs = list(first.graph.input)[::-1]
    del first.graph.input[:]
    first.graph.input.extend(inputs)
    onnx.save(first, paths[1])
    return paths


def test_the_order_of_the_inputs_does_not_matter(two_inputs, tmp_path):
    """Models are fed by names, and exporters list inputs in any order."""
    before, after = two_inputs
    assert check(before, after, limits=LENIENT, conditions=QUICK).holds
    record(before, tmp_path / "baseline.json", conditions=QUICK)
    before.unlink()  # so that the recorded outputs count
    verdict = check(tmp_path / "baseline.json", after, limits=LENIENT, conditions=QUICK)
    assert next(finding for finding in verdict.findings if finding.name == "parity").holds


def test_a_baseline_in_a_linked_folder_finds_its_model(two_inputs, tmp_path):
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    record(two_inputs[0], tmp_path / "link" / "baseline.json", conditions=QUICK)
    stored = json.loads((tmp_path / "link" / "baseline.json").read_text())
    assert (tmp_path / "link" / stored["model"]).samefile(two_inputs[0])
