"""Zeros around the ranks: the same function, in channel counts that a kernel library likes.

ONNX Runtime's CPU convolutions work on blocks of channels, and a rank just above a multiple of the block wastes most of
one. Widening a rank with zero rows and columns changes no output; the trained cores, without zeros, stay in
`cores.safetensors`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tensorrail_exporter.formats import format_of
from tensorrail_exporter.plans.plan import LayerPlan
from tensorrail_runtime.errors import PlanError


def pad_ranks(layer: LayerPlan, cores: Sequence[np.ndarray], shape: Sequence[int], block: int) -> list[np.ndarray]:
    """Return the cores with every rank widened by zeros to the next multiple of `block`; 1 leaves them as they are."""
    if block < 1:
        raise PlanError(f"layer {layer.name}: expected a padding block of 1 or more, got {block}")
    if block == 1:
        return list(cores)
    axes = format_of(layer.format).rank_axes(shape, layer.modes)
    return [_widened(core, ranks, block) for core, ranks in zip(cores, axes, strict=True)]


def _widened(core: np.ndarray, axes: Sequence[int], block: int) -> np.ndarray:
    return np.pad(core, [(0, -size % block if axis in axes else 0) for axis, size in enumerate(core.shape)])
