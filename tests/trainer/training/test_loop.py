"""What a recipe can ask of the training loop, each on a small network and made data."""

from __future__ import annotations

import copy
import functools
import shutil

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from cases import relative
from onnx import TensorProto
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from tensorrail_exporter import Plan
from tensorrail_runtime.errors import PlanError, TrainingError
from tensorrail_trainer import ADMM, plan_layers, to_onnx
from tensorrail_trainer.data import Dataset, InMemory
from tensorrail_trainer.layers.swap import swap
from tensorrail_trainer.recipes.recipe import Named, NamedModel, PlanRule, Recipe
from tensorrail_trainer.recipes.schedules import AdmmSchedule, Distillation, Schedule, Training
from tensorrail_trainer.training import loop
from tensorrail_trainer.training.checkpoints import Checkpoints
from tensorrail_trainer.training.cuda_graph import Replay
from tensorrail_trainer.training.loop import Phase, evaluate, make_optimizer, train


@pytest.fixture
def data():
    """Two classes of 8×8 images that differ by the sign of a pattern."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(192) % 2
    pattern = torch.randn(3, 8, 8, generator=generator)
    x = torch.randn(192, 3, 8, 8, generator=generator) + 0.5 * (2 * y[:, None, None, None] - 1) * pattern
    return Dataset("made", 2, InMemory(x[:128], y[:128]), InMemory(x[128:], y[128:]))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.Flatten(),
        nn.Linear(1024, 2),
    )  # fmt: skip


def recipe(**training):
    return Recipe(
        version=1,
        name="made",
        data=Named(name="digits"),
        model=NamedModel(name="small_resnet"),
        plan=(PlanRule(layers="*", ranks=4),),
        train=Training(
            **{"batch": 32, "dense": Schedule(epochs=1, lr=0.01), "finetune": Schedule(epochs=1, lr=0.01)} | training
        ),
    )


def fit(tmp_path, data, phase, **training):
    rows = []
    model = train(
        phase, recipe(**training), data, Accelerator(), Checkpoints(tmp_path), on_epoch=lambda row, _: rows.append(row)
    )
    return model, rows


def admm_of(model, ranks=4, rho=0.05):
    return ADMM(model, Plan(layers=plan_layers(model, "3", ranks=ranks)), rho)


def test_a_phase_learns(tmp_path, data):
    model, rows = fit(tmp_path, data, Phase("dense", network(), Schedule(epochs=4, lr=0.05, warmup=0.5)))
    assert rows[-1].loss < rows[0].loss
    assert rows[-1].test_accuracy > 90
    assert evaluate(model, data.test, Accelerator()) == rows[-1].test_accuracy


@pytest.mark.parametrize(
    "training",
    [{"mixup": 0.4}, {"ema": 0.9}, {"precision": "bf16"}, {"distill": Distillation()}, {"mixup": 0.2, "ema": 0.5}],
    ids="+".join,
)
def test_an_interrupted_phase_ends_as_an_uninterrupted_one(tmp_path, data, training):
    for folder in ("whole", "broken"):
        (tmp_path / folder).mkdir()
    schedule = AdmmSchedule(epochs=3, lr=0.05, rho=0.01, rho_end=0.1, every_steps=2, clip=1.0)

    def phase():
        model = network()
        return Phase("admm", model, schedule, admm_of(model), copy.deepcopy(model) if "distill" in training else None)

    whole, rows = fit(tmp_path / "whole", data, phase(), **training)

    def stop(row, _):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(phase(), recipe(**training), data, Accelerator(), Checkpoints(tmp_path / "broken"), stop)
    broken, rest = fit(tmp_path / "broken", data, phase(), **training)
    assert [row.epoch for row in rest] == [2, 3]
    assert [row.rho for row in rows] == pytest.approx([10**-1.8, 10**-1.4, 0.1])  # six updates, two an epoch
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, broken.state_dict()[name]), name


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_that_is_replayed_reads_every_change_where_it_lies(tmp_path, data, optimizer, monkeypatch):
    """A stand-in for a CUDA graph: what the fourth step read and wrote, by its addresses, is read and written ever after."""
    schedule = AdmmSchedule(epochs=3, lr=0.05, rho=0.01, rho_end=0.1, every_steps=2, clip=1.0, optimizer=optimizer)
    addresses = []

    class Replayed(Replay):
        def __call__(self, step, x, y):
            job = step.__self__
            read = [*job.phase.admm._targets.values(), job.phase.admm._half_rho, *job.phase.model.parameters()]
            read += [group["lr"] for group in job.optimizer.param_groups]
            addresses.append([tensor.data_ptr() for tensor in read])
            return step(x, y)

    def replay(settings, optimizer, device):
        for group in optimizer.param_groups:  # the same kernels, which round alike
            group.update(fused=True, foreach=False)
            if settings.cuda_graph:
                group.update(lr=torch.tensor(group["lr"], dtype=torch.float64))
        return Replayed() if settings.cuda_graph else None

    monkeypatch.setattr(loop, "_replay", replay)
    found = []
    for asked in (False, True):
        model, folder = network(), tmp_path / str(asked)
        folder.mkdir()
        trained, rows = fit(folder, data, Phase("admm", model, schedule, admm_of(model)), cuda_graph=asked)
        found.append((trained.state_dict(), [row.loss for row in rows]))
    assert len(addresses) == 12
    assert all(row == addresses[0] for row in addresses)
    assert found[0][1] == found[1][1]
    for name, values in found[0][0].items():
        assert torch.equal(values, found[1][0][name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no GPU here")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("training", [{}, {"ema": 0.9}, {"distill": Distillation()}], ids="+".join)
def test_on_a_gpu_a_graph_trains_as_launches_one_by_one_do(tmp_path, data, optimizer, training):
    schedule = AdmmSchedule(epochs=3, lr=0.02, rho=0.01, rho_end=0.1, every_steps=2, clip=1.0, optimizer=optimizer)
    found = []
    for asked in (False, True):
        model, folder = network().cuda(), tmp_path / str(asked)
        folder.mkdir()
        phase = Phase("admm", model, schedule, admm_of(model), copy.deepcopy(model) if "distill" in training else None)
        found.append(fit(folder, data.to(torch.device("cuda")), phase, cuda_graph=asked, **training)[1])
    assert [row.loss for row in found[0]] == pytest.approx([row.loss for row in found[1]], rel=1e-3)


def test_a_checkpoint_of_a_graph_goes_on_without_one(tmp_path, data, monkeypatch):
    schedule = Schedule(epochs=2, lr=0.01, optimizer="adamw")
    made = loop.make_optimizer

    def elsewhere(model, schedule):
        optimizer = made(model, schedule)
        for group in optimizer.param_groups:  # as on a GPU
            group.update(lr=torch.tensor(group["lr"]), fused=True, foreach=False)
        return optimizer

    def stop(row, _):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "make_optimizer", elsewhere)
    with pytest.raises(KeyboardInterrupt):
        train(Phase("dense", network(), schedule), recipe(), data, Accelerator(), Checkpoints(tmp_path), stop)
    monkeypatch.undo()
    state = Checkpoints(tmp_path).latest("dense")
    for group in state["optimizer"]["param_groups"]:
        group["capturable"] = True  # which AdamW refuses on a CPU
    Checkpoints(tmp_path).save("dense", 1, state)
    _, rows = fit(tmp_path, data, Phase("dense", network(), schedule))
    assert [row.epoch for row in rows] == [2]


def test_a_decorator_of_forward_stays_after_training_in_bf16(tmp_path, data):
    """Accelerate's unwrapping goes on through the decorators of the user's own `forward`."""

    def doubled(function):
        @functools.wraps(function)
        def call(*given):
            return 2 * function(*given)

        return call

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        @doubled
        def forward(self, x):
            return self.inner(x)

    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="bf16")
    phase = Phase("dense", Scaled(), Schedule(epochs=1, lr=0.01))
    model = train(phase, recipe(precision="bf16"), data, accelerator, Checkpoints(tmp_path), lambda *_: None).eval()
    AcceleratorState._reset_state()
    x = data.test.x[:4]
    with torch.no_grad():
        torch.testing.assert_close(model(x), 2 * model.inner(x))


def test_a_model_trained_in_bf16_is_exported_in_fp32(tmp_path, data):
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="bf16")
    phase = Phase("dense", network(), Schedule(epochs=1, lr=0.01))
    model = train(phase, recipe(precision="bf16"), data, accelerator, Checkpoints(tmp_path), lambda *_: None)
    AcceleratorState._reset_state()
    exact = network().double()
    exact.load_state_dict(model.state_dict())
    x = data.test.x[:4]
    with torch.no_grad():
        expected, got = exact.eval()(x.double()), model.eval()(x)
        with torch.autocast("cpu", torch.bfloat16):
            coarse = model(x)
    assert relative(coarse.double().numpy(), expected.numpy()) > 1e-3  # 8 bits: what a forward left in autocast would show
    assert got.dtype == torch.float32
    assert relative(got.numpy(), expected.numpy()) < 1e-5  # 24 bits, whatever kernels and layout add them up
    assert {one.data_type for one in to_onnx(model, x).graph.initializer} <= {TensorProto.FLOAT, TensorProto.INT64}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler gives its own
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_networks_of_cores_train_as_others_do(tmp_path, data):
    torch.manual_seed(0)
    made = network()
    plan = Plan(
        layers=(*plan_layers(made, "3", format="tr", ranks=4), *plan_layers(made, "5", format="tt", modes=(2, 32, 32), ranks=2))
    )
    found = []
    for compiled in (False, True):
        cores, folder = swap(network(), plan), tmp_path / str(compiled)
        folder.mkdir()
        model, rows = fit(folder, data, Phase("finetune", cores, Schedule(epochs=2, lr=0.01)), compile=compiled)
        found.append((rows[-1].loss, [parameter.detach().clone() for parameter in model.parameters()]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-3)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-2)


def test_the_average_is_what_is_evaluated_and_handed_on(tmp_path, data):
    model, rows = fit(tmp_path, data, Phase("dense", network(), Schedule(epochs=2, lr=0.05)), ema=0.9)
    state = Checkpoints(tmp_path).latest("dense")
    assert torch.equal(state["average"]["module.0.weight"], model[0].weight)
    assert not torch.equal(state["model"]["0.weight"], model[0].weight)
    assert evaluate(model, data.test, Accelerator()) == rows[-1].test_accuracy


def test_buffers_of_integers_are_not_averaged(tmp_path, data):
    """The mean of 3 and 3 is rounded down to 2."""
    model = network()
    model.register_buffer("places", torch.arange(100))
    averaged, _ = fit(tmp_path, data, Phase("dense", model, Schedule(epochs=4, lr=0.01)), ema=0.9)
    assert torch.equal(averaged.places, torch.arange(100))
    assert averaged[1].num_batches_tracked == 16


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_an_average_of_a_network_that_cannot_be_copied_is_refused(tmp_path, data):
    model = network()
    model[0] = nn.utils.weight_norm(model[0])
    with pytest.raises(PlanError, match="layer 0: its weight is computed from other parameters"):
        fit(tmp_path, data, Phase("dense", model, Schedule(epochs=1, lr=0.01)), ema=0.9)


def test_the_average_soon_leaves_the_weights_of_the_start(tmp_path, data):
    model, weights = network(), []
    hook = register_optimizer_step_post_hook(lambda *_: weights.append(model[0].weight.detach().clone()))
    try:
        averaged, _ = fit(tmp_path, data, Phase("dense", model, Schedule(epochs=2, lr=0.05)), ema=0.4)
    finally:
        hook.remove()
    assert len(weights) == 8
    expected, *others = weights
    for n, weight in enumerate(others, start=1):
        expected = torch.lerp(expected, weight, 1 - min(0.4, (1 + n) / (10 + n)))
    torch.testing.assert_close(averaged[0].weight.detach(), expected)


def test_distillation_pulls_toward_the_teacher(tmp_path, data):
    teacher, _ = fit(tmp_path, data, Phase("dense", network(), Schedule(epochs=4, lr=0.05)))
    wrong = Dataset("made", 2, InMemory(data.train.x, 1 - data.train.y), data.test)  # labels say the opposite
    phase = Phase("finetune", network(), Schedule(epochs=4, lr=0.05), teacher=teacher)
    taught, _ = fit(tmp_path, wrong, phase, distill=Distillation(weight=1.0))
    assert evaluate(taught, data.test, Accelerator()) > 90
    assert not any(p.requires_grad for p in teacher.parameters())


def test_mixup_mixes_the_labels_as_it_mixes_the_images():
    scores, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    mixed = 0.3 * F.one_hot(y, 3) + 0.7 * F.one_hot(y.flip(0), 3)
    expected = F.cross_entropy(scores, mixed.float(), label_smoothing=0.1)
    torch.testing.assert_close(loop._cross_entropy(scores, y, 0.3, 0.1), expected)


def test_the_divergence_is_that_of_hinton():
    own, other = torch.randn(5, 4), torch.randn(5, 4)
    p, q = (other / 3).softmax(1), (own / 3).softmax(1)
    torch.testing.assert_close(loop._divergence(own, other, 3.0), 9 * (p * (p / q).log()).sum(1).mean())


def test_admm_stops_when_both_residuals_are_small(tmp_path, data):
    model = network()
    schedule = AdmmSchedule(epochs=50, lr=1e-4, rho=1.0, stop=0.05)
    admm = admm_of(model, ranks=16)  # at full rank nothing is cut off
    _, rows = fit(tmp_path, data, Phase("admm", model, schedule, admm))
    assert len(rows) < 50
    assert all(primal < 0.05 for primal, _ in rows[-1].residuals.values())
    again = network()
    model, more = fit(tmp_path, data, Phase("admm", again, schedule, admm_of(again, ranks=16)))
    assert more == []  # resumed, it is over


def test_a_hard_projection_leaves_weights_of_low_rank(tmp_path, data):
    model = network()
    phase = Phase("admm", model, AdmmSchedule(epochs=2, lr=0.05, rho=0.05, hard=True), admm_of(model))
    trained, _ = fit(tmp_path, data, phase)
    spectrum = torch.linalg.svdvals(trained[3].weight.flatten(1))
    assert spectrum[4] < 1e-5 * spectrum[0]
    torch.testing.assert_close(trained[3].weight.detach(), phase.admm.Z["3"])
    assert float(phase.admm.U["3"].abs().max()) == 0.0


def test_a_hard_projection_is_of_the_average_that_is_handed_on(tmp_path, data):
    model = network()
    phase = Phase("admm", model, AdmmSchedule(epochs=2, lr=0.05, rho=0.05, hard=True), admm_of(model))
    trained, rows = fit(tmp_path, data, phase, ema=0.9)
    spectrum = torch.linalg.svdvals(trained[3].weight.detach().flatten(1))
    assert spectrum[4] < 1e-5 * spectrum[0]
    assert evaluate(trained, data.test, Accelerator()) == rows[-1].test_accuracy
    assert not torch.equal(trained[3].weight, phase.admm.Z["3"])


def test_a_changed_rho_keeps_the_multiplier():
    model = network()
    admm = admm_of(model)
    admm.update()
    before = admm.rho * admm.U["3"]
    admm.set_rho(0.8)
    torch.testing.assert_close(admm.rho * admm.U["3"], before)
    with pytest.raises(ValueError, match="rho: expected a positive number, got 0"):
        admm.set_rho(0)


def test_rho_rises_where_the_primal_residual_lags_and_falls_where_the_dual_one_does():
    model = network()
    admm = admm_of(model, ranks=2)
    admm.update()  # Z is where it was, and the weights far from it
    admm.balance()
    assert admm.rho == pytest.approx(0.1)
    with torch.no_grad():
        admm.U["3"].add_(300 * torch.randn_like(admm.U["3"]))
    admm.update()  # Z is far larger than the weights: their distance is measured by the larger of both
    assert admm._relative[0] == pytest.approx(1, abs=0.1)
    admm = admm_of(model, ranks=16)
    with torch.no_grad():
        model[3].weight.mul_(2)
    admm.update()
    admm.balance()
    assert admm.rho == pytest.approx(0.025)


def test_projections_are_timed_and_counted_by_steps(tmp_path, data, monkeypatch):
    model = network()
    admm = admm_of(model)
    count = []
    update = admm.update
    monkeypatch.setattr(admm, "update", lambda: count.append(1) or update())
    _, rows = fit(tmp_path, data, Phase("admm", model, AdmmSchedule(epochs=2, lr=0.01, every_steps=2), admm))
    assert len(count) == 2 * (128 // 32 // 2)
    assert all(0 < row.projection_seconds < row.seconds for row in rows)


def test_updates_come_every_quarter_of_an_epoch_unless_told_otherwise(tmp_path, data, monkeypatch):
    for name, settings, updates in (("quarters", {}, 8), ("whole", {"every": 1}, 2), ("hard", {"every": 1, "hard": True}, 2)):
        model, count = network(), []
        admm = admm_of(model)
        update = admm.update
        monkeypatch.setattr(admm, "update", lambda *a, update=update, count=count, **k: count.append(1) or update(*a, **k))
        (tmp_path / name).mkdir()
        fit(tmp_path / name, data, Phase("admm", model, AdmmSchedule(epochs=2, lr=0.01, **settings), admm))
        assert len(count) == updates - ("hard" in settings)


def test_steps_between_updates_are_counted_over_epochs(tmp_path, data, monkeypatch):
    model = network()
    admm = admm_of(model)
    count = []
    update = admm.update
    monkeypatch.setattr(admm, "update", lambda: count.append(1) or update())
    fit(tmp_path, data, Phase("admm", model, AdmmSchedule(epochs=2, lr=0.01, every_steps=3), admm))
    assert len(count) == 2 * (128 // 32) // 3
    other = network()
    phase = Phase("never", other, AdmmSchedule(epochs=2, lr=0.01, every_steps=9), admm_of(other))
    with pytest.raises(TrainingError, match=r"at most 8 \(2 epochs of 4 steps\), got 9: ADMM would never update"):
        fit(tmp_path, data, phase)


def test_rho_changes_with_every_update(tmp_path, data, monkeypatch):
    model = network()
    admm = admm_of(model)
    used = []
    update = admm.update
    monkeypatch.setattr(admm, "update", lambda: used.append(admm.rho) or update())
    schedule = AdmmSchedule(epochs=2, lr=0.01, rho=0.01, rho_end=0.1, every_steps=2)
    fit(tmp_path, data, Phase("admm", model, schedule, admm))
    assert used == pytest.approx([10**-2, 10 ** (-5 / 3), 10 ** (-4 / 3), 0.1])
    other = network()
    phase = Phase("once", other, schedule.model_copy(update={"every_steps": 5, "rho": 0.02}), admm_of(other))
    with pytest.raises(TrainingError, match=r"phase once: train\.admm\.rho_end: expected at least two updates in the phase"):
        fit(tmp_path, data, phase)


def test_dropout_is_drawn_by_every_process_for_itself(tmp_path, data, monkeypatch):
    seeds: list[int] = []
    seed, first = torch.manual_seed, []
    monkeypatch.setattr(torch, "manual_seed", lambda value: seeds.append(value) or seed(value))
    for number in (0, 1):
        monkeypatch.setattr(loop, "rank", lambda number=number: number)
        model = network()
        seeds.clear()
        fit(tmp_path, data, Phase(f"dense{number}", model, Schedule(epochs=1, lr=0.01)))
        first.append(seeds[0])
    assert first[0] != first[1]


def test_a_batch_of_fewer_samples_than_processes_leaves_some_without_any(data):
    class Uneven:
        def __len__(self):
            return 64

        def batches(self, picks, share=None, augment=None, seed=0):
            yield from data.test.batches([torch.arange(64), torch.arange(0)])

    class Strict(nn.Module):
        def forward(self, x):
            return x.reshape(x.size(0), -1)[:, :2]  # which torch refuses for no samples

    assert 0 <= evaluate(Strict(), Uneven(), Accelerator()) <= 100


def test_an_eps_of_its_own_makes_no_network_a_norm():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.eps = 1e-6
            self.fc, self.norm = nn.Linear(4, 4), nn.LayerNorm((2, 4))
            self.scale = nn.Parameter(torch.ones(4, 4))
            self.filter = Filter()

    class Filter(nn.Module):
        def __init__(self):
            super().__init__()
            self.eps, self.gain = 1e-6, nn.Parameter(torch.ones(1, 4, 1, 1))

    net = Net()
    decayed, rest = (group["params"] for group in make_optimizer(net, Schedule(epochs=1, lr=0.1)).param_groups)
    assert {id(p) for p in decayed} == {id(net.fc.weight), id(net.scale)}
    assert len(rest) == 4


def test_a_loss_that_is_not_finite_names_its_first_step(tmp_path, data):
    poisoned = data.train.x.clone()
    poisoned[:] = torch.where(torch.arange(128)[:, None, None, None] == 5, float("nan"), poisoned)
    broken = Dataset("made", 2, InMemory(poisoned, data.train.y), data.test)
    with pytest.raises(TrainingError, match=r"phase dense, epoch 1, step [1-4]: the loss is nan at learning rate .* clip"):
        fit(tmp_path, broken, Phase("dense", network(), Schedule(epochs=1, lr=0.01)))
    # The control has the schedule of fine-tuning where there is no ADMM, and there may be no trained dense network.
    with pytest.raises(TrainingError, match=r"phase control, .*; try a lower train\.finetune\.lr, a warmup or a clip$"):
        fit(tmp_path, broken, Phase("control", network(), Schedule(epochs=1, lr=0.01)), dense=None)
    assert Checkpoints(tmp_path).latest("dense") is None


@pytest.mark.parametrize("kind", [Schedule, AdmmSchedule])
def test_a_last_step_that_diverges_is_noticed_before_the_checkpoint(kind, tmp_path, data):
    model = network()
    admm = admm_of(model) if kind is AdmmSchedule else None
    one_batch = Dataset("made", 2, InMemory(data.train.x[:32], data.train.y[:32]), data.test)  # one step
    phase = Phase("admm" if admm else "dense", model, kind(epochs=1, lr=3e38, weight_decay=1e4), admm)
    with pytest.raises(TrainingError, match=r"epoch 1, step 1: the weights are no longer finite at learning rate 3e\+38"):
        fit(tmp_path, one_batch, phase)
    assert Checkpoints(tmp_path).latest(phase.name) is None


def test_weights_that_diverge_before_an_update_end_as_those_that_diverge_after_one(tmp_path, data):
    model = network()
    phase = Phase("admm", model, AdmmSchedule(epochs=1, lr=3e38, weight_decay=1e4, every_steps=1), admm_of(model))
    with pytest.raises(TrainingError, match=r"epoch 1, step 1: the weights are no longer finite at learning rate 3e\+38"):
        fit(tmp_path, data, phase)


def moved(tmp_path, data, schedule, **training):
    """Return how far a phase moves the last layer's weight."""
    model = network()
    before = model[5].weight.detach().clone()
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    return float((fit(folder, data, Phase("dense", model, schedule), **training)[0][5].weight.detach() - before).norm())


def test_the_schedule_sets_the_rate_and_gradients_are_clipped(tmp_path, data, monkeypatch):
    plain = {"epochs": 1, "lr": 0.01, "momentum": 0.0, "weight_decay": 0.0}
    free = moved(tmp_path, data, Schedule(**plain))
    assert moved(tmp_path, data, Schedule(**plain, clip=1e-3)) <= 4 * 0.01 * 1e-3 < free  # four steps of that norm at most
    monkeypatch.setattr(loop, "rate", lambda *_: 0.0)
    assert moved(tmp_path, data, Schedule(**plain)) == 0.0


def test_mixup_and_label_smoothing_reach_the_images_and_the_loss(tmp_path, data, monkeypatch):
    asked, seen = [], []
    real = loop._cross_entropy
    monkeypatch.setattr(loop, "_cross_entropy", lambda *given: asked.append(given[2:]) or real(*given))
    model = network()
    model[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]) if module.training else None)
    fit(tmp_path, data, Phase("dense", model, Schedule(epochs=1, lr=0.01)), mixup=0.4, label_smoothing=0.1)
    assert len(asked) == 4
    assert all(0 < share < 1 and smoothing == 0.1 for share, smoothing in asked)
    rows = {tuple(image.flatten()[:5].tolist()) for image in data.train.x}
    assert not any(tuple(image.flatten()[:5].tolist()) in rows for x in seen for image in x)


def test_rho_is_balanced_while_a_phase_trains(tmp_path, data):
    model = network()
    schedule = AdmmSchedule(epochs=1, lr=0.01, rho=1e-6, balance=True)
    _, rows = fit(tmp_path, data, Phase("admm", model, schedule, admm_of(model, rho=1e-6)))
    assert rows[0].rho == pytest.approx(2e-6)  # the primal residual is far the larger one


def test_fewer_samples_than_a_batch_are_refused(tmp_path, data):
    few = Dataset("made", 2, InMemory(data.train.x[:8], data.train.y[:8]), data.test)
    with pytest.raises(TrainingError, match="at least one batch of 32 training samples, got 8 samples"):
        fit(tmp_path, few, Phase("dense", network(), Schedule(epochs=1, lr=0.01)))
