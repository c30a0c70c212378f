import json
import operator
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import make_model
from onnx import helper, numpy_helper
from typer.testing import CliRunner

import tensorrail.cli
from tensorrail_exporter import LayerPlan, Plan
from tensorrail_exporter.search import fastest_form

ROOT = Path(__file__).parents[2]
PLAN = Plan(layers=(LayerPlan(name="conv", format="tt", modes=(32, 9, 16), ranks=(1, 6, 6, 1)),))
FP16 = 5e-3  # relative L2: eleven bits a value, a few layers


@pytest.fixture
def plan_path(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


@pytest.mark.parametrize("command", ["run", "train", "export", "check", "accuracy", "bench", "inspect"])
def test_every_command_has_help_and_json(command):
    result = CliRunner().invoke(tensorrail.cli.app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0
    assert "json" in result.output


def test_export_check_inspect_and_bench_work_on_files(cli, small_path, plan_path, tmp_path):
    out = tmp_path / "model.onnx"
    assert cli("export", small_path, "--plan", plan_path, "-o", out, "--json", tmp_path / "e.json")[0] == 0
    written = json.loads((tmp_path / "e.json").read_text())
    record = written["layers"][0]
    assert (record["layer"], record["merged"]) == ("conv", [[2], [1], [0]])
    assert (written["fusions"]["unknown"], written["fusions"]["before"]) == ("", {"Conv + Relu": 1})
    assert cli("check", small_path, small_path)[0] == 0
    code, printed, _ = cli("check", small_path, out, "--json", tmp_path / "c.json")
    assert code == 1
    assert "OUT OF tolerance" in printed
    assert "fused operators of ONNX Runtime: all 1 are still there" in " ".join(printed.split())
    worst = json.loads((tmp_path / "c.json").read_text())["outputs"][0]["relative_l2"]
    assert cli("check", small_path, out, "--tolerance", 1.01 * worst)[0] == 0
    assert cli("inspect", out, "--json", tmp_path / "i.json")[0] == 0
    assert len(json.loads((tmp_path / "i.json").read_text())["layers"]) == 4
    code, printed, _ = cli("inspect", out, "--fusion")
    assert (code, "Conv + Relu" in printed) == (0, True)
    code, _, message = cli("inspect", out, "--fusion", "--placement")
    assert (code, "placement and fusion are two reports" in message) == (2, True)
    code, printed, _ = cli("bench", small_path, out, "--duration", 0.2, "--json", tmp_path / "b.json")
    assert code == 0
    assert "speed-up" in printed
    assert json.loads((tmp_path / "b.json").read_text())["rounds"] >= 20
    code, printed, _ = cli("bench", small_path, out, "--duration", 0.2, "--processes", 2, "--json", tmp_path / "b.json")
    assert code == 0
    assert "in 2 fresh processes" in " ".join(printed.split())
    assert json.loads((tmp_path / "b.json").read_text())["processes"] == 2


def test_a_speed_up_that_is_asked_for_is_measured_in_fresh_processes(cli, in_this_process, small_path, tmp_path):
    """In one process the reference is always loaded first, and gets the better place in memory."""
    asked = ("bench", small_path, small_path, "--duration", 0.2, "--min-speedup", 100, "--json", tmp_path / "b.json")
    for more, processes in (((), 6), (("--processes", 2), 2), (("--processes", 0), 0)):
        code, printed, _ = cli(*asked, *more)
        assert (code, "expected at least 100.0×" in printed) == (1, True)
        assert json.loads((tmp_path / "b.json").read_text())["processes"] == processes


def test_a_plan_in_fp16_is_exported_checked_and_inspected(cli, small_path, tmp_path):
    plan, out = tmp_path / "plan.json", tmp_path / "half.onnx"
    PLAN.model_copy(update={"precision": "fp16"}).save(plan)
    assert json.loads(plan.read_text())["precision"] == "fp16"
    code, told, _ = cli("export", small_path, "--plan", plan, "-o", out)
    assert code == 0
    assert "half.onnx is in fp16 as the plan says; overflow was looked for with random inputs" in " ".join(told.split())
    graph = onnx.load(out).graph
    assert {tensor.data_type for tensor in graph.initializer} == {onnx.TensorProto.FLOAT16}
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    code, printed, _ = cli(
        "check", small_path, out, "--layers", "--plan", plan, "--json", tmp_path / "c.json", "--tolerance", 1
    )
    assert (code, "conv" in printed) == (0, True)
    (layer,) = json.loads((tmp_path / "c.json").read_text())["layers"]
    assert 0 < layer["numerical"] < FP16 < layer["approximation"]
    code, printed, _ = cli("inspect", out)
    assert code == 0
    assert cli("inspect", out, "--placement")[0] == 0
    PLAN.model_copy(update={"precision": "fp16", "fp32": ("conv",)}).save(plan)
    code, told, _ = cli("export", small_path, "--plan", plan, "-o", out)
    assert (code, "as the plan says, but for conv;" in " ".join(told.split())) == (0, True)
    types = {tensor.name: tensor.data_type for tensor in onnx.load(out).graph.initializer}
    assert types["conv/0"] == onnx.TensorProto.FLOAT
    assert onnx.TensorProto.FLOAT16 in types.values()
    PLAN.model_copy(update={"precision": "fp16", "fp32": ("nobody",)}).save(plan)
    code, _, told = cli("export", small_path, "--plan", plan, "-o", tmp_path / "none.onnx")
    assert (code, "fp32 of the plan: layer nobody: " in told) == (2, True)
    assert not (tmp_path / "none.onnx").exists()
    Plan(layers=(), precision="fp16").save(plan)  # as `compress` finds it where the dense network in fp16 is best
    assert cli("export", small_path, "--plan", plan, "-o", tmp_path / "all.onnx")[0] == 0
    kinds = {tensor.data_type for tensor in onnx.load(tmp_path / "all.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT not in kinds


def test_export_gives_slower_layers_the_dense_weight_of_their_cores(cli, small_path, tmp_path, monkeypatch):
    fc = LayerPlan(name="fc", format="svd", modes=(10, 32), ranks=(3,))
    plan, out, asked = tmp_path / "two.json", tmp_path / "model.onnx", []
    Plan(layers=(*PLAN.layers, fc)).save(plan)

    def fastest_blocks(model, plan, form, **_):
        asked.append(form)
        return {"conv": 4, "fc": 0}

    monkeypatch.setattr(fastest_form, "fastest_blocks", fastest_blocks)
    export = ("export", small_path, "--plan", plan, "-o", out)
    code, printed, _ = cli(*export, "--dense-if-slower", "--batch", 3, "--json", tmp_path / "e.json")
    assert code == 0
    assert asked == [fastest_form.Form(block=1, dense_if_slower=True, batch=3)]
    assert "dense weight, faster here" in " ".join(printed.split())
    assert [layer["layer"] for layer in json.loads((tmp_path / "e.json").read_text())["layers"]] == ["conv"]
    assert cli(*export[:4], "-o", tmp_path / "all.onnx")[0] == 0
    assert cli("check", tmp_path / "all.onnx", out, "--tolerance", 1e-5)[0] == 0
    gemm = next(node for node in onnx.load(out).graph.node if node.op_type == "Gemm")
    assert any(t.name == gemm.input[1] and list(t.dims) == [10, 32] for t in onnx.load(out).graph.initializer)
    out.unlink()
    monkeypatch.setattr(fastest_form, "fastest_blocks", lambda *_, **__: {"conv": 0, "fc": 0})
    code, _, errors = cli(*export, "--dense-if-slower")
    assert code == 2
    assert "every planned layer is faster in dense form here, at batch 1" in errors
    assert not out.exists()


def test_check_apart_by_layer(cli, small_path, plan_path, tmp_path):
    out = tmp_path / "out.onnx"
    assert cli("export", small_path, "--plan", plan_path, "-o", out)[0] == 0
    code, printed, _ = cli("check", small_path, out, "--layers", "--plan", plan_path, "--tolerance", 9)
    assert code == 0
    assert "no layer has a larger numerical error than 9" in printed
    assert "approximation" in printed
    assert cli("check", small_path, out, "--rtol", 1e-6)[0] == 1
    assert cli("check", small_path, out, "--atol", "y=1e9", "--shape", "x=2,16,8,8")[0] == 0


def test_accuracy_inspect_and_bench_options(cli, small_path, tmp_path, rng):
    data = tmp_path / "x.npz"
    np.savez(data, x=rng.standard_normal((20, 16, 8, 8)).astype(np.float32), labels=np.zeros(20, np.int64))
    code, printed, _ = cli("accuracy", small_path, small_path, "--data", data, "--json", tmp_path / "a.json", "--max-drop", 0)
    assert code == 0
    assert "McNemar" in printed
    assert json.loads((tmp_path / "a.json").read_text())["p_value"] == 1
    code, printed, _ = cli("inspect", small_path, "--placement")
    assert code == 0
    assert "on CPU" in printed
    code, printed, _ = cli("bench", small_path, "--duration", 0.1, "--io-binding", "--memory", "--shape", "x=2,16,8,8")
    assert code == 0
    assert "peak host (MiB)" in printed
    assert re.search(r"on the device .* with transfers ", " ".join(printed.split()))


def test_a_drop_of_just_the_limit_holds(cli, tmp_path):
    """99 and 98 of 100 samples are right; the second model moves one score up, past that of one sample."""
    x, labels = np.eye(4, dtype=np.float32)[np.arange(100) % 4], np.arange(100) % 4
    x[0] = np.roll(x[0], 1)
    x[1] += np.array([0, 0, 0.9, 0], np.float32)
    np.savez(tmp_path / "x.npz", x=x, labels=labels)
    for name, more in (("a", 0.0), ("b", 0.2)):
        nodes = [helper.make_node("Add", ["x", "bias"], ["y"], "add")]
        bias = {"bias": np.array([0, 0, more, 0], np.float32)}
        onnx.save(make_model(nodes, bias, {"x": ["n", 4]}, {"y": ["n", 4]}), tmp_path / f"{name}.onnx")
    words = ("accuracy", tmp_path / "a.onnx", tmp_path / "b.onnx", "--data", tmp_path / "x.npz", "--json", tmp_path / "r.json")
    assert cli(*words, "--max-drop", 0.01)[0] == 0
    assert json.loads((tmp_path / "r.json").read_text())["difference"] == pytest.approx(-0.01)
    code, printed, _ = cli(*words, "--max-drop", 0.009)
    assert (code, "lower by more than 0.009" in printed) == (1, True)


def test_regress_against_another_interpreter(cli, small_path, tmp_path):
    quick = ("--processes", 2, "--seconds", 0.05, "--max-slowdown", "900%")
    np.savez(tmp_path / "x.npz", x=np.ones((1, 16, 8, 8), np.float32))  # without labels: nothing is scored
    inputs = ("--data", tmp_path / "x.npz")
    code, printed, _ = cli("regress", "check", small_path, "--against-python", sys.executable, *inputs, *quick)
    assert (code, "no regression" in printed) == (0, True)
    cases = [
        ((small_path,), "give MODEL.onnx, or --against-python PYTHON"),
        (("base.json", small_path, "--against-python", sys.executable), "expected a model (.onnx)"),
        ((small_path, "--against-python", sys.executable, "--metric", "top1"), "scores nothing"),
        ((small_path, small_path, "--max-drop", 0.005), "--max-drop limits the accuracy on labelled data"),
    ]
    for arguments, reason in cases:
        code, _, err = cli("regress", "check", *arguments)
        assert (code, reason in err) == (2, True), err


def test_regress_keeps_a_history(cli, in_this_process, small_path, tmp_path, monkeypatch):
    kept, picture, baseline = tmp_path / "times.jsonl", tmp_path / "times.svg", tmp_path / "base.json"
    record = ("regress", "record", small_path, "--processes", 2, "--seconds", 0.05, "-o")
    monkeypatch.chdir(tmp_path.parent)
    for commit in ("one", "two"):
        assert cli(*record, baseline, "--history", kept, "--commit", commit)[0] == 0
    assert {json.loads(line)["model"] for line in kept.read_text().splitlines()} == {f"{tmp_path.name}/{small_path.name}"}
    assert cli("regress", "history", kept, "-o", picture, "--json", picture)[0] == 2
    code, printed, _ = cli("regress", "history", kept, "-o", picture)
    assert (code, small_path.name in printed) == (0, True)
    assert picture.read_text().startswith("<?xml")
    before = kept.read_text()
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    code, _, err = cli("regress", "history", kept, "-o", picture)
    assert (code, err) == (
        2,
        "tensorrail: this command needs matplotlib: install the extra `history`, as in pip install '.[history]'\n",
    )
    cases = [
        ((*record, baseline, "--history", baseline), "would be lost"),
        ((*record, tmp_path / "other.json", "--history", baseline), "not a history"),
        ((*record, baseline, "--commit", "a"), "give --history FILE.jsonl as well"),
        (("regress", "history", kept, "-o", kept), "would be lost"),
        (("regress", "history", kept, "--json", kept), "would be lost"),
        (("regress", "history", tmp_path / "nowhere.jsonl"), "cannot be read"),
    ]
    for arguments, reason in cases:
        code, _, err = cli(*arguments)
        assert (code, reason in err) == (2, True), err
    assert kept.read_text() == before


def test_regress_records_checks_and_says_why(cli, in_this_process, small_path, tmp_path):
    baseline, junit, flat = tmp_path / "b.json", tmp_path / "j.xml", tmp_path / "f.json"
    quick = ("--processes", 2, "--seconds", 0.05)
    assert cli("regress", "record", small_path, "-o", baseline, *quick)[0] == 0
    arguments = ("regress", "check", baseline, small_path, "--max-slowdown", "900%", *quick, "--junit", junit)
    code, printed, _ = cli(*arguments, "--benchmark-json", flat)
    assert code == 0
    assert "no regression" in printed
    assert junit.read_text().startswith("<?xml")
    assert json.loads(flat.read_text())[0]["unit"] == "ms"
    larger = onnx.load(small_path)
    larger.graph.node[-1].output[0] = "before"
    larger.graph.node.append(helper.make_node("Identity", ["before"], ["y"]))
    onnx.save(larger, tmp_path / "larger.onnx")
    code, printed, _ = cli("regress", "check", baseline, tmp_path / "larger.onnx", "--max-slowdown", "900%", *quick)
    assert code == 1
    assert "larger.onnx: nodes 6 (baseline 5" in printed
    for tensor in larger.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32("nan"), tensor.name))
    onnx.save(larger, tmp_path / "nan.onnx")
    record = tmp_path / "v.json"
    code, printed, _ = cli("regress", "check", baseline, tmp_path / "nan.onnx", *quick, "--junit", junit, "--json", record)
    assert code == 1
    assert "nan.onnx: run weight 'conv.weight' holds NaN at [0, 0, 0, 0]" in printed
    assert 'failures="1"' in junit.read_text()
    assert [finding["name"] for finding in json.loads(record.read_text())["findings"]] == ["run"]


def test_bad_input_is_one_line_and_exit_code_2(cli, in_this_process, small_path, plan_path, tmp_path):
    out = tmp_path / "out.onnx"
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"garbage")
    other = tmp_path / "other.json"
    PLAN.model_copy(update={"layers": (PLAN.layers[0].model_copy(update={"name": "nowhere"}),)}).save(other)
    cores = tmp_path / "c.safetensors"
    cores.write_bytes(b"\x00" * 4)
    truncated = tmp_path / "truncated.onnx"
    truncated.write_bytes(small_path.read_bytes()[:-100])
    data, baseline = tmp_path / "data.npz", tmp_path / "baseline.json"
    np.savez(data, x=np.zeros((4, 16, 8, 8), np.float32), labels=np.zeros(4, np.int64))
    quick = ("--processes", 2, "--seconds", 0.05)
    assert cli("regress", "record", small_path, "-o", baseline, "--threads", 1, "--batch", 3, *quick)[0] == 0
    computed = tmp_path / "computed.onnx"
    nodes = [helper.make_node("Relu", ["w"], ["v"]), helper.make_node("Conv", ["x", "v"], ["y"], "conv")]
    onnx.save(make_model(nodes, {}, {"x": ["n", 16, 8, 8], "w": [32, 16, 3, 3]}, {"y": ["n", 32, 6, 6]}), computed)

    def changed(key, value):
        path = tmp_path / f"{key}-{value}.json"
        content = json.loads(plan_path.read_text())
        content["layers"][0][key] = value
        path.write_text(json.dumps(content))
        return path

    cases = [
        (("run", tmp_path / "none.yaml"), "expected a YAML recipe"),
        (("train", plan_path), "unknown key|required but missing"),
        (("export", garbage, "--plan", plan_path, "-o", out), "garbage.onnx: not an ONNX model"),
        (("export", small_path, "--plan", small_path, "-o", out), "dense.onnx: "),
        (("export", small_path, "--plan", other, "-o", out), "layer nowhere: not in the graph"),
        (("export", small_path, "--plan", plan_path, "--cores", cores, "-o", out), "not a readable safetensors file"),
        (
            ("export", small_path, "--plan", plan_path, "-o", tmp_path / "no" / "out.onnx"),
            "does not exist; expected the name of a file",
        ),
        (("export", truncated, "--plan", plan_path, "-o", out), "truncated.onnx: not an ONNX model"),
        (("export", small_path, "--plan", changed("modes", (5, 9, 16)), "-o", out), "layer conv: modes [5, 9, 16] do not fit"),
        (("export", small_path, "--plan", changed("ranks", (1, 4, 1)), "-o", out), "layer conv: expected 4 ranks"),
        (("export", small_path, "--plan", changed("ranks", (1, 0, 4, 1)), "-o", out), "1 or larger"),
        (
            ("export", small_path, "--plan", changed("format", "ttm"), "-o", out),
            "layer conv: format ttm expects a matrix, got a weight",
        ),
        (("export", small_path, "--plan", changed("merge", "all"), "-o", out), "unknown merge 'all'"),
        (("export", computed, "--plan", plan_path, "-o", out), "layer conv: cannot be rewritten: its weight"),
        (("export", small_path, "--plan", plan_path, "--block", 0, "-o", out), "--block: expected a number of 1 or more"),
        (("check", small_path, garbage), "ONNX Runtime cannot load it"),
        (("bench", small_path, "--provider", "tpu"), "unknown provider 'tpu'"),
        (("inspect", garbage), "not an ONNX model"),
        (("inspect", small_path, "--shape", "z=1"), "unknown input 'z'"),
        (("check", small_path, small_path, "--atol", "z=1"), "unknown output 'z'"),
        (("check", small_path, small_path, "--rtol", "x"), "--rtol: expected a number such as 1e-4"),
        (("check", small_path, small_path, "--rtol", "nan"), "expected a tolerance of 0 or more, got nan"),
        (("check", small_path, small_path, "--atol", "-1"), "expected a tolerance of 0 or more, got -1.0"),
        (("bench", small_path, "--json", small_path), "expected the name of a JSON file"),
        (("bench", small_path, "--shape", f"x={'9' * 5000},16,8,8"), "expected a shape such as name=1,3,224,224"),
        (("regress", "record", small_path, "-o", small_path), "is also read, and would be lost"),
        (("export", small_path, "--plan", plan_path, "-o", small_path), "is also read, and would be lost"),
        (("export", small_path, "--plan", plan_path, "-o", plan_path), "is also read, and would be lost"),
        (("compress", small_path, "-o", small_path, "--target", "flops=2"), "is also read, and would be lost"),
        (
            ("compress", small_path, "-o", tmp_path / "no" / "o.onnx", "--target", "flops=2"),
            "does not exist; expected the name of a file",
        ),
        (("bench", small_path, "--json", tmp_path), "is a folder; expected the name of a file"),
        (
            ("plan", small_path, "--target", "latency=2", "-o", tmp_path / "no" / "p.json"),
            "does not exist; expected the name of a file",
        ),
        (("plan", small_path, "--target", "latency=2", "--target", "latency=1.1"), "latency is given twice"),
        (("check", small_path, small_path, "--layers"), "give --plan"),
        (("accuracy", small_path, "--data", garbage), "not an npz file"),
        (
            ("accuracy", small_path, "--data", data, "--max-drop", 0),
            "--max-drop compares B's score with A's: expected a second model",
        ),
        (("bench", small_path, "--min-speedup", 2), "--min-speedup compares other models with the first"),
        (("bench", small_path, "--shape", "x=1,16,8,8", "--shape", "x=2,16,8,8"), "shape of input 'x': given twice"),
        (("check", small_path, small_path, "--rtol", "1e-5", "--rtol", "1"), "--rtol: given twice for all outputs"),
        (("check", small_path, small_path, "--plan", plan_path), "--plan has no effect without --layers"),
        (("check", small_path, small_path, "--cores", cores), "--cores has no effect without --layers"),
        (("check", small_path, small_path, "--data", data, "--shape", "x=2,16,8,8"), "--shape is for random inputs"),
        (("check", small_path, small_path, "--data", data, "--batch", 1, "--batch", 2), "--data runs at one batch size"),
        (
            ("check", small_path, small_path, "--shape", "x=2,16,8,8", "--batch", 1, "--batch", 2),
            "--shape runs at one batch size",
        ),
        (("inspect", small_path, "--provider", "cuda"), "--provider has no effect without --placement"),
        (
            ("regress", "record", small_path, "-o", out, "--metric", "top5"),
            "metric 'top5' scores labelled data, got no data: give data",
        ),
        (
            ("regress", "check", small_path, small_path, "--metric", "top5"),
            "metric 'top5' scores labelled data, got no data: give data",
        ),
        (("regress", "check", small_path, small_path, "--retrained", "--tolerance", 1), "--retrained compares no outputs"),
        (("regress", "check", small_path, small_path, "--max-drop", 0), "--max-drop limits the accuracy on labelled data"),
        (("regress", "check", baseline, small_path, "--provider", "cuda"), "with provider cpu, got provider cuda"),
        (("regress", "check", baseline, small_path, "--threads", 2), "with threads 1, got threads 2"),
        (("regress", "check", baseline, small_path, "--batch", 2), "with batch 3, got batch 2"),
        (("regress", "check", baseline, small_path, "--data", data, "--max-drop", 0), "contains no score"),
        (("regress", "check", cores, small_path), "not a baseline"),
        (("regress", "check", baseline, small_path, "--shape", "x=3,16,8,8"), "recorded with shapes none, got x=3,16,8,8"),
        (("inspect", small_path, "--shape", "x=²,16,8,8"), "expected a shape such as name=1,3,224,224"),
        (("bench", small_path, "--threads", 99_999_999_999), "threads, got 99999999999"),
        (("accuracy", small_path, "--data", data, "--metric", ":f"), "unknown metric ':f'"),
        (("regress", "check", small_path, small_path, "--max-slowdown", "fast"), "expected a share such as 5% or 0.05"),
        (("regress", "check", small_path, small_path, "--max-slowdown", "5"), "expected a share such as 5% or 0.05, got '5'"),
    ]
    for arguments, reason in cases:
        code, _, err = cli(*arguments)
        assert code == 2, arguments
        assert err.count("\n") == 1, err
        assert any(part in err for part in reason.split("|")), err
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["regress", "check", "A", "A", "--data", "D", "--max-drop", "nan"], "--max-drop"),
        (["regress", "check", "A", "A", "--tolerance", "inf"], "--tolerance: expected a finite number, got inf"),
        (["regress", "check", "A", "A", "--data", "D", "--max-drop", "-1"], "--max-drop"),
        (
            ["regress", "check", "A", "A", "--max-slowdown", "nan"],
            "--max-slowdown: expected a share such as 5% or 0.05, got 'nan'",
        ),
        (["check", "A", "A", "--tolerance", "nan"], "tolerance"),
        (["bench", "A", "--duration", "nan"], "--duration"),
        (["compress", "A", "-o", "B", "--target", "latency=nan"], "--target: expected NAME=NUMBER, .* got 'latency=nan'"),
        (
            ["plan", "A", "-o", "B", "--target", "latency=2", "--max-loss", "nan"],
            "--max-loss: expected a finite number, got nan",
        ),
    ],
)
def test_limits_that_are_no_numbers_are_refused(cli, small_path, tmp_path, words, said):
    names = {"A": small_path, "B": tmp_path / "b.onnx", "D": tmp_path / "none.npz"}
    code, _, error = cli(*(names.get(word, word) for word in words))
    assert code == 2
    assert re.search(said, error)
    assert error.count("\n") == 1


def test_the_model_that_refuses_a_batch_is_named(cli, rng, tmp_path):
    for name, batch in (("free", "n"), ("fixed", 4)):
        node = helper.make_node("Identity", ["x"], ["y"])
        onnx.save(make_model([node], {}, {"x": [batch, 3]}, {"y": [batch, 3]}), tmp_path / f"{name}.onnx")
    x = rng.standard_normal((6, 3)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x, labels=x.argmax(1))
    free, fixed, data = tmp_path / "free.onnx", tmp_path / "fixed.onnx", tmp_path / "d.npz"
    code, _, error = cli("accuracy", free, fixed, "--data", data)
    assert (code, error) == (
        2,
        f"tensorrail: {fixed}: inputs: the model takes batches of 4, got 6 samples: give a multiple of 4\n",
    )
    code, _, error = cli("check", free, fixed, "--batch", 3)
    assert code == 2
    assert f"{fixed}: ONNX Runtime cannot run the model on these inputs" in error


def test_external_data_may_not_leave_the_models_folder(cli, plan_path, tmp_path, rng):
    node = helper.make_node("Relu", ["x"], ["y"])
    model = make_model([node], {"conv.weight": rng.standard_normal((4, 4)).astype("float32")}, {"x": [1]}, {"y": [1]})
    (tmp_path / "secret").write_bytes(b"\x00" * 64)
    (tmp_path / "in").mkdir()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../secret"
    (tmp_path / "in" / "m.onnx").write_bytes(model.SerializeToString())
    code, _, err = cli("export", tmp_path / "in" / "m.onnx", "--plan", plan_path, "-o", tmp_path / "out.onnx")
    assert code == 2
    assert err.count("\n") == 1
    assert not (tmp_path / "out.onnx").exists()


def test_names_of_a_file_are_shown_as_they_are_and_steer_nothing(cli, tmp_path):
    weights = {"[/w]": np.ones((4, 4), np.float32)}
    node = helper.make_node("MatMul", ["x", "[/w]"], ["logits[/a]\x1b[2J"], "n")
    onnx.save(make_model([node], weights, {"x": ["n", 4]}, {"logits[/a]\x1b[2J": ["n", 4]}), tmp_path / "m[red].onnx")
    code, printed, _ = cli("inspect", tmp_path / "m[red].onnx")
    assert code == 0
    assert "[/w]" in printed
    assert "m[red].onnx" in printed.replace("\n", "")
    code, printed, _ = cli("check", tmp_path / "m[red].onnx", tmp_path / "m[red].onnx")
    assert code == 0
    assert "logits[/a]" in printed
    assert "\x1b" not in printed


def test_a_fault_of_its_own_is_not_taken_for_a_measurement(cli, small_path, monkeypatch):
    monkeypatch.setattr("tensorrail_runtime.sessions.inputs.parse_shapes", operator.index)
    code, _, said = cli("inspect", small_path)
    assert code == 3
    assert "TypeError: 'list' object cannot be interpreted as an integer" in said
    assert said.strip().splitlines()[-1].startswith("tensorrail: internal error")


@pytest.mark.parametrize("error", [RuntimeError("no such row"), SystemExit(0)])
def test_what_code_of_the_user_raises_is_one_line_with_its_place(cli, small_path, monkeypatch, error):
    def own(*_, **__):
        raise error

    monkeypatch.setattr("tensorrail_runtime.sessions.inputs.parse_shapes", own)
    code, _, said = cli("inspect", small_path)
    assert code == 2
    what = "failed (RuntimeError: no such row)" if isinstance(error, RuntimeError) else "ended the program with exit code 0"
    assert re.fullmatch(rf"tensorrail: \S+test_cli\.py, line \d+, in own: {re.escape(what)}\n", said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("export",), "Missing argument 'DENSE.onnx'; see `tensorrail export --help`"),
        (("bench", "a.onnx", "--batch", "x"), "Invalid value for '--batch': .+; see `tensorrail bench --help`"),
        (("regress", "check", "--nope"), "No such option: --nope.*; see `tensorrail regress check --help`"),
        (("frobnicate",), "No such command 'frobnicate'.*; see `tensorrail --help`"),
    ],
)
def test_a_command_that_cannot_be_read_is_one_line_as_well(cli, words, said):
    code, printed, err = cli(*words)
    assert (code, printed) == (2, "")
    assert re.fullmatch(rf"tensorrail: {said}\n", err), err


def test_without_a_command_the_help_is_shown(cli):
    for words in ((), ("regress",)):
        code, printed, err = cli(*words)
        assert code == 2
        assert "check" in printed + err


def test_the_version_names_what_a_report_needs(cli):
    code, printed, _ = cli("--version")
    assert code == 0
    assert re.fullmatch(r"tensorrail \d+\.\d+\.\d+, onnxruntime(-gpu)? 1\.\S+, onnx 1\.\S+, torch 2\.\S+\n", printed)


def test_help_imports_neither_torch_nor_onnxruntime():
    code = "import sys, tensorrail.cli; print([m for m in ('torch', 'onnxruntime', 'onnx') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ctrl_c_says_how_to_go_on_and_ends_with_130(cli, monkeypatch, tmp_path):
    import tensorrail_trainer.run.pipeline

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tensorrail_trainer.run.pipeline, "run", interrupted)
    code, _, err = cli("run", ROOT / "recipes" / "digits.yaml", "--folder", tmp_path / "run")
    assert code == 130
    assert err.count("\n") == 1
    assert "--resume" in err


@pytest.mark.parametrize(("command", "resumes"), [("train", True), ("plan", False), ("compress", False)])
def test_only_commands_that_train_can_go_on(monkeypatch, command, resumes):
    monkeypatch.setattr(sys, "argv", ["tensorrail", command, "model.onnx"])
    assert (f"tensorrail {command} … --resume" in tensorrail.cli._interrupted()) is resumes


@pytest.mark.parametrize("command", ["bench", "plan", "compress"])
@pytest.mark.parametrize("option", ["--tf32", "--nhwc", "--cuda-graph"])
def test_options_of_a_gpu_are_refused_on_a_cpu(cli, small_path, tmp_path, command, option):
    more = {"bench": ["--io-binding"], "plan": ["--target", "latency=2"], "compress": ["--target", "latency=2", "-o", "x.onnx"]}
    code, _, err = cli(command, small_path, option, *more[command])
    assert code == 2
    assert "CUDA graphs, NHWC and TF32 need the CUDA provider: use provider 'cuda'" in " ".join(err.split())


def test_memory_is_taken_at_the_shape_given(cli, tmp_path, rng):
    path, weights = tmp_path / "m.onnx", {"w": rng.standard_normal((4, 3, 3, 3)).astype(np.float32)}
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    onnx.save(make_model([node], weights, {"x": ["n", 3, "h", "v"]}, {"y": ["n", 4, "p", "q"]}), path)
    code, printed, _ = cli("bench", path, "--duration", 0.1, "--memory", "--shape", "x=1,3,8,8")
    assert code == 0
    assert "peak host (MiB)" in printed


def test_models_that_do_not_do_the_same_work_pass_no_speed_up(cli, in_this_process, small_model, small_path, tmp_path):
    """A run of the one has 32 samples, a run of the other has one: their times say nothing of a speed-up."""
    small_model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 32
    fixed = tmp_path / "fixed.onnx"
    onnx.save(small_model, fixed)
    asked = ("bench", fixed, small_path, "--duration", 0.1, "--processes", 0)
    code, printed, message = cli(*asked, "--min-speedup", 1.1, "--json", tmp_path / "b.json")
    assert code == 2
    assert "speed-up" in printed
    assert "--min-speedup: nothing to compare: the models process different numbers of samples in a run (" in message
    assert "fixed.onnx 32" in message
    assert not (tmp_path / "b.json").exists()
    assert cli(*asked)[0] == 0
    assert cli(*asked, "--batch", 32, "--min-speedup", 0.01)[0] == 0


@pytest.mark.parametrize("option", [("check", "--json"), ("package", "--triton")])
def test_links_that_lead_to_themselves_are_named(option, cli, small_path, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    command, name = option
    models = (small_path, small_path) if command == "check" else (small_path,)
    code, _, message = cli(command, *models, name, loop)
    assert (code, "a link that leads to itself" in message) == (2, True)


def test_a_front_is_not_written_over_the_model(cli, small_path, tmp_path):
    asked = ("compress", small_path, "--target", "latency=1.5", "--front", tmp_path / "f.json")
    for out in ("f.svg", "f.json"):
        code, _, message = cli(*asked, "-o", tmp_path / out)
        assert (code, "--out and --front write the same file" in message) == (2, True)
    code, _, message = cli(*asked, "-o", tmp_path / "o.onnx", "--json", tmp_path / "f.json")
    assert (code, "--front and --json write the same file" in message) == (2, True)
