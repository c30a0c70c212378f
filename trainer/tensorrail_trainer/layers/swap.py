"""Dense layers are swapped for layers made of cores, and back."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from tensorrail_exporter.plans.plan import LayerPlan, Plan
from tensorrail_trainer.layers.dense import planned_layers
from tensorrail_trainer.layers.factored import FactoredLayer, torch_options
from tensorrail_trainer.layers.metric import Root
from tensorrail_trainer.layers.recurrent import FactoredRecurrent
from tensorrail_trainer.layers.steps import Cores


def swap(
    model: nn.Module,
    plan: Plan,
    cores: Mapping[str, Sequence[Tensor]] | None = None,
    roots: Mapping[str, Root] | None = None,
) -> nn.Module:
    """Replace every planned dense layer by one made of cores, in place, and return the model.

    Without `cores` they are decomposed from the weights that the model has, in the metric of the layer's inputs where
    `roots` holds one. Of a weight of zeros one core is zero and the others random: it is the same weight, and it trains.
    """
    recurrent: dict[str, dict[int, tuple[LayerPlan, Sequence[Tensor]]]] = {}
    for layer, dense in zip(plan.layers, planned_layers(model, plan).values(), strict=True):
        weight = dense.weight().detach().contiguous()
        root = roots.get(layer.name) if roots else None
        if cores:
            made: Sequence[Tensor] = cores[layer.name]
        elif not weight.any():
            made = _cores_of_zero(layer, weight)
        else:
            made = root.decompose(layer, weight) if root else layer.decompose(weight)
        if dense.spec.op == "recurrent":
            path, _, leaf = layer.name.rpartition(".")
            recurrent.setdefault(path, {})[int(leaf.removeprefix("weight_ih_l"))] = (layer, made)
            continue
        bias = cast("Tensor | None", dense.module.bias)
        factored = FactoredLayer(dense.spec, layer, made, bias).to(weight)
        factored.cores.requires_grad_(dense.parameters[0].requires_grad)
        if factored.bias is not None and bias is not None:
            factored.bias.requires_grad_(bias.requires_grad)
        _take_hooks(dense.module, factored)
        model = _replace(model, layer.name, factored.train(dense.module.training))
    for path, layers in recurrent.items():
        module = cast("nn.LSTM | nn.GRU", model.get_submodule(path))
        made_of_cores = FactoredRecurrent(module, layers)
        _take_hooks(module, made_of_cores)
        model = _replace(model, path, made_of_cores.train(module.training))
    return model


def _cores_of_zero(layer: LayerPlan, weight: Tensor) -> list[Tensor]:
    chance = torch.Generator().manual_seed(0)
    first, *others = layer.core_shapes(tuple(weight.shape))
    drawn = [torch.randn(shape, generator=chance) / math.sqrt(math.prod(shape[:-1])) for shape in others]
    return [weight.new_zeros(first), *(core.to(weight) for core in drawn)]


def _take_hooks(before: nn.Module, after: nn.Module) -> None:
    """Let the hooks that a user put on a layer go on with the one in its place; the very dicts, so that they can be removed.

    Hooks that compute a parameter of the layer before, such as those of pruning, are left out: it was computed.
    """
    if not isinstance(after, FactoredRecurrent):
        for key, hook in list(before._forward_pre_hooks.items()):
            if isinstance(hook, _COMPUTING):
                del before._forward_pre_hooks[key]
    for kind in _HOOKS:
        if hasattr(before, kind):
            setattr(after, kind, getattr(before, kind))


_HOOKS = (
    *(f"_forward{pre}_hooks{more}" for pre in ("", "_pre") for more in ("", "_with_kwargs", "_always_called")),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)
_COMPUTING = (BasePruningMethod, WeightNorm, SpectralNorm)


def cores_of(model: nn.Module) -> dict[str, list[Tensor]]:
    """Return copies of the cores of every factored layer, on the CPU, by the layer's name."""
    found: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, FactoredLayer):
            found[name] = [core.detach().to("cpu", copy=True) for core in module.cores]
        elif isinstance(module, FactoredRecurrent):
            for leaf, cores in cast("dict[str, Cores]", module.cores).items():
                found[f"{name}.{leaf}".removeprefix(".")] = [core.detach().to("cpu", copy=True) for core in cores]
    return found


def to_dense(model: nn.Module) -> nn.Module:
    """Return a copy in which every factored layer is a dense one again, its weight reconstructed from the cores."""
    dense = copy.deepcopy(model)
    for name, module in list(dense.named_modules()):
        if isinstance(module, FactoredLayer):
            made = _dense_layer(module)
        elif isinstance(module, FactoredRecurrent):
            made = module.to_dense()
        else:
            continue
        _take_hooks(module, made)
        dense = _replace(dense, name, made)
    return dense


def _dense_layer(module: FactoredLayer) -> nn.Module:
    spec = module.spec
    kind: Any = nn.Linear if spec.op == "linear" else {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[spec.spatial]
    state = {"weight": module.dense_weight().detach()}
    layer: nn.Module = kind(**torch_options(spec), bias=module.bias is not None).to(state["weight"])
    if module.bias is not None:
        state["bias"] = module.bias.detach()
    layer.load_state_dict(state)
    for name, parameter in layer.named_parameters():
        own = module.bias if name == "bias" else module.cores[0]
        parameter.requires_grad_(cast(Tensor, own).requires_grad)
    return layer.train(module.training)


def _replace(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put a module in the place of that name and return the model: the module itself when the name is the model's own."""
    if not name:
        return module
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
    return model
