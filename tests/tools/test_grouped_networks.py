"""A ResNeXt-like network from its file to a smaller one: its convolutions in groups are planned, written and compared."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from conftest import make_model
from onnx import helper

import tensorrail as tr
from tensorrail_exporter.rewrite.survey import survey

WIDTH, GROUPS = 64, 4


@pytest.fixture
def network():
    """A stem, two blocks of 1×1, 3×3 in groups and 1×1 with a sum around them, and a classifier."""
    rng = np.random.default_rng(0)

    def weight(*shape):
        return (rng.standard_normal(shape) * (2 / np.prod(shape[1:])) ** 0.5).astype(np.float32)

    weights, nodes, source = {"stem.weight": weight(32, 3, 3, 3)}, [], "t0"
    nodes.append(helper.make_node("Conv", ["x", "stem.weight"], ["t0"], "stem", pads=[1] * 4))
    for block in range(2):
        name = f"block{block}"
        sizes = {"a": (WIDTH, 32, 1, 1), "grouped": (WIDTH, WIDTH // GROUPS, 3, 3), "b": (32, WIDTH, 1, 1)}
        before = source
        for part, shape in sizes.items():
            key = f"{name}.{part}"
            attributes = {"group": GROUPS, "pads": [1] * 4} if part == "grouped" else {}
            weights |= {f"{key}.weight": weight(*shape), f"{key}.bias": weight(shape[0])}
            inputs = [source, f"{key}.weight", f"{key}.bias"]
            nodes.append(helper.make_node("Conv", inputs, [f"{key}/c"], key, **attributes))
            source = f"{key}/c"
            if part != "b":
                nodes.append(helper.make_node("Relu", [source], [f"{key}/r"], f"{key}/relu"))
                source = f"{key}/r"
        nodes.append(helper.make_node("Add", [source, before], [f"t{block + 1}"], f"{name}/add"))
        source = f"t{block + 1}"
    weights["fc.weight"] = weight(10, 32)
    nodes += [
        helper.make_node("GlobalAveragePool", [source], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "fc.weight"], ["y"], "fc", transB=1),
    ]
    return make_model(nodes, weights, {"x": ["n", 3, 12, 12]}, {"y": ["n", 10]})


def options(**search):
    """Return options with which nothing takes long; everything but the convolutions in groups stays as it is."""
    quick = {"allow_slower": True, "seconds": 1.0, "check_seconds": 0.2, "improve_seconds": 0.0, "grid": 8}
    kept = ("stem", "*.a", "*.b", "fc")
    return tr.Options(timing=tr.Timing(seconds=0.2), search=tr.Search(**quick, keep=kept, **search), fit=tr.Fit(seconds=0.0))


def images(count, seed):
    return {"x": np.random.default_rng(seed).standard_normal((count, 3, 12, 12)).astype(np.float32)}


def factored_convolutions(path):
    """Return the numbers of groups of the convolutions that were written for the layers in groups."""
    nodes = [node for node in onnx.load(path).graph.node if ".grouped/" in node.name and node.op_type == "Conv"]
    return [attribute.i for node in nodes for attribute in node.attribute if attribute.name == "group"]


@pytest.mark.parametrize("calibrated", [False, True])
def test_compress_factors_the_convolutions_in_groups(network, calibrated, in_this_process, monkeypatch, tmp_path):
    monkeypatch.setenv("TENSORRAIL_CACHE", str(tmp_path / "cache"))
    calibration = images(48, 1) if calibrated else None
    report = tr.compress(network, tmp_path / "model.onnx", {"flops": 1.8}, calibration=calibration, options=options())
    rows = {row.layer: row for row in report.planning.rows}
    assert all(rows[f"block{k}.grouped"].format for k in range(2))
    assert not any(row.format for name, row in rows.items() if not name.endswith("grouped"))
    assert report.numerical < 1e-4
    groups = factored_convolutions(tmp_path / "model.onnx")
    assert set(groups) == {GROUPS}
    assert len(groups) >= 4
    assert tr.inspect(network).macs >= 1.8 * tr.inspect(tmp_path / "model.onnx").macs


def test_plan_lists_the_convolutions_in_groups(network, in_this_process, monkeypatch, tmp_path):
    monkeypatch.setenv("TENSORRAIL_CACHE", str(tmp_path / "cache"))
    macs = {layer.name: layer.macs for layer in survey(network)}
    assert macs["block0.grouped"] == 12 * 12 * WIDTH * (WIDTH // GROUPS) * 9
    report = tr.plan(network, {"params": 1.2}, options=options())
    planned = {layer.name for layer in report.plan.layers}
    assert planned
    assert planned <= {"block0.grouped", "block1.grouped"}
    made = tr.export(network, tmp_path / "planned.onnx", report.plan)
    assert all("/4" in row.steps for row in made.layers)
