"""What several test files need: small graphs with known weights, and a cases strategy."""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import math
import multiprocessing.forkserver
import os
import shutil
import sys
import tempfile
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: threads of several would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if hasattr(os, "sched_setaffinity") and "TENSORRAIL_TEST_ALL_CORES" not in os.environ:
        # ONNX Runtime's threads spin while they wait. A worker with a core of its own has none, nor have its processes.
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(cores)]})

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when ONNX Runtime is imported

import numpy as np
import onnx
import onnxruntime.transformers  # noqa: F401 - puts its folder on sys.path, once: a test that restores the path would lose it
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest_plugins = ["pytester"]

# The layer times of whoever runs the tests are neither read nor written.
_CACHE = tempfile.TemporaryDirectory(prefix="tensorrail-tests-")
os.environ["TENSORRAIL_CACHE"] = _CACHE.name


def pytest_collection_finish():
    """Keep the collector from looking at all that was imported, which lives to the end, again and again."""
    gc.collect()
    gc.freeze()
    _FROZEN.append(len(sys.modules))


@pytest.fixture(autouse=True)
def imports_are_frozen():
    """Do the same again after tests that import much, such as torch's exporter."""
    yield
    if len(sys.modules) > _FROZEN[-1] + _MANY:
        pytest_collection_finish()


_FROZEN: list[int] = []  # modules that were there at each time
_MANY = 50


@pytest.fixture(autouse=True)
def own_modules_are_forgotten(tmp_path_factory):
    """Take back the modules that a test writes and imports: another test may write one of the same name."""
    last = next(reversed(sys.modules))
    yield
    folder = str(tmp_path_factory.getbasetemp())
    for name in list(itertools.takewhile(lambda name: name != last, reversed(sys.modules))):  # those that are new
        if str(getattr(sys.modules[name], "__file__", "")).startswith(folder):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def as_if_on_another_processor(monkeypatch):
    """Choose ranks in the steps of another processor than this one, where `tests/environments.py` asks for it."""
    if block := os.environ.get("TENSORRAIL_TEST_CHANNEL_BLOCK"):
        monkeypatch.setattr("tensorrail_runtime.sessions.machine.Processor.channel_block", int(block))


# What these files share among their tests takes many seconds to make: run first, they are not split between two workers.
_FIRST = ("test_serving.py", "test_processes.py", "test_faults.py", "test_pipeline.py", "test_regress.py")


@pytest.hookimpl(tryfirst=True)  # before a random order, where one is asked for
def pytest_collection_modifyitems(items):
    """Leave out what needs a GPU where there is none, and run first what takes longest."""
    items.sort(key=lambda item: item.path.name not in _FIRST)
    if shutil.which("nvidia-smi") is None:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


@pytest.fixture
def cli(monkeypatch, capsys):
    """Return exit code, stdout and stderr of the command line, run in this process."""
    import tensorrail.cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["tensorrail", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            tensorrail.cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return call


@pytest.fixture(autouse=True)
def idle(monkeypatch):
    """Keep the times of layers although other tests run beside these."""
    monkeypatch.setattr("tensorrail_exporter.search.latency_table.BUSY", math.inf, raising=False)


@pytest.fixture
def in_this_process(monkeypatch):
    """Time models in this process: fresh ones make times that hold, which few tests need, and each imports everything."""

    def call(function, request, models=()):
        module, _, name = function.partition(":")
        if "timing" in request:
            request["timing"] |= {"warmup": 0.0, "seconds": 0.01}
        return getattr(importlib.import_module(module), name)(json.loads(json.dumps(request)))

    monkeypatch.setattr("tensorrail_runtime.measure.turns.fresh", call)


# What a training run imports, which takes ten seconds.
_PRELOADED = [
    "tensorrail.cli",
    "tensorrail_trainer.run.pipeline",
    "sklearn.datasets",
    "sklearn.model_selection",
    "torch._dynamo",
]


@pytest.fixture(scope="session")
def forkserver():
    """Start a server from which processes are forked that have imported all that a training run needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()
    return context


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def make_model(nodes, weights, inputs, outputs, opset=20):
    """Return a checked model: `inputs` and `outputs` map names to shapes, `weights` names to arrays."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def small_network(rng: np.random.Generator) -> onnx.ModelProto:
    """Conv 16→32 with bias, Relu, pooling, Gemm 32→10; dynamic batch."""
    weights = {
        "conv.weight": rng.standard_normal((32, 16, 3, 3)).astype(np.float32),
        "conv.bias": rng.standard_normal(32).astype(np.float32),
        "fc.weight": rng.standard_normal((10, 32)).astype(np.float32),
        "fc.bias": rng.standard_normal(10).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["a"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("GlobalAveragePool", ["b"], ["c"], "pool"),
        helper.make_node("Flatten", ["c"], ["d"], "flatten"),
        helper.make_node("Gemm", ["d", "fc.weight", "fc.bias"], ["y"], "fc", transB=1),
    ]
    return make_model(nodes, weights, {"x": ["batch", 16, 8, 8]}, {"y": ["batch", 10]})


@pytest.fixture
def small_model(rng) -> onnx.ModelProto:
    return small_network(rng)


@pytest.fixture
def small_path(small_model, tmp_path: Path) -> Path:
    path = tmp_path / "dense.onnx"
    onnx.save(small_model, path)
    return path
