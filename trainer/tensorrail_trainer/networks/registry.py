"""The networks that a recipe can name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import torch
from torch import nn

from tensorrail_runtime.errors import ModelError, NetworkError
from tensorrail_runtime.measure.accuracy import imported
from tensorrail_trainer.networks.mobilenet import MobileNetV2
from tensorrail_trainer.networks.recurrent import GRUClassifier, LSTMClassifier
from tensorrail_trainer.networks.resnets import resnet18, resnet20, resnet32, resnet50, resnet56
from tensorrail_trainer.networks.small_resnet import SmallResNet
from tensorrail_trainer.networks.vgg import vgg16_bn
from tensorrail_trainer.networks.vit import vit_tiny

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
