"""The published plans: whole networks at the published ranks cost what the ranks say, to the last parameter and MAC."""

import numpy as np
import pytest
import torch
from torch import nn

from tensorrail_exporter import PlanError, factorize
from tensorrail_exporter.graphs.io import save_model
from tensorrail_runtime import cost
from tensorrail_trainer import to_onnx
from tensorrail_trainer.layers.dense import planned_layers
from tensorrail_trainer.networks.registry import MODELS
from tensorrail_trainer.planning.published import PUBLISHED, published_plan
from tensorrail_trainer.recipes.recipe import PublishedRule, _plannable

DENSE_MACS = {"resnet18": 1_814_073_344, "resnet50": 4_089_184_256}


@pytest.fixture(scope="module")
def networks():
    """Every network, and of its layers the weight's shape and the positions that it reads and writes at 224²."""
    found = {}
    for name in DENSE_MACS:
        model = MODELS[name]().eval()
        layers: dict[str, tuple[torch.Size, int, int]] = {}

        def note(layer, shape, read, written, layers=layers):
            layers[layer] = (shape, int(np.prod(read[2:])), int(np.prod(written[2:])))

        for layer, module in model.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(
                    lambda m, x, y, layer=layer, note=note: note(layer, m.weight.shape, x[0].shape, y.shape)
                )
        with torch.no_grad():
            model(torch.zeros(1, 3, 224, 224))
        found[name] = (MODELS[name]().eval(), layers)
    return found


def costs(table, layers):
    """Return the weights and MACs of a network factored by a table of three modes, by formula: what stays, and what comes."""
    weights = macs = 0
    for name, (shape, read, written) in layers.items():
        if name not in table:
            weights += shape.numel()
            macs += shape.numel() * written
            continue
        (outputs, taps, inputs), (left, right) = table[name]
        assert outputs * taps * inputs == shape.numel()
        middle = left * taps * right
        if taps == 1:  # two layers, the one core between them joined to either
            left, right, middle = min(left, right), min(left, right), 0
        weights += outputs * left + middle + right * inputs
        macs += (outputs * left + middle) * written + right * inputs * read
    return weights, macs


@pytest.mark.parametrize(
    ("name", "weights", "macs", "ratios"),
    [
        ("resnet18", 4_219_881, 787_644_276, (2.77, 2.30)),
        ("resnet50", 8_555_500, 2_118_155_728, (2.98, 1.93)),
    ],
)
def test_whole_networks_in_three_modes(name, weights, macs, ratios, networks):
    _, layers = networks[name]
    assert costs(PUBLISHED[name, 3], layers) == (weights, macs)
    dense_weights, dense_macs = costs({}, layers)
    assert dense_macs == DENSE_MACS[name]
    assert (round(dense_weights / weights, 2), round(dense_macs / macs, 2)) == ratios


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "weights", "macs"),
    [("resnet18", 4_219_881, 787_644_276), ("resnet50", 8_555_500, 2_118_155_728)],
)
def test_graphs_of_whole_networks_cost_as_published(name, weights, macs, networks, tmp_path):
    model, layers = networks[name]
    dense_weights, _ = costs({}, layers)
    plan = published_plan(name)
    shapes = {layer: dense.spec.shape for layer, dense in planned_layers(model, plan).items()}
    cores = {
        layer.name: [np.zeros(core, np.float32) for core in layer.core_shapes(shapes[layer.name])] for layer in plan.layers
    }
    graph = to_onnx(model, torch.zeros(2, 3, 224, 224))
    found = {}
    for label, one in {"dense": graph, "factored": factorize(graph, plan, cores).model}.items():
        save_model(one, tmp_path / f"{label}.onnx")
        found[label] = cost(tmp_path / f"{label}.onnx")
    assert (found["dense"].macs, found["factored"].macs) == (DENSE_MACS[name], macs)
    assert [sum(layer.params for layer in one.layers) for one in found.values()] == [dense_weights, weights]
    assert found["dense"].params - found["factored"].params == dense_weights - weights  # nothing else comes or goes


@pytest.mark.parametrize(
    ("name", "weights", "macs", "whole", "kernels"),
    [
        ("resnet18", 4_219_881, 787_644_276, (2.77, 2.30), (3.12, 2.58)),  # its table has 3×3 convolutions alone
        ("resnet50", 15_739_884, 2_946_310_608, (1.62, 1.39), (7.28, 2.62)),
    ],
)
def test_whole_networks_with_3x3_convolutions_alone(name, weights, macs, whole, kernels, networks):
    """`kernels`: how many times fewer weights and MACs the 3×3 convolutions have, all else left out."""
    model, layers = networks[name]
    plan = _plannable(model, PublishedRule(published=name, only_3x3=True))
    names = [layer for layer, (shape, _, _) in layers.items() if shape[2:] == (3, 3)]
    assert {layer.name for layer in plan} == set(names)
    table = {layer: PUBLISHED[name, 3][layer] for layer in names}
    assert costs(table, layers) == (weights, macs)
    stored = sum(layer.params(layers[layer.name][0]) for layer in plan)
    assert stored + sum(shape.numel() for layer, (shape, _, _) in layers.items() if layer not in table) == weights
    for among, ratios in ((layers, whole), ({layer: layers[layer] for layer in names}, kernels)):
        pairs = zip(costs({}, among), costs(table, among), strict=True)
        assert tuple(round(dense / factored, 2) for dense, factored in pairs) == ratios


@pytest.mark.parametrize(
    ("name", "modes", "ratio"), [("resnet18", 3, 2.77), ("resnet18", 5, 2.77), ("resnet50", 3, 2.50), ("resnet50", 5, 2.52)]
)
def test_weights_at_the_ranks_as_published(name, modes, ratio, networks):
    layers = networks[name][1]
    dense = sum(shape.numel() for shape, _, _ in layers.values())
    factored = dense
    for layer, (sizes, ranks) in PUBLISHED[name, modes].items():
        ends = (1, *ranks, 1)
        factored += sum(ends[k] * size * ends[k + 1] for k, size in enumerate(sizes)) - layers[layer][0].numel()
    assert round(dense / factored, 2) == ratio


@pytest.mark.parametrize(("name", "modes"), [key for key in PUBLISHED if key[0] in DENSE_MACS])
def test_plans_fit_their_networks(name, modes, networks):
    model, layers = networks[name]
    plan = published_plan(name, modes)
    planned_layers(model, plan)  # checks modes and ranks against every weight
    kernels = {layer for layer, (shape, _, _) in layers.items() if shape[2:] == (3, 3)}
    assert kernels <= {layer.name for layer in plan.layers}
    assert all(len(layer.modes) == (modes if layer.name in kernels else 3) for layer in plan.layers)
    assert not {"conv1", "fc"} & {layer.name for layer in plan.layers}


def test_a_network_without_published_ranks_is_refused():
    with pytest.raises(PlanError, match="no published ranks for 'vit_tiny' in 3 modes; expected one of resnet18 in 3 modes"):
        published_plan("vit_tiny")


@pytest.mark.parametrize(
    ("name", "modes", "weights", "cores", "ratios"),
    [("resnet32", 5, 461_872, 163_310, (2.82, 2.81)), ("resnet56", 3, 848_944, 270_120, (3.14, 3.13))],
)
def test_networks_for_small_images(name, modes, weights, cores, ratios):
    """`ratios`: of the 3×3 layers alone, and of all weights; classifier, stem and batch-norm stay."""
    model, plan = MODELS[name](), published_plan(name, modes)
    layers = planned_layers(model, plan)
    kernels = sum(dense.parameters[0].numel() for dense in layers.values())
    assert sum(p.numel() for p in model.parameters() if p.dim() > 1) == weights
    assert sum(layer.params(layers[layer.name].spec.shape) for layer in plan.layers) == cores
    assert (round(kernels / cores, 2), round(weights / (weights - kernels + cores), 2)) == ratios


def test_a_published_stage_is_larger_than_dense_and_is_kept_so():
    layer = published_plan("resnet32", 5).layers[0]
    assert layer.params((16, 16, 3, 3)) == 2816 > 16 * 16 * 9
