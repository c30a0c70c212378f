"""What happens to a run when the machine fails it: killed, a full disk, an unwritable folder, a truncated file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml

from tensorrail_runtime import records
from tensorrail_trainer.checkpoints import CheckpointError, Checkpoints

RECIPE = {
    "version": 1,
    "name": "small",
    "data": {"name": "digits", "args": {"test_fraction": 0.5, "size": 16}},
    "model": {"name": "small_resnet", "args": {"widths": [8], "blocks": 1, "hidden": 16}},
    "plan": [{"layers": "stages.*.conv?", "ranks": 4}],
    "train": {
        "batch": 32,
        "augment": {"shift": 1},
        "ema": 0.9,
        "dense": {"epochs": 2, "lr": 0.05},
        "admm": {"epochs": 2, "lr": 0.05, "rho": 0.1, "every_steps": 9},
        "finetune": {"epochs": 2, "lr": 0.02},
    },
}
RESULTS = ("plan.json", "cores.safetensors", "dense.safetensors")


def command(folder, name, *more):
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return {
        "args": [sys.executable, "-m", "tensorrail", "train", "recipe.yaml", "--folder", name, *more],
        "cwd": folder,
        "env": {**os.environ, "OMP_NUM_THREADS": "1"},
        "text": True,
    }


def to_the_end(folder, name, *more):
    return subprocess.run(**command(folder, name, *more), capture_output=True, timeout=300, check=False)


def test_a_run_killed_in_every_phase_ends_as_one_that_nothing_disturbed(tmp_path):
    whole = to_the_end(tmp_path, "whole")
    assert whole.returncode == 0, whole.stderr
    for number, phase in enumerate(("dense", "admm", "finetune", "control")):
        more = ["--resume"] if number else []
        with subprocess.Popen(**command(tmp_path, "broken", *more), stdout=subprocess.PIPE) as process:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith(f"{phase:<9} epoch 1/"):
                    process.send_signal(signal.SIGKILL)
                    break
        assert process.returncode == -signal.SIGKILL, "it was over before it was killed"
        assert not any(line.startswith("dense     epoch 1/") for line in lines) or phase == "dense"  # nothing is trained twice
    last = to_the_end(tmp_path, "broken", "--resume")
    assert last.returncode == 0, last.stderr
    for name in RESULTS:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes(), name
    assert not list((tmp_path / "broken").rglob("*.part"))


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path)
    store.save("admm", 1, {"value": torch.tensor(1)})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(
        CheckpointError, match=r"admm-0002.pt cannot be written \(No space left on device\); admm-0001.pt is whole"
    ):
        store.save("admm", 2, {"value": torch.tensor(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["admm-0001.pt"]
    assert store.latest("admm")["epoch"] == 1
    with pytest.raises(CheckpointError, match=r"dense-0001.pt cannot be written .*; of phase dense none was written before"):
        store.save("dense", 1, {"value": torch.tensor(1)})


def test_a_run_on_a_full_disk_ends_in_one_line(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    # A file-size limit is a disk that is full for every file above it: SIGXFSZ is ignored by Python, the write fails.
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
        "import tensorrail.cli; sys.argv = ['tensorrail', 'train', 'recipe.yaml', '--folder', 'run']; tensorrail.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("tensorrail: ")]
    assert "dense-0001.pt cannot be written (File too large)" in line
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").rglob("*.part"))


def test_an_unwritable_folder_ends_in_one_line(tmp_path):
    (tmp_path / "run").write_text("a file where the folder should be")
    done = to_the_end(tmp_path, "run")
    assert done.returncode == 2
    assert done.stderr.startswith("tensorrail: run")
    assert done.stderr.strip().count("\n") == 0
