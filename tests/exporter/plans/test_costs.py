import numpy as np
import pytest

from tensorrail_exporter import FORMATS, Conv, LayerPlan, LayerSpec, MatMul, Reshape, contraction_cost

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
