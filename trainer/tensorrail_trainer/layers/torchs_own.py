"""Checks that a dense layer is torch's own: its forward is, and its weights are parameters that nothing else computes."""

from __future__ import annotations

from typing import get_args

from torch import Tensor, nn

from tensorrail_runtime.errors import PlanError
from tensorrail_trainer.layers.attention import projections_of

CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_KINDS = CONVOLUTIONS | nn.Linear | nn.Embedding | nn.LSTM | nn.GRU | nn.MultiheadAttention


def require_size(module: nn.Module | None, name: str) -> None:
    """Raise `PlanError` for a lazy layer that has not seen its first input."""
    if module is not None and any(isinstance(p, nn.UninitializedParameter) for p in module.parameters(recurse=False)):
        raise PlanError(f"layer {name}: its size is not known yet; run one sample through the model first")


def require_own_forward(module: nn.Module, name: str) -> None:
    """Raise `PlanError` for a subclass with its own forward: the layer made of cores computes what torch's class computes."""
    for kind in get_args(_KINDS):
        if not isinstance(module, kind):
            continue
        for method in ("forward", "_conv_forward"):
            if getattr(type(module), method, None) is not getattr(kind, method, None):
                raise PlanError(
                    f"layer {name}: {type(module).__name__} overrides {kind.__name__}.{method}, and cores would compute what "
                    f"torch's {kind.__name__} computes; leave it out of the plan, or replace it by a {kind.__name__}"
                )


def require_own_parameters(module: nn.Module | None, name: str, leaf: str = "weight") -> None:
    """Raise `PlanError` unless each weight and bias of a layer is its parameter: what computes it would be lost with the layer.

    Parametrizations, `weight_norm`, `spectral_norm` and pruning compute a parameter from others. `leaf` is the planned weight.
    """
    if not isinstance(module, _KINDS) or (leaf == "weight" and isinstance(module, nn.LSTM | nn.GRU | nn.MultiheadAttention)):
        return  # the latter are refused: a plan names one of their weights
    own = dict(module.named_parameters(recurse=False))
    names = _parameter_names(module)
    for each in sorted(names, key=lambda each: each != leaf):  # the planned weight first
        if each not in own:
            kind = "bias" if "bias" in each else "weight"
            raise PlanError(
                f"layer {name}: expected a {kind} that is a parameter, got {each}, which weight_norm, "
                "pruning or another parametrization computes; make it one first, by remove_weight_norm, remove_spectral_norm, "
                "prune.remove or torch.nn.utils.parametrize.remove_parametrizations"
            )
    for each, parameter in own.items():
        if type(parameter.data) is not Tensor:
            raise PlanError(
                f"layer {name}: expected a plain tensor as its {each}, got a {type(parameter.data).__name__}, as FSDP2, tensor "
                "parallelism and quantization make them; use whole weights in floating point, with DistributedDataParallel"
            )
    if leaf in own and own[leaf].dim() < 2:
        raise PlanError(
            f"layer {name}: expected a weight of two or more axes, got shape {tuple(own[leaf].shape)}, as FSDP divides it; use "
            "whole weights, with DistributedDataParallel"
        )


def _parameter_names(module: nn.Module) -> list[str]:
    """Return the names of the parameters that a layer of torch's own has."""
    if isinstance(module, nn.LSTM | nn.GRU):
        kinds = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if module.bias else ()))
        ends = ("", "_reverse") if module.bidirectional else ("",)
        return [f"{kind}_l{k}{end}" for k in range(module.num_layers) for kind in kinds for end in ends]
    if isinstance(module, nn.MultiheadAttention):
        return [*projections_of(module), *(["in_proj_bias"] if module.in_proj_bias is not None else [])]
    if isinstance(module, nn.Embedding):
        return ["weight"]
    return ["weight", *(["bias"] if getattr(module, "bias", module) is not None else [])]
