"""What torch keeps private and layers made of cores need. Tested with torch 2.13.0."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

_Function = TypeVar("_Function", bound=Callable[..., Any])

_HOOKS = (
    *(f"_forward{pre}_hooks{more}" for pre in ("", "_pre") for more in ("", "_with_kwargs", "_always_called")),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)


def share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Give a module the hooks of another one: the same dictionaries, so that the handles of the hooks still remove them."""
    for name in _HOOKS:
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))


def remove_pre_hooks(module: nn.Module, kinds: tuple[type, ...]) -> None:
    """Remove the forward pre-hooks of these classes from a module."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, kinds):
            del module._forward_pre_hooks[key]


def constant_for_compiler(function: _Function) -> _Function:
    """Have torch.compile treat what a function returns as a constant.

    It sets what `torch.compiler.assume_constant_result` sets, which would import the compiler: two seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined] # a mark that functions may carry
    return function


def compiler_is_loaded() -> bool:
    """Return whether torch.compile was used in this process."""
    return "torch._dynamo" in sys.modules
