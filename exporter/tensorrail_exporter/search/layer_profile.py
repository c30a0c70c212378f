"""Whether each factorized layer is faster in its network: the profiles of the dense and of the factorized network compared.

The latency table times a layer in a chain of copies, but in the network its neighbours differ. Profiling adds time to every
node of both networks, and the factorized one has more nodes: the comparison is biased against factorized layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx

from tensorrail_exporter.plans.plan import Plan
from tensorrail_exporter.rewrite.resolve import ResolvedPlan, resolve
from tensorrail_runtime.measure.placement import placement, time_shares
from tensorrail_runtime.measure.timing import Conditions

_PROFILES = 3  # profiles of each network, taken in turn


def layer_times(
    dense: Path, factored: Path, plan: Plan | ResolvedPlan, *, conditions: Conditions | None = None
) -> dict[str, tuple[float, float]]:
    """Return the time of every planned layer in the dense and in the factorized network.

    Args:
        dense: the dense model.
        factored: the factorized model.
        plan: the plan that the factorized model was made by; where it is at hand, as resolved in the dense model. Heads
            have its sizes, and layers that it joins are one, in the dense model already.
        conditions: how the models run, their batch size and shapes; default `Conditions()`.

    Returns:
        Dense and factorized milliseconds by the name of the layer: medians over profiles that are taken in turn. Layers that
        are weights of the same node have the time of both, which the dense node does not divide.

    Raises:
        ModelError: a model cannot be run.

    """
    conditions = conditions or Conditions()
    resolved = plan if isinstance(plan, ResolvedPlan) else resolve(onnx.load(dense, load_external_data=False), plan.of_layers)
    layers, ends, together = list(resolved.layers), _outputs(resolved), _together(resolved)
    profiles: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
    for _ in range(_PROFILES):
        times = [_times(path, layers, outputs, conditions) for path, outputs in ((dense, ends), (factored, None))]
        for name in layers:
            own = together[name]
            profiles[name].append((sum(times[0][one] for one in own), sum(times[1][one] for one in own)))
    return {
        name: (float(np.median([a for a, _ in pairs])), float(np.median([b for _, b in pairs])))
        for name, pairs in profiles.items()
    }


def slower_layers(times: dict[str, tuple[float, float]]) -> tuple[str, ...]:
    """Return the layers that are slower factorized than dense by more than a microsecond, the resolution of a profile.

    Args:
        times: dense and factorized milliseconds by the name of the layer, as `layer_times` returns them.

    """
    return tuple(name for name, (dense, factored) in times.items() if factored > dense + 1e-3)


def _times(path: Path, layers: Sequence[str], ends: dict[str, str] | None, conditions: Conditions) -> dict[str, float]:
    timing = conditions.timing
    placed = placement(path, settings=conditions.settings, batch=timing.batch, shapes=timing.shapes, values=timing.values)
    total = 1e-3 * sum(node.microseconds for node in placed.nodes)
    return {name: share * total for name, share in time_shares(path, placed, layers, ends).items()}


def _together(resolved: ResolvedPlan) -> dict[str, list[str]]:
    """Return, for every layer, the layers that are weights of its first node, itself included."""
    first = {name: id(layer.sites[0].node) for name, layer in resolved.layers.items()}
    return {name: [other for other, node in first.items() if node == own] for name, own in first.items()}


def _outputs(resolved: ResolvedPlan) -> dict[str, str]:
    """Return the name of the planned layer for every output of its dense nodes."""
    nodes = [(site.node, name) for name, layer in resolved.layers.items() for site in layer.sites]
    return {tensor.name: name for node, name in nodes for tensor in node.outputs if not tensor.is_empty()}
