"""`tensorrail plan` and `tensorrail compress`: what they write, print and end with."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from conftest import make_model
from onnx import helper

import tensorrail as tr
from tensorrail.front import drawn
from tensorrail_exporter import Plan
from tensorrail_exporter.compressed import Front, Point, Ratios
from tensorrail_exporter.search import planner
from tensorrail_exporter.search.report import Size
from tensorrail_runtime.measure.agreement import Agreement
from tensorrail_runtime.sessions.halves import computes_in_fp16
from tensorrail_runtime.sessions.session import Session
from tensorrail_trainer.networks.small_resnet import SmallResNet
from tensorrail_trainer.run.export import to_onnx


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("compress")
    torch.manual_seed(0)
    model = SmallResNet(3, 10, [32, 48], 1, 16).eval()
    onnx.save(to_onnx(model, torch.randn(2, 3, 32, 32)), made / "dense.onnx")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 3, 32, 32)).astype(np.float32)
    np.savez(made / "x.npz", image=x)
    np.savez(made / "test.npz", image=x, labels=rng.integers(0, 10, 40))
    (made / "bf16.json").write_text(json.dumps({"layers": [], "precision": "bf16"}))
    return made


@pytest.fixture
def inside(folder, cli, monkeypatch):
    """Run commands in the folder, in this process."""
    monkeypatch.chdir(folder)
    return cli


def call(folder, *arguments):
    command = [sys.executable, "-c", "from tensorrail.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


FAST = ("--seconds", "1", "--cache", "cache")


def test_plan_then_compress_by_it(folder, inside, in_this_process, monkeypatch):
    size = ("--target", "params=1.5", "--allow-slower")
    code, printed, errors = inside("plan", "dense.onnx", *size, "-o", "plan.json", "--json", "p.json", *FAST)
    assert code == 0, errors
    assert "predicted" in printed
    plan = Plan.load(folder / "plan.json")
    record = json.loads((folder / "p.json").read_text())
    assert record["dense"]["params"] / record["planned"]["params"] >= 1.5
    assert [layer["name"] for layer in record["plan"]["layers"]] == [layer.name for layer in plan.layers]
    code, printed, errors = inside(
        "compress", "dense.onnx", "-o", "out.onnx", "--plan", "plan.json", "--calibration", "x.npz",
        "--data", "test.npz", "--fit", "1", "--also", "int8", "--duration", "0.5", "--json", "c.json",
    )  # fmt: skip
    assert code in (0, 1), errors  # 1: not measured to be faster, which a network this small need not be
    assert "top1 accuracy" in printed
    record = json.loads((folder / "c.json").read_text())
    assert record["ratios"]["params"] >= 1.4
    assert (code == 0) == (record["ratios"]["latency_low"] > 1)
    assert ("NOT measured to be faster" in printed) == (code == 1)
    onnx.checker.check_model(onnx.load(folder / "out.onnx"), full_check=True)
    assert [one["to"] for one in record["reduced"]] == ["int8"]
    assert [(one["inputs"], one["samples"]) for one in record["reduced"]] == [("held out", record["aside"]["samples"])]
    assert (folder / "out.int8.onnx").exists()


def test_a_precision_that_cannot_be_written_loses_no_report(rng, tmp_path, in_this_process):
    """A weight of 2·10⁴, whose products overflow in fp16: the model in fp32 is written and reported."""
    first, second = (2e4 * rng.standard_normal((32, 32)), rng.standard_normal((32, 32)) / 2e4)
    weights = {"a.weight": first.astype(np.float32), "b.weight": second.astype(np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "a.weight"], ["h"]), helper.make_node("MatMul", ["h", "b.weight"], ["y"])]
    model = make_model(nodes, weights, {"x": ["n", 32]}, {"y": ["n", 32]})
    plan = Plan(layers=(tr.LayerPlan(name="b.weight", format="svd", modes=(32, 32), ranks=(8,)),))
    options = tr.Options(timing=tr.Timing(seconds=0.05), search=tr.Search(also=("fp16",)))
    report = tr.compress(model, tmp_path / "out.onnx", plan, options=options)
    assert report.reduced == ()
    assert "NOT written in fp16: layer a" in str(report)
    assert (tmp_path / "out.onnx").exists()
    assert not (tmp_path / "out.fp16.onnx").exists()


def test_rank_and_precision_are_one_choice(folder, inside, in_this_process):
    code, printed, errors = inside(
        "compress", "dense.onnx", "-o", "auto.onnx", "--target", "latency=1.01", "--precision", "auto",
        "--calibration", "x.npz", "--fit", "0", "--min-agreement", "0", "--search-seconds", "0", "--duration", "0.5",
        "--json", "auto.json", "--format", "svd", *FAST,
    )  # fmt: skip
    assert code in (0, 1), errors  # 1: not measured to be so fast
    record = json.loads((folder / "auto.json").read_text())
    names = {point["name"] for point in record["front"]}
    assert "dense in int8" in names
    kinds = {name.partition(" in ")[2].partition(",")[0] for name in names}  # some layers of int8 may be faster in fp32
    assert kinds <= {"fp32", "int8"} | ({"fp16"} if computes_in_fp16(Session()) else set())
    assert "(written)" in printed
    assert (folder / "auto.onnx").exists()


def test_a_front_is_written_with_its_picture(folder, inside, in_this_process, monkeypatch):
    walked = []
    monkeypatch.setattr("tensorrail.asked.WALK", (1.01, 1.02, 50.0))
    monkeypatch.setattr("tensorrail_exporter.search.planner._FAR", 100.0)
    plan = planner.plan_networks

    def watched(model, targets, *arguments, **options):
        walked.append([one["latency"] for one in targets])
        return plan(model, targets, *arguments, **options)

    monkeypatch.setattr(planner, "plan_networks", watched)
    code, _, errors = inside(
        "compress", "dense.onnx", "-o", "best.onnx", "--front", "front.json", "--calibration", "x.npz",
        "--precision", "auto", "--precision", "fp16",
        "--fit", "0", "--min-agreement", "0", "--search-seconds", "0", "--duration", "0.5", "--format", "svd", *FAST,
    )  # fmt: skip
    assert code in (0, 1), errors
    assert walked == [[1.01, 1.02, 50.0]] * 3  # for fp32, fp16 and int8; the last one cannot be reached
    front = Front.model_validate_json((folder / "front.json").read_text())
    assert front.model == "best.onnx"
    assert {"dense in fp16", "dense in int8"} <= {point.name for point in front.points}
    assert all("latency=50" not in point.name for point in front.points)
    assert "<svg" in (folder / "front.svg").read_text()
    for name in ("front.json", "front.svg"):
        (folder / name).unlink()


@pytest.mark.parametrize("agreement", [0.9, None])
def test_a_front_is_drawn_by_agreement_or_difference(agreement):
    size = Size(params=1, macs=1, flops=2, bytes=4, milliseconds=1.0)
    ratios = Ratios(params=1, macs=1, flops=1, bytes=1, latency=2.0, latency_low=1.9, latency_high=2.1)
    ends = {"agreement_low": agreement, "agreement_high": agreement, "difference_low": 0.1, "difference_high": 0.2}
    aside = Agreement(samples=9, agreement=agreement, difference=0.1, **ends)
    points = [
        Point(name="a", precision=precision, layers=layers, size=size, ratios=ratios, approximation=0.1, aside=aside)
        for precision in ("fp32", "fp16", "int8")
        for layers in (0, 3)
    ]
    picture = drawn(tuple(points))
    assert ("top-1 agreement (%)" in picture) == (agreement is not None)
    assert ("outputs differ by (%)" in picture) == (agreement is None)
    for label in ("dense, int8", "low rank, fp32", "dense, fp16", "low rank, fp16"):
        assert label in picture
    nothing = [point.model_copy(update={"aside": None}) for point in points]
    assert "<svg" in drawn(tuple(nothing))


def test_a_plan_is_judged_by_a_metric_of_the_users(folder, inside, in_this_process):
    """Its labels are vectors, which are no classes."""
    x = np.load(folder / "x.npz")["image"]
    np.savez(folder / "vectors.npz", image=x, labels=np.zeros((40, 10)))
    (folder / "size_of_scores.py").write_text(
        "def score(outputs, labels):\n    (scores,) = outputs.values()\n    return (scores - labels).std(1)\n"
    )
    metric = ("--calibration", "vectors.npz", "--metric", "size_of_scores:score", "--search-seconds", "0")
    few = ("--format", "svd", "--grid", "16", "--target", "params=1.3", "--allow-slower")
    code, printed, errors = inside("plan", "dense.onnx", *few, *metric, *FAST)
    assert code == 0, errors
    assert "loss of the planned network (fall of the score size_of_scores:score)" in " ".join(printed.split())


MINE = (
    "from tensorrail_trainer.networks.small_resnet import SmallResNet\n\n"
    "def make():\n    return SmallResNet(3, 10, [32], 1, 16)\n"
)


def test_a_torch_module_is_read_by_its_name(folder, inside, monkeypatch):
    """What its layers are called is known before anything is timed."""
    (folder / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(folder))
    code, printed, errors = inside("plan", "mine:make", "--shape", "image=3,16,16", "--target", "params=1.2", "--keep", "none")
    assert (code, printed) == (2, "")
    assert "stages.0.0.conv1" in errors


@pytest.mark.slow
def test_a_torch_module_can_be_planned(folder):
    (folder / "mine.py").write_text(MINE)
    done = call(folder, "plan", "mine:make", "--shape", "image=3,16,16", "--target", "params=1.2", "--allow-slower", *FAST)
    assert done.returncode == 0, done.stderr
    assert "stages.0.0.conv1" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("plan", "dense.onnx", "--target", "latency"), "--target: expected NAME=NUMBER, such as latency=2.0"),
        (("plan", "dense.onnx", "--target", "speed=2"), "unknown target 'speed'"),
        (("plan", "missing.onnx", "--target", "latency=2"), "missing.onnx: cannot be read"),
        (("plan", "dense.onnx", "--target", "latency=2", "--format", "ttt"), "unknown format 'ttt'"),
        (("plan", "nowhere:make", "--shape", "x=3,8,8", "--target", "latency=2"), "cannot be imported"),
        (("compress", "dense.onnx", "-o", "o.onnx"), "or --calibration for the fastest model that agrees"),
        (
            ("compress", "dense.onnx", "-o", "o.onnx", "--target", "flops=2", "--plan", "p.json"),
            "--plan plan.json, not both",
        ),
        (
            ("compress", "dense.onnx", "-o", "o.onnx", "--calibration", "x.npz", "--min-agreement", "90"),
            "min_agreement: expected a share from 0 to 1, got 90",
        ),
        (("compress", "dense.onnx", "-o", "o.onnx", "--target", "flops=2", "--also", "int4"), "also: expected fp16 or int8"),
        (
            ("plan", "dense.onnx", "--target", "flops=2", "--search-seconds", "9"),
            "--search-seconds is about calibration inputs",
        ),
        (
            ("compress", "dense.onnx", "-o", "o.onnx", "--target", "flops=2", "--search-seconds", "9"),
            "--search-seconds is about calibration inputs",
        ),
        (
            ("compress", "dense.onnx", "-o", "o.onnx", "--target", "flops=2", "--also", "int8"),
            "int8 needs typical inputs for the ranges",
        ),
        (
            ("compress", "dense.onnx", "-o", "o.onnx", "--target", "flops=2", "--precision", "auto"),
            "int8 needs typical inputs for the ranges of activations",
        ),
        (
            ("compress", "dense.onnx", "-o", "o.onnx", "--target", "flops=2", "--precision", "int4"),
            "precision: expected fp32, fp16, int8, auto, got 'int4'",
        ),
        (
            (
                *("compress", "dense.onnx", "-o", "o.onnx", "--target", "flops=2", "--calibration", "x.npz"),
                *("--precision", "int8", "--also", "int8"),
            ),
            "also: int8 is made from a model in fp32",
        ),
        (
            ("compress", "dense.onnx", "-o", "o.onnx", "--target", "latency=2", "--front", "front.txt"),
            "front: expected a file that ends in .json, got front.txt",
        ),
        (
            ("compress", "dense.onnx", "-o", "o.onnx", "--max-loss", "2", "--front", "front.json"),
            "a front covers all losses, so that max_loss has no effect",
        ),
        (
            ("plan", "dense.onnx", "--target", "flops=2", "--precision", "auto"),
            "precision: a plan is for one of fp32, fp16, int8, got 'auto'",
        ),
        (
            ("plan", "dense.onnx", "--target", "flops=2", "--precision", "fp16", "--precision", "int8"),
            "precision: a plan is for one precision, got fp16, int8",
        ),
        (("compress", "dense.onnx", "-o", "o.onnx", "--plan", "bf16.json"), "bf16.json: precision: "),
        (("compress", "dense.onnx", "-o", "o.onnx", "--plan", "none.json"), "none.json: cannot be read"),
        (("compress", "dense.onnx", "-o", "o.onnx", "--target", "latency=2", "--calibration", "none.npz"), "none.npz"),
        (
            ("compress", "dense.onnx", "-o", "o.onnx", "--target", "flops=2", "--data", "x.npz"),
            "expected an array 'labels' beside the inputs",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, inside, arguments, reason):
    code, _, errors = inside(*arguments)
    assert code == 2
    assert reason in errors
    assert len(errors.strip().splitlines()) == 1
    assert not (folder / "o.onnx").exists()
