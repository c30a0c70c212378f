"""Exact changes are made where the network is measured to be faster for them, and nowhere else."""

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from conftest import make_model
from onnx import helper

import tensorrail as tr
from tensorrail_exporter.graphs import rounding
from tensorrail_exporter.search import exact
from tensorrail_exporter.search.exact import Exact, fastest_exact
from tensorrail_exporter.search.targets import Search
from tensorrail_exporter.search.verification import Verification
from tensorrail_runtime.measure.timing import Timing
from tensorrail_runtime.progress import silent
from tensorrail_runtime.sessions.session import Session

GROUP = ("up", "gate")
WIDTH = 64


@pytest.fixture
def gated(rng):
    """The two halves of a gated unit, and a layer behind it; with the shapes of inner tensors."""
    weights = {f"{name}.weight": rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) for name in (*GROUP, "down")}
    nodes = [
        helper.make_node("MatMul", ["x", "up.weight"], ["u"]),
        helper.make_node("MatMul", ["x", "gate.weight"], ["g"]),
        helper.make_node("Sigmoid", ["g"], ["s"]),
        helper.make_node("Mul", ["u", "s"], ["m"]),
        helper.make_node("MatMul", ["m", "down.weight"], ["y"]),
    ]
    return onnx.shape_inference.infer_shapes(make_model(nodes, weights, {"x": ["batch", WIDTH]}, {"y": ["batch", WIDTH]}))


@pytest.fixture
def choose(gated, tmp_path, monkeypatch):
    """Return a function that gives each variant a speed-up over the first one, and returns what is chosen."""

    def choose(*ratios, search=None, precision="fp32"):
        timed = []

        def bench(paths, timing, settings):
            timed.extend(paths)
            assert len(paths) == 1 + len(ratios)
            rows = [SimpleNamespace(value=value, low=value - 0.01, high=value + 0.01) for value in ratios]
            return SimpleNamespace(ratios=rows)

        monkeypatch.setattr(exact, "bench", bench)
        dense = tmp_path / "dense.onnx"
        onnx.save(gated, dense)
        verification = Verification(gated, dense, Timing(seconds=1.0), Session(), precision)
        chosen = fastest_exact(verification, search or Search(), tmp_path, silent)
        return chosen, [onnx.load(path) for path in timed]

    return choose


def test_the_fastest_variant_is_chosen(choose):
    chosen, models = choose(1.05, 1.2, 1.1)
    assert chosen == Exact((GROUP,), inner_shapes=True)
    joined = [any("{up,gate}" in node.name for node in model.graph.node) for model in models]
    shapes = [bool(model.graph.value_info) for model in models]
    assert (joined, shapes) == ([False, False, True, True], [True, False, True, False])
    assert choose(1.05, 1.0, 1.1)[0] == Exact((GROUP,), inner_shapes=False)
    assert choose(1.05, 1.0, 1.04)[0] == Exact(inner_shapes=False)


def test_a_small_gain_changes_nothing(choose):
    assert choose(1.019, 1.0, 0.9)[0] == Exact()


def test_joining_may_be_asked_for_or_ruled_out(choose):
    assert choose(0.9, search=Search(joint=True))[0] == Exact((GROUP,))
    assert choose(1.5, search=Search(joint=False))[0] == Exact(inner_shapes=False)
    assert choose(1.5, search=Search(keep=("up",)))[0] == Exact(inner_shapes=False)


def test_variants_of_an_int8_plan_are_timed_in_int8(choose):
    _, models = choose(1.0, 1.0, 1.0, precision="int8")
    assert all(any(node.op_type == "QuantizeLinear" for node in model.graph.node) for model in models)
    assert [bool(model.graph.value_info) for model in models][1::2] == [False, False]


def test_a_variant_that_computes_something_else_is_left_out(choose, monkeypatch):
    real = rounding.parity
    seen = []

    def parity(*arguments, **options):
        seen.append(arguments)
        result = real(*arguments, **options)
        return SimpleNamespace(outputs=[SimpleNamespace(exact=False, relative_l2=1.0)]) if len(seen) == 2 else result

    monkeypatch.setattr(rounding, "parity", parity)
    chosen, models = choose(1.0, 1.5)
    assert len(models) == 3
    assert chosen == Exact((GROUP,), inner_shapes=False)


@pytest.mark.parametrize("step", ["rounding_error", "open_session"])
def test_a_variant_that_cannot_be_compared_or_run_is_left_out(step, choose, monkeypatch):
    """As a network that draws random numbers, which could be planned for before."""

    def fails(*_, **__):
        raise tr.ModelError("no output had a value")

    monkeypatch.setattr(exact, step, fails)
    assert choose()[0] == Exact()


def test_joint_layers_that_cannot_be_are_refused(choose, gated):
    with pytest.raises(tr.PlanError, match="no layers of this model that may change read the same input"):
        choose(search=Search(joint=True, keep=("up",)))


def test_shapes_without_sizes_are_no_reason(choose, gated):
    for value in gated.graph.value_info:
        for dim in value.type.tensor_type.shape.dim:
            dim.Clear()
    assert choose(search=Search(joint=False)) == (Exact(), [])


def test_nothing_is_timed_where_nothing_can_change(choose, gated):
    del gated.graph.value_info[:]
    assert choose(search=Search(joint=False)) == (Exact(), [])


def test_a_plan_says_what_was_changed(gated, in_this_process, monkeypatch, tmp_path):
    """Joined layers are planned as one, the written model is the joined one, and the report says so."""
    monkeypatch.setenv("TENSORRAIL_CACHE", str(tmp_path / "cache"))
    options = tr.Options(
        timing=tr.Timing(seconds=0.2),
        search=tr.Search(joint=True, allow_slower=True, seconds=1.0, check_seconds=0.2, improve_seconds=0.0, grid=8),
        fit=tr.Fit(seconds=0.0),
    )
    report = tr.compress(gated, tmp_path / "model.onnx", {"params": 1.5}, options=options)
    assert report.planning.plan.joint == (GROUP,)
    assert "1 group of layers that read the same input run as one layer each" in str(report)
    assert {row.layer for row in report.planned} == {"{up,gate}", "down"}
    names = {tensor.name for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert not {"up.weight", "gate.weight"} & names
    assert report.numerical < 1e-4


def test_a_joint_layer_is_kept_by_its_name(gated, in_this_process, monkeypatch, tmp_path):
    monkeypatch.setenv("TENSORRAIL_CACHE", str(tmp_path / "cache"))
    search = tr.Search(allow_slower=True, seconds=1.0, check_seconds=0.2, improve_seconds=0.0, grid=8, keep=("{up,gate}",))
    report = tr.plan(gated, {"params": 1.2}, options=tr.Options(timing=tr.Timing(seconds=0.2), search=search))
    assert {row.layer: row.format for row in report.rows if row.layer != "down"} == {"up": None, "gate": None}
    assert report.plan.joint == ()


def test_joint_layers_are_compared_with_the_dense_ones(gated, in_this_process, monkeypatch, tmp_path):
    """A plan that joins and factors: what joining changes is not hidden in what factoring loses."""
    from tensorrail_exporter import workflow
    from tensorrail_exporter.plans.plan import LayerPlan, Plan

    seen = []
    real = workflow.rounding_error
    monkeypatch.setattr(workflow, "rounding_error", lambda *given: seen.append(given) or real(*given))
    layer = LayerPlan(name="{up,gate}", format="svd", modes=(2 * WIDTH, WIDTH), ranks=(8,))
    report = tr.compress(
        gated,
        tmp_path / "model.onnx",
        Plan(layers=(layer,), joint=(GROUP,)),
        options=tr.Options(timing=tr.Timing(seconds=0.2), fit=tr.Fit(seconds=0.0)),
    )
    assert len(seen) == 1
    assert report.exact == "joint layers"


def test_layers_of_a_module_stay_apart_unless_asked(monkeypatch, tmp_path):
    from torch import nn, zeros

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.up(x) * self.gate(x).sigmoid()

    asked = []

    def plan_network(model, targets, search, **_):
        asked.append(search.joint)

    monkeypatch.setattr("tensorrail_exporter.search.planner.plan_network", plan_network)
    module = (Gated().eval(), zeros(2, WIDTH))
    tr.plan(module, {"params": 2.0})
    tr.plan(module, {"params": 2.0}, options=tr.Options(search=tr.Search(joint=True)))
    onnx.save(tr.to_onnx(*module), tmp_path / "dense.onnx")
    tr.plan(tmp_path / "dense.onnx", {"params": 2.0})
    assert asked == [False, True, None]
