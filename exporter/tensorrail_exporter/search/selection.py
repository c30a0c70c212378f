"""Selects one form for every layer, so that all targets are met at the least loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tensorrail_exporter.formats.contraction import LOOP
from tensorrail_exporter.plans.costs import dense_cost
from tensorrail_exporter.plans.plan import Plan
from tensorrail_exporter.precision.planned import PRECISIONS
from tensorrail_exporter.rewrite.survey import DenseLayer
from tensorrail_exporter.search.knapsack import Apart, Limit, choose
from tensorrail_exporter.search.latency_table import LatencyTable
from tensorrail_exporter.search.losses import Losses
from tensorrail_exporter.search.options import Option
from tensorrail_exporter.search.refinement import Picks, Space
from tensorrail_exporter.search.report import PlannedLayer, PlanReport, Size
from tensorrail_exporter.search.targets import Search
from tensorrail_exporter.search.timed_layers import makers_of
from tensorrail_runtime.errors import TargetError

_PLAUSIBLE = 0.9  # a smaller scale is no rounding of the measurement


@dataclass(frozen=True)
class Candidates:
    """The layers with their forms, times and losses, to choose from."""

    options: Mapping[DenseLayer, Sequence[Option]]
    """All timed forms of each layer."""
    faster: Mapping[DenseLayer, tuple[Option, ...]]
    """The forms that are fast enough to be chosen."""
    losses: Losses
    """The losses of the forms in `faster`, in the same order."""
    table: LatencyTable
    """The measured times."""
    dense: Size
    """Size and measured time of the dense network in fp32, from which targets count."""
    start: Size
    """The same of the dense network in the precision of the plan, from which layers save."""
    scale: float = 1.0
    """Factor for the times in the table; below 1 where the layers alone were slower than the whole network."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes the times of the layers less reliable than they seem."""
        warnings = [self.table.busy] if self.table.busy else []
        if self.scale < _PLAUSIBLE:
            whole = self.start.milliseconds
            warnings.append(
                f"the times of the layers add up to {whole / self.scale:.2f} ms, but the network takes {whole:.2f} ms: "
                f"they are scaled by {self.scale:.2f}; if the machine was busy, remove the latency table and measure again"
            )
        return tuple(warnings)

    def milliseconds(self, layer: DenseLayer, option: Option | None = None) -> float:
        """Return the time of all nodes of a layer in the network, dense or with an option."""
        return self.scale * layer.nodes * self.table.milliseconds(layer, option)

    def added(self, layer: DenseLayer, option: Option) -> float:
        """Return the time of all nodes of a layer with an option, less what the layers before it save while they are dense."""
        return self.scale * layer.nodes * self.table.added(layer, option)

    @property
    def apart(self) -> list[Apart]:
        """Options that are not chosen together, since what they save together is not known.

        These are a layer that reads fewer channels and a form of one that makes them, and a form of a recurrent weight and one
        of the same node's input weight that makes a Scan of it as well.
        """
        places = {layer.name: place for place, layer in enumerate(self.faster)}
        found: list[Apart] = []
        for place, (layer, options) in enumerate(self.faster.items()):
            narrow = [(place, k) for k, option in enumerate(options, 1) if makers_of(layer, option)]
            for maker in layer.makers if narrow else ():
                own = places.get(maker.name)
                forms = () if own is None else tuple(self.faster.values())[own]
                if own is not None and forms:
                    found.append(([(own, k) for k in range(1, 1 + len(forms))], narrow))
        return [*found, *self._two_scans()]

    def _two_scans(self) -> list[Apart]:
        """Return the forms of input and recurrent weights that make a Scan of the same node."""
        inputs: list[tuple[DenseLayer, list[tuple[int, int]]]] = []
        loops: list[tuple[DenseLayer, list[tuple[int, int]]]] = []
        for place, (layer, options) in enumerate(self.faster.items()):
            scans = [(place, k) for k, option in enumerate(options, 1) if option.steps.endswith(LOOP)]
            if scans and layer.spec.op == "recurrent" and layer.spec.scan:
                (loops if layer.spec.state_products else inputs).append((layer, scans))
        return [
            (scans, own)
            for loop, own in loops
            for layer, scans in inputs
            if set(loop.output_names) & set(layer.output_names)  # one of the nodes has both weights
        ]

    def itemsize(self, layer: DenseLayer) -> int:
        """Return the bytes of one value of a weight of the layer."""
        return PRECISIONS[self.table.target.precision].itemsize or layer.dtype.itemsize

    def without(self, report: PlanReport, slower: Sequence[str]) -> Candidates:
        """Return the candidates without some of the chosen forms.

        Args:
            report: the report of the choice.
            slower: the layers whose chosen forms are removed.

        """
        chosen = {row.layer: row.steps for row in report.rows if row.layer in slower}
        faster, losses = {}, dict(self.losses.values)
        for layer, options in self.faster.items():
            remaining = [k for k, option in enumerate(options) if option.steps != chosen.get(layer.name)]
            faster[layer] = tuple(options[k] for k in remaining)
            if options:
                losses[layer.name] = tuple(self.losses.values[layer.name][k] for k in remaining)
        return replace(self, faster=faster, losses=replace(self.losses, values=losses))

    def costs(self, target: str, layer: DenseLayer) -> list[float]:
        """Return the cost of the dense layer and of each of its faster options: milliseconds, FLOPs, parameters or bytes."""
        options = self.faster[layer]
        match target:
            case "latency":
                return [self.milliseconds(layer), *(self.added(layer, option) for option in options)]
            case "flops":
                saved = (sum(one.macs - fewer.macs for one, fewer in _makers(layer, option)) for option in options)
                costs = (2.0 * (macs_of(layer, option) - less) for option, less in zip(options, saved, strict=True))
                return [2.0 * layer.macs, *costs]
            case _:
                size = 1 if target == "params" else self.itemsize(layer)
                saved = (sum(one.params - fewer.params for one, fewer in _makers(layer, option)) for option in options)
                costs = (float(size * (option.params - less)) for option, less in zip(options, saved, strict=True))
                return [float(layer.params * size), *costs]

    def limits(self, targets: Mapping[str, float]) -> list[Limit]:
        """Return the limit on the total cost of these layers for each target (a reduction factor)."""
        limits = []
        for name, factor in targets.items():
            costs = [self.costs(name, layer) for layer in self.faster]
            rest = self.start.of(name) - sum(options[0] for options in costs)  # the cost of the network outside these layers
            limits.append(Limit(name, costs, self.dense.of(name) / factor - rest))
        return limits

    def space(self, targets: Mapping[str, float]) -> Space:
        """Return all choices that meet the targets."""
        return Space(self.faster, self.losses.values, self.limits(targets), self.apart)

    def choice_of(self, report: PlanReport) -> dict[str, Option]:
        """Return the forms that a report chose, by layer name."""
        chosen = {row.layer: (row.format, row.ranks, row.steps) for row in report.rows if row.format}
        return {
            layer.name: option
            for layer, options in self.options.items()
            for option in options
            if chosen.get(layer.name) == (option.format, option.ranks, option.steps)
        }

    def can_reach(self, targets: Mapping[str, float]) -> bool:
        """Return whether each target on its own can be met with the cheapest form of every layer."""
        return all(_least(limit, self.apart) <= limit.most for limit in self.limits(targets))


def select(start: PlanReport, aims: Mapping[str, float], candidates: Candidates, search: Search) -> PlanReport:
    """Choose the forms with the least loss, or with the least time if the loss is limited.

    Args:
        start: the report to complete, with the user's targets.
        aims: the targets of this choice, which may be tighter or looser than the user's.
        candidates: the layers with their forms, times and losses.
        search: the limit on the loss, and the layers that stay dense.

    Returns:
        The report with the chosen plan, its rows and its predicted size.

    Raises:
        TargetError: a target cannot be met; the message says what can be reached.

    """
    return report_of(start, candidates, pick(start, aims, candidates, search), search)


def pick(start: PlanReport, aims: Mapping[str, float], candidates: Candidates, search: Search) -> Picks:
    """Return the form of every layer of `candidates.faster`: 0 for dense, k for its k-th form. The arguments are `select`'s."""
    limits = candidates.limits(aims)
    for limit in limits:
        _require_reachable(limit, start.targets, candidates, search)
    losses = [[0.0, *candidates.losses.values.get(layer.name, ())] for layer in candidates.faster]
    if search.max_loss is None:
        return choose(losses, limits, candidates.apart)
    times = [candidates.costs("latency", layer) for layer in candidates.faster]
    return choose(times, [*limits, Limit("loss", losses, search.max_loss)], candidates.apart)


def require_reachable(targets: Mapping[str, float], candidates: Candidates, search: Search, beyond: float = 1.0) -> None:
    """Check that each target can be met on its own.

    Args:
        targets: reduction factors by target name.
        candidates: the layers with their forms and times; losses do not count.
        search: how the plan is searched for.
        beyond: how many times more than what can be reached a target must ask for to be refused; default 1.

    Raises:
        TargetError: a target cannot be met; the message says what can be reached.

    """
    for limit in candidates.limits({name: factor / beyond for name, factor in targets.items()}):
        _require_reachable(limit, targets, candidates, search)


def report_of(start: PlanReport, candidates: Candidates, picks: Picks, search: Search) -> PlanReport:
    """Return the report of a choice, with its plan, its rows and its predicted size."""
    layers = candidates.faster
    rows, plans = [], []
    readers: dict[str, tuple[DenseLayer, Option]] = {}  # what reads fewer channels of a layer, by the name of that layer
    for layer, picked in zip(layers, picks, strict=True):
        if picked:
            option = layers[layer][picked - 1]
            rows.append(_row(layer, option, candidates, candidates.losses.values[layer.name][picked - 1]))
            plans.append(option.plan(layer.name))
            readers |= {maker.name: (layer, option) for maker in makers_of(layer, option)}
        else:
            rows.append(PlannedLayer.dense(layer, candidates.milliseconds(layer), _why_dense(layer, candidates, search)))
    rows = [_row_of_maker(row, *readers[row.layer], candidates) if row.layer in readers else row for row in rows]
    return start.model_copy(
        update={
            "planned": _planned(candidates, rows, layers),
            "rows": tuple(rows),
            "plan": Plan(layers=tuple(plans), precision=search.precision),
        }
    )


def macs_of(layer: DenseLayer, option: Option) -> int:
    """Return the MACs of all nodes of the layer in this form, at the batch size of the survey."""
    if layer.spec.gathers:
        indices = layer.inputs[layer.data] or (1,)
        return layer.nodes * indices[0] * option.macs
    return round(layer.macs * option.macs / max(1, dense_cost(layer.spec).macs))


def _makers(layer: DenseLayer, option: Option) -> list[tuple[DenseLayer, DenseLayer]]:
    """Return the layers before a layer that compute fewer channels with an option, as they are and then."""
    return [(maker, maker.with_outputs(option.ranks[0])) for maker in makers_of(layer, option)]


def _row_of_maker(row: PlannedLayer, reader: DenseLayer, option: Option, candidates: Candidates) -> PlannedLayer:
    """Return the row of a dense layer of which fewer channels are read."""
    maker, fewer = next(pair for pair in _makers(reader, option) if pair[0].name == row.layer)
    share = candidates.table.saved_before(reader, option)[row.layer] / candidates.table.milliseconds(maker)
    return row.model_copy(
        update={
            "ms": row.ms * min(max(1 - share, 0.0), 1.0),
            "macs": fewer.macs,
            "params": fewer.params,
            "reason": f"{option.ranks[0]} of {maker.spec.shape[0]} outputs are read",
        }
    )


def _row(layer: DenseLayer, option: Option, candidates: Candidates, loss: float) -> PlannedLayer:
    return PlannedLayer(
        layer=layer.name,
        what=layer.describe(),
        format=option.format,
        ranks=option.ranks,
        steps=option.steps,
        dense_ms=candidates.milliseconds(layer),
        ms=candidates.milliseconds(layer, option),
        dense_macs=layer.macs,
        macs=macs_of(layer, option),
        dense_params=layer.params,
        params=option.params,
        loss=loss,
        whole_node=bool(layer.spec.state_products),
    )


def _planned(candidates: Candidates, rows: Sequence[PlannedLayer], layers: Mapping[DenseLayer, object]) -> Size:
    """Return the size of the network with these rows: that of the network to start from minus the savings of the rows."""
    start = candidates.start
    macs = start.macs - sum(row.dense_macs - row.macs for row in rows)
    pairs = zip(rows, layers, strict=True)
    return Size(
        params=start.params - sum(row.dense_params - row.params for row in rows),
        macs=macs,
        flops=2 * macs,
        bytes=start.bytes - sum((row.dense_params - row.params) * candidates.itemsize(layer) for row, layer in pairs),
        milliseconds=start.milliseconds - sum(row.dense_ms - row.ms for row in rows),
    )


def _least(limit: Limit, apart: Sequence[Apart]) -> float:
    """Return the least total cost of all choices."""
    if not apart:
        return sum(min(costs) for costs in limit.costs)
    return sum(costs[pick] for costs, pick in zip(limit.costs, choose(limit.costs, [], apart), strict=True))


def _require_reachable(limit: Limit, targets: Mapping[str, float], candidates: Candidates, search: Search) -> None:
    least = _least(limit, candidates.apart)
    if least <= limit.most:
        return
    dense, start = candidates.dense.of(limit.name), candidates.start.of(limit.name)
    reachable = dense / (start - sum(costs[0] for costs in limit.costs) + least)
    forms = "its cheapest form" if search.allow_slower else "its cheapest form that is faster here"
    advice = "" if "latency" in targets or search.allow_slower else ", or allow slower layers"
    free = [forms for layer, forms in candidates.options.items() if not search.keeps(layer.name)]
    if free and not any(free):
        advice += f", or for ranks in steps of less than {search.grid}, for which every layer is too narrow"
    raise TargetError(
        f"target {limit.name}={targets[limit.name]:g} cannot be met: at most {reachable:.2f}× is reachable, with every "
        f"layer in {forms}; ask for less{advice}"
    )


def _why_dense(layer: DenseLayer, candidates: Candidates, search: Search) -> str:
    if search.keeps(layer.name):
        return "kept as asked"
    if not candidates.options[layer]:
        return "too narrow for a rank on the grid"
    if not candidates.faster[layer]:
        dense_ms, own = candidates.table.milliseconds(layer), candidates.options[layer]
        best = dense_ms / max(min(candidates.table.added(layer, option) for option in own), 1e-6)
        if best * search.gain >= 1:
            return "slower in the network's profile"
        return f"no form is faster: the best one reaches {best:.2f}×"
    return "other layers save more for the same loss"
