"""Layers made of cores: the same forward as the dense layer whose weight the cores stand for.

A plan names a convolution or a linear layer by its module, and one layer of an LSTM or GRU by its input weight, such as
`rnn.weight_ih_l0`; the weights of both directions are one matrix, with one projection of the input.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tensorrail_exporter.formats.contraction import LayerSpec, Step, dense_step, describe
from tensorrail_exporter.plans.costs import SECONDS_A_FLOP, contraction_cost, dense_cost
from tensorrail_exporter.plans.plan import LayerPlan
from tensorrail_trainer.layers.steps import Cores, run_steps


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
        for name, value in torch_options(spec).items():  # a model's own code may ask for them, as it asks the dense layer
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


def torch_options(spec: LayerSpec) -> dict[str, Any]:
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
    return _known_to_pay(plan, spec, shape)


# What torch.compiler.assume_constant_result sets, which imports the compiler: two seconds.
_dense_pays._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=1024)
def _known_to_pay(plan: LayerPlan, spec: LayerSpec, shape: tuple[int, ...]) -> bool:
    if "torch._dynamo" in sys.modules:  # else the compiler would trace what is computed here
        return bool(torch.compiler.disable(_expected_faster)(plan, spec, shape))
    return _expected_faster(plan, spec, shape)


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
