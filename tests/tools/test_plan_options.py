"""What `plan` and `compress` refuse: before anything is measured, in one line, and no option is ignored in silence."""

import re

import numpy as np
import onnx
import pytest
from conftest import make_model
from onnx import helper

from tensorrail_exporter import LayerPlan, Plan
from tensorrail_exporter.search.latency_table import LatencyTable


@pytest.fixture
def files(tmp_path, rng, monkeypatch):
    """Return a folder with models, data and a plan in which nothing may be measured."""

    def never(*_, **__):
        pytest.fail("something was measured")

    monkeypatch.setattr(LatencyTable, "measure", never)
    monkeypatch.setattr(LatencyTable, "sketch", never)
    monkeypatch.chdir(tmp_path)
    weight = rng.standard_normal((64, 64)).astype(np.float32)
    for name, value in (("dense", 0.0), ("nan", np.nan), ("inf", np.inf)):
        weight[0, 0] = value
        node = helper.make_node("Gemm", ["x", "c.weight"], ["y"], transB=1)
        onnx.save(make_model([node], {"c.weight": weight}, {"x": ["n", 64]}, {"y": ["n", 64]}), f"{name}.onnx")
    x = rng.standard_normal((30, 64)).astype(np.float32)
    labels = {
        "onehot": np.eye(64)[np.arange(30)],
        "words": np.array(["a"] * 30),
        "floats": np.zeros(30),
        "negative": np.arange(-1, 29),
        "from1": np.arange(35, 65),
        "classes": np.arange(30),
    }
    for name, found in labels.items():
        np.savez(f"{name}.npz", x=x, labels=found)
    np.savez("x.npz", x=x)
    Plan(layers=(LayerPlan(name="c", format="svd", modes=(64, 64), ranks=(8,)),)).save("p.json")
    return tmp_path


SIZE = ("--target", "params=1.5", "--allow-slower")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("plan", "nan.onnx", *SIZE), "weight 'c.weight' holds (NaN|an infinite value) at"),
        (("plan", "inf.onnx", *SIZE), "weight 'c.weight' holds (NaN|an infinite value) at"),
        (
            ("plan", "dense.onnx", *SIZE, "--keep", "tpyo"),
            "keep: no layer matches 'tpyo'; the layers that can be factored are: c",
        ),
        (("compress", "dense.onnx", "-o", "o.onnx", *SIZE, "--keep", "d*"), r"keep: no layer matches 'd\*'"),
        (("plan", "dense.onnx", *SIZE, "--calibration", "onehot.npz"), r"onehot.npz: expected integer labels, one per sample"),
        (
            ("plan", "dense.onnx", *SIZE, "--calibration", "words.npz"),
            r"expected integer labels, one per sample, got <U1 of shape",
        ),
        (("plan", "dense.onnx", *SIZE, "--calibration", "floats.npz"), "expected integer labels, one per sample, got float64"),
        (("plan", "dense.onnx", *SIZE, "--calibration", "negative.npz"), "expected class indices from 0 as labels, got -1"),
        (
            ("plan", "dense.onnx", *SIZE, "--metric", "top1"),
            "metric top1 is a loss that is measured, got no calibration inputs: give calibration inputs with labels",
        ),
        (
            ("plan", "dense.onnx", *SIZE, "--calibration", "x.npz", "--metric", "top1"),
            "metric top1 scores outputs by labels, got calibration inputs without labels: give an npz file",
        ),
        (
            ("compress", "dense.onnx", "-o", "o.onnx", *SIZE, "--calibration", "classes.npz", "--metric", "none:f"),
            "metric 'none:f' cannot be imported",
        ),
        (
            ("plan", "dense.onnx", *SIZE, "--calibration", "floats.npz", "--metric", "top5"),
            "top5: expected an output of shape .* and integer labels of shape .*, got .* labels of type float64",
        ),
        (
            ("plan", "dense.onnx", *SIZE, "--calibration", "words.npz", "--metric", "builtins:len"),
            r"metric builtins:len: failed on 4 samples \(TypeError",
        ),
        (("plan", "dense.onnx", *SIZE, "--calibration", "from1.npz"), "64 classes: expected labels 0 to 63, got 35 to 64"),
    ],
)
def test_what_no_measuring_can_help_is_refused_before_it(cli, files, arguments, reason):
    check_refused(cli, files, arguments, reason)


@pytest.mark.parametrize(
    ("option", "value"),
    [("keep", "c"), ("format", "tt"), ("grid", "8"), ("allow-slower", None), ("seconds", "5"), ("cache", "folder")],
)
def test_options_that_a_plan_makes_idle_are_refused(cli, files, option, value):
    given = [f"--{option}", *([value] if value else [])]
    arguments = ("compress", "dense.onnx", "-o", "o.onnx", "--plan", "p.json", "--duration", "0.5", *given)
    check_refused(cli, files, arguments, f"--{option} is for the search of a plan and has no effect with --plan")


def test_a_metric_is_refused_where_nothing_is_left_to_judge(cli, files):
    arguments = ("compress", "dense.onnx", "-o", "o.onnx", "--plan", "p.json", "--calibration", "classes.npz", "--fit", "0")
    check_refused(cli, files, (*arguments, "--metric", "top1"), "metric top1 .* has no effect with a plan and no such fit")


@pytest.mark.parametrize(("option", "value"), [("fit", "5"), ("samples", "5"), ("metric", "top1")])
@pytest.mark.parametrize("way", [("--plan", "p.json"), SIZE])
def test_options_of_calibration_are_refused_without_any(cli, files, option, value, way):
    arguments = ("compress", "dense.onnx", "-o", "o.onnx", *way, "--duration", "0.5", f"--{option}", value)
    check_refused(cli, files, arguments, f"--{option} is about calibration inputs and has no effect without them")


def test_no_fit_without_calibration_is_what_happens_anyway(cli, in_this_process, files):
    code = cli("compress", "dense.onnx", "-o", "o.onnx", "--plan", "p.json", "--fit", "0", "--duration", "0.5")[0]
    assert code in (0, 1)
    assert (files / "o.onnx").exists()


def check_refused(cli, folder, arguments, reason):
    code, _, errors = cli(*arguments)
    assert code == 2
    assert len(errors.strip().splitlines()) == 1
    assert re.search(reason, errors), errors
    assert not (folder / "o.onnx").exists()


@pytest.mark.parametrize("name", ["params", "flops"])
def test_a_target_on_what_the_model_has_none_of_is_refused(cli, relu, name):
    code, _, errors = cli("plan", relu, "--target", f"{name}=2", "--seconds", "1")
    assert code == 2
    assert errors == f"tensorrail: target {name}=2: the model has 0 {name}, so there is nothing to reduce\n"


def test_a_model_without_a_layer_has_a_plan_without_a_layer(cli, in_this_process, relu, tmp_path):
    code, printed, _ = cli("plan", relu, "--max-loss", "1", "--seconds", "1", "-o", tmp_path / "p.json")
    assert code == 0
    assert "FLOPs ÷ 1.00, parameters ÷ 1.00" in " ".join(printed.split())
    assert "no layer is rewritten" in printed
    assert Plan.load(tmp_path / "p.json").layers == ()


@pytest.fixture
def relu(tmp_path):
    path = tmp_path / "relu.onnx"
    onnx.save(make_model([helper.make_node("Relu", ["x"], ["y"])], {}, {"x": ["n", 8]}, {"y": ["n", 8]}), path)
    return path
