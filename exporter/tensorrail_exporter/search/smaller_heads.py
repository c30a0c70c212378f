"""Attention heads of the size that is asked for, in the network that layers are replaced in."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from tensorrail_exporter.calibrate.head_inputs import with_heads_for
from tensorrail_exporter.calibrate.split import Split
from tensorrail_exporter.graphs.head_pairs import Pairs, find_pairs
from tensorrail_exporter.plans.plan import HeadPlan
from tensorrail_exporter.rewrite.narrowed_heads import NarrowedHeads, narrowed_heads
from tensorrail_exporter.search.targets import Search
from tensorrail_runtime.errors import PlanError
from tensorrail_runtime.progress import Progress
from tensorrail_runtime.sessions.session import Session


@dataclass(frozen=True)
class SmallerHeads:
    """A network with smaller heads; the dense one where none are asked for."""

    model: onnx.ModelProto
    """Its graph."""
    heads: tuple[HeadPlan, ...] = ()
    """The pairs with their sizes."""
    rows: tuple[NarrowedHeads, ...] = ()
    """The same for people."""
    left: tuple[str, ...] = ()
    """Layers whose heads cannot become smaller, with the reason."""


def smaller_heads(
    model: onnx.ModelProto, search: Search, parts: Split | None, settings: Session, progress: Progress
) -> SmallerHeads:
    """Return the network in which all heads that can be found have the size that is asked for.

    Args:
        model: the dense model; it is not changed.
        search: the size, and which layers stay as they are.
        parts: calibration inputs, whose second moments say what matters; None: the weights alone are approximated.
        settings: how the model runs.
        progress: told what is done.

    Raises:
        PlanError: no heads of the model can become smaller; the message says why.
        GraphError: weights or inputs of layers are not finite.

    """
    if search.heads is None:
        return SmallerHeads(model)
    if search.max_loss is not None:
        raise PlanError(
            "heads: expected no max_loss with it, got both: losses count from the network with smaller heads; limit how far "
            "outputs may differ instead, which counts from the dense network"
        )
    pairs = find_pairs(model)
    plans = _plans(pairs, search)
    progress("narrowing attention heads", 0.0)
    sizes = {plan.weights: plan.size for plan in plans}
    narrowed = with_heads_for(model, sizes, None if parts is None else parts.fitted, settings)
    progress("narrowing attention heads", 1.0, f"{len(plans)} pairs of layers")
    left = tuple(f"{name}: {reason}" for name, reason in pairs.refused.items())
    return SmallerHeads(narrowed, plans, narrowed_heads(model, plans), left)


def _plans(pairs: Pairs, search: Search) -> tuple[HeadPlan, ...]:
    scores, outputs = search.heads if isinstance(search.heads, tuple) else (search.heads, search.heads)
    plans = []
    for pair in pairs.found:
        size = scores if pair.scores else outputs
        if size is not None and size < pair.size and not any(search.keeps(name) for name in pair.names):
            plans.append(HeadPlan(weights=pair.names, size=size))
    if plans:
        return tuple(plans)
    if pairs.found:
        known = ", ".join(sorted({str(pair.size) for pair in pairs.found}, key=int))
        raise PlanError(
            f"heads: expected a size below that of the model's heads ({known}), got {search.heads}, or all are kept"
        )
    reasons = "; ".join(f"{name}: {reason}" for name, reason in list(pairs.refused.items())[:3])
    raise PlanError(f"heads: no attention was found whose heads can become smaller{f' ({reasons})' if reasons else ''}")
