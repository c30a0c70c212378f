"""Layers made of cores: the same forward as the dense layer whose weight the cores stand for."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from tensorrail_exporter.contraction import Conv, LayerSpec, MatMul, Reshape, Step, describe, resolve
from tensorrail_exporter.errors import PlanError
from tensorrail_exporter.formats import format_of
from tensorrail_exporter.plan import LayerPlan, Plan

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class FactoredLayer(nn.Module):
    """A convolution or linear layer whose weight is a list of trainable cores.

    `forward` takes and gives what the dense layer does: (B, I, *S) → (B, O, *S') or (…, I) → (…, O). It runs the very
    steps that the exporter writes to ONNX.
    """

    bias: nn.Parameter | None

    def __init__(self, spec: LayerSpec, plan: LayerPlan, cores: Sequence[Tensor], bias: Tensor | None) -> None:
        super().__init__()
        self.spec, self.plan = spec, plan
        self.cores = nn.ParameterList([nn.Parameter(core.detach().clone()) for core in cores])
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))

    def steps(self) -> tuple[Step, ...]:
        """Return the contraction of the present cores, differentiable with respect to them."""
        return format_of(self.plan.format).contraction(list(self.cores), self.spec, self.plan.merge)

    def dense_weight(self) -> Tensor:
        """Return the dense weight that the cores stand for, (O, I, *K) or (O, I)."""
        weight = format_of(self.plan.format).reconstruct(list(self.cores), self.spec.shape)
        return cast(Tensor, weight)

    def forward(self, x: Tensor) -> Tensor:
        """Contract `x` with the cores and add the bias."""
        linear = self.spec.op == "linear"
        leading = x.shape[:-1]
        if linear:
            x = x.reshape(-1, x.shape[-1])
        for step in self.steps():
            x = _run(step, x)
        if linear:
            return (x if self.bias is None else x + self.bias).reshape(*leading, -1)
        return x if self.bias is None else x + self.bias.reshape(-1, *(1,) * self.spec.spatial)

    def extra_repr(self) -> str:
        """Return what is printed for the layer: its plan and the steps that run."""
        return f"{self.plan.format}, modes={list(self.plan.modes)}, ranks={list(self.plan.ranks)}: {describe(self.steps())}"


def _run(step: Step, x: Tensor) -> Tensor:
    match step:
        case Conv():
            nd = x.dim() - 2
            begins, ends = step.pads[:nd], step.pads[nd:]
            if begins != ends:
                x = F.pad(x, [amount for axis in reversed(range(nd)) for amount in (begins[axis], ends[axis])])
                begins = (0,) * nd
            return _CONVOLUTIONS[nd](x, step.weight, None, step.stride, begins, step.dilation, step.groups)
        case MatMul(weight=weight, side="right"):
            return cast(Tensor, x @ weight)
        case MatMul(weight=weight):
            return cast(Tensor, weight @ x)
        case Reshape(shape=shape):
            return x.reshape(resolve(shape, tuple(x.shape)))


def spec_of(name: str, module: nn.Module) -> LayerSpec:
    """Return what a dense torch layer computes; `PlanError` says why a layer of that name cannot be factored."""
    match module:
        case nn.Linear():
            return LayerSpec("linear", tuple(module.weight.shape))
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            if module.groups != 1:
                raise PlanError(f"layer {name}: a grouped convolution (groups={module.groups}) stays dense; leave it out")
            if module.padding_mode != "zeros":
                raise PlanError(f"layer {name}: padding_mode={module.padding_mode!r} is not supported; expected 'zeros'")
            return LayerSpec("conv", tuple(module.weight.shape), module.stride, _pads(module), dilation=module.dilation)
        case FactoredLayer():
            raise PlanError(f"layer {name}: is made of cores already; a plan applies to the dense network")
    raise PlanError(f"layer {name}: is a {type(module).__name__}; expected a Conv1d, Conv2d, Conv3d or Linear layer")


def _pads(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int, ...]:
    """Return the begins and the ends; torch puts the odd one of `padding="same"` at the end."""
    if isinstance(module.padding, str):
        if module.padding == "valid":
            return (0,) * (2 * len(module.kernel_size))
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return (*(total // 2 for total in totals), *(total - total // 2 for total in totals))
    return (*module.padding, *module.padding)


def planned_modules(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """Return the modules that the plan names, each checked; `PlanError` names a layer that is not there."""
    modules = dict(model.named_modules())
    found = {}
    for layer in plan.layers:
        if layer.name not in modules:
            known = [name for name, module in modules.items() if isinstance(module, nn.Conv2d | nn.Linear)]
            raise PlanError(f"layer {layer.name}: not in the model; its layers are {', '.join(known)}")
        layer.check(spec_of(layer.name, modules[layer.name]).shape)
        found[layer.name] = modules[layer.name]
    return found


def swap(model: nn.Module, plan: Plan, cores: Mapping[str, Sequence[Tensor]] | None = None) -> nn.Module:
    """Replace every planned dense layer by one made of cores, in place, and return the model.

    Without `cores` they are decomposed from the weights that the model has.
    """
    modules = planned_modules(model, plan)
    for layer in plan.layers:
        dense = modules[layer.name]
        weight, bias = cast(Tensor, dense.weight).detach(), cast("Tensor | None", dense.bias)
        made = cores[layer.name] if cores else format_of(layer.format).decompose(weight, layer.modes, layer.ranks)
        factored = FactoredLayer(spec_of(layer.name, dense), layer, made, bias)
        _replace(model, layer.name, factored.to(weight.device).train(dense.training))
    return model


def cores_of(model: nn.Module) -> dict[str, list[Tensor]]:
    """Return the cores of every factored layer, on the CPU, by the layer's name."""
    return {
        name: [core.detach().cpu() for core in module.cores]
        for name, module in model.named_modules()
        if isinstance(module, FactoredLayer)
    }


def to_dense(model: nn.Module) -> nn.Module:
    """Return a copy in which every factored layer is a dense one again, its weight reconstructed from the cores."""
    dense = copy.deepcopy(model)
    for name, module in list(dense.named_modules()):
        if isinstance(module, FactoredLayer):
            _replace(dense, name, _dense_layer(module))
    return dense


def _dense_layer(module: FactoredLayer) -> nn.Module:
    spec, bias = module.spec, module.bias is not None
    layer: nn.Module
    if spec.op == "linear":
        layer = nn.Linear(spec.shape[1], spec.shape[0], bias)
    else:
        nd = spec.spatial
        begins, ends = spec.pads[:nd], spec.pads[nd:]
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[nd]
        padding = begins if begins == ends else "same"  # only "same" leaves the two sides unequal
        layer = kind(spec.shape[1], spec.shape[0], spec.kernel, spec.stride, padding, spec.dilation, bias=bias)  # type: ignore[arg-type]
    state = {"weight": module.dense_weight().detach()}
    if module.bias is not None:
        state["bias"] = module.bias.detach()
    layer.load_state_dict(state)
    return layer.to(state["weight"].device).train(module.training)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
