import math

import numpy as np
import pytest
import tensorly as tl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import tensor_train

from tensorrail_exporter import FORMATS, PlanError
from tensorrail_exporter.truncation import backend_of, truncated_svd

SHAPES = [(32, 16, 3, 3), (16, 32, 1, 1), (12, 20, 5), (6, 4, 3, 3, 3), (24, 40)]
EVERY = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


def full_ranks(form, shape, modes):
    return form.clamp(shape, modes, form.uniform(shape, modes, 10**6))


@EVERY
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_full_rank_reconstructs_the_weight(form, shape, library, rng):
    weight = rng.standard_normal(shape).astype(np.float32)
    tensor = torch.from_numpy(weight) if library == "torch" else weight
    modes = form.default_modes(shape)
    cores = form.decompose(tensor, modes, full_ranks(form, shape, modes))
    again = form.reconstruct(cores, shape)
    assert type(again) is type(tensor)
    np.testing.assert_allclose(np.asarray(again), weight, atol=2e-5)


@EVERY
@pytest.mark.parametrize("shape", SHAPES)
def test_projecting_twice_changes_nothing_more(form, shape, rng):
    modes = form.default_modes(shape)
    ranks = form.clamp(modes, (1, *[3] * (len(modes) - 1), 1))
    once = form.project(rng.standard_normal(shape), modes, ranks)
    np.testing.assert_allclose(form.project(once, modes, ranks), once, atol=1e-10)


@EVERY
@pytest.mark.parametrize("shape", SHAPES)
def test_core_shapes_are_those_of_the_cores(form, shape, rng):
    modes = form.default_modes(shape)
    ranks = (1, *[5] * (len(modes) - 1), 1)
    cores = form.decompose(rng.standard_normal(shape), modes, ranks)
    assert tuple(core.shape for core in cores) == form.core_shapes(shape, modes, ranks)


@pytest.mark.parametrize("modes", [(32, 9, 16), (4, 8, 9, 2, 8)])
def test_tt_svd_keeps_what_tensorly_keeps(modes, rng):
    weight = rng.standard_normal((32, 16, 3, 3)).astype(np.float32)
    ranks = (1, *[6] * (len(modes) - 1), 1)
    ours = FORMATS["tt"].project(weight, modes, FORMATS["tt"].clamp(modes, ranks))
    tensor = weight.transpose(0, 2, 3, 1).reshape(modes).astype(np.float64)
    theirs = tl.tt_to_tensor(tensor_train(tensor, list(ranks))).reshape(32, 3, 3, 16).transpose(0, 3, 1, 2)
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 1e-6


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_truncated_svd_is_as_good_as_the_full_one(rows, columns, rank, seed):
    matrix = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    with backend_of(matrix):
        u, s, v = truncated_svd(matrix, rank)
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    best = math.sqrt((values[rank:] ** 2).sum())
    assert np.linalg.norm(matrix - (u * s) @ v) <= best + 2e-6 * values[0]
    np.testing.assert_allclose(s, values[: len(s)], atol=2e-6 * values[0])


def test_truncated_svd_of_a_rank_deficient_matrix_stays_finite(rng):
    matrix = np.outer(rng.standard_normal(30), rng.standard_normal(9)).astype(np.float32)
    with backend_of(matrix):
        u, s, v = truncated_svd(matrix, 5)
        zero = truncated_svd(np.zeros((4, 6), np.float32), 3)
    np.testing.assert_allclose((u * s) @ v, matrix, atol=1e-5)
    assert all(np.isfinite(part).all() for part in zero)


def test_clamp_lowers_to_what_exists_and_leaves_the_callers_list():
    ranks = [1, 64, 200, 1]
    assert FORMATS["tt"].clamp([32, 9, 16], ranks) == (1, 32, 16, 1)
    assert ranks == [1, 64, 200, 1]


@pytest.mark.parametrize(
    ("shape", "modes", "ranks", "reason"),
    [
        ((32, 16, 3, 3), (32, 16, 9), (1, 4, 4, 1), r"do not fit .* try \[32, 9, 16\]"),
        ((32, 16, 3, 3), (32, 9, 15), (1, 4, 4, 1), "whose product is 16"),
        ((32, 16), (32, 16), (1, 4, 4, 1), "2 modes need 3 tt ranks"),
        ((32, 16), (32, 16), (2, 4, 1), "start and end with 1"),
        ((32, 16), (32, 16), (1, 0, 1), "1 or larger"),
    ],
)
def test_impossible_modes_and_ranks_say_why(shape, modes, ranks, reason):
    with pytest.raises(PlanError, match=reason):
        FORMATS["tt"].decompose(np.ones(shape), modes, ranks)
