"""The benchmark of the ways to choose a plan, on a network of seconds."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import make_model
from onnx import helper


@pytest.fixture
def search(monkeypatch):
    """The module of the benchmark."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("search")


@pytest.fixture
def dense(rng, tmp_path):
    """A network of two convolutions with scores of five classes, and its inputs beside it."""
    weights = {
        "a": rng.standard_normal((32, 16, 3, 3)) / 12,
        "b": rng.standard_normal((32, 32, 3, 3)) / 17,
        "c": rng.standard_normal((32, 5)) / 2,
    }
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["h"], "a", pads=[1] * 4),
        helper.make_node("Relu", ["h"], ["r"], "r"),
        helper.make_node("Conv", ["r", "b"], ["k"], "b", pads=[1] * 4),
        helper.make_node("GlobalAveragePool", ["k"], ["p"], "p"),
        helper.make_node("Flatten", ["p"], ["f"], "f"),
        helper.make_node("MatMul", ["f", "c"], ["y"], "c"),
    ]
    constants = {name: array.astype(np.float32) for name, array in weights.items()}
    path = tmp_path / "dense.onnx"
    onnx.save(make_model(nodes, constants, {"x": ["n", 16, 8, 8]}, {"y": ["n", 5]}), path)
    for name, count in (("calibration", 48), ("test", 32)):
        arrays = {"x": (rng.standard_normal((count, 16, 8, 8)) + rng.standard_normal((count, 16, 1, 1))).astype(np.float32)}
        if name == "test":
            arrays["labels"] = np.arange(count) % 5
        np.savez(path.with_suffix(f".{name}.npz"), **arrays)
    return path


@pytest.mark.slow
def test_every_way_is_judged_on_the_same_other_inputs(search, dense, tmp_path, monkeypatch):
    short = ("--seconds", "1", "--search-seconds", "1", "--bench-seconds", "0.5", "--cache", str(tmp_path / "cache"))
    out = tmp_path / "search"
    monkeypatch.setattr(sys, "argv", ["search.py", str(dense), "--flops", "1.5", "1000", *short, "-o", str(out)])
    search.main()
    records = json.loads(out.with_suffix(".json").read_text())
    ways = [way.name for way in search.WAYS]
    assert [(one["way"], one["target"]["flops"]) for one in records] == [(way, f) for f in (1.5, 1000.0) for way in ways]
    chosen, refused = records[:4], records[4:]
    assert all(one["reached"]["flops"] >= 0.99 * 1.5 for one in chosen)
    assert all(0 < one["agreement"] <= 1 and one["speed"][1] <= one["speed"][0] <= one["speed"][2] for one in chosen)
    assert len({one["dense_top1"] for one in chosen}) == 1
    verified = {one["way"]: one["verified_loss"] for one in chosen}
    assert verified["searched"] <= verified["verified"]
    assert all("cannot be met" in one["refused"] for one in refused)
    assert out.with_suffix(".md").read_text().count("\n| dense |") == 8
