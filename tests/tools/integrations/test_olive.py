"""`compress` as a pass of Olive: found by its package configuration, run in Olive's search and judged by its evaluator."""

import json
import os
import sys

import numpy as np
import onnx
import pytest
from conftest import make_model
from onnx import helper

from tensorrail.extras import MissingExtraError

os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"
olive = pytest.importorskip("olive")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
WIDTH = 256

SCRIPT = """
import numpy as np
import torch
from olive.data.registry import Registry


class Inputs(torch.utils.data.Dataset):
    def __init__(self, file):
        self.x = np.load(file)["x"]

    def __len__(self):
        return len(self.x)

    def __getitem__(self, k):
        return {"x": self.x[k]}, 0


@Registry.register_dataset()
def inputs_of_tensorrail(file, **_):
    return Inputs(file)
"""


@pytest.fixture(scope="module")
def low_rank():
    """x (batch, 256) through two layers whose weights have rank 8."""
    rng = np.random.default_rng(0)
    weights = {
        name: (rng.standard_normal((WIDTH, 8)) @ rng.standard_normal((8, WIDTH)) / 30).astype(np.float32) for name in ("a", "b")
    }
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["y"]),
    ]
    return make_model(nodes, weights, {"x": ["batch", WIDTH]}, {"y": ["batch", WIDTH]})


@pytest.fixture(scope="module")
def files(tmp_path_factory, low_rank):
    """A folder of the model, its inputs and the script, which Olive registers once in a process."""
    folder = tmp_path_factory.mktemp("olive")
    onnx.save(low_rank, folder / "dense.onnx")
    x = np.random.default_rng(1).standard_normal((96, WIDTH)).astype(np.float32)
    np.savez(folder / "inputs.npz", x=x)
    (folder / "script.py").write_text(SCRIPT)
    return folder


@pytest.fixture
def folder(files, tmp_path, monkeypatch):
    monkeypatch.chdir(files)
    return tmp_path


def workflow(folder, **options):
    """Return a workflow with one pass, evaluated by Olive's own latency."""
    inputs = {
        "name": "inputs",
        "user_script": "script.py",
        "load_dataset_config": {"type": "inputs_of_tensorrail", "params": {"file": "inputs.npz"}},
        "dataloader_config": {"params": {"batch_size": 32}},
    }
    latency = {"name": "latency", "type": "latency", "data_config": "inputs", "sub_types": [{"name": "avg", "priority": 1}]}
    low_rank = {
        "type": "TensorrailCompress",
        "threads": 1,
        "fit": 0.0,
        "seconds": 0.5,
        "search_seconds": 0.0,
        "duration": 0.5,
        **options,
    }
    return {
        "input_model": {"type": "ONNXModel", "model_path": "dense.onnx"},
        "systems": {
            "here": {
                "type": "LocalSystem",
                "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
            }
        },
        "data_configs": [inputs],
        "evaluators": {"time": {"type": "OnnxEvaluator", "metrics": [latency]}},
        "passes": {"low_rank": low_rank},
        "search_strategy": {"execution_order": "joint", "sampler": "sequential"},
        "evaluator": "time",
        "host": "here",
        "target": "here",
        "output_dir": str(folder / "out"),
        "cache_dir": str(folder / "cache"),
    }


def run(folder, **options):
    from tensorrail.integrations.olive import write_package_config

    write_package_config(folder / "package.json")
    return olive.run(workflow(folder, **options), package_config=str(folder / "package.json"))


def test_a_search_writes_what_is_faster_and_leaves_out_what_cannot_be(folder):
    run(folder, data_config="inputs", latency=None, params=[4.0, 1000.0])
    written = onnx.load(folder / "out" / "model.onnx")
    weights = {tensor.name: tensor.dims for tensor in written.graph.initializer}
    assert {"a", "b"}.isdisjoint(weights)  # both are made of cores
    report = json.loads((folder / "out" / "tensorrail.json").read_text())
    assert report["ratios"]["params"] > 5
    assert report["aside"]["difference"] < 1e-3  # the weights have that rank
    assert report["targets"] == {"params": 4.0}  # and none of the target that cannot be met
    tried = json.loads((folder / "out" / "footprint.json").read_text())
    assert "latency" in json.dumps(tried)


def test_a_refusal_fails_the_pass_in_one_line(folder):
    from olive.exception import OlivePassError
    from olive.hardware import DEFAULT_CPU_ACCELERATOR
    from olive.model import ONNXModelHandler

    from tensorrail.integrations.olive import TensorrailCompress

    def made(**options):
        config = TensorrailCompress.generate_config(DEFAULT_CPU_ACCELERATOR, options, disable_search=True)
        return TensorrailCompress(DEFAULT_CPU_ACCELERATOR, config)

    model = ONNXModelHandler("dense.onnx")
    with pytest.raises(OlivePassError, match="target params=1000 cannot be met") as caught:
        made(params=1000.0).run(model, str(folder / "small"))
    assert "\n" not in str(caught.value)
    assert not (folder / "small" / "model.onnx").exists()
    with pytest.raises(OlivePassError, match="calibration"):
        made().run(model, str(folder / "small"))


def test_olives_own_passes_stay():
    from tensorrail.integrations.olive import package_config

    passes = package_config()["passes"]
    assert {"TensorrailCompress", "OnnxConversion", "OnnxStaticQuantization"} <= set(passes)


def test_olive_that_is_missing_is_named(monkeypatch):
    import importlib

    monkeypatch.delitem(sys.modules, "tensorrail.integrations.olive", raising=False)
    for name in [name for name in sys.modules if name == "olive" or name.startswith("olive.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "olive", None)
    with pytest.raises(MissingExtraError, match=r"needs olive: install the extra `olive`, as in pip install '\.\[olive\]'"):
        importlib.import_module("tensorrail.integrations.olive")
