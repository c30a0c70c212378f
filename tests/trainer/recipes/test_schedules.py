from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError
from torch import nn

from tensorrail_exporter import Plan
from tensorrail_trainer import plan_layers
from tensorrail_trainer.layers.swap import swap
from tensorrail_trainer.recipes.schedules import (
    AdmmSchedule,
    Schedule,
    Steps,
    Training,
    penalty_weight,
    period,
    rate,
    updates_due,
)
from tensorrail_trainer.training.loop import make_optimizer


def test_a_cosine_falls_to_zero_after_its_warmup():
    schedule = Schedule(epochs=10, lr=0.4, warmup=2.0)
    assert [rate(schedule, x) for x in (0, 1, 2)] == pytest.approx([0.0, 0.2, 0.4])
    assert rate(schedule, 6) == pytest.approx(0.2)
    assert rate(schedule, 10) == pytest.approx(0.0, abs=1e-12)


def test_steps_multiply_the_rate_after_so_many_epochs():
    schedule = Schedule(epochs=200, lr=0.1, decay="steps", steps=Steps(every=55, factor=0.2))
    assert [rate(schedule, x) for x in (0, 54.9, 55, 110, 199)] == pytest.approx([0.1, 0.1, 0.02, 0.004, 0.0008])
    assert rate(Schedule(epochs=3, lr=0.1, decay="constant"), 2.5) == 0.1


def test_rho_is_constant_or_geometric():
    assert penalty_weight(AdmmSchedule(epochs=5, lr=0.1, rho=0.5), 3, 7) == 0.5
    rising = AdmmSchedule(epochs=5, lr=0.1, rho=0.01, rho_end=1.0, every=1)
    expected = [0.01, 10**-1.5, 0.1, 10**-0.5, 1.0]
    assert [penalty_weight(rising, 7 * k + 6, 7) for k in range(5)] == pytest.approx(expected)
    steps = AdmmSchedule(epochs=2, lr=0.1, rho=0.01, rho_end=1.0, every_steps=3)
    assert [penalty_weight(steps, 3 * k + step, 8) for step in (0, 2) for k in range(5)] == pytest.approx(2 * expected)
    assert penalty_weight(steps, 15, 8) == pytest.approx(1.0)  # after the last update


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        (Schedule, {"decay": "steps"}, "got only one of them"),
        (Schedule, {"optimizer": "adamw", "nesterov": True}, "nesterov expects optimizer: sgd"),
        (Schedule, {"warmup": 5.0}, "expected a warmup shorter"),
        (AdmmSchedule, {"rho_end": 1.0, "balance": True}, "either rho_end or balance"),
        (AdmmSchedule, {"every": 2, "every_steps": 10}, "got both"),
        (AdmmSchedule, {"every": 99}, "got 99: ADMM would never update"),
        (AdmmSchedule, {"every": 5, "hard": True}, "hard: expected an update before the end of the phase's 5 epochs"),
        (AdmmSchedule, {"epochs": 1, "every": 1, "hard": True}, "ADMM would never update"),
        (
            AdmmSchedule,
            {"epochs": 1, "every": 1, "rho_end": 1.0},
            "rho_end: expected at least two updates in the phase, got one",
        ),
        (AdmmSchedule, {"every": 3, "rho_end": 1.0}, "rho_end: expected at least two updates"),
        (Schedule, {"decay_on": ("everything",)}, "decay_on"),
    ],
)
def test_schedules_that_contradict_themselves(kind, change, reason):
    with pytest.raises(ValidationError, match=reason):
        kind(**{"epochs": 5, "lr": 0.1} | change)


def test_what_pays_is_the_default():
    """See docs/training.md, When ADMM pays."""
    schedule = AdmmSchedule(epochs=4, lr=0.1)
    assert (schedule.rho, schedule.rho_end, period(schedule, 352)) == (0.01, 0.1, 88)
    assert penalty_weight(schedule, 4 * 352 - 1, 352) == pytest.approx(0.1)
    assert AdmmSchedule(epochs=4, lr=0.1, rho=0.2).rho_end is None
    assert AdmmSchedule(epochs=4, lr=0.1, balance=True).rho_end is None
    assert AdmmSchedule(epochs=4, lr=0.1, every=3).rho_end is None  # a single update
    assert AdmmSchedule.model_validate(schedule.model_dump()) == schedule
    assert [updates_due(schedule, 4 * steps, steps) for steps in (390, 352, 2)] == [16, 16, 8]
    assert [period(AdmmSchedule(epochs=9, lr=0.1, every=every), 100) for every in (0.29, 1.0, 2.5)] == [29, 100, 250]


def test_recipes_of_earlier_versions_are_read():
    """They hold all defaults, such as `every: 1` beside `every_steps`."""
    old = AdmmSchedule.model_validate({"epochs": 4, "lr": 0.1, "rho": 0.01, "rho_end": 0.1, "every": 1, "every_steps": 98})
    assert old == AdmmSchedule(epochs=4, lr=0.1, rho=0.01, rho_end=0.1, every_steps=98)
    results = Path(__file__).parents[3] / "results"
    saved = [path for path in results.glob("*/*.yaml") if "every_steps" in path.read_text()]
    assert saved
    for path in saved:
        AdmmSchedule.model_validate(yaml.safe_load(path.read_text())["train"]["admm"], strict=False)


def test_hard_leaves_the_updates_before_it():
    for settings in ({"epochs": 2}, {"epochs": 5, "every": 4}, {"epochs": 1, "every_steps": 10}):
        assert AdmmSchedule(**{"lr": 0.1, "hard": True} | settings).hard


def test_the_control_trains_as_long_as_admm_and_fine_tuning():
    admm = AdmmSchedule(epochs=7, lr=0.3, weight_decay=5e-4, nesterov=True, rho=0.1)
    training = Training(admm=admm, finetune=Schedule(epochs=3, lr=0.1))
    control = training.control_schedule
    assert (control.epochs, control.lr, control.weight_decay, control.nesterov) == (10, 0.3, 5e-4, True)
    assert type(control) is Schedule
    assert Training(finetune=Schedule(epochs=3, lr=0.1), control="none").control_schedule is None
    assert Training(finetune=Schedule(epochs=3, lr=0.1)).control_schedule.epochs == 3
    steady = Training(admm=admm.model_copy(update={"decay": "constant"}), finetune=Schedule(epochs=3, lr=0.1))
    assert (steady.control_schedule.decay, steady.control_schedule.lr) == ("cosine", 0.3)  # the cores' rate falls as well
    alone = Training(finetune=Schedule(epochs=3, lr=0.1, decay="constant"))  # the control trains exactly as the cores do
    assert alone.control_schedule == alone.finetune


@pytest.mark.parametrize("decay_on", [("weights", "cores"), ("weights",), ("cores", "norms", "biases")])
def test_weight_decay_acts_on_what_it_names(decay_on):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(64, 4))
    model = swap(model, Plan(layers=plan_layers(model, "2", ranks=4)))
    decayed, rest = make_optimizer(model, Schedule(epochs=1, lr=0.1, decay_on=decay_on)).param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (1e-4, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    kinds = {
        "weights": {"0.weight", "4.weight"},
        "cores": {"2.cores.0", "2.cores.1", "2.cores.2"},
        "norms": {"1.weight", "1.bias"},
        "biases": {"0.bias", "2.bias", "4.bias"},
    }
    assert {names[id(p)] for p in decayed["params"]} == set().union(*(kinds[kind] for kind in decay_on))
    assert {id(p) for p in decayed["params"] + rest["params"]} == {id(p) for p in model.parameters()}


def test_adamw_can_be_asked_for():
    optimizer = make_optimizer(nn.Linear(3, 3), Schedule(epochs=1, lr=0.1, optimizer="adamw", weight_decay=0.05))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
