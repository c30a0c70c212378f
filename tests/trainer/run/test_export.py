"""Modules of every kind become graphs that compute the same: several inputs, dynamic axes, weights put in afterwards."""

import copy

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnxruntime.quantization import quantize_dynamic
from torch import nn

from tensorrail_runtime.errors import GraphError
from tensorrail_trainer import to_onnx
from tensorrail_trainer.run.export import Tracing

IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
MORE_IDS = torch.randint(0, 50, (4, 11), generator=torch.Generator().manual_seed(1))


class Classifier(nn.Module):
    """Of texts: ids and a mask (batch, length)."""

    def __init__(self, encoder=None):
        super().__init__()
        self.embed, self.encoder, self.head = nn.Embedding(50, 16), encoder, nn.Linear(16, 3)

    def forward(self, ids, mask):
        hidden = self.embed(ids)
        if self.encoder is not None:
            hidden = self.encoder(hidden, src_key_padding_mask=mask == 0)
        weights = mask.unsqueeze(-1).float()
        return self.head((hidden * weights).sum(1) / weights.sum(1))


class Tagger(nn.Module):
    """Of words: ids (batch, length) and the lengths (batch)."""

    def __init__(self):
        super().__init__()
        self.embed, self.lstm = nn.Embedding(50, 16), nn.LSTM(16, 12, bidirectional=True, batch_first=True)
        self.head = nn.Linear(24, 5)

    def forward(self, ids, lengths):
        hidden, _ = self.lstm(self.embed(ids))
        valid = torch.arange(ids.shape[1])[None] < lengths[:, None]
        return self.head(hidden) * valid[..., None]


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1)
        self.up, self.out = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(16, 2, 1)

    def forward(self, image):
        wide = self.down(image).relu()
        return self.out(torch.cat([wide, self.up(self.deep(wide).relu())], 1)), wide.mean((1, 2, 3))


def assert_computes(model, module, feeds):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
    with torch.no_grad():
        expected = module.eval()(*feeds.values())
    for one, tensor in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
        np.testing.assert_allclose(one, tensor.numpy(), rtol=1e-4, atol=1e-5)


def shapes(values):
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def mask_of(ids, *lengths):
    return (torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]).long()


def attention():
    """Frozen: torch would run it as one operator of its own, which no ONNX graph has."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).requires_grad_(False)


@pytest.mark.parametrize(("by_name", "encoder"), [(False, attention), (True, lambda: None)], ids=["by position", "by name"])
def test_a_text_classifier_takes_ids_and_mask(by_name, encoder):
    module = Classifier(encoder()).requires_grad_(False)
    inputs = {"ids": IDS, "mask": mask_of(IDS, 7, 4)}
    axes = {name: {0: "batch", 1: "length"} for name in inputs}
    model = to_onnx(module, inputs if by_name else tuple(inputs.values()), dynamic_axes=axes)
    assert shapes(model.graph.input) == {"ids": ["batch", "length"], "mask": ["batch", "length"]}
    assert shapes(model.graph.output) == {"logits": ["batch", 3]}
    assert_computes(model, module, {"ids": MORE_IDS, "mask": mask_of(MORE_IDS, 11, 4, 1, 8)})


AXES = {"ids": {0: "batch", 1: "length"}, "lengths": {0: "batch"}}
SENTENCES = {"ids": MORE_IDS, "lengths": torch.tensor([11, 4, 1, 8])}


@pytest.fixture(scope="module")
def tagger():
    """Return a tagger and what was traced of it."""
    module = Tagger()
    to_onnx(nn.LSTM(12, 8, batch_first=True), torch.zeros(2, 7, 12))  # whatever was exported before, lengths stay dynamic
    return module, Tracing(module, (IDS, torch.tensor([7, 4])), dynamic_axes=AXES)


def test_an_lstm_tagger_takes_ids_and_lengths(tagger):
    module, tracing = tagger
    model = tracing.graph()
    assert shapes(model.graph.output) == {"logits": ["batch", "length", 5]}  # torch would write 7 for the length
    assert "lstm.weight_ih_l0" in {node.name for node in model.graph.node}
    assert_computes(model, module, SENTENCES)


class Fixed(nn.Module):
    def forward(self, image):
        return image.flatten(1) @ torch.ones(21, 2)


def test_an_axis_that_the_module_fixes_is_not_called_dynamic():
    with pytest.raises(GraphError, match=r"axis 2 \(length\) of input image is 7 in the graph: .* leave the axis out"):
        to_onnx(Fixed(), torch.randn(2, 3, 7), dynamic_axes={"image": {2: "length"}})


def test_weights_of_another_network_are_put_into_the_traced_graph(tagger):
    module, tracing = tagger
    other = Tagger()
    model = tracing.graph(other)
    assert_computes(model, other, SENTENCES)
    assert_computes(tracing.graph(), module, SENTENCES)  # the other's weights are not kept
    assert tracing.graph(copy.deepcopy(other)) == model
    with pytest.raises(GraphError, match=r"expected .* architecture that was traced, got a Classifier of another one"):
        tracing.graph(Classifier())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_module_that_cannot_be_copied_is_named():
    module = nn.Sequential(nn.utils.weight_norm(nn.Conv1d(4, 4, 3)))
    with pytest.raises(GraphError, match=r"Sequential cannot be exported: layer 0: its weight is computed from other"):
        to_onnx(module, torch.randn(2, 4, 9))


def test_only_what_a_module_computes_counts_as_its_architecture():
    class Own(nn.Conv2d):
        pass

    tracing = Tracing(nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.ReLU()), torch.randn(2, 3, 8, 8))
    assert tracing.fits(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()))
    assert tracing.fits(nn.Sequential(Own(3, 4, 3, padding=(1, 1)), nn.ReLU()))
    later = nn.Conv2d(3, 4, 3)
    later.padding = (1, 1)  # as in networks that are changed to dilated convolutions
    assert tracing.fits(nn.Sequential(later, nn.ReLU()))
    for other in (nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3, padding=2, dilation=2), nn.Conv2d(3, 4, 3, padding=1, bias=False)):
        assert not tracing.fits(nn.Sequential(other, nn.ReLU()))
    assert not tracing.fits(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GELU()))
    assert not tracing.fits(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.ReLU()))


def test_a_u_net_has_names_of_its_own_and_images_of_any_size():
    module = UNet()
    axes = {"picture": {0: "batch", 2: "height", 3: "width"}}
    model = to_onnx(
        module, torch.randn(2, 3, 16, 16), input_names=["picture"], output_names=["mask", "mean"], dynamic_axes=axes
    )
    assert shapes(model.graph.input) == {"picture": ["batch", 3, "height", "width"]}
    assert shapes(model.graph.output) == {"mask": ["batch", 2, "height", "width"], "mean": ["batch"]}
    assert_computes(model, module, {"picture": torch.randn(3, 3, 24, 32)})


@pytest.mark.parametrize(
    ("example", "options", "message"),
    [
        ((IDS,), {}, r"Classifier.forward cannot take 1 inputs: missing a required argument: 'mask'"),
        ((IDS, 3), {}, "input mask: expected a tensor, got int"),
        ({"ids": IDS}, {}, "Classifier cannot be exported: missing a required argument: 'mask'"),
        ((IDS, IDS), {"input_names": ["a"]}, "input_names: expected 2 names, one per input, got 1"),
        ((IDS, IDS), {"dynamic_axes": {"image": {0: "batch"}}}, "image is not an input; the inputs are ids, mask"),
        ((IDS, IDS), {"dynamic_axes": {"ids": {2: "batch"}}}, r"input ids of shape \[2, 7\] has no axis 2"),
        ((IDS[:1], IDS[:1]), {}, r"axis 0 \(batch\) of input ids has size 1 in the example"),
        ((IDS, IDS[:, :3]), {}, "Classifier cannot be exported: "),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(example, options, message, capfd):
    with pytest.raises(GraphError, match=message) as error:
        to_onnx(Classifier(), example, **options)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_onnx_runtime_can_quantize_the_graph_of_a_classifier(tmp_path, caplog):
    """It transposes the weight of a Gemm; a second shape of that weight would contradict the new one."""
    path, small = tmp_path / "model.onnx", tmp_path / "small.onnx"
    onnx.save(to_onnx(nn.Sequential(nn.Linear(8, 5)), torch.zeros(2, 8)), path)
    quantize_dynamic(path, small)
    assert {"DynamicQuantizeLinear", "MatMulInteger"} <= {node.op_type for node in onnx.load(small).graph.node}
