"""CIFAR's residual networks, VGG, recurrent classifiers, and networks of other packages and of one's own."""

import math
import sys
from functools import lru_cache

import numpy as np
import onnxruntime as ort
import pytest
import torch
from cases import relative
from torch import nn

from tensorrail_exporter.graphs.io import import_graph, save_model
from tensorrail_exporter.rewrite.sites import NamedLayers
from tensorrail_runtime import cost
from tensorrail_runtime.errors import NetworkError
from tensorrail_trainer import to_onnx
from tensorrail_trainer.layers.dense import dense_layers
from tensorrail_trainer.networks.registry import MODELS, model_of
from tensorrail_trainer.networks.resnets import Subsample

# Arguments of a small instance, and the shape of one sample.
SMALL = {
    "gru": ("gru", {"inputs": 12, "hidden": 8, "classes": 3, "bidirectional": True}, (3, 12)),
    "gru, 2 layers": ("gru", {"inputs": 12, "hidden": 8, "classes": 3, "layers": 2, "bidirectional": True}, (5, 12)),
    "lstm, 2 layers": ("lstm", {"inputs": 12, "hidden": 8, "classes": 3, "layers": 2}, (5, 12)),
    "resnet20": ("resnet20", {"width": 4}, (3, 32, 32)),
    "resnet32": ("resnet32", {"width": 4, "shortcut": "B", "channels": 1}, (1, 16, 16)),
    "resnet56": ("resnet56", {"width": 4, "classes": 3}, (3, 16, 16)),
    "vgg16_bn": ("vgg16_bn", {"width": 4, "hidden": 16, "classes": 5}, (3, 224, 224)),
    "vgg16_bn, small": ("vgg16_bn", {"width": 4, "head": "small", "classes": 5}, (3, 32, 32)),
}
# Other depths and heads of what is tried anyway, here or in test_networks.py.
SLOW = {"gru, 2 layers", "lstm, 2 layers", "resnet20", "resnet32", "resnet56", "vgg16_bn", "vgg16_bn, small"}
KEYS = [pytest.param(key, marks=pytest.mark.slow if key in SLOW else ()) for key in SMALL]


def randomized(name, args, sample):
    """A network with statistics and biases that are not those of a fresh one."""
    torch.manual_seed(0)
    model = MODELS[name](**args)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.1)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, module.in_features**-0.5)
    model.train()(torch.randn(4, *sample))
    return model.eval()


@lru_cache
def exported(key):
    name, args, sample = SMALL[key]
    model = randomized(name, args, sample)
    return model, to_onnx(model, torch.randn(2, *sample))


@pytest.mark.parametrize(
    ("name", "args", "params"),
    [
        ("resnet20", {}, 269_722),
        ("resnet32", {}, 464_154),
        ("resnet56", {}, 853_018),
        ("resnet20", {"shortcut": "B"}, 272_474),
        ("resnet20", {"classes": 100}, 275_572),
        ("vgg16_bn", {}, 138_365_992),
        ("vgg16_bn", {"head": "small", "classes": 10}, 14_728_266),
        ("lstm", {"inputs": 57600, "hidden": 256, "classes": 11}, 4 * 256 * (57600 + 256 + 2) + 257 * 11),
        ("gru", {"inputs": 40, "hidden": 64, "classes": 10, "bidirectional": True}, 2 * 3 * 64 * (40 + 64 + 2) + 129 * 10),
    ],
)
def test_parameters_are_as_many_as_published(name, args, params):
    with torch.device("meta"):
        model = MODELS[name](**args)
    assert sum(parameter.numel() for parameter in model.parameters()) == params


@pytest.mark.parametrize(("name", "layers"), [("resnet20", 20), ("resnet32", 32), ("resnet56", 56)])
def test_a_residual_network_has_the_layers_of_its_name(name, layers):
    with torch.device("meta"):
        assert len(dense_layers(MODELS[name]())) == layers


@pytest.mark.parametrize(
    ("name", "args", "shapes"),
    [
        (
            "resnet20",
            {"shortcut": "B"},
            {
                "conv1.weight": (16, 3, 3, 3),
                "layer1.2.conv2.weight": (16, 16, 3, 3),
                "layer2.0.downsample.0.weight": (32, 16, 1, 1),
                "layer2.0.downsample.1.running_var": (32,),
                "layer3.0.conv1.weight": (64, 32, 3, 3),
                "layer3.2.bn2.bias": (64,),
                "fc.weight": (10, 64),
            },
        ),
        (
            "vgg16_bn",
            {},
            {
                "features.0.weight": (64, 3, 3, 3),
                "features.0.bias": (64,),
                "features.1.running_mean": (64,),
                "features.7.weight": (128, 64, 3, 3),
                "features.40.weight": (512, 512, 3, 3),
                "features.41.running_var": (512,),
                "classifier.0.weight": (4096, 25088),
                "classifier.3.weight": (4096, 4096),
                "classifier.6.bias": (1000,),
            },
        ),
        ("gru", {"inputs": 9, "hidden": 4, "classes": 2}, {"rnn.weight_ih_l0": (12, 9), "classifier.weight": (2, 4)}),
    ],
)
def test_states_carry_the_published_names(name, args, shapes):
    with torch.device("meta"):
        state = MODELS[name](**args).state_dict()
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


def test_a_shortcut_without_parameters_takes_every_second_pixel_and_fills_up_with_zeros():
    x = torch.randn(2, 4, 6, 6)
    y = Subsample(4, 9, 2)(x)
    assert y.shape == (2, 9, 3, 3)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert y[:, :2].abs().max() == y[:, 6:].abs().max() == 0
    names = [key for key in MODELS["resnet20"](width=4).state_dict() if "downsample" in key]
    assert names == []


@pytest.mark.parametrize("key", KEYS)
def test_the_graph_computes_what_the_network_does_at_any_batch(key):
    model, graph = exported(key)
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = torch.randn(batch, *SMALL[key][2], generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = model(x).numpy()
        found = session.run(None, {"image": x.numpy()})[0]
        assert found.shape == (batch, expected.shape[1])
        assert np.abs(expected).max() > 1e-2  # so that a relative error says something
        assert relative(found, expected) < 1e-4


@pytest.mark.parametrize("key", KEYS)
def test_every_layer_is_found_in_the_graph(key):
    model, graph = exported(key)
    assert set(NamedLayers(import_graph(graph)).rewritable()) == set(dense_layers(model, recurrent=True))


@pytest.mark.parametrize("key", ["gru", pytest.param("vgg16_bn, small", marks=pytest.mark.slow)])
def test_every_node_is_known_to_the_cost_model(key, tmp_path):
    save_model(exported(key)[1], tmp_path / "m.onnx")
    assert cost(tmp_path / "m.onnx", batch=2).uncounted == ()


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_the_head_of_a_network_both_ways_sees_the_whole_sequence_from_both_ends(name):
    torch.manual_seed(0)
    model = MODELS[name](inputs=4, hidden=3, classes=2, bidirectional=True)
    x = torch.randn(2, 5, 4)
    out, _ = model.rnn(x)
    expected = model.classifier(torch.cat([out[:, -1, :3], out[:, 0, 3:]], 1))
    torch.testing.assert_close(model(x), expected)


def test_a_network_is_drawn_so_that_it_can_be_trained():
    torch.manual_seed(0)
    model = MODELS["resnet20"]()
    x, y = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] < 2 * math.log(10)
    assert losses[-1] < 0.5


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: MODELS["resnet20"](shortcut="C"), r"CifarResNet: unknown shortcut 'C'; expected one of A, B"),
        (lambda: MODELS["vgg16_bn"](head="tiny"), r"VGG: unknown head 'tiny'; expected one of large, small"),
    ],
)
def test_kinds_that_are_not_known_are_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


MODULE = """
from torch import nn

def make(inputs: int = 3):
    return nn.Linear(inputs, 2)
"""


def test_a_network_of_ones_own_is_found_by_module_and_function(tmp_path, monkeypatch):
    (tmp_path / "own_net.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    assert model_of("own_net:make")(inputs=5).in_features == 5
    assert model_of("resnet20") is MODELS["resnet20"]
    sys.modules.pop("own_net")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "resnet19",
            r"unknown model 'resnet19'; expected one of gru, lstm, .*, timm/NAME, torchvision/NAME or module:function",
        ),
        ("other/net", r"unknown model 'other/net'"),
        ("no_such_module:make", "model 'no_such_module:make' cannot be imported"),
        ("torchvision/resnet18", "torchvision/resnet18 needs torchvision; install it with: pip install torchvision"),
        ("timm/resnet18", "timm/resnet18 needs timm; install it with: pip install timm"),
    ],
)
def test_a_network_that_is_not_there_is_refused(name, reason, monkeypatch):
    for package in ("torchvision", "torchvision.models", "timm"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(NetworkError, match=reason) as raised:
        model_of(name)
    assert "\n" not in str(raised.value)


def test_a_package_that_was_built_for_another_torch_says_so(tmp_path, monkeypatch):
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(NetworkError, match=r"timm cannot be imported \(operator .* exist\); install the version built for"):
        model_of("timm/resnet18")


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_networks_of_other_packages_are_made_without_their_weights(package):
    pytest.importorskip(package)
    model = model_of(f"{package}/resnet18")(classes=7)
    state = MODELS["resnet18"](classes=7).state_dict()
    assert {key: value.shape for key, value in model.state_dict().items()} == {key: value.shape for key, value in state.items()}
    with pytest.raises(NetworkError, match=rf"{package} has no model 'resnet1888'; did you mean "):
        model_of(f"{package}/resnet1888")
