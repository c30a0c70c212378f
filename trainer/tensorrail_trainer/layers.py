"""Layers made of cores: the same forward as the dense layer whose weight the cores stand for.

A plan names a convolution or a linear layer by its module, and one layer of an LSTM or GRU by its input weight, such as
`rnn.weight_ih_l0`; the weights of both directions are one matrix, with one projection of the input.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from tensorrail_exporter.contraction import LayerSpec, Step, dense_step, describe
from tensorrail_exporter.costs import SECONDS_A_FLOP, contraction_cost, dense_cost
from tensorrail_exporter.errors import PlanError
from tensorrail_exporter.plan import LayerPlan, Plan
from tensorrail_trainer.recurrent import FactoredRecurrent, input_weights
from tensorrail_trainer.steps import Cores, run_steps

if TYPE_CHECKING:
    from tensorrail_trainer.moments import Root


class FactoredLayer(nn.Module):
    """A convolution or linear layer whose weight is a list of trainable cores.

    `forward` takes and gives what the dense layer does: (B, I, *S) → (B, O, *S'), the same without the batch, or
    (…, I) → (…, O). It runs the very steps that the exporter writes to ONNX. In training, where these would take longer than
    the dense layer, the weight is made of the cores in every step instead, in float32: the same function, with the same
    gradients within rounding.
    """

    bias: nn.Parameter | None

    def __init__(self, spec: LayerSpec, plan: LayerPlan, cores: Sequence[Tensor], bias: Tensor | None) -> None:
        super().__init__()
        self.spec = spec
        self.plan = plan.model_copy(update={"merge": plan.merge_for(spec)})
        self.cores = Cores([nn.Parameter(core.detach().clone()) for core in cores])
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))
        for name, value in _options(spec).items():  # a model's own code may ask for them, as it asks the dense layer
            setattr(self, name, value)

    def steps(self) -> tuple[Step, ...]:
        """Return the contraction of the present cores, differentiable with respect to them."""
        return self.plan.contraction(list(self.cores), self.spec)

    def dense_weight(self) -> Tensor:
        """Return the dense weight that the cores stand for, (O, I, *K) or (O, I)."""
        return cast(Tensor, self.plan.reconstruct(list(self.cores), self.spec.shape))

    @property
    def weight(self) -> Tensor:
        """The dense weight, for modules that read it past `forward`, as torch's attention does of its `out_proj`."""
        return self.dense_weight()

    def forward(self, x: Tensor) -> Tensor:
        """Contract `x` with the cores and add the bias."""
        linear = self.spec.op == "linear"
        leading = x.shape[:-1]
        if linear:
            x = x.reshape(-1, x.shape[-1])
        elif x.dim() == self.spec.spatial + 1:
            return cast(Tensor, self(x.unsqueeze(0))).squeeze(0)
        # As torch's layers do, give images with the channels last only for such; those of one channel are both.
        plain = not (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
        known = all(isinstance(size, int) for size in x.shape)  # not where torch.export leaves a size open
        if self.training and torch.is_grad_enabled() and known and _dense_pays(self.plan, self.spec, tuple(x.shape)):
            with torch.autocast(x.device.type, enabled=False):
                weight = self.dense_weight()
                steps: tuple[Step, ...] = (dense_step(weight.contiguous() if plain else weight, self.spec),)
        else:
            steps = self.steps()
        x = run_steps(steps, x)
        if linear:
            return (x if self.bias is None else x + self.bias.to(x.dtype)).reshape(*leading, self.spec.shape[0])
        x = x.contiguous() if plain else x
        return x if self.bias is None else x + self.bias.to(x.dtype).reshape(-1, *(1,) * self.spec.spatial)

    def extra_repr(self) -> str:
        """Return what is printed for the layer: its plan and the steps that run."""
        steps = describe(self.steps(), self.spec)
        return f"{self.plan.format}, modes={list(self.plan.modes)}, ranks={list(self.plan.ranks)}: {steps}"


def _options(spec: LayerSpec) -> dict[str, Any]:
    """Return what torch's layer of this kind has as attributes and takes as arguments, the bias apart."""
    if spec.op == "linear":
        return {"in_features": spec.shape[1], "out_features": spec.shape[0]}
    begins, ends = spec.pads[: spec.spatial], spec.pads[spec.spatial :]
    return {
        "in_channels": spec.shape[1],
        "out_channels": spec.shape[0],
        "kernel_size": tuple(spec.kernel),
        "stride": tuple(spec.stride),
        "padding": tuple(begins) if begins == ends else "same",  # only "same" leaves the two sides unequal
        "dilation": tuple(spec.dilation),
        "groups": 1,
        "padding_mode": "zeros",
    }


def _dense_pays(plan: LayerPlan, spec: LayerSpec, shape: tuple[int, ...]) -> bool:
    if "torch._dynamo" in sys.modules:  # else it would trace what is computed here; its import takes two seconds
        return bool(torch.compiler.disable(_expected_faster)(plan, spec, shape))
    return _expected_faster(plan, spec, shape)


# What torch.compiler.assume_constant_result sets, which imports the compiler.
_dense_pays._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=1024)
def _expected_faster(plan: LayerPlan, spec: LayerSpec, shape: tuple[int, ...]) -> bool:
    """Return whether a training step is expected to be faster with the dense weight than core by core.

    Between the small kernels of a contraction torch moves and reorders activations. Measured on ResNet-20's layers, in
    bf16 and fp32 on a CPU: contractions that should take 0.3 of the dense time took 0.4 to 0.6, those at 0.7 to 0.8 as
    long or twice as long, and those beyond 1 five to twenty-five times as long.
    """
    spec = replace(spec, size=shape[2:])
    cores = [np.broadcast_to(np.float32(0), size) for size in plan.core_shapes(spec.shape)]
    made = 2 * math.prod(spec.shape) * max(plan.ranks) * SECONDS_A_FLOP
    dense = dense_cost(spec).seconds_of(shape[0]) + made
    return contraction_cost(plan.contraction(cores, spec), spec).seconds_of(shape[0]) > 0.6 * dense


@dataclass(frozen=True)
class DenseLayer:
    """A dense layer of a model that a plan may name: its module, what it computes, and its weight's parameters."""

    module: nn.Module
    spec: LayerSpec
    parameters: tuple[nn.Parameter, ...]  # more than one for the directions of a recurrent layer

    def weight(self) -> Tensor:
        """Return the weight (O, I, *K) or (O, I), differentiable with respect to the parameters."""
        return self.parameters[0] if len(self.parameters) == 1 else torch.cat(self.parameters)

    @torch.no_grad()
    def put(self, weight: Tensor) -> None:
        """Write a weight (O, I, *K) or (O, I) into the parameters, in place."""
        for parameter, part in zip(self.parameters, weight.split([len(p) for p in self.parameters]), strict=True):
            parameter.copy_(part)


def dense_layers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of all layers of a kind that can be factored, in the model's order."""
    names: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
            names.append(name)
        elif isinstance(module, nn.LSTM | nn.GRU):
            names += [f"{name}.weight_ih_l{k}".removeprefix(".") for k in range(module.num_layers)]
    return tuple(names)


def dense_layer(model: nn.Module, name: str) -> DenseLayer:
    """Return the layer of that name; `PlanError` when it is not there, or says why it cannot be factored."""
    path, _, leaf = name.rpartition(".")
    modules = dict(model.named_modules())
    owner = modules.get(path)
    if leaf.startswith("weight_ih_l") and isinstance(owner, nn.LSTM | nn.GRU | FactoredRecurrent):
        if isinstance(owner, FactoredRecurrent):
            raise PlanError(f"layer {name}: is made of cores already; a plan applies to the dense network")
        if getattr(owner, "proj_size", 0):
            raise PlanError(f"layer {name}: an LSTM with proj_size={owner.proj_size} has no ONNX operator; use proj_size=0")
        _require_own_forward(owner, name)
        weights = input_weights(owner, name)
        shape = (sum(weight.shape[0] for weight in weights), weights[0].shape[1])
        return DenseLayer(owner, LayerSpec("recurrent", shape), weights)
    module = modules.get(name)
    _require_size(module, name)
    match module:
        case None:
            raise PlanError(f"layer {name}: not in the model; its layers are {', '.join(dense_layers(model))}")
        case nn.Linear():
            spec = LayerSpec("linear", tuple(module.weight.shape))
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            if module.groups != 1:
                raise PlanError(f"layer {name}: a grouped convolution (groups={module.groups}) stays dense; leave it out")
            if module.padding_mode != "zeros":
                raise PlanError(f"layer {name}: padding_mode={module.padding_mode!r} is not supported; expected 'zeros'")
            spec = LayerSpec("conv", tuple(module.weight.shape), module.stride, _pads(module), dilation=module.dilation)
        case FactoredLayer():
            raise PlanError(f"layer {name}: is made of cores already; a plan applies to the dense network")
        case nn.LSTM() | nn.GRU():
            known = ", ".join(f"{name}.weight_ih_l{k}" for k in range(module.num_layers))
            raise PlanError(f"layer {name}: is a {type(module).__name__}; name the input weight of one of its layers: {known}")
        case nn.ConvTranspose1d() | nn.ConvTranspose2d() | nn.ConvTranspose3d():
            raise PlanError(f"layer {name}: a transposed convolution stays dense; leave it out of the plan")
        case _:
            raise PlanError(
                f"layer {name}: is a {type(module).__name__}; expected a Conv1d, Conv2d, Conv3d, Linear, LSTM or GRU layer"
            )
    _require_own_forward(module, name)
    return DenseLayer(module, spec, (_own_weight(module, name),))


def _require_size(module: nn.Module | None, name: str) -> None:
    if module is not None and any(isinstance(p, nn.UninitializedParameter) for p in module.parameters(recurse=False)):
        raise PlanError(f"layer {name}: its size is not known yet; run a sample through the model first")


def _require_own_forward(module: nn.Module, name: str) -> None:
    """Raise `PlanError` for a class that computes something else than torch's layer: cores would compute the latter."""
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.LSTM, nn.GRU):
        if not isinstance(module, kind):
            continue
        for method in ("forward", "_conv_forward"):
            if getattr(type(module), method, None) is not getattr(kind, method, None):
                raise PlanError(
                    f"layer {name}: a {type(module).__name__} has a {method} of its own, and cores would compute what torch's "
                    f"{kind.__name__} does; leave it out of the plan, or make it a {kind.__name__}"
                )


def _own_weight(module: nn.Module, name: str) -> nn.Parameter:
    weight = module._parameters.get("weight")
    if not isinstance(weight, nn.Parameter):
        raise PlanError(
            f"layer {name}: its weight is computed from others (weight_norm, or another parametrization); make it a parameter "
            "first: torch.nn.utils.parametrize.remove_parametrizations"
        )
    return weight


def planned_layers(model: nn.Module, plan: Plan) -> dict[str, DenseLayer]:
    """Return the layers that the plan names, each checked; `PlanError` names a layer that is not there."""
    found = {}
    for layer in plan.layers:
        dense = dense_layer(model, layer.name)
        layer.check(dense.spec.shape)
        found[layer.name] = dense
    _require_own_weights(model, found)
    return found


def _require_own_weights(model: nn.Module, layers: Mapping[str, DenseLayer]) -> None:
    """Raise `PlanError` for a weight that the model has under another name as well: there it would stay dense."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for layer, dense in layers.items():
        for parameter in dense.parameters:
            if len(names[id(parameter)]) > 1:
                raise PlanError(
                    f"layer {layer}: its weight is shared, as {' and '.join(names[id(parameter)])}, and only one of them would "
                    "become cores; leave it out of the plan, or give each a weight of its own"
                )


def _pads(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int, ...]:
    """Return the begins and the ends; torch puts the odd one of `padding="same"` at the end."""
    if isinstance(module.padding, str):
        if module.padding == "valid":
            return (0,) * (2 * len(module.kernel_size))
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return (*(total // 2 for total in totals), *(total - total // 2 for total in totals))
    return (*module.padding, *module.padding)


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
    layer: nn.Module = kind(**_options(spec), bias=module.bias is not None).to(state["weight"])
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
