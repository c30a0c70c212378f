"""LSTM and GRU layers whose input weights are made of cores: in torch, in training, and in ONNX."""

import copy

import numpy as np
import onnxruntime as ort
import pytest
import torch
from cases import relative
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from tensorrail_exporter import FORMATS, GraphError, LayerPlan, Plan, PlanError, factorize
from tensorrail_exporter.formats import format_of
from tensorrail_exporter.graphs.io import save_model
from tensorrail_runtime.graphs.cost import cost
from tensorrail_trainer import ADMM, cores_of, plan_layers, to_dense, to_onnx
from tensorrail_trainer.layers.dense import dense_layer
from tensorrail_trainer.layers.swap import swap
from tensorrail_trainer.networks.registry import MODELS

INPUT, HIDDEN, LAYERS = 12, 8, 2
STEPS = 3  # in graphs: torch's exporter works through every step


class Tagger(nn.Module):
    """A recurrent network over sequences with a linear head."""

    def __init__(self, kind, bidirectional, batch_first=True, **options):
        super().__init__()
        self.rnn = kind(INPUT, HIDDEN, LAYERS, bidirectional=bidirectional, batch_first=batch_first, **options)
        self.head = nn.Linear(HIDDEN * (1 + bidirectional), 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def plan_of(model, form_name, rank=3, layers=range(LAYERS), prefix="rnn."):
    form, plans = format_of(form_name), []
    for k in layers:
        shape = dense_layer(model, f"{prefix}weight_ih_l{k}").spec.shape
        modes = form.default_modes(shape)
        ranks = form.clamp(shape, modes, form.uniform(shape, modes, rank))
        plans.append(LayerPlan(name=f"{prefix}weight_ih_l{k}", format=form_name, modes=modes, ranks=ranks))
    return Plan(layers=tuple(plans))


def close(a, b, case=""):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4, msg=lambda difference: f"{case} {difference}")


def states_close(a, b):
    for one, other in zip(*((s if isinstance(s, tuple) else (s,)) for s in (a, b)), strict=True):
        close(one, other)


def train(model, steps=5):
    """Take a few steps of SGD on what requires a gradient."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 5, INPUT)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "bidirectional"),
    [
        pytest.param(nn.LSTM, True, id="LSTM, bidirectional"),
        pytest.param(nn.GRU, False, id="GRU, forward", marks=pytest.mark.slow),
        pytest.param(nn.LSTM, False, id="LSTM, forward", marks=pytest.mark.slow),
        pytest.param(nn.GRU, True, id="GRU, bidirectional", marks=pytest.mark.slow),
    ],
)
def test_trained_recurrent_cores_are_exported_exactly(kind, bidirectional):
    """Export once for all formats: after the dense training only cores are trained, and the rest of the graph is the same."""
    torch.manual_seed(0)
    tagger = Tagger(kind, bidirectional)
    train(tagger)
    for name, parameter in tagger.named_parameters():
        parameter.requires_grad_("weight_ih" in name)
    cut = swap(copy.deepcopy(tagger), plan_of(tagger, next(iter(FORMATS)))).eval()
    graph = to_onnx(to_dense(cut), torch.randn(2, STEPS, INPUT))
    for form_name in FORMATS:
        plan = plan_of(tagger, form_name)
        model = swap(copy.deepcopy(tagger), plan)
        before = cores_of(model)
        train(model)
        model.eval()
        cores = cores_of(model)
        assert {layer.name for layer in plan.layers} <= set(cores), form_name
        for name in cores:
            changed = [not torch.equal(a, b) for a, b in zip(before[name], cores[name], strict=True)]
            assert all(changed), (form_name, name)
        dense = to_dense(model)
        result = factorize(graph, plan, {name: [core.numpy() for core in many] for name, many in cores.items()})
        assert {node.op_type for node in result.model.graph.node} >= {kind.__name__}, form_name
        session = ort.InferenceSession(result.model.SerializeToString(), providers=["CPUExecutionProvider"])
        for batch in (1, 7):
            x = torch.randn(batch, STEPS, INPUT)
            with torch.no_grad():
                expected = model(x)
                close(expected, dense(x), form_name)
            assert relative(session.run(None, {"image": x.numpy()})[0], expected.numpy()) < 1e-5, (form_name, batch)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("form_name", ["tt", "ttm", "svd"])
@torch.no_grad()
def test_states_packed_and_single_sequences_are_those_of_the_dense_module(form_name, kind, batch_first):
    torch.manual_seed(1)
    model = Tagger(kind, True, batch_first)
    model = swap(model, plan_of(model, form_name)).eval()
    rnn, dense = model.rnn, to_dense(model).rnn
    x = torch.randn(3, 5, INPUT) if batch_first else torch.randn(5, 3, INPUT)
    packed = pack_padded_sequence(x, [5, 2, 4], batch_first=batch_first, enforce_sorted=False)
    state = torch.randn(LAYERS * 2, 3, HIDDEN)
    hx = (state, torch.randn_like(state)) if kind is nn.LSTM else state
    for arguments in ((x,), (x, hx), (packed,), (packed, hx)):
        (a, states_a), (b, states_b) = rnn(*arguments), dense(*arguments)
        assert type(a) is type(b)
        close(*((out.data if isinstance(arguments[0], type(packed)) else out) for out in (a, b)))
        states_close(states_a, states_b)
    one = torch.randn(5, INPUT)
    (a, states_a), (b, states_b) = rnn(one), dense(one)
    close(a, b)
    states_close(states_a, states_b)


@torch.no_grad()
def test_a_bare_module_one_of_its_layers_and_no_bias():
    torch.manual_seed(2)
    module = nn.GRU(INPUT, HIDDEN, LAYERS, bias=False)
    swapped = swap(module, plan_of(module, "tt", layers=[1], prefix=""))
    assert list(cores_of(swapped)) == ["weight_ih_l1"]
    assert "weight_ih_l0" in dict(swapped.named_parameters())
    x = torch.randn(5, 3, INPUT)
    close(swapped(x)[0], to_dense(swapped)(x)[0])
    assert "GRU(12, 8), weight_ih_l1: tt" in repr(swapped)


def test_dropout_between_layers_acts_in_training_only():
    torch.manual_seed(3)
    model = Tagger(nn.LSTM, False, dropout=0.9)
    model = swap(model, plan_of(model, "svd"))
    x = torch.randn(2, 5, INPUT)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_admm_makes_an_lstm_of_low_rank_and_its_cut_loses_little():
    torch.manual_seed(4)
    model = Tagger(nn.LSTM, True)
    x = torch.randn(32, 5, INPUT)
    target = torch.randn(32, 5, 3)
    admm = ADMM(model, plan_of(model, "tt", rank=2), rho=0.5)
    start = admm.update()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(15):
        for _ in range(20):
            optimizer.zero_grad()
            (nn.functional.mse_loss(model(x), target) + admm.penalty()).backward()
            optimizer.step()
        residuals = admm.update()
    for first, last in zip(start, residuals, strict=True):
        assert last.primal < 0.1 < first.primal
    trained = model(x).detach()
    assert relative(admm.factorize()(x).detach().numpy(), trained.numpy()) < 0.1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("rnn", "is a LSTM; name the input weight of one of its layers instead: rnn.weight_ih_l0, rnn.weight_ih_l1"),
        ("rnn.weight_ih_l2", "no such input weight; expected one of weight_ih_l0, weight_ih_l1"),
        ("rnn.weight_ih_l0_reverse", "no such input weight"),
        ("rnn.weight_hh_l2", "no such recurrent weight; expected one of weight_hh_l0, weight_hh_l1"),
        ("rnn.weight_hh_l0_reverse", "no such recurrent weight"),
        ("rnn.weight_hr_l0", "no such input weight"),
    ],
)
def test_a_plan_for_a_recurrent_weight_that_is_not_there_says_so(name, reason):
    with pytest.raises(PlanError, match=reason):
        dense_layer(Tagger(nn.LSTM, True), name)


@pytest.mark.parametrize("leaf", ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"])
def test_projections_have_no_onnx_operator_and_are_refused(leaf):
    with pytest.raises(PlanError, match="proj_size=4 has no ONNX operator; leave it out of the plan, or use proj_size=0"):
        dense_layer(nn.LSTM(INPUT, HIDDEN, proj_size=4), leaf)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"num_layers": 2}, {"bidirectional": True}])
def test_projections_are_not_exported_as_a_graph_that_does_not_run(options):
    """Torch's exporter writes one: it takes the sizes and the states of an LSTM without a projection."""
    model = nn.Sequential(nn.LSTM(INPUT, HIDDEN, proj_size=4, **options))
    with pytest.raises(GraphError, match="0 is an LSTM with proj_size=4, and ONNX's LSTM has no projection; use proj_size=0"):
        to_onnx(model, torch.zeros(2, STEPS, INPUT))


@torch.no_grad()
def test_ucf11_video_classification_runs_at_the_published_size():
    """57,600 inputs to 4·256 gates, modes 8·20·20·18 → 4·4·8·8 (Yang et al. 2017); the dense weight has 59 M parameters."""
    torch.manual_seed(5)
    plan = LayerPlan(name="weight_ih_l0", format="ttm", modes=(4, 4, 8, 8, 8, 20, 20, 18), ranks=(1, 4, 4, 4, 1), merge="auto")
    dense = nn.LSTM(57600, 256)
    # cores of a random weight are not looked for: the weight is what random cores stand for
    generator = torch.Generator().manual_seed(0)
    shapes = plan.core_shapes((1024, 57600))
    cores = [torch.randn(shape, generator=generator) / shape[-1] ** 0.5 / 4 for shape in shapes]
    model = swap(dense, Plan(layers=(plan,)), {"weight_ih_l0": cores})
    assert sum(core.numel() for core in cores_of(model)["weight_ih_l0"]) == plan.params((1024, 57600))
    x = torch.randn(6, 2, 57600) / 240
    close(model(x)[0], to_dense(model)(x)[0])
    assert np.isfinite(model(x)[0].numpy()).all()


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_classifiers_that_recipes_name_run_in_cores(kind, bidirectional):
    model = MODELS[kind](inputs=12, hidden=8, classes=3, layers=2, bidirectional=bidirectional).eval()
    plan = Plan(layers=plan_layers(model, "rnn.weight_ih_l?", ranks=4))
    cut = swap(copy.deepcopy(model), plan)
    assert (cut.rnn.hidden_size, cut.rnn.num_layers, cut.rnn.bidirectional) == (8, 2, bidirectional)
    x = torch.randn(2, 5, 12)
    close(cut(x), to_dense(cut)(x))


@pytest.mark.parametrize("kind", [pytest.param("lstm", marks=pytest.mark.slow), "gru"])
def test_the_cost_of_layers_both_ways_is_known(kind, tmp_path):
    """torch computes the shape between such layers in the graph, where ONNX's inference does not follow."""
    model = MODELS[kind](inputs=12, hidden=8, classes=3, layers=2, bidirectional=True).eval()
    save_model(to_onnx(model, torch.zeros(2, STEPS, 12)), tmp_path / "net.onnx")
    gates = {"lstm": 4, "gru": 3}[kind]
    macs = STEPS * 2 * gates * 8 * ((12 + 8) + (16 + 8))
    assert cost(tmp_path / "net.onnx").macs == macs + 16 * 3


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("shape", [(1, 5, HIDDEN), (2, 1, HIDDEN), (2, 7, HIDDEN), (2, 5, HIDDEN - 1), (3, 5, HIDDEN)])
def test_states_of_another_size_are_refused_as_by_the_dense_module(kind, shape):
    """Torch's kernels, which are called directly, would read past them."""
    dense = kind(INPUT, HIDDEN, LAYERS)
    model = swap(copy.deepcopy(dense), plan_of(dense, "tt", prefix=""))
    state = torch.zeros(shape)
    for one in (dense, model):
        with pytest.raises(RuntimeError, match=r"Expected hidden.* size \(2, 5, 8\)"):
            one(torch.zeros(3, 5, INPUT), (state, state) if kind is nn.LSTM else state)
        with pytest.raises(RuntimeError, match="must be equal to input_size"):
            one(torch.zeros(3, 5, INPUT + 1))
    good = torch.zeros(2, 5, HIDDEN)
    model(torch.zeros(3, 5, INPUT), [good, good] if kind is nn.LSTM else good)
