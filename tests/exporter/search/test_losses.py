"""What options cost in accuracy: from weights, from inputs, from labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cases import listener
from conftest import make_model
from onnx import TensorProto, helper

from tensorrail_exporter import GraphError, Plan, PlanError
from tensorrail_exporter.calibrate.inputs import Calibration
from tensorrail_exporter.calibrate.split import Split
from tensorrail_exporter.rewrite.resolve import resolve
from tensorrail_exporter.rewrite.survey import survey
from tensorrail_exporter.search.approximations import Approximations, GroupedApproximations, InputMoments
from tensorrail_exporter.search.latency_table import LatencyTable
from tensorrail_exporter.search.losses import SAMPLES, Probe, approximations_of, measured_losses, samples_for, weight_losses
from tensorrail_exporter.search.options import options_of
from tensorrail_exporter.search.planner import plan_network
from tensorrail_exporter.search.targets import Search
from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.progress import silent
from tensorrail_runtime.scratch import scratch
from tensorrail_runtime.sessions.session import Session


@pytest.fixture
def network(rng):
    """Two 3×3 convolutions 32→32 and a Gemm 32→10."""
    weights = {
        "a.weight": rng.standard_normal((32, 32, 3, 3)).astype(np.float32) / 17,
        "b.weight": rng.standard_normal((32, 32, 3, 3)).astype(np.float32) / 17,
        "fc.weight": rng.standard_normal((10, 32)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "a.weight"], ["a"], "a", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["ra"], "ra"),
        helper.make_node("Conv", ["ra", "b.weight"], ["b"], "b", pads=[1] * 4),
        helper.make_node("Relu", ["b"], ["rb"], "rb"),
        helper.make_node("GlobalAveragePool", ["rb"], ["p"], "p"),
        helper.make_node("Flatten", ["p"], ["f"], "f"),
        helper.make_node("Gemm", ["f", "fc.weight"], ["y"], "fc", transB=1),
    ]
    return make_model(nodes, weights, {"x": ["batch", 32, 8, 8]}, {"y": ["batch", 10]})


def wanted(model):
    return {layer: options_of(layer, ["auto"], 8) for layer in survey(model) if layer.spec.op == "conv"}


def losses_of(model, options, split=None, metric=None, progress=silent):
    """The loss of every option of every layer: by the weights, or by inputs."""
    plans = [listed[0].plan(layer.name) for layer, listed in options.items() if listed]
    resolved = resolve(model, Plan(layers=tuple(plans)))
    approximations = approximations_of(resolved, options, split, Session())
    if split is None:
        return weight_losses(options, approximations, progress)
    with scratch() as folder:
        probe = Probe(resolved, approximations, split.chosen.first(SAMPLES), Session(), Path(folder), metric)
        return measured_losses(options, probe, progress)


def whole(calibration):
    """All inputs for each purpose."""
    return Split(calibration, calibration, None)


def test_shares_are_exact_for_two_factors_and_a_bound_for_a_train(network):
    for layer, options in wanted(network).items():
        weight = np.random.default_rng(1).standard_normal(layer.spec.shape).astype(np.float32)
        for option, share in zip(options, map(Approximations(weight).share, options), strict=True):
            plan = option.plan(layer.name)
            cut = plan.reconstruct(plan.decompose(weight), weight.shape)
            real = float(np.square(weight - cut).sum() / np.square(weight).sum())
            if option.format == "svd":
                assert share == pytest.approx(real, rel=1e-3, abs=1e-6)
            else:
                assert real <= share * (1 + 1e-3)
                assert share <= 2 * real + 1e-6  # each of the two tails is at most the error


def test_shares_of_convolutions_in_groups_are_exact(rng):
    node = helper.make_node("Conv", ["x", "w"], ["y"], "n", group=4, pads=[1] * 4)
    weight = rng.standard_normal((64, 16, 3, 3)).astype(np.float32)
    (layer,) = survey(make_model([node], {"w": weight}, {"x": ["n", 64, 8, 8]}, {"y": ["n", 64, 8, 8]}))
    approximations = GroupedApproximations(weight, 4)
    for option in options_of(layer, ["svd", "cp"], 8):
        plan = option.plan(layer.name)
        cut = plan.reconstruct(plan.decompose(weight, 4), weight.shape, 4)
        np.testing.assert_allclose(approximations.approximated(option), cut, atol=1e-5)
        real = float(np.square(weight - cut).sum() / np.square(weight).sum())
        assert approximations.share(option) == pytest.approx(real, rel=1e-4, abs=1e-6)
        assert not approximations.bias(cut).any()


def test_groups_are_approximated_in_the_metric_of_their_own_inputs(rng):
    """Of each group's inputs only two channels occur: an approximation of rank two loses nothing on them."""
    node = helper.make_node("Conv", ["x", "w"], ["y"], "n", group=2)
    weight = rng.standard_normal((16, 8, 1, 1)).astype(np.float32)
    (layer,) = survey(make_model([node], {"w": weight}, {"x": ["n", 16, 4, 4]}, {"y": ["n", 16, 4, 4]}))
    moments, occurring = [], []
    for group in range(2):
        scale = np.full(8, 1e-3)
        scale[[group, 5]] = 1.0
        moments.append(InputMoments(np.diag(scale), np.diag(1 / scale), rng.standard_normal((8, 1, 1))))
        occurring.append(scale == 1)
    approximations = GroupedApproximations(weight, 2, moments)
    option = next(option for option in options_of(layer, ["svd"], 1) if option.ranks == (2,))
    assert approximations.share(option) < 1e-4
    on_inputs = [weight[8 * g : 8 * g + 8, :, 0, 0] @ moments[g].root for g in range(2)]
    assert approximations.energy == pytest.approx(sum(float(np.square(part).sum()) for part in on_inputs), rel=1e-5)
    approximated = approximations.approximated(option)
    for group, channels in enumerate(occurring):
        rows = slice(8 * group, 8 * group + 8)
        np.testing.assert_allclose(approximated[rows, channels], weight[rows, channels], atol=1e-3)
        lost = (weight - approximated)[rows, :, 0, 0] @ moments[group].mean[:, 0, 0]
        np.testing.assert_allclose(approximations.bias(approximated)[rows], lost, rtol=1e-5, atol=1e-6)


def test_larger_ranks_cost_less(network):
    losses = losses_of(network, wanted(network))
    assert losses.source == "weights"
    for layer, options in wanted(network).items():
        by_rank = sorted(
            (o.ranks, loss) for o, loss in zip(options, losses.values[layer.name], strict=True) if o.format == "svd"
        )
        by_modes = [
            [loss for o, loss in zip(options, losses.values[layer.name], strict=True) if o.modes == m and o.format == "svd"]
            for m in {o.modes for o in options}
        ]
        assert by_rank
        assert all(one == sorted(one, reverse=True) for one in by_modes)


def test_input_channels_that_hardly_occur_cost_little(network):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((64, 32, 8, 8)).astype(np.float32)
    few = x.copy()
    few[:, 4:] *= 0.01  # four channels carry all
    options = wanted(network)
    first = next(iter(options))
    plain, narrow = (
        losses_of(network, options, whole(Calibration(tuple({"x": one[k : k + 16]} for k in range(0, 64, 16)))))
        for one in (x, few)
    )
    assert plain.source == narrow.source == "calibration"
    place = next(k for k, o in enumerate(options[first]) if o.format == "svd" and o.modes[1] == 32 and o.ranks == (8,))
    assert narrow.values[first.name][place] < 0.05 * plain.values[first.name][place]


def test_labels_measure_the_cross_entropy(network):
    rng = np.random.default_rng(4)
    feeds = tuple({"x": rng.standard_normal((16, 32, 8, 8)).astype(np.float32)} for _ in range(4))
    labels = rng.integers(0, 10, 64)
    found = losses_of(network, wanted(network), whole(Calibration(feeds, labels)))
    assert found.source == "labels"
    assert all(value >= 0 for values in found.values.values() for value in values)


def test_labels_that_do_not_apply_are_told_and_not_named_as_the_source(rng):
    """Scores of classes for each step of a sequence, and one class per sample."""
    model = make_model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "w")],
        {"w": rng.standard_normal((32, 32)).astype(np.float32)},
        {"x": ["n", 3, 32]},
        {"y": ["n", 3, 32]},
    )
    feeds, labels, notes = ({"x": rng.standard_normal((50, 3, 32)).astype(np.float32)},), np.arange(50) % 32, []
    options = {layer: options_of(layer, ("svd",), 8) for layer in survey(model)}
    found = losses_of(model, options, whole(Calibration(feeds, labels)), progress=listener(note=notes.append))
    assert found == losses_of(model, options, whole(Calibration(feeds)))
    assert found.source == "calibration"
    assert [note.partition(":")[0] for note in notes] == ["the labels of the calibration inputs are not used"]


def test_a_metric_shows_which_layers_its_score_depends_on(rng, tmp_path, monkeypatch):
    """Two layers side by side; the score reads the output of the second alone, by labels that are no classes."""
    weights = {name: rng.standard_normal((32, 32)).astype(np.float32) for name in ("v", "w")}
    nodes = [helper.make_node("MatMul", ["x", name], [f"{name}.out"], name) for name in weights]
    model = make_model(nodes, weights, {"x": ["n", 32]}, {"v.out": ["n", 32], "w.out": ["n", 32]})
    (tmp_path / "error_of_w.py").write_text("def score(outputs, labels):\n    return -abs(outputs['w.out'] - labels).mean(1)\n")
    monkeypatch.chdir(tmp_path)
    x = rng.standard_normal((50, 32)).astype(np.float32)
    calibration = Calibration(({"x": x[:25]}, {"x": x[25:]}), x @ weights["w"])
    options = {layer: options_of(layer, ("svd",), 8) for layer in survey(model)}
    by_variance = losses_of(model, options, whole(Calibration(calibration.feeds))).values
    found = losses_of(model, options, whole(calibration), metric="error_of_w:score")
    assert found.source == "labels"
    assert found.unit == "fall of the score error_of_w:score"
    assert max(found.values["v"]) < 1e-3
    assert max(found.values["w"]) > 0.1
    assert max(by_variance["v"]) > 0.1


@pytest.mark.parametrize(
    ("metric", "labels", "error", "reason"),
    [
        ("top1", None, PlanError, "got calibration inputs without labels"),
        ("top1", np.zeros(3, int), PlanError, "expected one label per sample, got 4 samples"),
        ("top9", np.zeros(4, int), ModelError, "unknown metric 'top9'"),
        ("top1", np.zeros(4), ModelError, "integer labels"),
        ("builtins:len", np.zeros(4, int), ModelError, r"metric builtins:len: failed on 4 samples \(TypeError"),
    ],
)
def test_a_metric_that_cannot_score_is_told_before_anything_is_timed(metric, labels, error, reason, network, rng, monkeypatch):
    monkeypatch.setattr(LatencyTable, "measure", lambda *_, **__: pytest.fail("something was timed"))
    feeds = ({"x": rng.standard_normal((4, 32, 8, 8)).astype(np.float32)},)
    with pytest.raises(error, match=reason):
        plan_network(network, {"flops": 1.5}, Search(metric=metric), calibration=Calibration(feeds, labels))


def test_a_metric_without_inputs_is_refused(network):
    with pytest.raises(PlanError, match="metric top1 is a loss that is measured, got no calibration inputs: give"):
        plan_network(network, {"flops": 1.5}, Search(metric="top1"))


@pytest.mark.parametrize("kind", ["state", "scalar", "boolean", "count"])
def test_outputs_of_any_shape_are_compared(kind, rng):
    """A state whose batch is its second axis, a number, truth values, and as many rows as there are values above zero."""
    weights = {"w": rng.standard_normal((16, 32)).astype(np.float32), "limit": np.float32(0.1), "axis": np.array([0])}
    nodes, shape, dtype = {
        "state": ([helper.make_node("Unsqueeze", ["y", "axis"], ["o"])], [1, "n", 32], TensorProto.FLOAT),
        "scalar": ([helper.make_node("Exp", ["limit"], ["o"])], [], TensorProto.FLOAT),
        "boolean": ([helper.make_node("Greater", ["y", "limit"], ["o"])], ["n", 32], TensorProto.BOOL),
        "count": (
            [helper.make_node("Relu", ["y"], ["p"]), helper.make_node("NonZero", ["p"], ["o"])],
            [2, "m"],
            TensorProto.INT64,
        ),
    }[kind]
    product = helper.make_node("MatMul", ["x", "w"], ["y"], "fc")
    model = make_model([product, *nodes], weights, {"x": ["n", 16]}, {"y": ["n", 32]})
    model.graph.output.append(helper.make_tensor_value_info("o", dtype, shape))
    feeds = tuple({"x": rng.standard_normal((count, 16)).astype(np.float32)} for count in (25, 5))
    (layer,) = survey(model)
    options = options_of(layer, ("svd",), 4)
    (found,) = losses_of(model, {layer: options}, whole(Calibration(feeds))).values.values()
    assert len(found) == len(options)
    assert all(np.isfinite(found))
    assert max(found) > 0


def test_outputs_that_are_not_finite_are_told_before_anything_is_timed(network, rng):
    network.graph.node.append(helper.make_node("Log", ["zero"], ["none"], "log"))
    network.graph.node.insert(0, helper.make_node("Sub", ["x", "x"], ["zero"], "sub"))
    network.graph.output.append(helper.make_tensor_value_info("none", TensorProto.FLOAT, ["batch", 32, 8, 8]))
    feeds = ({"x": rng.standard_normal((4, 32, 8, 8)).astype(np.float32)},)
    with pytest.raises(GraphError, match="output 'none' contains NaN or infinite values on the calibration inputs"):
        plan_network(network, {"flops": 1.5}, calibration=Calibration(feeds))


def test_the_loss_of_a_single_sample_is_no_accident(network, rng):
    """About the mean of one sample nothing is left; about the mean of its values there is."""
    single = Calibration(({"x": rng.standard_normal((1, 32, 8, 8)).astype(np.float32)},))
    losses = losses_of(network, wanted(network), whole(single))
    assert all(0 <= value < 100 for values in losses.values.values() for value in values)


def test_the_cheapest_form_is_measured_and_not_extended_from_a_mild_one(rng):
    """The last layer selects one of ten classes by a narrow margin: a mild cut costs nothing, a deep one everything."""
    weight = (np.eye(64) + 0.05 * rng.standard_normal((64, 64))).astype(np.float32)
    head = np.linalg.qr(rng.standard_normal((64, 10)))[0].astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "w"), helper.make_node("MatMul", ["h", "head"], ["y"], "head")]
    model = make_model(nodes, {"w": weight, "head": head}, {"x": ["batch", 64]}, {"y": ["batch", 10]})
    classes = rng.integers(0, 10, 256)
    scale = np.concatenate([np.ones(10), 0.05 * np.ones(54)])
    basis = np.concatenate([head, np.linalg.svd(head.T)[2][10:].T], axis=1)  # the classes' directions first
    x = ((6 * np.eye(10)[classes] @ head.T) + (rng.standard_normal((256, 64)) * scale) @ basis.T).astype(np.float32)
    layer = next(layer for layer in survey(model) if layer.name == "w")
    options = options_of(layer, ["svd"], 4)
    calibration = Calibration(tuple({"x": x[k : k + 32]} for k in range(0, 256, 32)))
    losses = losses_of(model, {layer: options}, whole(calibration)).values["w"]
    shares = list(map(Approximations(weight.T).share, options))
    assert losses[0] == max(losses)
    mild = min(range(len(options)), key=lambda k: abs(shares[k] - 0.05))
    extended = losses[mild] * shares[0] / shares[mild]
    assert losses[0] > 3 * extended


def test_a_curve_from_few_inputs_has_the_height_that_all_of_them_give(rng):
    """The first inputs are larger than the others, so that effects on them alone would be too large."""
    weights = {name: rng.standard_normal((64, size)).astype(np.float32) / 8 for name, size in (("w", 64), ("head", 10))}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "w"), helper.make_node("MatMul", ["h", "head"], ["y"], "head")]
    model = make_model(nodes, weights, {"x": ["batch", 64]}, {"y": ["batch", 10]})
    scale = np.where(np.arange(75) < 25, 2.0, 1.0)[:, None]
    x = (scale * rng.standard_normal((75, 64))).astype(np.float32)
    parts = [Calibration(tuple({"x": x[k : k + size]} for k in range(0, 75, size))) for size in (25, 75)]
    layer = next(layer for layer in survey(model) if layer.name == "w")
    options = {layer: options_of(layer, ["svd"], 4)}
    few, every = (losses_of(model, options, whole(part)).values["w"] for part in parts)  # a single batch is never divided
    assert few != every
    np.testing.assert_allclose(np.log(few), np.log(every), atol=0.25)  # without the height 0.7


@pytest.mark.parametrize(("seconds", "samples"), [(0.0, 64), (1.0, 64), (4.0, 30), (60.0, 16)])
def test_the_effects_of_slow_networks_are_measured_on_fewer_samples(seconds, samples):
    assert samples_for(seconds) == samples
