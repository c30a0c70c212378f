"""Plans from patterns of layer names: with given ranks, or with ranks chosen to reach a target size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise

import numpy as np
from torch import Tensor, nn

from tensorrail_exporter.formats import default_modes_of, format_of, project
from tensorrail_exporter.formats.contraction import LayerSpec
from tensorrail_exporter.plans.plan import LayerPlan, Plan
from tensorrail_exporter.search.knapsack import Limit, choose
from tensorrail_exporter.search.options import option_for
from tensorrail_runtime.errors import PlanError
from tensorrail_trainer.admm.moments import input_roots
from tensorrail_trainer.layers.dense import DenseModule, dense_layer, dense_layers, require_trainable
from tensorrail_trainer.layers.metric import Root

_RUNGS = 32  # bounds on the ranks of a layer that are tried first
_BETWEEN = 7  # bounds that are then tried between the chosen one and each of its neighbours

_Loss = Callable[[Tensor, LayerPlan, int], float]
"""Returns the loss of a plan, from the dense weight and its number of groups."""


def plan_layers(
    model: nn.Module,
    pattern: str,
    *,
    format: str = "tt",  # noqa: A002 - the name of the plan's field
    ranks: int | Sequence[int],
    modes: Sequence[int] | None = None,
    merge: str = "auto",
) -> tuple[LayerPlan, ...]:
    """Plan every layer of a model whose name matches a pattern.

    Args:
        model: the dense model.
        pattern: layer names, with `*` and `?` as in a shell. Convolutions, linear layers and embeddings are named by their
            module, a layer of an LSTM or GRU by its input weight, such as `rnn.weight_ih_l0`, and the projections of query, key
            and value of attention by theirs, such as `attn.in_proj_weight`.
        format: `tt` (default), `tr`, `tucker`, `cp`, `svd` or `ttm`.
        ranks: an integer is an upper bound for every rank, lowered where the shape allows less; a list holds the ranks in the
            format's order.
        modes: the modes in the format's order; default: the format's default modes for the shape of the layer. Those of a
            convolution in groups are the modes of one group's weight. In `ttm` the product of an embedding's modes of entries
            may be larger than their number, with the first of these modes as small as it can be.
        merge: which neighbouring cores are merged for execution; default `auto`: the cheapest.

    Returns:
        One `LayerPlan` per matching layer, in the order of the model. `Plan(layers=...)` makes a plan of them.

    Raises:
        PlanError: no layer matches, a layer cannot be factored, or a listed rank is larger than the shape allows.

    """
    require_trainable(format)
    format_of(format)
    names = _matching(model, pattern)
    if isinstance(ranks, np.integer):
        ranks = int(ranks)
    elif not isinstance(ranks, int | list | tuple) or ranks == []:
        raise PlanError(f"ranks: expected one integer (an upper bound) or a list of the format's ranks, got {ranks!r}")
    if modes is not None and not all(isinstance(mode, int | np.integer) for mode in modes):
        raise PlanError(f"modes: expected a list of integers in the format's order, got {list(modes)!r}")
    plans = []
    for name in names:
        spec = dense_layer(model, name).spec
        shape, form = spec.shape, format_of(format, spec.groups)
        layer_modes = tuple(modes) if modes is not None else default_modes_of(format, spec)
        requested = form.uniform(shape, layer_modes, ranks) if isinstance(ranks, int) else tuple(ranks)
        layer = LayerPlan(name=name, format=format, modes=layer_modes, ranks=requested, merge=merge)
        layer.check_layer(spec)
        clamped = form.clamp(shape, layer_modes, requested)
        if not isinstance(ranks, int) and clamped != requested:
            raise PlanError(
                f"layer {name}: expected ranks of at most {list(clamped)} for modes {list(layer_modes)}, got {list(requested)};"
                " lower them, or give one number as an upper bound"
            )
        plans.append(layer.model_copy(update={"ranks": clamped}))
    return tuple(plans)


def _matching(model: nn.Module, pattern: str) -> list[str]:
    """Return the layers that match a pattern; recurrent weights only if the pattern has `weight_hh` in it.

    Raises `PlanError` if there is none, with the reason or the known layers.
    """
    known = dense_layers(model, recurrent="weight_hh" in pattern)
    names = [name for name in known if fnmatchcase(name, pattern)]
    if not names:
        if pattern in {**dict(model.named_modules()), **dict(model.named_parameters())}:
            dense_layer(model, pattern)
        raise PlanError(f"no layer matches {pattern!r}; the layers that can be factored are: {', '.join(known) or 'none'}")
    if "" in names:
        raise PlanError(
            "expected a model that contains layers, got a single layer, which has no name; put it in an nn.Sequential"
        )
    return names


def join(plans: Sequence[tuple[LayerPlan, ...]]) -> Plan:
    """Combine plans into one. If two of them plan the same layer, the later one applies."""
    return Plan(layers=tuple({layer.name: layer for plan in plans for layer in plan}.values()))


def plan_to_size(
    model: nn.Module,
    pattern: str,
    times: float,
    *,
    format: str = "tt",  # noqa: A002 - the name of the plan's field
    modes: Sequence[int] | None = None,
    merge: str = "auto",
    inputs: Iterable[Tensor] | None = None,
) -> tuple[LayerPlan, ...]:
    """Plan the layers of a pattern so that the whole network has `times` fewer parameters.

    The options of a layer are its dense form and a series of uniform rank bounds from rank 1, counted at the size at which the
    layer runs. Of many bounds, a few are tried first, then others near the chosen one: the size is met closely.
    The loss of an option is the share of the weight's squared norm that it truncates, or with `inputs` the share of the
    layer's outputs: ‖(W − Z) S‖² / ‖W S‖², where S² is the second moment of the layer's inputs
    (`tensorrail_trainer.layers.metric`). One choice over all layers minimizes the sum of the losses within the budget; a layer
    may stay dense.

    Args:
        model: the dense model, with trained weights: the weights of an untrained network do not differ in rank.
        pattern: layer names, as for `plan_layers`.
        times: the ratio of the parameters of the dense network to those of the factored network, above 1.
        format: as for `plan_layers`.
        modes: as for `plan_layers`.
        merge: as for `plan_layers`.
        inputs: batches of inputs of the model, on its device, such as some hundred training samples; default: none. The
            inputs of every layer must be one mode of its format.

    Returns:
        One `LayerPlan` per layer that does not stay dense.

    Raises:
        PlanError: no layer matches, the layers cannot become that small, or a layer has several input modes or saw none of the
            `inputs`.

    """
    layers = unranked(model, pattern, format, modes, merge)
    roots = {} if inputs is None else input_roots(model, Plan(layers=tuple(layers)), inputs)
    return plan_by_metric(model, pattern, times, roots, format=format, modes=modes, merge=merge)


def plan_by_metric(
    model: nn.Module,
    pattern: str,
    times: float,
    roots: Mapping[str, Root],
    *,
    format: str = "tt",  # noqa: A002 - the name of the plan's field
    modes: Sequence[int] | None = None,
    merge: str = "auto",
) -> tuple[LayerPlan, ...]:
    """Return the plan of `plan_to_size` in a metric that was measured before: by layer name, empty for that of the weights."""
    layers = unranked(model, pattern, format, modes, merge)

    def lost(weight: Tensor, plan: LayerPlan, groups: int) -> float:
        root = roots.get(plan.name)
        return _truncated_share(weight if root is None else root.apply(weight.to(root.root)).cpu().contiguous(), plan, groups)

    modules = [dense_layer(model, layer.name) for layer in layers]
    options = [_first_options(layer, dense, lost) for layer, dense in zip(layers, modules, strict=True)]
    first = _within(options, model, pattern, times)
    for layer, dense, tried, chosen in zip(layers, modules, options, first, strict=True):
        tried.extend(_options(layer, dense, _around(tried, chosen), lost))
    return _plans(_within(options, model, pattern, times))


def any_plan_to_size(
    model: nn.Module,
    pattern: str,
    times: float,
    *,
    format: str = "tt",  # noqa: A002 - the name of the plan's field
    modes: Sequence[int] | None = None,
    merge: str = "auto",
) -> tuple[LayerPlan, ...]:
    """Return any plan of the size that `plan_to_size` plans for, with its arguments and errors.

    It decomposes no weight: it shows what an untrained network will be planned to.
    """
    layers = unranked(model, pattern, format, modes, merge)
    options = [_first_options(layer, dense_layer(model, layer.name), lambda *_: 0.0) for layer in layers]
    return _plans(_within(options, model, pattern, times))


def unranked(
    model: nn.Module,
    pattern: str,
    format: str = "tt",  # noqa: A002 - the name of the plan's field
    modes: Sequence[int] | None = None,
    merge: str = "auto",
) -> list[LayerPlan]:
    """Return the plans at rank 1 of all layers of a pattern, any of which `plan_to_size` may choose; arguments as there."""
    require_trainable(format)
    format_of(format)
    layers = []
    for name in _matching(model, pattern):
        spec = dense_layer(model, name).spec
        form = format_of(format, spec.groups)
        chosen = tuple(modes) if modes is not None else default_modes_of(format, spec)
        ranks = form.uniform(spec.shape, chosen, 1)
        layers.append(LayerPlan(name=name, format=format, modes=chosen, ranks=ranks, merge=merge))
        layers[-1].check_layer(spec)
    return layers


@dataclass(frozen=True)
class _Option:
    """One form that a layer can have."""

    bound: int
    """The bound on its ranks; 0 for the dense form."""
    plan: LayerPlan | None
    """Its plan; None for the dense form."""
    params: float
    """The number of stored parameters of the layer as it runs: neighbouring cores may be merged."""
    loss: float


def _first_options(layer: LayerPlan, dense: DenseModule, loss: _Loss) -> list[_Option]:
    """Return the dense form of a layer and its plans at the bounds of `_ladder`."""
    whole = _Option(0, None, float(dense.weight().numel()), 0.0)
    return [whole, *_options(layer, dense, _ladder(layer, dense.spec), loss)]


def _options(layer: LayerPlan, dense: DenseModule, bounds: Iterable[int], loss: _Loss) -> list[_Option]:
    weight = dense.weight().detach().float().cpu().contiguous()
    options = []
    for bound in bounds:
        plan, params = _at(layer, dense.spec, bound)
        options.append(_Option(bound, plan, float(params), loss(weight, plan, dense.spec.groups)))
    return options


def _at(layer: LayerPlan, spec: LayerSpec, bound: int) -> tuple[LayerPlan, int]:
    """Return the plan of a layer with a bound on its ranks, and its number of stored parameters."""
    form = format_of(layer.format, spec.groups)
    ranks = form.clamp(spec.shape, layer.modes, form.uniform(spec.shape, layer.modes, bound))
    plan = layer.model_copy(update={"ranks": ranks})
    return plan, option_for(plan, spec).params


def _within(options: Sequence[Sequence[_Option]], model: nn.Module, pattern: str, times: float) -> list[_Option]:
    """Choose an option for each layer, with the least sum of losses within the budget; raises `PlanError` if none fits."""
    total = sum(parameter.numel() for parameter in model.parameters())
    rest = total - sum(layer[0].params for layer in options)
    smallest = rest + sum(min(option.params for option in layer) for layer in options)
    if smallest * times > total:
        raise PlanError(
            f"parameters cannot be reduced {times:g}×: at most {total / smallest:.2f}× is reachable, with all layers of "
            f"{pattern!r} at rank 1; lower params, or match more layers"
        )
    budget = Limit("params", [[option.params for option in layer] for layer in options], total / times - rest)
    picks = choose([[option.loss for option in layer] for layer in options], [budget])
    return [layer[pick] for layer, pick in zip(options, picks, strict=True)]


def _plans(options: Iterable[_Option]) -> tuple[LayerPlan, ...]:
    return tuple(option.plan for option in options if option.plan is not None)


def _truncated_share(weight: Tensor, plan: LayerPlan, groups: int) -> float:
    """Return the share of a weight's squared norm that its projection truncates."""
    lost = (weight - project(plan.format, weight, plan.modes, plan.ranks, groups)).square().sum()
    return float(lost / weight.square().sum().clamp_min(1e-30))


def _ladder(layer: LayerPlan, spec: LayerSpec) -> list[int]:
    """Return rising bounds on the ranks of a layer, from 1 to the largest with which it is smaller than the dense layer.

    These are all bounds if there are at most `_RUNGS`, else so many with about equal ratios; none if even rank 1 is too large.
    """
    form = format_of(layer.format, spec.groups)
    dense, low = math.prod(spec.shape), 0
    high = max(form.clamp(spec.shape, layer.modes, form.uniform(spec.shape, layer.modes, dense))) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _at(layer, spec, middle)[1] < dense else (low, middle)
    if low <= _RUNGS:
        return list(range(1, low + 1))
    return sorted({round(bound) for bound in np.geomspace(1, low, _RUNGS).tolist()})


def _around(options: Sequence[_Option], chosen: _Option) -> list[int]:
    """Return at most `_BETWEEN` bounds between a chosen option and each of its neighbours; none around the dense form."""
    bounds = sorted(option.bound for option in options if option.plan is not None)
    if chosen.plan is None:
        return []
    place = bounds.index(chosen.bound)
    ends = pairwise(bounds[max(0, place - 1) : place + 2])
    spread = {round(bound) for low, high in ends for bound in np.linspace(low, high, _BETWEEN + 2).tolist()}
    return sorted(spread.difference(bounds))
