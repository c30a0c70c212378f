"""Cores in the metric of a layer's inputs: the equations of all formats, and errors never larger than the plain ones."""

from itertools import pairwise

import numpy as np
import pytest
from cases import MATRIX_ONLY, cases, draw_plan, lost_in_metric, random_cores, relative
from hypothesis import given
from hypothesis import strategies as st

from tensorrail_exporter import FORMATS, LayerPlan
from tensorrail_exporter.calibrate.alternating import alternate
from tensorrail_exporter.calibrate.metric import Moments, decompose, in_metric, roots

ROUNDING = 1e-5  # of the outputs' energy: float32, where the plain decomposition is exact and the moments ill-conditioned
NO_WORSE = 1.001  # times the plain error; the fit is in float32
FLAT = 1e-3  # of the weight's norm: a metric in which all directions are alike
KERNELS = [(), (3,), (3, 3), (1, 1), (2, 1, 2)]


def correlated(rng, size, samples=None, spread=2.0):
    """Return a second moment of inputs that are correlated and differ in scale; singular for fewer samples than values."""
    mixed = rng.standard_normal((size, size)) * np.exp(spread * rng.standard_normal(size))
    x = rng.standard_normal((samples or 4 * size, size)) @ mixed / size
    return (x.T @ x / len(x)).astype(np.float32)


def draw(data, largest=4):
    """Draw a format, a weight's shape, and a plan."""
    kernel = data.draw(st.sampled_from(KERNELS), "kernel")
    names = sorted(set(FORMATS) - (MATRIX_ONLY if kernel else set()))
    name = data.draw(st.sampled_from(names), "format")
    return draw_plan(data, "w", name, kernel, "conv" if kernel else "linear", largest)


@given(data=st.data())
@cases(150, 2000)
def test_the_equation_of_a_format_gives_its_weight(data):
    shape, plan = draw(data)
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    cores = random_cores(plan, shape, rng, np.float64)
    equation = FORMATS[plan.format].equation(shape, plan.modes)
    sizes = dict(zip(equation.weight, equation.axes, strict=True))
    assert len(equation.cores) == len(cores)
    assert set(equation.inputs) <= set(equation.weight)
    views = []
    for core, letters in zip(cores, equation.cores, strict=True):
        assert sum(letter not in sizes for letter in letters) <= 1 or core.ndim == len(letters)
        views.append(core if core.ndim == len(letters) else core.reshape([sizes.get(letter, -1) for letter in letters]))
    weight = np.einsum(f"{','.join(equation.cores)}->{equation.weight}", *views).reshape(shape)
    np.testing.assert_allclose(weight, plan.reconstruct(cores, shape), atol=1e-12, rtol=1e-10)


@given(data=st.data())
@cases(60, 600)
def test_decompose_is_never_worse_than_the_plain_decomposition(data):
    shape, plan = draw(data)
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    weight = rng.standard_normal(shape).astype(np.float32)
    moments = Moments(correlated(rng, weight[0].size))
    cores = decompose(plan, weight, moments)
    assert [core.shape for core in cores] == list(plan.core_shapes(shape))
    assert all(core.dtype == np.float32 for core in cores)
    mine = lost_in_metric(moments, plan.reconstruct(cores, shape), weight)
    plain = lost_in_metric(moments, plan.reconstruct(plan.decompose(weight), shape), weight)
    assert mine <= NO_WORSE * plain + ROUNDING


def test_a_fit_that_overflows_is_not_kept():
    """Cores of values so large that products of them overflow float32: the ones that came before are returned."""
    equation = FORMATS["tr"].equation((4, 4, 3), (4, 3, 4))
    shapes = LayerPlan(name="w", format="tr", modes=(4, 3, 4), ranks=(2, 2, 2, 2)).core_shapes((4, 4, 3))
    rng = np.random.default_rng(0)
    cores = [(1e13 * rng.standard_normal(shape)).astype(np.float32) for shape in shapes]
    weight = rng.standard_normal((4, 4, 3)).astype(np.float32)
    fitted = alternate(equation, cores, weight, np.eye(12, dtype=np.float32), 2)
    assert all(np.isfinite(core).all() for core in fitted)


@given(data=st.data())
@cases(40, 400)
def test_identity_moments_give_the_plain_error(data):
    shape, plan = draw(data)
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    weight = rng.standard_normal(shape).astype(np.float32)
    cores = decompose(plan, weight, Moments(np.eye(weight[0].size, dtype=np.float32)))
    mine = relative(plan.reconstruct(cores, shape), weight)
    plain = relative(plan.reconstruct(plan.decompose(weight), shape), weight)
    assert mine <= plain + FLAT
    if plan.format == "svd":  # of which nothing is better
        assert mine == pytest.approx(plain, abs=FLAT)


@pytest.mark.parametrize(
    ("modes", "ranks", "seed"), [((2, 2, 3, 1, 1), (2, 4, 2, 3, 4, 2), 1985), ((3, 2, 3, 1, 1), (3, 2, 2, 2, 4, 3), 2865)]
)
def test_cores_of_a_ring_do_not_overflow(modes, ranks, seed):
    """In rings with more ranks than the weight needs, one core once grew and others shrank without end."""
    shape = (modes[0] * modes[1], 1, 3)
    plan = LayerPlan(name="w", format="tr", modes=modes, ranks=ranks)
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    cores = decompose(plan, weight, Moments(np.eye(3, dtype=np.float32)))
    plain = relative(plan.reconstruct(plan.decompose(weight), shape), weight)
    assert relative(plan.reconstruct(cores, shape), weight) <= plain + FLAT
    norms = [np.linalg.norm(core) for core in cores]
    assert max(norms) < 1e4


def reduced_rank_regression(weight, gram, rank):
    """Return the least error of a matrix of that rank (Izenman 1975), relative, in double precision."""
    values, vectors = np.linalg.eigh(gram.astype(np.float64))
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    singular = np.linalg.svd(weight.astype(np.float64) @ root, compute_uv=False)
    return float(np.square(singular[rank:]).sum() / np.square(singular).sum())


@pytest.mark.parametrize("form", ["svd", "tt", "tucker", "cp"])
@pytest.mark.parametrize("rank", [1, 4, 11])
def test_matrices_reach_the_optimum_of_reduced_rank_regression(form, rank, rng):
    weight = rng.standard_normal((24, 20)).astype(np.float32)
    gram = correlated(rng, 20, spread=1.0)
    ranks = FORMATS[form].uniform((24, 20), (24, 20), rank)
    plan = LayerPlan(name="w", format=form, modes=(24, 20), ranks=ranks)
    moments = Moments(gram)
    mine = lost_in_metric(moments, plan.reconstruct(decompose(plan, weight, moments), (24, 20)), weight)
    best = reduced_rank_regression(weight, gram, rank)
    assert mine == pytest.approx(best, rel=1e-2, abs=1e-6)
    plain = lost_in_metric(moments, plan.reconstruct(plan.decompose(weight), (24, 20)), weight)
    assert mine < 0.8 * plain  # the inputs' metric matters here


@pytest.mark.parametrize("name", ["tt", "tucker", "svd", "cp", "tr"])
def test_a_convolution_gains_from_correlated_inputs(name, rng):
    shape = (16, 12, 3, 3)
    form = FORMATS[name]
    modes = form.default_modes(shape)
    plan = LayerPlan(name="w", format=name, modes=modes, ranks=form.clamp(shape, modes, form.uniform(shape, modes, 4)))
    weight = rng.standard_normal(shape).astype(np.float32)
    moments = Moments(correlated(rng, 108))
    mine = lost_in_metric(moments, plan.reconstruct(decompose(plan, weight, moments), shape), weight)
    plain = lost_in_metric(moments, plan.reconstruct(plan.decompose(weight), shape), weight)
    assert mine < 0.8 * plain


def test_more_sweeps_never_make_it_worse(rng):
    shape = (16, 12, 3, 3)
    plan = LayerPlan(name="w", format="tt", modes=(16, 9, 12), ranks=(1, 5, 5, 1))
    weight = rng.standard_normal(shape).astype(np.float32)
    moments = Moments(correlated(rng, 108))
    errors = [
        lost_in_metric(moments, plan.reconstruct(decompose(plan, weight, moments, sweeps=sweeps), shape), weight)
        for sweeps in (0, 1, 2, 4, 8)
    ]
    assert all(after <= NO_WORSE * before for before, after in pairwise(errors))


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_a_singular_gram_does_not_blow_up(form, rng):
    shape = (16, 12) if form in MATRIX_ONLY else (16, 12, 3, 3)
    modes = FORMATS[form].default_modes(shape)
    ranks = FORMATS[form].clamp(shape, modes, FORMATS[form].uniform(shape, modes, 4))
    plan = LayerPlan(name="w", format=form, modes=modes, ranks=ranks)
    weight = rng.standard_normal(shape).astype(np.float32)
    size = weight[0].size
    dead = correlated(rng, size)
    dead[: size // 3], dead[:, : size // 3] = 0, 0  # channels that are never on
    for gram in (correlated(rng, size, samples=3), dead, np.zeros((size, size), np.float32)):
        moments = Moments(gram)
        cores = decompose(plan, weight, moments)
        made = plan.reconstruct(cores, shape)
        assert np.isfinite(made).all()
        assert np.linalg.norm(made) < 100 * np.linalg.norm(weight)
        plain = lost_in_metric(moments, plan.reconstruct(plan.decompose(weight), shape), weight)
        assert lost_in_metric(moments, made, weight) <= NO_WORSE * plain + ROUNDING


def test_the_arguments_are_not_changed(rng):
    weight = rng.standard_normal((16, 12, 3, 3)).astype(np.float32)
    gram = correlated(rng, 108)
    kept = weight.copy(), gram.copy()
    decompose(LayerPlan(name="w", format="tt", modes=(16, 9, 12), ranks=(1, 4, 4, 1)), weight, Moments(gram))
    np.testing.assert_array_equal(weight, kept[0])
    np.testing.assert_array_equal(gram, kept[1])


def test_moments_are_read_as_a_weight_is(rng):
    x = rng.standard_normal((500, 4, 6)).astype(np.float32)  # rows of 4 channels with 6 taps
    moments = Moments(np.einsum("nik,njl->ikjl", x, x).reshape(24, 24) / 500)
    np.testing.assert_allclose(moments.channels(4), np.einsum("nik,njk->ij", x, x) / 500, rtol=1e-4, atol=1e-4)
    target, other = rng.standard_normal((2, 3, 4, 6)).astype(np.float32)
    y, z = (np.einsum("nik,oik->no", x, one) for one in (target, other))
    assert lost_in_metric(moments, other, target) == pytest.approx(np.square(z - y).sum() / np.square(y).sum(), rel=1e-4)
    assert lost_in_metric(moments, target, target) == 0


def test_roots_are_inverse_to_each_other_and_regular(rng):
    second = correlated(rng, 12, spread=0.5)
    root, inverse = roots(second)
    np.testing.assert_allclose(root @ root, second, rtol=1e-3, atol=1e-3 * np.abs(second).max())
    np.testing.assert_allclose(root @ inverse, np.eye(12), atol=1e-6)
    root, inverse = roots(np.zeros((5, 5)))
    assert np.isfinite(inverse).all()
    np.testing.assert_allclose(root @ inverse, np.eye(5), atol=1e-6)


@pytest.mark.parametrize("modes", [(48 * 9, 16), (48 * 3, 48), (48, 144)])
def test_each_further_sweep_lowers_the_error_of_taps_on_either_side(modes, rng):
    target = rng.standard_normal((48, 16, 3, 3)).astype(np.float32)
    moments = Moments(correlated(rng, 144, spread=0.5)).shrunk(0.1)
    plan = LayerPlan(name="w", format="svd", modes=modes, ranks=(10,))
    fits = [in_metric(plan, target, moments, sweeps=sweeps) for sweeps in (0, 1, 4)]
    errors = [lost_in_metric(moments, plan.reconstruct(cores, target.shape), target) for cores in fits]
    assert errors[0] >= errors[1] * (1 - 1e-5)
    assert errors[1] >= errors[2] * (1 - 1e-5)
    # The output core is the best one: a small change of it in any direction costs more.
    outputs, inputs = fits[0]
    for seed in range(3):
        step = 1e-2 * np.random.default_rng(seed).standard_normal(outputs.shape).astype(np.float32)
        changed = [
            lost_in_metric(moments, plan.reconstruct([outputs + sign * step, inputs], target.shape), target) for sign in (1, -1)
        ]
        assert min(changed) > errors[0]


def test_whitened_moments_are_those_of_the_mixed_channels(rng):
    moments = Moments(correlated(rng, 8 * 4, spread=0.5))
    for other in (moments, moments.shrunk(0.2)):
        gram, mixing, inverse = other.whitened(8)
        taps = np.eye(4)
        np.testing.assert_allclose(mixing @ inverse, np.eye(8), atol=1e-4)
        expected = np.kron(inverse, taps) @ other.gram @ np.kron(inverse, taps).T
        np.testing.assert_allclose(gram, expected, atol=1e-4 * np.abs(expected).max())
        np.testing.assert_allclose(Moments(gram).channels(8), np.eye(8), atol=1e-3)
