"""A trained network of cores as ONNX in one call: the files fit together, and a network that they do not fit is refused."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

import tensorrail as tr
from tensorrail_runtime.errors import ModelError, PlanError


@pytest.fixture
def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    for _ in range(3):
        model(torch.randn(8, 8, 4, 4))  # statistics of the batch-norm
    return tr.ADMM(
        model, tr.Plan(layers=(*tr.plan_layers(model, "0", ranks=6), *tr.plan_layers(model, "4", ranks=6))), rho=0.1
    ).factorize()


def test_files_fit_together(trained, tmp_path):
    x = torch.randn(3, 8, 4, 4)
    trained.train()
    report = tr.export_trained(trained, x, tmp_path / "new" / "folder", output_names=["classes"])
    assert trained.training
    assert report.holds
    assert report.layers == 2
    assert report.torch_difference < 1e-5
    assert {one.layer for one in report.parity.layers} == {"0", "4"}
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["cores.safetensors", "dense.onnx", "model.onnx", "plan.json"]
    session = ort.InferenceSession(folder / "model.onnx")
    (found,) = session.run(["classes"], {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, trained.eval()(x), atol=1e-4)
    again = tr.export(folder / "dense.onnx", tmp_path / "again.onnx", folder / "plan.json", cores=folder / "cores.safetensors")
    assert len(again.layers) == 2
    assert tr.check(tmp_path / "again.onnx", folder / "model.onnx", tolerance=1e-6).holds
    assert "2 layers made of cores; dense.onnx, model.onnx, plan.json, cores.safetensors are in" in " ".join(
        str(report).split()
    )
    tr.export_trained(trained, x, folder)  # once more, in place


class Two(nn.Module):
    """Two inputs whose order in `forward` is not that of the example, and two outputs."""

    def __init__(self):
        super().__init__()
        self.first, self.rnn = nn.Linear(32, 24), nn.LSTM(24, 16, batch_first=True)

    def forward(self, scale, rows):
        out, _ = self.rnn(self.first(rows) * scale)
        return {"last": out[:, -1], "all": out}


def test_several_inputs_and_outputs_and_a_recurrent_layer(tmp_path):
    torch.manual_seed(0)
    model = Two()
    admm = tr.ADMM(
        model, tr.Plan(layers=(*tr.plan_layers(model, "first", ranks=8), *tr.plan_layers(model, "rnn.*", ranks=8))), rho=0.1
    )
    example = {"rows": torch.randn(2, 5, 32), "scale": torch.rand(2, 1, 1)}
    report = tr.export_trained(admm.factorize(), example, tmp_path)
    assert report.holds
    assert len(report.parity.outputs) == 2
    plan = tr.Plan.load(tmp_path / "plan.json")
    assert [layer.name for layer in plan.layers] == ["first", "rnn.weight_ih_l0"]


def test_a_network_without_cores_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(PlanError, match="Linear has no layer made of cores: factorize it first"):
        tr.export_trained(nn.Linear(4, 4), torch.randn(2, 4), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made(trained, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"file: cannot be made \(File exists\): expected a folder"):
        tr.export_trained(trained, torch.randn(2, 8, 4, 4), tmp_path / "file")
