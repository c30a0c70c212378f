"""Training by several processes as if by one: what is summed, what is shared out, and batch-norm over all of them.

Everything here also works in a process of its own, where it does nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm


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


class _Synced(_BatchNorm):
    """Batch-norm whose mean and variance are those of the batches of all processes, on any device.

    The shares of the batch may differ in size. In evaluation, and in one process, it is the plain one.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, *S) to the same shape."""
        if not self.training or world() == 1:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            wide = x.float()
            count = torch.full((1,), wide.numel() / wide.shape[1], device=x.device)
            axes = (0, *range(2, wide.dim()))
            wide_shape = (-1, *(1,) * (wide.dim() - 2))
            sums = _Summed.apply(torch.cat([wide.sum(axes), count]))
            total = sums[-1]
            mean = sums[:-1] / total
            # A second pass: the difference of two large sums would lose the variance in rounding.
            centred = wide - mean.reshape(wide_shape)
            variance = _Summed.apply(centred.square().sum(axes)) / total
            self._track(mean.detach(), variance.detach() * (total.detach() / (total.detach() - 1)))
            scale = torch.rsqrt(variance + self.eps)
            if self.affine:
                scale = scale * self.weight
            y = centred * scale.reshape(wide_shape)
            if self.affine:
                y = y + self.bias.reshape(wide_shape)
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


class SyncedBatchNorm1d(_Synced, nn.BatchNorm1d):
    """Of (B, C) or (B, C, L)."""


class SyncedBatchNorm2d(_Synced, nn.BatchNorm2d):
    """Of (B, C, H, W)."""


class SyncedBatchNorm3d(_Synced, nn.BatchNorm3d):
    """Of (B, C, D, H, W)."""


_SYNCED: dict[type, type] = {
    nn.BatchNorm1d: SyncedBatchNorm1d,
    nn.BatchNorm2d: SyncedBatchNorm2d,
    nn.BatchNorm3d: SyncedBatchNorm3d,
}
_PLAIN = {synced: plain for plain, synced in _SYNCED.items()}


def sync_batch_norm(model: nn.Module) -> nn.Module:
    """Give every batch-norm of a model the statistics of all processes, in place; parameters and names stay.

    torch's own `SyncBatchNorm` stays as it is. `ValueError` names a layer of another class: what it does with its statistics
    is not known here.
    """
    for name, module in model.named_modules():
        if type(module) in _SYNCED:
            module.__class__ = _SYNCED[type(module)]
        elif isinstance(module, _BatchNorm) and not isinstance(module, _Synced | nn.SyncBatchNorm):
            raise ValueError(
                f"layer {name}: {type(module).__name__} cannot share its statistics between processes; set "
                "sync_batch_norm: false, or use a batch-norm of torch.nn"
            )
    return model


def unsync_batch_norm(model: nn.Module) -> nn.Module:
    """Undo `sync_batch_norm`, in place."""
    for module in model.modules():
        if type(module) in _PLAIN:
            module.__class__ = _PLAIN[type(module)]
    return model


class _Summed(torch.autograd.Function):
    """The sum over all processes; the gradient of each part is that of the sum, summed in its turn."""

    @staticmethod
    def forward(_: Any, tensor: Tensor) -> Tensor:
        return summed(tensor)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return summed(gradient)


def alike(numbers: Tensor) -> bool:
    """Return whether all processes hold the same whole numbers."""
    total, squares = summed(numbers), summed(numbers * numbers)
    return bool((world() * squares == total * total).all())


def summed(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    if world() > 1:
        tensor = tensor.clone()
        distributed.all_reduce(tensor)
    return tensor
