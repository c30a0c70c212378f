"""Random layers and plans for every format, and how many of them are tried."""

from __future__ import annotations

import math
import os

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tensorrail_exporter import LayerPlan
from tensorrail_exporter.formats import format_of

MATRIX_ONLY = {"ttm"}  # pairs the modes of a matrix: no convolutions


def cases(slice_: int, full: int) -> settings:
    """Return settings that try `slice_` random cases, or `full` of them where TENSORRAIL_CASES=all asks for it."""
    count = full if os.environ.get("TENSORRAIL_CASES") == "all" else slice_
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def draw_plan(data, name, form_name, kernel=(), op="conv", largest=4, groups=1, gathers=False):
    """Draw the shape of a weight and a plan for it, ranks that exist included; returns (shape, plan).

    With several groups, each has two inputs or more: with one the convolution is depthwise. A table in `ttm` (`gathers`) may
    need padding.
    """
    form = format_of(form_name, groups)
    size = st.integers(1, largest)
    outs, ins = (data.draw(st.lists(size, min_size=1, max_size=3)) for _ in range(2))
    if form_name == "ttm":
        count = max(len(outs), len(ins))
        outs, ins = (side + [1] * (count - len(side)) for side in (outs, ins))
    if groups > 1 and math.prod(ins) == 1:
        ins[0] = 2
    entries = math.prod(ins)
    if gathers and form_name == "ttm":
        first = next((mode for mode in ins if mode > 1), 1)
        entries = data.draw(st.integers(entries - entries // first + 1, entries), "entries")
    shape = (math.prod(outs), entries, *kernel)  # of one group
    if form_name == "svd":
        at = data.draw(st.integers(0, len(kernel)), "kernel axes with the inputs")
        modes = (shape[0] * math.prod(kernel[at:]), shape[1] * math.prod(kernel[:at]))
    else:
        modes = (*outs, *([math.prod(kernel)] if kernel else []), *ins)
    shape = (groups * shape[0], *shape[1:])
    return shape, draw_ranks(data, name, form, form_name, shape, modes, op)


def draw_ranks(data, name, form, form_name, shape, modes, op):
    """Draw ranks for a weight of these modes, and a merge."""
    ranks = [data.draw(st.integers(1, 6)) for _ in form.uniform(shape, modes, 1)]
    if form_name in ("tt", "ttm"):
        ranks[0] = ranks[-1] = 1
    if form_name == "tr":
        ranks[-1] = ranks[0]
    merge = data.draw(st.sampled_from(["auto", *form.merges(op)]), "merge")
    return LayerPlan(name=name, format=form_name, modes=modes, ranks=form.clamp(shape, modes, ranks), merge=merge)


def random_cores(plan, shape, rng, dtype=np.float32, groups=1):
    """Return cores of the plan's shapes whose weight has values around 1."""
    shapes = plan.core_shapes(shape, groups)
    return [rng.standard_normal(one).astype(dtype) / max(1, one[-1]) ** 0.5 for one in shapes]


def relative(a, b):
    """Return the L2 norm of a − b, relative to b's; 0 when both are 0."""
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0))


def listener(*, note=None, epoch=None, bench=None):
    """Return a listener to progress that passes on notes, finished epochs, and the shares of benchmarks."""

    def progress(stage, share, detail=""):
        if stage == "note" and note is not None:
            note(detail)
        elif " epoch " in stage and epoch is not None:
            epoch(stage)
        elif stage.startswith("measuring latency") and bench is not None:
            bench(stage, share)

    return progress


def lost_in_metric(moments, weight, target):
    """Return E‖(Ŵ − T)x‖² / E‖Tx‖² of a weight Ŵ against a target T, both (O, …)."""
    return moments.energy(weight - target) / max(moments.energy(target), 1e-30)
