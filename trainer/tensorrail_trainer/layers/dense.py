"""The dense layers of a torch model that a plan can name: what each layer computes, and its weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast, get_args

import torch
from torch import Tensor, nn

from tensorrail_exporter.formats import FORMATS, WIDTH
from tensorrail_exporter.formats.contraction import LayerSpec
from tensorrail_exporter.plans.plan import Plan
from tensorrail_runtime.errors import PlanError
from tensorrail_trainer.layers.factored import FactoredLayer
from tensorrail_trainer.layers.holders import require_sole_holders
from tensorrail_trainer.layers.recurrent import FactoredRecurrent, input_weights

_CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


@dataclass(frozen=True)
class DenseModule:
    """A dense layer of a torch model that a plan can name: its module, what it computes, and the parameters of its weight."""

    module: nn.Module
    spec: LayerSpec
    parameters: tuple[nn.Parameter, ...]  # two for a bidirectional recurrent layer, one otherwise

    def weight(self) -> Tensor:
        """Return the weight (O, I, *K) or (O, I), differentiable with respect to the parameters."""
        if self.spec.transposed:
            return self.parameters[0].transpose(0, 1)
        return self.parameters[0] if len(self.parameters) == 1 else torch.cat(self.parameters)

    @torch.no_grad()
    def put(self, weight: Tensor) -> None:
        """Copy a weight (O, I, *K) or (O, I) into the parameters, in place."""
        if self.spec.transposed:
            self.parameters[0].copy_(weight.transpose(0, 1))
            return
        for parameter, part in zip(self.parameters, weight.split([len(p) for p in self.parameters]), strict=True):
            parameter.copy_(part)


def at_least_single(tensor: Tensor) -> Tensor:
    """Return a tensor of half precision in single precision, and any other as it is.

    In half precision decompositions do not run, and small steps toward low rank are lost in rounding.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def dense_layers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of all convolutions, linear layers and recurrent input weights, in the order of the model."""
    names: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, _CONVOLUTIONS | nn.Linear):
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
        _require_own_parameters(owner, name, leaf)
        weights = input_weights(owner, name)
        shape = (sum(weight.shape[0] for weight in weights), weights[0].shape[1])
        return DenseModule(owner, LayerSpec("recurrent", shape), weights)
    module = modules.get(name)
    _require_size(module, name)
    _require_own_parameters(module, name)
    match module:
        case None:
            raise PlanError(f"layer {name}: not in the model; its layers are {', '.join(dense_layers(model))}")
        case nn.Linear():
            spec = LayerSpec("linear", tuple(module.weight.shape))
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d() | nn.ConvTranspose1d() | nn.ConvTranspose2d() | nn.ConvTranspose3d():
            if module.groups != 1:
                raise PlanError(
                    f"layer {name}: a grouped convolution (groups={module.groups}) cannot be factored; leave it out of the plan"
                )
            if module.padding_mode != "zeros":
                raise PlanError(
                    f"layer {name}: expected padding_mode='zeros', got {module.padding_mode!r}; leave it out of the plan"
                )
            spec = _convolution(module)
        case FactoredLayer():
            raise PlanError(
                f"layer {name}: expected a dense layer, but it is already made of cores; apply the plan to the dense network"
            )
        case nn.LSTM() | nn.GRU():
            known = ", ".join(f"{name}.weight_ih_l{k}" for k in range(module.num_layers))
            raise PlanError(
                f"layer {name}: is a {type(module).__name__}; name the input weight of one of its layers instead: {known}"
            )
        case _:
            raise PlanError(
                f"layer {name}: expected a Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d, Linear, "
                f"LSTM or GRU layer, got a {type(module).__name__}; leave it out of the plan"
            )
    _require_own_forward(module, name)
    return DenseModule(module, spec, (cast("nn.Parameter", module.weight),))


def _require_size(module: nn.Module | None, name: str) -> None:
    if module is not None and any(isinstance(p, nn.UninitializedParameter) for p in module.parameters(recurse=False)):
        raise PlanError(f"layer {name}: its size is not known yet; run one sample through the model first")


def _require_own_forward(module: nn.Module, name: str) -> None:
    """Raise `PlanError` for a subclass with its own forward: the layer made of cores computes what torch's class computes."""
    for kind in (*get_args(_CONVOLUTIONS), nn.Linear, nn.LSTM, nn.GRU):
        if not isinstance(module, kind):
            continue
        for method in ("forward", "_conv_forward"):
            if getattr(type(module), method, None) is not getattr(kind, method, None):
                raise PlanError(
                    f"layer {name}: {type(module).__name__} overrides {kind.__name__}.{method}, and cores would compute what "
                    f"torch's {kind.__name__} computes; leave it out of the plan, or replace it by a {kind.__name__}"
                )


def _require_own_parameters(module: nn.Module | None, name: str, leaf: str = "weight") -> None:
    """Raise `PlanError` unless each weight and bias of a layer is its parameter: what computes it would be lost with the layer.

    Parametrizations, `weight_norm`, `spectral_norm` and pruning compute a parameter from others. `leaf` is the planned weight.
    """
    if not isinstance(module, _CONVOLUTIONS | nn.Linear | nn.LSTM | nn.GRU):
        return
    own = dict(module.named_parameters(recurse=False))
    names = ["weight", *(["bias"] if getattr(module, "bias", module) is not None else [])]
    if isinstance(module, nn.LSTM | nn.GRU):
        if leaf == "weight":
            return  # it is refused: a plan names one of its weights
        kinds = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if module.bias else ()))
        ends = ("", "_reverse") if module.bidirectional else ("",)
        names = [f"{kind}_l{k}{end}" for k in range(module.num_layers) for kind in kinds for end in ends]
    for each in sorted(names, key=lambda each: each != leaf):  # the planned weight first
        if each not in own:
            raise PlanError(
                f"layer {name}: expected a {each.partition('_')[0]} that is a parameter, got {each}, which weight_norm, "
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


def require_values(name: str, dense: DenseModule) -> None:
    """Raise `PlanError` for a layer without values, or whose weight is not finite: it cannot be decomposed."""
    for parameter in dense.module.parameters(recurse=False):
        if parameter.is_meta:
            raise PlanError(
                f"layer {name}: its weights are on the meta device, which holds no values; load or initialize the weights first"
            )
    if not dense.weight().isfinite().all():
        raise PlanError(f"layer {name}: its weight holds infinity or NaN, and cannot be decomposed; check where it comes from")


def planned_layers(model: nn.Module, plan: Plan) -> dict[str, DenseModule]:
    """Return the layers that a plan names.

    Args:
        model: the dense model.
        plan: the plan; its shapes, modes and ranks are checked against the model.

    Returns:
        The layers by name, in the order of the plan.

    Raises:
        PlanError: a layer does not exist, cannot be factored, does not fit its plan, shares a parameter with another one, or is
            also held outside of torch's modules, such as in a list.

    """
    if plan.joint:
        raise PlanError(
            f"the plan joins {', '.join(plan.joint[0])}, which a PyTorch module keeps apart; plan without joint layers, or use "
            "the plan for the ONNX model"
        )
    if plan.heads:
        raise PlanError(
            f"the plan narrows the heads between {' and '.join(plan.heads[0].weights)}, which a PyTorch module keeps as they "
            "are; plan without smaller heads, or use the plan for the ONNX model"
        )
    layers_by_name = {}
    for layer in plan.layers:
        dense = dense_layer(model, layer.name)
        layer.check(dense.spec.shape)
        require_trainable(layer.format)
        layers_by_name[layer.name] = dense
    _require_own_weights(model, layers_by_name)
    require_sole_holders(model, {id(dense.module): name for name, dense in layers_by_name.items()})
    return layers_by_name


def require_trainable(form: str) -> None:
    """Raise `PlanError` for a format whose cores cannot be trained."""
    if form == WIDTH:
        raise PlanError(
            f"format {WIDTH} is for ONNX graphs: compress chooses and fits it without training; expected one of "
            f"{', '.join(FORMATS)}"
        )


def _require_own_weights(model: nn.Module, layers: Mapping[str, DenseModule]) -> None:
    """Raise `PlanError` for a weight or bias that the model also uses under another name, where it would stay as it is."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for layer, dense in layers.items():
        others = [p for p in dense.module.parameters(recurse=False) if all(p is not own for own in dense.parameters)]
        for parameter in (*dense.parameters, *others):
            if len(names[id(parameter)]) > 1:
                what = "weight" if any(parameter is own for own in dense.parameters) else "parameter"
                raise PlanError(
                    f"layer {layer}: its {what} is shared by {' and '.join(names[id(parameter)])}, and only one of them would "
                    "be factored; leave it out of the plan, or give each layer its own weight and bias"
                )


def _convolution(module: _CONVOLUTIONS) -> LayerSpec:
    """Return what a convolution computes, transposed or not."""
    shape = tuple(module.weight.shape)
    if not isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return LayerSpec("conv", shape, module.stride, _pads(module), dilation=module.dilation)
    return LayerSpec(
        "conv",
        (shape[1], shape[0], *shape[2:]),  # torch stores (I, O, *K)
        module.stride,
        _pads(module),
        dilation=module.dilation,
        transposed=True,
        output_padding=tuple(module.output_padding),
    )


def _pads(module: _CONVOLUTIONS) -> tuple[int, ...]:
    """Return the padding before and after each axis; with `padding="same"` torch adds the odd element at the end."""
    if isinstance(module.padding, str):
        if module.padding == "valid":
            return (0,) * (2 * len(module.kernel_size))
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return (*(total // 2 for total in totals), *(total - total // 2 for total in totals))
    return (*module.padding, *module.padding)
