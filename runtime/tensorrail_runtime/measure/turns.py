"""Runs models interleaved and takes their times, in this process or in a fresh one.

Fresh processes import this module and what it needs, and nothing else: NumPy and ONNX Runtime, but neither onnx nor pydantic. A
process thus starts in half the time.
"""

from __future__ import annotations

import contextlib
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
from tensorrail_runtime.measure.timing import Timing
from tensorrail_runtime.scratch import scratch
from tensorrail_runtime.sessions.fresh import fresh
from tensorrail_runtime.sessions.inputs import batch_of, random_inputs
from tensorrail_runtime.sessions.kernels import Contents, contents_of, remember
from tensorrail_runtime.sessions.session import Session, naming, open_session, run
from tensorrail_runtime.sessions.values import load_values, save_values

MIN_ROUNDS = 20
MIN_CYCLES = 6  # the fewest values whose range contains the median in 95 % of cases
_TRIES = 300  # random orders of a cycle, of which the most even one is used
_BURST = 4  # runs in a row of each model
BURST_ROUNDS = 5
_ROUNDS_ENOUGH = 200  # of bursts: layers of a few microseconds reach them long before their time is over
_FEWEST_PRECISE = 7  # rounds that count: with fewer, the range of the values is hardly wider than their median is uncertain
PRECISE = 0.005  # half the 95 % interval of a ratio of times; the times of layers within models are about half as precise


@dataclass(frozen=True)
class Turns:
    """The times of models that ran interleaved, in the order of the models."""

    times: list[list[float]]
    """Milliseconds of every run of each model."""
    load_ms: list[float]
    """Milliseconds that opening each model took."""
    samples: list[int]
    """Samples in one run of each model."""
    shapes: list[dict[str, list[int]]]
    """Shapes of the inputs of each model, by name."""

    def reordered(self, order: Sequence[int]) -> Turns:
        """Return the same for the models in another order."""
        return Turns(
            [self.times[k] for k in order],
            [self.load_ms[k] for k in order],
            [self.samples[k] for k in order],
            [self.shapes[k] for k in order],
        )


def time_models(
    paths: Sequence[Path | str], settings: Session, timing: Timing, on_round: Callable[[float], None] = lambda _: None
) -> Turns:
    """Run models interleaved in this process: at least 20 rounds and 6 cycles, see `cycle_of`.

    Args:
        paths: files of the models.
        settings: how the models run.
        timing: how long and on what inputs.
        on_round: told the share of the measurement that is done.

    Raises:
        ModelError: a model does not run, or the inputs do not fit it.

    """
    settings = replace(settings, linger=False)
    if settings.cuda_graph and not timing.io_binding:
        raise ModelError("a CUDA graph replays fixed addresses and needs IO binding: set IO binding as well")
    runners = [runner(path, settings, timing) for path in paths]
    runs = [prepared.run for prepared in runners]
    turns(runs, timing.warmup, 3)
    times = turns(runs, timing.duration, max(MIN_ROUNDS, MIN_CYCLES * len(runs)), on_round)
    shapes = [{name: list(shape) for name, shape in prepared.shapes.items()} for prepared in runners]
    return Turns(times, [prepared.load_ms for prepared in runners], [prepared.samples for prepared in runners], shapes)


def time_in_fresh_process(paths: Sequence[Path | str], settings: Session, timing: Timing) -> Turns:
    """Do the same as `time_models` in a fresh process."""
    request = _request(paths, settings) | {"timing": asdict(replace(timing, values={}))}
    with scratch() as folder:
        if timing.values:
            request["values"] = save_values(timing.values, Path(folder))
        return Turns(**json.loads(fresh(f"{__name__}:answer_turns", request, paths)))


def fresh_bursts(
    paths: Sequence[Path | str],
    settings: Session,
    seconds: float,
    rounds: int = BURST_ROUNDS,
    precision: float = PRECISE,
    most: int = _ROUNDS_ENOUGH,
    of_all: float = 0.0,
) -> tuple[np.ndarray, float]:
    """Time models in a fresh process in which every model runs four times in a row in each round.

    The first of the four runs finds the caches of another model and is left out; the median of the others counts. A model
    whose time is known precisely enough, as a multiple of the first model's, runs no more.

    Args:
        paths: the ONNX files; their inputs have fixed shapes.
        settings: the options of the sessions.
        seconds: how long to measure at most.
        rounds: the number of rounds at least, the first of which is left out.
        precision: half the 95 % interval of such a multiple that is precise enough; default 0.005.
        most: the number of rounds at most; default 200.
        of_all: half the interval that is precise enough as well, as a share of the time of all models; default 0.

    Returns:
        Times in milliseconds, of shape (models, rounds), NaN in rounds in which a model did not run; and the share of the time
        that the process waited for a processor because other programs ran, 0 where the system does not tell.

    """
    request = _request(paths, settings) | {"seconds": seconds, "rounds": rounds, "most": most}
    request |= {"precision": precision, "of_all": of_all}
    answer = json.loads(fresh(f"{__name__}:answer_bursts", request, paths))
    return np.array(answer["times"]), float(answer["waited"])


def answer_turns(request: dict[str, Any]) -> str:  # Any: JSON, made by `time_in_fresh_process`
    """Time the models of a request in interleaved runs, and return the times as JSON; a fresh process calls it."""
    timing = Timing(**(request["timing"] | {"values": load_values(request.get("values"))}))
    return json.dumps(asdict(time_models(request["paths"], _settings(request), timing)))


def answer_bursts(request: dict[str, Any]) -> str:  # Any: JSON, made by `fresh_bursts`
    """Time the models of a request in bursts, and return the times as JSON; a fresh process calls it."""
    settings = replace(_settings(request), linger=False)
    runners = [runner(path, settings, Timing(io_binding=settings.on_gpu)).run for path in request["paths"]]
    rounds: list[list[float]] = []
    start, order, waited = time.perf_counter(), list(range(len(runners))), _waited_ns()
    while len(rounds) < request["rounds"] or (
        order and len(rounds) < request["most"] and time.perf_counter() - start < request["seconds"]
    ):
        medians = [math.nan] * len(runners)
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
        if len(rounds) >= request["rounds"]:
            precise = are_precise(rounds[1:], request["precision"], request["of_all"])
            others = [index for index in order if index and not precise[index]]
            order = [index for index in order if index in others or (not index and (others or not precise[0]))]
    share = 1e-9 * (_waited_ns() - waited) / (time.perf_counter() - start)
    return json.dumps({"times": np.array(rounds[1:]).T.tolist(), "waited": share})


def are_precise(rounds: Sequence[Sequence[float]], precision: float = PRECISE, of_all: float = 0.0) -> np.ndarray:
    """Return which models' interleaved times are enough to compare them.

    Args:
        rounds: the milliseconds of all models in each round; NaN from the round on in which a model ran no more.
        precision: half the 95 % interval that is precise enough; default 0.005.
        of_all: the same as a share of the time of all models; default 0.

    Returns:
        Whether the median of each model's time, as a multiple of the first model's, is known so precisely (interval by order
        statistics), of shape (models,); for one model, of its time. The first of several is.

    """
    times = np.atleast_2d(np.array(rounds).T)
    ratios = np.sort(times if len(times) == 1 else times / times[:1])  # NaN comes last
    counts = np.isfinite(ratios).sum(1)
    if counts.min() < _FEWEST_PRECISE:
        return np.zeros(len(times), bool)
    outside = (counts / 2 - 0.98 * np.sqrt(counts)).astype(int)  # values on each side of the interval of the median
    low, middle, high = (ratios[np.arange(len(ratios)), at] for at in (outside, counts // 2, counts - 1 - outside))
    return np.asarray(high - low <= 2 * np.maximum(precision * middle, of_all * middle.sum()))


def _request(paths: Sequence[Path | str], settings: Session) -> dict[str, Any]:
    """Return what a fresh process needs to open the models; it need not read what they hold."""
    files = [str(Path(path).absolute()) for path in paths]  # a link stays one: external data may be beside it alone
    return {"paths": files, "contents": [asdict(contents_of(file)) for file in files], "settings": asdict(settings)}


def _waited_ns() -> int:
    """Return for how many nanoseconds the threads of this process were ready to run and did not; 0 where it is not known.

    Linux counts it: the second number of schedstat, see Documentation/scheduler/sched-stats.rst of the kernel.
    """
    waited = 0
    for stat in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, IndexError, ValueError):  # a thread that ended meanwhile, or another format
            waited += int(stat.read_text(encoding="ascii").split()[1])
    return waited


def _settings(request: dict[str, Any]) -> Session:
    for path, contents in zip(request["paths"], request["contents"], strict=True):
        remember(path, Contents(**contents))
    return Session(**request["settings"])


@dataclass(frozen=True)
class Runner:
    """A model that is loaded and ready to be timed."""

    run: Callable[[], object]  # runs the model once, on the same inputs each time
    load_ms: float  # how long opening took
    samples: int  # in one run
    shapes: Mapping[str, tuple[int, ...]]  # of the inputs


def runner(path: Path | str, settings: Session, timing: Timing | None = None) -> Runner:
    """Open a model and return what runs it on known or random inputs; `ModelError` in one line for inputs that do not fit.

    Of `timing` the batch size, shapes, values, seed and IO binding count.
    """
    timing = timing or Timing()
    contents_of(path)  # read once, and no part of the time that opening takes
    begin = time.perf_counter()
    session = open_session(path, settings=settings)
    load = 1e3 * (time.perf_counter() - begin)
    feed = random_inputs(session, timing.batch, timing.seed, timing.shapes, timing.values)
    entries = session.get_inputs()
    samples = batch_of([entry.shape for entry in entries], timing.batch, [timing.shapes.get(entry.name) for entry in entries])
    # Run once: it reports inputs that do not fit in one line, and shows the outputs' shapes. A session with a CUDA graph
    # would capture that run, which is made beside it.
    alone = open_session(path, settings=replace(settings, cuda_graph=False)) if settings.cuda_graph else session
    with naming(path):
        example = run(alone, feed)
    if timing.io_binding:
        for name, array in example.items():
            if not isinstance(array, np.ndarray) or array.dtype == object:
                raise ModelError(f"{path}: output {name!r} is not a tensor of numbers: do not use IO binding")
    run_once = bound(session, feed, example, settings) if timing.io_binding else plain(session, feed)
    return Runner(run_once, load, samples, {name: array.shape for name, array in feed.items()})


def turns(
    runners: Sequence[Callable[[], object]], seconds: float, least: int, on_round: Callable[[float], None] = lambda _: None
) -> list[list[float]]:
    """Run all models interleaved for about `seconds`, each at least `least` times, and return one list of milliseconds each.

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
