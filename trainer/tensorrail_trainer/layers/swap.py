"""Replace the dense layers of a model by layers made of cores, and back."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tensorrail_exporter.plans.plan import LayerPlan, Plan
from tensorrail_runtime.errors import PlanError
from tensorrail_trainer.layers._compat_torch import share_hooks
from tensorrail_trainer.layers.dense import DenseModule, at_least_single, planned_layers, require_values
from tensorrail_trainer.layers.factored import FactoredLayer, torch_options
from tensorrail_trainer.layers.metric import Root
from tensorrail_trainer.layers.recurrent import FactoredRecurrent
from tensorrail_trainer.layers.steps import CoreList


def swap(
    model: nn.Module,
    plan: Plan,
    cores: Mapping[str, Sequence[Tensor]] | None = None,
    roots: Mapping[str, Root] | None = None,
) -> nn.Module:
    """Replace every planned dense layer by a layer made of cores, in place.

    The cores of a weight of zeros are random, except for one core of zeros: they represent the same weight and can be trained.

    Args:
        model: the dense model; hooks and `requires_grad` of its layers are kept.
        plan: the layers to replace.
        cores: the cores by layer name; default: decomposed from the weights of the model.
        roots: the metric to decompose in, by layer name; default: the plain Frobenius norm. Ignored if `cores` is given.

    Returns:
        The model itself, or the new layer if the plan names the model itself.

    Raises:
        PlanError: the plan does not fit the model, or a weight cannot be decomposed.

    """
    recurrent: dict[str, dict[str, tuple[LayerPlan, Sequence[Tensor]]]] = {}
    for layer, dense in zip(plan.layers, planned_layers(model, plan).values(), strict=True):
        weight = dense.weight().detach().contiguous()
        layer_cores = cores[layer.name] if cores else _decomposed(layer, dense, roots.get(layer.name) if roots else None)
        if dense.spec.op == "recurrent":
            path, _, leaf = layer.name.rpartition(".")
            recurrent.setdefault(path, {})[leaf] = (layer, layer_cores)
            continue
        bias = cast("Tensor | None", dense.module.bias)
        factored = FactoredLayer(dense.spec, layer, layer_cores, bias).to(weight)
        factored.cores.requires_grad_(dense.parameters[0].requires_grad)
        if factored.bias is not None and bias is not None:
            factored.bias.requires_grad_(bias.requires_grad)
        _move_hooks(dense.module, factored)
        model = _replace(model, layer.name, factored.train(dense.module.training))
    for path, layers in recurrent.items():
        module = cast("nn.LSTM | nn.GRU", model.get_submodule(path))
        factored_recurrent = FactoredRecurrent(module, layers)
        _move_hooks(module, factored_recurrent)
        model = _replace(model, path, factored_recurrent.train(module.training))
    return model


def _decomposed(layer: LayerPlan, dense: DenseModule, root: Root | None) -> Sequence[Tensor]:
    """Return the cores of a dense weight, decomposed in single precision or wider."""
    require_values(layer.name, dense)
    weight = dense.weight().detach().contiguous()
    if not weight.any():
        return _cores_of_zero(layer, weight)
    wide = at_least_single(weight)
    try:
        return root.decompose(layer, wide) if root else layer.decompose(wide)
    except (np.linalg.LinAlgError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined] # documented by torch
        raise PlanError(f"layer {layer.name}: its weight cannot be decomposed ({error}); check where it comes from") from None


def _cores_of_zero(layer: LayerPlan, weight: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, *others = layer.core_shapes(tuple(weight.shape))
    random = [torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[:-1])) for shape in others]
    return [weight.new_zeros(first), *(core.to(weight) for core in random)]


def _move_hooks(replaced: nn.Module, replacement: nn.Module) -> None:
    """Give a layer the hooks that the user registered on the layer that it replaces."""
    share_hooks(replaced, replacement)


def cores_of(model: nn.Module) -> dict[str, list[Tensor]]:
    """Return the cores of every factored layer.

    Args:
        model: a model with layers made of cores, as `ADMM.factorize` returns it.

    Returns:
        Copies of the cores on the CPU, by layer name. A layer of an LSTM or GRU has the name of its weight, such as
        `rnn.weight_ih_l0` or `rnn.weight_hh_l0`. Empty if the model has no factored layer.

    """
    cores_by_layer: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, FactoredLayer):
            cores_by_layer[name] = [core.detach().to("cpu", copy=True) for core in module.cores]
        elif isinstance(module, FactoredRecurrent):
            for leaf, cores in cast("dict[str, CoreList]", module.cores).items():
                layer = f"{name}.{leaf}".removeprefix(".")
                cores_by_layer[layer] = [core.detach().to("cpu", copy=True) for core in cores]
    return cores_by_layer


def to_dense(model: nn.Module) -> nn.Module:
    """Return a copy of a model in which every factored layer is dense again.

    Args:
        model: a model with layers made of cores; it is not changed.

    Returns:
        The copy; its dense weights are reconstructed from the cores, so that it computes the same function up to rounding.

    Raises:
        PlanError: a layer holds a tensor that torch cannot copy, such as a weight that the old `weight_norm` computes.

    """
    _require_copyable(model)
    dense = copy.deepcopy(model)
    for name, module in list(dense.named_modules()):
        if isinstance(module, FactoredLayer):
            dense_module = _dense_layer(module)
        elif isinstance(module, FactoredRecurrent):
            dense_module = module.to_dense()
        else:
            continue
        _move_hooks(module, dense_module)
        dense = _replace(dense, name, dense_module)
    return dense


def _require_copyable(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                raise PlanError(
                    f"layer {name}: its {attribute} is computed from other parameters, and torch cannot copy it; use "
                    "torch.nn.utils.parametrizations, or remove the computation first, by remove_weight_norm, "
                    "remove_spectral_norm or prune.remove"
                )


_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def _dense_layer(module: FactoredLayer) -> nn.Module:
    spec = module.spec
    weight = module.dense_weight().detach()
    kind: Any = nn.Linear
    if spec.op == "conv":
        kind = (_TRANSPOSED if spec.transposed else _CONVOLUTIONS)[spec.spatial]
    state = {"weight": weight.transpose(0, 1) if spec.transposed else weight}
    layer: nn.Module = kind(**torch_options(spec), bias=module.bias is not None).to(state["weight"])
    if module.bias is not None:
        state["bias"] = module.bias.detach()
    layer.load_state_dict(state)
    for name, parameter in layer.named_parameters():
        own = module.bias if name == "bias" else module.cores[0]
        parameter.requires_grad_(cast(Tensor, own).requires_grad)
    return layer.train(module.training)


def _replace(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Replace the submodule of that name and return the model, or the module itself if the name is empty."""
    if not name:
        return module
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
    return model
