"""Answers several requests by one run of the model: concatenate along the batch axes, run, and split.

Requests are put into one run only if their other axes are equal and all inputs of a request have the same number of samples,
up to a limit of samples. If a run of several requests fails, each runs alone, so that one request cannot make another fail.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.serve.replicas.batch_axis import Axes
from tensorrail_runtime.sessions.session import run

Feed = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Answer:
    """The answer to one request: its outputs by name, or the reason why there are none.

    `rows` is the number of samples in the run that answered it, `seconds` the time of that run, and `waited` the seconds
    before it. `first` is true for one request of each run, so that each run is counted once.
    """

    outputs: Mapping[str, np.ndarray] | None
    reason: str = ""
    invalid: bool = False  # ONNX Runtime says INVALID_ARGUMENT: the request is wrong, not the server
    rows: int = 1
    seconds: float = 0.0
    waited: float = 0.0
    first: bool = True


def run_batch(session: ort.InferenceSession, feeds: Sequence[Feed], axes: Axes | None, limit: int) -> list[Answer]:
    """Return one answer per request, in order; without `axes`, each request runs alone."""
    answers: dict[int, Answer] = {}
    for group in pack(feeds, axes, limit):
        joined = None if axes is None or len(group) == 1 else _joined(session, [feeds[index] for index in group], axes)
        for place, index in enumerate(group):
            answers[index] = joined[place] if joined else _alone(session, feeds[index], axes)
    return [answers[index] for index in range(len(feeds))]


def pack(feeds: Sequence[Feed], axes: Axes | None, limit: int) -> list[list[int]]:
    """Return the indices of the requests of each run: of equal shapes but for the batch axes, and at most `limit` samples.

    A request with more samples than the limit is a run of its own. So is a request whose inputs have different numbers of
    samples: concatenated, its samples would be paired with those of other requests.
    """
    if axes is None:
        return [[index] for index in range(len(feeds))]
    groups: list[list[int]] = []
    open_groups: dict[tuple[object, ...], tuple[list[int], int]] = {}
    for index, feed in enumerate(feeds):
        if len({array.shape[axes[name]] for name, array in feed.items()}) > 1:
            groups.append([index])
            continue
        kind = tuple((name, array.dtype.str, _without(array.shape, axes[name])) for name, array in feed.items())
        rows = _rows(feed, axes)
        group, size = open_groups.get(kind, ([], limit))
        if size + rows > limit:
            group, size = [], 0
            groups.append(group)
        group.append(index)
        open_groups[kind] = (group, size + rows)
    return groups


def _joined(session: ort.InferenceSession, feeds: Sequence[Feed], axes: Axes) -> list[Answer] | None:
    """Return the answers of one run for several requests; None if it fails or its outputs cannot be split."""
    rows = [_rows(feed, axes) for feed in feeds]
    total = sum(rows)
    begin = time.perf_counter()
    try:
        outputs = run(session, {name: np.concatenate([feed[name] for feed in feeds], axes[name]) for name in feeds[0]})
    except ModelError:
        return None
    seconds = time.perf_counter() - begin
    if any(array.ndim <= axes[name] or array.shape[axes[name]] != total for name, array in outputs.items()):
        return None
    ends = np.cumsum(rows)[:-1]
    pieces = {name: np.split(array, ends, axes[name]) for name, array in outputs.items()}
    return [
        Answer(
            {name: np.ascontiguousarray(arrays[place]) for name, arrays in pieces.items()},
            "",
            False,
            total,
            seconds,
            0.0,
            not place,
        )
        for place in range(len(feeds))
    ]


def _alone(session: ort.InferenceSession, feed: Feed, axes: Axes | None) -> Answer:
    begin = time.perf_counter()
    rows = 1 if axes is None else _rows(feed, axes)
    try:
        # Values from a message may be unaligned in memory.
        outputs = run(session, {name: np.require(array, requirements=["A", "C"]) for name, array in feed.items()})
    except ModelError as error:
        return Answer(None, str(error), "INVALID_ARGUMENT" in str(error), rows, time.perf_counter() - begin)
    return Answer(outputs, rows=rows, seconds=time.perf_counter() - begin)


def _rows(feed: Feed, axes: Axes) -> int:
    name = next(iter(feed))
    return int(feed[name].shape[axes[name]])


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])
