"""Which layers stay in fp32, on losses that are known."""

from __future__ import annotations

import itertools

import onnx
import pytest

from tensorrail_exporter import GraphError
from tensorrail_exporter.precision import spared
from tensorrail_exporter.precision.spared import Layer, with_spared_layers


def network(names):
    """Stand in for a network: its name says which layers are in fp32."""
    return onnx.ModelProto(producer_name=",".join(sorted(names)))


IN_FP32 = network([f"n{k:02}" for k in range(64)])


class Known:
    """Losses that add up, but for those of layers in fp32."""

    def __init__(self, losses, most):
        self.losses, self.most, self.runs = losses, most, 0

    def __call__(self, model):
        self.runs += 1
        kept = model.producer_name.split(",")
        loss = sum(own for name, own in self.losses.items() if name not in kept)
        return loss, loss <= self.most


def layers(count, macs=None):
    return [Layer(f"n{k:02}", (macs or {}).get(k, 10)) for k in range(count)]


@pytest.mark.parametrize(
    ("bad", "count"),
    [([], 20), ([0], 20), ([19], 20), ([3, 17], 40), ([5, 6, 7], 30), ([0], 1), ([2], 5)],
)
def test_only_what_must_stays_in_fp32(bad, count):
    known = Known({f"n{k:02}": 1.0 if k in bad else 0.001 for k in range(count)}, most=0.5)
    found = with_spared_layers(layers(count), network, known, IN_FP32)
    assert found.good
    assert found.spared == tuple(f"n{k:02}" for k in bad)
    assert found.model == network(found.spared)
    assert known.runs <= 33


def test_of_two_layers_that_help_alike_the_cheaper_one_is_kept():
    known = Known({"n00": 1.0, "n09": 1.0}, most=1.0)
    assert with_spared_layers(layers(10, macs={0: 1000}), network, known, IN_FP32).spared == ("n09",)


def test_where_fp32_is_not_accurate_enough_either_no_layers_are_tried():
    known = Known(dict.fromkeys((f"n{k:02}" for k in range(8)), 1.0), most=-1.0)
    found = with_spared_layers(layers(8), network, known, IN_FP32)
    assert (found.good, found.spared, found.model, known.runs) == (False, (), network(()), 2)


def test_where_no_layers_suffice_all_are_in_int8(monkeypatch):
    """Only the network without int8 is good enough, and time ends before."""
    monkeypatch.setattr(spared, "_SECONDS", 0.0)
    known = Known(dict.fromkeys((f"n{k:02}" for k in range(8)), 1.0), most=0.5)
    found = with_spared_layers(layers(8), network, known, IN_FP32)
    assert (found.good, found.spared, found.model) == (False, (), network(()))


@pytest.mark.parametrize("count", [1, 2, 12])
def test_where_only_all_layers_together_would_suffice_none_is_spared(count):
    """Nothing is left to convert then, and the converter says so."""

    def convert(names):
        if len(names) == count:
            raise GraphError("nothing in the graph can be quantized")
        return network(names)

    known = Known(dict.fromkeys((f"n{k:02}" for k in range(count)), 1.0), most=0.5)
    found = with_spared_layers(layers(count), convert, known, IN_FP32)
    assert (found.good, found.spared, found.model) == (False, (), network(()))


def test_a_group_that_makes_it_worse_is_not_kept():
    """Alone n00 wins; beside n07 it does harm."""

    def judge(model):
        kept = frozenset(model.producer_name.split(","))
        loss = {frozenset({"n00"}): 0.6, frozenset({"n07"}): 0.5, frozenset({"n00", "n07"}): 0.9}.get(kept, 1.0)
        return loss, loss <= 0.5 or len(kept) == 64

    assert with_spared_layers(layers(8), network, judge, IN_FP32).spared == ("n07",)


def test_tries_are_limited(monkeypatch):
    monkeypatch.setattr(spared, "_TRIES", 12)
    losses = {f"n{k:02}": 1.0 if k in (1, 9, 33, 60) else 0.0 for k in range(64)}
    known = Known(losses, most=0.5)
    found = with_spared_layers(layers(64), network, known, IN_FP32)
    assert found.good
    assert known.runs <= 14
    assert {"n01", "n09", "n33", "n60"} <= set(found.spared)


@pytest.mark.parametrize(("count", "groups"), list(itertools.product((1, 2, 7, 8, 9, 63), (1, 2, 8))))
def test_groups_are_whole_and_even(count, groups):
    own = layers(count)
    parts = spared.split_evenly(own, groups)
    assert [layer for part in parts for layer in part] == own
    sizes = [len(part) for part in parts]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
