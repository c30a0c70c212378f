"""Measures the latency of several models, interleaved in one process, so that disturbances affect all of them alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.measure.footprint import Footprint
from tensorrail_runtime.measure.timing import Timing
from tensorrail_runtime.measure.turns import Turns, time_in_fresh_process, time_models
from tensorrail_runtime.progress import Progress, silent
from tensorrail_runtime.records import Record
from tensorrail_runtime.sessions.machine import Machine, machine
from tensorrail_runtime.sessions.session import Session
from tensorrail_runtime.tables import Part, PrintedRecord, Table, or_dash

_FEW_CYCLES = 40  # with fewer, blocks of cycles are too short
_BLOCKS, _STUDENT = 8, 2.365  # blocks of cycles, and Student's 0.975 quantile for 7 degrees of freedom
_ENOUGH = {50: 20, 90: 100, 99: 1000}  # samples for a percentile: at least ten lie beyond it
_UNSTABLE = 0.10  # coefficient of variation from which times are called unstable
_LAUNCH = 8.0  # microseconds per node: about the cost of one kernel launch on a GPU


class Latency(Record):
    """The times of one model at one batch size, in milliseconds.

    `samples` holds every time, in order. A percentile is None when fewer than ten samples would lie beyond it.
    """

    model: str
    samples: tuple[float, ...]
    batch: int = 1  # samples of inputs in each run
    p50: float
    p90: float | None
    p99: float | None = None
    variation: float = 0.0  # standard deviation / mean, without the slowest 1 % of the samples
    throughput: float = 0.0  # samples of inputs per second, at p50
    load_ms: float = 0.0  # from the file to a session that is ready to run

    @classmethod
    def of(cls, model: str, samples: Sequence[float], batch: int = 1, load_ms: float = 0.0) -> Latency:
        """Return the record of these times, in milliseconds, of runs with `batch` samples each."""
        times = np.asarray(samples)
        percentiles = {p: float(np.percentile(times, p)) if len(times) >= enough else None for p, enough in _ENOUGH.items()}
        trimmed = times[times <= np.percentile(times, 99)]
        median = float(np.median(times))
        return cls(
            model=model,
            samples=tuple(float(t) for t in samples),
            batch=batch,
            p50=median,
            p90=percentiles[90],
            p99=percentiles[99],
            variation=float(trimmed.std() / trimmed.mean()) if len(trimmed) > 1 else 0.0,
            throughput=1e3 * batch / median,
            load_ms=load_ms,
        )


class Ratio(Record):
    """How many times faster a model is than the reference, with its 95 % confidence interval."""

    model: str
    reference: str
    value: float
    low: float
    high: float


class LatencyReport(PrintedRecord):
    """The latency of one or more models, measured in interleaved runs.

    Attributes:
        batch: the number of samples in each run of the first model.
        provider: the name of the provider: "cpu", "cuda" or "tensorrt".
        threads: the number of intra-op threads, 0 for ONNX Runtime's choice.
        rounds: how often each model ran.
        processes: the number of fresh processes in which the models ran; 0 if they ran in the calling process.
        machine: the machine of the measurement.
        latencies: the times of each model.
        ratios: the speed-up of each other model over the first one.
        transfers: whether the times contain the copies of inputs and outputs between host and device.
        cuda_graph: whether CUDA graphs were used.
        warnings: what makes the times less reliable than they seem.
        uneven: how the work of the models differs in a run, where it does: the ratios are then not speed-ups.

    """

    batch: int
    provider: str
    threads: int
    rounds: int
    processes: int = 0
    machine: Machine
    latencies: tuple[Latency, ...]
    ratios: tuple[Ratio, ...]
    transfers: bool = True
    cuda_graph: bool = False
    warnings: tuple[str, ...] = ()
    uneven: str = ""
    with_transfers: LatencyReport | None = None  # the same with inputs and outputs copied, where both were asked for
    footprints: tuple[Footprint, ...] = ()  # where they were asked for

    @property
    def fresh(self) -> str:
        """The number of fresh processes as text, such as ` in 5 fresh processes`; empty for none."""
        return f" in {self.processes} fresh process{'es' if self.processes > 1 else ''}" if self.processes else ""

    def shown(self) -> tuple[Part, ...]:
        """Return the table of latencies, the warnings, and what was measured beside them."""
        return self._shown(self.provider != "cpu" or not self.transfers)

    def _shown(self, transfers: bool) -> tuple[Part, ...]:
        """Return the parts; `transfers`: whether the title says if the times contain transfers."""
        where = self.machine.gpu.name if self.machine.gpu else self.machine.processor
        how = (", with transfers" if self.transfers else ", on the device") if transfers else ""
        speedups = ["1", *(f"{r.value:.2f}× [{r.low:.2f}, {r.high:.2f}]" for r in self.ratios)]
        rows = [
            (
                latency.model,
                *(or_dash(value, ".3f") for value in (latency.p50, latency.p90, latency.p99)),
                f"{latency.throughput:,.0f}",
                f"{latency.load_ms:.0f}",
                speedup,
            )
            for latency, speedup in zip(self.latencies, speedups, strict=True)
        ]
        head = ("model", "p50 (ms)", "p90 (ms)", "p99 (ms)", "samples/s", "load (ms)", "speed-up [95 % CI]")
        table = Table(f"batch {self.batch}, {self.rounds} rounds{self.fresh}, {where}{how}", head, rows)
        parts: list[Part] = [table, *(f"warning: {warning}" for warning in self.warnings)]
        if self.with_transfers is not None:
            parts += self.with_transfers._shown(transfers=True)
        if self.footprints:
            memory = [
                (f.model, f"{f.load_ms:.0f}", or_dash(f.host_peak_mib, ".0f"), or_dash(f.gpu_mib, "d")) for f in self.footprints
            ]
            parts.append(Table("in a fresh process", ("model", "load (ms)", "peak host (MiB)", "GPU (MiB)"), memory))
        return tuple(parts)


def bench(
    paths: Sequence[Path | str],
    timing: Timing | None = None,
    settings: Session | None = None,
    *,
    labels: Sequence[str] | None = None,
    progress: Progress = silent,
) -> LatencyReport:
    """Time the models in interleaved runs (A B B A), at least 20 rounds and 6 cycles of them.

    In a cycle every model runs once after itself and once after each other, so that what a model finds in the caches is shared
    out evenly. With `timing.processes`, that many fresh processes do so, `timing.seconds` in all: the same models ran up to 1.3
    times slower in a process that had decomposed weights before, and not all by the same factor; fresh processes differ as
    well, by a few per cent. Each process loads another model first, and its ratio is one estimate: their geometric mean counts,
    and the interval is Student's over processes, however many rounds each of them ran.

    Args:
        paths: files of the models; the first one is the reference.
        timing: how long, on what inputs and where they are timed. IO binding keeps inputs and outputs on the device, out of the
            times; CUDA graphs need it.
        settings: how the models run; default: the CPU provider.
        labels: names of the models in the report; default: those of their files.
        progress: told how much of the measurement is done.

    Returns:
        Every sample in milliseconds, and how many times faster each model is than the first, with its 95 % interval.

    Raises:
        ModelError: no model was given, a model does not run, or the inputs do not fit it.

    """
    if not paths:
        raise ModelError("nothing to measure: give at least one model")
    timing, settings = timing or Timing(), settings or Session()
    names = list(labels) if labels else _distinct(paths)
    if len(names) != len(paths):
        raise ModelError(f"labels: expected one for each of the {len(paths)} models, got {len(names)}")
    if timing.processes:
        return _in_fresh_processes(paths, timing, settings, names, progress)
    return _here(paths, timing, settings, names, progress)


def _here(
    paths: Sequence[Path | str], timing: Timing, settings: Session, names: Sequence[str], progress: Progress
) -> LatencyReport:
    timed = time_models(paths, settings, timing, lambda share: progress("measuring latency", share))
    return _report_of(timed, paths, timing, settings, names)


def _report_of(
    timed: Turns,
    paths: Sequence[Path | str],
    timing: Timing,
    settings: Session,
    names: Sequence[str],
    *,
    placed: bool = True,
) -> LatencyReport:
    """Return the report of models that ran interleaved in one process.

    Args:
        timed: their times.
        paths: files of the models; the first one is the reference.
        timing: how they were timed.
        settings: how they ran.
        names: their names in the report.
        placed: whether to warn of nodes that run elsewhere than on the GPU, and of small kernels, which takes a profile.

    """
    uneven = _uneven(names, timed.samples, timed.shapes)
    latencies = tuple(Latency.of(*row) for row in zip(names, timed.times, timed.samples, timed.load_ms, strict=True))
    return LatencyReport(
        batch=timed.samples[0],
        provider=settings.provider,
        threads=settings.threads,
        rounds=len(timed.times[0]),
        machine=machine(gpu=settings.on_gpu),
        latencies=latencies,
        ratios=tuple(ratio(latencies[0], other, cycle=len(paths)) for other in latencies[1:]),
        transfers=not timing.io_binding,
        cuda_graph=settings.cuda_graph,
        warnings=(
            *((uneven,) if uneven else ()),
            *_unstable([latencies]),
            *(_on_gpu(paths, latencies, settings, timing) if placed and settings.on_gpu else ()),
        ),
        uneven=uneven,
    )


def fresh_report(
    paths: Sequence[Path | str],
    first: int,
    timing: Timing,
    settings: Session,
    names: Sequence[str],
    *,
    placed: bool = True,
) -> LatencyReport:
    """Return the report of models that ran interleaved in a fresh process.

    Args:
        paths: files of the models; the first one is the reference.
        first: index of the model that is loaded first, which gets the better place in memory.
        timing: how they are timed.
        settings: how they run.
        names: their names in the report.
        placed: as for the report of one process; default True.

    """
    order = [(first + k) % len(paths) for k in range(len(paths))]
    timed = time_in_fresh_process([paths[k] for k in order], settings, timing)
    timed = timed.reordered([order.index(k) for k in range(len(paths))])
    return _report_of(timed, paths, timing, settings, names, placed=placed)


def _in_fresh_processes(
    paths: Sequence[Path | str], timing: Timing, settings: Session, names: Sequence[str], progress: Progress
) -> LatencyReport:
    each = replace(timing, seconds=timing.duration / timing.processes, processes=0)
    runs: list[LatencyReport] = []
    for number in range(timing.processes):
        progress("measuring latency", number / timing.processes)
        runs.append(fresh_report(paths, number % len(paths), each, settings, names, placed=not runs))
    progress("measuring latency", 1.0)
    said = dict.fromkeys(warning for run in runs for warning in run.warnings if warning not in _unstable([run.latencies]))
    latencies = tuple(
        Latency.of(
            model_runs[0].model,
            [sample for latency in model_runs for sample in latency.samples],
            model_runs[0].batch,
            float(np.median([latency.load_ms for latency in model_runs])),
        )
        for model_runs in zip(*(run.latencies for run in runs), strict=True)
    )
    return runs[0].model_copy(
        update={
            "rounds": sum(run.rounds for run in runs),
            "processes": timing.processes,
            "latencies": latencies,
            "ratios": tuple(_over_processes(runs, index) for index in range(1, len(paths))),
            "warnings": (*_unstable([run.latencies for run in runs]), *said),
        }
    )


def ratio(reference: Latency, other: Latency, cycle: int = 1) -> Ratio:
    """Return the speed-up of `other`: the median over cycles of reference time / its time, with its 95 % interval.

    Times are summed over a cycle of runs before they are divided: a run right after the same model finds its weights in the
    caches and is faster, and the median of single runs would lie between the two kinds. Adjacent cycles share disturbances of
    the machine, so the interval is Student's over the medians of eight long blocks of cycles. With fewer than 40 cycles it is
    the exact interval between two of the sorted ratios, which needs six.

    Args:
        reference: the times of the reference model.
        other: the times of the other model, measured in interleaved runs with the reference.
        cycle: the number of runs of each model in a cycle.

    """
    paired = _paired(reference, other, cycle)
    value = float(np.median(paired))
    if len(paired) < _FEW_CYCLES:
        low, high = _order_interval(paired)
        return Ratio(model=other.model, reference=reference.model, value=value, low=low, high=high)
    blocks = np.log([np.median(block) for block in np.array_split(paired, _BLOCKS)])
    half = _STUDENT * float(blocks.std(ddof=1)) / math.sqrt(_BLOCKS)
    return Ratio(
        model=other.model, reference=reference.model, value=value, low=value * math.exp(-half), high=value * math.exp(half)
    )


def _order_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the narrowest interval from the k-th smallest to the k-th largest value that contains the median in 95 % of cases.

    The number of values below the median is binomial with probability 1/2, which gives k.
    """
    ranked, count = np.sort(values), len(values)
    beyond, rank = 0.0, 0
    while beyond + math.comb(count, rank) / 2**count <= 0.025:
        beyond += math.comb(count, rank) / 2**count
        rank += 1
    first = max(0, rank - 1)
    return float(ranked[first]), float(ranked[-1 - first])


def cycles(samples: Sequence[float], cycle: int) -> np.ndarray:
    """Return the sum of every `cycle` samples; an incomplete cycle at the end is left out."""
    times = np.asarray(samples, np.float64)
    return np.asarray(times[: len(times) // cycle * cycle].reshape(-1, cycle).sum(1))


def _paired(reference: Latency, other: Latency, cycle: int) -> np.ndarray:
    sums = [cycles(latency.samples, cycle) for latency in (reference, other)]
    return np.asarray(sums[0] / sums[1])


def _over_processes(runs: Sequence[LatencyReport], index: int) -> Ratio:
    """Return the speed-up of one model over the first: the geometric mean of the medians of the processes."""
    first, other = (runs[0].latencies[k] for k in (0, index))
    cycle = len(runs[0].latencies)
    if len(runs) == 1:
        return ratio(first, other, cycle=cycle)
    from scipy import stats  # imported here: half a second that every fresh process would pay

    logs = np.log([np.median(_paired(run.latencies[0], run.latencies[index], cycle)) for run in runs])
    half = float(stats.t.ppf(0.975, len(runs) - 1) * logs.std(ddof=1) / np.sqrt(len(runs)))
    value, low, high = (float(np.exp(logs.mean() + shift)) for shift in (0.0, -half, half))
    return Ratio(model=other.model, reference=first.model, value=value, low=low, high=high)


def _distinct(paths: Sequence[Path | str]) -> list[str]:
    """Return the names of the files, or their paths where two files have the same name."""
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _uneven(names: Sequence[str], samples: Sequence[int], shapes: Sequence[Mapping[str, Sequence[int]]]) -> str:
    """Return how the work of the models differs in a run; empty if it does not."""
    if len(set(samples)) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in zip(names, samples, strict=True))
        return f"the models process different numbers of samples in a run ({counts}): the speed-up compares runs, not samples"
    for name, model_shapes in zip(names, shapes, strict=True):
        for key in model_shapes.keys() & shapes[0].keys():
            if model_shapes[key] != shapes[0][key]:
                return (
                    f"input {key!r} had shape {list(shapes[0][key])} for {names[0]} and {list(model_shapes[key])} for {name}: "
                    f"the models did not do the same work; give the shape {key}={','.join(map(str, shapes[0][key]))}"
                )
    return ""


def _unstable(runs: Sequence[Sequence[Latency]]) -> list[str]:
    """Return a warning for each model whose times vary a lot, in one process or in some of several."""
    warnings = []
    for latencies in zip(*runs, strict=True):
        variations = [latency.variation for latency in latencies if latency.variation > _UNSTABLE]
        where, most = (f" in {len(variations)} of {len(runs)} processes", "up to ") if len(runs) > 1 else ("", "")
        if variations:
            warnings.append(
                f"{latencies[0].model}: unstable times{where}, coefficient of variation {most}{max(variations):.0%}: "
                "close other programs, or measure longer"
            )
    return warnings


def _on_gpu(paths: Sequence[Path | str], latencies: Sequence[Latency], settings: Session, timing: Timing) -> tuple[str, ...]:
    """Return warnings on kernels too small for a GPU, and on nodes on another provider."""
    from tensorrail_runtime.measure.placement import placement

    warnings = []
    for path, latency in zip(paths, latencies, strict=True):
        placed = placement(path, settings=settings, batch=timing.batch, shapes=timing.shapes, values=timing.values)
        per_node = 1e3 * latency.p50 / max(1, len(placed.nodes))
        if per_node < _LAUNCH and not settings.cuda_graph:
            warnings.append(
                f"{latency.model}: limited by kernel launches, {per_node:.1f} µs per node: try a CUDA graph or a larger batch"
            )
        if placed.elsewhere:
            names = ", ".join(node.name for node in placed.elsewhere[:3])
            warnings.append(f"{latency.model}: {len(placed.elsewhere)} nodes did not run on the provider asked for: {names}")
    return tuple(warnings)
