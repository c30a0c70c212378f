"""From a few lines of a recipe to a plan: patterns of layer names, a format, modes and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from tensorrail_exporter.errors import PlanError
from tensorrail_exporter.formats import format_of
from tensorrail_exporter.plan import LayerPlan, Plan
from tensorrail_trainer.layers import dense_layer, dense_layers


def plan_layers(
    model: nn.Module,
    pattern: str,
    *,
    format: str = "tt",  # noqa: A002 - the record's own word
    ranks: int | Sequence[int],
    modes: Sequence[int] | None = None,
    merge: str = "auto",
) -> tuple[LayerPlan, ...]:
    """Return a plan for every layer whose name matches the pattern (`*` and `?` as in a shell).

    Convolutions and linear layers are named by their module, the layers of an LSTM or GRU by their input weight. One
    number as `ranks` is an upper bound for every rank, lowered where fewer exist; a list holds the format's own ranks.
    `PlanError` when nothing matches, or when a listed rank is larger than can exist.
    """
    form = format_of(format)
    known = dense_layers(model)
    names = [name for name in known if fnmatchcase(name, pattern)]
    if not names:
        raise PlanError(f"no layer is named {pattern!r}; the model has {', '.join(known)}")
    plans = []
    for name in names:
        shape = dense_layer(model, name).spec.shape
        layer_modes = tuple(modes) if modes is not None else form.default_modes(shape)
        wanted = form.uniform(shape, layer_modes, ranks) if isinstance(ranks, int) else tuple(ranks)
        layer = LayerPlan(name=name, format=format, modes=layer_modes, ranks=wanted, merge=merge)
        layer.check(shape)
        exist = form.clamp(shape, layer_modes, wanted)
        if not isinstance(ranks, int) and exist != wanted:
            raise PlanError(
                f"layer {name}: ranks {list(wanted)} cannot be: modes {list(layer_modes)} allow at most {list(exist)}; "
                "lower them, or give one number as an upper bound"
            )
        plans.append(layer.model_copy(update={"ranks": exist}))
    return tuple(plans)


def join(plans: Sequence[tuple[LayerPlan, ...]]) -> Plan:
    """Return one plan of all; where two patterns name the same layer, the later one holds."""
    return Plan(layers=tuple({layer.name: layer for plan in plans for layer in plan}.values()))
