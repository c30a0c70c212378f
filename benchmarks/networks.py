"""The networks that are measured, dense and with random weights, as ONNX files.

    from networks import network, published_plan, write

Time does not depend on the weights' values, but sane ones keep activations out of denormals and overflow. Batch-norm has
scales and shifts that are not 1 and 0, half the mean that a batch of noise has, and its second moment for a variance: with the
true mean and variance a random network of this depth would magnify every rounding, for its images end up nearly alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensorrail_exporter.graphs.io import save_model
from tensorrail_trainer import to_onnx
from tensorrail_trainer.networks.registry import MODELS
from tensorrail_trainer.planning.published import published_plan as published_plan

# What the model is made with, and the shape of one sample.
NETWORKS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "resnet18": ({}, (3, 224, 224)),
    "resnet50": ({}, (3, 224, 224)),
    "resnet20": ({"classes": 100}, (3, 32, 32)),  # CIFAR-100
    "mobilenet_v2": ({}, (3, 224, 224)),
    "vit_tiny": ({}, (3, 224, 224)),
    "lstm": ({"inputs": 57600, "hidden": 256, "classes": 11}, (6, 57600)),  # UCF11: six frames of 160×120×3
}


def write(name: str, folder: Path | str, seed: int = 0) -> Path:
    """Write `<folder>/<name>.onnx`, a network of `NETWORKS` with random weights, and return its path."""
    path = Path(folder) / f"{name}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(to_onnx(network(name, seed), torch.zeros(2, *NETWORKS[name][1])), path)
    return path


def network(name: str, seed: int = 0) -> nn.Module:
    """Return a network of `NETWORKS` with random weights, in evaluation mode; the seed alone decides them."""
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}: expected one of {', '.join(NETWORKS)}")
    args, sample = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomize(MODELS[name](**args), sample)


@torch.no_grad()
def randomize(model: nn.Module, sample: tuple[int, ...]) -> nn.Module:
    """Draw what a fresh model leaves at 0 or 1 or too large, and measure batch-norm's statistics on noise, in place.

    `sample` is the shape of one input.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.1)
        elif isinstance(module, nn.Linear | nn.LSTM):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, 0.0, parameter.shape[1] ** -0.5 if parameter.dim() > 1 else 0.1)
    if norms:
        for norm in norms:
            norm.momentum = 1.0  # the last batch alone
        model.train()(torch.randn(4, *sample))
        for norm in norms:
            norm.momentum = 0.1
            norm.running_var += norm.running_mean**2
            norm.running_mean *= 0.5
    return model.eval()
