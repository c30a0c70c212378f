"""Training by several processes as if by one: what is summed, what is shared out, and batch-norm over all of them.

Everything here also works in a process of its own, where it does nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, distributed, nn


def world() -> int:
    """Return how many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return this process's number, from 0."""
    return distributed.get_rank() if world() > 1 else 0


def shared_out(costs: Mapping[str, int]) -> dict[str, int]:
    """Return which process does each piece of work: the dearest first, each to the process with the least to do."""
    loads = [0] * world()
    owners = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += costs[name]
    return owners


class SyncedBatchNorm(nn.BatchNorm2d):
    """Batch-norm whose mean and variance are those of the batches of all processes, on any device.

    The shares of the batch may differ in size. In evaluation, and in one process, it is `nn.BatchNorm2d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        if not self.training or world() == 1:
            return super().forward(x)
        from torch.distributed.nn.functional import all_reduce  # differentiable: the gradient is summed as well

        with torch.autocast(x.device.type, enabled=False):
            wide = x.float()
            count = torch.full((1,), wide.numel() / wide.shape[1], device=x.device)
            sums = all_reduce(torch.cat([wide.sum((0, 2, 3)), count]))
            total = sums[-1]
            mean = sums[:-1] / total
            # A second pass: the difference of two large sums would lose the variance in rounding.
            centred = wide - mean[:, None, None]
            variance = all_reduce(centred.square().sum((0, 2, 3))) / total
            self._track(mean.detach(), variance.detach() * (total.detach() / (total.detach() - 1)))
            scale = torch.rsqrt(variance + self.eps)
            if self.affine:
                scale = scale * self.weight
            y = centred * scale[:, None, None]
            if self.affine:
                y = y + self.bias[:, None, None]
        out: Tensor = y.to(x.dtype)
        return out

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        cast(Tensor, self.num_batches_tracked).add_(1)
        share = self.momentum if self.momentum is not None else 1.0 / float(cast(Tensor, self.num_batches_tracked))
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


def sync_batch_norm(model: nn.Module) -> nn.Module:
    """Give every `nn.BatchNorm2d` of a model the statistics of all processes, in place; parameters and names stay."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncedBatchNorm
    return model


def unsync_batch_norm(model: nn.Module) -> nn.Module:
    """Undo `sync_batch_norm`, in place."""
    for module in model.modules():
        if type(module) is SyncedBatchNorm:
            module.__class__ = nn.BatchNorm2d  # type: ignore[assignment] # mypy knows no class above its own
    return model


def summed(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    if world() > 1:
        tensor = tensor.clone()
        distributed.all_reduce(tensor)
    return tensor
