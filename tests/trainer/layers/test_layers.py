"""Convolutions and linear layers made of cores: what they compute, that they train, and that their export is equal."""

import copy
import math

import numpy as np
import onnxruntime as ort
import pytest
import torch
from cases import MATRIX_ONLY, cases, draw_plan, relative
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tensorrail_exporter import FORMATS, LayerPlan, Plan, PlanError, factorize
from tensorrail_exporter.formats import format_of
from tensorrail_exporter.formats.contraction import LayerSpec
from tensorrail_trainer import ADMM, cores_of, plan_layers, to_dense, to_onnx
from tensorrail_trainer.layers import factored as layers
from tensorrail_trainer.layers.dense import dense_layer, dense_layers
from tensorrail_trainer.layers.factored import FactoredLayer
from tensorrail_trainer.layers.swap import swap

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
CONVOLVING = sorted(set(FORMATS) - MATRIX_ONLY)


@given(data=st.data())
@cases(60, 300)
def test_a_convolution_of_cores_equals_the_reconstructed_dense_one(data):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    nd = data.draw(st.integers(1, 3), "spatial axes")
    kernel, dilation = ([data.draw(st.integers(1, 3)) for _ in range(nd)] for _ in range(2))
    padding = data.draw(st.one_of(st.just("same"), st.just("valid"), st.integers(0, 2)))
    stride = 1 if padding == "same" else data.draw(st.integers(1, 3))
    groups = data.draw(st.sampled_from([1, 1, 2, 3]), "groups")
    shape, plan = draw_plan(data, "0", data.draw(st.sampled_from(CONVOLVING)), tuple(kernel), groups=groups)
    inputs, bias = groups * shape[1], data.draw(st.booleans())
    dense = CONVOLUTIONS[nd](inputs, shape[0], kernel, stride, padding, dilation, groups=groups, bias=bias)
    model = swap(nn.Sequential(dense), Plan(layers=(plan,)))
    x = torch.randn(data.draw(st.integers(1, 3)), inputs, *[8] * nd)
    for training in (False, True):  # core by core, and as is expected to train faster
        torch.testing.assert_close(model.train(training)(x), to_dense(model)(x), atol=1e-4, rtol=1e-4)


@given(data=st.data())
@cases(40, 200)
def test_a_transposed_convolution_of_cores_equals_the_reconstructed_dense_one(data):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    nd = data.draw(st.integers(1, 3), "spatial axes")
    kernel, stride, dilation = ([data.draw(st.integers(1, 3)) for _ in range(nd)] for _ in range(3))
    padding = [data.draw(st.integers(0, 1)) for _ in range(nd)]
    added = [data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    shape, plan = draw_plan(data, "0", data.draw(st.sampled_from(CONVOLVING)), tuple(kernel))
    bias = data.draw(st.booleans())
    dense = TRANSPOSED[nd](shape[1], shape[0], kernel, stride, padding, added, bias=bias, dilation=dilation)
    model = swap(nn.Sequential(dense), Plan(layers=(plan,)))
    x = torch.randn(data.draw(st.integers(1, 3)), shape[1], *[5] * nd)
    for training in (False, True):
        torch.testing.assert_close(model.train(training)(x), to_dense(model)(x), atol=1e-4, rtol=1e-4)


@given(data=st.data())
@cases(40, 200)
def test_a_linear_layer_of_cores_equals_the_reconstructed_dense_one(data):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    shape, plan = draw_plan(data, "0", data.draw(st.sampled_from(sorted(FORMATS))), op="linear")
    model = swap(nn.Sequential(nn.Linear(shape[1], shape[0], bias=data.draw(st.booleans()))), Plan(layers=(plan,)))
    x = torch.randn(*data.draw(st.sampled_from([(3,), (2, 3), ()])), shape[1])
    for training in (False, True):
        torch.testing.assert_close(model.train(training)(x), to_dense(model)(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "layer", ["conv1d", "conv2d", "conv3d", "conv2d transposed", "conv2d grouped", "linear", "linear on sequences"]
)
@pytest.mark.parametrize("form_name", CONVOLVING)
def test_both_ways_to_train_have_the_same_gradients(form_name, layer, monkeypatch):
    torch.manual_seed(0)
    make, shape = NETWORKS[layer]
    dense = make()
    dense = nn.Sequential(dense)
    model = swap(dense, Plan(layers=(plan_in(dense, "0", form_name),)))
    x = torch.randn(3, *shape)
    found = []
    for pays in (False, True):
        asked = []
        monkeypatch.setattr(layers, "_dense_is_faster", lambda *a, pays=pays, asked=asked: asked.append(a) or pays)
        model.zero_grad()
        (model(x) * torch.linspace(-1, 1, model(x).numel()).reshape(model(x).shape)).sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
        assert asked
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_only_a_contraction_that_is_short_trains_core_by_core():
    spec = LayerSpec("conv", (64, 64, 3, 3), (1, 1), (1, 1, 1, 1), dilation=(1, 1))
    train = LayerPlan(name="c", format="tt", modes=(64, 9, 64), ranks=(1, 16, 16, 1))
    ring = LayerPlan(name="c", format="tr", modes=(64, 9, 64), ranks=(10, 10, 10, 10))
    assert not layers._dense_is_faster(train, spec, (128, 64, 8, 8))
    assert layers._dense_is_faster(ring, spec, (128, 64, 8, 8))


def plan_in(model, name, form_name):
    """Return a plan of a layer of a model, see `layer_plan`."""
    spec = dense_layer(model, name).spec
    return layer_plan(name, form_name, spec.shape, groups=spec.groups)


def layer_plan(name, form_name, shape, rank=4, groups=1):
    """Return a plan of the format's usual modes and of ranks that exist, near `rank`."""
    form = format_of(form_name, groups)
    modes = form.default_modes(shape)
    ranks = form.clamp(shape, modes, form.uniform(shape, modes, rank))
    return LayerPlan(name=name, format=form_name, modes=modes, ranks=ranks)


NETWORKS = {
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, 2, 1), (8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3, 2, 1, dilation=2), (8, 9, 9)),
    "conv2d 1x1": (lambda: nn.Conv2d(8, 12, 1), (8, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(8, 12, 3, padding=1), (8, 4, 4, 4)),
    "conv1d grouped": (lambda: nn.Conv1d(8, 12, 3, 2, 1, groups=2), (8, 9)),
    "conv2d grouped": (lambda: nn.Conv2d(8, 12, (3, 2), (2, 1), 1, dilation=2, groups=4), (8, 9, 9)),
    "conv1d transposed": (lambda: nn.ConvTranspose1d(8, 12, 3, 2, 1, output_padding=1), (8, 5)),
    "conv2d transposed": (lambda: nn.ConvTranspose2d(8, 12, (2, 3), 2, (0, 1), dilation=(1, 2)), (8, 4, 5)),
    "conv3d transposed": (lambda: nn.ConvTranspose3d(8, 12, 2, 2), (8, 3, 3, 3)),
    "linear": (lambda: nn.Linear(16, 12), (16,)),
    "linear on sequences": (lambda: nn.Linear(16, 12), (5, 16)),
}


def network(name):
    """Return a trainable network with the layer, named 0, in it, its input's shape without the batch."""
    make, shape = NETWORKS[name]
    norm = {"conv1d": nn.BatchNorm1d, "conv2d": nn.BatchNorm2d, "conv3d": nn.BatchNorm3d}.get(name.split()[0])
    layers = [make(), norm(12) if norm else nn.Identity(), nn.ReLU(), nn.Flatten()]
    size = nn.Sequential(*layers)(torch.randn(2, *shape)).shape[1]
    return nn.Sequential(*layers, nn.Linear(size, 3)), shape


def train(model, x, steps=6):
    """Take a few steps of SGD on random labels, so that the cores are no longer what a decomposition gave."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02, momentum=0.9)
    labels = torch.arange(len(x)) % 3
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()


PAIRS = [(form, layer) for form in FORMATS for layer in NETWORKS if form in CONVOLVING or layer.startswith("linear")]


class SideBySide(nn.Module):
    """Networks that read the first values of the same samples, their scores side by side: one export for all of them."""

    def __init__(self, networks, shapes):
        super().__init__()
        self.networks, self.shapes = nn.ModuleDict(networks), shapes

    def forward(self, x):
        return torch.cat([network(self.part(x, case)) for case, network in self.networks.items()], dim=1)

    def part(self, x, case):
        """Return what a network reads of the samples."""
        return x[:, : math.prod(self.shapes[case])].reshape(-1, *self.shapes[case])


def test_trained_cores_are_exported_exactly():
    """Export once for all layers and formats: after the dense training only cores are trained; the rest stays the same."""
    torch.manual_seed(0)
    made = {layer.replace(" ", "_"): (layer, *network(layer)) for layer in NETWORKS}
    dense = SideBySide({key: one for key, (_, one, _) in made.items()}, {key: shape for key, (_, _, shape) in made.items()})
    for _, one, shape in made.values():
        train(one.train(), torch.randn(12, *shape))
        for name, parameter in one.named_parameters():
            parameter.requires_grad_(name == "0.weight")
    size = max(math.prod(shape) for _, _, shape in made.values())
    graph = to_onnx(to_dense(swapped(dense, "svd", made)[0]), torch.randn(2, size))
    for form_name in FORMATS:
        keys = [key for key, (layer, _, _) in made.items() if (form_name, layer) in PAIRS]
        model, plan = swapped(dense, form_name, keys)
        before = cores_of(model)
        for key in keys:
            branch = model.networks[key].train()
            branch[1].eval()  # its statistics are the graph's
            train(branch, torch.randn(12, *model.shapes[key]))
        cores = cores_of(model.eval())
        assert set(cores) == {f"networks.{key}.0" for key in keys}
        for name in cores:
            changed = [not torch.equal(a, b) for a, b in zip(before[name], cores[name], strict=True)]
            assert all(changed), (form_name, name)
        result = factorize(graph, plan, {name: [core.numpy() for core in many] for name, many in cores.items()})
        session = ort.InferenceSession(result.model.SerializeToString(), providers=["CPUExecutionProvider"])
        for batch in (1, 7):
            x = torch.randn(batch, size)
            scores = dict(zip(made, np.split(session.run(None, {"image": x.numpy()})[0], len(made), axis=1), strict=True))
            for key in keys:
                with torch.no_grad():
                    expected = model.networks[key](model.part(x, key)).numpy()
                assert relative(scores[key], expected) < 1e-5, (form_name, key, batch)


def swapped(dense, form_name, keys):
    """Return a copy whose networks of these keys have their layer made of cores, and the plan for it."""
    names = [f"networks.{key}.0" for key in keys]
    plan = Plan(layers=tuple(plan_in(dense, name, form_name) for name in names))
    return swap(copy.deepcopy(dense), plan), plan


@pytest.mark.parametrize("form_name", CONVOLVING)
def test_a_full_rank_swap_changes_nothing_and_cores_train(form_name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 4))
    x = torch.randn(2, 6, 4, 4)
    expected = model(x).detach()
    ranks = {"0": 64, "2": 999} if form_name == "cp" else {"0": 999, "2": 999}
    plan = Plan(
        layers=tuple(layer_plan(name, form_name, model.get_submodule(name).weight.shape, rank) for name, rank in ranks.items())
    )
    swapped = swap(model, plan)
    # cp is found by alternating least squares, which comes near the weight and not to its last digits
    tolerance = 3e-2 if form_name == "cp" else 1e-4
    assert relative(swapped(x).detach().numpy(), expected.numpy()) < tolerance
    swapped(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in swapped.parameters())


def test_dense_layers_are_named_and_their_names_are_what_a_plan_takes():
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4, 2)), nn.ConvTranspose1d(4, 4, 3), nn.GRU(4, 4)
    )
    names = dense_layers(model)
    assert names == ("0", "1.0", "1.1.weight_ih_l0", "1.1.weight_ih_l1", "2", "3.weight_ih_l0")
    ops = [dense_layer(model, name).spec.op for name in names]
    assert ops == ["conv", "linear", "recurrent", "recurrent", "conv", "recurrent"]
    assert dense_layers(nn.LSTM(4, 4)) == ("weight_ih_l0",)
    model = swap(model, Plan(layers=(layer_plan("0", "tt", (4, 2, 3)),)))
    assert isinstance(model[0], FactoredLayer)
    with pytest.raises(PlanError, match="is already made of cores"):
        dense_layer(model, "0")


def test_the_swapped_layer_keeps_its_type_and_mode():
    model = nn.Sequential(nn.Linear(8, 8)).double().eval()
    swap(model, Plan(layers=(layer_plan("0", "svd", (8, 8)),)))
    assert all(parameter.dtype is torch.float64 for parameter in model.parameters())
    assert not model[0].training
    assert "svd, modes=[8, 8], ranks=[4]" in repr(model)
    assert np.isfinite(model(torch.randn(8, dtype=torch.float64)).detach().numpy()).all()


def norm_by_parametrization(layer):
    return nn.utils.parametrizations.weight_norm(layer)


def norm_by_hook(layer):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize("norm", [norm_by_parametrization, norm_by_hook])
@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Conv2d(8, 8, 3)])
def test_a_weight_that_is_computed_from_others_is_refused(norm, layer):
    model = nn.Sequential(norm(copy.deepcopy(layer)))
    with pytest.raises(PlanError, match="layer 0: expected a weight that is a parameter"):
        dense_layer(model, "0")


@pytest.mark.parametrize("outputs", [6, 8])
def test_a_transposed_convolution_is_used_like_torchs(outputs):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.ConvTranspose2d(8, outputs, 3, 2, 1))
    cut = swap(copy.deepcopy(dense), Plan(layers=(layer_plan("0", "tt", (outputs, 8, 3, 3), 99),)))
    x = torch.randn(2, 8, 5, 6)
    assert cut[0].weight.shape == dense[0].weight.shape
    torch.testing.assert_close(cut[0].weight + 0, dense[0].weight, atol=1e-4, rtol=1e-4)
    for size in ([9, 11], [2, outputs, 10, 12]):
        torch.testing.assert_close(cut[0](x, output_size=size), dense[0](x, output_size=size), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"output_size \[9, 13\]: expected \[9, 11\]"):
        cut[0](x, output_size=[9, 13])
    admm = ADMM(dense, Plan(layers=(layer_plan("0", "tt", (outputs, 8, 3, 3), 2),)))
    admm.project_weights()
    again = admm.update()
    assert max(row.primal for row in again) < 1e-4  # the weights have the ranks


def test_a_weight_under_two_names_is_refused():
    layer = nn.Linear(8, 8)
    plan = Plan(layers=(layer_plan("0", "svd", (8, 8)),))
    with pytest.raises(PlanError, match=r"layer 0: its weight is shared by 0.weight and 1.weight"):
        swap(nn.Sequential(layer, layer), plan)
    tied = nn.Sequential(nn.Linear(8, 8), nn.Embedding(8, 8))
    tied[1].weight = tied[0].weight
    with pytest.raises(PlanError, match=r"layer 0: its weight is shared by 0.weight and 1.weight"):
        swap(tied, plan)
    assert type(tied[0]) is nn.Linear


@pytest.mark.parametrize("name", ["self_attn.out_proj", "linear1", "linear2"])
def test_modules_that_read_a_layers_weight_past_it_find_that_of_its_cores(name):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 8)
    shape = tuple(model.get_submodule(name).weight.shape)
    cut = swap(model, Plan(layers=(layer_plan(name, "svd", shape),)))
    for training in (True, False):
        with torch.no_grad():
            torch.testing.assert_close(cut.train(training)(x), to_dense(cut)(x))
    cut.train()(x).square().sum().backward()
    assert all(core.grad is not None and core.grad.any() for core in cut.get_submodule(name).cores)


@pytest.mark.parametrize("form_name", sorted(FORMATS))
def test_an_empty_batch_comes_out_empty(form_name):
    model = nn.ModuleDict({"linear": nn.Linear(16, 8), "rnn": nn.LSTM(16, 4), "conv": nn.Conv2d(16, 8, 3)})
    names = ["linear", "rnn.weight_ih_l0", *(["conv"] if form_name not in MATRIX_ONLY else [])]
    plan = Plan(layers=tuple(layer for name in names for layer in plan_layers(model, name, ranks=2, format=form_name)))
    swap(model, plan)
    for training in (True, False):
        model.train(training)
        assert model["linear"](torch.zeros(0, 16)).shape == (0, 8)
        assert model["linear"](torch.zeros(0, 3, 16)).shape == (0, 3, 8)
        assert model["rnn"](torch.zeros(5, 0, 16))[0].shape == (5, 0, 4)
        assert model["conv"](torch.zeros(0, 16, 6, 6)).shape == (0, 8, 4, 4)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Padded(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(nn.functional.pad(x, (0, 1, 0, 1)), weight, bias)


class Named(nn.LSTM):
    """A class of its own that computes what torch's does."""


def test_a_class_that_computes_something_else_is_refused():
    for kind, method in ((Standardised, "forward"), (Padded, "_conv_forward")):
        with pytest.raises(PlanError, match=rf"layer 0: {kind.__name__} overrides \w+\.{method}"):
            plan_layers(nn.Sequential(kind(4, 4, 3)), "*", ranks=2)
    model = nn.ModuleDict({"rnn": Named(6, 5)})
    x = torch.randn(3, 2, 6)
    before = model["rnn"](x)[0]
    swap(model, Plan(layers=plan_layers(model, "*", ranks=99)))
    model["rnn"].flatten_parameters()
    torch.testing.assert_close(model["rnn"](x)[0], before)


def test_what_is_no_layer_to_factor_says_why():
    with pytest.raises(PlanError, match=r"put it in an nn.Sequential"):
        plan_layers(nn.Linear(4, 4), "*", ranks=2)
    with pytest.raises(PlanError, match=r"its size is not known yet; run one sample"):
        plan_layers(nn.Sequential(nn.LazyLinear(4)), "*", ranks=2)
    with pytest.raises(PlanError, match=r"a grouped transposed convolution \(groups=2\) cannot be factored"):
        plan_layers(nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.Linear(4, 4)), "0", ranks=2)


def test_options_types_and_freezing_are_those_of_the_dense_layer():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1, dilation=2), nn.Linear(8, 5), nn.GRU(7, 3)).double().requires_grad_(False)
    dense = copy.deepcopy(model)
    plan = Plan(layers=plan_layers(model, "*", ranks=2))
    swap(model, plan)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(model[0], name) == getattr(dense[0], name)
    assert (model[1].in_features, model[1].out_features, model[2].proj_size) == (8, 5, 0)
    for one in (model, to_dense(model)):
        assert {p.dtype for p in one.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in model.parameters())
    x = torch.randn(4, 9, 9, dtype=torch.float64)  # without a batch
    torch.testing.assert_close(model[0](x), to_dense(model)[0](x))
    part = nn.Sequential(nn.Linear(8, 5))
    part[0].bias.requires_grad_(False)
    swap(part, Plan(layers=plan_layers(part, "*", ranks=2)))
    assert [p.requires_grad for p in part[0].cores] == [True, True]
    assert not part[0].bias.requires_grad


def test_hooks_of_a_layer_go_on_and_can_be_removed():
    model, seen = nn.Sequential(nn.Linear(8, 5), nn.LSTM(5, 3)), []
    handles = [layer.register_forward_hook(lambda *_: seen.append(1)) for layer in model]
    handles.append(model[0].register_full_backward_hook(lambda *_: seen.append(1)))
    swap(model, Plan(layers=plan_layers(model, "*", ranks=2)))
    to_dense(model)(torch.randn(2, 8))
    assert len(seen) == 2
    model(torch.randn(2, 8, requires_grad=True))[0].sum().backward()
    assert len(seen) == 5
    for handle in handles:
        handle.remove()
    model(torch.randn(2, 8, requires_grad=True))[0].sum().backward()
    assert len(seen) == 5


def test_cores_of_any_number_of_axes_are_moved_and_laid_out_as_any_module():
    """Torch's `Module.to` refuses a layout of four axes for a parameter of five, as a Tucker core of five modes is."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    swap(model, Plan(layers=plan_layers(model, "0", format="tucker", modes=[4, 2, 9, 4, 2], ranks=2)))
    x = torch.randn(2, 8, 6, 6)
    wanted = model(x)
    wanted.sum().backward()
    assert max(p.dim() for p in model.parameters()) == 5
    grads = [p.grad.clone() for p in model.parameters()]
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), wanted)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))
    model.double().share_memory()
    assert all(p.dtype == torch.float64 and p.is_shared() for p in model.parameters())
    torch.testing.assert_close(model(x.double()), wanted.double(), rtol=1e-5, atol=1e-6)
    assert {p.device.type for p in model.to_empty(device="meta").parameters()} == {"meta"}
    matrix = nn.LSTM(16, 8)
    cut = swap(
        nn.Sequential(matrix), Plan(layers=plan_layers(nn.Sequential(matrix), "*", format="ttm", modes=[8, 4, 4, 4], ranks=2))
    )
    assert cut.to(memory_format=torch.channels_last)(torch.randn(3, 2, 16))[0].shape == (3, 2, 8)


def test_images_with_the_channels_first_stay_so():
    """Whatever the cores make of a weight's strides: a network may call `view` on what a layer gives."""
    for form, ranks in (("tr", 6), ("tt", 12), ("tucker", 4), ("svd", 4)):
        model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1))
        swap(model, Plan(layers=plan_layers(model, "*", format=form, ranks=ranks)))
        x = torch.randn(4, 16, 8, 8)
        for training in (False, True):
            y = model.train(training)(x)
            y.view(4, -1).sum().backward()
            assert model(x.contiguous(memory_format=torch.channels_last)).shape == y.shape
    frozen = swap(
        nn.Sequential(nn.Linear(8, 5)).requires_grad_(False),
        Plan(layers=plan_layers(nn.Sequential(nn.Linear(8, 5)), "0", ranks=2)),
    )
    assert not any(p.requires_grad for p in to_dense(frozen).parameters())


@pytest.mark.parametrize("training", [True, False])
def test_under_autocast_the_type_is_that_of_the_dense_layer(training):
    for dense, x in ((nn.Conv2d(8, 8, 3), torch.randn(2, 8, 6, 6)), (nn.Linear(16, 16), torch.randn(2, 16))):
        model = swap(nn.Sequential(dense), Plan(layers=plan_layers(nn.Sequential(dense), "0", ranks=2))).train(training)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == dense(x).dtype == torch.bfloat16


@pytest.mark.parametrize("training", [True, False])
def test_images_that_are_turned_come_out_as_from_the_dense_layer(training):
    dense = nn.Conv2d(8, 8, 3)
    model = swap(nn.Sequential(copy.deepcopy(dense)), Plan(layers=plan_layers(nn.Sequential(dense), "0", ranks=2))).train(
        training
    )
    x = torch.randn(2, 8, 6, 5).transpose(-1, -2)
    assert model(x).stride() == dense(x).stride()


def test_a_module_in_training_is_exported_with_a_dynamic_batch():
    dense = nn.Linear(16, 16)
    model = swap(nn.Sequential(dense), Plan(layers=plan_layers(nn.Sequential(dense), "0", ranks=2))).train()
    program = torch.export.export(model, (torch.randn(4, 16),), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    x = torch.randn(7, 16)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("form_name", FORMATS)
def test_cores_of_a_weight_of_zeros_are_zero_together_and_train(form_name):
    model = nn.Sequential(nn.Linear(16, 16))
    nn.init.zeros_(model[0].weight)
    model = swap(model, Plan(layers=plan_layers(model, "0", format=form_name, ranks=3)))
    assert not model[0].dense_weight().any()
    x, y = torch.randn(64, 16), torch.randn(64, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(30):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert model[0].dense_weight().abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("0", "tt"),
        pytest.param("0", "tr", marks=pytest.mark.slow),
        pytest.param("0", "tucker", marks=pytest.mark.slow),
        ("0", "cp"),
        pytest.param("0", "svd", marks=pytest.mark.slow),
        ("2", "ttm"),
    ],
)
def test_layers_of_cores_compile_without_breaks_at_any_batch_size(name, form, monkeypatch):
    dense_is_faster = form not in {"tr", "tucker", "ttm"}
    monkeypatch.setattr(layers, "_dense_is_faster", lambda *_: dense_is_faster)
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 6))
    model = swap(model, Plan(layers=plan_layers(model, name, format=form, ranks=3)))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for training in (True, False):
        model.train(training)
        for batch in (2, 3, 5):  # the second one makes the batch dynamic
            x = torch.randn(batch, 3, 4, 4)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [False, True])
def test_a_layer_of_cores_is_one_node_of_a_trace(training):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 6), nn.LSTM(6, 4))
    swap(model, Plan(layers=plan_layers(model, "*", format="svd", ranks=3))).train(training)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3"]
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(traced(x)[0], model(x)[0])
