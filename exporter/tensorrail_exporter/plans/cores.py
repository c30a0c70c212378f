"""`cores.safetensors`: every core of every layer, stored as `<layer>/<index>`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tensorrail_exporter.plans.plan import LayerPlan, Plan
from tensorrail_runtime.errors import PlanError
from tensorrail_runtime.records import write_bytes

Cores = Mapping[str, Sequence[np.ndarray]]
"""The cores of each layer, by the layer's name."""

_METADATA = {"tensorrail-cores": "1"}  # one key: safetensors writes several in random order, and equal cores are equal files


def save_cores(path: Path | str, cores: Cores) -> None:
    """Write the cores of all layers to one safetensors file."""
    tensors = {f"{name}/{k}": np.ascontiguousarray(core) for name, layer in cores.items() for k, core in enumerate(layer)}
    write_bytes(path, save(tensors, metadata=_METADATA))


def load_cores(path: Path | str, plan: Plan) -> dict[str, list[np.ndarray]]:
    """Read the cores that the plan names; `PlanError` when one is missing, left over, or of another count."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise PlanError(f"{path}: not a readable safetensors file ({error})") from None
    if metadata != _METADATA:
        raise PlanError(f"{path}: expected a cores file with metadata {_METADATA}, got {metadata}; write it with save_cores")
    cores: dict[str, list[np.ndarray]] = {}
    for layer in plan.layers:
        count = sum(key.rpartition("/")[0] == layer.name for key in tensors)
        if not count:
            known = sorted({key.rpartition("/")[0] for key in tensors})
            raise PlanError(
                f"{path}: no cores for the planned layer {layer.name!r}; the file holds cores for {', '.join(known)}"
            )
        try:
            cores[layer.name] = [tensors.pop(f"{layer.name}/{k}") for k in range(count)]
        except KeyError as error:
            raise PlanError(f"{path}: layer {layer.name}: core {error} is missing") from None
    if tensors:
        raise PlanError(
            f"{path}: {sorted(tensors)[0]!r} belongs to no layer of the plan; use the plan that the cores were made for"
        )
    return cores


def check_cores(layer: LayerPlan, cores: Sequence[np.ndarray], shape: tuple[int, ...]) -> None:
    """Raise `PlanError`, naming the layer, unless the cores have the shapes that the plan gives them."""
    expected = layer.core_shapes(shape)
    shapes = tuple(tuple(core.shape) for core in cores)
    if shapes != expected:
        raise PlanError(f"layer {layer.name}: the plan expects cores of shapes {list(expected)}, got {list(shapes)}")
    for k, core in enumerate(cores):
        if not np.isfinite(core).all():
            raise PlanError(f"layer {layer.name}: core {k} contains NaN or infinite values; expected finite ones")
