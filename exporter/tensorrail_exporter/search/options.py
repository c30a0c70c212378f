"""The options of a dense layer: formats, and ranks on the grid of channels that the target's kernels compute.

The kernels of ONNX Runtime's CPU provider compute blocks of 16 channels with AVX-512 and of 8 without it; tensor cores need
multiples of 8. A rank between two multiples costs as much as the larger one, so only multiples are offered.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from tensorrail_exporter.formats import FORMATS, WIDTH, format_of
from tensorrail_exporter.formats.contraction import LayerSpec, dense_step, describe, runs_in_scan, split_at_boundary
from tensorrail_exporter.formats.svd import splits
from tensorrail_exporter.formats.ttm import table_modes
from tensorrail_exporter.formats.width import describe_narrow, with_inputs
from tensorrail_exporter.plans.costs import contraction_cost, dense_cost
from tensorrail_exporter.plans.plan import LayerPlan
from tensorrail_exporter.rewrite.survey import DenseLayer

AUTO = ("tt", "svd")
"""The formats that `auto` stands for: on every measured layer they were as fast as any other at the same MACs
(results/forms.md). A Tucker-2 convolution runs the same steps as a separable train with one mode per side."""

_MOST = 0.95  # share of the dense MACs above which no option is offered: its additional kernels cost more than it saves
_LONG, _MOST_OF_LONG = 32, 1.25  # taps of a kernel from which dense kernels are slow, so that even full rank may be faster
_BEYOND = 2.0  # multiple of the dense MACs after which no larger ranks are tried
_BALANCE = 0.26  # largest difference between the two ranks of a narrow convolution, as shares of their channels
_STEPS_OF_A_GROUP = 4  # ranks to try, at least, up to the channels of one group
_FEWEST_CHANNELS = 0.5  # share of the channels that a narrower layer reads at least: fewer lose much without training
_THIN = 5  # options of one format and modes that are timed; the others are estimated
_KEPT = 12  # largest number of options per layer and form, spread evenly over the logarithm of their MACs


@dataclass(frozen=True)
class Option:
    """One way to run a layer.

    Attributes:
        format: key of `FORMATS`.
        modes: modes in the order of the format.
        ranks: ranks in the order of the format, without padding; for a convolution in groups those of one group.
        merge: which cores are merged before they run.
        steps: the steps in words; equal steps take equal time.
        macs: multiply-accumulates of one sample, including padding.
        params: number of values in the stored constants, including padding.
        block: ranks are padded to multiples of it; default 1, no padding.

    """

    format: str
    modes: tuple[int, ...]
    ranks: tuple[int, ...]
    merge: str
    steps: str
    macs: int
    params: int
    block: int = 1

    def plan(self, name: str) -> LayerPlan:
        """Return the plan of the layer `name` with this option."""
        return LayerPlan(name=name, format=self.format, modes=self.modes, ranks=self.ranks, merge=self.merge)


def options_of(layer: DenseLayer, formats: Sequence[str], grid: int, *, most: float | None = None) -> tuple[Option, ...]:
    """Return the options of a layer, those with the fewest MACs first.

    Args:
        layer: the dense layer.
        formats: keys of `FORMATS`, or `auto`.
        grid: ranks are multiples of it; of less if a convolution has groups of few channels.
        most: largest share of the dense MACs; default 0.95, and 1.25 for a kernel with 32 taps or more.

    Returns:
        At most 12 options per format and modes, none if even the smallest exceeds `most`.

    Raises:
        PlanError: a format is unknown.

    """
    if most is None:
        most = _MOST_OF_LONG if math.prod(layer.spec.kernel) >= _LONG else _MOST
    matrix = math.prod(layer.spec.kernel) == 1
    auto = AUTO[1:] if matrix else AUTO  # for a matrix both formats give the same two products
    names = list(dict.fromkeys(name for key in formats for name in (auto if key == "auto" else (key,))))
    for name in names:
        format_of(name)
    gathers = layer.spec.gathers  # without a product in the dense layer: the size counts
    dense = layer.spec.params if gathers else dense_cost(layer.spec).macs
    options: list[Option] = list(_narrow_options(layer, grid, most)) if WIDTH in names else []
    one = layer.spec.of_one_group
    if layer.spec.groups > 1:  # with fewer channels than the grid in each, kernels compute no blocks of channels anyway
        grid = min(grid, max(1, min(one.shape[:2]) // _STEPS_OF_A_GROUP))
    for name in names:
        if name == WIDTH or (layer.spec.groups > 1 and not format_of(name, layer.spec.groups).merges("conv")):
            continue
        for modes in _modes(name, one):
            merge = "none" if name == "ttm" and gathers else "auto"  # merged cores of a table would be larger
            # In the order of their ranks, so that the search can end at the first that is far too expensive.
            candidates = (_option(name, modes, ranks, layer.spec, merge) for ranks in _ranks(name, modes, one, grid))
            affordable = takewhile(lambda option: _size(option, gathers) <= max(most, _BEYOND) * dense, candidates)
            options += _spread([option for option in affordable if _size(option, gathers) <= most * dense])
    distinct = {option.steps: option for option in reversed(options)}  # equal steps take equal time in every format
    return tuple(sorted(distinct.values(), key=lambda option: option.macs))


def _narrow_options(layer: DenseLayer, grid: int, most: float) -> Iterator[Option]:
    """Yield the options in which the layer reads fewer channels, if the layers before need not compute the others."""
    inputs = layer.spec.shape[1]
    if not layer.makers:
        return
    least = max(grid, math.ceil(_FEWEST_CHANNELS * inputs / grid) * grid)
    counts = [count for count in range(least, inputs, grid) if count <= most * inputs]
    places = np.linspace(0, len(counts) - 1, min(len(counts), _KEPT)).round().astype(int)
    yield from (_narrow_option(counts[place], layer.spec) for place in places)


def _narrow_option(count: int, spec: LayerSpec) -> Option:
    """Return the option in which a layer reads so many channels; what the layers before save is not in it."""
    narrow = with_inputs(spec, count)
    steps = describe_narrow((dense_step(np.broadcast_to(np.float32(0), narrow.shape), narrow),), spec)
    (merge,) = format_of(WIDTH).merges(spec.op)
    return Option(WIDTH, (spec.shape[1],), (count,), merge, steps, dense_cost(narrow).macs, narrow.params)


def _size(option: Option, gathers: bool) -> int:
    return option.params if gathers else option.macs


def families(options: Sequence[Option]) -> list[list[Option]]:
    """Return the options in groups of the same format and modes, in their order."""
    groups: dict[tuple[str, tuple[int, ...]], list[Option]] = {}
    for option in options:
        groups.setdefault((option.format, option.modes), []).append(option)
    return list(groups.values())


def thinned(options: Sequence[Option]) -> tuple[Option, ...]:
    """Return a few options of each format and modes, those with the fewest and the most MACs among them."""
    kept = []
    for family in families(options):
        places = np.linspace(0, len(family) - 1, min(len(family), _THIN)).round().astype(int)
        kept += [family[place] for place in places]
    return tuple(kept)


def option_for(plan: LayerPlan, spec: LayerSpec, block: int = 1) -> Option:
    """Return the option of a planned layer, with its ranks padded to multiples of `block`."""
    return _option(plan.format, plan.modes, plan.ranks, spec, plan.merge_for(spec), block)


def _option(
    name: str, modes: tuple[int, ...], ranks: tuple[int, ...], spec: LayerSpec, merge: str = "auto", block: int = 1
) -> Option:
    if name == WIDTH:
        return _narrow_option(min(ranks[0], spec.shape[1]), spec)
    plan = LayerPlan(name="layer", format=name, modes=modes, ranks=ranks, merge=merge)
    merge = plan.merge_for(spec)
    form = format_of(name, spec.groups)
    axes = form.rank_axes(spec.shape, modes)
    shapes = [
        tuple(-(-size // block) * block if axis in ranked else size for axis, size in enumerate(shape))
        for shape, ranked in zip(plan.core_shapes(spec.shape, spec.groups), axes, strict=True)
    ]
    cores = [np.zeros(shape, np.float32) for shape in shapes]
    steps = form.contraction(cores, spec, modes, merge)
    cost = contraction_cost(steps, spec)
    macs = cost.macs
    if (
        spec.op == "recurrent"
        and not spec.state_products
        and split_at_boundary(steps)[1] is None
        and not runs_in_scan(steps, spec)
    ):
        # ONNX's node multiplies by an identity matrix.
        macs += math.prod(cost.steps[-1].shape) * spec.shape[0]
    params = cost.stored_bytes // 4
    return Option(name, modes, form.clamp(spec.shape, modes, ranks), merge, describe(steps, spec), macs, params, block)


def _modes(name: str, spec: LayerSpec) -> Iterator[tuple[int, ...]]:
    """Yield the modes to try.

    For `svd` these are every split of the kernel's axes, for an embedding in `ttm` two and three modes, else the default modes.
    """
    if name == "ttm" and spec.kernel:
        return
    if name == "ttm" and spec.gathers:
        yield from (table_modes(spec.shape, count) for count in (2, 3))
    elif name == "svd":
        yield from splits(spec.shape)
    else:
        yield format_of(name).default_modes(spec.shape)


def _ranks(name: str, modes: tuple[int, ...], spec: LayerSpec, grid: int) -> Iterable[tuple[int, ...]]:
    """Return the ranks to try, in rising order."""
    o, i = spec.shape[:2]
    if name in ("tt", "tucker") and len(modes) == 3 and math.prod(spec.kernel) > 1:
        pairs = sorted(_pairs(o, i, math.prod(spec.kernel), grid), key=math.prod)
        return [(1, a, b, 1) if name == "tt" else (a, b) for a, b in pairs]
    form = FORMATS[name]
    largest = min(max(*modes, o, i), 4096)  # the ranks of a TT-matrix may exceed every mode
    # The channels of a ring are the square of its rank: rank 4 gives 16 channels, for a grid of 8 or of 16.
    step = next(rank for rank in range(1, grid + 1) if rank**2 % grid == 0) if name == "tr" else grid
    ranks = {form.clamp(spec.shape, modes, form.uniform(spec.shape, modes, rank)) for rank in range(step, largest + 1, step)}
    return sorted(ranks)


def _pairs(o: int, i: int, taps: int, grid: int) -> list[tuple[int, int]]:
    """Return the two ranks of a convolution that are equal shares of its channels; if these are few, also similar shares."""
    feasible = [(a, b) for a in range(grid, o + 1, grid) for b in range(grid, i + 1, grid) if a <= b * taps and b <= a * taps]
    steps = max(o, i) // grid or 1
    equal = [(a, b) for a, b in feasible if abs(a / o - b / i) < 1 / steps]
    return equal if len(equal) > _KEPT // 2 else [(a, b) for a, b in feasible if abs(a / o - b / i) <= _BALANCE]


def _spread(options: Sequence[Option]) -> list[Option]:
    """Return at most `_KEPT` of the options, spread evenly over the logarithm of their MACs."""
    ordered = sorted(options, key=lambda option: option.macs)
    if len(ordered) <= _KEPT:
        return ordered
    places = np.linspace(math.log(ordered[0].macs), math.log(ordered[-1].macs), _KEPT)
    nearest = {min(range(len(ordered)), key=lambda k: (abs(math.log(ordered[k].macs) - place), k)) for place in places}
    return [ordered[k] for k in sorted(nearest)]
