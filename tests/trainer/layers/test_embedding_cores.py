"""Embeddings whose table is made of cores: in torch, in training, and in ONNX."""

import copy

import onnxruntime as ort
import pytest
import torch
from cases import cases, draw_plan, relative
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tensorrail as tr
from tensorrail_exporter import FORMATS, LayerPlan, Plan, PlanError, factorize
from tensorrail_runtime.errors import GraphError
from tensorrail_trainer import ADMM, FactoredLayer, cores_of, plan_layers, to_dense, to_onnx
from tensorrail_trainer.admm.moments import input_roots
from tensorrail_trainer.layers import factored as layers
from tensorrail_trainer.layers.dense import dense_layer, dense_layers
from tensorrail_trainer.layers.swap import swap
from tensorrail_trainer.planning.ranks import plan_to_size

ENTRIES, WIDTH = 39, 16  # in `ttm` with a row of padding
READING = sorted(FORMATS)


class Reader(nn.Module):
    """ids (batch, time) → scores (batch, time, 5)."""

    def __init__(self, **options):
        super().__init__()
        self.embed, self.head = nn.Embedding(ENTRIES, WIDTH, **options), nn.Linear(WIDTH, 5)

    def forward(self, image):
        return self.head(self.embed(image))


def plan_of(model, form="svd", ranks=4, pattern="embed"):
    return Plan(layers=plan_layers(model, pattern, format=form, ranks=ranks))


def ids_of(*shape):
    return torch.randint(0, ENTRIES, shape)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@given(data=st.data())
@cases(40, 200)
def test_an_embedding_of_cores_equals_the_reconstructed_dense_one(data):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    (features, entries), plan = draw_plan(data, "0", data.draw(st.sampled_from(READING)), op="linear", gathers=True)
    dense = nn.Sequential(nn.Embedding(entries, features))
    try:
        model = swap(copy.deepcopy(dense), Plan(layers=(plan,)))
    except PlanError as error:
        assert "entries of an embedding as a single mode" in str(error)  # noqa: PT017 - whether it is raised depends on the plan
        return
    ids = torch.randint(0, entries, data.draw(st.sampled_from([(3,), (2, 3), (2, 1, 2), (), (0, 4)])))
    for training in (False, True):
        rows, expected = model.train(training)(ids), to_dense(model)(ids)
        torch.testing.assert_close(rows, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", READING)
def test_both_ways_to_train_a_table_have_the_same_gradients(form, monkeypatch):
    torch.manual_seed(0)
    model, ids, found = swap(reader := Reader(), plan_of(reader, form)), ids_of(3, 7), []
    for pays in (False, True):
        monkeypatch.setattr(layers, "_dense_is_faster", lambda *_, pays=pays: pays)
        model.zero_grad()
        model.train()(ids).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(gradient.any() for gradient in found[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_table_is_used_like_torchs():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Embedding(ENTRIES, WIDTH)).double()
    cut = swap(copy.deepcopy(dense), plan_of(dense, ranks=WIDTH, pattern="0"))
    assert type(cut[0]) is FactoredLayer
    for name in ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"):
        assert getattr(cut[0], name) == getattr(dense[0], name)
    close(cut[0].weight + 0, dense[0].weight)
    back = to_dense(cut)
    assert type(back[0]) is nn.Embedding
    close(back[0].weight, dense[0].weight)
    tied = nn.functional.linear(cut(ids_of(3)), cut[0].weight)  # a model may read the table as the weight of a product
    tied.square().sum().backward()
    assert all(core.grad.any() for core in cut[0].cores)
    for index in (ENTRIES, -1):
        for form in ("svd", "ttm"):
            with pytest.raises(IndexError):
                swap(copy.deepcopy(dense), plan_of(dense, form, pattern="0"))(torch.tensor([index]))
    single = swap(nn.Sequential(nn.Embedding(ENTRIES, WIDTH)), plan_of(dense, pattern="0"))
    for training in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            assert single.train(training)(ids_of(3)).dtype == nn.Embedding(4, 2)(torch.tensor([1])).dtype == torch.float32


@pytest.mark.parametrize(
    ("form", "shapes"), [("svd", [(WIDTH, 2), (2, ENTRIES)]), ("ttm", [(1, 4, 8, 2), (2, 4, 5, 1)])], ids=["svd", "ttm"]
)
def test_tables_are_planned_to_a_size_and_trained_toward_low_rank(form, shapes):
    torch.manual_seed(0)
    model, ids, target = Reader(), ids_of(16, 8), torch.randn(16, 8, 5)
    plan = Plan(layers=tr.plan_to_size(model, "*", 1.7, format=form))
    assert "embed" in {layer.name for layer in plan.layers}
    plan = plan_of(model, form, ranks=2)
    admm = ADMM(model, plan, rho=0.5)
    assert admm.Z["embed"].shape == (WIDTH, ENTRIES)
    start = admm.update()[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(15):
        for _ in range(20):
            optimizer.zero_grad()
            (nn.functional.mse_loss(model(ids), target) + admm.penalty()).backward()
            optimizer.step()
        last = admm.update()[0]
    assert last.primal < 0.1 < start.primal
    admm.project_weights()
    trained = model(ids).detach()
    cut = admm.factorize()
    assert [tuple(core.shape) for core in cores_of(cut)["embed"]] == shapes
    assert relative(cut(ids).detach().numpy(), trained.numpy()) < 1e-4


def run(model, ids):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": ids.numpy()})[0]


def test_trained_tables_are_exported_exactly(tmp_path):
    """Export the dense form once for all formats: of the rest nothing is trained."""
    torch.manual_seed(0)
    dense, ids = Reader(), ids_of(2, 7)
    dense.head.requires_grad_(False)
    graph = to_onnx(to_dense(swap(copy.deepcopy(dense), plan_of(dense))), ids)
    for form in READING:
        plan = plan_of(dense, form)
        model = swap(copy.deepcopy(dense), plan)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(ids).square().mean().backward()
            optimizer.step()
        cores = {name: [core.numpy() for core in layer] for name, layer in cores_of(model).items()}
        factored = factorize(graph, plan, cores).model
        assert "embed.weight" not in {tensor.name for tensor in factored.graph.initializer}
        for batch in (1, 5):
            other = ids_of(batch, 7)
            assert relative(run(factored, other), model.eval()(other).detach().numpy()) < 1e-5, form
    other = ids_of(5, 7)  # the last format is `ttm`
    assert relative(run(to_onnx(model, ids), other), model(other).detach().numpy()) < 1e-5
    assert tr.export_trained(model, ids, tmp_path).holds


class Positioned(Reader):
    def __init__(self):
        super().__init__()
        self.places = nn.Embedding(7, WIDTH)
        self.register_buffer("positions", torch.arange(7))

    def forward(self, image):
        return self.head(self.embed(image) + self.places(self.positions))


def test_a_table_of_stored_positions_is_exported_with_the_network_alone(tmp_path):
    torch.manual_seed(0)
    dense, ids = Positioned(), ids_of(2, 7)
    model = swap(dense, plan_of(dense, pattern="*")).eval()
    assert relative(run(to_onnx(model, ids), ids), model(ids).detach().numpy()) < 1e-5
    with pytest.raises(GraphError, match=r"layer places: expected an embedding of indices that a run gives, .* with to_onnx"):
        tr.export_trained(model, ids, tmp_path)


def test_a_table_that_is_read_as_a_weight_too_is_exported_with_its_cores(tmp_path):
    torch.manual_seed(0)
    dense, ids = Reader(), ids_of(2, 7)
    model = swap(dense, plan_of(dense)).eval()
    model.head = nn.Identity()
    model.register_forward_hook(lambda model, _, out: nn.functional.linear(out, model.embed.weight))
    assert tr.export_trained(model, ids, tmp_path).holds


@pytest.mark.parametrize("form", ["tt", "ttm"])
def test_a_table_of_cores_is_compiled_and_traced_as_one_node(form):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = swap(reader := Reader(), plan_of(reader, form))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for training in (True, False):
        model.train(training)
        for batch in (2, 3):
            ids = ids_of(batch, 4)
            close(compiled(ids), model(ids))
    torch._dynamo.reset()
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["embed", "head"]


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 4 * super().forward(ids)


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (nn.Embedding(ENTRIES, WIDTH, padding_idx=3), "padding_idx=3 keeps one row as it is, and cores have no rows"),
        (nn.Embedding(ENTRIES, WIDTH, max_norm=1.0), r"max_norm=1.0 scales rows of the table in place"),
        (nn.Embedding(ENTRIES, WIDTH, sparse=True), "sparse=True changes the gradient of single rows"),
        (nn.Embedding(ENTRIES, WIDTH, scale_grad_by_freq=True), "scale_grad_by_freq=True changes the gradient of single rows"),
        (Scaled(ENTRIES, WIDTH), "Scaled overrides Embedding.forward"),
        (nn.EmbeddingBag(ENTRIES, WIDTH), "Embedding, LSTM, GRU or MultiheadAttention layer, got a EmbeddingBag"),
    ],
)
def test_a_table_that_cores_cannot_stand_for_is_refused_with_the_reason(table, reason):
    model = nn.ModuleDict({"embed": table, "other": nn.Linear(3, 3)})
    for call in (lambda: dense_layer(model, "embed"), lambda: plan_layers(model, "embed", ranks=2)):
        with pytest.raises(PlanError, match=rf"layer embed: .*{reason}"):
            call()


def test_entries_are_a_single_mode():
    model = Reader()
    split = LayerPlan(name="embed", format="tt", modes=(WIDTH, 13, 3), ranks=(1, 2, 2, 1))
    for call in (
        lambda: ADMM(model, Plan(layers=(split,))),
        lambda: plan_layers(model, "embed", modes=(WIDTH, 13, 3), ranks=2),
        lambda: tr.plan_to_size(model, "embed", 1.5, modes=(WIDTH, 13, 3)),
    ):
        with pytest.raises(PlanError, match=r"layer embed: expected the 39 entries .* as a single mode .*, or use format ttm"):
            call()


def test_tied_weights_are_refused_and_left_out_of_patterns():
    model = nn.ModuleDict({"embed": nn.Embedding(ENTRIES, WIDTH), "mix": nn.Linear(WIDTH, WIDTH)})
    model["head"] = nn.Linear(WIDTH, ENTRIES, bias=False)
    plan = plan_of(model)
    model["head"].weight = model["embed"].weight
    assert dense_layers(model) == ("mix", "head")
    for name in ("embed", "head"):
        tied = Plan(layers=(plan_layers(model, name, format="svd", ranks=2) if name == "head" else plan.layers))
        with pytest.raises(PlanError, match=rf"layer {name}: its weight is shared by embed.weight and head.weight"):
            ADMM(model, tied)
    model["head"].weight = nn.Parameter(model["embed"].weight.detach().clone())
    assert dense_layers(model) == ("embed", "mix", "head")


def read_unequally(count):
    """Indices (count, 8), of which most are among the first rows, as words of a text are."""
    return (ENTRIES * torch.rand(count, 8) ** 4).long()


@pytest.mark.parametrize("form", ["svd", "tt", "tr", "tucker", "cp"])
def test_rows_that_are_read_often_are_closest(form):
    """On other inputs than those that the shares of the rows come from."""
    torch.manual_seed(0)
    model = Reader().eval()
    plan = plan_of(model, form, ranks=3 if form == "tr" else 6)
    seen, other = read_unequally(200), read_unequally(200)
    plain = swap(copy.deepcopy(model), plan)
    weighed = swap(copy.deepcopy(model), plan, roots=input_roots(model, plan, [seen[:100], seen[100:]]))
    with torch.no_grad():
        errors = [relative(net.embed(other), model.embed(other)) for net in (plain, weighed)]
    assert errors[1] < 0.8 * errors[0]


def test_admm_counts_how_often_rows_are_read(tmp_path):
    torch.manual_seed(0)
    model = Reader()
    plan = plan_of(model)
    admm = ADMM(model, plan, rho=0.1, metric="activation")
    ids = read_unequally(50)
    (model(ids).square().mean() + admm.penalty()).backward()
    admm.update()
    shares = torch.bincount(ids.flatten(), minlength=ENTRIES) / ids.numel()
    close(admm.roots["embed"].root.square(), 0.7 * ENTRIES * shares + 0.3)
    with torch.no_grad():
        gap = model.embed.weight.T - admm.Z["embed"] + admm.U["embed"]
    close(admm.penalty(), 0.05 * (gap.square() * admm.roots["embed"].root.square()).sum())
    torch.save(admm.state_dict(), tmp_path / "admm.pt")
    other = ADMM(model, plan, metric="activation")
    other.load_state_dict(torch.load(tmp_path / "admm.pt", weights_only=True))
    close(other.penalty(), admm.penalty())
    assert isinstance(admm.factorize().embed, FactoredLayer)


def test_a_plan_to_a_size_counts_how_often_rows_are_read():
    torch.manual_seed(0)
    model = Reader().eval()
    plan = Plan(layers=plan_to_size(model, "*", 1.5, format="svd", inputs=[read_unequally(100)]))
    assert {layer.name for layer in plan.layers} <= {"embed", "head"}


def test_split_entries_need_the_plain_metric():
    model = Reader()
    with pytest.raises(PlanError, match=r"layer embed: `metric: activation` expects one input mode, got \d"):
        ADMM(model, plan_of(model, "ttm"), metric="activation")
