"""Builds the network of a plan, and times it against the dense network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from tensorrail_exporter.formats import WIDTH
from tensorrail_exporter.graphs.io import save_model
from tensorrail_exporter.graphs.joint import Joint, without_inner_shapes
from tensorrail_exporter.plans.plan import HeadPlan, Plan, Precision
from tensorrail_exporter.precision.planned import PRECISIONS
from tensorrail_exporter.rewrite.resolve import ResolvedPlan, resolve
from tensorrail_exporter.rewrite.rewriter import rewrite
from tensorrail_exporter.search.layer_profile import layer_times, slower_layers
from tensorrail_exporter.search.report import PlanReport, Size
from tensorrail_runtime.graphs.cost import cost
from tensorrail_runtime.graphs.files import bytes_of
from tensorrail_runtime.measure.latency import Ratio, bench
from tensorrail_runtime.measure.timing import Conditions, Timing
from tensorrail_runtime.sessions.inputs import random_inputs
from tensorrail_runtime.sessions.session import Session, open_session


@dataclass(frozen=True)
class Verification:
    """The dense model, and how networks are timed against it."""

    model: onnx.ModelProto
    """The dense graph, in which layers that read the same input may be one."""
    dense: Path
    """The file of the dense model; the factored model is written to the same folder."""
    timing: Timing
    """How long, and with which batch size and shapes."""
    settings: Session
    """How the networks run."""
    precision: Precision = "fp32"
    """The precision of the networks that are timed against the dense one; default fp32."""
    ranges: Sequence[Mapping[str, np.ndarray]] = ()
    """A few inputs, which ranges of activations are taken from; default: random ones."""
    joint: tuple[Joint, ...] = ()
    """The layers that are one in `model`, and not in the file of the dense model; default: none."""
    heads: tuple[HeadPlan, ...] = ()
    """The attention heads that are smaller in `model`, and not in the file of the dense model; default: none."""
    reference: Path | None = None
    """The file of the network that changes without loss start from; default: that of the dense model."""
    inner_shapes: bool = True
    """Whether networks are timed with the shapes of inner tensors in their files; default True."""
    start: list[Ratio] = field(default_factory=list)
    """The speed-up of the dense network that layers are replaced in, once it was measured: joint, with smaller heads, or in
    another precision."""

    def timing_for(self, share: float) -> Timing:
        """Return the timing for a share of the seconds, in as many fresh processes as there are seconds, at least one."""
        seconds = self.timing.duration * share
        return replace(self.timing, seconds=seconds, processes=max(1, min(self.timing.processes, int(seconds))))

    def dense_ms(self) -> float:
        """Return the minimum of three timings of the dense network in milliseconds, since other load only adds time."""
        timing = replace(self.timing, seconds=self.timing.duration / 9, processes=1, io_binding=self.settings.on_gpu)
        return min(bench([self.dense], timing, self.settings).latencies[0].p50 for _ in range(3))

    def start_size(self, dense: Size) -> Size:
        """Return size and time of the dense network that layers are replaced in: joint, and in the precision of the networks.

        Args:
            dense: size and time of the dense network in fp32.

        Raises:
            GraphError: nothing in the graph can be converted.

        """
        if self.precision == "fp32" and not self._changed:
            return dense
        path = self._start
        self.write(self.model, path)
        self.start[:] = bench([self.dense, path], self.timing, self.settings).ratios
        size = dense.model_copy(update={"bytes": bytes_of(path), "milliseconds": dense.milliseconds / self.start[0].value})
        if not self.heads:
            return size
        counted = cost(self.unchanged, self.timing.batch, self.timing.shapes, self.timing.values)
        return size.model_copy(update={"params": counted.params, "macs": counted.macs, "flops": counted.flops})

    def measured(self, report: PlanReport) -> PlanReport:
        """Time and profile the network of a plan against the dense network.

        The cores are random, since their values do not affect the time. Only the CPU provider is profiled, in fp32: on a GPU a
        node ends in the profile before its kernels do.

        Args:
            report: the report of a plan.

        Returns:
            The report with the measured speed-up, the size of the factored graph and the layers that are slower than dense. If
            its plan has no layers, the speed-up is that of the network that layers are replaced in, unless it is the dense one.

        """
        if not report.plan.layers:
            return report.model_copy(update={"measured": self.start[0] if self.start else None})
        path = self.dense.with_name("chosen.onnx")
        resolved = resolve(self.model, report.plan)
        factored = rewrite(resolved, cores_to_time(resolved), scan=not self.settings.on_gpu).model
        save_model(factored, path)
        counted = cost(path, self.timing.batch, self.timing.shapes, self.timing.values)
        self.write(factored, path)
        times = bench([self.dense, path], self.timing, self.settings)
        planned = report.planned.model_copy(
            update={"params": counted.params, "macs": counted.macs, "flops": counted.flops, "bytes": bytes_of(path)}
        )
        report = report.model_copy(update={"measured": times.ratios[0], "planned": planned})
        if self.settings.on_gpu or self.precision != "fp32":
            return report
        before = self._start if self._changed else self.dense
        layers = layer_times(before, path, resolved, conditions=Conditions(self.timing, self.settings))
        products = {name: times for name, times in layers.items() if not resolved.layers[name].spec.gathers}
        return report.model_copy(update={"slower": slower_layers(products)})  # an embedding is factored for its size

    @property
    def _start(self) -> Path:
        return self.dense.with_name("start.onnx")

    @property
    def feeds(self) -> list[Mapping[str, np.ndarray]]:
        """Inputs of the dense network: those that ranges are taken from, or random ones."""
        timing = self.timing
        given = list(self.ranges)
        return given or [random_inputs(open_session(self.dense), timing.batch, timing.seed, timing.shapes, timing.values)]

    @property
    def _changed(self) -> bool:
        return bool(self.joint or self.heads) or not self.inner_shapes

    @property
    def unchanged(self) -> Path:
        """The file of the network that changes without loss start from."""
        return self.reference or self.dense

    def write(self, model: onnx.ModelProto, path: Path, *, inner_shapes: bool | None = None) -> None:
        """Write a network in the precision of the plan; `inner_shapes` in place of the property of that name, if given."""
        own = PRECISIONS[self.precision]
        model = own.for_times(model, self.feeds if own.needs_inputs else ())
        keep = self.inner_shapes if inner_shapes is None else inner_shapes
        save_model(model if keep else without_inner_shapes(model), path)


def random_cores(model: onnx.ModelProto, plan: Plan, seed: int = 0) -> dict[str, list[np.ndarray]]:
    """Return random cores to time a plan with, scaled so that the magnitude of activations stays the same.

    Args:
        model: the dense graph; it is not changed.
        plan: the layers, formats, modes and ranks.
        seed: seed of the random values; default 0.

    Returns:
        The cores of each planned layer, by name.

    Raises:
        GraphError: a planned layer is not in the graph or cannot be rewritten.
        PlanError: modes or ranks do not fit the weight.

    """
    return cores_to_time(resolve(model, plan), seed)


def cores_to_time(resolved: ResolvedPlan, seed: int = 0) -> dict[str, list[np.ndarray]]:
    """Do the same as `random_cores` for a resolved plan."""
    rng = np.random.default_rng(seed)
    cores = {}
    for name, layer in resolved.layers.items():
        plan, shape = layer.plan, layer.spec.shape
        if plan.format == WIDTH:
            cores[name] = plan.decompose(rng.standard_normal(shape, np.float32) * np.float32(math.prod(shape[1:]) ** -0.5))
            continue
        sizes = plan.core_shapes(shape, layer.spec.groups)
        ranks = plan.ranks[1:] if plan.format == "tr" else plan.ranks  # the first rank of a ring is also the last
        inputs = 1 if layer.spec.gathers else math.prod(shape[1:])
        terms = inputs * math.prod(ranks)  # of the sums over inputs and ranks
        scale = np.float32(terms ** (-0.5 / len(sizes)))
        cores[name] = [rng.standard_normal(size, np.float32) * scale for size in sizes]
    return cores
