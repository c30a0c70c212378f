"""The forms that a layer can have, with their sizes and losses: what `plan_to_size` chooses from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tensorrail_exporter.formats import default_modes_of, format_of, project, svd
from tensorrail_exporter.formats.contraction import LayerSpec
from tensorrail_exporter.plans.plan import LayerPlan
from tensorrail_exporter.search.options import option_for
from tensorrail_trainer.layers.dense import DenseModule

AUTO = "auto"
"""The format that stands for `tt` and every split of `svd`, of which each layer gets the one that loses least."""

_RUNGS = 32  # bounds on the ranks of a form that are tried first
_BETWEEN = 7  # bounds that are then tried between the chosen one and each of its neighbours

Lost = Callable[[LayerPlan], float]
"""Returns the share of a layer's norm that the cores of a plan lose."""


@dataclass(frozen=True)
class Option:
    """One form that a layer can have."""

    bound: int
    """The bound on its ranks; 0 for the dense form."""
    plan: LayerPlan | None
    """Its plan; None for the dense form."""
    params: float
    """The number of stored parameters of the layer as it runs: neighbouring cores may be merged."""
    loss: float


@dataclass
class Truncation:
    """The share of a weight's squared norm that its cores lose.

    Attributes:
        weight: the dense weight (O, I, *K) or (O, I), on the CPU, in the metric that counts.
        groups: the number of groups of a convolution, 1 for all other layers.

    """

    weight: Tensor
    groups: int = 1
    _beyond: dict[tuple[int, ...], Tensor] = field(init=False, repr=False, default_factory=dict)

    def __call__(self, plan: LayerPlan) -> float:
        """Return the share that the cores of a plan lose."""
        if plan.format in ("svd", "tt") and len(plan.modes) == 2 and self.groups == 1:
            return float(self._spectrum(plan.modes)[max(plan.ranks)])
        kept = project(plan.format, self.weight, plan.modes, plan.ranks, self.groups)
        return float((self.weight - kept).square().sum() / self.weight.square().sum().clamp_min(1e-30))

    def _spectrum(self, modes: tuple[int, ...]) -> Tensor:
        """Return the share of the squared singular values beyond each rank from 0, of a split of the weight."""
        if modes not in self._beyond:
            matrix = svd.matrix(self.weight, modes).double()
            rows = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
            squares = torch.linalg.eigvalsh(rows @ rows.T).clamp_min(0.0)  # from the smallest
            beyond = torch.cat([squares.new_zeros(1), squares.cumsum(0)]).flip(0)
            self._beyond[modes] = beyond / beyond[0].clamp_min(1e-30)
        return self._beyond[modes]


def forms_of(name: str, spec: LayerSpec, form: str, modes: Sequence[int] | None, merge: str) -> tuple[LayerPlan, ...]:
    """Return the forms of a layer at rank 1.

    Args:
        name: the name of the layer.
        spec: what it computes.
        form: the format, or `auto`. For a matrix both of its formats give the same two products, so that only `tt` is tried.
        modes: the modes; default: those of the format.
        merge: how cores are merged.

    Raises:
        PlanError: the layer cannot have the form.

    """
    if form != AUTO:
        return (_smallest(name, spec, form, modes, merge),)
    first = _smallest(name, spec, "tt", None, merge)
    if math.prod(spec.kernel) == 1:
        return (first,)
    return (first, *(_smallest(name, spec, "svd", split, "auto") for split in svd.splits(spec.of_one_group.shape)))


def _smallest(name: str, spec: LayerSpec, form: str, modes: Sequence[int] | None, merge: str) -> LayerPlan:
    chosen = tuple(modes) if modes is not None else default_modes_of(form, spec)
    ranks = format_of(form, spec.groups).uniform(spec.shape, chosen, 1)
    layer = LayerPlan(name=name, format=form, modes=chosen, ranks=ranks, merge=merge)
    layer.check_layer(spec)
    return layer


def first_options(forms: Iterable[LayerPlan], dense: DenseModule, lost: Lost) -> list[Option]:
    """Return the dense form of a layer, and each of its other forms at rising bounds on the ranks."""
    whole = Option(0, None, float(math.prod(dense.spec.shape)), 0.0)
    return [whole, *(option for form in forms for option in _options(form, dense.spec, _ladder(form, dense.spec), lost))]


def options_around(options: Sequence[Option], chosen: Option, dense: DenseModule, lost: Lost) -> list[Option]:
    """Return options with bounds between those of a chosen option and its neighbours of the same form.

    There are none around the dense form.
    """
    if chosen.plan is None:
        return []
    form = chosen.plan
    alike = sorted(option.bound for option in options if option.plan is not None and _same(option.plan, form))
    place = alike.index(chosen.bound)
    ends = pairwise(alike[max(0, place - 1) : place + 2])
    spread = {round(bound) for low, high in ends for bound in np.linspace(low, high, _BETWEEN + 2).tolist()}
    return _options(form, dense.spec, sorted(spread.difference(alike)), lost)


def _same(first: LayerPlan, second: LayerPlan) -> bool:
    return (first.format, first.modes) == (second.format, second.modes)


def _options(form: LayerPlan, spec: LayerSpec, bounds: Iterable[int], lost: Lost) -> list[Option]:
    options = []
    for bound in bounds:
        plan, params = _at(form, spec, bound)
        options.append(Option(bound, plan, float(params), lost(plan)))
    return options


def _at(form: LayerPlan, spec: LayerSpec, bound: int) -> tuple[LayerPlan, int]:
    """Return the plan of a form with a bound on its ranks, and its number of stored parameters."""
    own = format_of(form.format, spec.groups)
    ranks = own.clamp(spec.shape, form.modes, own.uniform(spec.shape, form.modes, bound))
    plan = form.model_copy(update={"ranks": ranks})
    return plan, option_for(plan, spec).params


def _ladder(form: LayerPlan, spec: LayerSpec) -> list[int]:
    """Return rising bounds on the ranks of a form, from 1 to the largest with which it is smaller than the dense layer.

    These are all bounds if there are at most `_RUNGS`, else so many with about equal ratios; none if even rank 1 is too large.
    """
    own = format_of(form.format, spec.groups)
    dense, low = math.prod(spec.shape), 0
    high = max(own.clamp(spec.shape, form.modes, own.uniform(spec.shape, form.modes, dense))) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _at(form, spec, middle)[1] < dense else (low, middle)
    if low <= _RUNGS:
        return list(range(1, low + 1))
    return sorted({round(bound) for bound in np.geomspace(1, low, _RUNGS).tolist()})
