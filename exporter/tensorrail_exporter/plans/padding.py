"""Padding ranks with zeros to the channel counts that a kernel library computes fastest.

ONNX Runtime's CPU convolutions compute blocks of channels, so a rank just above a multiple of the block wastes most of one.
Zero rows and columns for additional ranks change no output. `cores.safetensors` keeps the trained cores without zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tensorrail_exporter.formats import format_of
from tensorrail_exporter.plans.plan import LayerPlan
from tensorrail_runtime.errors import PlanError


def pad_ranks(
    layer: LayerPlan, cores: Sequence[np.ndarray], shape: Sequence[int], block: int, groups: int = 1
) -> list[np.ndarray]:
    """Return the cores with every rank padded with zeros to the next multiple of `block`.

    Args:
        layer: the plan of the layer.
        cores: the cores of the layer.
        shape: shape of the dense weight, (O, I, *K) or (O, I).
        block: number of channels that the kernels compute at once; 1 returns the cores unchanged.
        groups: number of groups of a convolution; default 1.

    Returns:
        New cores, which represent the same weight.

    Raises:
        PlanError: `block` is less than 1, or the format is unknown.

    """
    if block < 1:
        raise PlanError(f"layer {layer.name}: expected a padding block of 1 or more, got {block}")
    if block == 1:
        return list(cores)
    axes = format_of(layer.format, groups).rank_axes(shape, layer.modes)
    return [_padded(core, rank_axes, block) for core, rank_axes in zip(cores, axes, strict=True)]


def _padded(core: np.ndarray, axes: Sequence[int], block: int) -> np.ndarray:
    return np.pad(core, [(0, -size % block if axis in axes else 0) for axis, size in enumerate(core.shape)])
