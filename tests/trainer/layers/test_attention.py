"""Multi-head attention whose projections are made of cores: in torch, in torch's transformer layers, and in ONNX."""

import copy

import numpy as np
import onnxruntime as ort
import pytest
import torch
from cases import relative
from torch import nn
from torch.nn.utils import parametrizations

import tensorrail as tr
from tensorrail_exporter import FORMATS, Plan, PlanError, factorize
from tensorrail_runtime.errors import GraphError
from tensorrail_trainer import ADMM, FactoredLayer, cores_of, plan_layers, to_dense, to_onnx
from tensorrail_trainer.layers import factored as layers
from tensorrail_trainer.layers.attention import FactoredAttention
from tensorrail_trainer.layers.dense import dense_layer, dense_layers
from tensorrail_trainer.layers.swap import swap

WIDTH, HEADS, QUERIES, KEYS, BATCH = 16, 4, 5, 7, 3
CAUSAL = nn.Transformer.generate_square_subsequent_mask(QUERIES)


class Attending(nn.Module):
    """Attention to oneself, or of the first steps to all, with a name that a plan can use."""

    def __init__(self, *, to_self=True, weights=False, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **options})
        self.to_self, self.weights = to_self, weights

    def forward(self, x):
        query = x if self.to_self else x[:, :2]
        out, weights = self.attn(query, x, x, need_weights=self.weights)
        return out + weights.sum() if self.weights else out


def cut_of(dense, form="svd", ranks=6, pattern="*"):
    """Return a copy with the layers of a pattern made of cores."""
    return swap(copy.deepcopy(dense), Plan(layers=plan_layers(dense, pattern, format=form, ranks=ranks)))


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def biased(dense):
    """Give biases values: torch starts them at zero, where a wrong one would not be seen."""
    for name, parameter in dense.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return dense


def inputs(kind, batch_first, batched=True, widths=(WIDTH, WIDTH)):
    """Return query, key and value of one kind of attention."""

    def tensor(length, width):
        x = torch.randn(BATCH, length, width) if batched else torch.randn(length, width)
        return x if batch_first or not batched else x.transpose(0, 1).contiguous()

    query = tensor(QUERIES, WIDTH)
    if kind == "self":
        return query, query, query
    if kind == "positions":  # query and key have positions added, value has not
        return query, query, tensor(QUERIES, WIDTH)
    key = tensor(KEYS, widths[0])
    return (query, key, key) if kind == "memory" else (query, key, tensor(KEYS, widths[1]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["self", "positions", "memory", "apart"])
@pytest.mark.parametrize("form", sorted(FORMATS))
def test_attention_of_cores_equals_the_reconstructed_dense_one(form, kind, batch_first, training):
    torch.manual_seed(0)
    dense = biased(nn.ModuleDict({"attn": nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)}))
    cut = cut_of(dense, form).train(training)
    back = to_dense(cut)
    assert type(cut["attn"]) is FactoredAttention
    assert type(back["attn"]) is nn.MultiheadAttention
    attended = inputs(kind, batch_first)
    for need_weights, average in ((True, True), (True, False), (False, True)):
        options = {"need_weights": need_weights, "average_attn_weights": average}
        (out, weights), (expected, expected_weights) = (m["attn"](*attended, **options) for m in (cut, back))
        close(out, expected)
        assert out.is_contiguous()
        assert (weights is None) == (expected_weights is None)
        if weights is not None:
            close(weights, expected_weights)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masks", ["keys", "pairs", "pairs of heads", "both", "numbers", "causal", "causal and keys"])
def test_masks_act_as_in_the_dense_module(masks, batch_first, need_weights):
    torch.manual_seed(0)
    cut = cut_of(biased(nn.ModuleDict({"attn": nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)})))
    attended = inputs("self" if "causal" in masks else "apart", batch_first)
    keys = QUERIES if "causal" in masks else KEYS
    padding = torch.zeros(BATCH, keys, dtype=torch.bool)
    padding[1, -2:] = True
    pairs = torch.rand(QUERIES, keys) < 0.3
    pairs[:, 0] = False  # one key is left for each query
    of_heads = torch.rand(BATCH * HEADS, QUERIES, keys) < 0.3
    of_heads[..., 0] = False
    options = {
        "keys": {"key_padding_mask": padding},
        "pairs": {"attn_mask": pairs},
        "pairs of heads": {"attn_mask": of_heads},
        "both": {"key_padding_mask": padding, "attn_mask": pairs},
        "numbers": {"key_padding_mask": torch.randn(BATCH, keys), "attn_mask": torch.randn(QUERIES, keys)},
        "causal": {"attn_mask": CAUSAL, "is_causal": True},
        "causal and keys": {"attn_mask": CAUSAL, "is_causal": True, "key_padding_mask": padding.float() * -9},
    }[masks]
    for training in (True, False):
        found, expected = (
            m.train(training)["attn"](*attended, need_weights=need_weights, **options) for m in (cut, to_dense(cut))
        )
        for one, other in zip(found, expected, strict=True):
            assert (one is None and other is None) or close(one, other) is None


def test_a_sequence_without_a_batch_no_bias_and_inputs_of_several_widths():
    torch.manual_seed(0)
    dense = biased(nn.ModuleDict({"attn": nn.MultiheadAttention(WIDTH, HEADS, bias=False, kdim=6, vdim=10)}))
    assert dense_layers(dense) == ("attn.q_proj_weight", "attn.k_proj_weight", "attn.v_proj_weight", "attn.out_proj")
    for pattern in ("*", "attn.k_proj_weight", "attn.out_proj"):
        cut = cut_of(dense, pattern=pattern)
        for batched in (True, False):
            attended = inputs("apart", batch_first=False, batched=batched, widths=(6, 10))
            mask = torch.zeros(KEYS, dtype=torch.bool) if not batched else None
            for one, other in zip(*(m["attn"](*attended, key_padding_mask=mask) for m in (cut, to_dense(cut))), strict=True):
                close(one, other)
    with_bias = biased(nn.ModuleDict({"attn": nn.MultiheadAttention(WIDTH, HEADS, kdim=6, vdim=10)}))
    cut, attended = cut_of(with_bias), inputs("apart", batch_first=False, widths=(6, 10))
    close(cut["attn"](*attended)[0], to_dense(cut)["attn"](*attended)[0])


@pytest.mark.parametrize("kind", ["self", "memory"])
@pytest.mark.parametrize("dense_is_faster", [True, False])
@pytest.mark.parametrize("form", ["svd", "tt", "ttm"])
def test_gradients_are_those_through_the_reconstructed_weights(form, dense_is_faster, kind, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(layers, "_dense_is_faster", lambda *_: dense_is_faster)
    dense = biased(nn.ModuleDict({"attn": nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)}))
    cut = cut_of(dense, form).train()
    attended = inputs(kind, batch_first=True)
    attention = cut["attn"]
    weights = {
        "in_proj_weight": attention.in_proj_weight.dense_weight(),
        "in_proj_bias": attention.in_proj_bias,
        "out_proj.weight": attention.out_proj.dense_weight(),
        "out_proj.bias": attention.out_proj.bias,
    }
    through = torch.func.functional_call(dense["attn"], weights, attended)[0]
    slope = torch.randn_like(through)
    expected = torch.autograd.grad((through * slope).sum(), list(cut.parameters()))
    found = torch.autograd.grad((attention(*attended)[0] * slope).sum(), list(cut.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    cut = cut_of(nn.ModuleDict({"attn": nn.MultiheadAttention(WIDTH, HEADS, dropout=0.9)}))
    attended = inputs("self", batch_first=False)
    for need_weights in (True, False):
        first, second = (cut.train()["attn"](*attended, need_weights=need_weights)[0] for _ in range(2))
        assert not torch.equal(first, second)
        cut.eval()
        close(cut["attn"](*attended, need_weights=need_weights)[0], to_dense(cut)["attn"](*attended)[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # the dense layers use them
@pytest.mark.parametrize("pattern", ["*", "*in_proj_weight", "*out_proj", "*linear1", "layers.1.*"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_transformer_layers_run_the_cores_in_training_and_in_evaluation(norm_first, pattern, monkeypatch):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    dense = biased(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)).requires_grad_(False)
    cut = cut_of(dense, "svd", 4, pattern)
    back, ran = to_dense(cut), []
    for name in ("forward", "part"):
        own = getattr(FactoredLayer, name)
        monkeypatch.setattr(FactoredLayer, name, lambda layer, *args, own=own: ran.append(layer) or own(layer, *args))
    x, padding = torch.randn(BATCH, QUERIES, WIDTH), torch.zeros(BATCH, QUERIES, dtype=torch.bool)
    padding[1, -2:] = True
    for training in (True, False):
        for mask in (None, padding):
            ran.clear()
            out, expected = (m.train(training)(x, src_key_padding_mask=mask) for m in (cut, back))
            kept = slice(None) if mask is None else ~mask  # nested tensors give zeros elsewhere
            close(out[kept], expected[kept])
            assert len(ran) == len(cores_of(cut))
    assert back.use_nested_tensor == dense.use_nested_tensor
    assert {name: type(module) for name, module in back.named_modules()}.keys() == dict(dense.named_modules()).keys()
    assert [part.activation_relu_or_gelu for part in back.layers] == [1, 1]


def test_a_decoder_and_a_whole_transformer_run_as_their_dense_forms():
    torch.manual_seed(0)
    dense = biased(nn.Transformer(WIDTH, HEADS, 1, 1, 32, dropout=0.0, batch_first=True))
    cut = cut_of(dense).eval()
    assert "decoder.layers.0.multihead_attn.in_proj_weight" in cores_of(cut)
    memory, x = torch.randn(BATCH, KEYS, WIDTH), torch.randn(BATCH, QUERIES, WIDTH)
    close(cut(memory, x, tgt_mask=CAUSAL, tgt_is_causal=True), to_dense(cut)(memory, x, tgt_mask=CAUSAL, tgt_is_causal=True))


@pytest.mark.parametrize("planned", ["attn.in_proj_weight", "attn.out_proj"])
def test_parameters_that_stay_dense_hooks_and_modes_are_kept(planned):
    dense = nn.ModuleDict({"attn": nn.MultiheadAttention(WIDTH, HEADS)}).double().eval()
    dense["attn"].in_proj_bias.requires_grad_(False)
    seen, before = [], dict(dense.named_parameters())
    handle = dense["attn"].register_forward_hook(lambda *_: seen.append(1))
    cut = swap(dense, Plan(layers=plan_layers(dense, planned, format="svd", ranks=3)))
    assert type(cut["attn"]) is FactoredAttention
    kept = {name: parameter for name, parameter in cut.named_parameters() if name in before}
    assert kept.keys() >= before.keys() - {planned, f"{planned}.weight", f"{planned}.bias"}
    assert all(parameter is before[name] for name, parameter in kept.items() if name != f"{planned}.bias")
    assert {parameter.dtype for parameter in cut.parameters()} == {torch.float64}
    back = to_dense(cut)
    assert not cut.training
    assert not back["attn"].training
    assert not back["attn"].in_proj_bias.requires_grad
    assert back["attn"].in_proj_weight.requires_grad
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    close(cut["attn"](x, x, x)[0], back["attn"](x, x, x)[0])
    assert seen == [1, 1]
    handle.remove()
    assert "svd" in repr(cut)


def test_admm_makes_projections_of_low_rank_and_their_cut_loses_little():
    torch.manual_seed(0)
    model = Attending()
    x, target = torch.randn(16, QUERIES, WIDTH), torch.randn(16, QUERIES, WIDTH)
    admm = ADMM(model, Plan(layers=plan_layers(model, "*", format="svd", ranks=2)), rho=0.5)
    start = admm.update()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(15):
        for _ in range(20):
            optimizer.zero_grad()
            (nn.functional.mse_loss(model(x), target) + admm.penalty()).backward()
            optimizer.step()
        residuals = admm.update()
    for first, last in zip(start, residuals, strict=True):
        assert last.primal < 0.1 < first.primal
    trained = model(x).detach()
    cut = admm.factorize()
    assert sorted(cores_of(cut)) == ["attn.in_proj_weight", "attn.out_proj"]
    assert relative(cut(x).detach().numpy(), trained.numpy()) < 0.1


def test_the_metric_of_activations_reads_the_inputs_of_attention():
    torch.manual_seed(0)
    x = torch.randn(4, QUERIES, WIDTH) * torch.linspace(0.1, 2, WIDTH)
    model = Attending()
    admm = ADMM(model, Plan(layers=plan_layers(model, "*in_proj*", format="svd", ranks=2)), metric="activation")
    model(x)
    admm.update()
    rows = x.reshape(-1, WIDTH)
    root = admm.roots["attn.in_proj_weight"].root
    second = rows.T @ rows
    torch.testing.assert_close(root @ root, second * (WIDTH / second.trace()), atol=1e-3, rtol=1e-3)
    apart = Attending(to_self=False)
    ADMM(apart, Plan(layers=plan_layers(apart, "*in_proj*", format="svd", ranks=2)), metric="activation")
    with pytest.raises(
        PlanError, match=r"`metric: activation` expects self-attention, where query, key and value are one tensor"
    ):
        apart(x)
    of_widths = nn.MultiheadAttention(WIDTH, HEADS, kdim=6, vdim=10)
    model = nn.ModuleDict({"attn": of_widths})
    admm = ADMM(model, Plan(layers=plan_layers(model, "*_proj_weight", format="svd", ranks=2)), metric="activation")
    of_widths(*inputs("apart", batch_first=False, widths=(6, 10)))
    admm.update()
    assert [len(root.root) for root in admm.roots.values()] == [WIDTH, 6, 10]


def test_trained_attention_is_exported_exactly():
    """Export the dense form once for all formats: of the rest nothing is trained."""
    torch.manual_seed(0)
    dense = biased(Attending(weights=True))
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_("weight" in name)
    cut = cut_of(dense)
    x = torch.randn(2, QUERIES, WIDTH)
    graph = to_onnx(to_dense(cut), x)
    for form in FORMATS:
        plan = Plan(layers=plan_layers(dense, "*", format=form, ranks=4))
        model = swap(copy.deepcopy(dense), plan)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        before = cores_of(model)
        for _ in range(3):
            optimizer.zero_grad()
            (model.train()(x) - x).square().mean().backward()
            optimizer.step()
        cores = cores_of(model.eval())
        assert all(not torch.equal(a, b) for name in cores for a, b in zip(before[name], cores[name], strict=True))
        factored = factorize(graph, plan, {name: [core.numpy() for core in layer] for name, layer in cores.items()}).model
        assert "attn.in_proj_weight" not in {tensor.name for tensor in factored.graph.initializer}
        assert relative(run(factored, x), model(x).detach().numpy()) < 1e-5, form


@pytest.mark.parametrize("to_self", [True, False])
def test_a_network_of_cores_is_exported_itself(to_self):
    torch.manual_seed(0)
    cut = cut_of(biased(Attending(to_self=to_self)), "tt", 4).eval()
    graph = to_onnx(cut, torch.randn(2, QUERIES, WIDTH))
    for batch in (1, 5):
        x = torch.randn(batch, QUERIES, WIDTH)
        assert relative(run(graph, x), cut(x).detach().numpy()) < 1e-5


def test_all_files_of_a_trained_transformer_are_written(tmp_path):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
    report = tr.export_trained(cut_of(nn.TransformerEncoder(layer, 1)), torch.randn(2, QUERIES, WIDTH), tmp_path)
    assert report.holds
    assert report.layers == 4
    with pytest.raises(
        GraphError, match=r"layer attn.in_proj_weight: expected attention whose query, key and value are one .* with to_onnx"
    ):
        tr.export_trained(cut_of(Attending(to_self=False)), torch.randn(2, QUERIES, WIDTH), tmp_path)


def run(model, x):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": np.asarray(x)})[0]


def test_attention_of_cores_is_compiled_and_traced_as_one_node():
    torch.manual_seed(0)
    torch._dynamo.reset()
    cut = cut_of(biased(nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True)), "tt", 3)
    compiled = torch.compile(cut, backend="eager", fullgraph=True)
    for training in (True, False):
        cut.train(training)
        for batch in (2, 3):
            x = torch.randn(batch, QUERIES, WIDTH)
            with torch.no_grad():
                close(compiled(x), cut(x))
    torch._dynamo.reset()
    model = cut_of(Attending())
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["attn"]
    close(traced(x), model(x))


class Doubled(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return tuple(2 * part for part in super().forward(*args, **kwargs))


@pytest.mark.parametrize(
    ("module", "name", "reason"),
    [
        (nn.MultiheadAttention(8, 2, add_bias_kv=True), "attn.in_proj_weight", "add_bias_kv=True adds a key and a value"),
        (
            nn.MultiheadAttention(8, 2, add_zero_attn=True),
            "attn.in_proj_weight",
            "add_zero_attn=True adds a key and a value of",
        ),
        (Doubled(8, 2), "attn.in_proj_weight", "Doubled overrides MultiheadAttention.forward"),
        (nn.MultiheadAttention(8, 2), "attn", "name one of its projections instead: attn.in_proj_weight, attn.out_proj"),
        (nn.MultiheadAttention(8, 2), "attn.q_proj_weight", "no such weight; expected one of in_proj_weight, out_proj"),
        (nn.MultiheadAttention(8, 2, kdim=4), "attn.in_proj_weight", "no such weight; expected one of q_proj_weight, k_proj"),
        (
            parametrizations.weight_norm(nn.MultiheadAttention(8, 2), "in_proj_weight"),
            "attn.in_proj_weight",
            "expected a weight that is a parameter, got in_proj_weight, which weight_norm",
        ),
    ],
)
def test_attention_that_cores_cannot_stand_for_is_refused_with_the_reason(module, name, reason):
    model = nn.ModuleDict({"attn": module})
    with pytest.raises(PlanError, match=rf"layer {name}: .*{reason}"):
        dense_layer(model, name)
    if name in dict(model.named_parameters()):
        with pytest.raises(PlanError, match=rf"layer {name}: .*{reason}"):
            plan_layers(model, name, ranks=2)
        assert name not in dense_layers(model)


@pytest.mark.parametrize("module", [nn.MultiheadAttention(8, 2, add_zero_attn=True), Doubled(8, 2)])
def test_other_attention_reads_the_weight_of_an_output_of_cores(module):
    cut = cut_of(nn.ModuleDict({"attn": module}), ranks=3)
    assert list(cores_of(cut)) == ["attn.out_proj"]
    assert type(cut["attn"]) is type(module)
    x = torch.randn(5, 2, 8)
    close(cut["attn"](x, x, x)[0], to_dense(cut)["attn"](x, x, x)[0])


def test_weights_that_are_made_of_cores_already_are_refused():
    cut = cut_of(Attending())
    with pytest.raises(PlanError, match=r"layer attn.in_proj_weight: .* it is already made of cores"):
        dense_layer(cut, "attn.in_proj_weight")
    cut = cut_of(Attending(), pattern="*out_proj")
    with pytest.raises(PlanError, match=r"attn.in_proj_weight: other weights of this MultiheadAttention are made of cores alr"):
        dense_layer(cut, "attn.in_proj_weight")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"query": torch.zeros(QUERIES, BATCH, WIDTH - 1)},
            r"expected query, key and value of 16, 16 and 16 features, got \[15",
        ),
        ({"query": torch.zeros(QUERIES, WIDTH)}, "expected query, key and value with 3 axes, or 2 without a batch, got 2, 3"),
        ({"query": torch.zeros(QUERIES, 1, WIDTH)}, "expected key and value of the same length, and a batch of the same size"),
        ({"value": torch.zeros(KEYS - 1, BATCH, WIDTH)}, "expected key and value of the same length"),
        ({"attn_mask": torch.zeros(1, KEYS)}, r"attn_mask: expected shape \[5, 7\] or \[12, 5, 7\], got \[1, 7\]"),
        ({"key_padding_mask": torch.zeros(1, KEYS)}, r"key_padding_mask: expected shape \[3, 7\], got \[1, 7\]"),
        ({"key_padding_mask": torch.zeros(BATCH, KEYS, dtype=torch.int64)}, "expected boolean masks or"),
        ({"is_causal": True}, "is_causal is a hint that attn_mask is the causal mask: expected attn_mask as well"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_as_by_the_dense_module(change, reason):
    dense = nn.ModuleDict({"attn": nn.MultiheadAttention(WIDTH, HEADS)})
    query, key, value = inputs("apart", batch_first=False)
    arguments = {"query": query, "key": key, "value": value} | change
    with pytest.raises((RuntimeError, AssertionError)):
        dense["attn"](**arguments)
    with pytest.raises(RuntimeError, match=reason):
        cut_of(dense)["attn"](**arguments)


def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor([torch.zeros(2, WIDTH), torch.zeros(3, WIDTH)], layout=torch.jagged)
    with pytest.raises(RuntimeError, match="takes padded tensors and key_padding_mask, got a nested tensor"):
        cut_of(Attending()).attn(nested, nested, nested)


class Adapted(nn.Linear):
    """As adapters do it: torch's attention reads the weight, and never calls this."""

    def forward(self, x):
        return super().forward(x) + 1


def test_a_dense_output_is_read_as_by_torch():
    torch.manual_seed(0)
    dense = biased(nn.ModuleDict({"attn": nn.MultiheadAttention(WIDTH, HEADS)}))
    adapted = Adapted(WIDTH, WIDTH)
    adapted.load_state_dict(dense["attn"].out_proj.state_dict())
    dense["attn"].out_proj = adapted
    cut = cut_of(dense, ranks=WIDTH, pattern="*in_proj_weight")
    x = torch.randn(QUERIES, BATCH, WIDTH)
    adapted.register_forward_hook(lambda *_: pytest.fail("it was called"))
    close(cut["attn"](x, x, x)[0], dense["attn"](x, x, x)[0])
