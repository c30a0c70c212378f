"""Answering several requests by one run of the model: join along the batch axes, run, cut apart.

Only requests whose other axes are equal are joined, whose inputs all have as many samples, and no more of them than the limit.
When a run of several requests fails,
each is run alone, so that one request's values cannot fail another's.
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
    """What one request got: its outputs by name, or why there are none.

    `rows` are the samples of the run that it was part of, `seconds` that run's time, `waited` the seconds before it. `first`
    marks one request of each run, so that a run is counted once.
    """

    outputs: Mapping[str, np.ndarray] | None
    reason: str = ""
    invalid: bool = False  # ONNX Runtime's own word for it: the values are at fault, not the server
    rows: int = 1
    seconds: float = 0.0
    waited: float = 0.0
    first: bool = True


def run_batch(session: ort.InferenceSession, feeds: Sequence[Feed], axes: Axes | None, limit: int) -> list[Answer]:
    """Return one answer a request, in order; without `axes` each one is run alone."""
    answers: dict[int, Answer] = {}
    for group in pack(feeds, axes, limit):
        made = None if axes is None or len(group) == 1 else _joined(session, [feeds[index] for index in group], axes)
        for place, index in enumerate(group):
            answers[index] = made[place] if made else _alone(session, feeds[index], axes)
    return [answers[index] for index in range(len(feeds))]


def pack(feeds: Sequence[Feed], axes: Axes | None, limit: int) -> list[list[int]]:
    """Return which requests are run together: alike in all but the batch axes, `limit` samples at most a run.

    A request that alone has more samples than the limit is a run of its own, and so is one whose inputs have different
    numbers of samples: joined, their parts would meet those of others.
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
        group, held = open_groups.get(kind, ([], limit))
        if held + rows > limit:
            group, held = [], 0
            groups.append(group)
        group.append(index)
        open_groups[kind] = (group, held + rows)
    return groups


def _joined(session: ort.InferenceSession, feeds: Sequence[Feed], axes: Axes) -> list[Answer] | None:
    """Return the answers of one run for several requests, None when it failed or its outputs cannot be cut apart."""
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
    parts = {name: np.split(array, ends, axes[name]) for name, array in outputs.items()}
    return [
        Answer(
            {name: np.ascontiguousarray(part[place]) for name, part in parts.items()}, "", False, total, seconds, 0.0, not place
        )
        for place in range(len(feeds))
    ]


def _alone(session: ort.InferenceSession, feed: Feed, axes: Axes | None) -> Answer:
    begin = time.perf_counter()
    rows = 1 if axes is None else _rows(feed, axes)
    try:
        # Values that came in a message need not lie where their type wants them.
        outputs = run(session, {name: np.require(array, requirements=["A", "C"]) for name, array in feed.items()})
    except ModelError as error:
        return Answer(None, str(error), "INVALID_ARGUMENT" in str(error), rows, time.perf_counter() - begin)
    return Answer(outputs, rows=rows, seconds=time.perf_counter() - begin)


def _rows(feed: Feed, axes: Axes) -> int:
    name = next(iter(feed))
    return int(feed[name].shape[axes[name]])


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])
