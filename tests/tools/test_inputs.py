"""Every command on a model with a state and a scalar: `--input`, `--batch-axis` and `--state` reach each run of it."""

import numpy as np
import onnx
import pytest
from conftest import make_model
from onnx import helper
from stateful_graphs import HIDDEN, RATE, WIDTH, detector

import tensorrail as tr
from tensorrail_runtime.gate.regress import Baseline

RULES = ("--input", f"sr={RATE}", "--batch-axis", "state=1", "--state", "state:stateN")
INPUTS = tr.InputRules({"sr": RATE}, {"state": 1}, {"state": "stateN"})
QUICK = ("--duration", 0.1)
PLAN = tr.Plan(layers=(tr.LayerPlan(name="u", format="svd", modes=(HIDDEN, HIDDEN), ranks=(24,)),))


@pytest.fixture
def path(rng, tmp_path):
    onnx.save(detector(rng), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.fixture
def frames(rng, tmp_path):
    np.savez(tmp_path / "x.npz", input=rng.standard_normal((40, WIDTH)))  # of double width
    return tmp_path / "x.npz"


@pytest.fixture
def labelled(rng, tmp_path):
    np.savez(tmp_path / "l.npz", input=rng.standard_normal((12, WIDTH)), labels=np.zeros(12, np.int64))
    return tmp_path / "l.npz"


@pytest.mark.usefixtures("in_this_process")
def test_bench_times_the_values_that_are_given(cli, path, frames):
    """With another rate each run fails."""
    code, _, err = cli("bench", path, *QUICK)
    assert (code, "cannot run the model on these inputs" in err) == (2, True)
    for options in (("--input", f"sr={RATE}"), (*RULES, "--data", frames, "--processes", 1, "--batch", 3)):
        code, printed, err = cli("bench", path, path, *QUICK, *options)
        assert (code, err) == (0, "")
        assert " rounds" in printed  # names of models may be wrapped
    assert cli("bench", path, *QUICK, "--input", f"sr={RATE}", "--memory")[0] == 0
    held = {"input": np.ones((3, WIDTH)), "state": np.zeros((2, 3, HIDDEN)), "sr": np.array(RATE, np.int32)}
    np.savez(frames.with_name("all.npz"), **held)  # what one run takes
    assert cli("bench", path, *QUICK, "--data", frames.with_name("all.npz"), "--batch", 2)[0] == 0


def test_check_compares_on_random_inputs_and_along_sequences(cli, path, frames):
    assert cli("check", path, path)[0] == 2
    assert cli("check", path, path, "--input", f"sr={RATE}")[0] == 0
    code, printed, _ = cli("check", path, path, "--data", frames, *RULES)
    assert code == 0
    assert "40 samples in 6 batches" in printed


def test_rules_that_do_not_fit_end_with_one_line_and_exit_code_2(cli, path, frames):
    for options, reason in (
        (("--input", "sr"), "input: expected a constant such as sr=16000"),
        (("--input", "rate=1"), "constant: unknown input 'rate'; the model's inputs are input, state, sr"),
        (("--batch-axis", "state=5"), "batch axis of input 'state': expected 0 to 2, got 5"),
        (("--state", "state:hn"), "state 'state': unknown output 'hn'; the model's outputs are output, stateN"),
    ):
        for command in (("check", path, path, "--data", frames), ("bench", path, *QUICK)):
            code, _, err = cli(*command, *options)
            assert (code, err.count("\n")) == (2, 1), err
            assert reason in err


@pytest.mark.parametrize("to", ["fp16", "int8"])
def test_quantize_calibrates_and_times_with_them(to, cli, path, frames, tmp_path):
    code, printed, err = cli("quantize", path, "--to", to, "-o", tmp_path / "o.onnx", "--calibration", frames, *RULES, *QUICK)
    assert (code, err) == (0, "")
    assert {"fp16": "40 given samples", "int8": "10 held-out samples"}[to] in printed
    assert cli("check", path, tmp_path / "o.onnx", *RULES, "--data", frames, "--tolerance", 0.1)[0] == 0


def test_quantize_without_inputs_compares_with_the_constant(cli, path, tmp_path):
    arguments = ("quantize", path, "--to", "fp16", "-o", tmp_path / "o.onnx", *QUICK)
    assert cli(*arguments)[0] == 2
    assert cli(*arguments, "--input", f"sr={RATE}")[0] == 0


@pytest.mark.usefixtures("in_this_process")
def test_compress_fits_to_the_states_of_the_dense_model(path, frames, tmp_path):
    timing = tr.Timing(seconds=0.05, processes=1)
    options = tr.Options(timing=timing, inputs=INPUTS, fit=tr.Fit(seconds=1))
    report = tr.compress(path, tmp_path / "c.onnx", PLAN, calibration=frames, options=options)
    assert report.aside.samples == 10
    assert report.fits[0].rows > 0
    assert report.fits[0].fitted < 0.2
    assert report.latency.batch == 1
    without = tr.compress(path, tmp_path / "w.onnx", PLAN, options=tr.Options(timing=timing, inputs=INPUTS))
    assert without.aside is None
    with pytest.raises(tr.ModelError, match="no array for input 'state'; expected input, state, sr, got input"):
        tr.compress(path, tmp_path / "n.onnx", PLAN, calibration=frames)


@pytest.mark.usefixtures("in_this_process", "idle")
def test_plan_measures_losses_along_sequences(path, frames, tmp_path):
    search = tr.Search(
        seconds=1, improve_seconds=0, check_seconds=0.1, cache=tmp_path, allow_slower=True, formats=("svd",), grid=8
    )
    options = tr.Options(inputs=INPUTS, search=search, timing=tr.Timing())
    report = tr.plan(path, {"params": 1.1}, calibration=frames, options=options)
    assert report.loss_from == "calibration"
    assert report.plan.layers


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("to", ["fp32", "int8"])
def test_whole_sequences_are_set_aside(to, path, rng, tmp_path):
    """Of ten sequences of six steps, two: by `compress`, and by `quantize` to int8. Of sixty single samples, 15 would be."""
    sequences = [{"input": rng.standard_normal((6, WIDTH))} for _ in range(10)]
    options = tr.Options(inputs=INPUTS, timing=tr.Timing(seconds=0.1, processes=1), fit=tr.Fit(seconds=0))
    if to == "int8":
        assert tr.quantize(path, tmp_path / "o.onnx", to, calibration=sequences, options=options).samples == 12
    else:
        assert tr.compress(path, tmp_path / "o.onnx", PLAN, calibration=sequences, options=options).aside.samples == 12


def closeness(outputs, labels):
    """Score outputs by the first one alone: what a state adds is seen in it."""
    return outputs["output"][:, 0]


def test_accuracy_carries_the_states_of_the_model_that_is_scored(path, labelled):
    metric = f"{__name__}:closeness"
    scores = tr.accuracy(path, data=labelled, metric=metric, options=tr.Options(inputs=INPUTS)).scores
    arrays = dict(np.load(labelled)) | {"state": np.zeros((2, 12, HIDDEN))}
    still = tr.InputRules({"sr": RATE}, {"state": 1})
    without = tr.accuracy(path, data=arrays, metric=metric, options=tr.Options(inputs=still)).scores
    assert len(scores) == len(without) == 12
    assert scores[0] == pytest.approx(without[0], abs=1e-5)
    assert max(abs(a - b) for a, b in zip(scores, without, strict=True)) > 0.1


@pytest.mark.usefixtures("in_this_process")
def test_a_baseline_keeps_the_rules_and_the_data(cli, path, labelled, tmp_path, rng):
    out = tmp_path / "b.json"
    quick = ("--processes", 2, "--seconds", 0.05)
    metric = ("--data", labelled, "--metric", f"{__name__}:closeness")
    assert cli("regress", "record", path, "-o", out, *quick, *metric)[0] == 2
    assert cli("regress", "record", path, "-o", out, *quick, *metric, *RULES)[0] == 0
    baseline = Baseline.load(out)
    assert (baseline.rules, baseline.on_data) == (INPUTS, True)
    held = tr.regress.check(
        out,
        path,
        data=tr.Labelled.load(labelled, f"{__name__}:closeness"),
        limits=tr.Limits(max_slowdown=9.0),
        options=tr.Options(timing=tr.Timing(seconds=0.05, processes=2)),
    )
    assert held.holds, str(held)
    assert {finding.name for finding in held.findings} >= {"parity", f"accuracy ({__name__}:closeness)"}
    code, _, err = cli("regress", "check", out, path, *quick, *metric, "--input", "sr=8000")
    assert (code, "was recorded with inputs" in err) == (2, True)
    assert cli("regress", "check", path, path, *quick, "--max-slowdown", "900%", *RULES)[0] == 0
    assert cli("regress", "check", path, path, *quick)[0] == 2


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("fault", ["a weight is NaN", "the state is missing", "it overflows"])
def test_a_broken_model_with_states_falls_short(fault, cli, path, labelled, tmp_path):
    """The states of the inputs are outputs of the model that is checked."""
    quick = ("--seconds", 0.05, "--processes", 2, "--data", labelled, "--metric", f"{__name__}:closeness")
    assert cli("regress", "record", path, "-o", tmp_path / "b.json", *quick, *RULES)[0] == 0
    model = onnx.load(path)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "u.weight")
    if fault == "the state is missing":
        del model.graph.output[1]
    else:
        value = np.nan if fault == "a weight is NaN" else 1e38
        weight.CopyFrom(onnx.numpy_helper.from_array(np.full((HIDDEN, HIDDEN), value, np.float32), "u.weight"))
    if fault == "it overflows":  # inf − inf is NaN, from the first step on
        next(node for node in model.graph.node if node.output[0] == "n1").op_type = "Identity"
    onnx.save(model, tmp_path / "other.onnx")
    code, printed, err = cli("regress", "check", tmp_path / "b.json", tmp_path / "other.onnx", *quick)
    assert code == 1, err
    reason = {"a weight is NaN": "holds NaN", "the state is missing": "unknown output 'stateN'", "it overflows": "infinite"}
    assert reason[fault] in printed


@pytest.fixture
def ragged(rng, tmp_path):
    """Return a network x [n, 8, t] → y [n, 6, t], and a folder with one sound of its own length in each file."""
    weights = {
        "a.weight": rng.standard_normal((32, 8, 3)).astype(np.float32) / 5,
        "b.weight": rng.standard_normal((6, 32, 1)).astype(np.float32) / 6,
    }
    nodes = [
        helper.make_node("Conv", ["x", "a.weight"], ["h"], "a", pads=[1, 1]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Conv", ["r", "b.weight"], ["y"], "b"),
    ]
    onnx.save(make_model(nodes, weights, {"x": ["n", 8, "t"]}, {"y": ["n", 6, "t"]}), tmp_path / "r.onnx")
    (tmp_path / "sounds").mkdir()
    for k in range(12):
        np.save(tmp_path / "sounds" / f"{k:02}.npy", rng.standard_normal((1, 8, 20 + 3 * (k % 5))))
    return tmp_path / "r.onnx", tmp_path / "sounds"


@pytest.mark.usefixtures("in_this_process", "idle")
def test_feeds_of_different_lengths_stay_whole(ragged, cli, tmp_path):
    path, sounds = ragged
    search = tr.Search(
        seconds=1, improve_seconds=0, check_seconds=0.1, cache=tmp_path, allow_slower=True, formats=("svd",), grid=8
    )
    options = tr.Options(search=search, timing=tr.Timing(seconds=0.05, processes=1), fit=tr.Fit(seconds=1))
    report = tr.compress(path, tmp_path / "c.onnx", {"params": 1.1}, calibration=sounds, options=options)
    assert report.aside.samples == 3
    assert report.planning.verified.samples > 0
    assert report.fits[0].rows > 0
    code, printed, _ = cli("check", path, tmp_path / "c.onnx", "--data", sounds, "--tolerance", 10)
    assert (code, "12 samples in 12 batches" in printed) == (0, True)
    code, printed, _ = cli("quantize", path, "--to", "int8", "-o", tmp_path / "q.onnx", "--calibration", sounds, *QUICK)
    assert "3 held-out samples" in printed
    assert code == 0
    code, printed, _ = cli("bench", path, *QUICK, "--data", sounds)  # 20 frames, as in the first file
    assert code == 0
