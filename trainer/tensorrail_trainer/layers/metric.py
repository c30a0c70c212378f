r"""The metric of a layer: it measures a change of the weight by how much it changes the layer's outputs.

When the weight of a linear layer changes from W to Z, its outputs on inputs :math:`x` of I channels change by

.. math:: E‖(W - Z) x‖^2 = ‖(W - Z) S‖_F^2, \qquad S = E[xx^T]^{1/2} \quad (I, I).

For a convolution the same holds for each tap of the kernel separately. The correlation of neighbouring positions is left out:
a matrix that mixes taps would not preserve the ranks of every format. S is scaled to :math:`\operatorname{tr} S^2 = I`, so that
it is the identity, and the metric the plain Frobenius norm, if the inputs have no preferred direction.

The inputs of an embedding stand for rows with a single one. Their second moment is diagonal: how often each row is read, shrunk
toward equal shares (`tensorrail_exporter.calibrate.tables`), since batches show few of the rows.

The closest weight of low rank in this metric is :math:`\operatorname{project}(WS) \, S^{-1}`. If the inputs are one mode of the
format, the invertible S multiplies only one core, so it preserves every rank; with several input modes it does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tensorrail_exporter.calibrate.metric import roots
from tensorrail_exporter.calibrate.tables import DEFAULT, row_weights
from tensorrail_exporter.formats import format_of
from tensorrail_exporter.plans.plan import LayerPlan


@dataclass(frozen=True)
class Root:
    """The metric of one layer: the symmetric square root S of a second moment, with tr S² = I, and the inverse of S.

    Both are matrices (I, I), or diagonals (I,) for an embedding.
    """

    root: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, second: Tensor, like: Tensor) -> Root:
        """Return the metric of a second moment (I, I), or of the shares of an embedding's rows (I,), in the dtype of `like`."""
        if second.dim() == 1:
            diagonal = np.sqrt(row_weights(second.cpu().double().numpy(), DEFAULT))
            return cls(*(torch.from_numpy(values).to(like) for values in (diagonal, 1 / diagonal)))
        root, inverse = roots(second.cpu().numpy())
        scale = math.sqrt((root * root).sum() / len(root))
        return cls(*(torch.from_numpy(matrix).to(like) for matrix in (root / scale, inverse * scale)))

    def apply(self, weight: Tensor) -> Tensor:
        """Return W·S for a weight (O, I, *K): its Frobenius norm is the norm of the weight in this metric."""
        return _on_axis(weight, 1, self.root)

    def undo(self, weight: Tensor) -> Tensor:
        """Return W·S⁻¹ for a weight (O, I, *K)."""
        return _on_axis(weight, 1, self.inverse)

    def decompose(self, plan: LayerPlan, weight: Tensor) -> list[Tensor]:
        """Return cores whose weight is close to W in this metric: those of W·S, with S⁻¹ applied to the core of the inputs."""
        cores = plan.decompose(self.apply(weight).contiguous())
        equation = format_of(plan.format).equation(tuple(weight.shape), plan.modes)
        place = next(k for k, letters in enumerate(equation.cores) if equation.inputs in letters)
        core, letters = cores[place], equation.cores[place]
        sizes = dict(zip(equation.weight, equation.axes, strict=True))
        # A core may have axes of size 1 that the equation does not name, or one axis for several letters.
        view = core if core.ndim == len(letters) else core.reshape([sizes.get(letter, -1) for letter in letters])
        cores[place] = _on_axis(view, letters.index(equation.inputs), self.inverse).reshape(core.shape)
        return cores


def _on_axis(tensor: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """Multiply one axis of a tensor by a symmetric matrix or a diagonal, as the tensor is, without autocast."""
    if matrix.dim() == 1:
        return tensor * matrix.to(tensor).reshape([-1 if k == axis else 1 for k in range(tensor.dim())])
    with torch.autocast(tensor.device.type, enabled=False):
        product: Tensor = torch.tensordot(tensor, matrix.to(tensor), dims=([axis], [0]))
        return product.movedim(-1, axis)
