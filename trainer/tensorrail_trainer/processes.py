"""Data-parallel training by several processes: sums, division of work, and batch-norm over the whole batch.

With a single process, all functions work as well and have no effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

Group: TypeAlias = "distributed.ProcessGroup"
"""Some of the processes, as `torch.distributed.new_group` returns them; None stands for all."""


def world(group: Group | None = None) -> int:
    """Return how many processes train together."""
    return distributed.get_world_size(group) if distributed.is_available() and distributed.is_initialized() else 1


def rank(group: Group | None = None) -> int:
    """Return the rank of this process in the group, from 0."""
    return distributed.get_rank(group) if world(group) > 1 else 0


def shared_out(costs: Mapping[str, int], group: Group | None = None) -> dict[str, int]:
    """Assign each task to a process, the most expensive ones first, each to the process with the least work so far."""
    loads = [0] * world(group)
    owners = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += costs[name]
    return owners


class _Synced(_BatchNorm):
    """Batch-norm with the mean and variance of the whole batch, over all processes, on any device.

    The processes may hold different numbers of samples. In evaluation, and with one process, it is torch's own batch-norm.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, C, *S)."""
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
            # A second pass: the difference of two large sums would lose precision.
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
    """Synchronized batch-norm for inputs (B, C) or (B, C, L)."""


class SyncedBatchNorm2d(_Synced, nn.BatchNorm2d):
    """Synchronized batch-norm for inputs (B, C, H, W)."""


class SyncedBatchNorm3d(_Synced, nn.BatchNorm3d):
    """Synchronized batch-norm for inputs (B, C, D, H, W)."""


_SYNCED: dict[type, type] = {
    nn.BatchNorm1d: SyncedBatchNorm1d,
    nn.BatchNorm2d: SyncedBatchNorm2d,
    nn.BatchNorm3d: SyncedBatchNorm3d,
}
_PLAIN = {synced: plain for plain, synced in _SYNCED.items()}


def sync_batch_norm(model: nn.Module) -> nn.Module:
    """Make every batch-norm of a model use the statistics of all processes, in place. Parameters and names stay.

    torch's `SyncBatchNorm` is left as it is.

    Args:
        model: the model to change.

    Returns:
        The model itself.

    Raises:
        ValueError: a layer is a subclass of torch's batch-norm, whose use of its statistics is unknown.

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
    """Undo `sync_batch_norm`, in place, and return the model."""
    for module in model.modules():
        if type(module) in _PLAIN:
            module.__class__ = _PLAIN[type(module)]
    return model


class _Summed(torch.autograd.Function):
    """The sum over all processes. The gradient of each summand is the gradient of the sum, summed over all processes."""

    @staticmethod
    def forward(_: Any, tensor: Tensor) -> Tensor:
        return summed(tensor)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return summed(gradient)


def alike(numbers: Tensor, group: Group | None = None) -> bool:
    """Return whether a tensor of integers is equal on all processes."""
    total, squares = summed(numbers, group), summed(numbers * numbers, group)
    return bool((world(group) * squares == total * total).all())


def apart(tensors: Mapping[str, Tensor], group: Group | None = None) -> str:
    """Return the name of the first tensor that differs between the processes by more than rounding; empty if none does.

    Each process sends the inner products of its tensors with a few waves, and their norms. All must hold the same names.

    Args:
        tensors: the tensors by name.
        group: the processes; default: all.

    """
    rows = []
    for tensor in tensors.values():
        flat = tensor.detach().reshape(-1).float()
        places = torch.arange(len(flat), device=flat.device, dtype=torch.float32)
        waves = [torch.dot(flat, torch.cos(places * step + step)) for step in _STEPS]
        rows.append(torch.stack([torch.linalg.vector_norm(flat), *waves]))
    products = torch.stack(rows)
    gathered = [torch.empty_like(products) for _ in range(world(group))]
    distributed.all_gather(gathered, products, group=group)
    stacked = torch.stack(gathered)
    differences = (stacked.amax(0) - stacked.amin(0)).amax(1) > _ROUNDING * stacked[:, :, 0].amax(0)
    # Where one process holds NaN, so that it raises an error later, the comparison says nothing.
    return next((name for name, differs in zip(tensors, differences.tolist(), strict=True) if differs), "")


_STEPS = (0.7, 1.3, 1.9, 2.6)  # of the waves, in radians from one value to the next
_ROUNDING = 1e-2  # relative to the norm: tensors of other networks differ by about 1


def summed(tensor: Tensor, group: Group | None = None) -> Tensor:
    """Return the sum of a tensor over all processes."""
    if world(group) > 1:
        tensor = tensor.clone()
        distributed.all_reduce(tensor, group=group)
    return tensor
