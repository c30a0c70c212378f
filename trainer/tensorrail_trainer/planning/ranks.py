"""From a few lines of a recipe to a plan: patterns of layer names, a format, modes and ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
from torch import Tensor, nn

from tensorrail_exporter.formats import format_of, project
from tensorrail_exporter.formats.contraction import LayerSpec
from tensorrail_exporter.plans.plan import LayerPlan, Plan
from tensorrail_exporter.search.knapsack import Limit, choose
from tensorrail_exporter.search.options import option_for
from tensorrail_runtime.errors import PlanError
from tensorrail_trainer.layers.dense import dense_layer, dense_layers

_RUNGS = 32


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
    names = _matching(model, pattern)
    if isinstance(ranks, np.integer):
        ranks = int(ranks)
    elif not isinstance(ranks, int | list | tuple) or ranks == []:
        raise PlanError(f"ranks: expected one integer (an upper bound) or a list of the format's ranks, got {ranks!r}")
    if modes is not None and not all(isinstance(mode, int | np.integer) for mode in modes):
        raise PlanError(f"modes: expected a list of integers in the format's order, got {list(modes)!r}")
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
                f"layer {name}: expected ranks of at most {list(exist)} for modes {list(layer_modes)}, got {list(wanted)}; "
                "lower them, or give one number as an upper bound"
            )
        plans.append(layer.model_copy(update={"ranks": exist}))
    return tuple(plans)


def _matching(model: nn.Module, pattern: str) -> list[str]:
    """Return the layers of a pattern; `PlanError` says why a layer that is named outright is none, or what there is."""
    known = dense_layers(model)
    names = [name for name in known if fnmatchcase(name, pattern)]
    if not names:
        if pattern in dict(model.named_modules()):
            dense_layer(model, pattern)
        raise PlanError(f"no layer matches {pattern!r}; the layers that can be factored are: {', '.join(known) or 'none'}")
    if "" in names:
        raise PlanError(
            "expected a model that contains layers, got a single layer, which has no name; put it in an nn.Sequential"
        )
    return names


def join(plans: Sequence[tuple[LayerPlan, ...]]) -> Plan:
    """Return one plan of all; where two patterns name the same layer, the later one holds."""
    return Plan(layers=tuple({layer.name: layer for plan in plans for layer in plan}.values()))


def plan_to_size(
    model: nn.Module,
    pattern: str,
    times: float,
    *,
    format: str = "tt",  # noqa: A002 - the record's own word
    modes: Sequence[int] | None = None,
    merge: str = "auto",
    trained: bool = True,
) -> tuple[LayerPlan, ...]:
    """Return a plan for the layers of a pattern that makes the whole network's parameters `times` fewer.

    Each layer is offered its dense form and a ladder of uniform rank bounds, at the size at which it runs; the loss of one is
    the share of the weight's squared norm that it cuts off, and the least sum of losses within the budget is chosen for all
    layers at once. The model's weights should be trained ones: those of a fresh network are all alike. Where they are not,
    `trained=False` spares the decompositions and returns any plan of that size. A layer may stay dense. `PlanError` when the
    layers of the pattern cannot shrink that much.
    """
    form = format_of(format)
    names = _matching(model, pattern)
    offers: list[list[LayerPlan | None]] = []
    sizes: list[list[float]] = []
    losses: list[list[float]] = []
    for name in names:
        dense = dense_layer(model, name)
        weight = dense.weight().detach().float().cpu().contiguous()
        shape = tuple(weight.shape)
        own = tuple(modes) if modes is not None else form.default_modes(shape)
        offers.append([None])
        sizes.append([float(weight.numel())])
        losses.append([0.0])
        for rung, size in _ladder(LayerPlan(name=name, format=format, modes=own, ranks=(1,), merge=merge), dense.spec):
            offers[-1].append(rung)
            sizes[-1].append(float(size))
            losses[-1].append(_cut_off(weight, format, own, rung.ranks) if trained else 0.0)
    whole = sum(parameter.numel() for parameter in model.parameters())
    rest = whole - sum(one[0] for one in sizes)
    least = rest + sum(min(one) for one in sizes)
    if least * times > whole:
        raise PlanError(
            f"parameters cannot be reduced {times:g}×: at most {whole / least:.2f}× is reachable, with all layers of "
            f"{pattern!r} at rank 1; lower params, or match more layers"
        )
    picks = choose(losses, [Limit("params", sizes, whole / times - rest)])
    return tuple(plan for offer, pick in zip(offers, picks, strict=True) if (plan := offer[pick]) is not None)


def _cut_off(weight: Tensor, format: str, modes: tuple[int, ...], ranks: tuple[int, ...]) -> float:  # noqa: A002
    """Return the share of a weight's squared norm that its projection leaves out."""
    lost = (weight - project(format, weight, modes, ranks)).square().sum()
    return float(lost / weight.square().sum().clamp_min(1e-30))


def _ladder(layer: LayerPlan, spec: LayerSpec) -> list[tuple[LayerPlan, int]]:
    """Return the layer at the distinct ranks that rising bounds give, at most `_RUNGS`, each smaller than dense, and its size.

    The size is what the layer stores as it runs: neighbouring cores may be joined.
    """
    form = format_of(layer.format)

    def at(bound: int) -> tuple[LayerPlan, int]:
        ranks = form.clamp(spec.shape, layer.modes, form.uniform(spec.shape, layer.modes, bound))
        plan = layer.model_copy(update={"ranks": ranks})
        return plan, option_for(plan, spec).params

    dense, low = math.prod(spec.shape), 0
    high = max(form.clamp(spec.shape, layer.modes, form.uniform(spec.shape, layer.modes, dense))) + 1
    while high - low > 1:  # the largest bound below dense
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle)[1] < dense else (low, middle)
    bounds = sorted({max(1, round(low * k / _RUNGS)) for k in range(1, _RUNGS + 1)}) if low else []
    return list({plan.ranks: (plan, size) for plan, size in map(at, bounds)}.values())
