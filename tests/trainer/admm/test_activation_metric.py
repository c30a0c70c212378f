"""ADMM in the metric of the layers' inputs: the projection, the moments behind it, and the run from recipe to cores."""

import copy
import io

import numpy as np
import pytest
import torch
import yaml
from cases import MATRIX_ONLY, listener
from threadpoolctl import threadpool_info, threadpool_limits
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from tensorrail_exporter import FORMATS, LayerPlan, Plan, PlanError
from tensorrail_exporter.formats import project
from tensorrail_runtime.errors import RecipeError
from tensorrail_trainer import ADMM
from tensorrail_trainer.admm.moments import InputMoments, input_roots
from tensorrail_trainer.layers.dense import dense_layer
from tensorrail_trainer.layers.metric import Root
from tensorrail_trainer.layers.swap import cores_of, swap
from tensorrail_trainer.planning.ranks import plan_layers
from tensorrail_trainer.recipes.recipe import Recipe
from tensorrail_trainer.run.folder import prepare
from tensorrail_trainer.run.phases import train_all

LAYERS = {"conv": "0", "linear": "3", "lstm": "5.weight_ih_l0"}
EXACT = {"tt", "tucker", "svd", "ttm"}  # cp iterates, and finds its own result again but to a few digits
CASES = [(kind, name) for kind in LAYERS for name in FORMATS if kind != "conv" or name not in MATRIX_ONLY]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Let one thread compute: on tensors as small as these, more of them cost time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Rows(nn.Module):
    """(B, I, H, W) → (B, H·W, I): a sequence for the recurrent layer."""

    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


def net():
    torch.manual_seed(0)
    lstm = nn.LSTM(10, 6, batch_first=True, bidirectional=True)
    return nn.Sequential(nn.Conv2d(8, 12, 3), nn.ReLU(), Rows(), nn.Linear(12, 10), nn.ReLU(), lstm)


def images(count=6, seed=1):
    """Return images (B, 8, 7, 7) whose channels are neither of one size nor independent."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(8, 8, generator=generator) * torch.logspace(0, -1.5, 8)
    return torch.einsum("bihw,ij->bjhw", torch.randn(count, 8, 7, 7, generator=generator), mixing)


def plan_of(model, form_name, name, rank=3, modes=None):
    form, shape = FORMATS[form_name], dense_layer(model, name).spec.shape
    if modes is None:
        modes = shape if form_name == "ttm" else form.default_modes(shape)
    ranks = form.clamp(shape, modes, form.uniform(shape, modes, rank))
    return LayerPlan(name=name, format=form_name, modes=tuple(modes), ranks=ranks)


def trained(model, *plans, batches=1, **options):
    """Return ADMM in the metric of the activations, after one update on `images`."""
    admm = ADMM(model, Plan(layers=plans), metric="activation", **options)
    for seed in range(batches):
        model(images(seed=seed + 1))
    admm.update()
    return admm


def distance(admm, name, a, b):
    return float(admm.roots[name].apply(a - b).norm())


@pytest.mark.parametrize(("kind", "form_name"), CASES)
def test_z_is_a_projection_in_the_metric_of_the_inputs(kind, form_name):
    model, name = net(), LAYERS[kind]
    plan = plan_of(model, form_name, name)
    admm = trained(model, plan)
    w, z = dense_layer(model, name).weight().detach(), admm.Z[name]
    size = float(admm.roots[name].apply(w).norm())
    if form_name != "tr":  # whose iteration may end elsewhere; that Z is a ring of these ranks is shown below
        again = admm._project(plan, z)
        assert distance(admm, name, again, z) < (1e-4 if form_name in EXACT else 2e-2) * size
    assert admm.roots[name].root.square().sum() == pytest.approx(w.shape[1], rel=1e-5)
    plain = project(form_name, w.contiguous(), plan.modes, plan.ranks)
    assert distance(admm, name, w, z) <= distance(admm, name, w, plain) + 1e-5 * size
    # Its ranks are those of the plan: the layer of cores that replaces it holds that weight, and no more numbers.
    cores = cores_of(admm.factorize())[name]
    assert tuple(tuple(core.shape) for core in cores) == plan.core_shapes(w.shape)
    torch.testing.assert_close(plan.reconstruct(cores, tuple(w.shape)), z, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "lstm"])
def test_a_matrix_is_cut_where_its_outputs_change_least(kind):
    model, name = net(), LAYERS[kind]
    plan = plan_of(model, "svd", name)
    seen = []
    dense_layer(model, name).module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, 1)))
    admm = trained(model, plan)
    w, x = dense_layer(model, name).weight().detach(), seen[0]
    plain = project("svd", w.contiguous(), plan.modes, plan.ranks)
    ours, theirs = (float((x @ (w - z).T).norm()) for z in (admm.Z[name], plain))
    assert ours < 0.97 * theirs
    # ‖(W − Z) x‖ is what the metric says it is
    scale = x.square().sum(1).mean() / x.shape[1] * len(x)
    assert ours == pytest.approx(float(scale.sqrt()) * distance(admm, name, w, admm.Z[name]), rel=1e-2)


@pytest.mark.parametrize("form_name", FORMATS)
def test_inputs_without_direction_make_it_the_plain_admm(form_name):
    one, other = nn.Sequential(nn.Linear(8, 6)), nn.Sequential(nn.Linear(8, 6))
    other.load_state_dict(one.state_dict())
    plan = Plan(layers=(plan_of(one, form_name, "0"),))
    plain, ours = ADMM(one, plan, 0.5), ADMM(other, plan, 0.5, "activation")
    for _ in range(3):
        for model, admm in ((one, plain), (other, ours)):
            model(8**0.5 * torch.eye(8)).sum().backward()
            admm.penalty().backward()
            with torch.no_grad():
                model[0].weight -= 0.1 * model[0].weight.grad
            model.zero_grad()
        assert plain.update() == ours.update()
        assert torch.equal(plain.Z["0"], ours.Z["0"])
        assert torch.equal(plain.U["0"], ours.U["0"])
        assert torch.equal(one[0].weight, other[0].weight)


def test_a_hard_projection_takes_the_metric_of_the_batches_so_far():
    model = net()
    plan = plan_of(model, "svd", "3")
    admm = ADMM(model, Plan(layers=(plan,)), metric="activation")
    with pytest.raises(PlanError, match="layer 3: expected at least one batch"):
        admm.project_weights()
    first = None
    for seed in (1, 2):
        with torch.no_grad():
            model[3].weight.copy_(torch.randn(model[3].weight.shape, generator=torch.Generator().manual_seed(seed)))
        before = model[3].weight.detach().clone()
        model(images(seed=seed))
        admm.project_weights()
        root = admm.roots["3"]
        expected = root.undo(project("svd", root.apply(before), plan.modes, plan.ranks))
        torch.testing.assert_close(model[3].weight.detach(), expected, atol=1e-5, rtol=1e-4)
        assert first is None or not torch.allclose(root.root, first)
        first = root.root


def test_the_update_penalty_and_residuals_are_the_equations():
    model = net()
    plan = plan_of(model, "tt", "0")
    admm = trained(model, plan, rho=0.5)
    with torch.no_grad():
        model[0].weight += 0.1 * torch.randn_like(model[0].weight)
    w, z0, u0 = model[0].weight, admm.Z["0"], admm.U["0"]
    s = admm.roots["0"].root
    gap = torch.einsum("oihw,ij->ojhw", w - z0 + u0, s)
    torch.testing.assert_close(admm.penalty(), 0.25 * gap.square().sum())
    admm.penalty().backward()
    torch.testing.assert_close(w.grad, 0.5 * torch.einsum("oihw,ij->ojhw", gap, s).detach(), atol=1e-6, rtol=1e-4)
    (residual,) = admm.update()
    w, z1 = w.detach(), admm.Z["0"]
    torch.testing.assert_close(admm.roots["0"].root, s)  # no batch came between
    white = torch.einsum("oihw,ij->ojhw", w + u0, s).contiguous()
    expected = project("tt", white, plan.modes, plan.ranks)
    torch.testing.assert_close(z1, torch.einsum("oihw,ij->ojhw", expected, admm.roots["0"].inverse), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(admm.U["0"], u0 + w - z1)
    size = float(admm.roots["0"].apply(w).norm())
    assert residual.primal == pytest.approx(distance(admm, "0", w, z1) / size, rel=1e-5)
    assert residual.dual == pytest.approx(0.5 * distance(admm, "0", z1, z0), rel=1e-5)


def test_a_plain_loop_of_four_lines_drives_the_weights_to_low_rank():
    model, x = net()[:4], images(16)
    y = model(x).detach()
    admm = ADMM(model, Plan(layers=(plan_of(model, "tt", "0"), plan_of(model, "svd", "3"))), rho=0.5, metric="activation")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    history = []
    for _ in range(25):
        for _ in range(10):
            loss = (model(x) - y).square().mean() + admm.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        history.append(max(residual.primal for residual in admm.update()))
    before = model(x).detach()
    after = admm.factorize()(x).detach()
    assert history[-1] < 0.2 * history[0]
    assert float((after - before).norm() / before.norm()) < 0.1


def test_the_mean_is_that_of_all_batches_and_later_of_the_last_ones():
    model = nn.Sequential(nn.Linear(4, 3))
    moments = InputMoments(Plan(layers=(plan_of(model, "svd", "0", 2),)), {"0": dense_layer(model, "0")})
    batches = torch.randn(100, 5, 4, generator=torch.Generator().manual_seed(0))
    for batch in batches:
        model(batch)
    rows = batches.flatten(0, 1)
    torch.testing.assert_close(moments.second["0"], rows.T @ rows / len(rows))
    for _ in range(300):
        model(10 * torch.eye(4))
    torch.testing.assert_close(moments.second["0"], 25 * torch.eye(4), atol=2.0, rtol=0.0)


def test_positions_are_drawn_from_the_whole_batch_without_chance():
    model = nn.Sequential(nn.Conv2d(4, 3, 1))
    plan = Plan(layers=(plan_of(model, "tt", "0", 2),))
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 4, 16, 16), np.float32))  # torch draws by processor
    x = x * torch.linspace(0.1, 3, 16)  # by column
    found = []
    for batch in (x, x, x.contiguous(memory_format=torch.channels_last)):
        moments = InputMoments(plan, {"0": dense_layer(model, "0")})
        model(batch)
        found.append(moments.second["0"])
        moments.close()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    rows = x.movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(found[0], rows.T @ rows / len(rows), atol=0.35, rtol=0.0)


def test_moments_are_of_full_precision_under_autocast():
    found = []
    for enabled in (False, True):
        model = net()
        admm = ADMM(model, Plan(layers=(plan_of(model, "tt", "0"),)), metric="activation")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(images())
            admm.update()
            found.append(admm.penalty().detach())
        assert admm.roots["0"].root.dtype == torch.float32
    torch.testing.assert_close(*found)


def test_unbatched_packed_and_named_inputs_count():
    lstm = nn.LSTM(10, 6)
    rows = torch.randn(7, 10)
    moments = InputMoments(
        Plan(layers=(plan_of(lstm, "svd", "weight_ih_l0"),)), {"weight_ih_l0": dense_layer(lstm, "weight_ih_l0")}
    )
    for x in (rows, pack_sequence([rows[:4], rows[4:]])):
        lstm(input=x)
    assert moments.batches["weight_ih_l0"] == 2
    torch.testing.assert_close(moments.second["weight_ih_l0"], rows.T @ rows / 7)


def test_evaluation_and_copies_do_not_count_and_the_hooks_go():
    model = net()
    admm = trained(model, plan_of(model, "tt", "0"), plan_of(model, "svd", "3"))
    counted = dict(admm._moments.batches)
    assert counted == {"0": 1, "3": 1}
    model.eval()
    model(images())
    model.train()
    copied = copy.deepcopy(model)
    copied(images())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=False)(images())
    assert admm._moments.batches == counted
    assert set(model.state_dict()) == set(net().state_dict())
    cut = admm.factorize(copied)
    assert cut is copied
    assert not any(module._forward_pre_hooks for module in model.modules())
    model(images())
    assert admm._moments.batches == counted


def test_the_state_survives_saving_and_another_admm(tmp_path):
    model = net()
    plans = plan_of(model, "tt", "0"), plan_of(model, "svd", "3")
    admm = trained(model, *plans, batches=2, rho=0.5)
    model(images(seed=9))  # counts for the update to come, not for S as it is
    torch.save(admm.state_dict(), tmp_path / "admm.pt")
    twin = net()
    other = ADMM(twin, Plan(layers=plans), rho=0.1, metric="activation")
    other.load_state_dict(torch.load(tmp_path / "admm.pt", weights_only=True))
    assert torch.equal(other.penalty(), admm.penalty())
    for one in (model, twin):
        one(images(seed=10))
    assert admm.update() == other.update()
    for name in ("0", "3"):
        assert torch.equal(other.Z[name], admm.Z[name])
        assert torch.equal(other.U[name], admm.U[name])


def without(state, *path):
    """Return a state without the entry at a path of keys."""
    key, *rest = path
    return {name: value for name, value in state.items() if name != key} | ({key: without(state[key], *rest)} if rest else {})


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (lambda state: without(state, "moments"), "keys moments are missing"),
        (lambda state: without(state, "roots"), "keys roots are missing"),
        (lambda state: without(state, "moments", "second"), "of the moments: keys second are missing"),
        (lambda state: without(state, "moments", "batches", "0"), "expected the number of batches for 0, 3, got {'3': 1}"),
        (lambda state: without(state, "roots", "3"), "of roots: keys 3 are missing"),
        (lambda state: without(state, "roots", "3", "inverse"), r"root and inverse for layer 3, .*got {'root': \(12, 12\)}"),
        (lambda state: state | {"roots": None}, "of roots: keys 0, 3 are missing"),
        (
            lambda state: state | {"moments": state["moments"] | {"second": {"1": torch.eye(8)}}},
            "second moments for .*got {'1'",
        ),
        (lambda state: state | {"moments": state["moments"] | {"second": {"0": torch.eye(7)}}}, r"second moments .*\(7, 7\)"),
    ],
)
def test_a_state_without_what_the_metric_needs_is_refused(changed, reason):
    model = net()[:4]
    plans = plan_of(model, "tt", "0"), plan_of(model, "svd", "3")
    state = trained(model, *plans).state_dict()
    other = ADMM(net()[:4], Plan(layers=plans), metric="activation")
    z = other.Z["0"].clone()
    with pytest.raises(PlanError, match=f"ADMM state.*{reason}"):
        other.load_state_dict(changed(state))
    assert torch.equal(other.Z["0"], z)
    other.load_state_dict(without(without(state, "plan"), "moments", "second", "3"))  # of a layer that saw no batch


def test_a_copy_in_another_precision_is_projected_and_cut_in_the_same_metric():
    model = net()[:4]
    admm = trained(model, plan_of(model, "tt", "0"), plan_of(model, "svd", "3"))
    one, other = copy.deepcopy(model), copy.deepcopy(model).double()
    for copied in (one, other):
        admm.project_copy(copied)
    torch.testing.assert_close(other[0].weight.float(), one[0].weight, atol=1e-5, rtol=1e-4)
    one, other = (cores_of(admm.factorize(copied)) for copied in (copy.deepcopy(model), copy.deepcopy(model).double()))
    for name, plan in zip(("0", "3"), admm.plan.layers, strict=True):
        shape = tuple(dense_layer(model, name).spec.shape)
        ours, theirs = (plan.reconstruct(cores[name], shape) for cores in (other, one))
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours.float(), theirs, atol=1e-5, rtol=1e-4)


def test_state_of_another_metric_is_refused():
    model = net()
    plan = Plan(layers=(plan_of(model, "tt", "0"),))
    with pytest.raises(PlanError, match="expected the metric activation, got weight"):
        ADMM(model, plan, metric="activation").load_state_dict(ADMM(model, plan).state_dict())
    old = ADMM(model, plan).state_dict()
    del old["metric"]  # as it was written before there was a choice
    ADMM(model, plan).load_state_dict(old)


@pytest.mark.parametrize(
    ("form_name", "name", "modes"),
    [("tt", "0", (12, 9, 2, 4)), ("tucker", "3", (10, 3, 4)), ("cp", "3", (10, 3, 4)), ("tr", "0", (12, 9, 4, 2)),
     ("ttm", "3", (5, 2, 4, 3))],
)  # fmt: skip
def test_several_input_modes_need_the_plain_metric(form_name, name, modes):
    model = net()
    plan = Plan(layers=(plan_of(model, form_name, name, 2, modes),))
    with pytest.raises(PlanError, match=rf"layer {name}: `metric: activation` expects one input mode, got 2.*; use "):
        ADMM(model, plan, metric="activation")
    ADMM(model, plan)


def test_more_inputs_than_a_second_moment_can_have_are_refused_before_training(tmp_path):
    model = nn.Sequential(nn.Linear(16385, 2, bias=False))
    plan = Plan(layers=(plan_of(model, "svd", "0", 1),))
    reason = (
        r"`metric: activation` expects at most 16,384 inputs, got {}: their second moment would take {} GiB; use `metric: w"
    )
    with pytest.raises(PlanError, match="layer 0: " + reason.format("16,385", "1.0")):
        ADMM(model, plan, metric="activation")
    ADMM(model, plan)
    layer = {"layers": "rnn.weight_ih_l0", "format": "svd"}
    clips = {"data": {"name": "moving_shapes"}, "model": {"name": "lstm", "args": {"hidden": 2}}}
    cut = {"train": SMALL["train"] | {"admm": SMALL["train"]["admm"] | {"metric": "weight"}, "cut": "activation"}}
    for key, settings in (
        ("train.cut", {"plan": [layer | {"ranks": 1}], **cut}),
        ("plan.0", {"plan": [layer | {"params": 1.1, "metric": "activation"}]}),
    ):
        with pytest.raises(RecipeError, match=rf"{key}: layer rnn.weight_ih_l0: {reason.format('57,600', '12.4')}"):
            small(tmp_path, **clips, **settings)


def test_deeper_recurrent_layers_say_why_not():
    model = nn.Sequential(nn.LSTM(5, 4, num_layers=2))
    plan = Plan(layers=(plan_of(model, "svd", "0.weight_ih_l1"),))
    with pytest.raises(PlanError, match=r"layer 0\.weight_ih_l1: `metric: activation` supports only weight_ih_l0: .*LSTM"):
        ADMM(model, plan, metric="activation")


def test_small_metrics_are_computed_by_one_thread(monkeypatch):
    """NumPy's threads would wait for those of torch, which spin between the steps."""
    model, threads, eigh = net(), [], np.linalg.eigh
    admm = ADMM(model, Plan(layers=(plan_of(model, "tt", "0"),)), metric="activation")
    model(images())

    def counted(matrix):
        threads.append({library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"})
        return eigh(matrix)

    monkeypatch.setattr(np.linalg, "eigh", counted)
    with threadpool_limits(2, user_api="blas"):
        before = {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}
        admm.update()
        after = {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}
    assert threads == [{1}]
    assert after == before


def test_a_layer_that_no_batch_has_passed_is_named():
    model = net()
    admm = ADMM(model, Plan(layers=(plan_of(model, "tt", "0"),)), metric="activation")
    for step in (admm.update, admm.factorize):
        with pytest.raises(ValueError, match="layer 0: expected at least one batch through its module in training"):
            step()
    model(torch.full((1, 8, 7, 7), float("nan")))
    with pytest.raises(ValueError, match="layer 0: its inputs held infinity or NaN"):
        admm.update()
    with pytest.raises(ValueError, match="unknown metric 'input': expected one of weight, activation"):
        ADMM(model, admm.plan, metric="input")


def test_inputs_that_are_always_zero_leave_a_regular_metric():
    root = Root.of(torch.zeros(5, 5), torch.zeros(1))
    torch.testing.assert_close(root.root, torch.eye(5))
    torch.testing.assert_close(root.inverse, torch.eye(5))
    flat = Root.of(torch.ones(5, 5), torch.zeros(1))  # one direction alone
    torch.testing.assert_close(flat.root @ flat.inverse, torch.eye(5), atol=1e-4, rtol=0.0)


class Padded(nn.Module):
    """A transformer encoder over sequences whose last positions are padding in every second sample."""

    def __init__(self, as_numbers=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder, self.as_numbers = nn.TransformerEncoder(layer, 1), as_numbers

    def mask(self, x):
        mask = torch.zeros(x.shape[:2], dtype=torch.bool)
        mask[::2, -3:] = True
        return mask

    def forward(self, x):
        mask = self.mask(x)
        mask = torch.zeros(mask.shape).masked_fill(mask, -torch.inf) if self.as_numbers else mask
        return self.encoder(x, src_key_padding_mask=mask)


def scaled(rows):
    second = rows.T @ rows
    return second * (len(second) / second.trace())


@pytest.mark.parametrize("as_numbers", [False, True])
def test_padded_positions_are_no_inputs_and_no_kernel_passes_the_hooks(as_numbers):
    torch.manual_seed(0)
    model, x = Padded(as_numbers).eval(), torch.randn(4, 7, 8) * torch.linspace(0.1, 2, 8)
    x[::2, -3:] = 50.0
    names = [f"encoder.layers.0.{leaf}" for leaf in ("self_attn.in_proj_weight", "self_attn.out_proj", "linear1")]
    roots = input_roots(model, Plan(layers=tuple(plan_of(model, "svd", name) for name in names)), [x])
    root = roots[names[0]].root
    torch.testing.assert_close(root @ root, scaled(x[~model.mask(x)]), atol=1e-3, rtol=1e-3)
    assert set(roots) == set(names)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("options", [{"batch_first": True}, {}, {"kdim": 5, "vdim": 6, "bias": False}])
@pytest.mark.parametrize("training", [True, False])
def test_the_inputs_of_an_attentions_output_are_its_mixed_heads(training, options):
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, dropout=0.5, **options)}).train(training)
    attention, plan = model["attn"], Plan(layers=(plan_of(model, "svd", "attn.out_proj"),))
    query = torch.randn(6, 6, 8)
    key, value = (query, query) if "kdim" not in options else (torch.randn(4, 6, 5), torch.randn(4, 6, 6))
    moments = InputMoments(plan, {"attn.out_proj": dense_layer(model, "attn.out_proj")}, training=training, model=model)
    with torch.no_grad():
        attention(query, key, value)
        moments.close()
        model.eval()
        attention.out_proj.weight.copy_(torch.eye(8))
        if attention.out_proj.bias is not None:
            attention.out_proj.bias.zero_()
        rows = attention(query, key, value)[0].flatten(0, 1)
    torch.testing.assert_close(moments.second["attn.out_proj"], rows.T @ rows / len(rows), atol=1e-5, rtol=1e-4)
    assert attention.out_proj.training is False
    sequence = (query[0], key[:, 0], value[:, 0]) if "kdim" in options else (query[0],) * 3
    padding = torch.zeros(len(sequence[1]), dtype=torch.bool)
    padding[-1] = True
    moments = InputMoments(plan, {"attn.out_proj": dense_layer(model, "attn.out_proj")}, training=False, model=model)
    attention(*sequence, key_padding_mask=padding)
    assert moments._positions["attn.out_proj"] == (6 if "kdim" in options else 5)


def test_admm_runs_on_an_attentions_output_and_says_where_it_cannot():
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    admm = ADMM(model, Plan(layers=plan_layers(model, "*", format="svd", ranks=2)), metric="activation")
    x = torch.randn(6, 3, 8)
    model["attn"](x, x, x)
    admm.update()
    assert set(admm.roots) == {"attn.in_proj_weight", "attn.out_proj"}
    assert model["attn"].out_proj.training
    admm.close()
    cut = swap(model.train(), Plan(layers=plan_layers(model, "*in_proj*", format="svd", ranks=8)))
    again = ADMM(cut, Plan(layers=plan_layers(cut, "attn.out_proj", format="svd", ranks=2)), metric="activation")
    cut["attn"](x, x, x)
    again.update()
    torch.testing.assert_close(again.roots["attn.out_proj"].root, admm.roots["attn.out_proj"].root, atol=1e-4, rtol=1e-3)
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, add_zero_attn=True)})
    with pytest.raises(PlanError, match=r"layer attn.out_proj: `metric: activation` supports no out_proj of .*add_zero_attn"):
        ADMM(model, Plan(layers=plan_layers(model, "*", format="svd", ranks=2)), metric="activation")


def test_given_inputs_count_by_their_positions_without_a_window():
    model = nn.Sequential(nn.Linear(4, 4))
    plan = Plan(layers=(plan_of(model, "svd", "0"),))
    rows = torch.randn(611, 4, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 2, 4)
    rows[-1] *= 100  # a last batch of one
    root = input_roots(model, plan, rows.split(5))["0"].root
    torch.testing.assert_close(root @ root, scaled(rows), atol=1e-3, rtol=1e-3)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x)


def test_given_inputs_pass_the_hooks_of_a_compiled_model():
    model, x = Nested().eval(), torch.randn(5, 4)
    model.compile(backend="eager")
    with torch.no_grad():
        model(x)
    assert set(input_roots(model, Plan(layers=(plan_of(model, "svd", "layer"),)), [x])) == {"layer"}
    torch._dynamo.reset()


SMALL = {
    "version": 1,
    "name": "small",
    "data": {"name": "digits", "args": {"test_fraction": 0.94, "size": 8}},
    "model": {"name": "small_resnet", "args": {"widths": [8], "blocks": 1, "hidden": 8}},
    "plan": [{"layers": "stages.*.conv?", "ranks": 4}, {"layers": "hidden", "modes": [8, 128], "ranks": 4}],
    "train": {
        "batch": 32,
        "dense": {"epochs": 1, "lr": 0.05},
        "admm": {"epochs": 3, "lr": 0.05, "rho": 0.1, "every": 2, "metric": "activation"},
        "finetune": {"epochs": 1, "lr": 0.02},
        "control": {"epochs": 1, "lr": 0.02},
    },
}


def small(tmp_path, **changes):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(SMALL | changes))
    return Recipe.load(path)


class Interrupted(Exception):  # noqa: N818 - stands for a signal, not an error
    pass


@pytest.mark.parametrize("stop", [2, pytest.param(4, marks=pytest.mark.slow)])  # before the update; before its cores alone
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, whole, stop):
    recipe, broken = small(tmp_path), tmp_path / "broken"
    prepare(recipe, broken)
    seen = []

    def interrupt(row, *_):
        seen.append(row)
        if len(seen) == stop:
            raise Interrupted

    with pytest.raises(Interrupted):
        train_all(recipe, broken, listener(epoch=interrupt))
    trained, _ = train_all(recipe, broken)
    assert (whole[0] / "cores.safetensors").read_bytes() == (broken / "cores.safetensors").read_bytes()
    for name, root in whole[1].roots.items():
        assert torch.equal(root.root, trained.roots[name].root), name
    assert not any(module._forward_pre_hooks for module in trained.uncut.modules())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that was not interrupted, and what it left."""
    path = tmp_path_factory.mktemp("whole")
    recipe = small(path)
    prepare(recipe, path / "run")
    return path / "run", train_all(recipe, path / "run")[0]


def test_the_recipes_metric_reaches_training(whole):
    assert {row.phase for row in whole[1].rows} == {"dense", "admm", "finetune", "control"}
    assert set(whole[1].roots) == {"stages.0.0.conv1", "stages.0.0.conv2", "hidden"}
    assert Recipe.load(whole[0] / "recipe.yaml").train.admm.metric == "activation"


def test_a_recipe_with_several_input_modes_is_refused_before_training(tmp_path):
    rules = [{"layers": "hidden", "modes": [8, 8, 16], "ranks": 4}]
    with pytest.raises(RecipeError, match=r"train.admm.metric: layer hidden: .*expects one input mode, .*use `metric: weight`"):
        small(tmp_path, plan=rules)
    admm = {"epochs": 1, "lr": 0.1, "metric": "inputs"}
    with pytest.raises(RecipeError, match=r"train.admm.metric: .*'weight' or 'activation', got 'inputs'"):
        small(tmp_path, train=SMALL["train"] | {"admm": admm})
