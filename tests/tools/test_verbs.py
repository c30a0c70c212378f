"""The functions of `import tensorrail`: models in every form, defaults of the commands, and reports that print themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from conftest import make_model
from torch import nn

import tensorrail as tr
from tensorrail import terminal
from tensorrail.commands import arguments, bench, export, package, quantize
from tensorrail_runtime.gate.regress import Limits


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16 * 8 * 8, 10)).eval()


def test_a_model_is_a_file_a_graph_or_a_module_with_inputs(small_path, small_model, module):
    for model in (small_path, str(small_path), small_model):
        assert tr.inspect(model).params == tr.inspect(small_path).params
        assert tr.check(small_path, model).holds
    example = torch.zeros(2, 16, 8, 8)
    assert tr.inspect((module, example)).params == 16 * 8 * 8 * 10 + 10
    assert not tr.check((module, example), (nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)), example)).holds
    with pytest.raises(tr.ModelError, match=r"expected a model as a path, .* got Linear"):
        tr.inspect(nn.Linear(3, 4))


def test_arrays_are_taken_as_files_are(small_path, small_model, rng, tmp_path):
    x = rng.standard_normal((9, 16, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x, labels=np.zeros(9, np.int64))
    np.savez(tmp_path / "inputs.npz", x=x)
    assert tr.check(small_path, small_model, inputs={"x": x}) == tr.check(
        small_path, small_model, inputs=tmp_path / "inputs.npz"
    ).model_copy(update={"candidate": "candidate.onnx"})
    paired = tr.accuracy(small_path, small_model, data={"x": x, "labels": np.zeros(9, np.int64)})
    assert paired.difference == 0.0
    assert tr.accuracy(small_path, data=tmp_path / "x.npz").scores == paired.reference.scores
    with pytest.raises(tr.ModelError, match="expected an array 'labels' beside the inputs, found x"):
        tr.accuracy(small_path, data={"x": x})


def test_a_printed_report_is_what_the_command_prints(small_path, cli):
    code, printed, _ = cli("inspect", small_path)
    assert code == 0
    assert printed.split() == str(tr.inspect(small_path)).split()
    code, printed, _ = cli("check", small_path, small_path)
    assert code == 0
    assert printed.split() == str(tr.check(small_path, small_path)).split()


def test_defaults_of_commands_are_those_of_the_functions():
    assert arguments.session_options() == arguments.provider_option() == tr.Session()
    assert arguments.shape_options() == tr.Timing()
    assert arguments.timing_options() == bench.bench_options() == tr.Timing(seconds=tr.Timing().duration)
    assert arguments.search_options() == tr.Search()
    assert quantize.quantization_options("fp16") == tr.Quantization("fp16")
    assert export.form_options() == tr.Form()
    assert package.repository_options() == tr.Repository(shapes={})
    assert package.serving_options() == tr.Serving()


def test_a_baseline_is_recorded_and_a_model_in_memory_is_checked(small_path, small_model, tmp_path, in_this_process):
    options = tr.Options(timing=tr.Timing(seconds=0.05, processes=2))
    baseline = tr.regress.record(small_path, tmp_path / "baseline.json", options=options)
    assert "p50" in str(baseline)
    wrong = onnx.ModelProto()
    wrong.CopyFrom(small_model)
    bias = next(tensor for tensor in wrong.graph.initializer if tensor.name == "fc.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(10, 100.0, np.float32), "fc.bias"))
    verdict = tr.regress.check(tmp_path / "baseline.json", wrong, limits=Limits(max_slowdown=0.9), options=options)
    assert [finding.name for finding in verdict.findings if not finding.holds] == ["parity"]
    for given, reason in (
        (replace(options, session=tr.Session(threads=2)), "threads"),
        (replace(options, timing=replace(options.timing, batch=3)), "batch"),
    ):
        with pytest.raises(tr.ModelError, match=reason):
            tr.regress.check(tmp_path / "baseline.json", small_model, options=given)


def test_a_plan_in_memory_is_carried_out_without_a_search(small_model, tmp_path, in_this_process):
    plan = tr.Plan(layers=(tr.LayerPlan(name="conv", format="svd", modes=(32, 144), ranks=(8,)),))
    stages = []
    options = tr.Options(timing=tr.Timing(seconds=0.05), progress=lambda stage, share, detail="": stages.append((stage, share)))
    report = tr.compress(small_model, tmp_path / "out.onnx", plan, options=options)
    assert [layer.layer for layer in report.layers] == ["conv"]
    assert report.planning is None
    assert {stage for stage, _ in stages} >= {"comparing outputs", "measuring latency"}
    assert all(0 <= share <= 1 for _, share in stages)
    assert "latency p50 (ms)" in str(report)
    rewrites = tr.export(small_model, tmp_path / "exported.onnx", plan)
    assert "conv" in str(rewrites)
    assert tr.check(tmp_path / "out.onnx", tmp_path / "exported.onnx").holds
    with pytest.raises(tr.PlanError, match="expected a target"):
        tr.compress(small_model, tmp_path / "none.onnx")
    assert not (tmp_path / "none.onnx").exists()


def test_what_is_given_in_the_wrong_form_is_named(small_path, tmp_path):
    out, array = tmp_path / "out.onnx", np.zeros((2, 16, 8, 8), np.float32)
    few = tr.Options(fit=tr.Fit(samples=8))
    for call, reason in (
        (lambda: tr.bench(str(small_path)), "models: expected a list of models"),
        (lambda: tr.compress(small_path, out, {"flops": "two"}), "target flops: expected a reduction factor .*, got 'two'"),
        (
            lambda: tr.compress(small_path, out, {"flops": 2}, calibration=array),
            "calibration: expected a path or arrays by input",
        ),
        (lambda: tr.quantize(small_path, out, "int8", calibration=array), "inputs: expected a path or arrays by input name"),
        (lambda: tr.accuracy(small_path, data=array), "data: expected a path or arrays by input name"),
        (lambda: tr.plan(small_path, {"flops": 2}, options=few), "samples=8 is about calibration inputs and has no effect"),
        (lambda: tr.compress(small_path, out, {"flops": 2}, options=few), "samples=8 is about calibration inputs"),
        (lambda: tr.quantize(small_path, out, "fp16", options=few), "samples=8 is about calibration inputs"),
        (lambda: tr.quantize(small_path, out, tr.Quantization("fp16", gauge=False)), "gauge is a choice for int8 weights"),
        (
            lambda: tr.inspect(small_path, fusion=True, options=tr.Options(timing=tr.Timing(batch=2))),
            "leave out the batch size",
        ),
        (lambda: tr.Timing(batch=0), "batch: expected 1 or more samples, got 0"),
    ):
        with pytest.raises(tr.TensorrailError, match=reason):
            call()
    assert not out.exists()


def test_a_log_has_a_line_for_each_stage_and_one_a_minute(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "_MINUTE", 0.0)
    with terminal.progress_bar() as progress:
        progress("timing layers", 0.0, "Conv 3×3")
        progress("timing layers", 0.5, "Gemm")
        progress("note", 1.0, "something to know")
        progress("comparing outputs", 0.25)
        lines = []
        while not any(line.startswith("comparing outputs, 25 %") for line in lines):  # by the clock, within a second
            lines += capsys.readouterr().out.splitlines()
    assert lines[0] == "timing layers  Conv 3×3"
    assert "something to know" in lines
    assert lines.count("comparing outputs") == 1


def test_open_axes_are_told_of(small_model, tmp_path, in_this_process):
    plan = tr.Plan(layers=(tr.LayerPlan(name="conv", format="svd", modes=(32, 144), ranks=(8,)),))
    for axis in (2, 3):
        small_model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"side{axis}"
    notes = []

    def progress(stage, share, detail=""):
        if stage == "note":
            notes.append(detail)

    for shapes in ({}, {"x": (1, 16, 8, 8)}):
        options = tr.Options(timing=tr.Timing(seconds=0.05, shapes=shapes), progress=progress)
        tr.compress(small_model, tmp_path / "out.onnx", plan, options=options)
    assert len(notes) == 1
    assert notes[0].startswith("warning: input 'x' has 3 dynamic axes, all set to the batch size")


def test_shapes_of_inputs_help_where_onnx_infers_no_number_of_axes(rng, cli, tmp_path):
    """Which axes Squeeze removes is known in a run only."""
    nodes = [
        onnx.helper.make_node("Squeeze", ["x"], ["row"]),
        onnx.helper.make_node("MatMul", ["row", "w"], ["y"], "product"),
    ]
    weights = {"w": rng.standard_normal((10, 6)).astype(np.float32)}
    dense, plan, out = tmp_path / "dense.onnx", tmp_path / "plan.json", tmp_path / "out.onnx"
    tr.save_model(make_model(nodes, weights, {"x": ["n", 1, "m", 10]}, {"y": [None, None, 6]}), dense)
    tr.Plan(layers=(tr.LayerPlan(name="w", format="svd", modes=(6, 10), ranks=(2,)),)).save(plan)
    code, _, said = cli("export", dense, "--plan", plan, "-o", out)
    assert (code, out.exists()) == (2, False)
    assert "give the shapes of the inputs" in " ".join(said.split())
    code, _, said = cli("export", dense, "--plan", plan, "-o", out, "--shape", "x=2,1,3,10")
    assert code == 0, said
    assert [node.op_type for node in onnx.load(out).graph.node].count("MatMul") == 2
    report = tr.export(dense, out, plan, form=tr.Form(block=1, shapes={"x": (2, 1, 3, 10)}))
    assert [layer.layer for layer in report.layers] == ["w"]


def test_a_plan_says_on_what_inputs_it_was_judged(small_path, tmp_path, in_this_process):
    search = tr.Search(allow_slower=True, seconds=0.1, check_seconds=0.1, improve_seconds=0, cache=tmp_path, formats=("svd",))
    options = tr.Options(search=search, fit=tr.Fit(0), timing=tr.Timing(seconds=0.05, processes=1))
    inputs = {"x": np.random.default_rng(0).standard_normal((8, 16, 8, 8)).astype(np.float32)}
    few = tr.plan(small_path, {"params": 1.2}, calibration={"x": inputs["x"][:3]}, options=options)
    assert (few.verified.aside, few.verified.too_few) == (None, True)
    assert "too few inputs to hold any out" in str(few)
    planned = tr.plan(small_path, {"params": 1.2}, calibration=inputs, options=options)
    assert planned.verified.aside.samples == 2
    assert "before cores are fitted" in str(planned)
    report = tr.compress(small_path, tmp_path / "c.onnx", {"params": 1.2}, calibration=inputs, options=options)
    assert report.planning.verified.aside is None  # it is judged with its cores fitted
    assert report.aside.samples == 2
    assert "too few" not in str(report)
