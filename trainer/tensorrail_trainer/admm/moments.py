"""Second moments of the layers' inputs, gathered while a model trains or from given inputs.

They define the metric of `ADMM(metric="activation")`, which `tensorrail_trainer.layers.metric` explains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from tensorrail_exporter.formats import format_of
from tensorrail_exporter.formats.contraction import LayerSpec
from tensorrail_exporter.plans.plan import Plan
from tensorrail_runtime.errors import PlanError
from tensorrail_trainer.admm.threads import SYMMETRIC, one_thread_if_small
from tensorrail_trainer.layers.attention import FactoredAttention, heads_of, is_replaceable
from tensorrail_trainer.layers.dense import DenseModule, at_least_single, planned_layers
from tensorrail_trainer.layers.fused import attention_in_parts
from tensorrail_trainer.layers.metric import Root
from tensorrail_trainer.processes import Group, summed, world

_ROWS = 1024  # positions sampled from a batch, at 2·I² FLOPs each; a convolution takes 2·O·I·K FLOPs at every position
_WINDOW = 100  # batches of the running mean: earlier layers keep training, so old batches must be forgotten
_MOST_INPUTS = 16384  # of a layer: their second moment takes 1 GiB, its eigenvalues 10 GiB and, on a CPU, many minutes


class InputMoments:
    """Second moments of the inputs of planned layers, over the batches that the model runs on.

    A hook on each layer samples up to 1024 positions of each batch; that of an `out_proj` is on its attention, which does not
    call it. In training mode the mean is a running one, over the last batches. `close` removes the hooks; the hooks of a copy
    of the model do nothing.

    Args:
        plan: the plan.
        layers: the planned layers by name, as `planned_layers` returns them.
        group: the processes that train the model together; default: all.
        training: whether the batches of training mode count (default), or those of evaluation mode, each of them by the
            number of its positions.
        model: the model that has the layers, needed if an `out_proj` is among them.

    Raises:
        PlanError: the plan does not meet `require_one_input`.

    """

    def __init__(
        self,
        plan: Plan,
        layers: Mapping[str, DenseModule],
        group: Group | None = None,
        training: bool = True,
        model: nn.Module | None = None,
    ) -> None:
        require_one_input(plan, layers, model)
        self._group, self.training = group, training
        self._layers = dict(layers)
        self.second: dict[str, Tensor] = {}  # (I, I), or of an embedding the share of each row, (I,)
        self.batches = dict.fromkeys(layers, 0)
        self._positions = dict.fromkeys(layers, 0)
        self._hooks = [
            (_attention_of(name, model) or dense.module).register_forward_pre_hook(_Hook(self, name), with_kwargs=True)
            for name, dense in layers.items()
        ]

    @torch.no_grad()
    def add(self, name: str, x: Tensor) -> None:
        """Add a batch of a layer's inputs to the mean: (B, I, *S) of convolutions, indices of embeddings, else (…, I)."""
        spec = self._layers[name].spec
        if not x.numel():
            return
        if spec.gathers:
            positions = x.numel()
            second = torch.bincount(x.flatten(), minlength=spec.shape[1]) / positions
        else:
            rows, positions = _rows(x, spec.spatial)
            with torch.autocast(x.device.type, enabled=False):
                rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
                second = rows.T @ rows / len(rows)
        self.batches[name] += 1
        self._positions[name] += positions
        share = max(1 / self.batches[name], 1 / _WINDOW) if self.training else positions / self._positions[name]
        self.second[name] = torch.lerp(self.second[name], second, share) if name in self.second else second

    def roots(self) -> dict[str, Root]:
        """Return the metric of every layer, from the batches so far of all processes.

        Raises `PlanError` for a layer that has seen no batch, or whose inputs were not finite.
        """
        self.synchronize()
        self.require_batches()
        roots: dict[str, Root] = {}
        for name, dense in self._layers.items():
            second = self._finite_moment(name)
            with one_thread_if_small(second.numel(), SYMMETRIC):
                roots[name] = Root.of(second, at_least_single(dense.parameters[0].detach()))
        return roots

    @torch.no_grad()
    def synchronize(self) -> None:
        """Average the moments over all processes that train together, each of which sees different batches."""
        if world(self._group) == 1:
            return
        for name, dense in self._layers.items():
            like = at_least_single(dense.parameters[0].detach())
            second = self.second.get(name, like.new_zeros(moment_shape(dense.spec)))
            counts = (self.batches[name], self._positions[name], float(self.batches[name] > 0))
            own = second.new_tensor(counts, dtype=torch.float64)
            weight = float(own[2] if self.training else own[1])
            total, numbers = summed(second * weight, self._group), summed(own, self._group)
            if numbers[2]:  # a process may have seen no batch yet
                self.second[name] = total / float(numbers[2] if self.training else numbers[1])
                self.batches[name], self._positions[name] = (round(float(n / numbers[2])) for n in numbers[:2])

    def close(self) -> None:
        """Remove the hooks from the model; the moments stay."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def state_dict(self) -> dict[str, Any]:
        """Return the moments and the number of batches of each layer."""
        return {"second": dict(self.second), "batches": dict(self.batches)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.batches = dict(state["batches"])
        self.second = {name: t.to(self._layers[name].parameters[0].device) for name, t in state["second"].items()}

    def require_batches(self) -> None:
        """Raise `PlanError` for a layer that has seen no batch."""
        for name in self._layers:
            if name not in self.second:
                mode, advice = (" in training mode", "train before the update") if self.training else ("", "give inputs")
                raise PlanError(
                    f"layer {name}: expected at least one batch through its module{mode}, got none; {advice}, or use "
                    "metric='weight' if the model reads the weight without calling the module"
                )

    def _finite_moment(self, name: str) -> Tensor:
        second = self.second[name]
        if not torch.isfinite(second).all():
            advice = " in training; lower the learning rate or rho" if self.training else "; check the inputs and the weights"
            raise PlanError(f"layer {name}: its inputs held infinity or NaN{advice}")
        return second


@torch.no_grad()
def input_roots(model: nn.Module, plan: Plan, inputs: Iterable[Tensor]) -> dict[str, Root]:
    """Return the metric of every planned layer of a dense model, from the inputs of its layers on given inputs of the model.

    Args:
        model: the dense model, in the mode it is in afterwards; it runs in evaluation mode, without gradients, and neither
            compiled nor in torch's fused kernels of transformer layers, which call no hooks.
        plan: the planned layers; their ranks are not used.
        inputs: batches of inputs of the model, on its device; with several processes, each of them gives its own.

    Returns:
        The metric by layer name, as `swap` takes it.

    Raises:
        PlanError: a layer has several input modes, saw no batch, or its inputs were not finite.

    """
    return _measured(model, plan, inputs).roots()


def require_seen_inputs(model: nn.Module, plan: Plan, x: Tensor) -> None:
    """Raise `PlanError` for a planned layer whose inputs cannot be measured while a dense model runs on a batch x."""
    _measured(model, plan, [x]).require_batches()


def _measured(model: nn.Module, plan: Plan, inputs: Iterable[Tensor]) -> InputMoments:
    moments = InputMoments(plan, planned_layers(model, plan), training=False, model=model)
    try:
        with _evaluated(model), attention_in_parts(), torch.compiler.set_stance("force_eager"):
            for x in inputs:
                model(x)
    finally:
        moments.close()
    return moments


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and each of its modules back in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def require_one_input(plan: Plan, layers: Mapping[str, DenseModule], model: nn.Module | None = None) -> None:
    """Raise `PlanError` unless the inputs of every planned layer are one mode, not in groups, not too many and seen by a hook.

    `model` is the model that has the layers, needed if the `out_proj` of attention is among them.
    """
    for layer in plan.layers:
        dense = layers[layer.name]
        attention = _attention_of(layer.name, model)
        if isinstance(attention, nn.MultiheadAttention) and not is_replaceable(attention):
            raise PlanError(
                f"layer {layer.name}: `metric: activation` supports no out_proj of attention with add_bias_kv, "
                "add_zero_attn or weights that are computed from others: attention reads its weight without calling it; use "
                "`metric: weight`"
            )
        if dense.spec.groups > 1:
            raise PlanError(
                f"layer {layer.name}: `metric: activation` supports no convolution in groups, got {dense.spec.groups} groups; "
                "use `metric: weight`, or leave it out of the plan"
            )
        count = len(format_of(layer.format).equation(dense.spec.shape, layer.modes).inputs)
        if count != 1:
            raise PlanError(
                f"layer {layer.name}: `metric: activation` expects one input mode, got {count} in modes {list(layer.modes)}; "
                f"use `metric: weight`, or give the {dense.spec.shape[1]} inputs as one mode"
            )
        inputs = dense.spec.shape[1]
        if inputs > _MOST_INPUTS and not dense.spec.gathers:
            raise PlanError(
                f"layer {layer.name}: `metric: activation` expects at most {_MOST_INPUTS:,} inputs, got {inputs:,}: their "
                f"second moment would take {4 * inputs**2 / 2**30:.1f} GiB; use `metric: weight`, or leave it out of the plan"
            )
        if dense.spec.op == "recurrent" and not layer.name.endswith("weight_ih_l0"):
            raise PlanError(
                f"layer {layer.name}: `metric: activation` supports only weight_ih_l0: states, and the inputs of deeper "
                f"layers, stay inside the {type(dense.module).__name__}; use `metric: weight`, or put the layer in its own "
                "module"
            )


def moment_shape(spec: LayerSpec) -> tuple[int, ...]:
    """Return the shape of the second moment of a layer's inputs: (I, I), or (I,) for an embedding, whose moment is diagonal."""
    inputs = spec.shape[1]
    return (inputs,) if spec.gathers else (inputs, inputs)


class _Hook:
    """Passes the inputs of a layer to the moments. A copied or unpickled hook does nothing."""

    def __init__(self, moments: InputMoments | None = None, name: str = "") -> None:
        self.moments, self.name = moments, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.moments is not None and module.training == self.moments.training:
            if isinstance(module, nn.MultiheadAttention | FactoredAttention):
                x = _attended(self.name, module, *args, **kwargs)
            else:
                x = args[0] if args else kwargs["input"]
            self.moments.add(self.name, x if isinstance(x, Tensor) else x.data)  # the rows of a PackedSequence

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def _attention_of(name: str, model: nn.Module | None) -> nn.MultiheadAttention | FactoredAttention | None:
    """Return the attention whose `out_proj` a layer is, or None: attention reads a dense weight without calling the layer."""
    path, _, leaf = name.rpartition(".")
    if model is None or leaf != "out_proj":
        return None
    attention = model.get_submodule(path)
    if isinstance(attention, FactoredAttention):
        return attention
    torchs = isinstance(attention, nn.MultiheadAttention) and type(attention).forward is nn.MultiheadAttention.forward
    return cast(nn.MultiheadAttention, attention) if torchs else None


def _attended(
    name: str,
    attention: nn.MultiheadAttention | FactoredAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Tensor:
    """Return which of the inputs of attention a planned weight multiplies, without the positions that are padding."""
    leaf = name.rpartition(".")[2]
    if leaf == "in_proj_weight" and not query is key is value:
        raise PlanError(
            f"layer {name}: `metric: activation` expects self-attention, where query, key and value are one tensor, got "
            "different ones, which different rows of the weight multiply; use `metric: weight`"
        )
    x: Tensor
    if leaf == "out_proj":
        x = heads_of(attention, query, key, value, key_padding_mask, attn_mask, is_causal)
    else:
        x = {"k_proj_weight": key, "v_proj_weight": value}.get(leaf, query)
    of_keys = query is key or leaf in ("k_proj_weight", "v_proj_weight")
    if key_padding_mask is None or not of_keys:  # the mask says nothing of other queries
        return x
    kept = key_padding_mask.logical_not() if key_padding_mask.dtype == torch.bool else key_padding_mask != -math.inf
    return x[kept if attention.batch_first or kept.dim() == 1 else kept.T]


def _rows(x: Tensor, spatial: int) -> tuple[Tensor, int]:
    """Return up to `_ROWS` positions of a batch, (N, I), and how many it has.

    They are spread over the batch by steps of the golden section, and depend only on the number of positions. The step and
    that number have no common divisor: otherwise the sample would hold the same columns of every image.
    """
    x = x.movedim(-1 - spatial, -1)
    leading = x.shape[:-1]
    count = math.prod(leading)
    if count <= _ROWS:
        return x.reshape(count, x.shape[-1]), count
    step = round(count * (math.sqrt(5) - 1) / 2)
    while math.gcd(step, count) != 1:
        step += 1
    positions = torch.arange(_ROWS, device=x.device) * step % count
    return x[torch.unravel_index(positions, leading)], count
