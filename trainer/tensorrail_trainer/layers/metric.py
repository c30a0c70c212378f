r"""The metric of a layer: the square root of the second moment of its inputs, which weighs a weight by what it does.

The closest weight of low rank in this metric is :math:`\operatorname{project}(WS) \, S^{-1}`. A regular matrix on the one mode
of the inputs multiplies one core, so it keeps every rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorrail_exporter.calibrate.metric import roots
from tensorrail_exporter.formats import format_of
from tensorrail_exporter.plans.plan import LayerPlan


@dataclass(frozen=True)
class Root:
    """The symmetric square root S (I, I) of a second moment, tr S² = I, and its inverse: the metric of one layer."""

    root: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, second: Tensor, like: Tensor) -> Root:
        """Return the root of a second moment (I, I), with the type and on the device of the weight `like`."""
        root, inverse = roots(second.cpu().numpy())
        scale = math.sqrt((root * root).sum() / len(root))
        return cls(*(torch.from_numpy(matrix).to(like) for matrix in (root / scale, inverse * scale)))

    def apply(self, weight: Tensor) -> Tensor:
        """Return W·S of a weight (O, I, *K): its Frobenius norm is the weight's norm in this metric."""
        return _on_axis(weight, 1, self.root)

    def undo(self, weight: Tensor) -> Tensor:
        """Return W·S⁻¹ of a weight (O, I, *K)."""
        return _on_axis(weight, 1, self.inverse)

    def decompose(self, plan: LayerPlan, weight: Tensor) -> list[Tensor]:
        """Return the cores of W·S, the input's one multiplied by S⁻¹: the cores of a weight close to W in this metric."""
        cores = plan.decompose(self.apply(weight).contiguous())
        equation = format_of(plan.format).equation(tuple(weight.shape), plan.modes)
        place = next(k for k, letters in enumerate(equation.cores) if equation.inputs in letters)
        core, letters = cores[place], equation.cores[place]
        sizes = dict(zip(equation.weight, equation.axes, strict=True))
        # A core may have axes of size 1 without a letter, or letters that share an axis.
        view = core if core.ndim == len(letters) else core.reshape([sizes.get(letter, -1) for letter in letters])
        cores[place] = _on_axis(view, letters.index(equation.inputs), self.inverse).reshape(core.shape)
        return cores


def _on_axis(tensor: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """Return a tensor with one axis multiplied by a symmetric matrix, in full precision."""
    with torch.autocast(tensor.device.type, enabled=False):
        product: Tensor = torch.tensordot(tensor, matrix, dims=([axis], [0]))
        return product.movedim(-1, axis)
