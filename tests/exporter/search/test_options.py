"""What a layer could become: ranks on the grid, below the dense MACs, with the cost that the rewritten graph really has."""

import math

import numpy as np
import onnx
import pytest
from cases import MATRIX_ONLY, random_cores
from conftest import make_model
from onnx import helper
from recurrent_graphs import GATES, recurrent_model

from tensorrail_exporter import FORMATS, LayerPlan, LayerSpec, Plan, PlanError, factorize
from tensorrail_exporter.rewrite.survey import survey
from tensorrail_exporter.search.options import AUTO, option_for, options_of
from tensorrail_runtime.graphs.cost import cost

CAP = 0.95
A_FORM = 12  # options of one format and its modes at most


def conv_model(rng, shape=(64, 32, 3, 3), size=8, **attributes):
    node = helper.make_node("Conv", ["x", "w"], ["y"], "n", **attributes)
    weights = {"w": rng.standard_normal(shape).astype(np.float32)}
    nd, inputs = len(shape) - 2, shape[1] * attributes.get("group", 1)
    return make_model([node], weights, {"x": ["n", inputs, *[size] * nd]}, {"y": ["n", shape[0], *[None] * nd]})


def linear_model(rng, op="Gemm", tokens=()):
    node = helper.make_node(op, ["x", "w"], ["y"], "n")
    weights = {"w": rng.standard_normal((96, 64)).astype(np.float32)}
    return make_model([node], weights, {"x": ["n", *tokens, 96]}, {"y": ["n", *tokens, 64]})


MODELS = {
    "conv": lambda rng: conv_model(rng, pads=[1] * 4),
    "conv stride 2": lambda rng: conv_model(rng, pads=[1] * 4, strides=[2, 2]),
    "conv 1d": lambda rng: conv_model(rng, (64, 64, 5), auto_pad="SAME_LOWER"),
    "conv in groups": lambda rng: conv_model(rng, (256, 64, 3, 3), pads=[1] * 4, group=4),
    "conv 1×1": lambda rng: conv_model(rng, (64, 48, 1, 1)),
    "gemm": linear_model,
    "matmul": lambda rng: linear_model(rng, "MatMul", (7,)),
    "lstm": lambda rng: recurrent_model("LSTM", "bidirectional", 16, 96, rng, bias=False),
    "gru": lambda rng: recurrent_model("GRU", "forward", 32, 96, rng, bias=False),
    "lstm's recurrence": lambda rng: recurrent_model("LSTM", "bidirectional", 32, 24, rng, bias=False),
    "gru's recurrence": lambda rng: recurrent_model("GRU", "forward", 48, 24, rng, bias=False),
    "gru's recurrence, reset after": lambda rng: recurrent_model(
        "GRU", "reverse", 48, 24, rng, bias=False, linear_before_reset=1
    ),
}
STEPS = 7  # of an LSTM or GRU


def surveyed(name, model):
    """Return the layer of a model that is meant, and the shapes of its inputs."""
    if "lstm" not in name and "gru" not in name:
        return survey(model)[0], None
    loop = "recurrence" in name
    shapes = {"x": (STEPS, 1, 24 if loop else 96)}
    return survey(model, 1, shapes)[int(loop)], shapes


def kinds(name):
    convolution = name.startswith("conv")
    return [form for form in FORMATS if not (convolution and form in MATRIX_ONLY)]


def on_grid(option, grid):
    """Return whether the channels that run between the cores are whole blocks; of a train of pairs, or all that exist."""
    if option.format == "tr":
        return all(a * b % grid == 0 for a, b in zip(option.ranks[:-1], option.ranks[1:], strict=True))
    inner = option.ranks[1:-1] if option.format in ("tt", "ttm") else option.ranks
    if option.format == "ttm":
        d = len(option.modes) // 2
        pairs = [option.modes[k] * option.modes[d + k] for k in range(d)]
        most = [min(math.prod(pairs[: k + 1]), math.prod(pairs[k + 1 :])) for k in range(d - 1)]
        return all(rank % grid == 0 or rank == top for rank, top in zip(inner, most, strict=True))
    return all(rank % grid == 0 for rank in inner)


@pytest.mark.parametrize("grid", [8, 16])
@pytest.mark.parametrize("name", MODELS)
def test_ranks_are_on_the_grid_and_macs_below_the_cap(name, grid, rng):
    layer, _ = surveyed(name, MODELS[name](rng))
    for form in kinds(name):
        options = options_of(layer, [form], grid)
        assert all(option.format == form for option in options)
        assert all(on_grid(option, grid) for option in options), form
        assert all(0 < option.macs <= CAP * layer.macs for option in options)
        assert [option.macs for option in options] == sorted(option.macs for option in options)
        # svd shares out the kernel's axes in as many ways as there are places between them
        ways = len(layer.spec.kernel) + 1 if form == "svd" and math.prod(layer.spec.kernel) > 1 else 1
        assert len(options) <= ways * A_FORM
        assert len({option.steps for option in options}) == len(options)


@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("name", MODELS)
def test_macs_and_params_are_those_of_the_rewritten_graph(name, block, rng, tmp_path):
    model = MODELS[name](rng)
    layer, shapes = surveyed(name, model)
    kept = 0
    if layer.spec.op == "recurrent":  # the other weight stays
        kept = layer.spec.shape[0] * layer.inputs[1 if layer.spec.state_products else 2][-1]
    for form in kinds(name):
        options = options_of(layer, [form], 16, most=50.0 if form == "ttm" else 3.0)  # paired modes never cost less here
        assert options, form
        for option in options[:: max(1, len(options) // 3)]:
            plan = option.plan(layer.name)
            padded = option if block == 1 else option_for(plan, layer.spec, block)
            cores = {layer.name: random_cores(plan, layer.spec.shape, rng, groups=layer.spec.groups)}
            onnx.save(factorize(model, Plan(layers=(plan,)), cores, block=block).model, tmp_path / "factored.onnx")
            real = cost(tmp_path / "factored.onnx", 1, shapes)
            assert padded.macs == real.macs - STEPS * kept, padded
            assert padded.params == real.params - kept, padded


def test_groups_of_few_channels_have_smaller_ranks_than_the_grid(rng):
    (layer,) = survey(conv_model(rng, (64, 8, 3, 3), pads=[1] * 4, group=8))
    options = options_of(layer, ["auto"], 16)
    assert {option.format for option in options} == set(AUTO)
    assert {rank for option in options for rank in option.ranks if option.format == "svd"} >= {2, 4, 6}
    assert all(on_grid(option, 2) and option.macs <= CAP * layer.macs for option in options)


def test_a_planned_layer_is_the_option_that_it_came_from(rng):
    (layer,) = survey(conv_model(rng, pads=[1] * 4))
    for option in options_of(layer, ["auto"], 16):
        assert option_for(option.plan("w"), layer.spec) == option


def test_padded_ranks_cost_what_the_next_block_costs(rng):
    (layer,) = survey(conv_model(rng, pads=[1] * 4))
    odd = LayerPlan(name="w", format="tt", modes=(64, 9, 32), ranks=(1, 13, 9, 1))
    whole = odd.model_copy(update={"ranks": (1, 16, 16, 1)})
    padded, plain = option_for(odd, layer.spec, 16), option_for(whole, layer.spec)
    assert (padded.macs, padded.params, padded.steps) == (plain.macs, plain.params, plain.steps)
    assert (padded.ranks, padded.block) == ((1, 13, 9, 1), 16)


def test_auto_is_the_matrix_format_where_there_is_no_kernel_to_slide(rng):
    for model in (linear_model(rng), conv_model(rng, (64, 48, 1, 1)), recurrent_model("LSTM", "forward", 16, 96, rng)):
        for layer in survey(model, 1, {"x": (7, 1, 96)} if model.graph.node[0].op_type in GATES else None):
            assert {option.format for option in options_of(layer, ["auto"], 8)} == {"svd"}
    (layer,) = survey(conv_model(rng, pads=[1] * 4))
    assert {option.format for option in options_of(layer, ["auto"], 8)} == set(AUTO)


def test_equal_steps_of_two_formats_are_one_option(rng):
    (layer,) = survey(conv_model(rng, pads=[1] * 4))
    one, both = options_of(layer, ["tt"], 8), options_of(layer, ["tt", "tucker"], 8)
    assert one == both  # a Tucker-2 convolution runs the very steps of a train with one mode a side


def test_svd_shares_out_the_kernel_in_every_way(rng):
    (layer,) = survey(conv_model(rng, (64, 64, 3, 3), pads=[1] * 4))
    modes = {option.modes for option in options_of(layer, ["svd"], 8)}
    assert modes == {(64 * 9, 64), (64 * 3, 64 * 3), (64, 64 * 9)}


def test_an_unknown_format_is_named_with_those_that_are(rng):
    (layer,) = survey(linear_model(rng))
    with pytest.raises(PlanError, match="unknown format 'pca': expected one of cp, svd, tr, tt, ttm, tucker"):
        options_of(layer, ["auto", "pca"], 8)


@pytest.mark.parametrize("form", ["auto", *sorted(FORMATS)])
def test_a_tiny_layer_has_no_options(form, rng):
    for model in (conv_model(rng, (4, 3, 3, 3)), conv_model(rng, (8, 4, 1, 1))):
        (layer,) = survey(model)
        assert options_of(layer, [form], 16) == ()


def test_many_ranks_are_spread_over_few_options(rng):
    spec = LayerSpec("conv", (512, 512, 3, 3), (1, 1), (1,) * 4, (1, 1), size=(7, 7))
    (layer,) = survey(conv_model(rng, pads=[1] * 4))
    large = type("Large", (), {"spec": spec})()
    assert layer.spec != spec
    options = options_of(large, ["auto"], 8)
    assert len(options) <= (1 + 3) * A_FORM
    tt = [option for option in options if option.format == "tt"]
    steps = np.diff(np.log([option.macs for option in tt]))
    assert steps.min() > 0
    assert steps.max() < 4 * steps.mean()  # no hole in the middle


@pytest.mark.parametrize(("taps", "most"), [(9, 0.95), (31, 0.95), (32, 1.25), (512, 1.25)])
def test_a_long_kernel_may_have_more_macs_than_the_dense_one(taps, most, rng):
    """Dense kernels are slow for many taps: at full rank, CREPE's second layer takes half the time (results/real-models.md)."""
    (layer,) = survey(conv_model(rng, (16, 128, taps, 1), 16, pads=[taps // 2, 0, taps // 2, 0]))
    dense = layer.macs
    shares = [option.macs / dense for option in options_of(layer, ["auto"], 16)]
    assert max(shares) <= most
    assert (max(shares) > 1.0) is (most > 1.0)


def pair_model(rng, channels=64):
    weights = {
        "first": rng.standard_normal((channels, 16, 3, 3)).astype(np.float32),
        "second": rng.standard_normal((32, channels, 1, 1)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["a"], "a", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], "b"),
        helper.make_node("Conv", ["b", "second"], ["y"], "y"),
    ]
    return make_model(nodes, weights, {"x": ["n", 16, 8, 8]}, {"y": ["n", 32, 8, 8]})


@pytest.mark.parametrize(
    ("channels", "grid", "counts"), [(64, 16, [32, 48]), (64, 8, [32, 40, 48, 56]), (24, 16, [16]), (8, 8, [])]
)
def test_narrower_layers_keep_half_of_their_channels_on_the_grid(channels, grid, counts, rng):
    first, second = survey(pair_model(rng, channels))
    options = options_of(second, ["width"], grid)
    assert [option.ranks for option in options] == [(count,) for count in counts]
    assert [option.macs for option in options] == [64 * count * 32 for count in counts]
    assert all(option.steps == f"{n} of {channels} channels: conv {n}→32" for option, n in zip(options, counts, strict=True))
    assert options_of(first, ["width"], grid) == ()  # the graph's input has all its channels
    for option in options:
        assert option_for(option.plan("second"), second.spec) == option


def test_many_channels_are_spread_over_a_few_options(rng):
    (_, second) = survey(pair_model(rng, 1024))
    counts = [option.ranks[0] for option in options_of(second, ["width"], 8)]
    assert len(counts) == 12
    assert (counts[0], counts[-1]) == (512, 968)  # 0.95 of them at most
