"""The networks that recipes can name: their published sizes and names, and their graphs."""

import importlib
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from cases import relative
from torch import nn

from tensorrail_exporter import GraphError, LayerPlan, Plan, decompose_graph, factorize, reconstruct
from tensorrail_exporter.graphs.io import import_graph, save_model
from tensorrail_exporter.rewrite.sites import NamedLayers
from tensorrail_runtime import cost
from tensorrail_trainer import to_onnx
from tensorrail_trainer.layers.dense import dense_layers
from tensorrail_trainer.networks.registry import MODELS
from tensorrail_trainer.networks.resnets import Bottleneck, ResNet

# Arguments of a small instance, and the shape of one sample. ResNet-50 has one block a stage instead of 3, 4, 6 and 3.
SMALL = {
    "lstm": ({"inputs": 30, "hidden": 8, "classes": 3}, (6, 30)),
    "mobilenet_v2": ({"width": 0.5, "blocks": 1, "classes": 5}, (3, 64, 64)),
    "resnet18": ({"width": 8, "classes": 5}, (3, 64, 64)),
    "resnet50": ({"width": 8, "classes": 5}, (3, 64, 64)),
    "vit_tiny": ({"size": 32, "depth": 2, "dim": 48, "classes": 5}, (3, 32, 32)),
}
# ResNet-18 is exported in test_published.py and test_onnx_module.py anyway; the others take long.
SLOW = {"mobilenet_v2", "resnet18", "resnet50", "vit_tiny"}
QUICK = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in SMALL]


@pytest.fixture(scope="module")
def networks():
    """The module for benchmarks that draws weights and writes files."""
    folder = str(Path(__file__).parents[3] / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module("networks")
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def exported(networks):
    """Answer by name with a network, small, with random weights and statistics, and its graph: made when first asked for."""

    @cache
    def make(name):
        args, sample = SMALL[name]
        torch.manual_seed(0)
        made = ResNet(Bottleneck, (1, 1, 1, 1), **args) if name == "resnet50" else MODELS[name](**args)
        model = networks.randomize(made, sample)
        return model, to_onnx(model, torch.randn(2, *sample))

    return make


@pytest.mark.parametrize(
    ("name", "params", "entries"),
    [
        ("resnet18", 11_689_512, 122),
        ("resnet50", 25_557_032, 320),
        ("mobilenet_v2", 3_504_872, 314),
        ("vit_tiny", 5_717_416, 152),
    ],
)
def test_parameters_and_state_are_as_published(name, params, entries):
    with torch.device("meta"):
        model = MODELS[name]()
    assert sum(parameter.numel() for parameter in model.parameters()) == params
    assert len(model.state_dict()) == entries


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        (
            "resnet18",
            {
                "conv1.weight": (64, 3, 7, 7),
                "layer2.0.conv1.weight": (128, 64, 3, 3),
                "layer2.0.downsample.0.weight": (128, 64, 1, 1),
                "layer2.0.downsample.1.running_var": (128,),
                "layer4.1.bn2.bias": (512,),
                "fc.weight": (1000, 512),
            },
        ),
        (
            "resnet50",
            {
                "layer1.0.conv3.weight": (256, 64, 1, 1),
                "layer1.0.downsample.0.weight": (256, 64, 1, 1),
                "layer4.2.conv2.weight": (512, 512, 3, 3),
                "layer3.5.bn3.running_mean": (1024,),
                "fc.bias": (1000,),
            },
        ),
        (
            "mobilenet_v2",
            {
                "features.0.0.weight": (32, 3, 3, 3),
                "features.1.conv.0.0.weight": (32, 1, 3, 3),
                "features.1.conv.1.weight": (16, 32, 1, 1),
                "features.1.conv.2.running_var": (16,),
                "features.2.conv.0.0.weight": (96, 16, 1, 1),
                "features.2.conv.1.1.weight": (96,),
                "features.17.conv.2.weight": (320, 960, 1, 1),
                "features.17.conv.3.bias": (320,),
                "features.18.0.weight": (1280, 320, 1, 1),
                "classifier.1.weight": (1000, 1280),
            },
        ),
        (
            "vit_tiny",
            {
                "cls_token": (1, 1, 192),
                "pos_embed": (1, 197, 192),
                "patch_embed.proj.weight": (192, 3, 16, 16),
                "blocks.0.norm1.weight": (192,),
                "blocks.11.attn.qkv.weight": (576, 192),
                "blocks.11.attn.proj.bias": (192,),
                "blocks.5.mlp.fc1.weight": (768, 192),
                "blocks.5.mlp.fc2.bias": (192,),
                "norm.bias": (192,),
                "head.weight": (1000, 192),
            },
        ),
    ],
)
def test_states_carry_the_names_under_which_they_are_published(name, shapes):
    with torch.device("meta"):
        state = MODELS[name]().state_dict()
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


@pytest.mark.parametrize("name", QUICK)
def test_the_graph_computes_what_the_module_does_at_any_batch(name, exported):
    model, graph = exported(name)
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in (1, 8):
        x = torch.randn(batch, *SMALL[name][1], generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = model(x).numpy()
        assert 1e-2 < np.abs(expected).max() < 1e2  # so that a relative error says something
        assert relative(session.run(None, {"image": x.numpy()})[0], expected) < 1e-5


@pytest.mark.parametrize("name", QUICK)
def test_every_layer_is_found_under_the_modules_own_name(name, exported):
    model, graph = exported(name)
    depthwise = {layer for layer, module in model.named_modules() if isinstance(module, nn.Conv2d) and module.groups > 1}
    assert set(NamedLayers(import_graph(graph)).rewritable()) == set(dense_layers(model, recurrent=True))
    assert len(depthwise) == (7 if name == "mobilenet_v2" else 0)


@pytest.mark.parametrize("name", QUICK)
def test_every_node_is_known_to_the_cost_model(name, exported, tmp_path):
    save_model(exported(name)[1], tmp_path / "m.onnx")
    assert cost(tmp_path / "m.onnx", batch=2).uncounted == ()


def test_attention_is_plain_products(exported):
    graph = exported("vit_tiny")[1].graph
    counts = {op: sum(node.op_type == op for node in graph.node) for op in ("MatMul", "Softmax", "LayerNormalization", "Gemm")}
    assert counts == {"MatMul": 2 * 6, "Softmax": 2, "LayerNormalization": 5, "Gemm": 1}
    assert {node.op_type for node in graph.node}.isdisjoint({"Einsum", "Attention"})
    stored = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    assert stored["blocks.1.attn.qkv.weight"] == (48, 144)  # (I, O), as a MatMul takes it


def test_a_transformers_layers_factor(exported):
    model, graph = exported("vit_tiny")
    names = [f"blocks.{k}.{leaf}" for k in range(2) for leaf in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    shapes = [tuple(model.get_submodule(name).weight.shape) for name in names]
    plan = Plan(layers=tuple(LayerPlan(name=n, format="svd", modes=s, ranks=(16,)) for n, s in zip(names, shapes, strict=True)))
    cores = decompose_graph(graph, plan)
    x = {"image": np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)}
    factored, dense = (
        ort.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, x)[0]
        for one in (factorize(graph, plan, cores).model, reconstruct(graph, plan, cores))
    )
    assert relative(factored, dense) < 1e-5


def test_batch_norm_has_statistics_of_its_own(networks):
    args, sample = SMALL["mobilenet_v2"]
    for module in networks.randomize(MODELS["mobilenet_v2"](**args), sample).modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, fresh in ((module.running_mean, 0), (module.running_var, 1), (module.weight, 1), (module.bias, 0)):
                assert not torch.isclose(values, torch.full_like(values, fresh)).all()


def test_the_seed_alone_decides_the_weights(networks, monkeypatch, tmp_path):
    monkeypatch.setitem(networks.NETWORKS, "lstm", SMALL["lstm"])
    first, second, other = (networks.network("lstm", seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)
    path = networks.write("lstm", tmp_path / "new")
    assert path == tmp_path / "new" / "lstm.onnx"
    assert path.is_file()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: MODELS["resnet18"](stem="tiny"), r"unknown stem 'tiny'; expected one of large, small"),
        (lambda: MODELS["vit_tiny"](size=100), r"expected size to be a multiple of patch=16, got size=100"),
        (lambda: MODELS["vit_tiny"](heads=5), r"expected dim to be a multiple of heads=5, got dim=192"),
    ],
)
def test_sizes_that_cannot_be_are_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


def test_an_unknown_network_is_refused(networks):
    with pytest.raises(ValueError, match="unknown network 'vgg': expected one of resnet18, resnet50"):
        networks.network("vgg")


def test_a_depthwise_convolution_says_why_it_stays_dense():
    model = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.ReLU())
    graph = to_onnx(model, torch.randn(2, 16, 8, 8))
    layer = LayerPlan(name="0", format="svd", modes=(48, 3), ranks=(2,))
    with pytest.raises(GraphError, match=r"depthwise convolution \(group=16\)"):
        decompose_graph(graph, Plan(layers=(layer,)))


def test_the_baseline_says_what_it_needs(networks, monkeypatch, tmp_path):
    baseline = importlib.import_module("tensorly_torch")
    monkeypatch.setitem(sys.modules, "tltorch", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'tensorly-torch>=0\.5'"):
        baseline.write("tucker", tmp_path)
    with pytest.raises(ValueError, match="unknown factorization 'cp': expected one of tucker, tt"):
        baseline.write("cp", tmp_path)
