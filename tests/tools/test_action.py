"""The GitHub Action: its form by GitHub's schema, and its own bash, run on real models with the environment of a runner.

What falls short here does so by its size or outputs, never by its time: those limits do not depend on the machine.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from onnx import helper, numpy_helper
from pre_commit.commands.validate_manifest import validate_manifest

from tensorrail_runtime.gate.checks import Finding
from tensorrail_runtime.gate.outputs import markdown, workflow_commands
from tensorrail_runtime.gate.regress import Verdict
from tensorrail_runtime.gate.times import TimeChange
from tensorrail_runtime.sessions.machine import Machine

ROOT = Path(__file__).parents[2]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
WORKFLOW = yaml.safe_load((ROOT / "examples" / "github-workflow.yml").read_text(encoding="utf-8"))
STEPS = {step["id"]: step for step in ACTION["runs"]["steps"]}
HOOKS = {hook["id"]: hook for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))}
QUICK = {"processes": "2", "seconds": "0.05", "max-slowdown": "900%", "install": "false"}


@pytest.mark.parametrize(
    ("schema", "file"),
    [
        ("vendor.github-actions", "action.yml"),
        ("vendor.github-workflows", "examples/github-workflow.yml"),
    ],
)
def test_files_have_the_form_that_their_schema_asks_for(schema, file):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(ROOT / file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hooks_have_the_form_that_pre_commit_asks_for(capsys):
    assert validate_manifest([str(ROOT / ".pre-commit-hooks.yaml")]) == 0, capsys.readouterr().out
    assert set(HOOKS) == {"tensorrail-check", "tensorrail-regress"}


def test_no_expression_stands_in_a_script():
    scripts = [step.get("run", "") for step in ACTION["runs"]["steps"]]
    scripts += [step.get("run", "") for job in WORKFLOW["jobs"].values() for step in job["steps"]]
    assert sum(map(bool, scripts)) == 3
    assert not any("${{" in script for script in scripts)
    assert all(step["shell"] == "bash" for step in ACTION["runs"]["steps"])
    assert "secrets" not in json.dumps([ACTION, WORKFLOW])
    assert WORKFLOW["permissions"] == {"contents": "read"}


def test_every_input_is_used_and_the_workflow_names_none_that_is_not_there():
    used = set(re.findall(r"inputs\.([\w-]+)", json.dumps(ACTION["runs"])))
    assert used == set(ACTION["inputs"])
    calls = [s for job in WORKFLOW["jobs"].values() for s in job["steps"] if "/tensorrail@" in s.get("uses", "")]
    assert len(calls) == 3
    for call in calls:
        assert set(call["with"]) <= set(ACTION["inputs"])
        assert {name for name, one in ACTION["inputs"].items() if one.get("required")} <= set(call["with"])


def run_step(name, inputs, folder, path=(), **more):
    """Run a step of the action as a runner does; return the process, its outputs and the summary."""
    files = {variable: folder / variable for variable in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY", "GITHUB_PATH")}
    temporary = folder / "temp"
    temporary.mkdir(exist_ok=True)
    for file in files.values():
        file.write_text("")
    given = {key: one.get("default", "") for key, one in ACTION["inputs"].items()} | inputs
    assert set(given) == set(ACTION["inputs"])
    context = {f"inputs.{key}": value for key, value in given.items()} | {"github.action_path": str(more.pop("action", ROOT))}
    variables = {
        key: re.sub(r"\$\{\{ ([\w.-]+) \}\}", lambda found: context[found[1]], value)
        for key, value in STEPS[name]["env"].items()
    }
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {key: str(file) for key, file in files.items()} | {"RUNNER_TEMP": str(temporary)} | variables | more
    environment["PATH"] = os.pathsep.join([*map(str, path), environment["PATH"]])
    script = folder / "step.sh"
    script.write_text(STEPS[name]["run"])
    command = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    outputs = dict(line.split("=", 1) for line in files["GITHUB_OUTPUT"].read_text().splitlines())
    return done, outputs, files["GITHUB_STEP_SUMMARY"].read_text()


@pytest.fixture
def gate(tmp_path):
    """Return a function that runs the gate's step with inputs; `tensorrail` is that of this environment."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "tensorrail").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tensorrail "$@"\n')
    (scripts / "tensorrail").chmod(0o755)
    return lambda **inputs: run_step(
        "gate", QUICK | {key.replace("_", "-"): str(value) for key, value in inputs.items()}, tmp_path, path=[scripts]
    )


@pytest.fixture
def wrong_path(small_path):
    model = onnx.load(small_path)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "fc.bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(1), bias.name))
    path = small_path.with_name("wrong.onnx")
    onnx.save(model, path)
    return path


def obeyed(text):
    """Return the workflow commands that a runner obeys in a log: none while they are stopped."""
    found, token = [], None
    for line in text.splitlines():
        if token is not None:
            token = None if line == f"::{token}::" else token
        elif stopped := re.fullmatch(r"::stop-commands::(.+)", line):
            token = stopped[1]
        elif line.startswith("::"):
            found.append(line)
    assert token is None
    return found


HOSTILE = "y\n::error::mine\n::add-mask::x\n|<b>*a*</b>`"


def test_the_same_model_holds_and_names_in_it_are_no_commands(gate, small_path, tmp_path, rng):
    x = rng.standard_normal((20, 16, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, labels=np.zeros(20, np.int64))
    model = onnx.load(small_path)
    model.graph.node[-1].output[0] = model.graph.output[0].name = HOSTILE
    onnx.save(model, small_path)
    done, outputs, summary = gate(model=small_path, baseline=small_path, data="data.npz")
    assert done.returncode == 0, done.stdout + done.stderr
    assert outputs["holds"] == "true"
    assert "### ✅ dense.onnx: no regression" in summary
    assert "| nodes | 5 | 5 | +0.0% | yes |" in summary
    assert "| accuracy (top1) |" in summary
    assert r"| parity | y ::error::mine ::add-mask::x \|\<b\>\*a\*\</b\>\` | 0.0e+00 relative difference |" in summary
    assert "::error::mine" in done.stdout  # while commands are stopped
    assert obeyed(done.stdout) == []
    names = ["annotations", "benchmark.json", "errors", "junit.xml", "summary.md", "verdict.json"]
    assert sorted(path.name for path in Path(outputs["folder"]).iterdir()) == names
    assert json.loads((Path(outputs["folder"]) / "verdict.json").read_text())["recorded_on"] is None


def test_a_name_with_line_breaks_stays_one_annotation():
    finding = Finding(name="parity", baseline=HOSTILE, measured="a, b: 5%", limit="0", holds=False)
    place = Machine(processor="p", cores=2, system="s", onnxruntime="1")
    numbers = {"slowdown": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0, "p50_ms": 1.0, "baseline_p50_ms": 1.0}
    verdict = Verdict(model="m:1,\n2.onnx", timing=TimeChange(**numbers), findings=(finding, finding), machine=place)
    line = (
        "::error title=parity of m%3A1%2C%0A2.onnx::measured a, b: 5%25, "
        "baseline y%0A::error::mine%0A::add-mask::x%0A|<b>*a*</b>`, limit 0"
    )
    assert workflow_commands(verdict) == f"{line}\n{line}\n"
    assert sum(line.startswith("| parity |") for line in markdown(verdict).splitlines()) == 2


def test_a_baseline_is_recorded_and_a_larger_and_wrong_model_fails_against_it(gate, small_path, wrong_path, tmp_path):
    (tmp_path / "baseline").mkdir()
    model = shutil.copy(small_path, tmp_path / "baseline" / "model.onnx")
    done, outputs, summary = gate(
        mode="record", model=model, baseline="baseline/baseline.json", batch=2, shape="\nx=2,16,8,8\n"
    )
    assert done.returncode == 0, done.stderr
    assert "holds" not in outputs
    assert summary == ""
    recorded = json.loads((tmp_path / "baseline" / "baseline.json").read_text())
    assert (recorded["batch"], recorded["shapes"]) == (2, {"x": [2, 16, 8, 8]})
    larger = onnx.load(wrong_path)
    larger.graph.node[-1].output[0] = "before"
    larger.graph.node.append(helper.make_node("Identity", ["before"], ["y"]))
    onnx.save(larger, tmp_path / "larger.onnx")
    done, outputs, summary = gate(model="larger.onnx", baseline="baseline/baseline.json")
    assert (done.returncode, outputs["holds"]) == (1, "false")
    assert "### ❌ larger.onnx: regression" in summary
    assert "| nodes | 5 | 6 | +0.0% | **NO** |" in summary
    assert re.search(r"\| parity \| y \| .* relative difference \| 0\.001 relative \| \*\*NO\*\* \|", summary)
    assert "interleaved with the baseline's model" in summary
    nodes, parity, *_ = obeyed(done.stdout)
    assert nodes == "::error title=nodes of larger.onnx::measured 6, baseline 5, limit +0.0%25"
    assert parity.startswith("::error title=parity of larger.onnx::measured ")
    Path(model).unlink()  # its baseline alone is left: times of another day
    inputs = {"model": "larger.onnx", "baseline": "baseline/baseline.json"}
    done, outputs, summary = gate(**inputs, retrained="true", on_regression="warn")
    assert (done.returncode, outputs["holds"]) == (0, "false")
    assert "against recorded times" in summary
    assert "parity" not in summary
    nodes, latency, *_ = obeyed(done.stdout)  # a warning follows where times are uncertain
    assert nodes == "::warning title=nodes of larger.onnx::measured 6, baseline 5, limit +0.0%25"
    assert latency.startswith("::warning title=latency of larger.onnx::compared with recorded times")


def test_the_first_model_has_no_baseline(gate, small_path):
    done, outputs, summary = gate(model=small_path, baseline="base/none.onnx")
    assert done.returncode == 2
    assert "holds" not in outputs
    (error,) = obeyed(done.stdout)
    assert "none.onnx" in error
    done, outputs, summary = gate(model=small_path, baseline="base/none.onnx", missing_baseline="pass")
    assert (done.returncode, summary) == (0, "")
    assert "holds" not in outputs
    assert obeyed(done.stdout)[0].startswith("::notice title=tensorrail regress::no baseline at base/none.onnx yet: ")
    assert obeyed(done.stdout)[0].endswith("dense.onnx was not compared")


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"mode": "guess"}, "input mode: expected one of check record, got 'guess'"),
        ({"on-regression": "$(touch pwned)"}, "input on-regression: expected one of fail warn"),
        ({"retrained": "yes"}, "input retrained: expected one of false true"),
        ({"max-slowdown": "fast"}, "--max-slowdown: expected a share such as 5%25 or 0.05, got 'fast'"),
        ({"provider": "tpu; touch pwned"}, "unknown provider"),
        ({"model": "none`touch pwned`.onnx"}, "cannot be read|not an ONNX model|cannot load"),
        ({"model": "--help"}, "--help"),
    ],
)
def test_bad_inputs_are_one_annotation_and_no_command(inputs, reason, gate, small_path, tmp_path):
    done, _, _ = gate(**{"model": small_path, "baseline": small_path} | {k.replace("-", "_"): v for k, v in inputs.items()})
    assert done.returncode == 2, done.stdout + done.stderr
    (error,) = obeyed(done.stdout)
    assert error.startswith("::error title=tensorrail regress::")
    assert re.search(reason, error)
    assert not (tmp_path / "pwned").exists()


def source(folder):
    """Copy what a wheel is built of: building writes beside its sources."""
    for name in ("trainer", "exporter", "runtime", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "action.yml"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.mark.parametrize(
    ("hook", "limits"),
    [
        ("tensorrail-check", ["--batch", "1"]),
        pytest.param(
            "tensorrail-regress",
            ["--processes", "2", "--seconds", "0.05", "--max-slowdown", "900%"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_hooks_hold_the_changed_model_against_the_one_in_args(hook, limits, small_path, wrong_path):
    assert re.search(HOOKS[hook]["files"], wrong_path.name)
    program, *command = HOOKS[hook]["entry"].split()
    assert program == "tensorrail"
    arguments = [*command, str(small_path), *limits, str(wrong_path)]
    done = subprocess.run([sys.executable, "-m", "tensorrail", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "wrong.onnx" in done.stdout
