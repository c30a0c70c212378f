"""LSTM and GRU layers whose recurrent weights are made of cores: in torch, in training, and in ONNX."""

import copy

import onnxruntime as ort
import pytest
import torch
from cases import relative
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import tensorrail as tr
from tensorrail_exporter import FORMATS, Plan, PlanError, factorize
from tensorrail_trainer import ADMM, cores_of, plan_layers, to_dense, to_onnx
from tensorrail_trainer.layers.dense import dense_layer, dense_layers
from tensorrail_trainer.layers.swap import swap

INPUT, HIDDEN, LAYERS = 12, 8, 2
STEPS = 3  # in graphs: torch's exporter works through every step


class Tagger(nn.Module):
    """A recurrent network over sequences with a linear head."""

    def __init__(self, kind, bidirectional, **options):
        super().__init__()
        self.rnn = kind(INPUT, HIDDEN, LAYERS, bidirectional=bidirectional, batch_first=True, **options)
        self.head = nn.Linear(HIDDEN * (1 + bidirectional), 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def plan_of(model, *patterns, form="svd", ranks=3):
    return Plan(layers=tuple(layer for pattern in patterns for layer in plan_layers(model, pattern, format=form, ranks=ranks)))


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def train(model, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 5, INPUT)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("form_name", FORMATS)
@pytest.mark.parametrize(("kind", "bidirectional"), [(nn.LSTM, True), (nn.GRU, False)])
@torch.no_grad()
def test_states_packed_and_single_sequences_are_those_of_the_dense_module(kind, bidirectional, form_name):
    torch.manual_seed(1)
    model = Tagger(kind, bidirectional)
    model = swap(model, plan_of(model, "rnn.weight_hh_l?", form=form_name)).eval()
    assert list(cores_of(model)) == ["rnn.weight_hh_l0", "rnn.weight_hh_l1"]
    rnn, dense = model.rnn, to_dense(model).rnn
    x = torch.randn(3, 5, INPUT)
    packed = pack_padded_sequence(x, [5, 2, 4], batch_first=True, enforce_sorted=False)
    state = torch.randn(LAYERS * (1 + bidirectional), 3, HIDDEN)
    hx = (state, torch.randn_like(state)) if kind is nn.LSTM else state
    for arguments in ((x,), (x, hx), (packed,), (packed, hx)):
        (a, states_a), (b, states_b) = rnn(*arguments), dense(*arguments)
        close(*((out.data if isinstance(arguments[0], type(packed)) else out) for out in (a, b)))
        close(states_a, states_b)


def test_full_rank_is_the_dense_module():
    torch.manual_seed(2)
    model = Tagger(nn.LSTM, True)
    plan = plan_of(model, "rnn.weight_hh_l?", "rnn.weight_ih_l?", ranks=99)
    x = torch.randn(3, 5, INPUT)
    close(swap(copy.deepcopy(model), plan)(x), model(x))


@pytest.mark.parametrize(
    ("kind", "bidirectional"),
    [
        pytest.param(nn.LSTM, False, id="LSTM, forward"),
        pytest.param(nn.GRU, True, id="GRU, bidirectional"),
        pytest.param(nn.LSTM, True, id="LSTM, bidirectional", marks=pytest.mark.slow),
        pytest.param(nn.GRU, False, id="GRU, forward", marks=pytest.mark.slow),
    ],
)
def test_trained_cores_of_both_weights_are_exported_exactly(kind, bidirectional):
    torch.manual_seed(0)
    model = Tagger(kind, bidirectional)
    plan = plan_of(model, "rnn.weight_hh_l?", "rnn.weight_ih_l0")
    model = swap(model, plan)
    before = cores_of(model)
    train(model)
    model.eval()
    cores = cores_of(model)
    for name, own in cores.items():
        assert all(not torch.equal(a, b) for a, b in zip(before[name], own, strict=True)), name
    graph = to_onnx(to_dense(model), torch.randn(2, STEPS, INPUT))
    result = factorize(graph, plan, {name: [core.numpy() for core in own] for name, own in cores.items()})
    assert kind.__name__ not in {node.op_type for node in result.model.graph.node}
    session = ort.InferenceSession(result.model.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in (1, 7):
        x = torch.randn(batch, STEPS, INPUT)
        with torch.no_grad():
            expected = model(x)
        assert relative(session.run(None, {"image": x.numpy()})[0], expected.numpy()) < 1e-5


def test_one_call_exports_both_weights(tmp_path):
    torch.manual_seed(3)
    model = Tagger(nn.GRU, False)
    model = swap(model, plan_of(model, "rnn.weight_hh_l0", "rnn.weight_ih_l1")).eval()
    made = tr.export_trained(model, torch.randn(2, STEPS, INPUT), tmp_path)
    assert made.layers == 2
    assert {layer.name for layer in Plan.load(tmp_path / "plan.json").layers} == {"rnn.weight_hh_l0", "rnn.weight_ih_l1"}


def test_admm_makes_a_recurrence_of_low_rank_and_its_cut_loses_little():
    torch.manual_seed(4)
    model = Tagger(nn.LSTM, True)
    x, target = torch.randn(32, 5, INPUT), torch.randn(32, 5, 3)
    admm = ADMM(model, plan_of(model, "rnn.weight_hh_l?", ranks=2), rho=0.5)
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


def test_patterns_choose_recurrent_weights_only_where_they_name_them():
    model = Tagger(nn.LSTM, False)
    assert dense_layers(model) == ("rnn.weight_ih_l0", "rnn.weight_ih_l1", "head")
    assert [layer.name for layer in plan_layers(model, "*", format="svd", ranks=2)] == list(dense_layers(model))
    assert [layer.name for layer in plan_layers(model, "*weight_hh*", format="svd", ranks=2)] == [
        "rnn.weight_hh_l0",
        "rnn.weight_hh_l1",
    ]
    assert dense_layer(model, "rnn.weight_hh_l1").spec.shape == (4 * HIDDEN, HIDDEN)
    with pytest.raises(PlanError, match="`metric: activation` supports only weight_ih_l0: states"):
        ADMM(model, plan_of(model, "rnn.weight_hh_l0"), rho=0.5, metric="activation")


@torch.no_grad()
def test_cores_in_half_precision_and_under_autocast_run():
    torch.manual_seed(5)
    model = Tagger(nn.LSTM, True)
    model = swap(model, plan_of(model, "rnn.weight_hh_l?")).eval()
    x = torch.randn(2, 5, INPUT)
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative(model(x).float().numpy(), exact.numpy()) < 0.1
    assert relative(model.to(torch.bfloat16)(x.to(torch.bfloat16)).float().numpy(), exact.numpy()) < 0.1


def test_torch_exports_cores_of_a_recurrence():
    torch.manual_seed(6)
    model = Tagger(nn.GRU, False)
    model = swap(model, plan_of(model, "rnn.weight_hh_l?", form="tt")).eval()
    x = torch.randn(2, STEPS, INPUT)
    close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_torchs_loop_gets_weights_that_are_contiguous(form, monkeypatch):
    """As cuDNN needs them: a weight of Tucker cores comes out transposed."""
    model = nn.ModuleDict({"rnn": nn.LSTM(6, 8, bidirectional=True)})
    cut = swap(model, plan_of(model, "*weight_ih*", "*weight_hh*", form=form))
    own, given = torch.lstm, []
    monkeypatch.setattr(torch, "lstm", lambda x, states, flat, *rest: given.extend(flat) or own(x, states, flat, *rest))
    cut["rnn"](torch.randn(4, 2, 6))
    assert len(given) == 8
    assert all(weight.is_contiguous() for weight in given)


def test_a_graph_gives_no_other_weight_the_name_of_a_core():
    torch.manual_seed(0)
    model = Tagger(nn.GRU, False)
    cut = swap(model, plan_of(model, "*weight_hh*"))
    graph = to_onnx(cut, torch.randn(2, STEPS, INPUT))
    shapes = {name: sorted(parameter.shape) for name, parameter in cut.named_parameters() if ".cores." in name}
    named = {tensor.name: sorted(tensor.dims) for tensor in graph.graph.initializer if ".cores." in tensor.name}
    assert named == {name: shapes[name] for name in named}


def test_weights_beside_those_of_cores_are_refused_with_the_reason():
    model = Tagger(nn.LSTM, False)
    cut = swap(model, plan_of(model, "rnn.weight_ih_l0"))
    with pytest.raises(PlanError, match=r"rnn.weight_ih_l0: .* it is already made of cores"):
        dense_layer(cut, "rnn.weight_ih_l0")
    with pytest.raises(PlanError, match=r"rnn.weight_hh_l0: other weights of this LSTM are made of cores already; plan all"):
        dense_layer(cut, "rnn.weight_hh_l0")
