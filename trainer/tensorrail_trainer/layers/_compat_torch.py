"""What torch keeps private and layers made of cores need. Tested with torch 2.13.0."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

_HOOKS = (
    *(f"_forward{pre}_hooks{more}" for pre in ("", "_pre") for more in ("", "_with_kwargs", "_always_called")),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)


def share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Give a module the hooks of another one: the same dictionaries, so that the handles of the hooks still remove them."""
    for name in _HOOKS:
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))


def is_traced(x: object) -> bool:
    """Return whether `torch.fx` traces a model, with proxies in place of tensors."""
    return isinstance(x, torch.fx.Proxy)


def records_operations() -> bool:
    """Return whether torch.compile, torch.export or torch.jit.trace records the operations that run."""
    jit: Any = torch.jit
    return torch.compiler.is_compiling() or bool(jit.is_tracing())


def node_of(module: nn.Module, *args: Any) -> Any:
    """Return the output of a module as one node of the graph that `torch.fx` traces, as those of torch's own layers."""
    tracer: Any = next(arg.tracer for arg in args if isinstance(arg, torch.fx.Proxy))
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, {})


def as_plain_tensors() -> AbstractContextManager[None]:
    """Return a context in which subclasses of tensors are plain tensors, as torch's notes on subclasses tell to use it."""
    context: AbstractContextManager[None] = torch._C.DisableTorchFunctionSubclass()
    return context


def keep_from_fused_kernels(attention: nn.Module) -> None:
    """Let torch's transformer layers call a module in the place of `nn.MultiheadAttention`, instead of reading its weights.

    They have a fused kernel for attention whose query, key and value have one packed weight, and ask for it by this attribute.
    """
    attention._qkv_same_embed_dim = False  # type: ignore[assignment] # a module takes any attribute
