"""Torch's fused kernels of whole transformer layers, which take dense weights, are not used around layers made of cores.

In evaluation, `nn.TransformerEncoderLayer` reads the weights of its layers without calling them, and `nn.TransformerEncoder`
turns padded inputs into nested tensors for such layers. Each has an attribute of its own that allows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tensorrail_trainer.layers.attention import FactoredAttention
from tensorrail_trainer.layers.factored import FactoredLayer

_SWITCHES: dict[type[nn.Module], tuple[str, Any]] = {  # Any: an int and a bool
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}


def forbid_fused_kernels(model: nn.Module) -> None:
    """Let the transformer layers of a model that hold layers made of cores call them, also in evaluation."""
    for module in model.modules():
        for kind, (attribute, off) in _SWITCHES.items():
            if isinstance(module, kind) and getattr(module, attribute, off) != off and _holds_cores(module):
                setattr(module, _kept(attribute), getattr(module, attribute))
                setattr(module, attribute, off)


def allow_fused_kernels(model: nn.Module) -> None:
    """Undo `forbid_fused_kernels` for a model whose layers are dense again."""
    for module in model.modules():
        for kind, (attribute, _) in _SWITCHES.items():
            if isinstance(module, kind) and hasattr(module, _kept(attribute)):
                setattr(module, attribute, getattr(module, _kept(attribute)))
                delattr(module, _kept(attribute))


@contextmanager
def attention_in_parts() -> Iterator[None]:
    """Disable torch's fused kernels of attention for inference: they call no layer, and have no ONNX counterpart."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _holds_cores(module: nn.Module) -> bool:
    return any(isinstance(part, FactoredLayer | FactoredAttention) for part in module.modules())


def _kept(attribute: str) -> str:
    return f"dense_{attribute}"
