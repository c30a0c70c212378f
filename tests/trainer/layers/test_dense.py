"""What a plan cannot name, and why: each is said when the plan meets the model, not after the training."""

import functools
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from tensorrail_exporter import Plan
from tensorrail_runtime.errors import PlanError
from tensorrail_trainer import ADMM, plan_layers, to_dense
from tensorrail_trainer.layers.swap import swap


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def raw(module, name):
    """As weight dropout does: the weight is computed from another parameter before each call."""
    weight = getattr(module, name)
    delattr(module, name)
    module.register_parameter(f"{name}_raw", weight)
    module.register_forward_pre_hook(lambda layer, _: setattr(layer, name, 2 * layer.get_parameter(f"{name}_raw")))
    if name != "weight_ih_l0":  # another way leaves no attribute before the first call
        setattr(module, name, weight.detach())


WAYS = {
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "weight_norm": nn.utils.weight_norm,
    "parametrizations.spectral_norm": parametrizations.spectral_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "prune": lambda module, name: prune.l1_unstructured(module, name, 0.5),
    "own": lambda module, name: parametrize.register_parametrization(module, name, Doubled()),
    "hook": raw,
}


def parametrized(model, way, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old functions
        WAYS[way](model[0], name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("layer", "planned", "name"),
    [
        (lambda: nn.LSTM(12, 8, 2, bidirectional=True), "0.weight_ih_l0", "weight_ih_l0"),
        (lambda: nn.LSTM(12, 8, 2, bidirectional=True), "0.weight_ih_l0", "weight_hh_l1_reverse"),
        (lambda: nn.GRU(12, 8), "0.weight_ih_l0", "bias_hh_l0"),
        (lambda: nn.Linear(12, 8), "0", "weight"),
        (lambda: nn.Linear(12, 8), "0", "bias"),
        (lambda: nn.Conv2d(12, 8, 3), "0", "bias"),
    ],
)
def test_what_is_computed_from_other_parameters_is_named_before_the_training(layer, planned, name, way):
    model = nn.Sequential(layer())
    plan = Plan(layers=plan_layers(model, planned, format="svd", ranks=4))
    if "bias" in name and "spectral" in way:
        pytest.skip("torch takes matrices alone")
    parametrized(model, way, name)
    with pytest.raises(PlanError, match=rf"layer {planned}: expected a {name[:4]}\w* that is a parameter, got {name}, which"):
        ADMM(model, plan)


def test_other_layers_may_be_parametrized():
    model = nn.Sequential(nn.Linear(6, 6), parametrizations.weight_norm(nn.Linear(6, 4)))
    x = torch.randn(3, 6)
    cut = swap(model, Plan(layers=plan_layers(model, "0", format="svd", ranks=6)))
    torch.testing.assert_close(to_dense(cut)(x), cut(x))
    with pytest.warns(FutureWarning):
        model[1] = nn.utils.weight_norm(nn.Linear(6, 4))
    model(x)
    with pytest.raises(PlanError, match="layer 1: its weight is computed from other parameters, and torch cannot copy it"):
        to_dense(model)


class Held(nn.Module):
    """Registers its layer, and runs what it holds beside it."""

    def __init__(self, holder):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.other = nn.Linear(6, 6)
        self.held = holder(self.layer)
        self.numbers = [1, 2, {"a": torch.zeros(2)}]


class Keeper:
    def __init__(self, layer):
        self.layer = layer


class Unregistered(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.inner = layer


HOLDERS = {
    "list": lambda layer: [layer],
    "nested": lambda layer: {"a": [(0, layer)]},
    "partial": functools.partial,
    "function": lambda layer: lambda x: layer(x) + 1,
    "method": lambda layer: layer.forward,
    "object": Keeper,
    "module in a list": lambda layer: [Unregistered(layer)],
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_layer_that_is_held_past_torchs_modules_is_refused(holder):
    model = nn.Sequential(Held(HOLDERS[holder]))
    plan = Plan(layers=plan_layers(nn.Sequential(Held(lambda _: None)), "0.layer", format="svd", ranks=2))
    with pytest.raises(
        PlanError, match=r"layer 0.layer: 0 also holds it in its attribute 'held', a \w+, where the dense layer"
    ):
        ADMM(model, plan)
    other = Plan(layers=plan_layers(model, "0.other", format="svd", ranks=2))
    swap(model, other)
    free = nn.Sequential(Held(lambda layer: None))
    free.admm = ADMM(free, plan)  # as in a class that trains itself
    free.held = [free[0]]  # its parent: what it holds is replaced
    assert not isinstance(free.admm.factorize()[0].layer, nn.Linear)


def test_what_two_layers_share_is_refused():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].bias = model[0].bias
    with pytest.raises(PlanError, match=r"layer 1: its parameter is shared by 0.bias and 1.bias, and only one of them"):
        plan_layers(model, "1", format="svd", ranks=2) and ADMM(
            model, Plan(layers=plan_layers(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), "1", format="svd", ranks=2))
        )


WRITES = {
    "init": nn.init.xavier_uniform_,
    "copy_": lambda w: w.copy_(torch.zeros(5, 8)),
    "data": lambda w: w.data.mul_(0.5),
    "detach": lambda w: w.detach().zero_(),
    "part": lambda w: w[0].fill_(0),
    "item": lambda w: w.__setitem__(0, 0.0),
    "operator": lambda w: w.__imul__(2),
    "out": lambda w: torch.add(torch.zeros(5, 8), 1, out=w),
    "set data": lambda w: setattr(w, "data", torch.zeros(5, 8)),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_the_weight_of_cores_is_an_error(write):
    model = nn.Sequential(nn.Linear(8, 5))
    swap(model, Plan(layers=plan_layers(model, "0", format="svd", ranks=2)))
    with (
        torch.no_grad(),
        pytest.raises(PlanError, match=r"is computed from them, and .* would change a copy that is lost; change"),
    ):
        WRITES[write](model[0].weight)


def test_the_weight_of_cores_is_read_as_any_tensor():
    model = nn.Sequential(nn.Linear(8, 5))
    swap(model, Plan(layers=plan_layers(model, "0", format="svd", ranks=2)))
    weight = model[0].weight
    assert type(weight + 1) is type(weight.clone()) is torch.Tensor
    weight.clone().detach().zero_()
    weight.square().sum().backward()
    assert all(core.grad is not None and core.grad.any() for core in model[0].cores)
    x = torch.randn(2, 8)
    torch.testing.assert_close(nn.functional.linear(x, weight, model[0].bias), model(x))


class Odd(torch.Tensor):
    """Stands for the tensors of FSDP2 and of quantized layers."""


def test_weights_without_values_of_their_own_are_named():
    plan = Plan(layers=plan_layers(nn.Sequential(nn.Linear(8, 8)), "0", format="svd", ranks=4))
    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(8, 8))
    assert plan_layers(meta, "0", format="svd", ranks=4) == plan.layers
    for call in (lambda: ADMM(meta, plan), lambda: swap(meta, plan)):
        with pytest.raises(PlanError, match="layer 0: its weights are on the meta device, which holds no values"):
            call()
    broken = nn.Sequential(nn.Linear(8, 8))
    admm = ADMM(broken, plan)
    with torch.no_grad():
        broken[0].weight[0, 0] = float("nan")
    for call in (admm.factorize, lambda: ADMM(broken, plan), lambda: swap(broken, plan)):
        with pytest.raises(PlanError, match="layer 0: its weight holds infinity or NaN, and cannot be decomposed"):
            call()
    with pytest.raises(PlanError, match="layer 0: its weight cannot be projected: it holds infinity or NaN"):
        admm.update()
    odd = nn.Sequential(nn.Linear(8, 8))
    odd[0].weight = nn.Parameter(torch.randn(8, 8).as_subclass(Odd))
    with pytest.raises(
        PlanError, match="layer 0: expected a plain tensor as its weight, got a Odd, as FSDP2, tensor parallelism"
    ):
        ADMM(odd, plan)
    flat = nn.Sequential(nn.Linear(8, 8))
    flat[0].weight = nn.Parameter(torch.randn(32))
    with pytest.raises(PlanError, match=r"layer 0: expected a weight of two or more axes, got shape \(32,\), as FSDP"):
        ADMM(flat, plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["tt", "tr", "tucker", "cp", "svd"])
@pytest.mark.parametrize("metric", ["weight", "activation"])
def test_half_precision_trains_toward_low_rank_with_dual_variables_in_single(form, dtype, metric):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3)).to(dtype), torch.randn(2, 8, 6, 6).to(dtype)
    with torch.no_grad():
        model[0].weight.mul_(100)
    twin = nn.Sequential(nn.Conv2d(8, 8, 3))
    twin.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    plan = Plan(layers=plan_layers(model, "0", format=form, ranks=4))
    half, single = ADMM(model, plan, metric=metric), ADMM(twin, plan, metric=metric)
    for _ in range(3):
        for net, admm in ((model, half), (twin, single)):
            net(x.to(net[0].weight.dtype))
            admm.update()
    assert half.Z["0"].dtype == half.U["0"].dtype == torch.float32
    # The activations of the moments are the same, so only the order of sums may differ.
    torch.testing.assert_close(half.U["0"], single.U["0"], rtol=1e-3, atol=1e-3 * float(single.U["0"].abs().max()))
    half.penalty().backward()
    assert model[0].weight.grad.dtype == dtype
    state = half.state_dict()
    half.load_state_dict({**state, "Z": {"0": state["Z"]["0"].to(dtype)}})
    assert half.Z["0"].dtype == torch.float32
    cut = half.factorize()
    assert {parameter.dtype for parameter in cut.parameters()} == {dtype}
    assert cut(x).dtype == dtype
