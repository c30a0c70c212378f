"""The state of ADMM, as it is saved beside a model: what it must hold for a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tensorrail_exporter.plans.plan import Plan
from tensorrail_runtime.errors import PlanError

Shapes = Mapping[str, tuple[int, ...]]

_ADVICE = "use the plan and the model that it was saved with"


def projections_of(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the format, modes and ranks of each layer, which say what it is projected to, in types that JSON has."""
    return {layer.name: layer.model_dump(mode="json", include={"format", "modes", "ranks"}) for layer in plan.layers}


def require_state(state: Any, plan: Plan, metric: str, shapes: Shapes, moments: Shapes) -> None:
    """Raise `PlanError` unless a state is one that `ADMM.state_dict` returns for a plan, a metric and a model.

    Args:
        state: the state. Those of earlier versions hold no plan, and at first no metric, which was `weight`.
        plan: the plan.
        metric: the metric of ADMM.
        shapes: the shapes (O, I, *K) of the planned weights, by layer name.
        moments: the shapes of the second moments of their inputs, by layer name.

    """
    _require_keys("", state, ("rho", "Z", "U"))
    saved_metric, rho = state.get("metric", "weight"), state["rho"]
    if saved_metric != metric:
        raise PlanError(
            f"ADMM state: expected the metric {metric}, got {saved_metric}; create ADMM with metric={saved_metric!r}"
        )
    if not (isinstance(rho, int | float) and 0 < rho < math.inf):
        raise PlanError(f"ADMM state: expected a positive number as rho, got {rho}; {_ADVICE}")
    for key in ("Z", "U"):
        _require_shapes(f"{key} for the layers of the plan", state[key], shapes)
    own = projections_of(plan)
    saved = state.get("plan", own)
    for name, projection in own.items():
        if not isinstance(saved, Mapping) or saved.get(name) != projection:
            got = saved.get(name) if isinstance(saved, Mapping) else saved
            raise PlanError(f"ADMM state: layer {name}: expected {projection}, got {got}; {_ADVICE}")
    if metric == "activation":
        _require_measured(state, moments)


def _require_measured(state: Mapping[str, Any], sizes: Shapes) -> None:
    """Raise `PlanError` unless a state holds moments of the inputs, and S for all layers or for none, in these sizes."""
    _require_keys("", state, ("moments", "roots"))
    moments, roots = state["moments"], state["roots"]
    _require_keys(" of the moments", moments, ("second", "batches"))
    second, batches = moments["second"], moments["batches"]
    seen = {name: size for name, size in sizes.items() if isinstance(second, Mapping) and name in second}
    _require_shapes("second moments for layers of the plan", second, seen)
    counts = {name: 1 for name, count in batches.items() if isinstance(count, int)} if isinstance(batches, Mapping) else {}
    if counts.keys() != sizes.keys():
        raise PlanError(f"ADMM state: expected the number of batches for {', '.join(sizes)}, got {batches}; {_ADVICE}")
    if roots != {}:
        _require_keys(" of roots", roots, tuple(sizes))
        for name, root in roots.items():
            size = sizes.get(name, ())
            _require_shapes(f"root and inverse for layer {name}", root, {"root": size, "inverse": size})


def _require_keys(where: str, state: Any, keys: tuple[str, ...]) -> None:
    missing = [key for key in keys if not isinstance(state, Mapping) or key not in state]
    if missing:
        raise PlanError(
            f"ADMM state{where}: keys {', '.join(missing)} are missing; expected a dictionary that `state_dict` returned"
        )


def _require_shapes(what: str, tensors: Any, shapes: Shapes) -> None:
    entries = tensors.items() if isinstance(tensors, Mapping) else [("", tensors)]
    found = {name: tuple(entry.shape) if isinstance(entry, Tensor) else type(entry).__name__ for name, entry in entries}
    if found != dict(shapes):
        raise PlanError(f"ADMM state: expected {what}, {dict(shapes)}, got {found}; {_ADVICE}")
