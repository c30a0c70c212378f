"""benchmarks/gpu.py: a dry run on the CPU of what it does on a GPU, and what it says where there is none."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tensorrail_runtime.graphs.cost import GraphCost, NodeCost

ROOT = Path(__file__).parents[1]
PLAN = {"version": 1, "layers": [{"name": "layer3.0.conv2", "format": "svd", "modes": [192, 192], "ranks": [32]}]}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


@pytest.fixture
def benched(gpu, monkeypatch, tmp_path):
    """Return a function that runs the script, and returns the record it wrote and its page."""

    def call(*arguments, provider="cpu"):
        out = ["--folder", tmp_path / "models", "-o", tmp_path / "out", "--cache", tmp_path / "cache", "--provider", provider]
        monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, (*arguments, *out))])
        gpu.main()
        (record,) = (tmp_path / "out").glob("*.json")
        return json.loads(record.read_text()), record.with_suffix(".md").read_text()

    return call


def with_a_plan(folder):
    """Leave a record in which ResNet-20 has a plan already: making one takes long."""
    folder.mkdir()
    row = {"network": "resnet20", "grid": 16, "plan": PLAN, "refused": [], "target": 1.1, "layers": 1, "of": 20}
    row |= {
        "batch": 2,
        "predicted": 1.05,
        "measured": None,
        "mode": "fp32, NCHW",
        "merges": ["sides"],
        "formats": ["svd"],
        "seconds": 1.0,
    }
    (folder / "gpu-dry-run.json").write_text(json.dumps({"plan": [row]}))


def test_where_there_is_no_gpu_it_says_why_and_writes_nothing(gpu, monkeypatch, capsys, tmp_path):
    reason = "provider 'cuda' is not available"
    monkeypatch.setattr(gpu, "lacking", lambda _: reason)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "-o", str(tmp_path / "out"), "--folder", str(tmp_path / "models")])
    gpu.main()
    assert capsys.readouterr().out == f"skipped: {reason}\n"
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert gpu.lacking("cpu") is None


@pytest.mark.slow
def test_a_dry_run_measures_every_form_and_goes_on_where_it_was(benched, gpu, in_this_process, monkeypatch, tmp_path):
    card = gpu.Peaks(bandwidth=1e15, flops={"fp32": 1e15})  # known: what this machine gives just now may be less than it gave
    monkeypatch.setattr(gpu, "peaks", lambda device: {"cpu": card}[device])
    with_a_plan(tmp_path / "out")
    asked = ["--networks", "resnet20", "--batches", 2, "--seconds", 0.2, "--resume", "--sections", "placement", "latency"]
    record, page = benched(*asked)
    assert [row["form"] for row in record["placement"]] == ["dense", "planned, grid 16"]
    for row in record["placement"]:
        assert not row["elsewhere"]
        assert row["fp32"] <= 1e-4
        assert 1e-5 < row["fp16"] < 1e-2
    forms = [(row["mode"], row["form"]) for row in record["latency"]]
    assert forms == [(f"{precision}, NCHW", form) for precision in ("fp32", "fp16") for form in ("dense", "planned, grid 16")]
    dense, planned = record["latency"][:2]
    assert planned["macs"] > dense["macs"] == 1.0
    assert 0 < dense["bound_ms"] < dense["ms"]
    assert planned["bound_ms"] < dense["bound_ms"]
    assert "dry run" in page
    assert f"| {planned['ms']:.3f} ms |" in page
    assert benched(*asked)[0]["latency"] == record["latency"]  # nothing is measured twice


def test_what_the_time_does_not_reach_is_named(benched, tmp_path):
    with_a_plan(tmp_path / "out")
    record, page = benched(
        "--networks", "resnet20", "--batches", 2, "--minutes", 0, "--resume", "--sections", "latency", "gate"
    )
    assert record["latency"] == record["gate"] == []
    assert "- resnet20, batch 2, fp32, NCHW: not run, the time was over" in page


@pytest.mark.slow
def test_recipes_are_trained_and_epochs_of_data_that_is_not_there_are_not(benched, tmp_path):
    recipe = yaml.safe_load((ROOT / "recipes" / "digits.yaml").read_text())
    recipe["model"]["args"] = {"widths": [16], "blocks": 1, "hidden": 16}
    recipe["plan"] = [{"layers": "stages.0.0.conv1", "format": "tt", "ranks": 4}]
    for phase in ("dense", "admm", "finetune"):
        recipe["train"][phase]["epochs"] = 1
    recipe["train"]["control"] = "none"
    recipe["data"]["args"] = {"test_fraction": 0.9, "size": 16}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))
    asked = ["--sections", "training", "--data", tmp_path / "none", "--recipes", tmp_path / "small.yaml", "--resume"]
    record, page = benched(*asked)
    assert f"- epochs: not timed, {tmp_path}/none is not there" in page
    (row,) = record["training"]
    assert (row["recipe"], row["how"]) == ("small", "ended")
    assert 0 < row["projection"] < 1
    assert f"| small | {row['dense']:.1f} s | {row['admm']:.1f} s |" in page
    assert benched(*asked)[0]["training"] == [row]


def test_peaks_leave_the_threads_as_they_were(gpu):
    roofline = importlib.import_module("roofline")
    before = torch.get_num_threads()
    found = roofline.peaks("cpu")
    assert torch.get_num_threads() == before
    assert found.bandwidth > 0
    assert found.flops.keys() == {"fp32"}


def test_a_bound_is_the_more_of_arithmetic_and_traffic(gpu):
    nodes = [
        NodeCost(name="n", op="Conv", weight="w", input=(2, 3), output=(2, 5), params=15, macs=macs) for macs in (30, 10**6)
    ]
    found = GraphCost(model="m", batch=2, params=15, bytes=0, macs=0, activation_bytes=0, kernels=2, nodes=2, unshaped=0,
                      layers=nodes, uncounted=())  # fmt: skip
    card = gpu.Peaks(bandwidth=1e3, flops={"fp32": 1e6})
    assert gpu.bound_ms(found, card, "fp32") == pytest.approx(1e3 * (4 * 31 / 1e3 + 2e6 / 1e6))
    assert gpu.bound_ms(found, card, "fp16") is None


@pytest.mark.gpu
def test_on_a_gpu_every_node_runs_there_and_computes_the_same(benched, tmp_path):
    asked = ["--networks", "resnet20", "--grids", 8, "--plan-seconds", 10, "--batches", 64, "--seconds", 0.3]
    record, _ = benched(*asked, "--sections", "plan", "placement", "latency", provider="cuda")
    assert record["placement"]
    for row in record["placement"]:
        assert not row["elsewhere"]
        assert row["fp32"] <= 1e-4
    assert record["latency"]
