"""Weights in files: published names, wrappers and prefixes, and everything that does not fit."""

import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from tensorrail_runtime.errors import WeightsError
from tensorrail_trainer.networks.registry import MODELS
from tensorrail_trainer.networks.weights import load_weights, save_weights


class ZooBlock(nn.Module):
    """A block as the two collections of CIFAR networks have it, but for the names of their shortcuts."""

    def __init__(self, inputs, width, stride, names, option):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.inputs, self.width, self.stride, self.option = inputs, width, stride, option
        self.shortcut_name = names["shortcut"]
        if option == "B" and inputs != width:
            shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
            setattr(self, names["shortcut"], shortcut)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.inputs != self.width:
            if self.option == "B":
                x = getattr(self, self.shortcut_name)(x)
            else:
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.width // 4, self.width // 4), "constant", 0)
        return F.relu(y + x)


class ZooNet(nn.Module):
    def __init__(self, blocks, names, option, classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        inputs = 16
        for stage, width in enumerate((16, 32, 64), start=1):
            layers = []
            for k in range(blocks):
                layers.append(ZooBlock(inputs, width, 2 if stage > 1 and k == 0 else 1, names, option))
                inputs = width
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
        self.head_name = names["head"]
        setattr(self, names["head"], nn.Linear(64, classes))

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return getattr(self, self.head_name)(F.avg_pool2d(x, x.shape[3]).flatten(1))


AKAMASTER = {"head": "linear", "shortcut": "shortcut"}
CHENYAOFO = {"head": "fc", "shortcut": "downsample"}


def trained(model, sample=(3, 32, 32)):
    torch.manual_seed(0)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.1)
    for _ in range(3):
        model(torch.randn(4, *sample))
    return model.eval()


@torch.no_grad()
def same(one, other, sample=(3, 32, 32)):
    x = torch.randn(3, *sample, generator=torch.Generator().manual_seed(1))
    expected = other.eval()(x)
    assert expected.std() > 1e-3
    torch.testing.assert_close(one.eval()(x), expected, atol=1e-5, rtol=1e-5)


def refused(model, path, reason, **arguments):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError, match=reason) as raised:
        load_weights(model, path, **arguments)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(str(path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "blocks", "names", "option"),
    [("resnet20", 3, AKAMASTER, "A"), ("resnet20", 3, AKAMASTER, "B"), ("resnet32", 5, CHENYAOFO, "B")],
    ids=["akamaster A", "akamaster B", "chenyaofo"],
)
def test_published_cifar_networks_compute_the_same_under_our_names(name, blocks, names, option, tmp_path):
    published = trained(ZooNet(blocks, names, option))
    state = published.state_dict()
    path = tmp_path / "published.th"
    if names is AKAMASTER:  # saved by DataParallel before torch 1.6, in a checkpoint
        state = {"state_dict": OrderedDict((f"module.{key}", value) for key, value in state.items()), "best_prec1": 91.7}
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(state, path)
    model = MODELS[name](shortcut=option)
    load_weights(model, path)
    same(model, published)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"state": {}, "param_groups": []}},
        lambda state: {"net": {f"module.{key}": value for key, value in state.items()}, "acc": 95.2},
        lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}},
        lambda state: {"state_dict": {f"module._orig_mod.{key}": value for key, value in state.items()}},
    ],
)
def test_checkpoints_and_wrapped_networks_are_unwrapped(wrap, tmp_path):
    source = trained(MODELS["resnet18"](width=8, classes=5), (3, 64, 64))
    torch.save(wrap(source.state_dict()), tmp_path / "w.pt")
    model = MODELS["resnet18"](width=8, classes=5)
    load_weights(model, tmp_path / "w.pt")
    same(model, source, (3, 64, 64))


def test_a_prefix_that_is_the_models_own_stays(tmp_path):
    model = nn.ModuleDict({"model": nn.Linear(3, 2)})
    torch.save({"module.model.weight": torch.ones(2, 3), "module.model.bias": torch.zeros(2)}, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert torch.equal(model["model"].weight, torch.ones(2, 3))


def test_saved_weights_come_back_bit_by_bit(tmp_path):
    source = trained(MODELS["resnet20"](width=4))
    path = tmp_path / "w.safetensors"
    save_weights(source, path)
    assert [each.name for each in tmp_path.iterdir()] == ["w.safetensors"]
    assert load_file(path).keys() == source.state_dict().keys()
    model = MODELS["resnet20"](width=4)
    load_weights(model, path)
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    before = path.read_bytes()
    save_weights(model, path)
    assert path.read_bytes() == before


def test_weights_that_cannot_be_written_leave_nothing(tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match=r"none/w\.safetensors: cannot be written \(No such file"):
        save_weights(nn.Linear(2, 2), tmp_path / "none" / "w.safetensors")
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(WeightsError, match="No space left"):
        save_weights(nn.Linear(2, 2), path)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_shared_and_transposed_weights_are_saved(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].weight = model[1].weight = nn.Parameter(torch.arange(9.0).reshape(3, 3).t())
    save_weights(model, tmp_path / "w")
    fresh = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    load_weights(fresh, tmp_path / "w")
    assert fresh[0].weight.tolist() == fresh[1].weight.tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


def test_counters_of_batch_norm_may_be_missing_and_half_precision_is_widened(tmp_path):
    source = trained(MODELS["resnet20"](width=4))
    state = {key: value.half() for key, value in source.state_dict().items() if not key.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "w")
    model = MODELS["resnet20"](width=4)
    load_weights(model, tmp_path / "w")
    assert model.conv1.weight.dtype == torch.float32
    torch.testing.assert_close(model.conv1.weight, source.conv1.weight, atol=1e-3, rtol=1e-3)


def test_a_classifier_for_other_classes_may_stay_fresh(tmp_path):
    source = trained(MODELS["resnet20"](width=4, classes=100))
    save_weights(source, tmp_path / "w")
    model = MODELS["resnet20"](width=4)
    before = model.fc.weight.clone()
    load_weights(model, tmp_path / "w", fresh=["fc.*"])
    assert torch.equal(model.fc.weight, before)
    assert torch.equal(model.layer3[2].conv2.weight, source.layer3[2].conv2.weight)
    refused(model, tmp_path / "w", "no weight of the model matches 'head.*'; it has conv1.weight, bn1.weight", fresh=["head.*"])


@pytest.mark.parametrize(
    ("saved", "model", "reason"),
    [
        (
            ("resnet20", {"shortcut": "B"}),
            ("resnet20", {}),
            r"unexpected layer2\.0\.downsample\.0\.weight.* and \d+ more.*; try shortcut: B",
        ),
        (("resnet20", {}), ("resnet20", {"shortcut": "B"}), r"missing layer2\.0\.downsample\.0\.weight.*; try shortcut: A"),
        (("resnet20", {}), ("resnet32", {}), r"missing layer1\.3\.conv1\.weight, .* and \d+ more.*one of another depth"),
        (
            ("resnet20", {"classes": 100}),
            ("resnet20", {}),
            r"fc\.weight: expected \[10, 16\].*, got \[100, 16\].*; try classes: 100",
        ),
        (("resnet20", {"channels": 1}), ("resnet20", {}), r"conv1\.weight: .*, got \[4, 1, 3, 3\].*; try channels: 1"),
        (("resnet20", {"width": 8}), ("resnet20", {}), r"conv1\.weight: .*, got \[8, 3, 3, 3\].*; try another width"),
        (
            ("resnet18", {"stem": "small"}),
            ("resnet18", {}),
            r"conv1\.weight: expected \[4, 3, 7, 7\].*, got \[4, 3, 3, 3\].*another stem",
        ),
        (("resnet18", {}), ("mobilenet_v2", {"width": None}), r"missing .*, unexpected .*; it belongs to another network"),
    ],
)
def test_weights_of_another_network_say_what_to_try(saved, model, reason, tmp_path):
    made = []
    for name, args in (saved, model):
        made.append(MODELS[name](**{key: value for key, value in ({"width": 4} | args).items() if value is not None}))
    save_weights(made[0], tmp_path / "w")
    refused(made[1], tmp_path / "w", reason)


@pytest.mark.parametrize("name", ["linear.weight", "layer1.0.shortcut.0.weight"])
def test_names_of_cifar_networks_are_those_of_cifar_networks_alone(name, tmp_path):
    model = MODELS["resnet18"](width=4)
    save_file({**model.state_dict(), name: torch.zeros(2, 2)}, tmp_path / "w")
    refused(model, tmp_path / "w", f"unexpected {name}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value, tmp_path):
    model = nn.Linear(2, 2)
    save_file({"weight": torch.tensor([[1.0, value], [0.0, 0.0]]), "bias": torch.zeros(2)}, tmp_path / "w")
    refused(model, tmp_path / "w", "weight: expected finite values, got infinity or NaN")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_hostile_file_runs_nothing(tmp_path):
    model, proof = nn.Linear(2, 2), tmp_path / "ran"
    for path, save in (
        (tmp_path / "zip.pt", lambda path: torch.save({"weight": Hostile(proof)}, path)),
        (tmp_path / "old.th", lambda path: torch.save({"weight": Hostile(proof)}, path, _use_new_zipfile_serialization=False)),
        (tmp_path / "raw.pkl", lambda path: path.write_bytes(pickle.dumps(Hostile(proof)))),
        (tmp_path / "module.pt", lambda path: torch.save(model, path)),
    ):
        save(path)
        refused(model, path, "cannot be read without running code from it")
    assert not proof.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read without running code"),
        (b"text", "cannot be read without running code"),
        (b"\x10\0\0\0\0\0\0\0{broken header}", "cannot be read without running code"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f{", "cannot be read without running code"),
        (None, r"cannot be read \(No such file"),
    ],
)
def test_what_is_no_file_of_weights_is_refused(content, reason, tmp_path):
    if content is not None:
        (tmp_path / "w").write_bytes(content)
    refused(nn.Linear(2, 2), tmp_path / "w", reason)


def test_a_state_dict_that_holds_itself_is_refused(tmp_path):
    own = {}
    own["state_dict"] = own
    torch.save(own, tmp_path / "w")
    refused(nn.Linear(2, 2), tmp_path / "w", "entry 'state_dict': expected a named tensor, got a dict")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([torch.zeros(2)], "expected a state dict that maps names to tensors, got a list"),
        ({"weight": 3}, "entry 'weight': expected a named tensor, got a int"),
        ({"state_dict": {"weight": torch.zeros(2, 2), "epoch": 3}}, "entry 'epoch': expected a named tensor, got a int"),
        ({"weight": torch.zeros(2, 2).to_sparse(), "bias": torch.zeros(2)}, "weight: expected a dense tensor"),
        (
            {"weight": torch.zeros(2, 2).to(torch.float8_e4m3fn), "bias": torch.zeros(2)},
            "weight: expected float16, bfloat16, float32 or float64, got float8_e4m3fn",
        ),
        (
            {"weight": torch.zeros(2, 2, dtype=torch.int64), "bias": torch.zeros(2)},
            r"weight: expected \[2, 2\] float32, got \[2, 2\] int64",
        ),
        ({}, "missing weight, bias"),
    ],
)
def test_what_is_no_state_dict_is_refused(content, reason, tmp_path):
    torch.save(content, tmp_path / "w")
    refused(nn.Linear(2, 2), tmp_path / "w", reason)
