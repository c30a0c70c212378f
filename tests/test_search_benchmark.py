"""The benchmarks of plans, on a network of seconds."""

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
def benchmarks(monkeypatch):
    """Make the modules of benchmarks importable."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))


@pytest.fixture
def search(benchmarks):
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


@pytest.mark.slow
def test_the_front_of_rank_and_precision(benchmarks, dense, tmp_path, monkeypatch):
    precision = importlib.import_module("precision")
    short = ("--seconds", "1", "--fit", "0", "--bench-seconds", "0.5", "--cache", str(tmp_path / "cache"))
    out = tmp_path / "results" / "precision"
    monkeypatch.setattr(sys, "argv", ["precision.py", str(dense), *short, "-o", str(out)])
    monkeypatch.setattr("tensorrail.asked.WALK", (1.01,))
    precision.main()
    (record,) = json.loads(out.with_suffix(".json").read_text())
    page = out.with_suffix(".md").read_text()
    if "refused" in record:  # a network so small need not be faster in any form
        assert f"Refused: {record['refused']}." in page
        return
    front = precision.Front.model_validate(record["front"])
    assert front.points[0].name.startswith("dense in int8")
    assert all(0 <= point.score <= 1 for point in front.points)
    assert "| dense in int8" in page
    assert (out / "dense.svg").exists()


def test_what_is_as_good_as_dense_int8(benchmarks):
    precision = importlib.import_module("precision")

    def point(name, layers, speed, agreement):
        ratios = {"params": 1, "macs": 1, "flops": 1, "bytes": 1, "latency": speed, "latency_low": speed, "latency_high": speed}
        size = {"params": 1, "macs": 1, "flops": 2, "bytes": 4, "milliseconds": 1.0}
        ends = {"agreement_low": agreement, "agreement_high": agreement, "difference_low": 0.1, "difference_high": 0.1}
        chosen = {"samples": 9, "agreement": agreement, "difference": 0.1, **ends}
        record = {"name": name, "precision": "int8", "layers": layers, "size": size, "ratios": ratios, "approximation": 0.1}
        # What was measured on held-out inputs decides nothing.
        return precision.Point.model_validate(record | {"chosen": chosen, "aside": chosen | {"agreement": 1 - agreement}})

    def chosen(points):
        found = precision.best(precision.Front.model_construct(points=points))
        return None if found is None else found.name

    near, far, dense = point("near", 3, 2.5, 0.97), point("far", 3, 4.0, 0.9), point("dense", 0, 2.0, 0.99)
    assert chosen([dense, near, far]) == "near"
    assert chosen([dense, far]) is None
    assert chosen([point("dense", 0, 2.0, 0.9), near, far]) == "far"  # dense int8 does not agree more
