r"""ADMM toward low tensor rank (Yin, Sui, Liao, Yuan, CVPR 2021; Boyd et al. 2011, chapter 3, in scaled form).

.. math:: \min_W \; ℓ(W) \quad \text{s.t.} \quad \operatorname{rank}(W) ≤ r^*

is split with a copy Z that carries the constraint and a scaled dual variable U. The network trains W with the penalty

.. math:: ℓ(W) + \tfrac{ρ}{2} ‖W − Z + U‖_F^2

and, every epoch or every k steps,

.. math:: Z ← \operatorname{project}(W + U), \qquad U ← U + W − Z.

The network keeps its dense structure throughout; at the end its weights are close to their projections, so that cutting
them into cores costs little accuracy.

With `metric="activation"` all distances are those of `tensorrail_trainer.admm.moments`, ‖·S‖ with S the square root of the
second moment of each layer's inputs: close is a weight that leaves the layer's outputs where they were. The set of weights of
low rank is the same, since S is regular. Then

.. math:: ℓ(W) + \tfrac{ρ}{2} ‖(W - Z + U) S‖_F^2, \qquad Z ← \operatorname{project}((W + U) S) \, S^{-1}.

S is the identity until the first update, and is renewed from the moments at each update, before Z. U stays as it is when S
becomes S′: it lives in the space of weights, W + U is the point that is projected, and a new metric moves neither. What
changes is the multiplier ρUS² that U stands for. To hold the multiplier instead, U would have to become U S² S′⁻², and in
directions that hardly occur in the inputs, where U means least, that inverse makes it large. As the moments settle S′ goes
to S and both are the same, so the fixed points are those of ADMM with the last S. With tr S² = I the mean curvature of the
penalty is ρ in either metric; its largest, ρ times the largest eigenvalue of S², is up to I times that in this one: where
training diverges, lower rho or the learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor, distributed, nn

from tensorrail_exporter.formats import project
from tensorrail_exporter.plans.plan import LayerPlan, Plan
from tensorrail_runtime.errors import PlanError
from tensorrail_trainer.admm.moments import InputMoments
from tensorrail_trainer.layers.dense import planned_layers
from tensorrail_trainer.layers.metric import Root
from tensorrail_trainer.layers.swap import swap
from tensorrail_trainer.processes import rank, shared_out, world

Metric = Literal["weight", "activation"]
"""What distances between weights are measured in: the Frobenius norm, or that of the change of the layer's outputs."""

# Values of a weight that a GPU leaves to the CPU, where small SVDs are faster (PyTorch issue 41306), and a CPU to one thread:
# torch's own wait for their next work after every step, and NumPy's beside them took several times as long as one alone.
_SMALL = 2**20

_ADVICE = "check the weights that training started from, or lower rho or the learning rate"


@lru_cache(maxsize=1)
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()  # which looks for them in the process: once


@dataclass(frozen=True)
class Residual:
    """How far one layer is from its constraint after an update. Norms are those of ADMM's metric.

    `primal` is ‖W − Z‖ / ‖W‖, without unit. `dual` is ρ‖Z − Z_previous‖, in the unit of the loss's gradient
    (for `metric="activation"` in the dual norm, ‖·S⁻¹‖); `moved` is ‖Z − Z_previous‖ / ‖W‖, without unit.
    """

    layer: str
    primal: float
    dual: float
    moved: float


class ADMM:
    """The variables Z and U of every planned layer, and the three things to do with them.

    >>> admm = ADMM(model, plan, rho=1e-3)  # doctest: +SKIP
    >>> loss = criterion(model(x), y) + admm.penalty()  # in the loop # doctest: +SKIP
    >>> admm.update()  # after each epoch # doctest: +SKIP
    >>> model = admm.factorize()  # at the end, then fine-tune # doctest: +SKIP

    `metric="activation"` gathers the second moments of the layers' inputs by hooks, from the batches that pass while the
    model is in training mode; `factorize` and `close` remove the hooks. Z starts as the plain projection.

    Raises `PlanError` when the plan does not fit the model, or splits the inputs of a layer into several modes and the
    metric is `activation`; `ValueError` when rho is not positive or the metric unknown.
    """

    def __init__(self, model: nn.Module, plan: Plan, rho: float = 1e-3, metric: Metric = "weight") -> None:
        if not 0 < rho < math.inf:
            raise ValueError(f"rho: expected a positive number, got {rho}; the paper uses 0.001")
        if not plan.layers:
            raise PlanError("expected a plan with at least one layer, got an empty plan; add a layer to train toward low rank")
        if metric not in get_args(Metric):
            raise ValueError(f"unknown metric {metric!r}: expected one of {', '.join(get_args(Metric))}")
        self.model, self.plan, self.rho, self.metric = model, plan, rho, metric
        self.roots: dict[str, Root] = {}  # S of every layer, of the last update; empty for the plain metric
        self._layers = planned_layers(model, plan)
        self._gaps: dict[str, tuple[float, ...]] = {}  # of the last update: ‖W − Z‖, ‖Z − Z_previous‖, ‖W‖, ‖Z‖
        self.Z = {layer.name: self._project(layer, self._layers[layer.name].weight().detach()) for layer in plan.layers}
        self.U = {name: torch.zeros_like(z) for name, z in self.Z.items()}
        self._moments = InputMoments(plan, self._layers) if metric == "activation" else None
        self._place()

    def penalty(self) -> Tensor:
        """Return ρ/2 Σ‖W − Z + U‖², a scalar on the weights' device, to be added to the loss of each step."""
        gaps = {name: dense.weight() - self._wanted[name] for name, dense in self._layers.items()}
        return self._half_rho * torch.stack([self._measured(name, gap).square().sum() for name, gap in gaps.items()]).sum()

    @torch.no_grad()
    def update(self) -> tuple[Residual, ...]:
        """Do Z ← project(W + U) and U ← U + W − Z for every layer, and return the residuals.

        Where several processes train together (`torch.distributed`), each projects some of the layers and sends them to the
        others. For `metric="activation"` S is renewed first; `PlanError` names a layer that no batch has passed in training
        mode, or whose parameters the model has no more.
        """
        self._require_own()
        if self._moments is not None:
            self.roots = self._moments.roots()
        weights = {name: dense.weight().detach() for name, dense in self._layers.items()}
        points = {name: w + self.U[name] for name, w in weights.items()}
        residuals = []
        for name, z in self._projected(points).items():
            before, self.Z[name], self.U[name] = self.Z[name], z, points[name].sub_(z)
            residuals.append(self._residual(name, weights[name], z, before))
        self._changed()
        return tuple(residuals)

    @torch.no_grad()
    def project_weights(self) -> tuple[Residual, ...]:
        """Do W ← project(W) for every layer, in place, with Z = W and U = 0 (hard projection), and return the residuals.

        `primal` is how far the weights were from their projections before.
        """
        self._require_own()
        weights = {name: dense.weight().detach().clone() for name, dense in self._layers.items()}
        residuals = []
        for name, z in self._projected(weights).items():
            before, self.Z[name], self.U[name] = self.Z[name], z, torch.zeros_like(z)
            self._layers[name].put(z)
            residuals.append(self._residual(name, weights[name], z, before))
        self._changed()
        return tuple(residuals)

    @torch.no_grad()
    def project_copy(self, model: nn.Module) -> None:
        """Do W ← project(W) for every planned layer of another copy of the model, such as its average; Z and U stay."""
        layers = planned_layers(model, self.plan)
        for name, z in self._projected({name: dense.weight().detach() for name, dense in layers.items()}).items():
            layers[name].put(z)

    def _require_own(self) -> None:
        """Raise `PlanError` where the model's weights are others than those taken: the penalty would not reach them."""
        there = {id(parameter) for parameter in self.model.parameters()}
        for name, dense in self._layers.items():
            if not all(id(parameter) in there for parameter in dense.parameters):
                raise PlanError(
                    f"layer {name}: the model no longer holds the weight that ADMM was created with (factored, replaced, "
                    "or loaded with assign=True); create a new ADMM object"
                )

    def synchronize(self) -> None:
        """Give every process that trains along the same state, to be saved by one: all call it, between steps.

        Without it the moments of `metric="activation"` are those of this process's batches until the next update.
        """
        if self._moments is not None:
            self._moments.synchronize()

    def set_rho(self, rho: float) -> None:
        """Change the penalty's weight; U is rescaled, so that the multiplier ρU stays what it was (Boyd et al., 3.4.1)."""
        if not 0 < rho < math.inf:
            raise ValueError(f"rho: expected a positive number, got {rho}")
        if rho != self.rho:
            self.U = {name: u * (self.rho / rho) for name, u in self.U.items()}
            self.rho = rho
            self._changed()

    @torch.no_grad()
    def balance(self, apart: float = 10.0, factor: float = 2.0) -> None:
        """Multiply or divide rho by `factor` where the residuals of the last update are more than `apart` times apart.

        Compared are the relative residuals over all layers, ‖W − Z‖ / max(‖W‖, ‖Z‖) and ‖Z − Z_previous‖ / ‖U‖
        (Wohlberg 2017), which the scale of the weights does not change.
        """
        if not (apart > 1 and factor > 1):
            raise ValueError(f"expected apart and factor above 1, got apart={apart} and factor={factor}")
        primal, dual = self._relative
        if primal > apart * dual:
            self.set_rho(self.rho * factor)
        elif dual > apart * primal:
            self.set_rho(self.rho / factor)

    def _residual(self, name: str, w: Tensor, z: Tensor, before: Tensor) -> Residual:
        size = torch.linalg.vector_norm(self._measured(name, w)).clamp_min(torch.finfo(w.dtype).tiny)
        between = w - z
        gap = torch.linalg.vector_norm(self._measured(name, between))
        torch.sub(z, before, out=between)  # in place: a recurrent layer's weight can be hundreds of megabytes
        moved = torch.linalg.vector_norm(self._measured(name, between))
        other = torch.linalg.vector_norm(self._measured(name, z))
        self._gaps[name] = (float(gap), float(moved), float(size), float(other))
        return Residual(name, float(gap / size), float(self.rho * moved), float(moved / size))

    @property
    def _relative(self) -> tuple[float, float]:
        gap, moved, w, z = (math.hypot(*(one[k] for one in self._gaps.values())) for k in range(4))
        multipliers = math.hypot(*(float(torch.linalg.vector_norm(self._measured(n, u))) for n, u in self.U.items()))
        return gap / max(w, z, 1e-30), moved / max(multipliers, 1e-30)

    def _projected(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return each tensor's projection; every process makes its share of them."""
        owners = shared_out({name: tensor.numel() * min(tensor.shape) for name, tensor in tensors.items()})
        found = {}
        for layer in self.plan.layers:
            tensor = tensors[layer.name]
            own = owners[layer.name] == rank()
            found[layer.name] = self._project(layer, tensor) if own else torch.empty_like(tensor).contiguous()
        if world() > 1:
            for name, owner in owners.items():
                distributed.broadcast(found[name], owner)
        return found

    def factorize(self, model: nn.Module | None = None) -> nn.Module:
        """Cut every planned weight into cores, swap the layers in place, and return the model.

        They are cut in ADMM's metric, as it was at the last update. `model` is a copy to cut in place of the trained one.
        The optimizer of the dense weights knows nothing of the cores: make a new one to fine-tune.
        """
        if self._moments is not None and not self.roots:
            self.roots = self._moments.roots()
        self.close()
        return swap(self.model if model is None else model, self.plan, roots=self.roots)

    def close(self) -> None:
        """Remove the hooks that gather moments from the model; to be called where `factorize` is not."""
        if self._moments is not None:
            self._moments.close()

    def state_dict(self) -> dict[str, Any]:
        """Return rho, Z and U, the moments and S, to be saved beside the model's and the optimizer's state."""
        state: dict[str, Any] = {"rho": self.rho, "metric": self.metric, "Z": dict(self.Z), "U": dict(self.U)}
        if self._moments is not None:
            roots = {name: {"root": root.root, "inverse": root.inverse} for name, root in self.roots.items()}
            state |= {"moments": self._moments.state_dict(), "roots": roots}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; `PlanError` when it belongs to another plan, model or metric."""
        missing = [key for key in ("rho", "Z", "U") if key not in state]
        if missing:
            raise PlanError(
                f"ADMM state: keys {', '.join(missing)} are missing; expected a dictionary that `state_dict` returned"
            )
        metric = state.get("metric", "weight")
        if metric != self.metric:
            raise PlanError(f"ADMM state: expected the metric {self.metric}, got {metric}; create ADMM with metric={metric!r}")
        for key in ("Z", "U"):
            shapes = {name: tuple(tensor.shape) for name, tensor in state[key].items()}
            expected = {name: dense.spec.shape for name, dense in self._layers.items()}
            if shapes != expected:
                raise PlanError(
                    f"ADMM state: expected {key} for the layers of the plan, {expected}, got {shapes}; use the plan and "
                    "the model that it was saved with"
                )
        self.rho = float(state["rho"])
        for name, dense in self._layers.items():
            device = dense.parameters[0].device  # the state may come from another one
            self.Z[name], self.U[name] = state["Z"][name].to(device), state["U"][name].to(device)
        if self._moments is not None:
            self._moments.load_state_dict(state["moments"])
            self.roots = {
                name: Root(*(root[key].to(self.Z[name].device) for key in ("root", "inverse")))
                for name, root in state["roots"].items()
            }
        self._place()

    @torch.no_grad()
    def _place(self) -> None:
        """Make what the penalty reads. It stays there in memory: a CUDA graph of a training step sees every change."""
        self._wanted = {name: z - self.U[name] for name, z in self.Z.items()}
        self._half_rho = next(iter(self.Z.values())).new_tensor(self.rho / 2)

    @torch.no_grad()
    def _changed(self) -> None:
        self._half_rho.fill_(self.rho / 2)
        for name, wanted in self._wanted.items():
            torch.sub(self.Z[name], self.U[name], out=wanted)

    @torch.no_grad()
    def _project(self, layer: LayerPlan, tensor: Tensor) -> Tensor:
        # A contiguous copy: channels-last weights keep their own strides, the projection its own.
        measured = self._measured(layer.name, tensor).contiguous()
        small = measured.numel() <= _SMALL
        if (measured.is_cuda and small) or measured.device.type == "mps":  # which has no float64
            measured = measured.cpu()
        if not measured.isfinite().all():  # some decompositions would not end
            raise PlanError(f"layer {layer.name}: its weight cannot be projected: it holds infinity or NaN; {_ADVICE}")
        try:
            with _libraries().limit(limits=1, user_api="blas") if small else nullcontext():
                projected = cast(Tensor, project(layer.format, measured, layer.modes, layer.ranks)).to(tensor)
        except (np.linalg.LinAlgError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined] # documented by torch
            raise PlanError(f"layer {layer.name}: its weight cannot be projected ({error}); {_ADVICE}") from None
        root = self.roots.get(layer.name)
        projected = (root.undo(projected) if root else projected).contiguous()
        # Where nothing is cut off it may be the very weight, which trains on.
        return projected.clone() if projected.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() else projected

    def _measured(self, name: str, tensor: Tensor) -> Tensor:
        """Return what a tensor's Frobenius norm is taken of: itself, or its product with S."""
        root = self.roots.get(name)
        return root.apply(tensor) if root else tensor
