"""Plans from patterns of layer names: with given ranks, or with ranks chosen to reach a target size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
from torch import Tensor, nn

from tensorrail_exporter.formats import default_modes_of, format_of
from tensorrail_exporter.plans.plan import LayerPlan, Plan
from tensorrail_exporter.search.knapsack import Limit, choose
from tensorrail_runtime.errors import PlanError
from tensorrail_trainer.admm.moments import input_roots
from tensorrail_trainer.layers.dense import DenseModule, dense_layer, dense_layers, require_trainable
from tensorrail_trainer.layers.metric import Root
from tensorrail_trainer.planning.options import AUTO, Option, Truncation, first_options, forms_of, options_around


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
    elif not isinstance(ranks, int):
        if not isinstance(ranks, list | tuple) or not ranks or not _integers(ranks):
            raise PlanError(f"ranks: expected one integer (an upper bound) or a list of the format's ranks, got {ranks!r}")
        ranks = [int(rank) for rank in ranks]
    if modes is not None and not _integers(modes):
        raise PlanError(f"modes: expected a list of integers in the format's order, got {list(modes)!r}")
    plans = []
    for name in names:
        spec = dense_layer(model, name).spec
        shape, form = spec.shape, format_of(format, spec.groups)
        layer_modes = tuple(int(mode) for mode in modes) if modes is not None else default_modes_of(format, spec)
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


def _integers(numbers: Sequence[int]) -> bool:
    return all(isinstance(number, int | np.integer) for number in numbers)


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
    format: str = AUTO,  # noqa: A002 - the name of the plan's field
    modes: Sequence[int] | None = None,
    merge: str = "auto",
    inputs: Iterable[Tensor] | None = None,
) -> tuple[LayerPlan, ...]:
    """Plan the layers of a pattern so that the whole network has `times` fewer parameters.

    The options of a layer are its dense form, and each format at a series of uniform rank bounds from rank 1, counted at the
    size at which the layer runs. Of many bounds, a few are tried first, then others near the chosen one: the size is met
    closely.
    The loss of an option is the share of the weight's squared norm that it truncates, or with `inputs` the share of the
    layer's outputs: ‖(W − Z) S‖² / ‖W S‖², where S² is the second moment of the layer's inputs
    (`tensorrail_trainer.layers.metric`). One choice over all layers minimizes the sum of the losses within the budget; a layer
    may stay dense.

    Args:
        model: the dense model, with trained weights: the weights of an untrained network do not differ in rank.
        pattern: layer names, as for `plan_layers`.
        times: the ratio of the parameters of the dense network to those of the factored network, above 1.
        format: as for `plan_layers`; default `auto`: `tt` or a split of `svd`, for each layer the one that loses least;
            with `modes` it is `tt`.
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
    roots = {} if inputs is None else input_roots(model, Plan(layers=layers), inputs)
    return plan_by_metric(model, pattern, times, roots, format=format, modes=modes, merge=merge)


def plan_by_metric(
    model: nn.Module,
    pattern: str,
    times: float,
    roots: Mapping[str, Root],
    *,
    format: str = AUTO,  # noqa: A002 - the name of the plan's field
    modes: Sequence[int] | None = None,
    merge: str = "auto",
) -> tuple[LayerPlan, ...]:
    """Return the plan of `plan_to_size` in a metric that was measured before: by layer name, empty for that of the weights."""
    layers = _layers_of(model, pattern, format, modes, merge)
    losses = [_truncation(dense, roots.get(forms[0].name)) for dense, forms in layers]
    options = [first_options(forms, dense, lost) for (dense, forms), lost in zip(layers, losses, strict=True)]
    first = _within(options, model, pattern, times)
    for tried, chosen, (dense, _), lost in zip(options, first, layers, losses, strict=True):
        tried.extend(options_around(tried, chosen, dense, lost))
    return _plans(_within(options, model, pattern, times))


def _truncation(dense: DenseModule, root: Root | None) -> Truncation:
    weight = dense.weight().detach().float()
    measured = weight if root is None else root.apply(weight.to(root.root))
    return Truncation(measured.cpu().contiguous(), dense.spec.groups)


def any_plan_to_size(
    model: nn.Module,
    pattern: str,
    times: float,
    *,
    format: str = AUTO,  # noqa: A002 - the name of the plan's field
    modes: Sequence[int] | None = None,
    merge: str = "auto",
) -> tuple[LayerPlan, ...]:
    """Return any plan of the size that `plan_to_size` plans for, with its arguments and errors.

    It decomposes no weight: it shows what an untrained network will be planned to.
    """
    layers = _layers_of(model, pattern, format, modes, merge)
    options = [first_options(forms, dense, lambda _: 0.0) for dense, forms in layers]
    return _plans(_within(options, model, pattern, times))


def unranked(
    model: nn.Module,
    pattern: str,
    format: str = AUTO,  # noqa: A002 - the name of the plan's field
    modes: Sequence[int] | None = None,
    merge: str = "auto",
) -> tuple[LayerPlan, ...]:
    """Return every layer of a pattern at rank 1, in the first of the forms that `plan_to_size` tries; arguments as there."""
    return tuple(forms[0] for _, forms in _layers_of(model, pattern, format, modes, merge))


def _layers_of(
    model: nn.Module, pattern: str, form: str, modes: Sequence[int] | None, merge: str
) -> list[tuple[DenseModule, tuple[LayerPlan, ...]]]:
    """Return every layer of a pattern with its forms at rank 1."""
    if form == AUTO and modes is not None:
        form = "tt"
    if form != AUTO:
        require_trainable(form)
        format_of(form)
    found = [(name, dense_layer(model, name)) for name in _matching(model, pattern)]
    return [(dense, forms_of(name, dense.spec, form, modes, merge)) for name, dense in found]


def _within(options: Sequence[Sequence[Option]], model: nn.Module, pattern: str, times: float) -> list[Option]:
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


def _plans(options: Iterable[Option]) -> tuple[LayerPlan, ...]:
    return tuple(option.plan for option in options if option.plan is not None)
