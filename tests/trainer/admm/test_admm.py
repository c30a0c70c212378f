from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from tensorrail_exporter import LayerPlan, Plan, PlanError, formats
from tensorrail_trainer import ADMM, FactoredLayer, plan_layers
from tensorrail_trainer.planning.ranks import join


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 5))


PLAN = Plan(
    layers=(
        LayerPlan(name="0", format="tt", modes=(16, 9, 3), ranks=(1, 4, 2, 1)),
        LayerPlan(name="3", format="tt", modes=(5, 16, 16), ranks=(1, 3, 3, 1)),
    )
)


def test_the_update_is_the_papers_equations():
    model = small_net()
    admm = ADMM(model, PLAN, rho=0.5)
    weight = model[0].weight.detach()
    project = partial(formats.project, "tt")
    z0, u0 = project(weight, (16, 9, 3), (1, 4, 2, 1)), torch.zeros_like(weight)
    torch.testing.assert_close(admm.Z["0"], z0)
    with torch.no_grad():
        model[0].weight += 0.1 * torch.randn_like(weight)
    w = model[0].weight.detach()
    others = (model[3].weight - admm.Z["3"]).square().sum()
    torch.testing.assert_close(admm.penalty(), 0.25 * ((w - z0 + u0).square().sum() + others))
    residual = admm.update()[0]
    z1 = project(w + u0, (16, 9, 3), (1, 4, 2, 1))
    torch.testing.assert_close(admm.Z["0"], z1)
    torch.testing.assert_close(admm.U["0"], u0 + w - z1)
    assert residual.layer == "0"
    assert residual.primal == pytest.approx(float((w - z1).norm() / w.norm()), rel=1e-5)
    assert residual.dual == pytest.approx(0.5 * float((z1 - z0).norm()), rel=1e-5)


def test_the_penalty_pulls_the_weight_toward_z_minus_u():
    model = small_net()
    admm = ADMM(model, PLAN, rho=0.5)
    admm.update()
    admm.penalty().backward()
    w = model[0].weight
    torch.testing.assert_close(w.grad, 0.5 * (w.detach() - admm.Z["0"] + admm.U["0"]))


def test_a_plain_loop_drives_the_weights_to_low_rank():
    torch.manual_seed(1)
    model, x, y = small_net(), torch.randn(64, 3, 4, 4), torch.randint(0, 5, (64,))
    admm = ADMM(model, PLAN, rho=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    history = []
    for _epoch in range(40):
        for _step in range(10):
            loss = nn.functional.cross_entropy(model(x), y) + admm.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        history.append(max(residual.primal for residual in admm.update()))
    scores = model(x).detach()
    cut = admm.factorize()
    assert history[-1] < 0.1 * history[0]
    assert isinstance(cut[0], FactoredLayer)
    assert isinstance(cut[3], FactoredLayer)
    assert float((cut(x).detach() - scores).norm() / scores.norm()) < 0.1
    assert all(parameter.requires_grad for parameter in cut.parameters())


def test_the_state_survives_saving_and_another_admm(tmp_path):
    model = small_net()
    admm = ADMM(model, PLAN, rho=0.5)
    with torch.no_grad():
        model[0].weight.mul_(1.3)
    admm.update()
    torch.save(admm.state_dict(), tmp_path / "admm.pt")
    other = ADMM(small_net(), PLAN, rho=0.1)
    other.load_state_dict(torch.load(tmp_path / "admm.pt", weights_only=True))
    assert other.rho == 0.5
    for name in ("0", "3"):
        torch.testing.assert_close(other.Z[name], admm.Z[name])
        torch.testing.assert_close(other.U[name], admm.U[name])


def test_state_of_another_plan_is_refused():
    admm = ADMM(small_net(), PLAN)
    with pytest.raises(PlanError, match="ADMM state: expected Z for the layers of the plan"):
        ADMM(small_net(), Plan(layers=PLAN.layers[:1])).load_state_dict(admm.state_dict())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rho": -1.0}, "expected a positive number as rho, got -1.0"),
        ({"rho": float("nan")}, "expected a positive number as rho, got nan"),
        ({"rho": "0.1"}, "expected a positive number as rho, got 0.1"),
        ({"Z": None}, "expected Z for the layers of the plan, .*got {'': 'NoneType'}"),
        ({"U": {"0": 1.0, "3": 2.0}}, "expected U for the layers of the plan, .*got {'0': 'float', '3': 'float'}"),
        ({"plan": []}, r"layer 0: expected {'format': 'tt', .*}, got \[\]"),
    ],
)
def test_a_state_that_no_admm_returned_is_refused(changes, reason):
    admm = ADMM(small_net(), PLAN)
    with pytest.raises(PlanError, match=f"ADMM state: {reason}"):
        admm.load_state_dict(admm.state_dict() | changes)
    with pytest.raises(PlanError, match="ADMM state: keys rho, Z, U are missing"):
        admm.load_state_dict(None)


@pytest.mark.parametrize("change", [{"ranks": (1, 5, 2, 1)}, {"format": "tucker", "ranks": (4, 2)}, {"modes": (4, 4, 9, 3)}])
def test_state_of_other_ranks_formats_or_modes_is_refused(change):
    state = ADMM(small_net(), PLAN).state_dict()
    changed = PLAN.layers[0].model_copy(update={"ranks": (1, 4, 4, 2, 1)} | change if "modes" in change else change)
    other = ADMM(small_net(), Plan(layers=(changed, PLAN.layers[1])))
    with pytest.raises(
        PlanError, match=r"ADMM state: layer 0: expected {'format': .*got {.*'ranks': \[1, 4, 2, 1\]}; use the plan"
    ):
        other.load_state_dict(state)
    del state["plan"]  # as it was written before it held the plan
    other.load_state_dict(state)
    merged = tuple(layer.model_copy(update={"merge": "none"}) for layer in PLAN.layers)  # how cores run is not ADMM's matter
    ADMM(small_net(), Plan(layers=merged)).load_state_dict(ADMM(small_net(), PLAN).state_dict())


@pytest.mark.parametrize("rho", [0.0, -1.0, float("nan")])
def test_rho_must_be_positive(rho):
    with pytest.raises(ValueError, match="rho: expected a positive number"):
        ADMM(small_net(), PLAN, rho)


def test_channels_last_weights_project_as_contiguous_ones():
    plain, last = small_net(), small_net().to(memory_format=torch.channels_last)
    torch.testing.assert_close(ADMM(plain, PLAN).Z["0"], ADMM(last, PLAN).Z["0"])


def test_patterns_make_plans_and_later_ones_hold():
    plan = join([plan_layers(small_net(), "*", ranks=100), plan_layers(small_net(), "3", ranks=[1, 2, 1])])
    assert [(layer.name, layer.ranks) for layer in plan.layers] == [("0", (1, 16, 3, 1)), ("3", (1, 2, 1))]


@pytest.mark.parametrize(
    ("pattern", "arguments", "reason"),
    [
        ("x*", {"ranks": 2}, r"no layer matches 'x\*'; the layers that can be factored are: 0, 3"),
        ("0", {"ranks": [1, 17, 3, 1]}, r"expected ranks of at most \[1, 16, 3, 1\]"),
        ("0", {"ranks": 2, "modes": [16, 3, 9]}, "do not fit"),
        ("0", {"ranks": 2, "format": "nope"}, "unknown format 'nope': expected one of .*tt"),
    ],
)
def test_plans_that_cannot_be_say_why(pattern, arguments, reason):
    with pytest.raises(PlanError, match=reason):
        plan_layers(small_net(), pattern, **arguments)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(4, 4, 3, groups=4), "depthwise convolution"),
        (nn.Conv2d(4, 4, 3, groups=2), r"in 2 groups, each with .* modes \[4, 9, 4\] do not fit .* shape \[2, 2, 3, 3\]"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "expected padding_mode='zeros', got 'reflect'"),
        (nn.ConvTranspose2d(4, 4, 3, groups=4), "depthwise transposed convolution"),
    ],
)
def test_layers_that_cannot_be_factored_say_why(module, reason):
    plan = Plan(layers=(LayerPlan(name="0", format="tt", modes=(4, 9, 4), ranks=(1, 2, 2, 1)),))
    with pytest.raises(PlanError, match=f"layer 0: .*{reason}"):
        ADMM(nn.Sequential(module), plan)


def test_residuals_are_floats_that_json_can_hold():
    assert all(np.isfinite([r.primal, r.dual]).all() for r in ADMM(small_net(), PLAN).update())


def test_a_target_that_cuts_nothing_off_stays_when_the_weight_trains():
    model = nn.Sequential(nn.Linear(8, 6))
    admm = ADMM(model, Plan(layers=(LayerPlan(name="0", format="ttm", modes=(6, 8), ranks=(1, 1)),)))
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    torch.testing.assert_close(admm.Z["0"], before)
    assert admm.update()[0].moved > 0.1
    torch.testing.assert_close(admm.Z["0"], before + 1)


def test_a_weight_that_is_not_finite_is_named():
    model = small_net()
    admm = ADMM(model, PLAN)
    with torch.no_grad():
        model[3].weight[0, 0] = float("nan")
    with pytest.raises(PlanError, match="layer 3: its weight cannot be projected"):
        admm.update()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["tt", "tr", "tucker", "svd", "ttm", "cp"])
def test_an_infinite_weight_is_named_and_does_not_hang(form, dtype):
    model = nn.Sequential(nn.Linear(16, 16)).to(dtype)
    plan = Plan(layers=plan_layers(model, "0", format=form, ranks=2))
    admm = ADMM(model, plan)
    with torch.no_grad():
        model[0].weight[3, 3] = float("inf")
    with pytest.raises(PlanError, match=r"layer 0: its weight cannot be projected.*; check the weights"):
        admm.update()


def test_a_plan_without_layers_is_refused():
    with pytest.raises(PlanError, match="expected a plan with at least one layer"):
        ADMM(small_net(), Plan(layers=()))


def test_weights_that_the_model_has_no_more_are_not_updated():
    model = small_net()
    admm = ADMM(model, PLAN)
    admm.update()
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    with pytest.raises(PlanError, match="layer 0: the model no longer holds the weight"):
        admm.update()
    model = small_net()
    admm = ADMM(model, PLAN)
    admm.factorize()
    with pytest.raises(PlanError, match="layer 0: the model no longer holds the weight"):
        admm.project_weights()


def test_states_and_numbers_that_cannot_be_are_refused():
    admm = ADMM(small_net(), PLAN)
    with pytest.raises(PlanError, match="ADMM state: keys rho, Z, U are missing"):
        admm.load_state_dict({})
    with pytest.raises(ValueError, match="rho: expected a positive number, got inf"):
        admm.set_rho(float("inf"))
    with pytest.raises(ValueError, match="expected apart and factor above 1"):
        admm.balance(factor=0.0)


def test_layers_on_several_devices_are_refused():
    model = small_net()
    model[3].to("meta")
    with pytest.raises(PlanError, match="expected all planned layers on one device, got 0 on cpu, 3 on meta"):
        ADMM(model, PLAN)
