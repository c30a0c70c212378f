"""What happens to a run when the machine fails it: killed, a full disk, an unwritable folder, a truncated file."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from small_recipe import small_recipe

import tensorrail.cli
from tensorrail_runtime import records
from tensorrail_runtime.errors import CheckpointError
from tensorrail_trainer.training.checkpoints import Checkpoints

RECIPE = small_recipe(
    augment={"shift": 1},
    ema=0.9,
    dense={"epochs": 2, "lr": 0.05},
    admm={"epochs": 2, "lr": 0.05, "rho": 0.1, "every_steps": 9},
    finetune={"epochs": 2, "lr": 0.02},
)
RESULTS = ("plan.json", "cores.safetensors", "dense.safetensors")


def train(folder, most, out, error, options):
    """Be a process of its own that runs `tensorrail train recipe.yaml` and can write no file of more than `most` bytes."""
    os.dup2(out.fileno(), 1)
    os.dup2(error.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # not those forked
    os.chdir(folder)
    if most is not None:
        sys.dont_write_bytecode = True  # Python would leave files of bytecode that are cut off
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is not looked through at the end of every phase
    sys.argv = ["tensorrail", "train", "recipe.yaml", *options]
    tensorrail.cli.main()


@pytest.fixture
def started(forkserver, tmp_path):
    """Return a function that starts a run in a process of its own: the process, its stdout and its stderr as files."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))

    @contextlib.contextmanager
    def start(name, *options, most=None):
        (out, to_out), (error, to_error) = (forkserver.Pipe(duplex=False) for _ in range(2))
        process = forkserver.Process(target=train, args=(tmp_path, most, to_out, to_error, ["--folder", name, *options]))
        process.start()
        to_out.close()
        to_error.close()
        try:
            text = {"encoding": "utf-8", "closefd": False}
            with os.fdopen(out.fileno(), **text) as lines, os.fdopen(error.fileno(), **text) as complaints:
                yield process, lines, complaints
                process.join(300)
        finally:
            process.kill()
            process.join()

    return start


@pytest.fixture
def to_the_end(started):
    """Return a function that runs to the end: its exit code and what it printed to stderr."""

    def run(name, *options, **limits):
        with started(name, *options, **limits) as (process, lines, complaints):
            lines.read()
            stderr = complaints.read()
        return SimpleNamespace(returncode=process.exitcode, stderr=stderr)

    return run


def test_a_run_killed_in_every_phase_ends_as_one_that_nothing_disturbed(started, to_the_end, tmp_path):
    whole = to_the_end("whole")
    assert whole.returncode == 0, whole.stderr
    for number, phase in enumerate(("dense", "admm", "finetune", "control")):
        with started("broken", *["--resume"][:number]) as (process, stdout, _):
            lines = []
            for line in stdout:
                lines.append(line)
                if line.startswith(f"{phase} epoch 1/"):
                    os.kill(process.pid, signal.SIGKILL)
                    break
        assert process.exitcode == -signal.SIGKILL, "it was over before it was killed"
        assert not any(line.startswith("dense     epoch 1/") for line in lines) or phase == "dense"  # nothing is trained twice
    last = to_the_end("broken", "--resume")
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
        CheckpointError, match=r"admm-0002.pt cannot be written \(No space left .*\); admm-0001.pt is the last complete one"
    ):
        store.save("admm", 2, {"value": torch.tensor(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["admm-0001.pt"]
    assert store.latest("admm")["epoch"] == 1
    with pytest.raises(CheckpointError, match=r"dense-0001.pt cannot be written .*; phase dense has no earlier one"):
        store.save("dense", 1, {"value": torch.tensor(1)})


def test_a_run_on_a_full_disk_ends_in_one_line(to_the_end, tmp_path):
    # A file-size limit is a disk that is full for every file above it: SIGXFSZ is ignored by Python, the write fails.
    done = to_the_end("run", most=20000)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("tensorrail: ")]
    assert "dense-0001.pt cannot be written (File too large)" in line
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").rglob("*.part"))


def test_an_unwritable_folder_ends_in_one_line(to_the_end, tmp_path):
    (tmp_path / "run").write_text("a file where the folder should be")
    done = to_the_end("run")
    assert done.returncode == 2
    assert done.stderr.startswith("tensorrail: run")
    assert done.stderr.strip().count("\n") == 0
