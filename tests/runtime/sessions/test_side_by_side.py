"""Batches that run at a time: results in order, errors as they are, no more at a time than processors."""

import threading
import time

import pytest

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.sessions import side_by_side as module
from tensorrail_runtime.sessions.session import Session
from tensorrail_runtime.sessions.side_by_side import side_by_side


@pytest.mark.parametrize(("threads", "at_a_time"), [(0, 1), (1, 4), (2, 2), (3, 1), (8, 1)])
def test_results_come_in_order_and_no_more_run_than_there_are_processors(threads, at_a_time, monkeypatch):
    monkeypatch.setattr(module, "processors", lambda: 4)
    lock, running, most = threading.Lock(), [0], [0]

    def call(index):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.02 if index % 2 else 0.005)
        with lock:
            running[0] -= 1
        return index

    assert list(side_by_side(call, 12, Session(threads=threads))) == list(range(12))
    assert most[0] == at_a_time


def test_an_error_comes_where_its_result_would(monkeypatch):
    monkeypatch.setattr(module, "processors", lambda: 4)

    def call(index):
        if index == 2:
            raise ModelError("batch 2")
        return index

    results = side_by_side(call, 6, Session(threads=1))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ModelError, match="batch 2"):
        next(results)


def test_the_rest_is_left_out_where_nobody_reads_it(monkeypatch):
    monkeypatch.setattr(module, "processors", lambda: 2)
    done = []
    results = side_by_side(done.append, 1000, Session(threads=1))
    next(results)
    results.close()
    assert len(done) < 1000


def test_nothing_is_called_without_batches():
    assert list(side_by_side(lambda _: pytest.fail("called"), 0, Session(threads=1))) == []
