import itertools
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import make_model
from onnx import TensorProto, helper, numpy_helper

from tensorrail_runtime import ModelError, Session, Tolerances, accuracy, bench, compare_scores, evaluate, open_session, parity
from tensorrail_runtime.measure.accuracy import Labelled, accuracy_of, metric_of, within_drop
from tensorrail_runtime.measure.latency import Latency, _unstable, ratio
from tensorrail_runtime.measure.timing import Timing
from tensorrail_runtime.measure.turns import MIN_CYCLES, MIN_ROUNDS, Runner, Turns, answer_bursts, are_precise, turns
from tensorrail_runtime.sessions.inputs import batch_of
from tensorrail_runtime.tables import Table


def changed(path, name, change):
    """Return a copy of the model whose initializer `name` went through `change`."""
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))
    other = path.with_name(f"changed-{name}.onnx")
    onnx.save(model, other)
    return other


def test_a_model_equals_itself(small_path):
    result = parity(small_path, small_path)
    assert result.holds
    assert result.worst == 0
    assert result.outputs[0].top1_agreement == 1
    assert result.batches == (1, 7)


def test_a_known_difference_is_measured(small_path, rng):
    x = {"x": rng.standard_normal((4, 16, 8, 8)).astype(np.float32)}
    other = changed(small_path, "fc.bias", lambda bias: bias + np.float32(0.5))
    result = parity(small_path, other, inputs=[x], tolerance=1e-4)
    output = result.outputs[0]
    y = open_session(small_path).run(None, x)[0]
    assert not result.holds
    assert output.max_abs == pytest.approx(0.5, rel=1e-4)
    assert output.mean_abs == pytest.approx(0.5, rel=1e-4)
    assert output.relative_l2 == pytest.approx(0.5 * np.sqrt(y.size) / np.linalg.norm(y), rel=1e-4)
    assert output.top1_agreement == 1  # the same shift for every class


def test_nan_outputs_and_other_signatures_are_refused(small_path, tmp_path, rng):
    with pytest.raises(ModelError, match=r"changed-fc\.bias\.onnx: weight 'fc\.bias' holds NaN at \[0\], one of 10"):
        parity(small_path, changed(small_path, "fc.bias", lambda bias: bias * np.nan))
    with pytest.raises(ModelError, match="'y' of the second model: expected finite values, got NaN or infinite ones"):
        parity(small_path, changed(small_path, "fc.bias", lambda bias: bias + np.inf))
    node = helper.make_node("Relu", ["z"], ["y"])
    onnx.save(make_model([node], {}, {"z": ["n", 10]}, {"y": ["n", 10]}), tmp_path / "other.onnx")
    with pytest.raises(ModelError, match="expected two models with the same inputs"):
        parity(small_path, tmp_path / "other.onnx")


def test_wrong_inputs_providers_and_files_are_refused(small_path, tmp_path):
    with pytest.raises(ModelError, match="expected inputs x, got other"):
        parity(small_path, small_path, inputs=[{"other": np.zeros(1)}])
    with pytest.raises(ModelError, match="cannot run the model on these inputs"):
        parity(small_path, small_path, inputs=[{"x": np.zeros((1, 2, 8, 8), np.float32)}])
    with pytest.raises(ModelError, match="unknown provider 'tpu': expected one of cpu, cuda"):
        open_session(small_path, provider="tpu")
    with pytest.raises(ModelError, match=r"none\.onnx: cannot be read"):
        open_session(tmp_path / "none.onnx")


def test_accuracy_counts_right_answers(small_path, rng):
    images = rng.standard_normal((50, 16, 8, 8)).astype(np.float32)
    labels = open_session(small_path).run(None, {"x": images})[0].argmax(1)
    labels[:10] = (labels[:10] + 1) % 10
    result = accuracy(small_path, images, labels, batch=16)
    assert (result.correct, result.total, result.percent) == (40, 50, 80.0)
    with pytest.raises(ModelError, match="as many images as labels"):
        accuracy(small_path, images[:0], labels[:0])


def test_models_are_timed_in_turns(small_path):
    shares = []
    result = bench(
        [small_path, small_path], Timing(seconds=0.2), labels=("a", "b"), progress=lambda _, share: shares.append(share)
    )
    assert [latency.model for latency in result.latencies] == ["a", "b"]
    assert all(len(latency.samples) == result.rounds >= 20 for latency in result.latencies)
    for latency in result.latencies:  # a percentile is given when ten samples or more lie beyond it
        assert (latency.p90 is not None, latency.p99 is not None) == (result.rounds >= 100, result.rounds >= 1000)
        assert latency.p90 is None or latency.p50 <= latency.p90
        assert latency.throughput == pytest.approx(1e3 / latency.p50)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    with pytest.raises(ModelError, match="at least one model"):
        bench([])


def test_the_interval_of_a_ratio_covers_the_truth(rng):
    def latency(name, scale):
        samples = tuple(scale * np.exp(0.2 * rng.standard_normal(400)))
        return Latency.of(name, samples)

    found = [ratio(latency("a", 2.0), latency("b", 1.0)) for _ in range(200)]
    covered = sum(r.low <= 2.0 <= r.high for r in found)
    assert covered >= 180  # 95 % nominal; fewer would come up once in some 500 times
    assert all(1.8 < r.value < 2.2 for r in found)


def test_the_interval_of_a_ratio_covers_the_truth_where_neighbours_are_alike(rng):
    covered = 0
    for _ in range(200):
        drift = rng.standard_normal(1000)
        for k in range(1, 1000):
            drift[k] += 0.8 * drift[k - 1]
        found = ratio(Latency.of("a", np.exp(0.1 * drift)), Latency.of("b", np.ones(1000)))
        covered += found.low <= 1.0 <= found.high
    assert covered >= 180


def test_a_model_that_finds_its_weights_in_the_caches_is_no_faster_than_its_copy(rng):
    """Two copies, A B B A: the one that comes right after itself takes half of the time."""
    noise = np.exp(0.02 * rng.standard_normal((2, 400)))
    warm = np.arange(400) % 2 == 0
    a, b = (Latency.of(name, one) for name, one in zip("ab", noise * np.where([warm, ~warm], 1.0, 2.0), strict=True))
    assert ratio(a, b, cycle=2).value == pytest.approx(1.0, abs=0.005)
    assert ratio(a, b, cycle=2).low > 0.99
    slower = Latency.of("b", 1.5 * np.array(b.samples))
    assert ratio(slower, a, cycle=2).value == pytest.approx(1.5, abs=0.01)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_every_model_comes_as_often_after_itself_and_after_each_other(count):
    ran = []
    times = turns([lambda k=k: ran.append(k) for k in range(count)], 0.0, 20)
    assert len(times[0]) >= 20
    assert {len(one) for one in times} == {len(times[0])}
    assert len(times[0]) % count == 0
    after = np.zeros((count, count), int)
    for before, now in itertools.pairwise([ran[-1], *ran]):  # what ran before ends like it
        after[before, now] += 1
    assert len(set(after.ravel())) == 1
    middles = [np.mean([at for at, model in enumerate(ran[: count * count]) if model == k]) for k in range(count)]
    assert max(middles) - min(middles) <= 0.15 * count * count  # no model early in the cycle and none late


def test_the_interval_over_processes_covers_what_they_differ_by(rng, monkeypatch):
    """Processes that differ by a per cent, a thousand rounds each: a bootstrap over rounds covers half of them."""
    asked = []

    def process(paths, settings, timing):
        asked.append(paths)
        own = np.exp(0.01 * rng.standard_normal())
        scales = {"dense.onnx": 2.0 * own, "factored.onnx": 1.0}
        times = [(scales[path] * np.exp(0.02 * rng.standard_normal(1000))).tolist() for path in paths]
        return Turns(times, [1.0, 1.0], [1, 1], [{}, {}])

    monkeypatch.setattr("tensorrail_runtime.measure.latency.time_in_fresh_process", process)
    found = [bench(["dense.onnx", "factored.onnx"], Timing(processes=5), labels=["dense", "factored"]) for _ in range(100)]
    covered = sum(one.ratios[0].low <= 2.0 <= one.ratios[0].high for one in found)
    assert covered >= 88  # 95 % nominal; fewer would come up once in some 500 times
    assert all([row.model for row in one.latencies] == ["dense", "factored"] for one in found)
    assert all(one.latencies[0].p50 > 1.5 * one.latencies[1].p50 for one in found)
    assert {Path(paths[0]).name for paths in asked[:5]} == {"dense.onnx", "factored.onnx"}  # either is loaded first


@pytest.mark.parametrize("count", [6, 10, 20, 30])
def test_the_interval_of_few_cycles_holds_the_truth_in_95_of_100_cases(count, rng):
    held = 0
    for _ in range(400):
        a, b = (np.exp(0.1 * rng.standard_normal(2 * count)) for _ in range(2))
        found = ratio(Latency.of("a", a), Latency.of("b", b), cycle=2)
        held += found.low <= 1.0 <= found.high
    assert held / 400 >= 0.93  # 95 %, less twice the standard deviation of 400 trials


def test_many_models_run_for_as_many_cycles_as_an_interval_needs():
    times = turns([lambda: None] * 7, 0.0, max(MIN_ROUNDS, MIN_CYCLES * 7))
    assert len(times[0]) >= 6 * 7


@pytest.mark.parametrize(
    ("axes", "shapes", "batch", "samples"),
    [
        ([["n", 3]], [], 5, 5),
        ([[4, 3]], [], 1, 4),
        ([[4, 3]], [], 4, 4),
        ([["n", 3]], [(6, 3)], 1, 6),
        ([[28, "n", 3]], [], 5, 5),  # time first
        ([["t", "n", 3]], [(28, 7, 3)], 7, 7),
        ([["n", "t", 3]], [(6, 50, 3)], 1, 6),
        ([[1, 16], ["n", 16]], [], 8, 8),
        ([[3, 32, 32]], [], 1, 1),  # channels, time or a batch: nobody knows
        ([[20, 8, 5]], [], 8, 8),
        ([[20, 8, 5]], [], 20, 20),
        ([[1, 3, "h", "w"]], [], 224, 1),  # the size of an image is no batch
        ([[], ["n"]], [], 3, 3),
        ([], [], 1, 1),
    ],
)
def test_the_batch_is_what_a_run_holds(axes, shapes, batch, samples):
    assert batch_of(axes, batch, shapes) == samples


def test_a_batch_that_no_axis_takes_is_refused(small_path, tmp_path, rng):
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "n")
    weights = {"w": rng.standard_normal((4, 5)).astype(np.float32)}
    for size in (1, 3):
        onnx.save(make_model([node], weights, {"x": [size, 4]}, {"y": [size, 5]}), tmp_path / f"{size}.onnx")
    with pytest.raises(ModelError, match="expected batch 3, got 1000"):
        bench([tmp_path / "3.onnx"], Timing(batch=1000, seconds=0.01))
    uneven = bench([tmp_path / "1.onnx", tmp_path / "3.onnx"], Timing(seconds=0.01))
    assert "different numbers of samples in a run (1.onnx 1, 3.onnx 3)" in uneven.warnings[0]
    report = bench([tmp_path / "3.onnx"], Timing(seconds=0.01))
    assert report.batch == 3
    assert report.latencies[0].throughput == pytest.approx(3e3 / report.latencies[0].p50)
    wide = bench([small_path], Timing(shapes={"x": (6, 16, 8, 8)}, seconds=0.01))
    assert (wide.batch, wide.latencies[0].throughput) == (6, pytest.approx(6e3 / wide.latencies[0].p50))


@pytest.mark.parametrize("processes", [0, 2])
def test_samples_per_second_are_those_of_each_model(processes, tmp_path, in_this_process):
    node, weights = helper.make_node("MatMul", ["x", "w"], ["y"], "n"), {"w": np.ones((4, 5), np.float32)}
    for size in (1, 3):
        onnx.save(make_model([node], weights, {"x": [size, 4]}, {"y": [size, 5]}), tmp_path / f"{size}.onnx")
    report = bench([tmp_path / "1.onnx", tmp_path / "3.onnx"], Timing(seconds=0.01, processes=processes))
    assert (report.batch, [latency.batch for latency in report.latencies]) == (1, [1, 3])
    for latency in report.latencies:
        assert latency.throughput == pytest.approx(1e3 * latency.batch / latency.p50)


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int64, np.float32])
def test_the_five_largest_of_any_type_count(kind):
    scores = np.array([[0, 1, 2, 3, 4, 5, 100]]).astype(kind)
    if kind == np.int8:
        scores[0, 0] = -128
    for label, right in ((6, True), (2, True), (1, False), (0, False)):
        assert metric_of("top5")({"y": scores}, np.array([label]))[0] == right


def test_bound_inputs_and_outputs_are_timed_alike(small_path):
    result = bench([small_path, small_path], Timing(2, seconds=0.1, io_binding=True))
    assert not result.transfers
    assert [latency.model for latency in result.latencies] == [str(small_path)] * 2
    copied = bench([small_path], Timing(2, seconds=0.1))
    both = result.model_copy(update={"with_transfers": copied})
    titles, (alone,) = ([part.title for part in report.shown() if isinstance(part, Table)] for report in (both, copied))
    assert [title.rpartition(", ")[2] for title in titles] == ["on the device", "with transfers"]
    assert "transfers" not in alone
    with pytest.raises(ModelError, match="needs IO binding"):
        bench([small_path], settings=Session(provider="cuda", cuda_graph=True))


def test_unstable_times_are_said_to_be():
    steady = Latency.of("steady", [1.0] * 200)
    shaky = Latency.of("shaky", [1.0, 2.0] * 100)
    assert (steady.variation, shaky.variation) == (0.0, pytest.approx(1 / 3))
    assert (steady.p99, shaky.p90) == (None, 2.0)
    said = _unstable([[steady, shaky], [steady, steady], [steady, shaky]])
    assert said == [
        "shaky: unstable times in 2 of 3 processes, coefficient of variation up to 33%: close other programs, or measure longer"
    ]
    assert _unstable([[shaky]])[0].startswith("shaky: unstable times, coefficient of variation 33%: ")


def test_elements_are_held_to_rtol_and_atol_by_output(small_path):
    other = changed(small_path, "fc.bias", lambda bias: bias + np.float32(0.5))
    held = [
        (Tolerances(atol={"": 0.6}), True),
        (Tolerances(atol={"y": 0.4}), False),
        (Tolerances(rtol={"": 1e-6}), False),
        (Tolerances(relative_l2=None), True),
    ]
    for tolerances, holds in held:
        assert parity(small_path, other, tolerance=tolerances).holds == holds
    output = parity(small_path, other, tolerance=Tolerances(atol={"y": 0.4})).outputs[0]
    assert output.smallest == pytest.approx(0.5, rel=1e-4)
    assert parity(small_path, other, tolerance=Tolerances(atol={"": output.smallest})).holds
    with pytest.raises(ModelError, match="unknown output 'z'; the model's outputs are y"):
        parity(small_path, other, tolerance=Tolerances(atol={"z": 1.0}))


def test_the_worst_element_is_found(small_path, rng):
    other = changed(small_path, "fc.bias", lambda bias: bias + np.float32(3) * (np.arange(10) == 7).astype(np.float32))
    feeds = [{"x": rng.standard_normal((n, 16, 8, 8)).astype(np.float32)} for n in (2, 3)]
    output = parity(small_path, other, inputs=feeds).outputs[0]
    run, _, column = output.worst_index
    assert column == 7
    assert run in (0, 1)
    assert output.worst_values[1] - output.worst_values[0] == pytest.approx(3, rel=1e-4)


def test_two_models_are_compared_on_the_same_samples(small_path, rng):
    x = rng.standard_normal((200, 16, 8, 8)).astype(np.float32)
    scores = open_session(small_path).run(None, {"x": x})[0]
    labels = scores.argmax(1)
    other = changed(small_path, "fc.bias", lambda bias: bias + np.float32(2) * np.arange(10, dtype=np.float32))
    shares = []
    a = evaluate(small_path, Labelled({"x": x}, labels), batch=64, on_batch=shares.append)
    b = evaluate(other, Labelled({"x": x}, labels), batch=64)
    assert shares == [0.32, 0.64, 0.96, 1.0]
    paired = compare_scores(a, b)
    assert a.mean == 1
    assert (paired.only_reference, paired.only_candidate) == (round(200 * (1 - b.mean)), 0)
    assert paired.difference == pytest.approx(b.mean - 1)
    assert paired.low < paired.difference < paired.high
    assert paired.p_value == pytest.approx(2 * 0.5**paired.only_reference)  # McNemar, exact, all on one side
    assert compare_scores(a, a).p_value == 1
    assert evaluate(other, Labelled({"x": x}, labels, "top5")).mean >= b.mean


def test_a_drop_of_just_the_limit_is_within_it():
    for before, after, limit in ((0.99, 0.98, 0.01), (0.8, 0.7, 0.1), (0.0, 0.0, 0.0), (0.5, 0.5, 0.0), (3e8, 2e8, 1e8)):
        assert within_drop(before, after, limit)
        assert within_drop(before, after + 1e-3, limit)
    for before, after, limit in ((0.99, 0.98, 0.0099), (0.5, 0.499999, 0.0), (3e-12, 1e-12, 1e-12), (0.5, float("nan"), 0.1)):
        assert not within_drop(before, after, limit)


def test_an_own_metric_is_a_function_of_a_module(small_path, rng, tmp_path, monkeypatch):
    (tmp_path / "own_metric.py").write_text("def margin(outputs, labels):\n    return outputs['y'].max(1) - labels\n")
    (tmp_path / "bad_metric.py").write_text(
        "import numpy as np\n\n\ndef one(outputs, labels):\n    return 1.0\n\n\n"
        "def nan(outputs, labels):\n    return np.full(len(labels), np.nan)\n\n\n"
        "def infinite(outputs, labels):\n    return np.full(len(labels), -np.inf)\n\n\n"
        "def fails(outputs, labels):\n    return outputs['z']\n\n\n"
        "def three(outputs, labels, extra):\n    return labels\n\n\n"
        "def words(outputs, labels):\n    return ['good'] * len(labels)\n\n\n"
        "def ends(outputs, labels):\n    raise SystemExit(0)\n"
    )
    monkeypatch.chdir(tmp_path)
    x = {"x": rng.standard_normal((20, 16, 8, 8)).astype(np.float32)}
    a = evaluate(small_path, Labelled(x, np.zeros(20), "own_metric:margin"))
    b = evaluate(small_path, Labelled(x, np.ones(20), "own_metric:margin"))
    paired = compare_scores(a, b)
    assert paired.test == "Wilcoxon signed-rank"
    assert paired.difference == pytest.approx(-1)
    (tmp_path / "ending_metric.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "failing_metric.py").write_text("raise RuntimeError('no licence')\n")
    for metric, reason in (
        ("top3", "unknown metric 'top3'"),
        ("none_such:f", "cannot be imported"),
        ("own_metric:none", "cannot be imported"),
        ("bad_metric:one", "one score for each of 20 samples"),
        ("bad_metric:nan", "expected a finite number for each sample, got NaN"),
        ("bad_metric:infinite", "expected a finite number for each sample, got an infinite value"),
        ("bad_metric:fails", r"metric bad_metric:fails: failed on 20 samples \(KeyError: 'z'\) at bad_metric.py, line 17"),
        ("bad_metric:three", r"bad_metric:three: failed on 20 samples \(TypeError: .*missing 1 required .* 'extra'\)"),
        ("bad_metric:words", r"bad_metric:words: failed on 20 samples \(ValueError: could not convert string to float"),
        ("bad_metric:ends", r"bad_metric:ends: failed on 20 samples \(SystemExit: 0\) at bad_metric.py, line 29"),
        (
            "ending_metric:score",
            r"metric 'ending_metric:score' cannot be imported \(SystemExit: 0\) at ending_metric.py, line 1",
        ),
        ("failing_metric:score", r"metric 'failing_metric:score' cannot be imported \(RuntimeError: no licence\)"),
    ):
        with pytest.raises(ModelError, match=reason):
            evaluate(small_path, Labelled(x, np.zeros(20), metric))
    with pytest.raises(ModelError, match="integer labels"):
        evaluate(small_path, Labelled(x, np.zeros(20)))


def test_models_without_inputs_are_compared_and_other_outputs_than_tensors_are_refused(small_model, tmp_path):
    alone, several = tmp_path / "alone.onnx", tmp_path / "several.onnx"
    weights = {"w": np.ones((3, 4), np.float32)}
    onnx.save(make_model([helper.make_node("Relu", ["w"], ["y"])], weights, {}, {"y": [3, 4]}), alone)
    result = parity(alone, alone)
    assert result.holds
    assert result.batches == (1, 1)
    with pytest.raises(ModelError, match="the model has no inputs"):
        evaluate(alone, Labelled({"x": np.ones((2, 4))}, np.zeros(2, np.int64)))
    with pytest.raises(ModelError, match="the model has no inputs, so it cannot be run on images"):
        accuracy(alone, np.ones((2, 4)), np.zeros(2, np.int64))
    graph = helper.make_graph(
        [helper.make_node("SplitToSequence", ["x"], ["y"], axis=1)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), several)
    for call in (
        lambda: parity(several, several),
        lambda: evaluate(several, Labelled({"x": np.ones((2, 4), np.float32)}, np.zeros(2, np.int64))),
    ):
        with pytest.raises(ModelError, match=r"output 'y' has type seq\(tensor\(float\)\): only tensors"):
            call()


@pytest.mark.filterwarnings("error")
def test_outputs_without_elements_are_no_evidence(tmp_path):
    onnx.save(make_model([helper.make_node("Relu", ["x"], ["y"])], {}, {"x": [0, 8]}, {"y": [0, 8]}), tmp_path / "zero.onnx")
    with pytest.raises(ModelError, match="no output had a value in any run"):
        parity(tmp_path / "zero.onnx", tmp_path / "zero.onnx")
    onnx.save(make_model([helper.make_node("Relu", ["x"], ["y"])], {}, {"x": ["n", 8]}, {"y": ["n", 8]}), tmp_path / "n.onnx")
    assert parity(tmp_path / "n.onnx", tmp_path / "n.onnx", batches=(0, 1)).holds
    with pytest.raises(ModelError, match="batches of 0, got 3 samples"):
        evaluate(tmp_path / "zero.onnx", Labelled({"x": np.ones((3, 8), np.float32)}, np.zeros(3, np.int64)))


def test_a_column_of_labels_counts_as_labels_and_other_shapes_are_refused(small_path, rng):
    x = rng.standard_normal((9, *open_session(small_path).get_inputs()[0].shape[1:])).astype(np.float32)
    labels = open_session(small_path).run(None, {"x": x})[0].argmax(1)
    for given in (labels[:, None], labels.astype(">i2"), labels[::-1][::-1]):
        assert evaluate(small_path, Labelled({"x": x.astype(">f4")}, given)).mean == 1
        assert accuracy_of(small_path, [(x.astype(">f4"), given)]).percent == 100
    one_hot = np.eye(10, dtype=np.int64)[labels]
    with pytest.raises(
        ModelError, match=r"integer labels of shape \(samples,\), got .*labels of type int64 and shape \(9, 10\)"
    ):
        evaluate(small_path, Labelled({"x": x}, one_hot))
    with pytest.raises(ModelError, match=r"integer labels of shape \(samples,\), got .* shape \(9, 10\)"):
        accuracy_of(small_path, [(x, one_hot)])
    with pytest.raises(ModelError, match=r"labels of shape \(8,\) and 9 samples"):
        accuracy_of(small_path, [(x, labels[:8])])


def test_labels_without_an_axis_are_refused(small_path):
    x = np.zeros((1, 16, 8, 8), np.float32)
    with pytest.raises(ModelError, match=r"labels of shape \(\) and 1 samples"):
        evaluate(small_path, Labelled({"x": x}, np.array(1)))
    with pytest.raises(ModelError, match="as many images as labels"):
        accuracy(small_path, x, np.array(1))


def test_a_scalar_input_goes_into_every_batch(tmp_path, rng):
    path = tmp_path / "scaled.onnx"
    onnx.save(make_model([helper.make_node("Mul", ["s", "x"], ["y"])], {}, {"s": [], "x": ["n", 3]}, {"y": ["n", 3]}), path)
    x = rng.standard_normal((5, 3)).astype(np.float32)
    found = evaluate(path, Labelled({"s": np.array(2, np.float32), "x": x}, x.argmin(1)), batch=2)
    assert found.scores == (0.0,) * 5
    negative = np.array(-2, np.float32)
    assert evaluate(path, Labelled({"s": negative, "x": x}, x.argmin(1)), batch=2).scores == (1.0,) * 5
    feed = {"s": negative, "x": x}
    assert parity(path, path, inputs=[feed]).batches == (5,)


def test_times_are_precise_once_their_ratios_are(rng):
    machine = rng.uniform(0.5, 2.0, (40, 1))  # the speed of the machine in each round changes, and all models with it
    steady = machine * [1.0, 2.0, 0.5] * rng.uniform(0.998, 1.002, (40, 3))
    assert are_precise(steady[:7]).tolist() == [True, True, True]
    assert not are_precise(steady[:6]).any()  # too few to know
    noisy = machine * [1.0, 2.0, 0.5] * rng.uniform(0.9, 1.1, (40, 3))
    assert are_precise(noisy[:7]).tolist() == [True, False, False]
    assert are_precise(noisy[:7], 0.5).all()
    assert are_precise(noisy).tolist() == [True, False, False]
    assert are_precise([1.0, 2.0, 0.5] * rng.uniform(0.9, 1.1, (20_000, 3))).all()  # the interval of a median narrows
    assert not are_precise(machine[:7]).any()  # of a single model, its time counts
    assert are_precise(np.ones((7, 1))).all()


def test_times_that_hardly_count_need_not_be_precise(rng):
    rounds = [1.0, 0.01] * np.stack([np.ones(20), rng.uniform(0.8, 1.2, 20)], 1)
    assert are_precise(rounds).tolist() == [True, False]
    assert are_precise(rounds, of_all=0.005).tolist() == [True, True]


def test_a_model_that_ran_no_more_is_judged_by_its_rounds(rng):
    rounds = [1.0, 2.0, 0.5] * rng.uniform(0.998, 1.002, (40, 3))
    rounds[8:, 1] = np.nan
    assert are_precise(rounds).tolist() == [True, True, True]
    rounds[3:, 2] = np.nan  # too few to know
    assert not are_precise(rounds).any()


def test_models_whose_times_are_known_run_no_more(monkeypatch):
    """The second model's time is known at once, the third one's is not: it runs on, beside the first."""
    runs, now, rng = [0, 0, 0], [0.0], np.random.default_rng(0)

    def prepared(path, settings, timing):
        index = int(path)

        def run():
            runs[index] += 1
            now[0] += 1e-3 * (1 + index) * (rng.uniform(0.5, 1.5) if index == 2 else 1.0)

        return Runner(run, 0.0, 1, {})

    monkeypatch.setattr("tensorrail_runtime.measure.turns.runner", prepared)
    monkeypatch.setattr("tensorrail_runtime.measure.turns.time.perf_counter", lambda: now[0])
    request = {"paths": ["0", "1", "2"], "contents": [{}] * 3, "settings": {}, "seconds": 1e9, "rounds": 5, "most": 60}
    times = np.array(json.loads(answer_bursts(request | {"precision": 0.005, "of_all": 0.0}))["times"])
    assert times.shape == (3, 59)
    assert np.isfinite(times).sum(1).tolist() == [59, 7, 59]
    assert runs == [4 * 60, 4 * 8, 4 * 60]
    np.testing.assert_allclose(times[1, :7] / times[0, :7], 2)
