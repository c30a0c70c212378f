"""The two matrices of a head are replaced by the best ones with fewer columns."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorrail_exporter.graphs.head_factors import narrowed, root


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
def test_the_product_is_the_truncated_svd(rows, others, columns, size, seed):
    rng = np.random.default_rng(seed)
    first, second = rng.standard_normal((rows, columns)), rng.standard_normal((others, columns))
    one, other = narrowed(first, second, size)
    assert (one.shape, other.shape) == ((rows, size), (others, size))
    left, values, right = np.linalg.svd(first @ second.T)
    kept = min(size, len(values))
    np.testing.assert_allclose(one @ other.T, (left[:, :kept] * values[:kept]) @ right[:kept], atol=1e-10)


def test_the_true_rank_is_enough(rng):
    first = rng.standard_normal((20, 3)) @ rng.standard_normal((3, 8))
    second = rng.standard_normal((16, 8))
    one, other = narrowed(first, second, 3)
    np.testing.assert_allclose(one @ other.T, first @ second.T, atol=1e-10)


def test_zero_matrices_stay_zero():
    one, other = narrowed(np.zeros((5, 4)), np.ones((6, 4)), 2)
    assert not (one @ other.T).any()


@pytest.mark.parametrize("both", [True, False])
def test_a_metric_gives_the_least_error_on_its_inputs(both, rng):
    inputs = rng.standard_normal((500, 4)) @ rng.standard_normal((4, 12)) + 0.01 * rng.standard_normal((500, 12))
    first, second = rng.standard_normal((12, 6)), rng.standard_normal((12, 6))
    metric = root(inputs.T @ inputs / len(inputs))
    roots = (metric, metric if both else None)

    def error(pair):
        moved = inputs @ (pair[0] @ pair[1].T - first @ second.T)
        return np.linalg.norm(moved @ inputs.T if both else moved)

    fitted, plain = error(narrowed(first, second, 4, roots)), error(narrowed(first, second, 4))
    assert fitted < 0.1 * plain


def test_a_root_of_a_second_moment(rng):
    rows = rng.standard_normal((100, 6))
    moment = rows.T @ rows
    np.testing.assert_allclose(root(moment).T @ root(moment), moment, rtol=1e-10, atol=1e-10)
