"""Finds layers that a model holds a second time, past torch's modules: there a replaced layer would go on running."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from tensorrail_runtime.errors import PlanError

_DEEPEST, _MOST = 5, 10_000  # steps from a module, and objects looked at: a model may hold its whole program
_NO_HOLDERS = {"accelerate", "builtins", "lightning", "numpy", "pytorch_lightning", "tensorrail_trainer", "torch"}
_TORCHS_OWN = frozenset(vars(nn.Module()))  # parameters, buffers, submodules and hooks


def require_sole_holders(model: nn.Module, layers: Mapping[int, str]) -> None:
    """Raise `PlanError` for a layer that a module of the model also holds in a list, a dictionary, a function or an object.

    Only the submodule is replaced by a layer made of cores. What else holds the dense layer goes on to run it.

    Args:
        model: the model.
        layers: the names of the layers, by the `id` of their modules.

    """
    modules = dict(model.named_modules())
    registered = {id(module) for module in modules.values()}
    for path, module in modules.items():
        for attribute, value in vars(module).items():
            if attribute in _TORCHS_OWN or id(module) in layers:
                continue
            held = next((found for found in _reached(value, registered) if id(found) in layers), None)
            if held is not None:
                raise PlanError(
                    f"layer {layers[id(held)]}: {path or 'the model'} also holds it in its attribute {attribute!r}, a "
                    f"{type(value).__name__}, where the dense layer would go on running; use nn.ModuleList or nn.ModuleDict, "
                    "or leave the layer out of the plan"
                )


def _reached(value: Any, registered: set[int]) -> Iterator[nn.Module]:
    """Yield the modules of the model that a value leads to, without the modules below these."""
    seen: set[int] = set()
    waiting: deque[tuple[Any, int]] = deque([(value, 0)])
    while waiting and len(seen) < _MOST:
        each, depth = waiting.popleft()
        if id(each) in seen or isinstance(each, str | bytes | int | float | Tensor | type | None):
            continue
        seen.add(id(each))
        if id(each) in registered:
            yield each
        elif depth < _DEEPEST:
            waiting += [(part, depth + 1) for part in _parts(each)]


def _parts(value: Any) -> list[Any]:
    """Return what a container, a function or an object of a class of one's own holds."""
    match value:
        case dict():
            return [*value.values()]
        case list() | tuple() | set() | frozenset() | deque():
            return [*value]
        case functools.partial():
            return [value.func, *value.args, *value.keywords.values()]
        case MethodType():
            return [value.__self__]
        case FunctionType():
            cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
            return [*cells, *(value.__defaults__ or ())]
        case nn.Module():  # one that is not registered
            return [*value._modules.values()]
    known = type(value).__module__.partition(".")[0] in _NO_HOLDERS
    return [*vars(value).values()] if not known and hasattr(value, "__dict__") else []


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
