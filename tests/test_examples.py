"""Every script of examples/ runs on its small default input and says what came of it."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import onnx
import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.fixture
def run(tmp_path, in_this_process, monkeypatch, capsys):
    """Return a function that runs an example in an empty folder: its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENSORRAIL_CACHE", str(tmp_path / "cache"))
    threads, state = torch.get_num_threads(), torch.get_rng_state()

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        code = 0
        try:
            runpy.run_path(str(FOLDER / name), run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        return code, capsys.readouterr().out

    yield call
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


def percent(text, what):
    return float(re.search(rf"^{what}: ([\d.]+) %", text, re.MULTILINE)[1])


def test_own_loop(run, tmp_path):
    code, text = run("own_loop.py", "--epochs", "5")
    assert code == 0
    residuals = [float(one) for one in re.findall(r"primal residual ([\d.]+)", text)]
    assert residuals[-1] < residuals[0]
    assert percent(text, "fine-tuned") > 60  # eight classes: chance is 12.5
    assert percent(text, "fine-tuned") > percent(text, "dense control, as many epochs") - 10
    assert float(re.search(r"numerical error (\S+);", text)[1]) < 1e-4
    for name in ("dense.onnx", "model.onnx"):
        onnx.checker.check_model(onnx.load(tmp_path / "runs" / "own-loop" / name), full_check=True)


def test_pretrained_says_in_one_line_what_is_missing(run, monkeypatch, tmp_path):
    for name in ("torchvision", "timm"):
        monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed
        code, text = run("pretrained.py", f"{name}/resnet18")
        assert (code, text) == (0, f"skipped: {name} is not installed (pip install {name})\n")
    code, _ = run("pretrained.py", "resnet18")
    assert code == "expected torchvision/NAME or timm/NAME, got 'resnet18'"
    assert not list(tmp_path.glob("*.onnx"))


def test_pretrained_on_a_network_of_the_packages_kind(run, monkeypatch, tmp_path):
    # The package's own function, answered by a small network with the same names of layers: the package itself is large.
    from tensorrail_trainer.networks.resnets import BasicBlock

    class Small(torch.nn.Sequential):
        def __init__(self):
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 24, 3, 2)
            self.layer1 = torch.nn.Sequential(BasicBlock(24, 32, 2), BasicBlock(32, 32, 1))
            self.pool, self.flat = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
            self.fc = torch.nn.Linear(32, 10)

    asked = []

    def get_model(name, weights):
        asked.append((name, weights))
        return Small()

    package = ModuleType("torchvision")
    package.models = SimpleNamespace(get_model=get_model)
    monkeypatch.setitem(sys.modules, "torchvision", package)
    code, text = run("pretrained.py", "--image", "32", "--seconds", "0.2")
    assert code == 0
    assert asked == [("resnet18", None)]
    assert float(re.search(r"parameters ÷ ([\d.]+)", text)[1]) > 2.2  # of the graph, where batch norm's statistics count, too
    assert "speed-up" in text
    folder = tmp_path / "runs" / "pretrained"
    assert (folder / "model.onnx").stat().st_size < (folder / "dense.onnx").stat().st_size / 2


@pytest.mark.slow
def test_onnx_file(run, tmp_path):
    code, text = run("onnx_file.py", "--seconds", "0.3", "--latency", "1.2")
    assert code in (0, 1)  # 1: not measured to be faster, which nothing here depends on
    if "cannot be met" in text or "every layer stays dense" in text:
        return
    assert float(re.search(r"FLOPs ÷ ([\d.]+)", text)[1]) > 1
    assert "body.0: " in text
    assert float(re.search(r"differ by ([\d.]+) \(relative L2\)", text)[1]) < 0.5
    onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"), full_check=True)


def test_transformers_text(run, tmp_path):
    pytest.importorskip("transformers")
    code, text = run("transformers_text.py", "--epochs", "2", "--out", str(tmp_path / "out"))
    assert code == 0
    assert percent(text, "cut into cores and fine-tuned") > 40  # four classes: chance is 25
    assert float(re.search(r"differs from the module by (\S+);", text)[1]) < 1e-4
    onnx.checker.check_model(onnx.load(tmp_path / "out" / "model.onnx"), full_check=True)


def test_lightning_images(run, tmp_path):
    pytest.importorskip("lightning")
    code, text = run("lightning_images.py", "--epochs", "3", "--out", str(tmp_path / "out"))
    assert code == 0
    assert percent(text, "cut into cores and fine-tuned") > 80
    assert float(re.search(r"differs from the module by (\S+);", text)[1]) < 1e-4
    onnx.checker.check_model(onnx.load(tmp_path / "out" / "model.onnx"), full_check=True)


def test_triton_folder(run, tmp_path):
    code, text = run("triton_folder.py")
    assert code == 0
    assert "max_batch_size: 16" in text
    made = sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "repository").rglob("*.*"))
    assert made == ["repository/factored/1/model.onnx", "repository/factored/2/model.onnx", "repository/factored/config.pbtxt"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_an_example_says_at_its_top_what_it_is(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith('"""')
    assert 20 < len(first) <= 128
    assert f"]({path.name})" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_every_example_is_tested():
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'run("{path.name}"' in text for path in SCRIPTS)
