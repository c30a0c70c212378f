"""The chosen network, built and timed: what a plan predicts is measured on the whole network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from tensorrail_exporter.graphs.io import save_model
from tensorrail_exporter.plans.plan import Plan
from tensorrail_exporter.rewrite.resolve import ResolvedPlan, resolve
from tensorrail_exporter.rewrite.rewriter import rewrite
from tensorrail_exporter.search.layer_profile import layer_times, slower_layers
from tensorrail_exporter.search.report import PlanReport
from tensorrail_runtime.graphs.cost import cost
from tensorrail_runtime.measure.latency import bench
from tensorrail_runtime.measure.timing import Timing
from tensorrail_runtime.sessions.session import Session


@dataclass(frozen=True)
class Verification:
    """How the chosen network is timed against the dense one."""

    model: onnx.ModelProto
    dense: Path
    """The file of the dense model; the factored one is written beside it."""
    timing: Timing
    settings: Session

    def dense_ms(self) -> float:
        """Return the minimum of three timings of the dense network in milliseconds: other load only makes a time longer."""
        timing = Timing(
            self.timing.batch, self.timing.shapes, self.timing.seconds / 9, processes=1, io_binding=self.settings.on_gpu
        )
        return min(bench([self.dense], timing, self.settings).latencies[0].p50 for _ in range(3))

    def measured(self, report: PlanReport) -> PlanReport:
        """Return the report with the chosen network timed and profiled beside the dense one.

        The cores are random: they run as long as any. Only the CPU provider is profiled, for a GPU's kernels still run when
        their node has ended in the profile.
        """
        if not report.plan.layers:
            return report
        path = self.dense.with_name("chosen.onnx")
        resolved = resolve(self.model, report.plan)
        save_model(rewrite(resolved, cores_to_time(resolved), scan=not self.settings.on_gpu).model, path)
        times = bench([self.dense, path], self.timing, self.settings)
        counted = cost(path, self.timing.batch, self.timing.shapes)
        planned = report.planned.model_copy(
            update={"params": counted.params, "macs": counted.macs, "flops": counted.flops, "bytes": counted.bytes}
        )
        report = report.model_copy(update={"measured": times.ratios[0], "planned": planned})
        if self.settings.on_gpu:
            return report
        layers = layer_times(
            self.dense,
            path,
            report.plan,
            settings=self.settings,
            batch=self.timing.batch,
            shapes=self.timing.shapes,
            resolved=resolved,
        )
        return report.model_copy(update={"slower": slower_layers(layers)})


def random_cores(model: onnx.ModelProto, plan: Plan, seed: int = 0) -> dict[str, list[np.ndarray]]:
    """Return cores of the plan's shapes, with values of a size that keeps activations as large as they are: to time a plan."""
    return cores_to_time(resolve(model, plan), seed)


def cores_to_time(resolved: ResolvedPlan, seed: int = 0) -> dict[str, list[np.ndarray]]:
    """Return what `random_cores` returns, for a plan that is resolved already."""
    rng = np.random.default_rng(seed)
    cores = {}
    for name, layer in resolved.layers.items():
        plan, shape = layer.plan, layer.spec.shape
        sizes = plan.core_shapes(shape)
        ranks = plan.ranks[1:] if plan.format == "tr" else plan.ranks  # a ring's first rank is its last one, too
        terms = math.prod(shape[1:]) * math.prod(ranks)  # of the sums: over the inputs, and over the ranks in a weight
        scale = np.float32(terms ** (-0.5 / len(sizes)))
        cores[name] = [rng.standard_normal(size, np.float32) * scale for size in sizes]
    return cores
