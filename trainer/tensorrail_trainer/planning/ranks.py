"""Plans from patterns of layer names: with given ranks, or with ranks chosen to reach a target size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

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

_RUNGS = 32


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

    The options of a layer are its dense form and a series of uniform rank bounds, counted at the size at which the layer runs.
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

    def lost(weight: Tensor, plan: LayerPlan, groups: int) -> float:
        root = roots.get(plan.name)
        return _truncated_share(weight if root is None else root.apply(weight.to(root.root)).cpu().contiguous(), plan, groups)

    options = [_options(layer, dense_layer(model, layer.name), lost) for layer in layers]
    return _within(options, model, pattern, times)


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
    options = [_options(layer, dense_layer(model, layer.name), lambda *_: 0.0) for layer in layers]
    return _within(options, model, pattern, times)


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
class _Options:
    """What a layer can become, its dense form first."""

    plans: tuple[LayerPlan | None, ...]
    """The plans, with increasing ranks; None for the dense form."""
    params: tuple[float, ...]
    """The number of stored parameters of each option."""
    losses: tuple[float, ...]
    """The loss of each option."""


def _options(layer: LayerPlan, dense: DenseModule, loss: Callable[[Tensor, LayerPlan, int], float]) -> _Options:
    weight = dense.weight().detach().float().cpu().contiguous()
    rungs = _ladder(layer, dense.spec)
    return _Options(
        plans=(None, *(plan for plan, _ in rungs)),
        params=(float(weight.numel()), *(float(size) for _, size in rungs)),
        losses=(0.0, *(loss(weight, plan, dense.spec.groups) for plan, _ in rungs)),
    )


def _within(options: Sequence[_Options], model: nn.Module, pattern: str, times: float) -> tuple[LayerPlan, ...]:
    """Choose an option for each layer, with the least sum of losses within the budget; raises `PlanError` if none fits."""
    total = sum(parameter.numel() for parameter in model.parameters())
    rest = total - sum(layer.params[0] for layer in options)
    smallest = rest + sum(min(layer.params) for layer in options)
    if smallest * times > total:
        raise PlanError(
            f"parameters cannot be reduced {times:g}×: at most {total / smallest:.2f}× is reachable, with all layers of "
            f"{pattern!r} at rank 1; lower params, or match more layers"
        )
    budget = Limit("params", [layer.params for layer in options], total / times - rest)
    picks = choose([layer.losses for layer in options], [budget])
    return tuple(plan for layer, pick in zip(options, picks, strict=True) if (plan := layer.plans[pick]) is not None)


def _truncated_share(weight: Tensor, plan: LayerPlan, groups: int) -> float:
    """Return the share of a weight's squared norm that its projection truncates."""
    lost = (weight - project(plan.format, weight, plan.modes, plan.ranks, groups)).square().sum()
    return float(lost / weight.square().sum().clamp_min(1e-30))


def _ladder(layer: LayerPlan, spec: LayerSpec) -> list[tuple[LayerPlan, int]]:
    """Return plans of a layer with increasing ranks, at most `_RUNGS`, each smaller than the dense layer, with their sizes.

    The size is the number of stored parameters of the layer as it runs: neighbouring cores may be merged.
    """
    form = format_of(layer.format, spec.groups)

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
