"""The statistics of the gate: how much slower a model is, whether it is, and how many processes tell."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np

from tensorrail_runtime.gate.checks import Finding, Limits
from tensorrail_runtime.measure.latency import cycles
from tensorrail_runtime.records import Record

BLOCKS = 8  # blocks of each process, of which medians are taken
PRECISION = 10  # max_slowdown divided by the standard error that is small enough

_ALPHA = 0.01  # significance level
_LEAST_APART = 3  # processes of each side, so that Welch's test can reach it
_MOST = 4  # times the requested processes, on a busy machine
_OF_MEDIAN = 1.2533  # √(π / 2): the standard error of a median over that of a mean, of many normal values; of few it is less


class TimeChange(Record):
    """The slow-down of a model as a share (0.05 is 5 % more time), with its 95 % interval over processes and its p-value.

    The slow-down is the median over processes, and the interval is that of this median, see `compare_times`.
    """

    slowdown: float
    low: float
    high: float
    p_value: float
    p50_ms: float
    baseline_p50_ms: float


def time_change(
    old: Sequence[Sequence[float]], new: Sequence[Sequence[float]], *, paired: bool, apart: bool = False
) -> TimeChange:
    """Return how the times of a model differ from others; the arguments are those of `compare_times`."""
    slowdown, low, high, p = compare_times(old, new, paired=paired, apart=apart)
    return TimeChange(
        slowdown=slowdown,
        low=low,
        high=high,
        p_value=p,
        p50_ms=float(np.median(np.concatenate(new))),
        baseline_p50_ms=float(np.median(np.concatenate(old))),
    )


def latency_finding(timing: TimeChange, limits: Limits, name: str = "latency") -> Finding:
    """Return whether a slow-down is within its limit.

    Args:
        timing: the times.
        limits: the slow-down to detect; above half of it, at p < 0.01, the finding does not hold.
        name: the name of the finding.

    """
    threshold = limits.max_slowdown / 2
    return Finding(
        name=name,
        baseline=f"{timing.baseline_p50_ms:.4f} ms",
        measured=f"{timing.slowdown:+.1%} [{timing.low:+.1%}, {timing.high:+.1%}], p = {timing.p_value:.2g}",
        limit=f"detects slow-downs of {limits.max_slowdown:.1%} or more; fails above {threshold:+.1%} at p < {_ALPHA}",
        holds=not (timing.slowdown > threshold and timing.p_value < _ALPHA),
    )


def compare_times(
    old: Sequence[Sequence[float]], new: Sequence[Sequence[float]], *, paired: bool, apart: bool = False
) -> tuple[float, float, float, float]:
    """Estimate the slow-down of a model, and test whether it is slower.

    If both models ran interleaved in each process, the ratio of each process is one estimate, and its block medians are divided
    by its old median, which removes what both models have in common. The times of the two runs of a cycle are then summed: a
    model runs after itself in one of them and after the other model in the next. The slow-down is the median over processes,
    which a disturbed process hardly moves. Its interval lies around it: Student's for the logarithms over processes (Welch's if
    the models ran in separate processes), wider by the ratio of the standard errors of a median and a mean.

    The p-value is that of the Mann-Whitney test on block medians (Mann and Whitney 1947) if both models ran interleaved in the
    same processes. Two processes differ whatever runs in them, so otherwise it is that of a test on the medians of processes:
    Student's of pairs, or Welch's (Welch 1947) if the processes ran at different times.

    Args:
        old: the times of the baseline's model, one list per process.
        new: the times of the checked model, one list per process.
        paired: whether both models ran interleaved, the k-th lists of both beside each other.
        apart: whether they did so in processes of their own; default False.

    Returns:
        The slow-down as a share, the two ends of its 95 % interval, and the one-sided p-value of no slow-down.

    """
    from scipy import stats

    sides = [[cycles(times, 2 if paired else 1) for times in side] for side in (old, new)]
    medians = [np.array([np.median(times) for times in side]) for side in sides]
    logs = [np.log(values) for values in medians]
    blocks = [[_blocks(times) for times in side] for side in sides]
    if not paired:
        p = _welch_p(*logs)
    elif apart:
        p = _paired_p(logs[1] - logs[0])
    else:
        shares = [np.concatenate([own / unit for own, unit in zip(side, medians[0], strict=True)]) for side in blocks]
        p = float(stats.mannwhitneyu(shares[1], shares[0], alternative="greater").pvalue)
    with warnings.catch_warnings():
        # Where clocks are coarse, processes may have equal medians. The interval is then of no width, which scipy warns of.
        warnings.simplefilter("ignore", RuntimeWarning)
        if paired:
            middle = float(np.median(logs[1] - logs[0]))
            interval = stats.ttest_rel(logs[1], logs[0]).confidence_interval()
        else:
            middle = float(np.median(logs[1]) - np.median(logs[0]))
            interval = stats.ttest_ind(logs[1], logs[0], equal_var=False).confidence_interval()
    half = _OF_MEDIAN * (interval.high - interval.low) / 2 if np.isfinite(interval.high) else 0.0
    value, low, high = (float(np.exp(middle + shift)) - 1 for shift in (0.0, -half, half))
    return value, low, high, p


def needs_more(
    runs: Sequence[Sequence[Sequence[float]]],
    processes: int,
    precision: float | None,
    recorded: Sequence[Sequence[float]] = (),
) -> bool:
    """Return whether models should be timed in more processes.

    Args:
        runs: for each process, the times of each model.
        processes: how many processes there must be.
        precision: the standard error of the estimate that is small enough, for which up to four times as many may run; None:
            any.
        recorded: the times that the model is compared with, one list per process, if they were recorded before: their part of
            the standard error stays. No more processes are added once that of the new times is at most half of it.

    """
    if len(runs) < processes:
        return True
    if precision is None or len(runs) >= _MOST * processes:
        return False
    if len(runs) % 2:
        return True
    stays = _standard_error([[times] for times in recorded]) if recorded else 0.0
    own = _standard_error(runs)
    return own > stays / 2 and math.hypot(own, stays) > precision


def imprecision(
    runs: Sequence[Sequence[Sequence[float]]], max_slowdown: float, recorded: Sequence[Sequence[float]] = ()
) -> str:
    """Return a warning if the times vary too much, or processes are too few, to detect a slow-down reliably; else empty.

    Args:
        runs: for each process, the times of each model.
        max_slowdown: the slow-down to detect, as a share.
        recorded: as for `needs_more`.

    """
    if recorded and min(len(runs), len(recorded)) < _LEAST_APART:
        return (
            f"a test over {len(recorded)} recorded and {len(runs)} new processes can hardly show a slow-down: use at least "
            f"{_LEAST_APART} of each"
        )
    error = math.hypot(_standard_error(runs), _standard_error([[times] for times in recorded]) if recorded else 0.0)
    if error <= max_slowdown / PRECISION:
        return ""
    return (
        f"the times vary from process to process: the standard error of the slow-down is {error:.2%}, expected at most "
        f"{max_slowdown / PRECISION:.2%}, so that a slow-down of {max_slowdown:.1%} may be missed or reported wrongly: measure "
        "when the machine is idle, or longer"
    )


def _standard_error(runs: Sequence[Sequence[Sequence[float]]]) -> float:
    """Return the standard error of the median over processes: of the ratio of two models, or of one model's relative time."""
    models = len(runs[0])
    times = np.array([[np.median(cycles(samples, models)) for samples in run] for run in runs])
    values = times[:, -1] / (times[:, 0] if times.shape[1] > 1 else np.median(times))
    # 1.4826: the standard deviation of a normal distribution over its median absolute deviation.
    deviation = 1.4826 * np.median(np.abs(values - np.median(values)))
    return float(_OF_MEDIAN * deviation / np.sqrt(len(values)))


def _paired_p(differences: np.ndarray) -> float:
    """Return the one-sided p-value of differences that are not above 0, by Student's test."""
    from scipy import stats

    if not np.ptp(differences):  # where clocks are coarse
        return float(differences[0] <= 0)
    return float(stats.ttest_1samp(differences, 0.0, alternative="greater").pvalue)


def _welch_p(old: np.ndarray, new: np.ndarray) -> float:
    """Return the one-sided p-value of new values that are not above old ones, by Welch's test."""
    from scipy import stats

    if not (np.ptp(old) or np.ptp(new)):  # where clocks are coarse
        return float(new[0] <= old[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where the clocks of one side alone are too coarse
        p = float(stats.ttest_ind(new, old, equal_var=False, alternative="greater").pvalue)
    return p if math.isfinite(p) else 1.0


def _blocks(times: np.ndarray) -> np.ndarray:
    """Return the medians of eight consecutive blocks; the first blocks get one more time each if there is a remainder."""
    if len(times) < BLOCKS:
        raise ValueError(f"expected at least {BLOCKS} times or cycles of a process, got {len(times)}")
    size, longer = divmod(len(times), BLOCKS)
    cut = longer * (size + 1)
    blocks = times[:cut].reshape(longer, size + 1), times[cut:].reshape(BLOCKS - longer, size)
    return np.concatenate([np.median(block, axis=1) for block in blocks])
