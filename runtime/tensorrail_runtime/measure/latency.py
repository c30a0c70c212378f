"""Latency of several models, interleaved in one process, so that whatever the machine does happens to all of them."""

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
from tensorrail_runtime.records import Record
from tensorrail_runtime.sessions.float16 import holds_fp16
from tensorrail_runtime.sessions.fresh import fresh
from tensorrail_runtime.sessions.inputs import Shapes, batch_of, random_inputs
from tensorrail_runtime.sessions.machine import Machine, machine
from tensorrail_runtime.sessions.session import Session, open_session, run

_MIN_ROUNDS = 20
_MIN_CYCLES = 6  # the fewest values whose smallest and largest hold the median in 95 % of cases
_FEW = 40  # cycles, below which blocks of them are too short
_BLOCKS, _STUDENT = 8, 2.365  # blocks of cycles, and Student's 0.975 quantile at one degree of freedom less
_TRIES = 300  # orders of a cycle of which the most even one is taken
_BURST = 4
_BURST_ROUNDS = 5
_ROUNDS_ENOUGH = 400  # of bursts: layers of microseconds come to them long before their seconds are over
_ENOUGH = {50: 20, 90: 100, 99: 1000}  # samples: at least ten of them lie beyond the percentile
_UNSTABLE = 0.10  # coefficient of variation
_LAUNCH = 8.0  # microseconds a node: about what launching one kernel costs on a GPU


class Latency(Record):
    """One model's times at one batch size, in milliseconds; `samples` holds every one, in order.

    A percentile is None when fewer than ten samples would lie beyond it.
    """

    model: str
    samples: tuple[float, ...]
    p50: float
    p90: float | None
    p99: float | None = None
    variation: float = 0.0  # standard deviation / mean, the slowest hundredth left out
    throughput: float = 0.0  # samples of the batch a second, at p50
    load_ms: float = 0.0  # from the file to a session that can run

    @classmethod
    def of(cls, model: str, samples: Sequence[float], batch: int = 1, load_ms: float = 0.0) -> Latency:
        """Return the record of these times in milliseconds."""
        times = np.asarray(samples)
        found = {p: float(np.percentile(times, p)) if len(times) >= enough else None for p, enough in _ENOUGH.items()}
        kept = times[times <= np.percentile(times, 99)]
        median = float(np.median(times))
        return cls(
            model=model,
            samples=tuple(float(t) for t in samples),
            p50=median,
            p90=found[90],
            p99=found[99],
            variation=float(kept.std() / kept.mean()) if len(kept) > 1 else 0.0,
            throughput=1e3 * batch / median,
            load_ms=load_ms,
        )


class Ratio(Record):
    """How many times faster a model is than the first, with its 95 % interval."""

    model: str
    reference: str
    value: float
    low: float
    high: float


class LatencyReport(Record):
    """One interleaved run; `batch` are the samples of each run.

    `transfers` says whether inputs and outputs were copied between host and device in the times; `processes` in how many fresh
    processes they were taken, 0 for the one that asked.
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

    @property
    def fresh(self) -> str:
        """In words in how many fresh processes it was timed, such as ` in 5 fresh processes`; nothing for none."""
        return f" in {self.processes} fresh process{'es' if self.processes > 1 else ''}" if self.processes else ""


def bench(
    paths: Sequence[Path | str],
    *,
    batch: int = 1,
    seconds: float = 10.0,
    warmup: float = 0.2,
    threads: int = 0,
    provider: str = "cpu",
    settings: Session | None = None,
    io_binding: bool = False,
    shapes: Shapes | None = None,
    seed: int = 0,
    labels: Sequence[str] | None = None,
    on_round: Callable[[float], None] = lambda _: None,
) -> LatencyReport:
    """Time the models in turns, A B B A, for about `seconds`, at least 20 rounds and 6 cycles of them after `warmup` seconds.

    In a cycle every model runs once after itself and once after each other: what a model finds in the caches is shared out
    evenly. With `io_binding` inputs and outputs stay on the device and are not part of the times; CUDA graphs need it.
    `on_round` is told the share of the time that has passed. Raises `ModelError` for fewer than one model, and for inputs
    that do not fit.
    """
    if not paths:
        raise ModelError("nothing to measure: give at least one model")
    settings = replace(settings or Session(provider=provider, threads=threads), linger=False)
    if settings.cuda_graph and not io_binding:
        raise ModelError("a CUDA graph replays fixed addresses and needs IO binding: set IO binding as well")
    runners, loads, samples, ran_on = [], [], [], []
    for path in paths:
        made = runner(path, settings, io_binding=io_binding, batch=batch, shapes=shapes, seed=seed)
        runners.append(made.run)
        loads.append(made.load_ms)
        samples.append(made.samples)
        ran_on.append(made.shapes)
    names = list(labels) if labels else _distinct(paths)
    turns(runners, warmup, 3, lambda _: None)
    times = turns(runners, seconds, max(_MIN_ROUNDS, _MIN_CYCLES * len(runners)), on_round)
    latencies = tuple(Latency.of(*one) for one in zip(names, times, samples, loads, strict=True))
    return LatencyReport(
        batch=samples[0],
        provider=settings.provider,
        threads=settings.threads,
        rounds=len(times[0]),
        machine=machine(gpu=settings.on_gpu),
        latencies=latencies,
        ratios=tuple(ratio(latencies[0], other, cycle=len(paths)) for other in latencies[1:]),
        transfers=not io_binding,
        cuda_graph=settings.cuda_graph,
        warnings=(*_uneven(names, samples, ran_on), *_warnings(paths, latencies, settings, batch, shapes)),
    )


def bench_fresh(
    paths: Sequence[Path | str],
    *,
    batch: int = 1,
    seconds: float = 10.0,
    warmup: float = 0.2,
    settings: Session | None = None,
    io_binding: bool = False,
    shapes: Shapes | None = None,
    labels: Sequence[str] | None = None,
    processes: int = 5,
    on_process: Callable[[float], None] = lambda _: None,
) -> LatencyReport:
    """Return what `bench` returns when it runs in processes of its own, `seconds` in all, the samples of all together.

    The same models ran up to 1.3 times slower in a process that had decomposed weights before than in a fresh one, and not
    all by the same factor; fresh processes differ as well, by some per cent. So a comparison that is to hold where a model is
    served is made in several fresh ones, each of which loads another model first. Each process's ratio is one estimate: their
    geometric mean counts, and the interval is Student's over processes, however many rounds each of them ran. `on_process` is
    told the share of the processes that have ended.
    """
    names = list(labels) if labels else _distinct(paths)
    files = [str(Path(path).resolve()) for path in paths]
    runs = []
    for number in range(processes):
        first = number % len(paths)
        request = {
            "paths": files[first:] + files[:first],
            "settings": asdict(settings or Session()),
            "options": {
                "batch": batch,
                "seconds": seconds / processes,
                "warmup": warmup,
                "io_binding": io_binding,
                "shapes": {name: list(shape) for name, shape in (shapes or {}).items()} or None,
                "labels": names[first:] + names[:first],
            },
        }
        run = LatencyReport.model_validate_json(fresh("tensorrail_runtime.measure.latency:_bench_request", request))
        back = len(paths) - first
        runs.append(run.model_copy(update={"latencies": run.latencies[back:] + run.latencies[:back]}))
        on_process((number + 1) / processes)
    latencies = tuple(
        Latency.of(
            same[0].model,
            [sample for one in same for sample in one.samples],
            runs[0].batch,
            float(np.median([one.load_ms for one in same])),
        )
        for same in zip(*(run.latencies for run in runs), strict=True)
    )
    return runs[0].model_copy(
        update={
            "rounds": sum(run.rounds for run in runs),
            "processes": processes,
            "latencies": latencies,
            "ratios": tuple(_over_processes(runs, index) for index in range(1, len(paths))),
            "warnings": tuple(dict.fromkeys(warning for run in runs for warning in run.warnings)),
        }
    )


def fresh_bursts(paths: Sequence[Path | str], settings: Session, seconds: float) -> np.ndarray:
    """Return milliseconds (models, rounds) in a fresh process: in each round every model runs four times in a row.

    The first run of a burst finds the caches of another model and is left out; the median of the others counts. It takes
    about `seconds`, or less where 400 rounds are done before. For models whose inputs have fixed shapes.
    """
    request = {"paths": [str(path) for path in paths], "settings": asdict(settings), "seconds": seconds}
    return np.array(json.loads(fresh("tensorrail_runtime.measure.latency:_bursts_request", request)))


def _bench_request(request: dict[str, Any]) -> str:
    return bench(request["paths"], settings=Session(**request["settings"]), **request["options"]).model_dump_json()


def _bursts_request(request: dict[str, Any]) -> str:
    settings = replace(Session(**request["settings"]), linger=False)
    runners = [runner(path, settings, io_binding=settings.on_gpu).run for path in request["paths"]]
    rounds: list[list[float]] = []
    start, order = time.perf_counter(), list(range(len(runners)))
    while len(rounds) < _BURST_ROUNDS or (len(rounds) < _ROUNDS_ENOUGH and time.perf_counter() - start < request["seconds"]):
        row = [0.0] * len(runners)
        for index in order:
            runners[index]()
            samples = []
            for _ in range(_BURST - 1):
                begin = time.perf_counter()
                runners[index]()
                samples.append(1e3 * (time.perf_counter() - begin))
            row[index] = float(np.median(samples))
        rounds.append(row)
        order.reverse()
    return json.dumps(np.array(rounds[1:]).T.tolist())


@dataclass(frozen=True)
class Runner:
    """A model that is open and ready to be timed."""

    run: Callable[[], object]  # once, on the same random inputs
    load_ms: float  # what opening took
    samples: int  # of a run
    shapes: Mapping[str, tuple[int, ...]]  # of the inputs


def runner(
    path: Path | str,
    settings: Session,
    *,
    io_binding: bool = False,
    batch: int = 1,
    shapes: Shapes | None = None,
    seed: int = 0,
) -> Runner:
    """Open a model and return what runs it on random inputs; `ModelError` in one line for inputs that do not fit."""
    holds_fp16(path)  # read once, and no part of the time that opening takes
    begin = time.perf_counter()
    session = open_session(path, settings=settings)
    load = 1e3 * (time.perf_counter() - begin)
    feed = random_inputs(session, batch, seed, shapes)
    entries = session.get_inputs()
    samples = batch_of([entry.shape for entry in entries], batch, [(shapes or {}).get(entry.name) for entry in entries])
    # Run once: it reports inputs that do not fit in one line, and shows the outputs' shapes. A session with a CUDA graph
    # would capture that run, which is made beside it.
    example = run(open_session(path, settings=replace(settings, cuda_graph=False)) if settings.cuda_graph else session, feed)
    if io_binding:
        for name, array in example.items():
            if not isinstance(array, np.ndarray) or array.dtype == object:
                raise ModelError(f"{path}: output {name!r} is not a tensor of numbers: do not use IO binding")
    run_once = bound(session, feed, example, settings) if io_binding else plain(session, feed)
    return Runner(run_once, load, samples, {name: array.shape for name, array in feed.items()})


def turns(
    runners: Sequence[Callable[[], object]], seconds: float, least: int, on_round: Callable[[float], None] = lambda _: None
) -> list[list[float]]:
    """Run all in turns for about `seconds`, `least` times each or more; milliseconds, one list each.

    Only whole cycles are run, in which each of n models runs n times: see `cycle_of`.
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
    """Return the order of a cycle: repeated, every model runs as often after itself as after each of the others.

    Such orders are the Eulerian circuits of the complete directed graph with loops (de Bruijn sequences of pairs). Of some
    hundred drawn ones that is returned in which all models run at about the same time on average, so that a machine that
    slows down meanwhile does so for all: A B B A for two. It ends with the first model, as the cycle before it did.
    """
    rng = np.random.default_rng(0)
    best: tuple[int, ...] = ()
    least = math.inf
    for _ in range(_TRIES):
        left = [list(rng.permutation(models)) for _ in range(models)]
        path, circuit = [0], []
        while path:  # Hierholzer's algorithm
            if left[path[-1]]:
                path.append(left[path[-1]].pop())
            else:
                circuit.append(path.pop())
        drawn = np.array(circuit[1:])
        middles = [np.flatnonzero(drawn == model).mean() for model in range(models)]
        if (spread := max(middles) - min(middles)) < least:
            best, least = tuple(map(int, drawn)), spread
        if not least:
            break
    return best


def plain(session: ort.InferenceSession, feed: Mapping[str, np.ndarray]) -> Callable[[], object]:
    """Return a function that runs the session on arrays of the host, as a caller would."""
    return lambda: session.run(None, feed)


def bound(
    session: ort.InferenceSession, feed: Mapping[str, np.ndarray], example: Mapping[str, np.ndarray], settings: Session
) -> Callable[[], object]:
    """Return a function that runs the session on inputs that lie on the device, and waits for outputs that stay there.

    `example` holds outputs of the right shapes and types: a CUDA graph replays into the same addresses, made once.
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
        return inputs, outputs  # kept alive with this function

    return replay


def ratio(reference: Latency, other: Latency, cycle: int = 1) -> Ratio:
    """Return the speed-up of `other`: the median over cycles of reference time / its time, with its 95 % interval.

    `cycle` runs are added up before they are divided: of single runs, those where a model has just run and finds its weights
    in the caches differ from the others by more than what is asked for, and the median would lie between the two. Neighbouring
    cycles share what the machine does beside, so the interval is Student's over the medians of eight long blocks of them. Of
    fewer than 40 cycles it is the exact one between two of the sorted ratios, which needs six.
    """
    paired = _paired(reference, other, cycle)
    value = float(np.median(paired))
    if len(paired) < _FEW:
        low, high = _order_interval(paired)
        return Ratio(model=other.model, reference=reference.model, value=value, low=low, high=high)
    blocks = np.log([np.median(block) for block in np.array_split(paired, _BLOCKS)])
    half = _STUDENT * float(blocks.std(ddof=1)) / math.sqrt(_BLOCKS)
    return Ratio(
        model=other.model, reference=reference.model, value=value, low=value * math.exp(-half), high=value * math.exp(half)
    )


def _order_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the narrowest interval between the k-th smallest and k-th largest value that holds the median in 95 % of cases.

    As many of n values lie below the median as heads fall in n throws, so k is the binomial's.
    """
    ranked, count = np.sort(values), len(values)
    beyond, rank = 0.0, 0
    while beyond + math.comb(count, rank) / 2**count <= 0.025:
        beyond += math.comb(count, rank) / 2**count
        rank += 1
    first = max(0, rank - 1)
    return float(ranked[first]), float(ranked[-1 - first])


def cycles(samples: Sequence[float], cycle: int) -> np.ndarray:
    """Return the sums of every `cycle` samples, what is left over at the end left out."""
    times = np.asarray(samples, np.float64)
    return np.asarray(times[: len(times) // cycle * cycle].reshape(-1, cycle).sum(1))


def _paired(reference: Latency, other: Latency, cycle: int) -> np.ndarray:
    sums = [cycles(one.samples, cycle) for one in (reference, other)]
    return np.asarray(sums[0] / sums[1])


def _over_processes(runs: Sequence[LatencyReport], index: int) -> Ratio:
    """Return the speed-up of the model of that index over the first: the geometric mean of the processes' medians."""
    first, other = (runs[0].latencies[k] for k in (0, index))
    cycle = len(runs[0].latencies)
    if len(runs) == 1:
        return ratio(first, other, cycle=cycle)
    from scipy import stats  # half a second to import, which every fresh process would pay

    found = np.log([np.median(_paired(run.latencies[0], run.latencies[index], cycle)) for run in runs])
    half = float(stats.t.ppf(0.975, len(runs) - 1) * found.std(ddof=1) / np.sqrt(len(runs)))
    value, low, high = (float(np.exp(found.mean() + shift)) for shift in (0.0, -half, half))
    return Ratio(model=other.model, reference=first.model, value=value, low=low, high=high)


def _distinct(paths: Sequence[Path | str]) -> list[str]:
    """Return the files' names, or their paths where two files have the same name."""
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _uneven(names: Sequence[str], samples: Sequence[int], shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> list[str]:
    if len(set(samples)) > 1:
        found = ", ".join(f"{name} {held}" for name, held in zip(names, samples, strict=True))
        return [f"the models process different numbers of samples in a run ({found}): the speed-up compares runs, not samples"]
    for name, fed in zip(names, shapes, strict=True):
        for key in fed.keys() & shapes[0].keys():
            if fed[key] != shapes[0][key]:
                return [
                    f"input {key!r} had shape {list(shapes[0][key])} for {names[0]} and {list(fed[key])} for {name}: the "
                    f"models did not do the same work; give --shape {key}={','.join(map(str, shapes[0][key]))}"
                ]
    return []


def _warnings(
    paths: Sequence[Path | str], latencies: Sequence[Latency], settings: Session, batch: int, shapes: Shapes | None
) -> tuple[str, ...]:
    """Return what makes these times less than they seem: an unstable machine, or kernels too small to be seen."""
    from tensorrail_runtime.measure.placement import placement

    found = [
        f"{latency.model}: unstable times, coefficient of variation {latency.variation:.0%}: "
        "close other programs, or measure longer"
        for latency in latencies
        if latency.variation > _UNSTABLE
    ]
    if not settings.on_gpu:
        return tuple(found)
    for path, latency in zip(paths, latencies, strict=True):
        placed = placement(path, settings=settings, batch=batch, shapes=shapes)
        each = 1e3 * latency.p50 / max(1, len(placed.nodes))
        if each < _LAUNCH and not settings.cuda_graph:
            found.append(
                f"{latency.model}: limited by kernel launches, {each:.1f} µs per node: try --cuda-graph or a larger batch"
            )
        if placed.elsewhere:
            names = ", ".join(node.name for node in placed.elsewhere[:3])
            found.append(f"{latency.model}: {len(placed.elsewhere)} nodes did not run on the provider asked for: {names}")
    return tuple(found)
