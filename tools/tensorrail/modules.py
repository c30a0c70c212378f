"""Torch modules by name on the command line: `module:factory`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensorrail_runtime.measure.timing import Timing


def load_network(model: str, timing: Timing) -> tuple[Any, Timing]:  # Any: a path or an ONNX model
    """Return the file of a model, or the graph of a torch module that `module:factory` makes, and what to time it with.

    A module needs the shape of its input, without the batch axis, as `--shape image=3,224,224`; its graph has that shape.

    Raises:
        PlanError: the shape is missing, or the factory does not make a module.

    """
    if ":" not in model or Path(model).exists():
        return Path(model), timing
    from dataclasses import replace

    import torch

    from tensorrail_runtime.errors import OWN_CODE, PlanError, in_words
    from tensorrail_runtime.measure.accuracy import imported
    from tensorrail_trainer.run.export import to_onnx

    if len(timing.shapes) != 1:
        raise PlanError(
            f"{model}: a torch module needs the shape of its one input without the batch axis, such as "
            f"image=3,224,224, got {len(timing.shapes) or 'none'}"
        )
    (shape,) = timing.shapes.values()
    factory = imported(model, "model factory")
    try:
        module = factory()
    except OWN_CODE as error:
        raise PlanError(f"{model}: the model factory failed {in_words(error)}") from error
    if not isinstance(module, torch.nn.Module):
        raise PlanError(f"{model}: expected a factory of a torch.nn.Module, got a {type(module).__name__}")
    return to_onnx(module, torch.zeros(2, *shape)), replace(timing, shapes={})
