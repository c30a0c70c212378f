"""Reading, writing and checking `cores.safetensors`, which stores every core as `<layer>/<index>`."""

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
"""The cores of every layer, by the name of the layer."""

# A single key: safetensors writes several in random order, but equal cores must give equal files.
_METADATA = {"tensorrail-cores": "1"}


def save_cores(path: Path | str, cores: Cores) -> None:
    """Write the cores of all layers to one safetensors file.

    Args:
        path: the file to write; an existing file is replaced.
        cores: the cores of every layer, by the name of the layer.

    """
    tensors = {f"{name}/{k}": np.ascontiguousarray(core) for name, layer in cores.items() for k, core in enumerate(layer)}
    write_bytes(path, save(tensors, metadata=_METADATA))


def load_cores(path: Path | str, plan: Plan) -> dict[str, list[np.ndarray]]:
    """Read the cores of the planned layers from a safetensors file.

    Args:
        path: a file written by `save_cores`.
        plan: the plan that the cores were made for.

    Returns:
        The cores of every planned layer, by the name of the layer. Their shapes are not checked: see `check_cores`.

    Raises:
        PlanError: the file cannot be read, was not written by `save_cores`, lacks a core, or has one of another layer.

    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise PlanError(f"{path}: not a readable safetensors file ({error})") from None
    except (AttributeError, TypeError) as error:  # of safetensors, for types that NumPy lacks, such as float8
        raise PlanError(f"{path}: expected cores of floats, got a type that NumPy does not have ({error})") from None
    for key, tensor in tensors.items():
        if tensor.dtype.kind in "biuc":
            raise PlanError(f"{path}: expected cores of floats, got {key!r} of {tensor.dtype}")
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


def check_cores(layer: LayerPlan, cores: Sequence[np.ndarray], shape: tuple[int, ...], groups: int = 1) -> None:
    """Raise `PlanError` unless the cores are finite and have the shapes that the plan requires.

    Args:
        layer: the plan of the layer.
        cores: the cores of the layer.
        shape: shape of the dense weight, (O, I, *K) or (O, I).
        groups: number of groups of a convolution; default 1.

    """
    expected = layer.core_shapes(shape, groups)
    shapes = tuple(tuple(core.shape) for core in cores)
    if shapes != expected:
        raise PlanError(f"layer {layer.name}: the plan expects cores of shapes {list(expected)}, got {list(shapes)}")
    for k, core in enumerate(cores):
        if not np.isfinite(core).all():
            raise PlanError(f"layer {layer.name}: core {k} contains NaN or infinite values; expected finite ones")
