"""Work grows linearly with the number of layers: graphs are imported once, and no node runs again for every layer."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import make_model
from onnx import helper

from tensorrail_exporter import FORMATS, LayerPlan, Plan
from tensorrail_exporter import workflow as compressing
from tensorrail_exporter.calibrate import inputs, layerwise, progressive
from tensorrail_exporter.calibrate.inputs import Calibration
from tensorrail_exporter.calibrate.layerwise import fit_layers
from tensorrail_exporter.rewrite import biases, resolve, rewriter
from tensorrail_exporter.workflow import Compression, compress
from tensorrail_runtime.measure.timing import Conditions, Timing
from tensorrail_runtime.sessions.session import Session

CPU = Session(threads=1)
LENGTHS = (4, 8, 16)


def matrices(rng, count):
    """Return a chain of products, each with a bias, a Tanh and a skip, and a plan of all of them."""
    nodes, weights = [], {}
    for k in range(count):
        weights[f"w{k}"] = (rng.standard_normal((12, 12)) / 3).astype(np.float32)
        weights[f"b{k}"] = rng.standard_normal(12).astype(np.float32)
        nodes.append(helper.make_node("MatMul", [f"x{k}", f"w{k}"], [f"m{k}"], f"product{k}"))
        nodes.append(helper.make_node("Add", [f"m{k}", f"b{k}"], [f"a{k}"], f"add{k}"))
        nodes.append(helper.make_node("Tanh", [f"a{k}"], [f"t{k}"], f"tanh{k}"))
        nodes.append(helper.make_node("Add", [f"t{k}", f"x{k}"], [f"x{k + 1}"], f"skip{k}"))
    model = make_model(nodes, weights, {"x0": ["n", 12]}, {f"x{count}": ["n", 12]})
    modes = FORMATS["svd"].default_modes((12, 12))
    return model, Plan(layers=tuple(LayerPlan(name=f"w{k}", format="svd", modes=modes, ranks=(6,)) for k in range(count)))


def kernels(rng, count):
    """Return a chain of convolutions with a Tanh and a skip behind each, and a plan of all of them."""
    nodes, weights = [], {}
    for k in range(count):
        weights[f"w{k}"] = (rng.standard_normal((6, 6, 3, 3)) / 5).astype(np.float32)
        nodes.append(helper.make_node("Conv", [f"x{k}", f"w{k}"], [f"c{k}"], f"conv{k}", pads=[1] * 4))
        nodes.append(helper.make_node("Tanh", [f"c{k}"], [f"t{k}"], f"tanh{k}"))
        nodes.append(helper.make_node("Add", [f"t{k}", f"x{k}"], [f"x{k + 1}"], f"skip{k}"))
    model = make_model(nodes, weights, {"x0": ["n", 6, 5, 5]}, {f"x{count}": ["n", 6, 5, 5]})
    layers = (LayerPlan(name=f"w{k}", format="tt", modes=(6, 9, 6), ranks=(1, 4, 4, 1)) for k in range(count))
    return model, Plan(layers=tuple(layers))


def calibration(model, rng):
    sizes = [axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim][1:]
    return Calibration(tuple({"x0": rng.standard_normal((16, *sizes)).astype(np.float32)} for _ in range(3)))


@pytest.fixture
def work(monkeypatch):
    """Return a counter of imports and of the nodes that are imported, exported and opened."""
    counts = Counter()

    def watch(module, name, nodes_of):
        real = getattr(module, name)

        def counting(*arguments, **options):
            counts[name] += 1
            counts["nodes"] += nodes_of(arguments[0])
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, counting)

    watch(resolve, "import_graph", lambda model: len(model.graph.node))
    for module in (rewriter, biases, progressive):
        watch(module, "export_graph", lambda graph: len(graph.nodes))
    for module in (inputs, progressive, compressing):
        watch(module, "open_session", lambda path: len(onnx.load(Path(path), load_external_data=False).graph.node))
    return counts


def fitted(model, plan, data, _):
    fit_layers(model, plan, data, CPU)


def compressed(model, plan, data, folder):
    compress(model, plan, folder / "out.onnx", Compression(data, conditions=Conditions(Timing(seconds=0.1), CPU)))


@pytest.mark.parametrize(("run", "chain"), [(fitted, matrices), (fitted, kernels), (compressed, matrices)])
def test_imports_do_not_grow_and_nodes_grow_linearly(run, chain, work, rng, tmp_path):
    imports, nodes = [], []
    for count in LENGTHS:
        work.clear()
        model, plan = chain(rng, count)
        run(model, plan, calibration(model, rng), tmp_path)
        imports.append(work["import_graph"])
        nodes.append(work["nodes"])
    assert imports == [1, 1, 1]
    assert nodes[2] - nodes[1] <= 2.2 * (nodes[1] - nodes[0])


def test_no_module_of_the_exporter_looks_up_import_graph_but_those_that_read_a_model():
    """What is counted above is all there is: `compress` reads its model through `resolve` alone."""
    for module in (compressing, layerwise, progressive, inputs, rewriter, biases):
        assert not hasattr(module, "import_graph")
