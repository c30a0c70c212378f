"""The dense layers of a torch model that a plan can name: what each layer computes, and its weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from tensorrail_exporter.formats import FORMATS, WIDTH
from tensorrail_exporter.formats.contraction import LayerSpec
from tensorrail_exporter.plans.plan import Plan
from tensorrail_runtime.errors import PlanError
from tensorrail_trainer.layers.attention import PROJECTIONS, FactoredAttention, is_replaceable, projections_of, why_not
from tensorrail_trainer.layers.factored import FactoredLayer, inputs_first
from tensorrail_trainer.layers.holders import require_sole_holders
from tensorrail_trainer.layers.recurrent import INPUTS, LOOPS, FactoredRecurrent, spec_of, weights_of
from tensorrail_trainer.layers.torchs_own import CONVOLUTIONS, require_own_forward, require_own_parameters, require_size

_ALREADY = "layer {}: expected a dense layer, but it is already made of cores; apply the plan to the dense network"
_OTHERS = (
    "layer {}: other weights of this {} are made of cores already; plan all of them at once, and apply the plan to the dense "
    "network"
)


@dataclass(frozen=True)
class DenseModule:
    """A dense layer of a torch model that a plan can name: its module, what it computes, and the parameters of its weight."""

    module: nn.Module
    spec: LayerSpec
    parameters: tuple[nn.Parameter, ...]  # two for a bidirectional recurrent layer, one otherwise

    def weight(self) -> Tensor:
        """Return the weight (O, I, *K) or (O, I), differentiable with respect to the parameters."""
        if inputs_first(self.spec):
            return self.parameters[0].transpose(0, 1)
        return self.parameters[0] if len(self.parameters) == 1 else torch.cat(self.parameters)

    @torch.no_grad()
    def put(self, weight: Tensor) -> None:
        """Copy a weight (O, I, *K) or (O, I) into the parameters, in place."""
        if inputs_first(self.spec):
            self.parameters[0].copy_(weight.transpose(0, 1))
            return
        for parameter, part in zip(self.parameters, weight.split([len(p) for p in self.parameters]), strict=True):
            parameter.copy_(part)


def at_least_single(tensor: Tensor) -> Tensor:
    """Return a tensor of half precision in single precision, and any other as it is.

    In half precision decompositions do not run, and small steps toward low rank are lost in rounding.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def dense_layers(model: nn.Module, *, recurrent: bool = False) -> tuple[str, ...]:
    """Return the names that the pattern `*` of a plan stands for, in the order of the model.

    These are convolutions, linear layers and embeddings, the input weights of LSTM and GRU, and the projections of attention.
    With `recurrent`, the recurrent weights of LSTM and GRU are among them. Depthwise convolutions, and embeddings and attention
    that cannot be factored, are left out. Other convolutions, linear layers, LSTMs and GRUs that cannot be factored are not,
    and a pattern that matches one raises `PlanError` with the reason.
    """
    names: list[str] = []
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        if isinstance(module, CONVOLUTIONS | nn.Linear):
            names += [] if _kind(module).startswith("depthwise") else [name]
        elif isinstance(module, nn.LSTM | nn.GRU):
            starts = (INPUTS, LOOPS) if recurrent else (INPUTS,)
            names += [f"{name}.{start}{k}".removeprefix(".") for k in range(module.num_layers) for start in starts]
        elif isinstance(module, nn.Embedding):
            whole = type(module).forward is nn.Embedding.forward and uses[id(module.weight)] == 1
            names += [name] if whole and not _why_no_table(module) else []
        elif is_replaceable(module):
            names += [f"{name}.{leaf}".removeprefix(".") for leaf in projections_of(module)]
    return tuple(names)


def dense_layer(model: nn.Module, name: str) -> DenseModule:
    """Return the layer of that name. Raises `PlanError` if there is none, or with the reason why it cannot be factored."""
    path, _, leaf = name.rpartition(".")
    modules = dict(model.named_modules())
    owner = modules.get(path)
    if leaf.startswith((INPUTS, LOOPS, "weight_hr_l")) and isinstance(owner, nn.LSTM | nn.GRU | FactoredRecurrent):
        return _recurrent(owner, name, leaf)
    if leaf in PROJECTIONS and isinstance(owner, nn.MultiheadAttention | FactoredAttention):
        return _attention(owner, name, leaf)
    module = modules.get(name)
    require_size(module, name)
    require_own_parameters(module, name)
    match module:
        case None:
            raise PlanError(f"layer {name}: not in the model; its layers are {', '.join(dense_layers(model))}")
        case nn.Linear():
            spec = LayerSpec("linear", tuple(module.weight.shape))
        case nn.Embedding():
            if reason := _why_no_table(module):
                raise PlanError(f"layer {name}: {reason}; leave it out of the plan")
            spec = LayerSpec("linear", (module.embedding_dim, module.num_embeddings), gathers=True)
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d() | nn.ConvTranspose1d() | nn.ConvTranspose2d() | nn.ConvTranspose3d():
            spec = _convolution(module, name)
        case FactoredLayer():
            raise PlanError(_ALREADY.format(name))
        case nn.MultiheadAttention():
            known = ", ".join(f"{name}.{leaf}".removeprefix(".") for leaf in (*projections_of(module), "out_proj"))
            raise PlanError(f"layer {name}: is a MultiheadAttention; name one of its projections instead: {known}")
        case nn.LSTM() | nn.GRU():
            known = ", ".join(f"{name}.weight_ih_l{k}" for k in range(module.num_layers))
            raise PlanError(
                f"layer {name}: is a {type(module).__name__}; name the input weight of one of its layers instead: {known}"
            )
        case _:
            raise PlanError(
                f"layer {name}: expected a Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d, Linear, "
                f"Embedding, LSTM, GRU or MultiheadAttention layer, got a {type(module).__name__}; leave it out of the plan"
            )
    require_own_forward(module, name)
    return DenseModule(module, spec, (cast("nn.Parameter", module.weight),))


def _kind(module: nn.Module) -> str:
    """Return the kind of a convolution in groups: `depthwise` or `grouped`, and `transposed`; empty for any other module."""
    if not isinstance(module, CONVOLUTIONS) or module.groups == 1:
        return ""
    kind = "depthwise" if module.groups == module.in_channels else "grouped"
    transposed = isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    return f"{kind} transposed" if transposed else kind


def _require_divisible(module: CONVOLUTIONS, name: str) -> None:
    """Raise `PlanError` for a convolution whose groups have a single input channel, or that is transposed and has groups."""
    kind = _kind(module)
    if kind not in ("", "grouped"):
        raise PlanError(
            f"layer {name}: a {kind} convolution (groups={module.groups}) cannot be factored; leave it out of the plan"
        )


def _recurrent(module: nn.LSTM | nn.GRU | FactoredRecurrent, name: str, leaf: str) -> DenseModule:
    """Return the input or recurrent weights of one layer of an LSTM or GRU, both directions in one matrix."""
    if isinstance(module, FactoredRecurrent):
        raise PlanError((_ALREADY if leaf in module.cores else _OTHERS).format(name, module.kind.__name__))
    if getattr(module, "proj_size", 0):
        raise PlanError(
            f"layer {name}: an LSTM with proj_size={module.proj_size} has no ONNX operator; leave it out of the plan, or use "
            "proj_size=0 and factor its recurrent weight"
        )
    require_own_forward(module, name)
    require_own_parameters(module, name, leaf)
    weights = weights_of(module, name)
    return DenseModule(module, spec_of(leaf, weights), weights)


def _attention(module: nn.MultiheadAttention | FactoredAttention, name: str, leaf: str) -> DenseModule:
    """Return the packed projections of query, key and value, or one of them."""
    if isinstance(module, FactoredAttention):
        planned = isinstance(getattr(module, leaf), FactoredLayer)
        raise PlanError((_ALREADY if planned else _OTHERS).format(name, "MultiheadAttention"))
    require_own_forward(module, name)
    require_own_parameters(module, name, leaf)
    if leaf not in projections_of(module):
        known = ", ".join((*projections_of(module), "out_proj"))
        raise PlanError(f"layer {name}: no such weight; expected one of {known}")
    if reason := why_not(module):
        raise PlanError(f"layer {name}: {reason}; leave it out of the plan")
    weight = cast("nn.Parameter", getattr(module, leaf))
    return DenseModule(module, LayerSpec("linear", tuple(weight.shape)), (weight,))


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
        layer.check_layer(dense.spec)
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


def _why_no_table(module: nn.Embedding) -> str | None:
    """Return the reason why an embedding cannot be made of cores, or None: each changes single rows of the table."""
    if module.padding_idx is not None:
        return f"padding_idx={module.padding_idx} keeps one row as it is, and cores have no rows of their own"
    if module.max_norm is not None:
        return f"max_norm={module.max_norm} scales rows of the table in place, and cores have no rows of their own"
    if module.scale_grad_by_freq or module.sparse:
        option = "scale_grad_by_freq" if module.scale_grad_by_freq else "sparse"
        return f"{option}=True changes the gradient of single rows of the table, and cores have no rows of their own"
    return None


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


def _convolution(module: CONVOLUTIONS, name: str) -> LayerSpec:
    """Return what a convolution computes, transposed or not. Raises `PlanError` with the reason why it cannot be factored."""
    _require_divisible(module, name)
    if module.padding_mode != "zeros":
        raise PlanError(f"layer {name}: expected padding_mode='zeros', got {module.padding_mode!r}; leave it out of the plan")
    shape = tuple(module.weight.shape)
    if not isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return LayerSpec("conv", shape, module.stride, pads(module), dilation=module.dilation, groups=module.groups)
    return LayerSpec(
        "conv",
        (shape[1], shape[0], *shape[2:]),  # torch stores (I, O, *K)
        module.stride,
        pads(module),
        dilation=module.dilation,
        transposed=True,
        output_padding=tuple(module.output_padding),
    )


def pads(module: CONVOLUTIONS) -> tuple[int, ...]:
    """Return the padding before and after each axis; with `padding="same"` torch adds the odd element at the end."""
    if isinstance(module.padding, str):
        if module.padding == "valid":
            return (0,) * (2 * len(module.kernel_size))
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return (*(total // 2 for total in totals), *(total - total // 2 for total in totals))
    return (*module.padding, *module.padding)
