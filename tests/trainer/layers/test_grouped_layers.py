"""Convolutions in groups as torch layers of cores: planned, trained toward low rank, cut, compiled and made dense again."""

import copy

import numpy as np
import onnxruntime as ort
import pytest
import torch
from cases import relative
from torch import nn

from tensorrail_exporter import Plan, PlanError, decompose_graph, factorize
from tensorrail_exporter.formats import project
from tensorrail_trainer import ADMM, cores_of, plan_layers, to_dense, to_onnx
from tensorrail_trainer.layers import factored as layers
from tensorrail_trainer.layers.dense import dense_layer, dense_layers
from tensorrail_trainer.layers.swap import swap
from tensorrail_trainer.planning.ranks import plan_to_size

FORMS = ["tt", "svd", "tucker", "cp", "tr"]


@pytest.fixture
def model():
    """The middle of a ResNeXt block, and a classifier."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, 2, 1, groups=4, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 5),
    )


@pytest.mark.parametrize("form", FORMS)
def test_full_rank_changes_nothing_and_cores_train(model, form):
    x = torch.randn(4, 3, 8, 8)
    expected = model.eval()(x).detach()
    cut = swap(model, Plan(layers=plan_layers(model, "2", format=form, ranks=999)))
    tolerance = 3e-2 if form == "cp" else 1e-4  # cp comes near the weight and not to its last digits
    assert relative(cut(x).detach().numpy(), expected.numpy()) < tolerance
    assert (cut[2].in_channels, cut[2].groups, tuple(cut[2].weight.shape)) == (32, 4, (32, 8, 3, 3))
    cut(x).square().sum().backward()
    assert all(core.grad is not None and core.grad.flatten(1).abs().sum(1).gt(0).all() for core in cut[2].cores)


@pytest.mark.parametrize("form", FORMS)
def test_made_dense_again_it_computes_the_same(model, form):
    cut = swap(model.eval(), Plan(layers=plan_layers(model, "2", format=form, ranks=3)))
    dense = to_dense(cut)
    assert (type(dense[2]), dense[2].groups, dense[2].bias) == (nn.Conv2d, 4, None)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(cut(x), dense(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ["tt", "svd", "tucker"])
def test_admm_projects_every_group(model, form):
    (layer,) = plan_layers(model, "2", format=form, ranks=2)
    admm = ADMM(model, Plan(layers=(layer,)), rho=0.5)
    weight = model[2].weight.detach().clone()
    parts = [project(form, part, layer.modes, layer.ranks) for part in weight.split(8)]
    torch.testing.assert_close(admm.Z["2"], torch.cat(parts), atol=1e-5, rtol=1e-4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = admm.update()[0].primal
    for _ in range(3):
        for _ in range(20):
            optimizer.zero_grad()
            admm.penalty().backward()
            optimizer.step()
        after = admm.update()[0].primal
    assert after < 0.1 * before
    cut = admm.factorize()
    target = torch.cat([project(form, part, layer.modes, layer.ranks) for part in to_dense(cut)[2].weight.detach().split(8)])
    torch.testing.assert_close(cut[2].dense_weight(), target, atol=1e-5, rtol=1e-4)


def test_moments_of_inputs_are_not_kept_for_groups(model):
    plan = Plan(layers=plan_layers(model, "2", ranks=2))
    with pytest.raises(PlanError, match=r"layer 2: `metric: activation` supports no convolution in groups, got 4 groups; use"):
        ADMM(model, plan, metric="activation")


def test_trained_cores_are_exported(model):
    model.eval()
    plan = Plan(layers=plan_layers(model, "2", format="tucker", ranks=4))
    cut = swap(copy.deepcopy(model), plan)
    x = torch.randn(2, 3, 8, 8)
    graph = to_onnx(to_dense(cut), x)
    made = factorize(graph, plan, {name: [core.numpy() for core in own] for name, own in cores_of(cut).items()})
    assert made.layers[0].steps == "conv 32→16 /4, conv 3×3 16→16 /4, conv 16→32 /4"
    session = ort.InferenceSession(made.model.SerializeToString(), providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative(scores, cut(x).detach().numpy()) < 1e-5
    again = decompose_graph(graph, plan)["2"]
    assert [core.shape for core in again] == [tuple(core.shape) for core in cores_of(cut)["2"]]


def test_a_layer_of_a_weight_of_zeros_can_be_trained(model):
    nn.init.zeros_(model[2].weight)
    cut = swap(model.eval(), Plan(layers=plan_layers(model, "2", ranks=3)))
    assert not cut[2].dense_weight().any()
    cut[2](torch.randn(2, 32, 8, 8)).sum().backward()
    assert cut[2].cores[0].grad.abs().sum() > 0


@pytest.mark.parametrize("form", FORMS)
def test_a_group_of_zeros_can_be_trained(model, form):
    with torch.no_grad():
        model[2].weight[8:16] = 0.0  # the second group of four
    plan = Plan(layers=plan_layers(model, "2", format=form, ranks=3))
    expected = project(form, model[2].weight.detach().contiguous(), plan.layers[0].modes, plan.layers[0].ranks, 4)
    cut = swap(model.eval(), plan)
    torch.testing.assert_close(cut[2].dense_weight().detach(), expected, atol=1e-4, rtol=1e-3)
    cut[2](torch.randn(2, 32, 8, 8)).sum().backward()
    assert all(cut[2].cores[0].grad.flatten(1).abs().sum(1) > 0)


def test_ranks_are_chosen_for_a_size(model):
    whole = sum(parameter.numel() for parameter in model.parameters())
    plan = plan_to_size(model, "2", 1.3, format="svd")
    small = sum(parameter.numel() for parameter in swap(model, Plan(layers=plan)).parameters())
    assert 1.3 <= whole / small < 1.3 * 1.35


@pytest.mark.parametrize("dense_is_faster", [False, True])
def test_it_compiles_without_breaks(model, dense_is_faster, monkeypatch):
    monkeypatch.setattr(layers, "_dense_is_faster", lambda *_: dense_is_faster)
    torch._dynamo.reset()
    cut = swap(model, Plan(layers=plan_layers(model, "2", ranks=3)))
    compiled = torch.compile(cut, backend="eager", fullgraph=True)
    for training in (True, False):
        cut.train(training)
        x = torch.randn(3, 3, 8, 8)
        torch.testing.assert_close(compiled(x), cut(x), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_which_convolutions_in_groups_can_be_planned():
    net = nn.Sequential(
        nn.Conv1d(4, 8, 3, groups=2), nn.Conv1d(8, 8, 3, groups=8), nn.Conv1d(8, 6, 1, padding="same", groups=2)
    )
    assert dense_layers(net) == ("0", "2")
    assert [dense_layer(net, name).spec.inputs for name in ("0", "2")] == [4, 8]
    with pytest.raises(PlanError, match=r"layer 1: a depthwise convolution \(groups=8\) cannot be factored"):
        plan_layers(net, "1", ranks=2)
    assert [layer.name for layer in plan_layers(net, "*", ranks=2)] == ["0", "2"]
    (layer,) = plan_layers(net, "0", ranks=np.int64(2))
    assert (layer.modes, layer.ranks) == ((4, 3, 2), (1, 2, 2, 1))
