"""Two processes (gloo, on the CPU) against one: the same batches, statistics, gradients, projections, and results."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import distributed, multiprocessing, nn

from tensorrail_exporter import Plan
from tensorrail_trainer import ADMM, plan_layers
from tensorrail_trainer.processes import shared_out, sync_batch_norm, unsync_batch_norm

DEADLINE = 120  # seconds until processes that do not meet, or do not end, are a failure
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def joined(rank, folder):
    """Be one of two: they meet by a file, so that no port can be lost to another program, and talk over loopback."""
    os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2, timeout=timedelta(seconds=DEADLINE)
    )
    yield
    distributed.destroy_process_group()


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12, affine=False)
    )


def step(model, x, admm):
    loss = model(x).square().mean() + model(x).mean() + admm.penalty()
    loss.backward()
    return admm.update()


def admm_of(model):
    return ADMM(model, Plan(layers=(*plan_layers(model, "0", ranks=3), *plan_layers(model, "3", ranks=3))), rho=0.1)


def work(rank, folder):
    with joined(rank, folder):
        step_of_one(rank, folder)


def step_of_one(rank, folder):
    model = sync_batch_norm(network())
    admm = admm_of(model)
    calls = []
    project = admm._project
    admm._project = lambda layer, tensor: calls.append(layer.name) or project(layer, tensor)
    wrapped = nn.parallel.DistributedDataParallel(model)
    residuals = step(wrapped, batch()[rank::2], admm)
    torch.save(
        {
            "state": model.state_dict(),
            "gradients": {name: p.grad for name, p in model.named_parameters()},
            "Z": admm.Z,
            "calls": calls,
            "residuals": {r.layer: r.primal for r in residuals},
        },
        folder / f"{rank}.pt",
    )


def batch():
    return torch.randn(7, 3, 9, 9, generator=torch.Generator().manual_seed(1))  # four samples for one, three for the other


def even():
    return torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def test_two_processes_compute_what_one_computes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "batch", even)
    model = network()
    admm = admm_of(model)
    residuals = step(model, even(), admm)
    multiprocessing.spawn(work_even, (tmp_path,), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for one in found:
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(one["state"][name], tensor, rtol=1e-5, atol=1e-6)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(one["gradients"][name], parameter.grad, rtol=1e-4, atol=1e-6)
        for name, z in admm.Z.items():
            torch.testing.assert_close(one["Z"][name], z, rtol=1e-5, atol=1e-6)
        assert one["residuals"] == pytest.approx({r.layer: r.primal for r in residuals}, rel=1e-5)
    assert sorted(found[0]["calls"] + found[1]["calls"]) == ["0", "3"]  # each projected by one of them
    assert found[0]["calls"]
    assert found[1]["calls"]


def work_even(rank, folder):
    globals()["batch"] = even
    work(rank, folder)


def uneven(rank, folder):
    with joined(rank, folder):
        model = sync_batch_norm(network())
        torch.save({"out": model(batch()[rank::2]).detach(), "state": model.state_dict()}, folder / f"{rank}.pt")


def test_batch_norm_takes_shares_of_unequal_size(tmp_path):
    model = network()
    expected = model(batch()).detach()
    multiprocessing.spawn(uneven, (tmp_path,), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found["out"], expected[rank::2], rtol=1e-4, atol=1e-5)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(found["state"][name], tensor, rtol=1e-5, atol=1e-6)


def test_synchronising_is_undone_and_does_nothing_alone():
    model, x = network(), even()
    plain, synced = copy.deepcopy(model), sync_batch_norm(copy.deepcopy(model))
    assert [type(module).__name__ for module in synced.modules()].count("SyncedBatchNorm2d") == 2
    assert torch.equal(plain(x), synced(x))
    assert [type(module) for module in unsync_batch_norm(synced).modules()] == [type(module) for module in plain.modules()]


class OwnBatchNorm(nn.BatchNorm2d):
    pass


def test_batch_norm_of_an_unknown_class_is_named_and_torchs_own_stays():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), OwnBatchNorm(8))
    with pytest.raises(ValueError, match=r"layer 1: OwnBatchNorm cannot share its statistics .* sync_batch_norm: false"):
        sync_batch_norm(model)
    assert type(sync_batch_norm(nn.SyncBatchNorm(8))) is nn.SyncBatchNorm


NORMS = {
    "1": lambda: (nn.BatchNorm1d(3), torch.randn(7, 3, generator=torch.Generator().manual_seed(1))),
    "1 over a length": lambda: (nn.BatchNorm1d(3), torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(1))),
    "3": lambda: (nn.BatchNorm3d(3), torch.randn(7, 3, 2, 4, 5, generator=torch.Generator().manual_seed(1))),
}


def normalised(rank, folder):
    with joined(rank, folder):
        found = {}
        for name, made in NORMS.items():
            norm, x = made()
            sync_batch_norm(norm)
            found[name] = (norm(x[rank::2]).detach(), norm.running_var)
        torch.save(found, folder / f"{rank}.pt")


def test_batch_norm_of_one_and_of_three_dimensions_is_shared_as_well(tmp_path):
    multiprocessing.spawn(normalised, (tmp_path,), nprocs=2)
    for name, made in NORMS.items():
        norm, x = made()
        expected = norm(x).detach()
        for rank in range(2):
            out, variance = torch.load(tmp_path / f"{rank}.pt")[name]
            torch.testing.assert_close(
                out, expected[rank::2], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
            torch.testing.assert_close(variance, norm.running_var)


def metric_of_two(rank, folder):
    """Three batches, with and without an interruption after the second: each process sees other inputs."""
    with joined(rank, folder):
        found = []
        for interrupted in (False, True):
            model = nn.Sequential(nn.Linear(6, 4))
            torch.manual_seed(0)
            nn.init.normal_(model[0].weight)
            admm = ADMM(model, Plan(layers=plan_layers(model, "0", ranks=2)), rho=0.1, metric="activation")
            for step in range(3):
                generator = torch.Generator().manual_seed(10 * rank + step)
                model(torch.randn(8, 6, generator=generator) * (1 + rank) * torch.arange(1, 7))
                admm.synchronize()
                if interrupted and step == 1:
                    state = [admm.state_dict()]
                    distributed.broadcast_object_list(state, 0)  # what the first process saved
                    admm.close()
                    admm = ADMM(model, Plan(layers=plan_layers(model, "0", ranks=2)), rho=0.1, metric="activation")
                    admm.load_state_dict(state[0])
            admm.update()
            found.append({"Z": admm.Z["0"], "root": admm.roots["0"].root})
        torch.save(found, folder / f"{rank}.pt")


def test_the_metric_of_two_processes_is_resumed_exactly(tmp_path):
    multiprocessing.spawn(metric_of_two, (tmp_path,), nprocs=2)
    found = [one for rank in range(2) for one in torch.load(tmp_path / f"{rank}.pt")]
    for other in found[1:]:
        assert torch.equal(other["Z"], found[0]["Z"])
        assert torch.equal(other["root"], found[0]["root"])


def test_work_is_shared_out_by_its_cost(monkeypatch):
    monkeypatch.setattr("tensorrail_trainer.processes.world", lambda: 2)
    assert shared_out({"a": 10, "b": 9, "c": 2, "d": 1}) == {"a": 0, "b": 1, "c": 1, "d": 0}


RECIPE = {
    "version": 1,
    "name": "small",
    "data": {"name": "digits", "args": {"test_fraction": 0.8, "size": 16}},
    "model": {"name": "small_resnet", "args": {"widths": [8], "blocks": 1, "hidden": 16}},
    "plan": [{"layers": "stages.*.conv?", "ranks": 4}],
    "train": {
        "batch": 32,
        "augment": {"shift": 1, "flip": True, "cutout": 3},
        "dense": {"epochs": 1, "lr": 0.05},
        "admm": {"epochs": 1, "lr": 0.05, "rho": 0.1},
        "finetune": {"epochs": 1, "lr": 0.02},
        "control": "none",
    },
}


def to_their_end(command, folder, environments):
    """Return exit code, stdout and stderr of as many processes as there are environments, which run side by side."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, cwd=folder, env=one, start_new_session=True, **pipes) for one in environments]
    try:
        said = [process.communicate(timeout=2 * DEADLINE) for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return [(process.returncode, *both) for process, both in zip(started, said, strict=True)]


def test_a_recipe_launched_with_two_processes_ends_as_with_one(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK, "ACCELERATE_USE_CPU": "true"}
    for count in (1, 2):
        shared |= {
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }  # as torchrun sets them
        environments = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        command = [sys.executable, "-m", "tensorrail", "train", "recipe.yaml", "--folder", f"run{count}"]
        (code, out, error), *others = to_their_end(command, tmp_path, environments)
        assert code == 0, error
        assert out.count("finetune  epoch 1/1") == 1
        assert [(code, out) for code, out, _ in others] == [(0, "")] * (count - 1)  # one that trained alone would speak
        assert "Warning" not in error
    for name in ("dense.safetensors", "cores.safetensors"):
        one, two = (load_file(tmp_path / f"run{count}" / name) for count in (1, 2))
        assert one.keys() == two.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, rtol=2e-3, atol=2e-4, msg=lambda text, key=key: f"{key}: {text}")
