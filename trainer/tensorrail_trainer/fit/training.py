"""The steps of a fit: Adam, with learning rates relative to the size of each tensor, which fall along a cosine."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn


class Steps:
    """Steps of Adam over some parameters.

    Args:
        parameters: all parameters by name; only those in `trained` get gradients.
        trained: names of the parameters to train.
        rate: learning rate, relative to the root mean square of each parameter.
        warm_up: steps in which the rate rises; default 0.

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
        self._optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))

    def within(self, seconds: float, most: int, fewest: int = 0) -> Iterator[float]:
        """Yield the share (0 to 1) that is done before each step; the gradients that the caller then adds are applied after it.

        Args:
            seconds: time limit; after two steps their number is reduced to what it allows.
            most: number of steps at most.
            fewest: if the time limit allows fewer steps than this, none follows the second; default 0.

        """
        began, step = time.monotonic(), 0
        while step < most:
            self._set_rates(step / most, step)
            self._optimizer.zero_grad(set_to_none=True)
            yield step / most
            self._optimizer.step()
            step += 1
            if step == 2:  # the first step prepares kernels
                most = min(most, int(2 * seconds / max(time.monotonic() - began, 1e-9)))
                if most < fewest:
                    return

    def _set_rates(self, share: float, step: int) -> None:
        factor = (1 + math.cos(math.pi * share)) / 2 * min(1.0, (step + 1) / (self._warm_up + 1))
        for group, rate in zip(self._optimizer.param_groups, self._base, strict=True):
            group["lr"] = rate * factor
