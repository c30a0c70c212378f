"""Two processes (gloo, on the CPU) against one: the same batches, statistics, gradients, projections, and results."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import socket
import sys
import time
import traceback
from datetime import timedelta

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from small_recipe import small_recipe
from torch import distributed, multiprocessing, nn

import tensorrail.cli
from tensorrail_exporter import Plan
from tensorrail_runtime.errors import PlanError
from tensorrail_trainer import ADMM, plan_layers
from tensorrail_trainer.admm.moments import input_roots
from tensorrail_trainer.processes import shared_out, sync_batch_norm, unsync_batch_norm

DEADLINE = 120  # seconds until processes that do not meet, or do not end, are a failure
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def joined(rank, meeting):
    """Be one of two: they meet by a file, so that no port can be lost to another program, and talk over loopback."""
    distributed.init_process_group(
        "gloo", init_method=meeting.as_uri(), rank=rank, world_size=2, timeout=timedelta(seconds=DEADLINE)
    )
    try:
        yield
    finally:
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


def step_of_one(rank):
    model = sync_batch_norm(network())
    admm = admm_of(model)
    calls = []
    project = admm._project
    admm._project = lambda layer, tensor: calls.append(layer.name) or project(layer, tensor)
    wrapped = nn.parallel.DistributedDataParallel(model)
    residuals = step(wrapped, even()[rank::2], admm)
    return {
        "state": model.state_dict(),
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "Z": admm.Z,
        "calls": calls,
        "residuals": {r.layer: r.primal for r in residuals},
    }


def batch():
    return torch.randn(7, 3, 9, 9, generator=torch.Generator().manual_seed(1))  # four samples for one, three for the other


def even():
    return torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def test_two_processes_compute_what_one_computes(of_two):
    model = network()
    admm = admm_of(model)
    residuals = step(model, even(), admm)
    found = of_two("step_of_one")
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


def uneven(rank):
    model = sync_batch_norm(network())
    return {"out": model(batch()[rank::2]).detach(), "state": model.state_dict()}


def test_batch_norm_takes_shares_of_unequal_size(of_two):
    model = network()
    expected = model(batch()).detach()
    for rank, found in enumerate(of_two("uneven")):
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


def normalised(rank):
    found = {}
    for name, made in NORMS.items():
        norm, x = made()
        sync_batch_norm(norm)
        found[name] = (norm(x[rank::2]).detach(), norm.running_var)
    return found


def test_batch_norm_of_one_and_of_three_dimensions_is_shared_as_well(of_two):
    answers = of_two("normalised")
    for name, made in NORMS.items():
        norm, x = made()
        expected = norm(x).detach()
        for rank in range(2):
            out, variance = answers[rank][name]
            torch.testing.assert_close(
                out, expected[rank::2], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
            torch.testing.assert_close(variance, norm.running_var)


def metric_of_two(rank):
    """Three batches, with and without an interruption after the second: each process sees other inputs."""
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
    return found


def test_the_metric_of_two_processes_is_resumed_exactly(of_two):
    found = [one for answers in of_two("metric_of_two") for one in answers]
    for other in found[1:]:
        assert torch.equal(other["Z"], found[0]["Z"])
        assert torch.equal(other["root"], found[0]["root"])


def unequal_shares():
    """Return the inputs of each of two processes: batches of 5 and 2 rows, and one of 20."""
    rows = torch.randn(27, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)
    return rows[:7].split(5), rows[7:].split(20)


def given_to_two(rank):
    model = nn.Sequential(nn.Linear(6, 4))
    return input_roots(model, Plan(layers=plan_layers(model, "0", ranks=2)), unequal_shares()[rank])["0"].root


def test_inputs_given_to_two_processes_count_by_their_positions(of_two):
    rows = torch.cat([x for share in unequal_shares() for x in share])
    second = rows.T @ rows
    for root in of_two("given_to_two"):
        torch.testing.assert_close(root @ root, second * (6 / second.trace()), atol=1e-3, rtol=1e-3)


def test_work_is_shared_out_by_its_cost(monkeypatch):
    monkeypatch.setattr("tensorrail_trainer.processes.world", lambda _: 2)
    assert shared_out({"a": 10, "b": 9, "c": 2, "d": 1}) == {"a": 0, "b": 1, "c": 1, "d": 0}


def folds(rank):
    """Each process trains a network of its own: without a group they are told so, with one each projects its own weights."""
    torch.manual_seed(rank)
    groups = [distributed.new_group([each]) for each in range(2)]
    found = {}
    for name, plan_rank in (("weights", 3), ("plans", 3 - rank)):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6))
        plan = Plan(layers=(*plan_layers(model, "0", format="svd", ranks=plan_rank), *plan_layers(model, "1", ranks=2)))
        try:
            ADMM(model, plan).update()
        except PlanError as error:
            found[name] = str(error)
    admm = ADMM(model, plan, group=groups[rank])
    before = {name: z.clone() for name, z in admm.Z.items()}
    admm.update()
    found["moved"] = max(float((admm.Z[name] - z).norm() / z.norm()) for name, z in before.items())
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(8, 8))
    shared = ADMM(twin, Plan(layers=plan_layers(twin, "0", ranks=2)), metric="activation")
    twin(torch.randn(4, 8, generator=torch.Generator().manual_seed(rank)))
    shared.update()
    found["Z"] = shared.Z["0"]
    return found


def test_processes_with_networks_of_their_own_are_told_so_and_take_a_group(of_two):
    found = of_two("folds")
    for one in found:
        assert "the processes of one group hold different weights of layer 0, and each would get projections" in one["weights"]
        assert "the processes of one group hold different plans" in one["plans"]
        assert one["moved"] < 1e-5
    assert torch.equal(found[0]["Z"], found[1]["Z"])


RECIPE = small_recipe(
    augment={"shift": 1, "flip": True, "cutout": 3},
    dense={"epochs": 1, "lr": 0.05},
    admm={"epochs": 1, "lr": 0.05, "rho": 0.1},
    finetune={"epochs": 1, "lr": 0.02},
    control="none",
)


def trained_by(count, rank, folder, port):
    """Run `tensorrail train` as one of `count` processes; return its exit code and what it printed to stdout and stderr."""
    os.environ |= {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank)}  # as torchrun sets them
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    sys.argv = ["tensorrail", "train", str(folder / "recipe.yaml"), "--folder", str(folder / f"run{count}")]
    before = [(folder / f"{name}-{rank}").stat().st_size for name in ("out", "error")]
    code = 0
    try:
        tensorrail.cli.main()
    except SystemExit as ended:
        code = ended.code or 0
    if distributed.is_initialized():
        distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    sys.stdout.flush()
    sys.stderr.flush()
    return code, *(
        (folder / f"{name}-{rank}").read_text()[start:] for name, start in zip(("out", "error"), before, strict=True)
    )


JOBS = (step_of_one, uneven, normalised, metric_of_two, given_to_two, folds)


def do_all(rank, folder, ports):
    """Be one of two processes: do every job and leave its result, or how it failed, in a file of its own."""
    for descriptor, name in ((1, "out"), (2, "error")):
        os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK
    torch.set_num_threads(1)
    gc.freeze()

    def meet(job):
        with joined(rank, folder / f"meeting-{job.__name__}"):
            return job(rank)

    jobs = {job.__name__: lambda job=job: meet(job) for job in JOBS}
    jobs["trained by two"] = lambda: trained_by(2, rank, folder, ports[0])
    if rank == 0:
        jobs["trained by one"] = lambda: trained_by(1, 0, folder, ports[1])
    for name, job in jobs.items():
        try:
            result = job()
        except Exception:  # noqa: BLE001 - its test says what it was
            result = traceback.format_exc()
        torch.save(result, folder / f"{name}-{rank}.pt")


@pytest.fixture(scope="module")
def pair(forkserver, tmp_path_factory):
    """The folder in which two processes, started once for all tests, left what every job gave."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    processes = multiprocessing.start_processes(
        do_all, (folder, (free_port(), free_port())), nprocs=2, join=False, start_method=forkserver.get_start_method()
    )
    end = time.monotonic() + 2 * DEADLINE
    try:
        while not processes.join(max(0.0, end - time.monotonic())):
            assert time.monotonic() < end, "two processes do not end"
    finally:
        for process in processes.processes:
            process.kill()
    return folder


@pytest.fixture
def of_two(pair):
    """Return a function: what a job gave in each of the two processes, by its name."""

    def answers(name, ranks=(0, 1)):
        found = [torch.load(pair / f"{name}-{rank}.pt") for rank in ranks]
        failed = [f"process {rank}: {one}" for rank, one in enumerate(found) if isinstance(one, str)]
        assert not failed, "\n".join(failed)
        return found

    return answers


def test_a_recipe_launched_with_two_processes_ends_as_with_one(pair, of_two):
    for name, ranks in (("trained by one", (0,)), ("trained by two", (0, 1))):
        (code, out, error), *others = of_two(name, ranks)
        assert code == 0, error
        assert out.count("finetune epoch 1/1") == 1
        assert [(code, out) for code, out, _ in others] == [(0, "")] * len(others)  # one that trained alone would speak
        assert "Warning" not in error
    for name in ("dense.safetensors", "cores.safetensors"):
        one, two = (load_file(pair / f"run{count}" / name) for count in (1, 2))
        assert one.keys() == two.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, rtol=2e-3, atol=2e-4, msg=lambda text, key=key: f"{key}: {text}")
