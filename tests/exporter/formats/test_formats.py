import json
import math

import numpy as np
import pytest
import tensorly as tl
import torch
from cases import MATRIX_ONLY, cases, draw_plan, random_cores, relative
from hypothesis import given
from hypothesis import strategies as st
from tensorly.decomposition import tensor_train

from tensorrail_exporter import FORMATS, LayerPlan, LayerSpec, PlanError, pad_ranks, project
from tensorrail_exporter.formats import cp, tr
from tensorrail_exporter.formats.modes import unfold
from tensorrail_exporter.formats.truncation import backend_of, truncated_svd
from tensorrail_exporter.formats.ttm import padding, table_modes

SHAPES = [(32, 16, 3, 3), (16, 32, 1, 1), (12, 20, 5), (6, 4, 3, 3, 3), (24, 40)]
EVERY = pytest.mark.parametrize(
    ("name", "shape"), [(n, s) for n in FORMATS for s in SHAPES if len(s) == 2 or n not in MATRIX_ONLY], ids=str
)


def uniform(name, shape, rank):
    modes = FORMATS[name].default_modes(shape)
    return modes, FORMATS[name].clamp(shape, modes, FORMATS[name].uniform(shape, modes, rank))


@EVERY
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_full_rank_reconstructs_the_weight(name, shape, library, rng):
    form = FORMATS[name]
    weight = rng.standard_normal(shape).astype(np.float32)
    tensor = torch.from_numpy(weight) if library == "torch" else weight
    modes, ranks = uniform(name, shape, 10**6)
    again = form.reconstruct(form.decompose(tensor, modes, ranks), shape, modes)
    assert type(again) is type(tensor)
    assert again.dtype == tensor.dtype
    bound = 0.05 if name == "cp" else 1e-5  # alternating least squares gets near to a full-rank tensor, not there
    assert relative(np.asarray(again), weight) < bound


@EVERY
def test_a_weight_of_low_rank_is_found_again(name, shape, rng):
    form = FORMATS[name]
    modes, ranks = uniform(name, shape, 2)
    layer = LayerPlan(name="w", format=name, modes=modes, ranks=ranks)
    weight = form.reconstruct(random_cores(layer, shape, rng, np.float64), shape, modes)
    # Least squares over a ring or a sum of components may stop in a valley: near is all that is promised.
    bound = {"tr": 0.5, "cp": 0.05}.get(name, 1e-10)
    assert relative(project(name, weight, modes, ranks), weight) < bound


@EVERY
def test_projecting_twice_changes_nothing_more(name, shape, rng):
    modes, ranks = uniform(name, shape, 3)
    once = project(name, rng.standard_normal(shape), modes, ranks)
    twice = project(name, once, modes, ranks)
    assert relative(twice, once) < {"tr": 0.5, "cp": 0.05}.get(name, 1e-10)


@EVERY
@pytest.mark.parametrize("rank", [1, 3, 5, 10**6])
def test_core_shapes_and_rank_axes_are_those_of_the_cores(name, shape, rank, rng):
    form = FORMATS[name]
    if rank > 5 and name == "cp":
        rank = 7
    modes, ranks = uniform(name, shape, rank)
    cores = form.decompose(rng.standard_normal(shape), modes, ranks)
    assert tuple(core.shape for core in cores) == form.core_shapes(shape, modes, ranks)
    axes = form.rank_axes(shape, modes)
    assert len(axes) == len(cores)
    assert all(axis < core.ndim for core, own in zip(cores, axes, strict=True) for axis in own)


@EVERY
def test_more_rank_is_not_worse(name, shape, rng):
    weight = rng.standard_normal(shape)
    errors = [relative(project(name, weight, *uniform(name, shape, rank)), weight) for rank in (1, 2, 4)]
    assert errors[1] <= errors[0] * 1.02
    assert errors[2] <= errors[1] * 1.02


TABLES = [((12, 37), (3, 4, 8, 5)), ((12, 37), (3, 2, 2, 3, 3, 5)), ((6, 33), (1, 2, 3, 1, 5, 7)), ((16, 91), (4, 4, 10, 10))]


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize(("shape", "modes"), TABLES, ids=str)
def test_the_padding_of_a_table_takes_nothing_from_its_rank(shape, modes, library, rng):
    form, d = FORMATS["ttm"], len(modes) // 2
    for rank in (1, 2, 3, 99):
        layer = LayerPlan(name="w", format="ttm", modes=modes, ranks=form.clamp(shape, modes, (1, *[rank] * (d - 1), 1)))
        weight = form.reconstruct(random_cores(layer, shape, rng, np.float64), shape, modes)
        assert weight.shape == shape
        given = torch.from_numpy(weight) if library == "torch" else weight
        assert relative(np.asarray(form.reconstruct(layer.decompose(given), shape, modes)), weight) < 1e-9
        once = project("ttm", rng.standard_normal(shape), modes, layer.ranks)
        assert relative(project("ttm", once, modes, layer.ranks), once) < 1e-9


@given(data=st.data())
@cases(60, 600)
def test_modes_of_a_table_hold_all_entries_with_little_padding(data):
    shape, count = tuple(data.draw(st.integers(1, 5000)) for _ in range(2)), data.draw(st.sampled_from([2, 3]))
    modes = table_modes(shape, count)
    FORMATS["ttm"].validate(shape, modes, (1,) * (count + 1))
    assert math.prod(modes[:count]) == shape[0]
    assert 0 <= padding(shape, modes) <= shape[1] / 11 + 3
    assert max(modes[count:]) <= 5 * min(modes[count:]) + 2


def test_padding_is_for_the_entries_of_an_embedding_alone():
    plan = LayerPlan(name="w", format="ttm", modes=(4, 8, 4, 5), ranks=(1, 2, 1))
    plan.check_layer(LayerSpec("linear", (32, 17), gathers=True))
    for op in ("linear", "recurrent"):
        with pytest.raises(PlanError, match=r"layer w: modes .* give more than 17 inputs, which only .* try \[8, 4, 17, 1\]"):
            plan.check_layer(LayerSpec(op, (32, 17)))


@given(data=st.data())
@cases(60, 600)
def test_zeros_around_the_ranks_change_nothing_and_come_off_again(data):
    name = data.draw(st.sampled_from(sorted(FORMATS)))
    kernel = () if name in MATRIX_ONLY else data.draw(st.sampled_from([(), (3,), (2, 3), (1, 1)]))
    shape, plan = draw_plan(data, "w", name, kernel, "conv" if kernel else "linear")
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    cores = random_cores(plan, shape, rng, np.float64)
    block = data.draw(st.sampled_from([2, 4, 16]))
    padded = pad_ranks(plan, cores, shape, block)
    form = FORMATS[name]
    np.testing.assert_allclose(
        form.reconstruct(padded, shape, plan.modes), form.reconstruct(cores, shape, plan.modes), atol=1e-12
    )
    assert all(
        core.shape[axis] % block == 0
        for core, axes in zip(padded, form.rank_axes(shape, plan.modes), strict=True)
        for axis in axes
    )
    for core, wide in zip(cores, padded, strict=True):
        np.testing.assert_array_equal(core, wide[tuple(slice(size) for size in core.shape)])


@pytest.mark.parametrize("modes", [(32, 9, 16), (4, 8, 9, 2, 8)])
def test_tt_svd_keeps_what_tensorly_keeps(modes, rng):
    weight = rng.standard_normal((32, 16, 3, 3)).astype(np.float32)
    ranks = (1, *[6] * (len(modes) - 1), 1)
    ours = project("tt", weight, modes, ranks)
    tensor = weight.transpose(0, 2, 3, 1).reshape(modes).astype(np.float64)
    theirs = tl.tt_to_tensor(tensor_train(tensor, list(ranks))).reshape(32, 3, 3, 16).transpose(0, 3, 1, 2)
    assert relative(ours, theirs) < 1e-5  # float32 against float64


@pytest.mark.parametrize(
    ("shape", "modes", "ranks"),
    [
        ((64, 64, 3, 3), (64, 9, 64), (4, 8, 8, 4)),
        ((64, 32, 3, 3), (64, 9, 32), (8, 12, 12, 8)),  # 8·12 values do not fit the first cut of any mode
        ((64, 64, 3, 3), (8, 8, 9, 8, 8), (2, 6, 8, 8, 6, 2)),
        ((64, 96), (8, 8, 8, 12), (3, 5, 6, 5, 3)),
    ],
)
def test_the_refined_ring_is_at_least_as_good_as_the_one_shot(shape, modes, ranks, rng):
    weight = rng.standard_normal(shape)
    ring = tr.clamp(shape, modes, ranks)
    with backend_of(weight):
        tensor = unfold(weight, modes)
        one_shot = tr.error(tensor, tr.one_shot(tensor, ring))
        refined = tr.error(tensor, tr.decompose(weight, modes, ranks))
    assert refined <= one_shot
    assert refined < 0.99 * one_shot  # on noise, which no cut suits, there is always something to gain


@pytest.mark.parametrize("rank", [4, 6, 7])
@pytest.mark.parametrize("falling", [False, True])
def test_a_rings_cores_have_one_norm_and_do_not_grow_to_cancel_each_other(rank, falling, rng):
    tensor = rng.standard_normal((16, 144))
    if falling:
        u, _, v = np.linalg.svd(tensor, full_matrices=False)
        tensor = (u * np.exp(-np.arange(16) / 4)) @ v
    weight = np.moveaxis(tensor.reshape(16, 3, 3, 16), 3, 1)
    cores = tr.decompose(weight, (16, 9, 16), (rank,) * 4)
    norms = [np.linalg.norm(core) for core in cores]
    np.testing.assert_allclose(norms, norms[0], rtol=1e-6)
    assert np.prod(norms) < 40 * np.linalg.norm(weight)  # undamped: 400 to 700 times at ranks 6 and 7


def test_cp_is_bounded_where_plain_least_squares_diverges(rng):
    # a⊗a⊗b + a⊗b⊗a + b⊗a⊗a has rank 3 and is a limit of rank-2 tensors with unbounded components (de Silva and Lim 2008).
    a, b = rng.standard_normal(9), rng.standard_normal(9)
    tensor = sum(np.einsum("i,j,k->ijk", *part) for part in ((a, a, b), (a, b, a), (b, a, a)))
    weight = tensor.transpose(0, 2, 1).reshape(9, 9, 3, 3)
    modes = (9, 9, 9)
    factors = cp.decompose(weight, modes, (2,))
    norms = np.prod([np.linalg.norm(factor, axis=0) for factor in factors], axis=0)
    assert norms.max() <= cp.BOUND * np.linalg.norm(weight)


def test_cp_says_when_it_diverges(rng, monkeypatch):
    monkeypatch.setattr(cp, "BOUND", 1e-3)
    with pytest.raises(PlanError, match=r"cp with 4 components diverges .* lower the rank, or use tucker or tt"):
        cp.decompose(rng.standard_normal((8, 6, 3, 3)), (8, 9, 6), (4,))


@pytest.mark.parametrize("name", FORMATS)
def test_a_zero_weight_has_finite_cores(name):
    modes, ranks = uniform(name, (12, 20), 3)
    cores = FORMATS[name].decompose(np.zeros((12, 20), np.float32), modes, ranks)
    assert all(np.isfinite(core).all() for core in cores)
    np.testing.assert_array_equal(FORMATS[name].reconstruct(cores, (12, 20), modes), np.zeros((12, 20)))


def test_the_published_lstm_of_ucf11_has_its_parameters():
    # Input 57600 = 8·20·20·18, hidden 256, four gates: Yang et al. 2017 (TT-matrix), Yin et al. 2021 (separable).
    shape = (4 * 256, 57600)
    paired = LayerPlan(name="rnn.weight_ih_l0", format="ttm", modes=(16, 4, 4, 4, 8, 20, 20, 18), ranks=(1, 4, 4, 4, 1))
    paired.check(shape)
    assert paired.params(shape) == 3360
    assert round(math.prod(shape) / paired.params(shape)) == 17554
    separable = LayerPlan(
        name="rnn.weight_ih_l0", format="tt", modes=(16, 8, 8, 8, 20, 20, 18), ranks=(1, 4, 5, 9, 12, 6, 3, 1)
    )
    separable.check(shape)
    cores = [4 * 16, 4 * 8 * 5, 5 * 8 * 9, 9 * 8 * 12, 12 * 20 * 6, 6 * 20 * 3, 3 * 18]
    assert separable.params(shape) == sum(cores) == 3302


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
@cases(60, 200)
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


@pytest.mark.parametrize("name", FORMATS)
def test_clamp_lowers_to_what_exists_and_leaves_the_callers_list(name):
    shape = (32, 16)
    modes = list(FORMATS[name].default_modes(shape))
    ranks = list(FORMATS[name].uniform(shape, modes, 900))
    before = list(ranks)
    clamped = FORMATS[name].clamp(shape, modes, ranks)
    assert ranks == before
    assert max(clamped) < 900
    assert FORMATS[name].clamp(shape, modes, clamped) == clamped
    assert FORMATS["tt"].clamp((32, 16, 3, 3), [32, 9, 16], [1, 64, 200, 1]) == (1, 32, 16, 1)


@pytest.mark.parametrize(
    ("name", "shape", "modes", "ranks", "reason"),
    [
        ("tt", (32, 16, 3, 3), (32, 16, 9), (1, 4, 4, 1), r"do not fit .* try \[32, 9, 16\]"),
        ("tt", (32, 16, 3, 3), (32, 9, 15), (1, 4, 4, 1), "whose product is 16"),
        ("tt", (32, 16), (32, 16), (1, 4, 4, 1), r"expected 3 ranks \(tt: r_0 … r_2 for 2 modes\), got 4"),
        ("tt", (32, 16), (32, 16), (2, 4, 1), "expected tt ranks that start and end with 1, got"),
        ("tt", (32, 16), (32, 16), (1, 0, 1), "ranks of 1 or larger, got"),
        ("tt", (32, 16), (-32, -16), (1, 4, 1), "do not fit"),
        ("tr", (32, 16), (32, 16), (2, 4, 3), "ranks whose first and last are equal"),
        ("tr", (32, 16), (32, 16), (2, 4), "expected 3 ranks"),
        ("tucker", (32, 16, 3, 3), (32, 9, 16), (4, 4, 4), "expected 2 ranks"),
        ("cp", (32, 16), (32, 16), (4, 4), "expected 1 ranks"),
        ("cp", (32, 16), (32, 15), (4,), "do not fit"),
        ("svd", (32, 16, 3, 3), (32, 16), (4,), r"expected \[288, 16\] or \[96, 48\] or \[32, 144\]"),
        ("svd", (32, 16), (32, 16), (0,), "1 or larger"),
        ("ttm", (32, 16, 3, 3), (32, 16), (1, 1), "for a convolution use tt or tr"),
        ("ttm", (32, 16), (8, 4, 4, 3), (1, 2, 1), "input modes, with products 32 and 16"),
        ("ttm", (32, 16), (8, 4, 5, 4), (1, 2, 1), r"or for an embedding \[4, 8, 4, 4\]"),
        ("ttm", (32, 16), (8, 4, 16), (1, 2, 1), "equally many output and input modes"),
        ("ttm", (32, 16), (8, 4, 4, 4), (2, 2, 1), "start and end with 1"),
    ],
)
def test_impossible_modes_and_ranks_say_why(name, shape, modes, ranks, reason):
    for function in (FORMATS[name].decompose, lambda w, m, r: FORMATS[name].core_shapes(w.shape, m, r)):
        with pytest.raises(PlanError, match=reason):
            function(np.ones(shape), modes, ranks)


@pytest.mark.parametrize("name", FORMATS)
def test_an_unknown_merge_is_refused_with_the_known_ones(name):
    modes, ranks = uniform(name, (12, 20), 2)
    layer = LayerPlan(name="fc", format=name, modes=modes, ranks=ranks, merge="both")
    with pytest.raises(PlanError, match=f"layer fc: unknown merge 'both' for format {name}: expected one of auto, "):
        layer.check((12, 20))
    with pytest.raises(PlanError, match="unknown merge"):
        FORMATS[name].contraction(
            [np.zeros(s) for s in layer.core_shapes((12, 20))], LayerSpec("linear", (12, 20)), modes, "both"
        )


def test_plans_travel_as_json():
    layer = LayerPlan(name="a", format="tr", modes=(4, 6), ranks=(2, 3, 2))
    assert LayerPlan.model_validate_json(layer.model_dump_json()) == layer
    assert json.loads(layer.model_dump_json())["merge"] == "auto"
