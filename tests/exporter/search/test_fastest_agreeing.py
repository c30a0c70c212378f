"""The rounds in which the fastest network that agrees is looked for, on networks whose agreement is known."""

from types import SimpleNamespace

import pytest

from tensorrail_exporter.search import fastest_agreeing
from tensorrail_exporter.search.fastest_agreeing import _Found, _Tries, agrees
from tensorrail_exporter.search.guard import Guard
from tensorrail_exporter.search.losses import Losses
from tensorrail_exporter.search.targets import Search
from tensorrail_runtime.errors import TargetError
from tensorrail_runtime.measure.accuracy import wilson
from tensorrail_runtime.measure.agreement import Agreement
from tensorrail_runtime.progress import silent

SAMPLES = 100
MOST = 40  # networks 1, 2, …: each is faster than the one before, and its outputs differ more


def agreement(share, difference):
    low, high = wilson(share * SAMPLES, SAMPLES)
    ends = dict.fromkeys(("difference", "difference_low", "difference_high"), difference)
    return Agreement(samples=SAMPLES, agreement=share, agreement_low=low, agreement_high=high, **ends)


@pytest.fixture
def looked_for(monkeypatch):
    """Return a function that looks for the fastest network, and tells which one was found and which were fitted."""

    def measured(picks, *_):
        (k,) = picks
        return _Found(picks, 10 / (1 + 0.05 * k), 1e-3 * k**2, 1e-3 * k**2, agreement(max(0.0, 1 - 0.01 * k), 0.02 * k))

    def pick(start, aims, candidates, search):
        k = min(int((search.max_loss / 1e-3) ** 0.5), MOST)
        if k < 1:
            raise TargetError("nothing so accurate is fast enough")
        return (k,)

    monkeypatch.setattr(fastest_agreeing, "_measured", measured)
    monkeypatch.setattr(fastest_agreeing, "pick", pick)
    monkeypatch.setattr(fastest_agreeing, "report_of", lambda *arguments: SimpleNamespace(plan=arguments[2][0]))

    def call(guard, fitted):
        probe = SimpleNamespace(fitted=lambda k, _: fitted(k), gain=None, parts=None, inputs=SimpleNamespace(count=SAMPLES))
        losses = Losses("calibration", {"a": tuple(1e-3 * k**2 for k in range(1, MOST + 1))})
        candidates = SimpleNamespace(losses=losses, dense=SimpleNamespace(milliseconds=10.0))
        start = SimpleNamespace(targets={"latency": 1.05})
        tries = _Tries(start, {}, candidates, Search(improve_seconds=0.0), guard, probe)
        tries, found, of, _ = fastest_agreeing._in_rounds(tries, silent)
        assert of == tries.fitted[found.picks]
        return found.picks[0], sorted(k for (k,) in tries.fitted)

    return call


# How many of a hundred inputs change for each step once cores are fitted: fits that gain a lot, little, and that harm.
@pytest.mark.parametrize("wrong", [0.1, 0.3, 0.5, 1.0, 1.5, 2.5])
def test_the_fastest_is_nearly_found_in_a_few_fits(wrong, looked_for):
    guard = Guard(min_agreement=0.9)

    def fitted(k):
        return agreement(max(0.0, 1 - round(wrong * k) / SAMPLES), 0.01 * k)

    best = max(k for k in range(1, MOST + 1) if agrees(fitted(k), guard))
    found, tried = looked_for(guard, fitted)
    assert agrees(fitted(found), guard)
    assert 0.6 * best <= found <= best
    assert len(tried) <= 4


@pytest.mark.parametrize("gain", [0.3, 0.6, 1.0, 1.6])
def test_the_same_by_the_difference_of_the_outputs(gain, looked_for):
    guard = Guard(min_agreement=0.0, max_difference=0.2)
    best = max(k for k in range(1, MOST + 1) if 0.02 * gain * k <= 0.2)
    found, tried = looked_for(guard, lambda k: agreement(0.5, 0.02 * gain * k))
    assert 0.6 * best <= found <= best
    assert len(tried) <= 4


def test_where_none_agrees_the_nearest_one_is_named(looked_for):
    with pytest.raises(TargetError, match=r"the nearest one, predicted to be 1.05× faster, with fitted cores, .* 80.0 %"):
        looked_for(Guard(min_agreement=0.9), lambda k: agreement(max(0.0, 0.81 - 0.01 * k), 0.02 * k))


def test_what_is_far_from_agreeing_is_not_fitted(looked_for):
    def fitted(k):
        raise AssertionError("no network should be fitted")

    with pytest.raises(TargetError, match="before cores are fitted"):
        looked_for(Guard(min_agreement=0.0, max_difference=1e-3), fitted)
