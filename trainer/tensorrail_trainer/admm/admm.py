r"""ADMM toward low tensor rank (Yin, Sui, Liao and Yuan, CVPR 2021; Boyd et al. 2011, chapter 3, scaled form).

The problem

.. math:: \min_W \; ℓ(W) \quad \text{s.t.} \quad \operatorname{rank}(W) ≤ r^*

is split by a copy Z of the weights, which satisfies the constraint, and a scaled dual variable U. The network trains W with
the penalty

.. math:: ℓ(W) + \tfrac{ρ}{2} ‖W − Z + U‖_F^2

and every epoch, or every k steps, Z and U are updated:

.. math:: Z ← \operatorname{project}(W + U), \qquad U ← U + W − Z.

The network stays dense during training. At the end its weights are close to their projections, so that decomposing them
into cores costs little accuracy.

With `metric="activation"` distances are measured by the change of the layer's outputs: ‖·S‖, where S is the square root of the
second moment of the layer's inputs (`tensorrail_trainer.layers.metric`). The set of weights of low rank is the same, since S
is invertible. Then

.. math:: ℓ(W) + \tfrac{ρ}{2} ‖(W - Z + U) S‖_F^2, \qquad Z ← \operatorname{project}((W + U) S) \, S^{-1}.

S is the identity until the first update. Each update first computes a new S′ from the moments, then Z. U does not change when
S becomes S′: U is in the space of weights, and W + U, the point that is projected, does not depend on the metric. What changes
is the multiplier ρUS². Keeping the multiplier instead would require U S² S′⁻², which is large in directions that hardly occur
in the inputs, where U matters least. When the moments converge, S′ equals S and both rules agree, so the fixed points are those
of ADMM with the final S. With tr S² = I the mean curvature of the penalty is ρ in both metrics. Its largest curvature, ρ times
the largest eigenvalue of S², can be up to I times larger here: if training diverges, lower rho or the learning rate.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, distributed, nn

from tensorrail_exporter.formats import project
from tensorrail_exporter.plans.plan import LayerPlan, Plan
from tensorrail_runtime.errors import PlanError
from tensorrail_trainer.admm.moments import InputMoments, moment_shape
from tensorrail_trainer.admm.state import projections_of, require_state
from tensorrail_trainer.admm.threads import SMALL, one_thread_if_small
from tensorrail_trainer.layers.dense import at_least_single, planned_layers, require_values
from tensorrail_trainer.layers.metric import Root
from tensorrail_trainer.layers.swap import swap
from tensorrail_trainer.processes import Group, alike, apart, rank, shared_out, summed, world

Metric = Literal["weight", "activation"]
"""How the distance of two weights is measured: by the Frobenius norm, or by the change of the layer's outputs."""

_ADVICE = "check the weights that training started from, or lower rho or the learning rate"


@dataclass(frozen=True)
class Residual:
    """How far a layer is from its constraint after an update. All norms are taken in ADMM's metric.

    Attributes:
        layer: the name of the layer.
        primal: ‖W − Z‖ / ‖W‖, without unit.
        dual: ρ‖Z − Z_previous‖, in the unit of the loss's gradient; with `metric="activation"` in the dual norm ‖·S⁻¹‖.
        moved: ‖Z − Z_previous‖ / ‖W‖, without unit.

    """

    layer: str
    primal: float
    dual: float
    moved: float


class ADMM:
    """ADMM for the planned layers of a model: a penalty for the loss, an update, and the final factorization.

    >>> admm = ADMM(model, plan, rho=1e-3)  # doctest: +SKIP
    >>> loss = criterion(model(x), y) + admm.penalty()  # in the loop # doctest: +SKIP
    >>> admm.update()  # after each epoch # doctest: +SKIP
    >>> model = admm.factorize()  # at the end, then fine-tune # doctest: +SKIP

    Args:
        model: the dense model; its parameters are trained by your own loop and must stay the same objects.
        plan: the layers to factor, with their formats, modes and ranks.
        rho: the weight ρ of the penalty, above 0; default 1e-3, as the paper uses for hundreds of epochs. Recipes, which are
            shorter, let `admm.rho` rise from 0.01 to 0.1.
        metric: `weight` (default) for the Frobenius norm, or `activation` for the change of the layer's outputs. The latter
            registers hooks that gather the second moments of the layers' inputs in training mode; `factorize` and `close`
            remove them.
        group: the processes that train this model together, which share out the projections: with several processes, all
            of them must hold the same weights. Default: all processes of `torch.distributed`.

    Attributes:
        Z: the projection of every planned weight, (O, I, *K) or (O, I), by layer name; at first the plain projection. In
            float32 for weights in half precision, as U: small steps would be lost in rounding.
        U: the scaled dual variables, of the same shapes; at first zeros.

    Raises:
        PlanError: the plan is empty or does not fit the model, its layers are on several devices, a weight has no finite
            values, or `metric="activation"` and the plan splits the inputs of a layer into several modes.
        ValueError: rho is not positive, or the metric is unknown.

    References:
        Yin, Sui, Liao and Yuan, Towards Efficient Tensor Decomposition-Based DNN Model Compression with Optimization
        Framework, CVPR 2021.

    """

    def __init__(
        self, model: nn.Module, plan: Plan, rho: float = 1e-3, metric: Metric = "weight", group: Group | None = None
    ) -> None:
        if not 0 < rho < math.inf:
            raise ValueError(f"rho: expected a positive number, got {rho}; the paper uses 0.001")
        if not plan.layers:
            raise PlanError("expected a plan with at least one layer, got an empty plan; add a layer to train toward low rank")
        if metric not in get_args(Metric):
            raise ValueError(f"unknown metric {metric!r}: expected one of {', '.join(get_args(Metric))}")
        self.model, self.plan, self.rho, self.metric = model, plan, rho, metric
        self.roots: dict[str, Root] = {}  # S of every layer, of the last update; empty for the plain metric
        self._layers, self._group = planned_layers(model, plan), group
        devices = {str(dense.parameters[0].device): name for name, dense in self._layers.items()}
        if len(devices) > 1:
            where = ", ".join(f"{name} on {device}" for device, name in devices.items())
            raise PlanError(f"expected all planned layers on one device, got {where}: move the model to one of them")
        for name, dense in self._layers.items():
            require_values(name, dense)
        self._norms: dict[str, tuple[float, ...]] = {}  # of the last update: ‖W − Z‖, ‖Z − Z_previous‖, ‖W‖, ‖Z‖
        self.Z = {layer.name: self._project(layer, self._weight(layer.name)) for layer in plan.layers}
        self.U = {name: torch.zeros_like(z) for name, z in self.Z.items()}
        self._moments = InputMoments(plan, self._layers, group, model=model) if metric == "activation" else None
        self._place()

    def penalty(self) -> Tensor:
        """Return the penalty to add to the loss of each step.

        Returns:
            ρ/2 Σ‖W − Z + U‖² over the planned layers, a scalar on the device of the weights, differentiable.

        """
        gaps = {name: dense.weight() - self._targets[name] for name, dense in self._layers.items()}
        return self._half_rho * torch.stack([self._measured(name, gap).square().sum() for name, gap in gaps.items()]).sum()

    def add_gradients(self, of: Iterable[Tensor] | None = None) -> bool:
        """Add the gradient of the penalty to those of the weights, where a loop does not let its loss be changed.

        Call it before each step of the optimizer, once gradients were accumulated and averaged over processes: it is the same
        on all of them.

        Args:
            of: parameters, such as those of one of several optimizers; the others get no gradient. Default: all.

        Returns:
            Whether any parameter got a gradient.

        """
        wanted = None if of is None else {id(parameter) for parameter in of}
        parameters = [
            parameter
            for dense in self._layers.values()
            for parameter in dense.parameters
            if parameter.requires_grad and (wanted is None or id(parameter) in wanted)
        ]
        if not parameters:
            return False
        gradients = torch.autograd.grad(self.penalty(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                own = gradient.to(parameter.dtype)
                parameter.grad = own if parameter.grad is None else parameter.grad + own
        return True

    @torch.no_grad()
    def update(self) -> tuple[Residual, ...]:
        """Update Z ← project(W + U) and U ← U + W − Z for every planned layer.

        Call it after each epoch, or every k steps. With `metric="activation"` S is computed first. With several processes
        (`torch.distributed`) all of them call it, and each projects a part of the layers.

        Returns:
            The residuals of every planned layer.

        Raises:
            PlanError: a layer has seen no batch in training mode (`metric="activation"`), the model no longer holds its
                parameters, a weight cannot be projected, or the processes hold different weights.

        """
        self._require_own()
        self._measure()
        weights = {name: self._weight(name) for name in self._layers}
        points = {name: w + self.U[name] for name, w in weights.items()}
        residuals = []
        for name, z in self._projected(points).items():
            before, self.Z[name], self.U[name] = self.Z[name], z, points[name].sub_(z)
            residuals.append(self._residual(name, weights[name], z, before))
        self._changed()
        return tuple(residuals)

    @torch.no_grad()
    def project_weights(self) -> tuple[Residual, ...]:
        """Replace every planned weight by its projection, in place, with Z = W and U = 0 (hard projection).

        With `metric="activation"` S is computed first, as by `update`.

        Returns:
            The residuals; `primal` is the distance of the weights from their projections before the call.

        Raises:
            PlanError: as for `update`.

        """
        self._require_own()
        self._measure()
        weights = {name: self._weight(name).clone() for name in self._layers}
        residuals = []
        for name, z in self._projected(weights).items():
            before, self.Z[name], self.U[name] = self.Z[name], z, torch.zeros_like(z)
            self._layers[name].put(z)
            residuals.append(self._residual(name, weights[name], z, before))
        self._changed()
        return tuple(residuals)

    @torch.no_grad()
    def project_copy(self, model: nn.Module) -> None:
        """Replace the planned weights of a copy of the model, such as its average, by their projections; Z and U stay."""
        layers = planned_layers(model, self.plan)
        weights = {name: at_least_single(dense.weight().detach()) for name, dense in layers.items()}
        for name, z in self._projected(weights).items():
            layers[name].put(z)

    def _measure(self) -> None:
        """Take the metric from the moments of the batches so far; raises `PlanError` if a layer has seen none."""
        if self._moments is not None:
            self.roots = self._moments.roots()

    def _require_own(self) -> None:
        """Raise `PlanError` if the model no longer holds ADMM's parameters: the penalty would have no effect on it."""
        current = {id(parameter) for parameter in self.model.parameters()}
        for name, dense in self._layers.items():
            if not all(id(parameter) in current for parameter in dense.parameters):
                raise PlanError(
                    f"layer {name}: the model no longer holds the weight that ADMM was created with (factored, replaced, "
                    "or loaded with assign=True); create a new ADMM object"
                )

    def synchronize(self) -> None:
        """Make the state equal on all processes, so that one of them can save it. All processes call it, between steps.

        Otherwise the moments of `metric="activation"` come from this process's batches only, until the next update.
        """
        if self._moments is not None:
            self._moments.synchronize()

    def set_rho(self, rho: float) -> None:
        """Change the weight of the penalty, and rescale U so that the multiplier ρU does not change (Boyd et al., 3.4.1).

        Args:
            rho: the new weight, above 0.

        Raises:
            ValueError: rho is not positive.

        """
        if not 0 < rho < math.inf:
            raise ValueError(f"rho: expected a positive number, got {rho}")
        if rho != self.rho:
            self.U = {name: u * (self.rho / rho) for name, u in self.U.items()}
            self.rho = rho
            self._changed()

    @torch.no_grad()
    def balance(self, apart: float = 10.0, factor: float = 2.0) -> None:
        """Adapt rho to the residuals of the last update (residual balancing; Wohlberg 2017).

        The relative residuals over all layers are ‖W − Z‖ / max(‖W‖, ‖Z‖), primal, and ‖Z − Z_previous‖ / ‖U‖, dual. They do
        not depend on the scale of the weights.

        Args:
            apart: rho changes if one residual is more than this many times the other; above 1, default 10.
            factor: rho is multiplied by it if the primal residual is larger, else divided; above 1, default 2.

        Raises:
            ValueError: an argument is not above 1.

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
        z_norm = torch.linalg.vector_norm(self._measured(name, z))
        self._norms[name] = (float(gap), float(moved), float(size), float(z_norm))
        return Residual(name, float(gap / size), float(self.rho * moved), float(moved / size))

    @property
    def _relative(self) -> tuple[float, float]:
        gap, moved, w, z = (math.hypot(*(norms[k] for norms in self._norms.values())) for k in range(4))
        multipliers = math.hypot(*(float(torch.linalg.vector_norm(self._measured(n, u))) for n, u in self.U.items()))
        return gap / max(w, z, 1e-30), moved / max(multipliers, 1e-30)

    def _projected(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the projection of each tensor; every process of the group computes a part of them."""
        group = self._group
        self._require_alike(tensors)
        for name, tensor in tensors.items():  # on all processes: one that fails alone leaves the others waiting
            _require_finite(name, tensor)
        owners = shared_out({name: tensor.numel() * min(tensor.shape) for name, tensor in tensors.items()}, group)
        projections: dict[str, Tensor] = {}
        fault: PlanError | None = None
        try:
            for layer in self.plan.layers:
                tensor = tensors[layer.name]
                own = owners[layer.name] == rank(group)
                projections[layer.name] = self._project(layer, tensor) if own else torch.empty_like(tensor).contiguous()
        except PlanError as error:
            fault = error
        self._require_none(fault, next(iter(tensors.values())).device)
        if world(group) > 1:
            for name, owner in owners.items():
                distributed.broadcast(projections[name], group=group, group_src=owner)
        return projections

    def _require_none(self, fault: PlanError | None, device: torch.device) -> None:
        """Raise the fault of this process, or that another one has one: it alone would leave the others waiting."""
        faults = torch.tensor(int(fault is not None), device=device)
        if world(self._group) > 1:
            faults = summed(faults, self._group)
        if int(faults):
            raise fault or PlanError("another process could not project the weight of a layer; its error names the layer")

    def _require_alike(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise `PlanError` unless all processes of the group hold the same plan and, up to rounding, the same tensors."""
        if world(self._group) == 1:
            return
        described = self.plan.model_dump_json() + str([tuple(tensor.shape) for tensor in tensors.values()])
        digest = torch.tensor([zlib.crc32(described.encode()) % 2**24], device=next(iter(tensors.values())).device)
        # The plans are compared first: with others, the processes would wait for each other.
        different = "plans" if not alike(digest, self._group) else ""
        if not different and (name := apart(tensors, self._group)):
            different = f"weights of layer {name}"
        if different:
            raise PlanError(
                f"the processes of one group hold different {different}, and each would get projections of the others; give "
                "ADMM the group of the processes that train one model together, or start them from the same weights, as "
                "DistributedDataParallel does"
            )

    def _weight(self, name: str) -> Tensor:
        """Return a planned weight, detached, in single precision or wider."""
        return at_least_single(self._layers[name].weight().detach())

    def factorize(self, model: nn.Module | None = None) -> nn.Module:
        """Decompose every planned weight into cores and replace the dense layers by layers made of cores, in place.

        The weights are decomposed in ADMM's metric of the last update. To fine-tune, create a new optimizer: the old one holds
        the dense weights.

        Args:
            model: a copy of the model to factor; default the model that ADMM was created with.

        Returns:
            The factored model.

        Raises:
            PlanError: the plan does not fit `model`, or a layer has seen no batch (`metric="activation"`).

        """
        return swap(self.model if model is None else model, self.plan, roots=self.final_roots())

    def final_roots(self) -> dict[str, Root]:
        """Return the metric that `factorize` decomposes in, empty for `metric="weight"`, and remove the hooks, as `close` does.

        Raises `PlanError` if a layer has seen no batch.
        """
        if not self.roots:
            self._measure()
        self.close()
        return self.roots

    def close(self) -> None:
        """Remove the hooks of `metric="activation"` from the model. Call it if you do not call `factorize`."""
        if self._moments is not None:
            self._moments.close()

    def state_dict(self) -> dict[str, Any]:
        """Return rho, the plan, Z, U, the moments and S, to save with the state of the model and the optimizer."""
        state: dict[str, Any] = {"rho": self.rho, "metric": self.metric, "plan": projections_of(self.plan)}
        state |= {"Z": dict(self.Z), "U": dict(self.U)}
        if self._moments is not None:
            roots = {name: {"root": root.root, "inverse": root.inverse} for name, root in self.roots.items()}
            state |= {"moments": self._moments.state_dict(), "roots": roots}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned.

        Args:
            state: the state; its tensors may be on another device.

        Raises:
            PlanError: the state is incomplete, or belongs to another plan, model or metric.

        """
        specs = {name: dense.spec for name, dense in self._layers.items()}
        shapes = {name: spec.shape for name, spec in specs.items()}
        require_state(state, self.plan, self.metric, shapes, {name: moment_shape(spec) for name, spec in specs.items()})
        self.rho = float(state["rho"])
        for name, dense in self._layers.items():
            like = at_least_single(dense.parameters[0].detach())  # the state may be on another device
            self.Z[name], self.U[name] = state["Z"][name].to(like), state["U"][name].to(like)
        if self._moments is not None:
            self._moments.load_state_dict(state["moments"])
            self.roots = {
                name: Root(*(root[key].to(self.Z[name]) for key in ("root", "inverse")))
                for name, root in state["roots"].items()
            }
        self._place()

    @torch.no_grad()
    def _place(self) -> None:
        """Create the tensors that the penalty reads. Updates write into the same memory, as a CUDA graph of a step requires."""
        self._targets = {name: z - self.U[name] for name, z in self.Z.items()}
        self._half_rho = next(iter(self.Z.values())).new_tensor(self.rho / 2)

    @torch.no_grad()
    def _changed(self) -> None:
        self._half_rho.fill_(self.rho / 2)
        for name, target in self._targets.items():
            torch.sub(self.Z[name], self.U[name], out=target)

    @torch.no_grad()
    def _project(self, layer: LayerPlan, tensor: Tensor) -> Tensor:
        # Contiguous, since weights may be channels_last and the projection is not.
        measured = self._measured(layer.name, tensor).contiguous()
        small = measured.numel() <= SMALL  # small SVDs are faster on the CPU than on a GPU (PyTorch issue 41306)
        if (measured.is_cuda and small) or measured.device.type == "mps":  # MPS has no float64
            measured = measured.cpu()
        _require_finite(layer.name, measured)  # some decompositions would not terminate
        try:
            with one_thread_if_small(measured.numel()):
                groups = self._layers[layer.name].spec.groups
                projected = project(layer.format, measured, layer.modes, layer.ranks, groups).to(tensor)
        except (PlanError, np.linalg.LinAlgError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined] # documented
            raise PlanError(f"layer {layer.name}: its weight cannot be projected ({error}); {_ADVICE}") from None
        root = self.roots.get(layer.name)
        projected = (root.undo(projected) if root else projected).contiguous()
        # If nothing is truncated, it may share memory with the weight, which keeps training.
        return projected.clone() if projected.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() else projected

    def _measured(self, name: str, tensor: Tensor) -> Tensor:
        """Return the tensor whose Frobenius norm is the norm in ADMM's metric: the tensor itself, or its product with S."""
        root = self.roots.get(name)
        return root.apply(tensor) if root else tensor


def _require_finite(name: str, tensor: Tensor) -> None:
    if not tensor.isfinite().all():
        raise PlanError(f"layer {name}: its weight cannot be projected: it holds infinity or NaN; {_ADVICE}")
