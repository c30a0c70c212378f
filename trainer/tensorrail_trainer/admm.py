r"""ADMM toward low tensor rank (Yin, Sui, Liao, Yuan, CVPR 2021; Boyd et al. 2011, chapter 3, in scaled form).

.. math:: \min_W \; ℓ(W) \quad \text{s.t.} \quad \operatorname{rank}(W) ≤ r^*

is split with a copy Z that carries the constraint and a scaled dual variable U. The network trains W with the penalty

.. math:: ℓ(W) + \tfrac{ρ}{2} ‖W − Z + U‖_F^2

and, every epoch or every k steps,

.. math:: Z ← \operatorname{project}(W + U), \qquad U ← U + W − Z.

The network keeps its dense structure throughout; at the end its weights are close to their projections, so that cutting
them into cores costs little accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tensorrail_exporter.errors import PlanError
from tensorrail_exporter.formats import project
from tensorrail_exporter.plan import LayerPlan, Plan
from tensorrail_trainer.layers import planned_layers, swap


@dataclass(frozen=True)
class Residual:
    """How far one layer is from its constraint after an update. Frobenius norms.

    `primal` is ‖W − Z‖ / ‖W‖, without unit. `dual` is ρ‖Z − Z_previous‖, in the unit of the loss's gradient.
    """

    layer: str
    primal: float
    dual: float


class ADMM:
    """The variables Z and U of every planned layer, and the three things to do with them.

    >>> admm = ADMM(model, plan, rho=1e-3)  # doctest: +SKIP
    >>> loss = criterion(model(x), y) + admm.penalty()  # in the loop # doctest: +SKIP
    >>> admm.update()  # after each epoch # doctest: +SKIP
    >>> model = admm.factorize()  # at the end, then fine-tune # doctest: +SKIP

    Raises `PlanError` when the plan does not fit the model and `ValueError` when rho is not positive.
    """

    def __init__(self, model: nn.Module, plan: Plan, rho: float = 1e-3) -> None:
        if not rho > 0:
            raise ValueError(f"rho is positive, and {rho} came; the paper trains with 0.001")
        self.model, self.plan, self.rho = model, plan, rho
        self._layers = planned_layers(model, plan)
        self.Z = {layer.name: self._project(layer, self._layers[layer.name].weight().detach()) for layer in plan.layers}
        self.U = {name: torch.zeros_like(z) for name, z in self.Z.items()}

    def penalty(self) -> Tensor:
        """Return ρ/2 Σ‖W − Z + U‖², a scalar on the weights' device, to be added to the loss of each step."""
        terms = [(dense.weight() - self.Z[name] + self.U[name]).square().sum() for name, dense in self._layers.items()]
        return self.rho / 2 * torch.stack(terms).sum()

    @torch.no_grad()
    def update(self) -> tuple[Residual, ...]:
        """Do Z ← project(W + U) and U ← U + W − Z for every layer, and return the residuals."""
        return tuple(self._update(layer) for layer in self.plan.layers)

    def _update(self, layer: LayerPlan) -> Residual:
        name = layer.name
        w, before = self._layers[name].weight().detach(), self.Z[name]
        z = self.Z[name] = self._project(layer, w + self.U[name])
        self.U[name] = self.U[name] + w - z
        primal = torch.linalg.vector_norm(w - z) / torch.linalg.vector_norm(w).clamp_min(torch.finfo(w.dtype).tiny)
        return Residual(name, float(primal), float(self.rho * torch.linalg.vector_norm(z - before)))

    def factorize(self) -> nn.Module:
        """Cut every planned weight into cores, swap the layers in place, and return the model.

        The optimizer of the dense weights knows nothing of the cores: make a new one to fine-tune.
        """
        return swap(self.model, self.plan)

    def state_dict(self) -> dict[str, Any]:
        """Return rho, Z and U, to be saved beside the model's and the optimizer's state."""
        return {"rho": self.rho, "Z": dict(self.Z), "U": dict(self.U)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over rho, Z and U; `PlanError` when they belong to another plan or model."""
        for key in ("Z", "U"):
            shapes = {name: tuple(tensor.shape) for name, tensor in state[key].items()}
            expected = {name: dense.spec.shape for name, dense in self._layers.items()}
            if shapes != expected:
                raise PlanError(f"ADMM state: {key} is of layers {shapes}, and the plan has {expected}")
        self.rho = float(state["rho"])
        for name, dense in self._layers.items():
            device = dense.parameters[0].device  # the state may come from another one
            self.Z[name], self.U[name] = state["Z"][name].to(device), state["U"][name].to(device)

    @staticmethod
    @torch.no_grad()
    def _project(layer: LayerPlan, tensor: Tensor) -> Tensor:
        # A contiguous copy: channels-last weights keep their own strides, the projection its own.
        projected = project(layer.format, tensor.contiguous(), layer.modes, layer.ranks)
        return cast(Tensor, projected).to(tensor.dtype).contiguous()
