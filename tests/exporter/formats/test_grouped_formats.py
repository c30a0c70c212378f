"""Formats of convolutions in groups: every group's weight has its own cores, of the same ranks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import MATRIX_ONLY, cases, draw_plan, random_cores, relative
from conftest import make_model
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from tensorrail_exporter import FORMATS, LayerPlan, LayerSpec, PlanError, pad_ranks, project
from tensorrail_exporter.formats import Format, format_of, svd
from tensorrail_exporter.formats.contraction import Conv
from tensorrail_exporter.plans.costs import dense_cost
from tensorrail_exporter.rewrite.survey import survey
from tensorrail_exporter.search.options import options_of

CONVOLVING = sorted(set(FORMATS) - MATRIX_ONLY)
SHAPES = [((24, 4, 3, 3), 4), ((12, 6, 1, 1), 2), ((9, 5, 5), 3), ((8, 3, 2, 3, 3), 2)]


def uniform(form, shape, rank):
    modes = form.default_modes(shape)
    return modes, form.clamp(shape, modes, form.uniform(shape, modes, rank))


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
@pytest.mark.parametrize("name", CONVOLVING)
def test_full_rank_reconstructs_the_weight_of_every_group(name, shape, groups, library, rng):
    form = format_of(name, groups)
    weight = rng.standard_normal(shape).astype(np.float32)
    tensor = torch.from_numpy(weight) if library == "torch" else weight
    modes, ranks = uniform(form, shape, 10**6)
    cores = form.decompose(tensor, modes, ranks)
    assert tuple(tuple(core.shape) for core in cores) == form.core_shapes(shape, modes, ranks)
    again = form.reconstruct(cores, shape, modes)
    assert type(again) is type(tensor)
    assert again.dtype == tensor.dtype
    assert relative(np.asarray(again), weight) < (0.05 if name == "cp" else 1e-5)  # least squares comes near full rank


@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
@pytest.mark.parametrize("name", CONVOLVING)
def test_the_projection_is_that_of_each_group(name, shape, groups, rng):
    weight = rng.standard_normal(shape)
    modes, ranks = uniform(format_of(name, groups), shape, 2)
    parts = [project(name, part, modes, ranks) for part in weight.reshape(groups, -1, *shape[1:])]
    np.testing.assert_allclose(project(name, weight, modes, ranks, groups), np.concatenate(parts), atol=1e-12)
    assert relative(project(name, torch.from_numpy(weight), modes, ranks, groups).numpy(), np.concatenate(parts)) < 1e-10


@given(data=st.data())
@cases(40, 400)
def test_padded_cores_and_the_equation_give_the_same_weight(data):
    groups = data.draw(st.integers(2, 4), "groups")
    kernel = data.draw(st.sampled_from([(3,), (2, 3), (1, 1)]))
    shape, plan = draw_plan(data, "w", data.draw(st.sampled_from(CONVOLVING)), kernel, groups=groups)
    cores = random_cores(plan, shape, np.random.default_rng(data.draw(st.integers(0, 99))), np.float64, groups)
    weight = plan.reconstruct(cores, shape, groups)
    padded = pad_ranks(plan, cores, shape, data.draw(st.sampled_from([2, 4])), groups)
    assert all(len(core) == groups for core in padded)
    np.testing.assert_allclose(plan.reconstruct(padded, shape, groups), weight, atol=1e-12)
    equation = format_of(plan.format, groups).equation(shape, plan.modes)
    sizes = dict(zip(equation.weight, equation.axes, strict=True))
    views = [
        core.reshape([sizes.get(letter, -1) for letter in letters]) if core.ndim != len(letters) else core
        for core, letters in zip(cores, equation.cores, strict=True)
    ]
    product = np.einsum(f"{','.join(equation.cores)}->{equation.weight}", *views).reshape(shape)
    np.testing.assert_allclose(product, weight, atol=1e-10)


@pytest.mark.parametrize("name", CONVOLVING)
def test_the_steps_are_convolutions_with_more_groups(name, rng):
    spec = LayerSpec("conv", (32, 8, 3, 3), (2, 2), (1,) * 4, (1, 1), size=(8, 8), groups=4)
    modes, ranks = uniform(format_of(name, 4), spec.shape, 4)
    plan = LayerPlan(name="c", format=name, modes=modes, ranks=ranks, merge="sides")
    assert plan.model_copy(update={"merge": "auto"}).merge_for(spec) == "sides"
    steps = plan.contraction(plan.decompose(rng.standard_normal(spec.shape), 4), spec)
    alone = plan.contraction(plan.decompose(rng.standard_normal((8, 8, 3, 3))), spec.of_one_group)
    assert all(isinstance(step, Conv) for step in steps)
    assert [step.groups for step in steps] == [4 * step.groups for step in alone]
    assert [step.weight.shape[0] for step in steps] == [4 * step.weight.shape[0] for step in alone]
    assert dense_cost(spec).macs == 4 * dense_cost(spec.of_one_group).macs == 4 * 4 * 32 * 8 * 9


def test_a_format_of_your_own_without_merged_sides_is_refused_and_not_offered(monkeypatch):
    own = SimpleNamespace(**{name: getattr(svd, name) for name in vars(Format) if hasattr(svd, name)})
    own.merges = lambda op: ("whole",)
    monkeypatch.setitem(FORMATS, "own", own)
    plan = LayerPlan(name="c", format="own", modes=(8, 4), ranks=(2,))
    plan.check((8, 4, 1, 1))
    with pytest.raises(PlanError, match=r"layer c: format own cannot run in groups: .* merge 'sides', got one with whole"):
        plan.check((16, 4, 1, 1), 2)
    node = helper.make_node("Conv", ["x", "w"], ["y"], "n", group=2)
    weight = np.ones((32, 16, 1, 1), np.float32)
    (layer,) = survey(make_model([node], {"w": weight}, {"x": ["n", 32, 4, 4]}, {"y": ["n", 32, 4, 4]}))
    assert options_of(layer, ["own"], 4) == ()
    assert options_of(layer, ["own", "svd"], 4) == options_of(layer, ["svd"], 4) != ()


def test_what_does_not_run_in_groups_says_why():
    plan = LayerPlan(name="c", format="tt", modes=(8, 9, 4), ranks=(1, 3, 3, 1))
    plan.check((16, 4, 3, 3), 2)
    with pytest.raises(PlanError, match=r"layer c: in 2 groups, .*: modes \[8, 9, 4\] do not fit .*; try \[4, 9, 4\]"):
        plan.check((8, 4, 3, 3), 2)
    with pytest.raises(PlanError, match=r"unknown merge 'none' for format tt of a convolution in 2 groups: expected .* sides"):
        plan.model_copy(update={"merge": "none"}).check((16, 4, 3, 3), 2)
    with pytest.raises(PlanError, match=r"in 2 groups, .*: format ttm expects a matrix"):
        LayerPlan(name="c", format="ttm", modes=(8, 4), ranks=(1, 1)).check((16, 4, 3, 3), 2)
    with pytest.raises(PlanError, match="layer c: format width reads fewer channels, but each group"):
        LayerPlan(name="c", format="width", modes=(4,), ranks=(2,)).check((16, 4, 3, 3), 2)
    with pytest.raises(PlanError, match="expected outputs that are a multiple of the 3 groups, got 16"):
        plan.check((16, 4, 3, 3), 3)
