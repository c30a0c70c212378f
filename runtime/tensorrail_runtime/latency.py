"""Interleaved latency: the models take turns in one run, so that what the machine does beside it hits all alike."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from tensorrail_runtime.parity import random_inputs
from tensorrail_runtime.records import Record
from tensorrail_runtime.session import ModelError, open_session, run

_RESAMPLES = 2000
_MIN_ROUNDS = 20


class Machine(Record):
    """Where times were taken."""

    processor: str
    cores: int
    system: str
    onnxruntime: str


class Latency(Record):
    """One model's times at one batch size, in milliseconds; `samples` holds every one, in order."""

    model: str
    samples: tuple[float, ...]
    p50: float
    p90: float


class Ratio(Record):
    """How many times faster a model is than the first: median of paired ratios, 95 % bootstrap interval."""

    model: str
    reference: str
    value: float
    low: float
    high: float


class LatencyReport(Record):
    """One interleaved run."""

    batch: int
    provider: str
    threads: int
    rounds: int
    machine: Machine
    latencies: tuple[Latency, ...]
    ratios: tuple[Ratio, ...]


def bench(
    paths: Sequence[Path | str],
    *,
    batch: int = 1,
    seconds: float = 10.0,
    threads: int = 0,
    provider: str = "cpu",
    seed: int = 0,
    labels: Sequence[str] | None = None,
    on_round: Callable[[float], None] = lambda _: None,
) -> LatencyReport:
    """Time the models in turns, A B A B, for about `seconds`, at least 20 rounds after a warm-up.

    Every second round goes through the models backwards, so that none always follows the same other. `on_round` is told
    the share of the time that has passed. Raises `ModelError` for fewer than one model.
    """
    if not paths:
        raise ModelError("nothing to measure: give at least one model")
    sessions = [open_session(path, threads=threads, provider=provider) for path in paths]
    feeds = [random_inputs(session, batch, seed) for session in sessions]
    for session, feed in zip(sessions, feeds, strict=True):
        run(session, feed)  # reports inputs that do not fit in one line
        for _ in range(5):
            session.run(None, feed)
    times: list[list[float]] = [[] for _ in sessions]
    start, order = time.perf_counter(), list(range(len(sessions)))
    while len(times[0]) < _MIN_ROUNDS or time.perf_counter() - start < seconds:
        for index in order:
            begin = time.perf_counter()
            sessions[index].run(None, feeds[index])
            times[index].append(1e3 * (time.perf_counter() - begin))
        order.reverse()
        on_round(min(1.0, (time.perf_counter() - start) / seconds))
    names = list(labels) if labels else [Path(path).name for path in paths]
    latencies = tuple(
        Latency(model=name, samples=tuple(t), p50=float(np.percentile(t, 50)), p90=float(np.percentile(t, 90)))
        for name, t in zip(names, times, strict=True)
    )
    return LatencyReport(
        batch=batch,
        provider=provider,
        threads=threads,
        rounds=len(times[0]),
        machine=machine(),
        latencies=latencies,
        ratios=tuple(ratio(latencies[0], other, seed) for other in latencies[1:]),
    )


def ratio(reference: Latency, other: Latency, seed: int = 0) -> Ratio:
    """Return the speed-up of `other`: the median over rounds of reference time / its time, with a bootstrap interval.

    Each round's pair was taken back to back. Neighbouring rounds share what the machine does beside, so blocks of rounds
    are resampled, not single ones.
    """
    paired = np.array(reference.samples) / np.array(other.samples)
    count = len(paired)
    block = max(1, int(np.sqrt(count)))
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, count - block + 1, (_RESAMPLES, -(-count // block)))
    picks = (starts[:, :, None] + np.arange(block)).reshape(_RESAMPLES, -1)[:, :count]
    low, high = np.percentile(np.median(paired[picks], axis=1), [2.5, 97.5])
    return Ratio(model=other.model, reference=reference.model, value=float(np.median(paired)), low=float(low), high=float(high))


def machine() -> Machine:
    """Return the machine that this runs on."""
    return Machine(
        processor=_processor(),
        cores=os.cpu_count() or 1,
        system=f"{platform.system()} {platform.machine()}",
        onnxruntime=ort.__version__,
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
