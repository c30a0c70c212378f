"""Is each rewritten layer faster where it stands? The profiles of the dense and of the chosen network, side by side.

A layer's time in the latency table comes from a chain of its like; in the network its neighbours differ. What a profile adds to
every node it adds to both networks, and to more nodes in the factored one: the comparison errs against our own forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx

from tensorrail_exporter.plans.plan import Plan
from tensorrail_exporter.rewrite.resolve import ResolvedPlan, resolve
from tensorrail_runtime.measure.placement import placement, time_shares
from tensorrail_runtime.sessions.inputs import Shapes
from tensorrail_runtime.sessions.session import Session

_PROFILES = 3  # of each network, in turns


def layer_times(
    dense: Path,
    factored: Path,
    plan: Plan,
    *,
    settings: Session | None = None,
    batch: int = 1,
    shapes: Shapes | None = None,
    resolved: ResolvedPlan | None = None,
) -> dict[str, tuple[float, float]]:
    """Return the milliseconds of every planned layer, dense and factored: medians over profiles taken in turns.

    `resolved` is the plan in the dense model, where it is at hand.
    """
    layers = [layer.name for layer in plan.layers]
    ends = _outputs(resolved or resolve(onnx.load(dense, load_external_data=False), plan))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
    for _ in range(_PROFILES):
        times = [_times(path, layers, own, settings, batch, shapes) for path, own in ((dense, ends), (factored, None))]
        for name in layers:
            found[name].append((times[0][name], times[1][name]))
    return {
        name: (float(np.median([a for a, _ in pairs])), float(np.median([b for _, b in pairs])))
        for name, pairs in found.items()
    }


def slower_layers(times: dict[str, tuple[float, float]]) -> tuple[str, ...]:
    """Return the layers that take longer factored than dense, by more than the microsecond that a profile resolves."""
    return tuple(name for name, (dense, factored) in times.items() if factored > dense + 1e-3)


def _times(
    path: Path,
    layers: Sequence[str],
    ends: dict[str, str] | None,
    settings: Session | None,
    batch: int,
    shapes: Shapes | None,
) -> dict[str, float]:
    placed = placement(path, settings=settings, batch=batch, shapes=shapes)
    total = 1e-3 * sum(node.microseconds for node in placed.nodes)
    return {name: share * total for name, share in time_shares(path, placed, layers, ends).items()}


def _outputs(resolved: ResolvedPlan) -> dict[str, str]:
    """Return the layer of each tensor that a planned layer's dense node gives."""
    nodes = [(site.node, name) for name, layer in resolved.layers.items() for site in layer.sites]
    return {tensor.name: name for node, name in nodes for tensor in node.outputs if not tensor.is_empty()}
