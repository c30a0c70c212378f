"""The networks that a recipe can name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from tensorrail_runtime.errors import ModelError, NetworkError
from tensorrail_runtime.measure.accuracy import imported
from tensorrail_trainer.networks.mobilenet import MobileNetV2
from tensorrail_trainer.networks.resnets import resnet18, resnet20, resnet32, resnet50, resnet56
from tensorrail_trainer.networks.vgg import vgg16_bn
from tensorrail_trainer.networks.vit import vit_tiny


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch-norm and a shortcut, a 1×1 convolution if the shape changes (He et al., CVPR 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, I, H, W) to (B, O, H / stride, W / stride)."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A residual network for small images with a linear head: (B, C, H, W) → (B, classes).

    The stem and each stage after the first one halve the image. Stage k has `blocks` blocks of `widths[k]` channels. Average
    pooling to 4×4, a hidden linear layer and the classifier follow.
    """

    def __init__(self, channels: int, classes: int, widths: Sequence[int], blocks: int, hidden: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        stages = []
        previous = widths[0]
        for index, width in enumerate(widths):
            sizes = [previous, *[width] * blocks]
            stages.append(
                nn.Sequential(
                    *(BasicBlock(sizes[k], width, 2 if index and k == 0 else 1) for k in range(blocks)),
                )
            )
            previous = width
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.hidden = nn.Linear(16 * previous, hidden)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores."""
        x = self.pool(self.stages(self.stem(x)))
        scores: Tensor = self.classifier(torch.relu(self.hidden(torch.flatten(x, 1))))
        return scores


class RecurrentClassifier(nn.Module):
    """LSTM or GRU layers over a sequence and a linear head on the last hidden state: (B, T, inputs) → (B, classes).

    In a bidirectional network the head uses the last states of both directions, each after the whole sequence.
    """

    rnn: nn.LSTM | nn.GRU

    def __init__(
        self,
        kind: type[nn.LSTM | nn.GRU],
        inputs: int,
        hidden: int,
        classes: int,
        layers: int,
        bidirectional: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.rnn = kind(inputs, hidden, layers, batch_first=True, dropout=dropout, bidirectional=bidirectional)
        self.classifier = nn.Linear(hidden * (2 if bidirectional else 1), classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores."""
        _, states = self.rnn(x)
        last = states[0] if isinstance(states, tuple) else states  # (layers · directions, B, hidden)
        features = torch.cat([last[-2], last[-1]], 1) if self.rnn.bidirectional else last[-1]
        scores: Tensor = self.classifier(features)
        return scores


class LSTMClassifier(RecurrentClassifier):
    """An LSTM over a sequence and a linear head: (B, T, inputs) → (B, classes)."""

    def __init__(
        self, inputs: int, hidden: int, classes: int, layers: int = 1, bidirectional: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__(nn.LSTM, inputs, hidden, classes, layers, bidirectional, dropout)


class GRUClassifier(RecurrentClassifier):
    """A GRU over a sequence and a linear head: (B, T, inputs) → (B, classes)."""

    def __init__(
        self, inputs: int, hidden: int, classes: int, layers: int = 1, bidirectional: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__(nn.GRU, inputs, hidden, classes, layers, bidirectional, dropout)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "gru": GRUClassifier,
    "lstm": LSTMClassifier,
    "mobilenet_v2": MobileNetV2,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet50": resnet50,
    "resnet56": resnet56,
    "small_resnet": SmallResNet,
    "vgg16_bn": vgg16_bn,
    "vit_tiny": vit_tiny,
}


def model_of(name: str) -> Callable[..., nn.Module]:
    """Return the function that creates the network of a name.

    Args:
        name: a key of `MODELS`, `torchvision/NAME`, `timm/NAME`, or your own function as `module:function`.

    Returns:
        A function that takes the arguments of the recipe and returns the network. It downloads no weights.

    Raises:
        NetworkError: there is no such network, or its package is not installed.

    """
    if name in MODELS:
        return MODELS[name]
    package, slash, leaf = name.partition("/")
    if slash and package in _PACKAGES and leaf:
        return _PACKAGES[package](leaf)
    if ":" not in name:
        others = ", ".join(f"{package}/NAME" for package in sorted(_PACKAGES))
        raise NetworkError(f"unknown model {name!r}; expected one of {', '.join(sorted(MODELS))}, {others} or module:function")
    try:
        return imported(name, "model")
    except ModelError as error:
        raise NetworkError(str(error)) from None


def _torchvision(name: str) -> Callable[..., nn.Module]:
    models = _package("torchvision", "torchvision.models", name)

    def make(classes: int = 1000) -> nn.Module:
        model: nn.Module = models.get_model(name, weights=None, num_classes=classes)
        return model

    return make


def _timm(name: str) -> Callable[..., nn.Module]:
    timm = _package("timm", "timm", name)

    def make(channels: int = 3, classes: int = 1000) -> nn.Module:
        model: nn.Module = timm.create_model(name, pretrained=False, in_chans=channels, num_classes=classes)
        return model

    return make


def _package(package: str, module: str, name: str) -> Any:
    """Import the module that has the network. Raises `NetworkError` if it is missing or was built for another torch version."""
    try:
        imported_module = import_module(module)
    except ModuleNotFoundError:
        raise NetworkError(f"{package}/{name} needs {package}; install it with: pip install {package}") from None
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        advice = f"install the version built for torch {torch.__version__}"
        raise NetworkError(f"{package}/{name}: {package} cannot be imported ({reason}); {advice}") from None
    known = imported_module.list_models()
    if name not in known:
        raise NetworkError(f"{package} has no model {name!r}{_nearest(name, known)}")
    return imported_module


def _nearest(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, 3)
    return f"; did you mean {', '.join(near)}?" if near else f"; it has {len(known)} models, and none has a similar name"


_PACKAGES = {"timm": _timm, "torchvision": _torchvision}
