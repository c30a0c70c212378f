"""Values that no output shows, and that make a processor slow, are written as zeros."""

import numpy as np
import pytest
from conftest import make_model
from onnx import helper, numpy_helper

from tensorrail_exporter import FORMATS, LayerPlan, Plan, decompose_graph, factorize, reconstruct
from tensorrail_exporter.rewrite.negligible import without_negligible

TINY = np.finfo(np.float32).tiny


def denormals(model):
    arrays = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    floats = [array for array in arrays if array.dtype == np.float32]
    return sum(int(((np.abs(array) < TINY) & (array != 0)).sum()) for array in floats)


@pytest.mark.parametrize("form", ["tt", "tr", "tucker", "svd"])
def test_cores_of_channels_that_ended_near_zero_have_no_denormal_values(form, rng):
    """Half of the channels have weights of 1e-39, as in trained networks of Paddle: their rows of the cores are alike."""
    weight = rng.standard_normal((16, 12, 3, 3)).astype(np.float32)
    weight[8:] *= np.float32(1e-39)
    node = helper.make_node("Conv", ["x", "w"], ["y"], "w", pads=[1] * 4)
    model = make_model([node], {"w": weight}, {"x": ["n", 12, 8, 8]}, {"y": ["n", 16, 8, 8]})
    modes = FORMATS[form].default_modes(weight.shape)
    ranks = FORMATS[form].clamp(weight.shape, modes, FORMATS[form].uniform(weight.shape, modes, 6))
    plan = Plan(layers=(LayerPlan(name="w", format=form, modes=modes, ranks=ranks),))
    cores = decompose_graph(model, plan)
    assert denormals(model) > 100
    assert denormals(factorize(model, plan, cores).model) == 0
    assert denormals(reconstruct(model, plan, cores)) == 0


def test_other_values_stay_as_they_are(rng):
    values = rng.standard_normal((8, 8)).astype(np.float32)
    assert without_negligible(values) is values
    small = values * np.float32(1e-35)  # all of it: a scale that something may divide by
    assert without_negligible(small) is small
    halves = values.astype(np.float16) * np.float16(1e-7)
    assert without_negligible(halves) is halves
    values[0] *= np.float32(1e-35)
    values[1] *= np.float32(1e-25)
    kept = without_negligible(values)
    assert not kept[0].any()
    np.testing.assert_array_equal(kept[1:], values[1:])
