import copy
import math

import numpy as np
import pytest
import torch
from onnx import TensorProto
from torch import nn

from tensorrail_exporter import LayerPlan, Plan, PlanError, decompose_graph, factorize
from tensorrail_exporter.formats import FORMATS
from tensorrail_trainer import plan_layers, to_onnx
from tensorrail_trainer.admm.moments import input_roots
from tensorrail_trainer.layers.swap import swap
from tensorrail_trainer.planning.options import Truncation
from tensorrail_trainer.planning.ranks import any_plan_to_size, plan_to_size
from tensorrail_trainer.recipes.recipe import PlanRule, _plannable


@pytest.fixture
def model():
    """Two convolutions, the second one of low rank, and a small classifier."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(32, 10))
    with torch.no_grad():
        made[1].weight.copy_((torch.randn(32, 2) @ torch.randn(2, 288)).reshape(32, 32, 3, 3))
    return made


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "form", [pytest.param(name, marks=[pytest.mark.slow] if name == "cp" else []) for name in FORMATS if name != "ttm"]
)
@pytest.mark.parametrize("times", [1.5, 3.0])
def test_the_network_is_as_small_as_asked_and_hardly_smaller(model, form, times):
    whole = size(model)
    plan = plan_to_size(model, "[01]", times, format=form)
    small = size(swap(model, Plan(layers=plan)))
    assert times <= whole / small < 1.35 * times


def test_what_costs_least_is_cut_first(model):
    (layer,) = plan_to_size(model, "[01]", 1.5, format="svd")
    assert layer.name == "1"  # two of its singular values hold everything; the other one stays dense


def test_ranks_of_fresh_weights_are_not_looked_for(model, monkeypatch):
    def never(*_):
        raise AssertionError("a fresh weight was decomposed")

    monkeypatch.setattr(Truncation, "__call__", never)
    plan = any_plan_to_size(model, "[01]", 3.0)
    assert plan
    with pytest.raises(PlanError, match="cannot be reduced 500×"):
        any_plan_to_size(model, "[01]", 500.0)


def test_what_cannot_be_is_refused(model):
    with pytest.raises(PlanError, match=r"500×: at most .*× is reachable, with all layers of '\[01\]' at rank 1"):
        plan_to_size(model, "[01]", 500.0)
    with pytest.raises(PlanError, match="no layer matches 'x'"):
        plan_to_size(model, "x", 2.0)


def test_given_ranks_are_as_before(model):
    assert plan_layers(model, "0", ranks=4)[0].ranks == (1, 4, 4, 1)


def test_the_size_is_that_of_what_runs():
    """Two modes a side: the joined sides of this Tucker decomposition store more than its cores, and than the dense weight."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64, bias=False))
    plan = Plan(layers=plan_to_size(net, "0", 2.0, format="tucker", modes=(8, 8, 8, 8)))
    assert net[0].weight.numel() / stored(net, plan) >= 2.0


def stored(net, plan):
    model = to_onnx(net, torch.randn(2, 64))
    factored = factorize(model, plan, decompose_graph(model, plan)).model
    return sum(math.prod(t.dims) for t in factored.graph.initializer if t.data_type == TensorProto.FLOAT)


def test_the_ladder_is_spread_over_ranks_that_are_smaller_than_dense():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64, bias=False))
    (layer,) = plan_to_size(net, "0", 2.0, format="tr")
    assert 2.0 <= 4096 / layer.params((64, 64)) < 4.0


@pytest.mark.parametrize("times", [1.7, 4.1, 9.3, 33.0])
def test_the_size_of_a_single_layer_is_met_closely(times):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(400, 300, bias=False))
    (layer,) = plan_to_size(net, "0", times, format="svd")
    assert times <= 120_000 / layer.params((300, 400)) < 1.06 * times


def test_every_layer_can_be_cut_to_rank_one():
    net = nn.Sequential(nn.Linear(512, 512, bias=False))
    assert any_plan_to_size(net, "0", 64.0)
    assert [layer.ranks for layer in any_plan_to_size(net, "0", 256.0)] == [(1, 1, 1)]
    with pytest.raises(PlanError, match=r"at most 256\.00× is reachable, with all layers of '0' at rank 1"):
        any_plan_to_size(net, "0", 257.0)


def split_kernels(o, i, rank):
    """Return a kernel (o, i, 3, 3) of a given rank, of inputs and rows against outputs and columns."""
    return torch.einsum("oyr,rix->oixy", torch.randn(o, 3, rank), torch.randn(rank, i, 3))


def test_each_layer_gets_the_format_that_loses_least():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3))
    with torch.no_grad():
        net[0].weight.copy_(split_kernels(32, 32, 6))
        net[1].weight.copy_((torch.randn(32, 6) @ torch.randn(6, 288)).reshape(32, 32, 3, 3))
        net[2].weight.copy_(torch.einsum("or,rsk,is->oik", *map(torch.randn, [(32, 6), (6, 6, 9), (32, 6)])).view(32, 32, 3, 3))
    plan = Plan(layers=plan_to_size(net, "*", 7.0))
    forms = [(layer.format, layer.modes) for layer in plan.layers]
    assert forms == [("svd", (96, 96)), ("svd", (32, 288)), ("tt", (32, 9, 32))]
    cut, x = swap(copy.deepcopy(net), plan), torch.randn(2, 32, 12, 12)
    assert size(net) / size(cut) >= 7.0
    torch.testing.assert_close(cut(x), net(x), rtol=1e-3, atol=1e-3 * float(net(x).detach().abs().max()))
    lone = Plan(layers=plan_to_size(net, "*", 7.0, format="tt"))
    assert {layer.format for layer in lone.layers} == {"tt"}


@pytest.mark.parametrize("times", [2.0, 4.0])
def test_more_formats_lose_less(model, times):
    def lost(form):
        plan = plan_to_size(model, "[01]", times, format=form)
        return sum(Truncation(model.get_submodule(layer.name).weight.detach())(layer) for layer in plan)

    assert lost("auto") <= min(lost("tt"), lost("svd")) + 1e-6


def test_modes_and_ranks_are_those_of_a_tensor_train(model):
    assert {layer.format for layer in plan_to_size(model, "0", 1.2, modes=(32, 9, 4, 8))} == {"tt"}
    for name in ("auto", "tt"):
        rule = PlanRule(layers="[01]", format=name, ranks=4)
        assert rule.format == name
        assert [layer.ranks for layer in _plannable(model, rule)] == [(1, 4, 4, 1)] * 2


@pytest.mark.parametrize(("form", "modes"), [("svd", (32, 288)), ("svd", (96, 96)), ("svd", (288, 32))])
def test_what_a_split_loses_is_what_its_cores_lose(model, form, modes):
    weight = model[0].weight.detach()
    lost = Truncation(weight)
    for rank in (1, 7, 32):
        plan = LayerPlan(name="0", format=form, modes=modes, ranks=(rank,))
        kept = torch.as_tensor(plan.reconstruct(plan.decompose(weight), tuple(weight.shape)))
        assert lost(plan) == pytest.approx(float((weight - kept).square().sum() / weight.square().sum()), abs=1e-6)
    assert Truncation(torch.zeros(8, 8))(LayerPlan(name="0", format="tt", modes=(8, 8), ranks=(1, 2, 1))) == 0.0


def test_numbers_of_numpy_are_ranks_and_others_are_none(model):
    assert plan_layers(model, "0", ranks=np.int64(4))[0].ranks == (1, 4, 4, 1)
    for ranks in (1.5, "16", []):
        with pytest.raises(PlanError, match="ranks: expected one integer \\(an upper bound\\) or a list"):
            plan_layers(model, "0", ranks=ranks)
    with pytest.raises(PlanError, match=r"modes: expected a list of integers .*, got \[\[4, 4\], \[4, 4\]\]"):
        plan_layers(model, "0", format="ttm", ranks=4, modes=[[4, 4], [4, 4]])
    with pytest.raises(PlanError, match=r"ranks: expected one integer \(an upper bound\) or a list"):
        plan_layers(model, "0", ranks=[1, 4.0, 1])


def outputs_error(net, plan, x, roots=None):
    """Return how far the outputs of a plan's cores are from the dense ones, as a share of their norm."""
    with torch.no_grad():
        return float((swap(copy.deepcopy(net), plan, roots=roots)(x) - net(x)).norm() / net(x).norm())


def test_ranks_and_cores_by_activations_lose_less_of_the_outputs_of_other_inputs():
    """The inputs of the first layer lie near six directions, which its weight does not show."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 48, bias=False), nn.Tanh(), nn.Linear(48, 48, bias=False))
    directions = torch.randn(6, 48)
    x, other = (torch.randn(512, 6) @ directions + 0.1 * torch.randn(512, 48) for _ in range(2))
    by_weights, by_outputs = (Plan(layers=plan_to_size(net, "*", 2.5, format="svd", inputs=inputs)) for inputs in (None, [x]))
    first = {plan: plan.layers[0].ranks[0] for plan in (by_weights, by_outputs)}
    assert first[by_outputs] < first[by_weights]
    roots = input_roots(net, by_outputs, [x])
    plain = outputs_error(net, by_weights, other)
    assert outputs_error(net, by_outputs, other, roots) < 0.5 * plain
    assert net.training
    assert not net[0]._forward_pre_hooks


def test_inputs_that_say_nothing_of_a_layer_are_refused(model):
    x = torch.randn(4, 32, 8, 8)
    with pytest.raises(PlanError, match=r"layer 1: its inputs held infinity or NaN; check the inputs and the weights"):
        plan_to_size(model[:2], "1", 2.0, inputs=[x * math.inf])
    with pytest.raises(PlanError, match=r"layer 0: expected at least one batch through its module, got none; give inputs"):
        plan_to_size(model[:2], "0", 2.0, inputs=[])
    with pytest.raises(PlanError, match="expects one input mode, got 2"):
        plan_to_size(model[:2], "0", 2.0, modes=(4, 8, 9, 4, 8), inputs=[x])
