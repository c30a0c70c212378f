"""The dense layers of a torch model that a plan can name: what each layer computes, and its weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tensorrail_exporter.formats.contraction import LayerSpec
from tensorrail_exporter.plans.plan import Plan
from tensorrail_runtime.errors import PlanError
from tensorrail_trainer.layers.factored import FactoredLayer
from tensorrail_trainer.layers.recurrent import FactoredRecurrent, input_weights


@dataclass(frozen=True)
class DenseModule:
    """A dense layer of a torch model that a plan can name: its module, what it computes, and the parameters of its weight."""

    module: nn.Module
    spec: LayerSpec
    parameters: tuple[nn.Parameter, ...]  # two for a bidirectional recurrent layer, one otherwise

    def weight(self) -> Tensor:
        """Return the weight (O, I, *K) or (O, I), differentiable with respect to the parameters."""
        return self.parameters[0] if len(self.parameters) == 1 else torch.cat(self.parameters)

    @torch.no_grad()
    def put(self, weight: Tensor) -> None:
        """Copy a weight (O, I, *K) or (O, I) into the parameters, in place."""
        for parameter, part in zip(self.parameters, weight.split([len(p) for p in self.parameters]), strict=True):
            parameter.copy_(part)


def dense_layers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of all convolutions, linear layers and recurrent input weights, in the order of the model."""
    names: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
            names.append(name)
        elif isinstance(module, nn.LSTM | nn.GRU):
            names += [f"{name}.weight_ih_l{k}".removeprefix(".") for k in range(module.num_layers)]
    return tuple(names)


def dense_layer(model: nn.Module, name: str) -> DenseModule:
    """Return the layer of that name. Raises `PlanError` if there is none, or with the reason why it cannot be factored."""
    path, _, leaf = name.rpartition(".")
    modules = dict(model.named_modules())
    owner = modules.get(path)
    if leaf.startswith("weight_ih_l") and isinstance(owner, nn.LSTM | nn.GRU | FactoredRecurrent):
        if isinstance(owner, FactoredRecurrent):
            raise PlanError(
                f"layer {name}: expected a dense layer, but it is already made of cores; apply the plan to the dense network"
            )
        if getattr(owner, "proj_size", 0):
            raise PlanError(f"layer {name}: an LSTM with proj_size={owner.proj_size} has no ONNX operator; use proj_size=0")
        _require_own_forward(owner, name)
        weights = input_weights(owner, name)
        shape = (sum(weight.shape[0] for weight in weights), weights[0].shape[1])
        return DenseModule(owner, LayerSpec("recurrent", shape), weights)
    module = modules.get(name)
    _require_size(module, name)
    match module:
        case None:
            raise PlanError(f"layer {name}: not in the model; its layers are {', '.join(dense_layers(model))}")
        case nn.Linear():
            spec = LayerSpec("linear", tuple(module.weight.shape))
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            if module.groups != 1:
                raise PlanError(
                    f"layer {name}: a grouped convolution (groups={module.groups}) cannot be factored; leave it out of the plan"
                )
            if module.padding_mode != "zeros":
                raise PlanError(
                    f"layer {name}: expected padding_mode='zeros', got {module.padding_mode!r}; leave it out of the plan"
                )
            spec = LayerSpec("conv", tuple(module.weight.shape), module.stride, _pads(module), dilation=module.dilation)
        case FactoredLayer():
            raise PlanError(
                f"layer {name}: expected a dense layer, but it is already made of cores; apply the plan to the dense network"
            )
        case nn.LSTM() | nn.GRU():
            known = ", ".join(f"{name}.weight_ih_l{k}" for k in range(module.num_layers))
            raise PlanError(
                f"layer {name}: is a {type(module).__name__}; name the input weight of one of its layers instead: {known}"
            )
        case nn.ConvTranspose1d() | nn.ConvTranspose2d() | nn.ConvTranspose3d():
            raise PlanError(f"layer {name}: a transposed convolution cannot be factored; leave it out of the plan")
        case _:
            raise PlanError(
                f"layer {name}: expected a Conv1d, Conv2d, Conv3d, Linear, LSTM or GRU layer, got a {type(module).__name__}; "
                "leave it out of the plan"
            )
    _require_own_forward(module, name)
    return DenseModule(module, spec, (_own_weight(module, name),))


def _require_size(module: nn.Module | None, name: str) -> None:
    if module is not None and any(isinstance(p, nn.UninitializedParameter) for p in module.parameters(recurse=False)):
        raise PlanError(f"layer {name}: its size is not known yet; run one sample through the model first")


def _require_own_forward(module: nn.Module, name: str) -> None:
    """Raise `PlanError` for a subclass with its own forward: the layer made of cores computes what torch's class computes."""
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.LSTM, nn.GRU):
        if not isinstance(module, kind):
            continue
        for method in ("forward", "_conv_forward"):
            if getattr(type(module), method, None) is not getattr(kind, method, None):
                raise PlanError(
                    f"layer {name}: {type(module).__name__} overrides {kind.__name__}.{method}, and cores would compute what "
                    f"torch's {kind.__name__} computes; leave it out of the plan, or replace it by a {kind.__name__}"
                )


def _own_weight(module: nn.Module, name: str) -> nn.Parameter:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if not isinstance(weight, nn.Parameter):
        raise PlanError(
            f"layer {name}: expected a weight that is a parameter, got one that weight_norm or another parametrization "
            "computes; call torch.nn.utils.parametrize.remove_parametrizations first"
        )
    return weight


def planned_layers(model: nn.Module, plan: Plan) -> dict[str, DenseModule]:
    """Return the layers that a plan names.

    Args:
        model: the dense model.
        plan: the plan; its shapes, modes and ranks are checked against the model.

    Returns:
        The layers by name, in the order of the plan.

    Raises:
        PlanError: a layer does not exist, cannot be factored, does not fit its plan, or shares its weight with another one.

    """
    layers_by_name = {}
    for layer in plan.layers:
        dense = dense_layer(model, layer.name)
        layer.check(dense.spec.shape)
        layers_by_name[layer.name] = dense
    _require_own_weights(model, layers_by_name)
    return layers_by_name


def _require_own_weights(model: nn.Module, layers: Mapping[str, DenseModule]) -> None:
    """Raise `PlanError` for a weight that the model also uses under another name, where it would stay dense."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for layer, dense in layers.items():
        for parameter in dense.parameters:
            if len(names[id(parameter)]) > 1:
                raise PlanError(
                    f"layer {layer}: its weight is shared by {' and '.join(names[id(parameter)])}, and only one of them would "
                    "be factored; leave it out of the plan, or give each layer its own weight"
                )


def _pads(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int, ...]:
    """Return the padding before and after each axis; with `padding="same"` torch adds the odd element at the end."""
    if isinstance(module.padding, str):
        if module.padding == "valid":
            return (0,) * (2 * len(module.kernel_size))
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return (*(total // 2 for total in totals), *(total - total // 2 for total in totals))
    return (*module.padding, *module.padding)
