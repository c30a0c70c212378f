import numpy as np
import onnx
import pytest
from conftest import make_model
from onnx import helper

from tensorrail_exporter import (
    FORMATS,
    Conv,
    LayerPlan,
    LayerSpec,
    MatMul,
    Plan,
    Reshape,
    contraction_cost,
    decompose_graph,
    factorize,
)
from tensorrail_exporter.formats import format_of
from tensorrail_exporter.plans.costs import dense_cost
from tensorrail_exporter.rewrite.survey import survey
from tensorrail_runtime.graphs.cost import cost as graph_cost

CONV = LayerSpec("conv", (64, 32, 3, 3), (2, 2), (1, 1, 1, 1), (1, 1), size=(28, 28))


def steps_of(layer, spec):
    return layer.contraction([np.zeros(s, np.float32) for s in layer.core_shapes(spec.shape)], spec)


def test_the_cost_of_a_train_is_counted_by_hand():
    layer = LayerPlan(name="c", format="tt", modes=(64, 9, 32), ranks=(1, 16, 8, 1), merge="sides")
    cost = contraction_cost(steps_of(layer, CONV), CONV)
    macs = 28 * 28 * 8 * 32 + 14 * 14 * 16 * 8 * 9 + 14 * 14 * 64 * 16
    assert cost.flops == 2 * macs
    assert cost.stored_bytes == 4 * (8 * 32 + 16 * 8 * 9 + 64 * 16)
    moved = 28 * 28 * (32 + 8) + 28 * 28 * 8 + 14 * 14 * 16 + 14 * 14 * (16 + 64)
    assert cost.activation_bytes == 4 * moved
    assert cost.kernels == 3
    table = str(cost).splitlines()
    assert table[0].split() == ["step", "output", "FLOPs", "activation", "bytes", "stored", "bytes", "kernels"]
    assert table[-1].split() == ["total", f"{cost.flops:,}", f"{cost.activation_bytes:,}", f"{cost.stored_bytes:,}", "3"]
    assert "conv 3×3 8→16" in table[2]


def test_the_cost_of_a_row_of_a_table_is_counted_by_hand():
    table = LayerSpec("linear", (24, 58), lead=2, size=(3,), gathers=True)
    layer = LayerPlan(name="t", format="ttm", modes=(2, 3, 4, 3, 4, 5), ranks=(1, 6, 7, 1), merge="none")
    cost = contraction_cost(steps_of(layer, table), table)
    assert cost.macs == 3 * (1 * 2 * 6 * 12 + 6 * 3 * 7 * 4)  # of three indices
    assert cost.stored_bytes == 4 * (1 * 2 * 3 * 6 + 6 * 3 * 4 * 7 + 7 * 4 * 5 * 1)
    assert cost.steps[-1].shape == (3, 24)
    assert cost.kernels == 6 + 3 + 5  # the index of each mode, the padding, and three Gathers with two products


@pytest.mark.parametrize(
    ("name", "modes", "ranks"),
    [
        ("tr", (64, 9, 32), (4, 8, 8, 4)),
        ("tucker", (8, 8, 9, 32), (4, 4, 8)),
        ("cp", (64, 9, 32), (16,)),
        ("svd", (192, 96), (16,)),
    ],
)
def test_every_merge_gives_the_layers_own_output(name, modes, ranks):
    for merge in FORMATS[name].merges("conv"):
        layer = LayerPlan(name="c", format=name, modes=modes, ranks=ranks, merge=merge)
        assert contraction_cost(steps_of(layer, CONV), CONV).steps[-1].shape == (64, 14, 14)


def test_auto_takes_the_cheapest_merge():
    many = LayerSpec("linear", (4096, 4096), lead=2, size=(256,))
    one = LayerSpec("linear", (4096, 4096))
    layer = LayerPlan(name="fc", format="ttm", modes=(8,) * 8, ranks=(1, 8, 8, 8, 1))
    for spec in (many, one):
        costs = {
            merge: contraction_cost(steps_of(layer.model_copy(update={"merge": merge}), spec), spec).seconds
            for merge in FORMATS["ttm"].merges("linear")
        }
        assert layer.merge_for(spec) == min(costs, key=costs.get)
    # A huge recurrent input: merged input cores would be 57600 rows to read for a handful of steps, and still cost less time.
    train = LayerPlan(name="c", format="tt", modes=(4, 16, 9, 4, 8), ranks=(1, 4, 16, 16, 4, 1))
    assert train.merge_for(CONV) == "sides"
    assert train.model_copy(update={"merge": "none"}).merge_for(CONV) == "none"


def test_auto_pad_and_products_have_their_shapes():
    same = Conv(np.zeros((4, 2, 3)), (0,), (2,), (0, 0), (1,), auto_pad="SAME_UPPER")
    spec = LayerSpec("conv", (4, 2, 3), (2,), (0, 0), (1,), "SAME_UPPER", size=(7,))
    assert contraction_cost((same,), spec).steps[0].shape == (4, 4)
    left = (Reshape((0, 3, 2, 5)), MatMul(np.zeros((3, 7, 2)), (0,), "left"), Reshape((0, -1)))
    cost = contraction_cost(left, LayerSpec("linear", (105, 30)))
    assert [step.shape for step in cost.steps] == [(3, 2, 5), (3, 7, 5), (105,)]
    assert cost.flops == 2 * 3 * 7 * 5 * 2


@pytest.mark.parametrize(("kernel", "dilation"), [((3,), (8,)), ((40,), (1,)), ((15, 15), (1, 1))])
def test_a_kernel_longer_than_the_axis_that_is_guessed_has_a_cost(kernel, dilation):
    nd = len(kernel)
    spec = LayerSpec("conv", (4, 4, *kernel), (1,) * nd, (0,) * (2 * nd), dilation=dilation)
    layer = LayerPlan(name="c", format="tucker", modes=(2, 2, int(np.prod(kernel)), 2, 2), ranks=(1,) * 4)
    assert layer.merge_for(spec) in FORMATS["tucker"].merges("conv")
    assert contraction_cost(steps_of(layer.model_copy(update={"merge": "none"}), spec), spec).flops > 0


@pytest.mark.parametrize("form", sorted(set(FORMATS) - {"ttm"}))
@pytest.mark.parametrize(
    ("kernel", "attributes"),
    [
        ((3, 3), {"strides": [2, 2], "pads": [1, 0, 1, 2], "output_padding": [1, 0]}),
        ((2, 4), {"strides": [2, 3], "dilations": [2, 1]}),
        ((1, 1), {"strides": [2, 2]}),
        ((5,), {"pads": [2, 2]}),
    ],
)
def test_the_cost_of_a_transposed_convolution_is_that_of_its_nodes(form, kernel, attributes, rng, tmp_path):
    nd = len(kernel)
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], "n", **attributes)
    weights = {"w": rng.standard_normal((16, 24, *kernel)).astype(np.float32)}
    model = make_model([node], weights, {"x": [1, 16, *[6] * nd]}, {"y": [1, 24, *[None] * nd]})
    (layer,) = survey(model)
    onnx.save(model, tmp_path / "dense.onnx")
    assert layer.macs == dense_cost(layer.spec).macs == graph_cost(tmp_path / "dense.onnx").macs
    kind = FORMATS[form]
    modes = kind.default_modes(layer.spec.shape)
    ranks = kind.clamp(layer.spec.shape, modes, kind.uniform(layer.spec.shape, modes, 8))
    for merge in kind.merges("conv"):
        plan = Plan(layers=(LayerPlan(name="w", format=form, modes=modes, ranks=ranks, merge=merge),))
        factored = factorize(model, plan, decompose_graph(model, plan)).model
        onnx.save(factored, tmp_path / "model.onnx")
        expected = contraction_cost(steps_of(plan.layers[0], layer.spec), layer.spec)
        assert expected.macs == graph_cost(tmp_path / "model.onnx").macs, merge
        assert expected.steps[-1].shape == layer.output[1:], merge


@pytest.mark.parametrize("form", sorted(set(FORMATS) - {"ttm"}))
@pytest.mark.parametrize("attributes", [{"strides": [2, 2], "pads": [1, 0, 1, 2]}, {"dilations": [2, 1]}])
def test_the_cost_of_a_convolution_in_groups_is_that_of_its_nodes(form, attributes, rng, tmp_path):
    node = helper.make_node("Conv", ["x", "w"], ["y"], "n", group=3, **attributes)
    weights = {"w": rng.standard_normal((24, 8, 3, 3)).astype(np.float32)}
    model = make_model([node], weights, {"x": [1, 24, 7, 6]}, {"y": [1, 24, None, None]})
    (layer,) = survey(model)
    onnx.save(model, tmp_path / "dense.onnx")
    assert layer.macs == dense_cost(layer.spec).macs == graph_cost(tmp_path / "dense.onnx").macs
    kind = format_of(form, 3)
    modes = kind.default_modes(layer.spec.shape)
    ranks = kind.clamp(layer.spec.shape, modes, kind.uniform(layer.spec.shape, modes, 4))
    plan = Plan(layers=(LayerPlan(name="w", format=form, modes=modes, ranks=ranks),))
    factored = factorize(model, plan, decompose_graph(model, plan))
    onnx.save(factored.model, tmp_path / "model.onnx")
    assert factored.layers[0].flops == graph_cost(tmp_path / "model.onnx").flops
    assert factored.layers[0].stored_params == graph_cost(tmp_path / "model.onnx").params


def test_a_transposed_convolution_with_one_tap_is_spread_last(rng):
    spec = LayerSpec("conv", (24, 16, 1, 1), (2, 2), (0,) * 4, (1, 1), size=(6, 6), transposed=True, output_padding=(0, 0))
    for form in ("tt", "tucker", "svd"):
        kind = FORMATS[form]
        modes = kind.default_modes(spec.shape)
        plan = LayerPlan(name="c", format=form, modes=modes, ranks=kind.uniform(spec.shape, modes, 8))
        assert contraction_cost(steps_of(plan, spec), spec).macs == 36 * 8 * (16 + 24), form
        first, last = (step for step in steps_of(plan, spec) if isinstance(step, Conv))
        assert (first.transposed, last.transposed) == (False, True), form
