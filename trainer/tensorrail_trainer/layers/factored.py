"""Convolutions, linear layers and embeddings whose weight is stored as tensor cores.

A plan names them by their module, and one layer of an LSTM or GRU by its input or recurrent weight, such as
`rnn.weight_ih_l0` (see `tensorrail_trainer.layers.recurrent`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tensorrail_exporter.formats import format_of
from tensorrail_exporter.formats.contraction import LayerSpec, Step, dense_step, describe, split_at_boundary
from tensorrail_exporter.plans.costs import SECONDS_A_FLOP, contraction_cost, dense_cost
from tensorrail_exporter.plans.plan import LayerPlan
from tensorrail_trainer.layers._compat_torch import is_traced, node_of
from tensorrail_trainer.layers.read_only import read_only
from tensorrail_trainer.layers.steps import CoreList, compiled_product, run_steps

# Inputs that a compiled layer is expected to have, by the number of spatial axes.
_USUAL = {0: (256,), 1: (32, 1, 64), 2: (32, 1, 16, 16), 3: (8, 1, 8, 16, 16)}


class FactoredLayer(nn.Module):
    """A convolution, a linear layer or an embedding whose weight is a list of trainable cores.

    It has the inputs and outputs of the dense layer that it replaces, and the attributes of torch's layer (`in_channels`,
    `stride`, …). `forward` contracts the input with the cores, by the same steps that the exporter writes to ONNX. In training,
    where these steps are expected to take longer than the dense layer, it reconstructs the dense weight from the cores in
    float32 instead: the same function, with gradients that are equal up to rounding. Compiled by `torch.compile`, this choice
    is made for inputs of a usual size, so that it does not depend on the batch. For `torch.fx` the layer is one node.

    Args:
        spec: what the dense layer computes: its kind, weight shape (O, I, *K) or (O, I), stride, padding, dilation and
            groups. An embedding is a linear layer of I entries and O features whose input is indices.
        plan: format, modes and ranks of the layer.
        cores: the cores of the plan's format; they are copied.
        bias: the bias (O,), copied; None for a layer without a bias.

    """

    bias: nn.Parameter | None

    def __init__(self, spec: LayerSpec, plan: LayerPlan, cores: Sequence[Tensor], bias: Tensor | None) -> None:
        super().__init__()
        self.spec = spec
        self.plan = plan.model_copy(update={"merge": plan.merge_for(spec)})
        self.cores = CoreList([nn.Parameter(core.detach().clone(memory_format=torch.contiguous_format)) for core in cores])
        self._equation = format_of(plan.format, spec.groups).equation(spec.shape, plan.modes)
        self._dense_compiled = _dense_is_faster(self.plan, spec, (*_USUAL[spec.spatial],))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))
        for name, value in torch_options(spec).items():  # code of the model may read them, as from the dense layer
            setattr(self, name, value)

    def steps(self) -> tuple[Step, ...]:
        """Return the steps of the contraction with the current cores, differentiable with respect to them."""
        return self.plan.contraction(list(self.cores), self.spec)

    def dense_weight(self) -> Tensor:
        """Return the dense weight (O, I, *K) or (O, I), reconstructed from the cores and differentiable."""
        if torch.compiler.is_compiling() or self.spec.groups > 1:  # one einsum for all groups
            return compiled_product(self._equation, list(self.cores), self.spec.shape)
        return cast(Tensor, self.plan.reconstruct(list(self.cores), self.spec.shape, self.spec.groups))

    @property
    def weight(self) -> Tensor:
        """The dense weight, for modules that read it without calling `forward`, as torch's attention reads its `out_proj`.

        It is computed from the cores. That of a transposed convolution and of an embedding is (I, O, *K), as torch stores it.
        An operation that would change it in place raises `PlanError`: the change would be lost.
        """
        weight = self.dense_weight()
        return read_only(
            weight.transpose(0, 1) if inputs_first(self.spec) else weight,
            "change `cores`, or factor a dense layer of the weight that you want",
        )

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Contract the input with the cores and add the bias.

        Args:
            x: (B, I, *S) or (I, *S) for a convolution, (…, I) for a linear layer, indices (…) for an embedding.
            output_size: for a transposed convolution, the size *S', alone or behind the other axes; default: what follows from
                its output padding.

        Returns:
            (B, O, *S'), (O, *S') or (…, O), as from the dense layer.

        """
        if is_traced(x):
            return cast(Tensor, node_of(self, x) if output_size is None else node_of(self, x, output_size))
        if self.spec.op == "linear":
            return self._on_rows(x)
        if x.dim() == self.spec.spatial + 1:
            return self.forward(x.unsqueeze(0), output_size).squeeze(0)
        # The output is channels_last only if the input is, as in torch's layers. Images of one channel are both.
        plain = not (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
        x = run_steps(self._steps_for(x, output_size, plain=plain), x)
        x = x.contiguous() if plain else x
        return x if self.bias is None else x + self.bias.to(x.dtype).reshape(-1, *(1,) * self.spec.spatial)

    def _on_rows(self, x: Tensor) -> Tensor:
        """Contract rows (…, I), or the rows that indices (…) of an embedding stand for, and add the bias."""
        leading = x.shape if self.spec.gathers else x.shape[:-1]
        x = x.reshape(-1) if self.spec.gathers else x.reshape(-1, x.shape[-1])
        x = run_steps(self._steps_for(x), x)
        if self.spec.gathers:
            x = x.to(self.cores[0].dtype)  # under autocast an embedding has the type of its table
        return (x if self.bias is None else x + self.bias.to(x.dtype)).reshape(*leading, self.spec.shape[0])

    def _steps_for(self, x: Tensor, output_size: Sequence[int] | None = None, *, plain: bool = True) -> tuple[Step, ...]:
        """Return the steps to run: those of the cores, or in training one step with the dense weight if it is faster."""
        spec = self._spec_for(x, output_size)
        if not (self.training and torch.is_grad_enabled() and self._dense_for(x)):
            return self.plan.contraction(list(self.cores), spec)
        with torch.autocast(x.device.type, enabled=False):
            weight = self.dense_weight()
            return (dense_step(weight.contiguous() if plain else weight, spec),)

    def part(self, x: Tensor, begin: int, end: int) -> Tensor:
        """Return some of the output features of a linear layer, without the bias.

        Args:
            x: (…, I).
            begin: the first of these features.
            end: the feature behind the last of them.

        Returns:
            (…, end − begin); where the last step is a product over the rank, only these features are computed.

        """
        leading, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
        if self.training and torch.is_grad_enabled() and self._dense_for(x):
            with torch.autocast(x.device.type, enabled=False):
                weight = self.dense_weight()
            out = x @ weight[begin:end].T
        else:
            steps, matrix, _ = split_at_boundary(self.steps())
            out = run_steps(steps, x)
            out = out[:, begin:end] if matrix is None else out @ cast(Tensor, matrix)[begin:end].T
        return out.reshape(*leading, end - begin)

    def _spec_for(self, x: Tensor, output_size: Sequence[int] | None) -> LayerSpec:
        """Return what the layer computes; with an output size, with the output padding that gives it."""
        spec = self.spec
        if output_size is None:
            return spec
        if not spec.transposed:
            raise TypeError("output_size is for a transposed convolution")
        least = [
            (size - 1) * s - 2 * p + d * (k - 1) + 1
            for size, s, p, d, k in zip(x.shape[2:], spec.stride, spec.pads, spec.dilation, spec.kernel, strict=False)
        ]
        added = tuple(size - low for size, low in zip(tuple(output_size)[-spec.spatial :], least, strict=True))
        if any(not 0 <= extra < step for extra, step in zip(added, spec.stride, strict=True)):
            raise ValueError(f"output_size {list(output_size)}: expected {least} or up to one less than the stride more")
        return replace(spec, output_padding=added)

    def _dense_for(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling():
            return self._dense_compiled and not torch.compiler.is_exporting()
        known = all(isinstance(size, int) for size in x.shape)  # False while a dynamic size is traced
        return known and _dense_is_faster(self.plan, self.spec, tuple(x.shape))

    def extra_repr(self) -> str:
        """Return the plan and the steps that run, for the printed layer."""
        steps = describe(self.steps(), self.spec)
        return f"{self.plan.format}, modes={list(self.plan.modes)}, ranks={list(self.plan.ranks)}: {steps}"


def inputs_first(spec: LayerSpec) -> bool:
    """Return whether torch stores the weight as (I, O, *K), as that of a transposed convolution and of an embedding."""
    return spec.transposed or spec.gathers


def torch_options(spec: LayerSpec) -> dict[str, Any]:
    """Return the arguments of torch's layer of this kind, which are also its attributes, without the bias."""
    if spec.gathers:
        plain = {"padding_idx": None, "max_norm": None, "norm_type": 2.0, "scale_grad_by_freq": False, "sparse": False}
        return {"num_embeddings": spec.shape[1], "embedding_dim": spec.shape[0], **plain}
    if spec.op == "linear":
        return {"in_features": spec.shape[1], "out_features": spec.shape[0]}
    begins, ends = spec.pads[: spec.spatial], spec.pads[spec.spatial :]
    return {
        "in_channels": spec.inputs,
        "out_channels": spec.shape[0],
        "kernel_size": tuple(spec.kernel),
        "stride": tuple(spec.stride),
        "padding": tuple(begins) if begins == ends else "same",  # only padding="same" can pad the two sides differently
        "dilation": tuple(spec.dilation),
        "groups": spec.groups,
        "padding_mode": "zeros",
        **({"output_padding": tuple(spec.output_padding)} if spec.transposed else {}),
    }


@lru_cache(maxsize=1024)
def _dense_is_faster(plan: LayerPlan, spec: LayerSpec, shape: tuple[int, ...]) -> bool:
    """Estimate whether a training step is faster with the dense weight than core by core, for inputs of this shape.

    Between the small kernels of a contraction torch moves and reorders activations. Measured on ResNet-20's layers, in
    bf16 and fp32 on a CPU: contractions with an estimate of 0.3 of the dense time took 0.4 to 0.6 of it, those with 0.7 to 0.8
    took 1 to 2 times the dense time, and those above 1 took 5 to 25 times the dense time. Hence the factor of 0.6.
    """
    spec = replace(spec, size=shape[2:])
    cores = [np.broadcast_to(np.float32(0), size) for size in plan.core_shapes(spec.shape, spec.groups)]
    reconstruction = 2 * math.prod(spec.shape) * max(plan.ranks) * SECONDS_A_FLOP
    dense = dense_cost(spec).seconds_of(shape[0]) + reconstruction
    return contraction_cost(plan.contraction(cores, spec), spec).seconds_of(shape[0]) > 0.6 * dense
