"""A model here against the same model under another interpreter: times interleaved, outputs, and what runs differently."""

import shlex
import subprocess
import sys
import venv
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import make_model
from onnx import helper

from tensorrail_runtime.errors import ModelError, UsageError
from tensorrail_runtime.gate import environments
from tensorrail_runtime.gate.checks import Limits
from tensorrail_runtime.gate.environments import Environment, EnvironmentsVerdict, Operators, _apart, check_environments
from tensorrail_runtime.gate.times import time_change
from tensorrail_runtime.measure.timing import Conditions, Timing
from tensorrail_runtime.sessions.machine import machine
from tensorrail_runtime.sessions.session import Session

QUICK = Conditions(Timing(seconds=0.05, processes=2))
OTHER_VERSION = "1.22.0"


def chain(length, scale=1.0):
    """Return products of 96×96 with a Relu behind each."""
    rng = np.random.default_rng(0)
    weights = {f"w{k}": (scale * rng.standard_normal((96, 96)) / 10).astype(np.float32) for k in range(length)}
    nodes = []
    for k in range(length):
        nodes.append(helper.make_node("MatMul", [f"x{k}", f"w{k}"], [f"m{k}"], f"matmul{k}"))
        nodes.append(helper.make_node("Relu", [f"m{k}"], ["y" if k + 1 == length else f"x{k + 1}"], f"relu{k}"))
    return make_model(nodes, weights, {"x0": ["n", 96]}, {"y": ["n", 96]})


@pytest.fixture
def model(tmp_path):
    onnx.save(chain(4), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_the_same_environment_runs_the_same(model):
    verdict = check_environments(model, [sys.executable], limits=Limits(max_slowdown=0.9), conditions=QUICK)
    assert verdict.holds
    (other,) = verdict.others
    assert (other.onnxruntime, other.numpy, other.fused) == (verdict.here.onnxruntime, np.__version__, verdict.here.fused)
    assert {one.op: one.count for one in other.operators} == {one.op: one.count for one in verdict.here.operators}
    assert [finding.name for finding in verdict.findings] == [
        f"latency, against {other.name}",
        f"outputs, against {other.name}",
    ]
    assert verdict.findings[1].measured == "y: differs by 0.0e+00"
    assert EnvironmentsVerdict.model_validate_json(verdict.model_dump_json()) == verdict
    assert "in interleaved runs with other environments" in str(verdict)


def test_another_model_there_has_other_operators_and_outputs(model, tmp_path):
    onnx.save(chain(2, scale=1.5), tmp_path / "before.onnx")
    limits = Limits(max_slowdown=0.9)
    verdict = check_environments(model, [sys.executable], there=tmp_path / "before.onnx", limits=limits, conditions=QUICK)
    outputs = verdict.findings[1]
    assert not outputs.holds
    assert outputs.measured.startswith("y: differs by ")
    assert "│ MatMul" in str(verdict)  # 2 → 4 of them


def test_slow_models_have_enough_times(tmp_path):
    """A run that takes longer than a burst: each burst is a single run."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "product")]
    weights = {"w": np.ones((1024, 1024), np.float32)}
    onnx.save(make_model(nodes, weights, {"x": ["n", 1024]}, {"y": ["n", 1024]}), tmp_path / "slow.onnx")
    slow = replace(QUICK, timing=replace(QUICK.timing, batch=1024), settings=Session(threads=1))
    limits = Limits(max_slowdown=0.9)
    verdict = check_environments(tmp_path / "slow.onnx", [sys.executable], limits=limits, conditions=slow)
    assert 0 <= verdict.timing.p_value <= 1
    assert verdict.timing.low <= verdict.timing.slowdown <= verdict.timing.high


def test_the_p_value_is_over_pairs_of_processes():
    """Within processes nothing varies, but processes do: a few of them show nothing."""
    old, new = [[1.0] * 40, [1.0] * 40, [1.0] * 40], [[1.05] * 40, [0.97] * 40, [1.06] * 40]
    assert time_change(old, new, paired=True).p_value < 0.05
    assert time_change(old, new, paired=True, apart=True).p_value > 0.1
    slower = [[1.05] * 40, [1.06] * 40, [1.055] * 40]
    assert time_change(old, slower, paired=True, apart=True).p_value < 0.01
    assert time_change(old, old, paired=True, apart=True).p_value == 1
    with pytest.raises(ValueError, match="expected at least 8 times or cycles of a process, got 4"):
        time_change([[1.0] * 8] * 2, [[1.0] * 8] * 2, paired=True, apart=True)


def test_inputs_are_passed_by_their_names(tmp_path):
    nodes = [helper.make_node("Sub", ["b", "a"], ["y"], "sub")]
    for name, inputs in (("here", ("a", "b")), ("there", ("b", "a"))):
        model = make_model(nodes, {}, {one: ["n", 3] for one in inputs}, {"y": ["n", 3]})
        onnx.save(model, tmp_path / f"{name}.onnx")
    limits = Limits(max_slowdown=0.9)
    there = tmp_path / "there.onnx"
    verdict = check_environments(tmp_path / "here.onnx", [sys.executable], there=there, limits=limits, conditions=QUICK)
    assert verdict.findings[1].holds


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ([1.0, np.inf], [1.0, np.inf], "differs by 0.0e+00"),
        ([1.0, np.nan], [1.0, np.nan], "differs by 0.0e+00"),
        ([1.0, np.inf], [1.0, 2.0], "other values are infinite or NaN"),
        ([1.0, 2.0], [1.0, np.nan], "other values are infinite or NaN"),
        ([1.0, 2.0], [[1.0, 2.0]], r"float64 [2] → float64 [1, 2]"),
        ([1, 2], [1, 3], "50.0% of the values differ"),
        (None, [1.0], "missing there"),
        ([1.0], None, "missing here"),
    ],
)
def test_outputs_are_compared(before, after, words):
    pair = (None if one is None else np.array(one) for one in (before, after))
    difference, said = _apart(*pair)
    assert said == words
    assert (difference == 0) == said.endswith("0.0e+00")


def test_a_relative_path_of_an_interpreter(model, tmp_path, monkeypatch):
    interpreter(tmp_path)
    monkeypatch.chdir(tmp_path)
    limits = Limits(max_slowdown=0.9)
    verdict = check_environments(model, ["./python"], limits=limits, conditions=QUICK)
    assert verdict.others[0].python == "./python"


def test_what_a_module_prints_at_the_start_is_no_answer(model, tmp_path):
    talking = tmp_path / "python"
    talking.write_text(f'#!/bin/sh\necho hello\nexec "{sys.executable}" "$@"\n')
    talking.chmod(0o755)
    assert check_environments(model, [talking], limits=Limits(max_slowdown=0.9), conditions=QUICK).holds


def interpreter(tmp_path, *options):
    """Return a Python that is started with more options."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" {shlex.join(options)} "$@"\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("-S",), r"python: ModuleNotFoundError: No module named 'numpy': install onnxruntime and numpy in that environment"),
        (("-c", "1/0"), r"python: the process ended with 1: ZeroDivisionError"),
    ],
)
def test_an_environment_that_cannot_run_the_model_is_named(options, reason, model, tmp_path):
    with pytest.raises(ModelError, match=reason):
        check_environments(model, [interpreter(tmp_path, *options)], conditions=QUICK)


def test_what_is_no_interpreter_is_refused(model, tmp_path):
    with pytest.raises(ModelError, match=r"/bin/cat: (repeats what it is asked|the process ended)"):
        check_environments(model, ["/bin/cat"], conditions=QUICK)
    with pytest.raises(UsageError, match="expected at least one other Python interpreter"):
        check_environments(model, [], conditions=QUICK)
    with pytest.raises(UsageError, match="a provider and a number of threads, and no other settings"):
        check_environments(model, [sys.executable], conditions=replace(QUICK, settings=Session(level="basic")))
    with pytest.raises(ModelError, match=r"nowhere: cannot be started \(No such file .*\): expected a Python interpreter"):
        check_environments(model, [tmp_path / "nowhere"], conditions=QUICK)


def test_a_model_that_the_other_environment_cannot_load_is_named(model, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match=f"{sys.executable}: .*(?i:protobuf|invalid|fail)"):
        check_environments(model, [sys.executable], there=tmp_path / "broken.onnx", conditions=QUICK)


def environment(version, fused, **counts):
    operators = tuple(
        Operators(op=op, provider="CPUExecutionProvider", count=count, microseconds=time)
        for op, (count, time) in counts.items()
    )
    return Environment(python="python", version="3.11.2", onnxruntime=version, numpy="2.0", fused=fused, operators=operators)


def shown(before, after):
    verdict = EnvironmentsVerdict(model="m.onnx", timing=None, findings=(), machine=machine(), here=after, others=(before,))
    return " ".join(str(verdict).split())


def test_what_runs_differently_is_named():
    before = environment("1.20.1", {"Conv + Relu": 3}, Conv=(3, 300.0), Softmax=(1, 50.0), Add=(2, 1.0))
    after = environment("1.31.1", {"Conv + Relu": 1}, Conv=(3, 305.0), Relu=(2, 20.0), Softmax=(1, 80.0), Add=(2, 1.5))
    text = shown(before, after)
    assert "operators that are fused differently (there → here): Conv + Relu 3 → 1" in text
    for row in ("Relu │ CPU │ 0 │ 2 │ 0 │ 20", "Softmax │ CPU │ 1 │ 1 │ 50 │ 80"):
        assert row in text
    assert "Conv │" not in text  # as many, and as fast
    assert "Add │" not in text  # too short to matter
    assert "runs the same operators, within 10 % of their time" in shown(before, before)


@pytest.mark.slow
def test_another_version_from_pypi(model, tmp_path):
    """A real environment of its own, with an older ONNX Runtime and NumPy alone."""
    venv.create(tmp_path / "other", with_pip=True)
    python = tmp_path / "other" / "bin" / "python"
    installed = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", f"onnxruntime=={OTHER_VERSION}"], check=False, capture_output=True
    )
    if b"connection" in installed.stderr.lower():
        pytest.skip("no network")
    assert not installed.returncode, installed.stderr.decode()
    verdict = check_environments(model, [python], limits=Limits(max_slowdown=0.9), conditions=QUICK)
    (other,) = verdict.others
    assert other.onnxruntime == OTHER_VERSION != verdict.here.onnxruntime
    assert verdict.findings[1].holds


def test_an_interpreter_that_does_not_answer_is_stopped_with_that_reason(model, tmp_path, monkeypatch):
    interpreter(tmp_path, "-c", "__import__('time').sleep(60)")
    monkeypatch.setattr(environments, "_PATIENCE", 0.5)
    with pytest.raises(ModelError, match=r"python: no answer within 0\.5 seconds"):
        check_environments(model, [tmp_path / "python"], limits=Limits(max_slowdown=0.9), conditions=QUICK)


def test_a_path_of_an_interpreter_is_the_file(model, tmp_path, monkeypatch):
    """A Path drops the `./` by which a name is not looked up on PATH."""
    path = interpreter(tmp_path, "-c", "1/0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="ZeroDivisionError"):
        check_environments(model, [Path("./python")], limits=Limits(max_slowdown=0.9), conditions=QUICK)
    assert path.exists()
