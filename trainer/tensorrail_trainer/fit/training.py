"""The optimizer of a fit: Adam, with learning rates relative to the size of each tensor, which fall along a cosine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn


class Rates:
    """Adam over some parameters.

    Args:
        parameters: all parameters by name; only those in `trained` get gradients.
        trained: names of the parameters to train.
        rate: learning rate, relative to the root mean square of each parameter.
        warm_up: steps in which the rate rises; default 0.

    Attributes:
        optimizer: the optimizer.

    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], trained: Iterable[str], rate: float, *, warm_up: int = 0
    ) -> None:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        groups = []
        for name in trained:
            parameter = parameters[name]
            parameter.requires_grad_(True)
            size = float(parameter.detach().square().mean().sqrt())
            groups.append({"params": [parameter], "lr": rate * max(size, 1e-3)})
        self._base = [float(group["lr"]) for group in groups]  # type: ignore[arg-type] # a number beside a list
        self._warm_up = warm_up
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))

    def set(self, share: float, step: int) -> None:
        """Set the rates of a step, when a share (0 to 1) of the fit is done."""
        factor = (1 + math.cos(math.pi * share)) / 2 * min(1.0, (step + 1) / (self._warm_up + 1))
        for group, rate in zip(self.optimizer.param_groups, self._base, strict=True):
            group["lr"] = rate * factor
