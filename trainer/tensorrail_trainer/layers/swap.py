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
from tensorrail_trainer.layers.attention import FactoredAttention, is_replaceable
from tensorrail_trainer.layers.dense import DenseModule, at_least_single, planned_layers, require_values
from tensorrail_trainer.layers.factored import FactoredLayer, inputs_first, torch_options
from tensorrail_trainer.layers.fused import allow_fused_kernels, forbid_fused_kernels
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
    layers = planned_layers(model, plan)
    cores = cores or {
        layer.name: _decomposed(layer, layers[layer.name], roots.get(layer.name) if roots else None) for layer in plan.layers
    }
    recurrent: dict[str, dict[str, tuple[LayerPlan, Sequence[Tensor]]]] = {}
    attention: dict[str, dict[str, FactoredLayer]] = {}
    for layer in plan.layers:
        dense = layers[layer.name]
        path, _, leaf = layer.name.rpartition(".")
        if dense.spec.op == "recurrent":
            recurrent.setdefault(path, {})[leaf] = (layer, cores[layer.name])
        elif isinstance(dense.module, nn.MultiheadAttention):
            attention.setdefault(path, {})[leaf] = _factored(layer, dense, cores[layer.name], None)
        else:
            if leaf == "out_proj" and is_replaceable(model.get_submodule(path)):  # it reads the weight, and would not call it
                attention.setdefault(path, {})
            factored = _factored(layer, dense, cores[layer.name], cast("Tensor | None", getattr(dense.module, "bias", None)))
            _move_hooks(dense.module, factored)
            model = _replace(model, layer.name, factored)
    for path, factored_by_weight in recurrent.items():
        rnn = cast("nn.LSTM | nn.GRU", model.get_submodule(path))
        model = _replace_kept(model, path, FactoredRecurrent(rnn, factored_by_weight))
    for path, factored_by_leaf in attention.items():
        attending = cast(nn.MultiheadAttention, model.get_submodule(path))
        model = _replace_kept(model, path, FactoredAttention(attending, factored_by_leaf))
    forbid_fused_kernels(model)
    return model


def _factored(layer: LayerPlan, dense: DenseModule, cores: Sequence[Tensor], bias: Tensor | None) -> FactoredLayer:
    """Return the layer made of cores for a dense one, in its mode, and frozen as it is."""
    factored = FactoredLayer(dense.spec, layer, cores, bias).to(dense.parameters[0])
    factored.cores.requires_grad_(dense.parameters[0].requires_grad)
    if factored.bias is not None and bias is not None:
        factored.bias.requires_grad_(bias.requires_grad)
    return factored.train(dense.module.training)


def _decomposed(layer: LayerPlan, dense: DenseModule, root: Root | None) -> Sequence[Tensor]:
    """Return the cores of a dense weight, decomposed in single precision or wider."""
    require_values(layer.name, dense)
    weight = dense.weight().detach().contiguous()
    groups = dense.spec.groups
    zero = [not part.any() for part in weight.chunk(groups)]
    if all(zero):
        return _cores_of_zero(layer, weight, groups)
    wide = at_least_single(weight)
    try:
        cores = root.decompose(layer, wide) if root else layer.decompose(wide, groups)
    except (PlanError, np.linalg.LinAlgError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined] # documented
        raise PlanError(f"layer {layer.name}: its weight cannot be decomposed ({error}); check where it comes from") from None
    if any(zero):  # their own cores would all be zero, and none of them would have a gradient
        chosen = torch.tensor(zero, device=wide.device)
        for core, trainable in zip(cores, _cores_of_zero(layer, wide, groups), strict=True):
            core[chosen] = trainable[chosen]
    return cores


def _cores_of_zero(layer: LayerPlan, weight: Tensor, groups: int) -> list[Tensor]:
    """Return cores of a weight of zeros: the first core is zero in every group, and the others are random."""
    generator = torch.Generator().manual_seed(0)
    first, *others = layer.core_shapes(tuple(weight.shape), groups)
    own = slice(1 if groups > 1 else 0, -1)  # the axes of one group that are summed over
    random = [torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[own])) for shape in others]
    return [weight.new_zeros(first), *(core.to(weight) for core in random)]


def _move_hooks(replaced: nn.Module, replacement: nn.Module) -> None:
    """Give a layer the hooks that the user registered on the layer that it replaces."""
    share_hooks(replaced, replacement)


def _replace_kept(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Replace a submodule as `_replace` does, and give the new one its hooks and its mode."""
    replaced = model.get_submodule(name)
    _move_hooks(replaced, module)
    module.training = replaced.training
    return _replace(model, name, module)


def cores_of(model: nn.Module) -> dict[str, list[Tensor]]:
    """Return the cores of every factored layer.

    Args:
        model: a model with layers made of cores, as `ADMM.factorize` returns it.

    Returns:
        Copies of the cores on the CPU, by layer name. A layer of an LSTM or GRU has the name of its weight, such as
        `rnn.weight_ih_l0` or `rnn.weight_hh_l0`, and the projections of query, key and value that of theirs,
        `attn.in_proj_weight`. Empty if the model has no factored layer.

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
    require_copyable(model)
    dense = copy.deepcopy(model)
    for made_of_cores in (FactoredAttention, FactoredRecurrent, FactoredLayer):  # attention holds layers
        for name, module in list(dense.named_modules()):
            if isinstance(module, made_of_cores):
                dense_module = _dense_layer(module) if isinstance(module, FactoredLayer) else module.to_dense()
                _move_hooks(module, dense_module)
                if isinstance(module, FactoredAttention):
                    _move_hooks(module.out_proj, dense_module.get_submodule("out_proj"))
                dense = _replace(dense, name, dense_module)
    allow_fused_kernels(dense)
    return dense


def require_copyable(model: nn.Module) -> None:
    """Raise `PlanError` for a layer with a tensor that torch cannot copy."""
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
    kind: Any = nn.Embedding if spec.gathers else nn.Linear
    if spec.op == "conv":
        kind = (_TRANSPOSED if spec.transposed else _CONVOLUTIONS)[spec.spatial]
    state = {"weight": weight.transpose(0, 1) if inputs_first(spec) else weight}
    options = torch_options(spec) | ({} if spec.gathers else {"bias": module.bias is not None})
    layer: nn.Module = kind(**options).to(state["weight"])
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
