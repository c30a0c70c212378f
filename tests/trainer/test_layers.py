import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tensorrail_exporter import FORMATS, LayerPlan, Plan, factorize
from tensorrail_exporter.formats import tt
from tensorrail_runtime.parity import parity
from tensorrail_trainer import cores_of, to_dense, to_onnx
from tensorrail_trainer.layers import swap

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_convolution_of_cores_equals_the_reconstructed_dense_one(data):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    nd = data.draw(st.integers(1, 3), "spatial axes")
    o1, o2, i1, i2 = (data.draw(st.integers(1, 4)) for _ in range(4))
    kernel, dilation = ([data.draw(st.integers(1, 3)) for _ in range(nd)] for _ in range(2))
    padding = data.draw(st.one_of(st.just("same"), st.just("valid"), st.integers(0, 2)))
    stride = 1 if padding == "same" else data.draw(st.integers(1, 3))
    bias = data.draw(st.booleans())
    dense = CONVOLUTIONS[nd](i1 * i2, o1 * o2, kernel, stride, padding, dilation, bias=bias)
    modes = (o1, o2, int(np.prod(kernel)), i1, i2)
    ranks = (1, *[data.draw(st.integers(1, 8)) for _ in range(4)], 1)
    merge = data.draw(st.sampled_from(tt.MERGES))
    plan = Plan(layers=(LayerPlan(name="0", format="tt", modes=modes, ranks=ranks, merge=merge),))
    model = swap(nn.Sequential(dense), plan)
    x = torch.randn(data.draw(st.integers(1, 3)), i1 * i2, *[8] * nd)
    torch.testing.assert_close(model(x), to_dense(model)(x), atol=1e-4, rtol=1e-4)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_linear_layer_of_cores_equals_the_reconstructed_dense_one(data):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    outputs, inputs = ([data.draw(st.integers(1, 5)) for _ in range(data.draw(st.integers(1, 3)))] for _ in range(2))
    dense = nn.Linear(int(np.prod(inputs)), int(np.prod(outputs)), bias=data.draw(st.booleans()))
    modes = (*outputs, *inputs)
    ranks = (1, *[data.draw(st.integers(1, 8)) for _ in modes[1:]], 1)
    merge = data.draw(st.sampled_from(tt.MERGES))
    layer = LayerPlan(name="0", format="tt", modes=modes, ranks=ranks, merge=merge)
    model = swap(nn.Sequential(dense), Plan(layers=(layer,)))
    x = torch.randn(*data.draw(st.sampled_from([(3,), (2, 3), ()])), dense.in_features)
    torch.testing.assert_close(model(x), to_dense(model)(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", FORMATS)
def test_a_full_rank_swap_changes_nothing_and_cores_train(form):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 4))
    x = torch.randn(2, 6, 4, 4)
    expected = model(x).detach()
    layers = []
    for name, shape in (("0", (8, 6, 3, 3)), ("2", (4, 128))):
        modes = FORMATS[form].default_modes(shape)
        ranks = FORMATS[form].clamp(modes, (1, *[999] * (len(modes) - 1), 1))
        layers.append(LayerPlan(name=name, format=form, modes=modes, ranks=ranks))
    swapped = swap(model, Plan(layers=tuple(layers)))
    torch.testing.assert_close(swapped(x), expected, atol=1e-4, rtol=1e-4)
    swapped(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in swapped.parameters())


@pytest.mark.parametrize("merge", tt.MERGES)
def test_the_exported_graph_equals_the_torch_model_of_cores(merge, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(128, 6)
    ).eval()
    model[1].running_mean.uniform_(-1, 1)
    model[1].running_var.uniform_(0.5, 2)
    plan = Plan(
        layers=(
            LayerPlan(name="0", format="tt", modes=(4, 2, 9, 2, 2), ranks=(1, 3, 5, 3, 2, 1), merge=merge),
            LayerPlan(name="3", format="tt", modes=(8, 1, 8), ranks=(1, 3, 4, 1), merge=merge),
            LayerPlan(name="5", format="tt", modes=(2, 3, 8, 16), ranks=(1, 2, 4, 4, 1), merge=merge),
        )
    )
    swapped = swap(model, plan)
    x = torch.randn(3, 4, 8, 8)
    dense = to_onnx(to_dense(swapped), x)
    cores = {name: [core.numpy() for core in cores] for name, cores in cores_of(swapped).items()}
    paths = tmp_path / "dense.onnx", tmp_path / "model.onnx"
    for path, graph in zip(paths, (dense, factorize(dense, plan, cores).model), strict=True):
        path.write_bytes(graph.SerializeToString())
    assert parity(*paths, batches=(1, 7)).worst < 1e-5
    import onnxruntime as ort

    out = ort.InferenceSession(paths[1], providers=["CPUExecutionProvider"]).run(None, {"image": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(out), swapped(x).detach(), atol=1e-5, rtol=1e-4)
    assert b".py" not in paths[1].read_bytes()  # no source lines or paths of the exporting machine
