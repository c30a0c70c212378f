"""Measures the latency of several models, interleaved in one process, so that disturbances affect all of them alike."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.measure.footprint import Footprint
from tensorrail_runtime.measure.timing import Timing
from tensorrail_runtime.progress import Progress, silent
from tensorrail_runtime.records import Record
from tensorrail_runtime.sessions.float16 import holds_fp16
from tensorrail_runtime.sessions.fresh import fresh
from tensorrail_runtime.sessions.inputs import Shapes, batch_of, random_inputs
from tensorrail_runtime.sessions.machine import Machine, machine
from tensorrail_runtime.sessions.session import Session, open_session, run
from tensorrail_runtime.tables import Part, PrintedRecord, Table, or_dash

_MIN_ROUNDS = 20
_MIN_CYCLES = 6  # the fewest values whose range contains the median in 95 % of cases
_FEW_CYCLES = 40  # with fewer, blocks of cycles are too short
_BLOCKS, _STUDENT = 8, 2.365  # blocks of cycles, and Student's 0.975 quantile for 7 degrees of freedom
_TRIES = 300  # random orders of a cycle, of which the most even one is used
_BURST = 4  # runs in a row of each model
_BURST_ROUNDS = 5
_ROUNDS_ENOUGH = 400  # of bursts: layers of a few microseconds reach them long before their time is over
_ENOUGH = {50: 20, 90: 100, 99: 1000}  # samples for a percentile: at least ten lie beyond it
_UNSTABLE = 0.10  # coefficient of variation from which times are called unstable
_LAUNCH = 8.0  # microseconds per node: about the cost of one kernel launch on a GPU


class Latency(Record):
    """The times of one model at one batch size, in milliseconds.

    `samples` holds every time, in order. A percentile is None when fewer than ten samples would lie beyond it.
    """

    model: str
    samples: tuple[float, ...]
    p50: float
    p90: float | None
    p99: float | None = None
    variation: float = 0.0  # standard deviation / mean, without the slowest 1 % of the samples
    throughput: float = 0.0  # samples of the batch per second, at p50
    load_ms: float = 0.0  # from the file to a session that is ready to run

    @classmethod
    def of(cls, model: str, samples: Sequence[float], batch: int = 1, load_ms: float = 0.0) -> Latency:
        """Return the record of these times, in milliseconds."""
        times = np.asarray(samples)
        percentiles = {p: float(np.percentile(times, p)) if len(times) >= enough else None for p, enough in _ENOUGH.items()}
        trimmed = times[times <= np.percentile(times, 99)]
        median = float(np.median(times))
        return cls(
            model=model,
            samples=tuple(float(t) for t in samples),
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
    """The latency of one or more models, measured in turns.

    Attributes:
        batch: the number of samples in each run.
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
    with_transfers: LatencyReport | None = None  # the same with inputs and outputs copied, where both were asked for
    footprints: tuple[Footprint, ...] = ()  # where they were asked for

    @property
    def fresh(self) -> str:
        """The number of fresh processes as text, such as ` in 5 fresh processes`; empty for none."""
        return f" in {self.processes} fresh process{'es' if self.processes > 1 else ''}" if self.processes else ""

    def shown(self) -> tuple[Part, ...]:
        """Return the table of latencies, the warnings, and what was measured beside them."""
        where = self.machine.gpu.name if self.machine.gpu else self.machine.processor
        how = "" if self.provider == "cpu" else ", with transfers" if self.transfers else ", on the device"
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
            parts += self.with_transfers.shown()
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
    """Time the models in turns, A B B A, at least 20 rounds and 6 cycles of them.

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
    if timing.processes:
        return _in_fresh_processes(paths, timing, settings, names, progress)
    return _here(paths, timing, settings, names, progress)


def _here(
    paths: Sequence[Path | str], timing: Timing, settings: Session, names: Sequence[str], progress: Progress
) -> LatencyReport:
    settings = replace(settings, linger=False)
    if settings.cuda_graph and not timing.io_binding:
        raise ModelError("a CUDA graph replays fixed addresses and needs IO binding: set IO binding as well")
    runners = [runner(path, settings, timing) for path in paths]
    samples, ran_on = [one.samples for one in runners], [one.shapes for one in runners]
    runs = [one.run for one in runners]
    turns(runs, timing.warmup, 3)
    least = max(_MIN_ROUNDS, _MIN_CYCLES * len(runs))
    times = turns(runs, timing.seconds, least, lambda share: progress("measuring latency", share))
    loads = [one.load_ms for one in runners]
    latencies = tuple(Latency.of(*row) for row in zip(names, times, samples, loads, strict=True))
    return LatencyReport(
        batch=samples[0],
        provider=settings.provider,
        threads=settings.threads,
        rounds=len(times[0]),
        machine=machine(gpu=settings.on_gpu),
        latencies=latencies,
        ratios=tuple(ratio(latencies[0], other, cycle=len(paths)) for other in latencies[1:]),
        transfers=not timing.io_binding,
        cuda_graph=settings.cuda_graph,
        warnings=(
            *_uneven(names, samples, ran_on),
            *_warnings(paths, latencies, settings, timing.batch, timing.shapes or None),
        ),
    )


def _in_fresh_processes(
    paths: Sequence[Path | str], timing: Timing, settings: Session, names: Sequence[str], progress: Progress
) -> LatencyReport:
    files = [str(Path(path).resolve()) for path in paths]
    each = replace(timing, seconds=timing.seconds / timing.processes, processes=0)
    runs = []
    for number in range(timing.processes):
        progress("measuring latency", number / timing.processes)
        first = number % len(paths)
        request = {
            "paths": files[first:] + files[:first],
            "settings": asdict(settings),
            "timing": asdict(each),
            "labels": [*names[first:], *names[:first]],
        }
        run = LatencyReport.model_validate_json(fresh("tensorrail_runtime.measure.latency:_bench_request", request))
        back = len(paths) - first
        runs.append(run.model_copy(update={"latencies": run.latencies[back:] + run.latencies[:back]}))
    progress("measuring latency", 1.0)
    latencies = tuple(
        Latency.of(
            model_runs[0].model,
            [sample for latency in model_runs for sample in latency.samples],
            runs[0].batch,
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
            "warnings": tuple(dict.fromkeys(warning for run in runs for warning in run.warnings)),
        }
    )


def fresh_bursts(paths: Sequence[Path | str], settings: Session, seconds: float) -> np.ndarray:
    """Time models in a fresh process in which every model runs four times in a row in each round.

    The first of the four runs finds the caches of another model and is left out; the median of the others counts.

    Args:
        paths: the ONNX files; their inputs have fixed shapes.
        settings: the options of the sessions.
        seconds: about how long to measure; 400 rounds are enough.

    Returns:
        Times in milliseconds, of shape (models, rounds).

    """
    request = {"paths": [str(path) for path in paths], "settings": asdict(settings), "seconds": seconds}
    return np.array(json.loads(fresh("tensorrail_runtime.measure.latency:_bursts_request", request)))


def _bench_request(request: dict[str, Any]) -> str:
    timing, settings = Timing(**request["timing"]), Session(**request["settings"])
    return bench(request["paths"], timing, settings, labels=request["labels"]).model_dump_json()


def _bursts_request(request: dict[str, Any]) -> str:
    settings = replace(Session(**request["settings"]), linger=False)
    runners = [runner(path, settings, Timing(io_binding=settings.on_gpu)).run for path in request["paths"]]
    rounds: list[list[float]] = []
    start, order = time.perf_counter(), list(range(len(runners)))
    while len(rounds) < _BURST_ROUNDS or (len(rounds) < _ROUNDS_ENOUGH and time.perf_counter() - start < request["seconds"]):
        medians = [0.0] * len(runners)
        for index in order:
            runners[index]()
            samples = []
            for _ in range(_BURST - 1):
                begin = time.perf_counter()
                runners[index]()
                samples.append(1e3 * (time.perf_counter() - begin))
            medians[index] = float(np.median(samples))
        rounds.append(medians)
        order.reverse()
    return json.dumps(np.array(rounds[1:]).T.tolist())


@dataclass(frozen=True)
class Runner:
    """A model that is loaded and ready to be timed."""

    run: Callable[[], object]  # runs the model once, on the same random inputs each time
    load_ms: float  # how long opening took
    samples: int  # in one run
    shapes: Mapping[str, tuple[int, ...]]  # of the inputs


def runner(path: Path | str, settings: Session, timing: Timing | None = None) -> Runner:
    """Open a model and return what runs it on random inputs; `ModelError` in one line for inputs that do not fit.

    Of `timing` the batch size, shapes, seed and IO binding count.
    """
    timing = timing or Timing()
    holds_fp16(path)  # read once, and no part of the time that opening takes
    begin = time.perf_counter()
    session = open_session(path, settings=settings)
    load = 1e3 * (time.perf_counter() - begin)
    feed = random_inputs(session, timing.batch, timing.seed, timing.shapes)
    entries = session.get_inputs()
    samples = batch_of([entry.shape for entry in entries], timing.batch, [timing.shapes.get(entry.name) for entry in entries])
    # Run once: it reports inputs that do not fit in one line, and shows the outputs' shapes. A session with a CUDA graph
    # would capture that run, which is made beside it.
    example = run(open_session(path, settings=replace(settings, cuda_graph=False)) if settings.cuda_graph else session, feed)
    if timing.io_binding:
        for name, array in example.items():
            if not isinstance(array, np.ndarray) or array.dtype == object:
                raise ModelError(f"{path}: output {name!r} is not a tensor of numbers: do not use IO binding")
    run_once = bound(session, feed, example, settings) if timing.io_binding else plain(session, feed)
    return Runner(run_once, load, samples, {name: array.shape for name, array in feed.items()})


def turns(
    runners: Sequence[Callable[[], object]], seconds: float, least: int, on_round: Callable[[float], None] = lambda _: None
) -> list[list[float]]:
    """Run all models in turns for about `seconds`, each at least `least` times, and return one list of milliseconds each.

    Only whole cycles run, in which each of n models runs n times: see `cycle_of`.
    """
    times: list[list[float]] = [[] for _ in runners]
    start, order = time.perf_counter(), cycle_of(len(runners))
    while len(times[0]) < least or time.perf_counter() - start < seconds:
        for index in order:
            begin = time.perf_counter()
            runners[index]()
            times[index].append(1e3 * (time.perf_counter() - begin))
        on_round(min(1.0, (time.perf_counter() - start) / seconds) if seconds else 1.0)
    return times


@functools.cache
def cycle_of(models: int) -> tuple[int, ...]:
    """Return the order of the models in a cycle: when it repeats, each model runs equally often after every model.

    Such orders are the Eulerian circuits of the complete directed graph with loops (de Bruijn sequences of pairs). Of some
    hundred random ones, it returns the order in which the average positions of the models differ least, so that a machine
    that slows down affects all models alike: A B B A for two. It ends with the first model, as does the cycle before it.
    """
    rng = np.random.default_rng(0)
    best: tuple[int, ...] = ()
    least = math.inf
    for _ in range(_TRIES):
        unused = [list(rng.permutation(models)) for _ in range(models)]  # edges from each model
        path, circuit = [0], []
        while path:  # Hierholzer's algorithm
            if unused[path[-1]]:
                path.append(unused[path[-1]].pop())
            else:
                circuit.append(path.pop())
        order = np.array(circuit[1:])
        middles = [np.flatnonzero(order == model).mean() for model in range(models)]
        if (spread := max(middles) - min(middles)) < least:
            best, least = tuple(map(int, order)), spread
        if not least:
            break
    return best


def plain(session: ort.InferenceSession, feed: Mapping[str, np.ndarray]) -> Callable[[], object]:
    """Return a function that runs the session on arrays in host memory, as a caller would."""
    return lambda: session.run(None, feed)


def bound(
    session: ort.InferenceSession, feed: Mapping[str, np.ndarray], example: Mapping[str, np.ndarray], settings: Session
) -> Callable[[], object]:
    """Return a function that runs the session on inputs on the device and waits for outputs that stay there.

    `example` holds outputs of the right shapes and types: buffers are allocated once, since a CUDA graph replays into them.
    """
    device = "cuda" if settings.on_gpu else "cpu"
    binding = session.io_binding()
    inputs = {name: ort.OrtValue.ortvalue_from_numpy(array, device, 0) for name, array in feed.items()}
    outputs = {
        name: ort.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype, device, 0) for name, array in example.items()
    }
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, value)
    for name, value in outputs.items():
        binding.bind_ortvalue_output(name, value)

    def replay() -> object:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return inputs, outputs  # so that the buffers live as long as this function

    return replay


def ratio(reference: Latency, other: Latency, cycle: int = 1) -> Ratio:
    """Return the speed-up of `other`: the median over cycles of reference time / its time, with its 95 % interval.

    Times are summed over a cycle of runs before they are divided: a run right after the same model finds its weights in the
    caches and is faster, and the median of single runs would lie between the two kinds. Adjacent cycles share disturbances of
    the machine, so the interval is Student's over the medians of eight long blocks of cycles. With fewer than 40 cycles it is
    the exact interval between two of the sorted ratios, which needs six.

    Args:
        reference: the times of the reference model.
        other: the times of the other model, measured in turns with the reference.
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


def _uneven(names: Sequence[str], samples: Sequence[int], shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> list[str]:
    if len(set(samples)) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in zip(names, samples, strict=True))
        return [f"the models process different numbers of samples in a run ({counts}): the speed-up compares runs, not samples"]
    for name, model_shapes in zip(names, shapes, strict=True):
        for key in model_shapes.keys() & shapes[0].keys():
            if model_shapes[key] != shapes[0][key]:
                return [
                    f"input {key!r} had shape {list(shapes[0][key])} for {names[0]} and {list(model_shapes[key])} for {name}: "
                    f"the models did not do the same work; give the shape {key}={','.join(map(str, shapes[0][key]))}"
                ]
    return []


def _warnings(
    paths: Sequence[Path | str], latencies: Sequence[Latency], settings: Session, batch: int, shapes: Shapes | None
) -> tuple[str, ...]:
    """Return warnings on unstable times, on kernels too small for a GPU, and on nodes on another provider."""
    from tensorrail_runtime.measure.placement import placement

    warnings = [
        f"{latency.model}: unstable times, coefficient of variation {latency.variation:.0%}: "
        "close other programs, or measure longer"
        for latency in latencies
        if latency.variation > _UNSTABLE
    ]
    if not settings.on_gpu:
        return tuple(warnings)
    for path, latency in zip(paths, latencies, strict=True):
        placed = placement(path, settings=settings, batch=batch, shapes=shapes)
        per_node = 1e3 * latency.p50 / max(1, len(placed.nodes))
        if per_node < _LAUNCH and not settings.cuda_graph:
            warnings.append(
                f"{latency.model}: limited by kernel launches, {per_node:.1f} µs per node: try a CUDA graph or a larger batch"
            )
        if placed.elsewhere:
            names = ", ".join(node.name for node in placed.elsewhere[:3])
            warnings.append(f"{latency.model}: {len(placed.elsewhere)} nodes did not run on the provider asked for: {names}")
    return tuple(warnings)
