"""From a few lines of a recipe to a plan: patterns of layer names, a format, modes and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from tensorrail_exporter.errors import PlanError
from tensorrail_exporter.formats import format_of
from tensorrail_exporter.plan import LayerPlan, Plan
from tensorrail_trainer.layers import spec_of


def plan_layers(
    model: nn.Module,
    pattern: str,
    *,
    format: str = "tt",  # noqa: A002 - the record's own word
    ranks: int | Sequence[int],
    modes: Sequence[int] | None = None,
    merge: str = "sides",
) -> tuple[LayerPlan, ...]:
    """Return a plan for every convolution and linear layer whose name matches the pattern (`*` and `?` as in a shell).

    One number as `ranks` is an upper bound for every rank between the modes, lowered where fewer exist; a list holds
    r_0 … r_d and is taken as it is. `PlanError` when nothing matches, or when a listed rank is larger than can exist.
    """
    form = format_of(format)
    names = [
        name
        for name, module in model.named_modules()
        if fnmatchcase(name, pattern) and isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)
    ]
    if not names:
        known = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        raise PlanError(f"no convolution or linear layer is named {pattern!r}; the model has {', '.join(known)}")
    plans = []
    for name in names:
        shape = spec_of(name, model.get_submodule(name)).shape
        layer_modes = tuple(modes) if modes is not None else form.default_modes(shape)
        wanted = (1, *[ranks] * (len(layer_modes) - 1), 1) if isinstance(ranks, int) else tuple(ranks)
        layer = LayerPlan(name=name, format=format, modes=layer_modes, ranks=wanted, merge=merge)
        layer.check(shape)
        exist = form.clamp(layer_modes, wanted)
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
