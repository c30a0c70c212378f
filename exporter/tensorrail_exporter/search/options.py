"""What a dense layer could become: formats, and ranks on the grid in which the target's kernels compute channels.

Kernels of ONNX Runtime's CPU provider work on blocks of 16 channels with AVX-512 and of 8 without; tensor cores want
multiples of 8. Ranks between two steps cost as much as the upper one, so only steps are offered.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from tensorrail_exporter.formats import FORMATS, format_of
from tensorrail_exporter.formats.contraction import LayerSpec, describe, runs_in_scan, split_at_boundary
from tensorrail_exporter.plans.costs import contraction_cost, dense_cost
from tensorrail_exporter.plans.plan import LayerPlan
from tensorrail_exporter.rewrite.survey import DenseLayer

AUTO = ("tt", "svd")
"""The formats behind `auto`: on every layer measured they were as fast as any other at the same MACs (results/forms.md).
A Tucker-2 convolution runs the very steps of a separable train with one mode a side."""

_MOST = 0.95  # of the dense MACs: above it no option is worth its kernels
_BEYOND = 2.0  # times the dense MACs: ranks come in rising order, and none is looked at behind one that costs so much
_BALANCE = 0.26  # how far the two ranks of a narrow convolution may differ, as shares of their channels
_KEPT = 12  # options of one layer and form that are measured, spread evenly over the logarithm of their MACs


@dataclass(frozen=True)
class Option:
    """One way to run one layer; `macs` and `params` of one sample and of the stored constants."""

    format: str
    modes: tuple[int, ...]
    ranks: tuple[int, ...]
    merge: str
    steps: str
    macs: int
    params: int
    block: int = 1

    def plan(self, name: str) -> LayerPlan:
        """Return the plan of a layer that takes this option."""
        return LayerPlan(name=name, format=self.format, modes=self.modes, ranks=self.ranks, merge=self.merge)


def options_of(layer: DenseLayer, formats: Sequence[str], grid: int, *, most: float = _MOST) -> tuple[Option, ...]:
    """Return the options of a layer, cheapest first, none above `most` of its MACs and at most 12 a form.

    `formats` are keys of FORMATS, or `auto`. `PlanError` for an unknown one. A layer whose smallest option costs more than
    that has none.
    """
    matrix = math.prod(layer.spec.kernel) == 1
    auto = AUTO[1:] if matrix else AUTO  # of a matrix both formats make the same two products
    names = list(dict.fromkeys(name for key in formats for name in (auto if key == "auto" else (key,))))
    for name in names:
        format_of(name)
    dense = dense_cost(layer.spec).macs
    found: list[Option] = []
    for name in names:
        for modes in _modes(name, layer.spec):
            made = (_option(name, modes, ranks, layer.spec) for ranks in _ranks(name, modes, layer.spec, grid))
            small = takewhile(lambda one: one.macs <= max(most, _BEYOND) * dense, made)
            found += _spread([one for one in small if one.macs <= most * dense])
    distinct = {one.steps: one for one in reversed(found)}  # equal steps are equal times, whatever the format is called
    return tuple(sorted(distinct.values(), key=lambda one: one.macs))


def option_for(plan: LayerPlan, spec: LayerSpec, block: int = 1) -> Option:
    """Return a planned layer as an option, its ranks widened to multiples of `block`."""
    return _option(plan.format, plan.modes, plan.ranks, spec, plan.merge_for(spec), block)


def _option(
    name: str, modes: tuple[int, ...], ranks: tuple[int, ...], spec: LayerSpec, merge: str = "auto", block: int = 1
) -> Option:
    plan = LayerPlan(name="layer", format=name, modes=modes, ranks=ranks, merge=merge)
    merge = plan.merge_for(spec)
    form = format_of(name)
    axes = form.rank_axes(spec.shape, modes)
    shapes = [
        tuple(-(-size // block) * block if axis in ranked else size for axis, size in enumerate(shape))
        for shape, ranked in zip(plan.core_shapes(spec.shape), axes, strict=True)
    ]
    cores = [np.zeros(shape, np.float32) for shape in shapes]
    steps = form.contraction(cores, spec, modes, merge)
    cost = contraction_cost(steps, spec)
    macs = cost.macs
    if spec.op == "recurrent" and split_at_boundary(steps)[1] is None and not runs_in_scan(steps, spec):  # an identity runs
        macs += math.prod(cost.steps[-1].shape) * spec.shape[0]
    params = cost.stored_bytes // 4
    return Option(name, modes, form.clamp(spec.shape, modes, ranks), merge, describe(steps, spec), macs, params, block)


def _modes(name: str, spec: LayerSpec) -> Iterator[tuple[int, ...]]:
    """Yield the modes to try; for svd every way to share out the kernel's axes."""
    o, i, kernel = spec.shape[0], spec.shape[1], spec.kernel
    if name == "ttm" and kernel:
        return
    if name != "svd" or math.prod(kernel) == 1:
        yield format_of(name).default_modes(spec.shape)
        return
    for j in range(len(kernel) + 1):
        yield (o * math.prod(kernel[j:]), i * math.prod(kernel[:j]))


def _ranks(name: str, modes: tuple[int, ...], spec: LayerSpec, grid: int) -> Iterable[tuple[int, ...]]:
    o, i = spec.shape[:2]
    if name in ("tt", "tucker") and len(modes) == 3 and math.prod(spec.kernel) > 1:
        pairs = sorted(_pairs(o, i, math.prod(spec.kernel), grid), key=math.prod)
        return [(1, a, b, 1) if name == "tt" else (a, b) for a, b in pairs]
    form = FORMATS[name]
    largest = min(max(*modes, o, i), 4096)  # a train of pairs has ranks above every mode
    # A ring's channels are the square of its rank: 4 gives 16 of them, for a grid of 8 as for one of 16.
    step = next(rank for rank in range(1, grid + 1) if rank**2 % grid == 0) if name == "tr" else grid
    ranks = {form.clamp(spec.shape, modes, form.uniform(spec.shape, modes, rank)) for rank in range(step, largest + 1, step)}
    return sorted(ranks)


def _pairs(o: int, i: int, taps: int, grid: int) -> list[tuple[int, int]]:
    """Return the two ranks of a convolution, in equal shares of its channels; where those are few, near shares as well."""
    exist = [(a, b) for a in range(grid, o + 1, grid) for b in range(grid, i + 1, grid) if a <= b * taps and b <= a * taps]
    steps = max(o, i) // grid or 1
    equal = [(a, b) for a, b in exist if abs(a / o - b / i) < 1 / steps]
    return equal if len(equal) > _KEPT // 2 else [(a, b) for a, b in exist if abs(a / o - b / i) <= _BALANCE]


def _spread(options: Sequence[Option]) -> list[Option]:
    """Return at most `_KEPT` options, spread over the logarithm of their MACs."""
    ordered = sorted(options, key=lambda one: one.macs)
    if len(ordered) <= _KEPT:
        return ordered
    places = np.linspace(math.log(ordered[0].macs), math.log(ordered[-1].macs), _KEPT)
    near = {min(range(len(ordered)), key=lambda k: (abs(math.log(ordered[k].macs) - place), k)) for place in places}
    return [ordered[k] for k in sorted(near)]
