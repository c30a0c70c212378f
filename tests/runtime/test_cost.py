import numpy as np
import pytest
import torch
from conftest import make_model
from onnx import helper
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tensorrail_runtime import ModelError, cost
from tensorrail_trainer import to_onnx


def save(model, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_a_network_costs_what_torch_counts(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(8 * 36, 10)
    ).eval()
    x = torch.randn(5, 3, 16, 16)
    with FlopCounterMode(display=False) as counter:
        model(x)
    result = cost(save(to_onnx(model, x), tmp_path), batch=5)
    assert result.flops == counter.get_total_flops()
    assert result.uncounted == ()


def test_closed_forms_and_shares(small_path):
    result = cost(small_path, batch=3)
    assert [layer.macs for layer in result.layers] == [3 * 32 * 64 * 16 * 9, 3 * 10 * 32]
    assert [layer.params for layer in result.layers] == [32 * 16 * 9, 320]
    assert result.params == 32 * 16 * 9 + 32 + 320 + 10
    assert result.flops == 2 * result.macs
    assert result.bytes == small_path.stat().st_size


def test_a_transposed_convolution_counts_every_input_value(tmp_path):
    weights = {"w": np.ones((4, 6, 3, 3), np.float32)}
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], "n", strides=[2, 2])
    model = make_model([node], weights, {"x": [2, 4, 5, 5]}, {"y": [2, 6, 11, 11]})
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.conv_transpose2d(torch.ones(2, 4, 5, 5), torch.ones(4, 6, 3, 3), stride=2)
    assert cost(save(model, tmp_path), 2).flops == counter.get_total_flops()


def test_an_operator_that_is_not_known_is_listed(tmp_path):
    node = helper.make_node("Einsum", ["x", "x"], ["y"], "n", equation="ij,kj->ik")
    result = cost(save(make_model([node], {}, {"x": [3, 4]}, {"y": [3, 3]}), tmp_path))
    assert (result.macs, result.uncounted) == (0, ("Einsum",))


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="not an ONNX model"):
        cost(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="cannot be read"):
        cost(tmp_path / "none.onnx")
