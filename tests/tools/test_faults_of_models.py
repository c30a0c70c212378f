"""Faults of a model are told early, by every command, in words about the model: noise, NaN, outputs, sizes."""

from __future__ import annotations

import tempfile

import numpy as np
import onnx
import pytest
from attention_graphs import attention_model
from onnx import TensorProto, helper, numpy_helper

import tensorrail as tr
from tensorrail_runtime.graphs.constants import weight_fault
from tensorrail_runtime.scratch import scratch
from tensorrail_runtime.sessions.session import open_session

RNG = np.random.default_rng(0)
X = {"x": RNG.standard_normal((16, 48)).astype(np.float32)}
OPTIONS = tr.Options(search=tr.Search(allow_slower=True, seconds=1), timing=tr.Timing(seconds=0.05, processes=2), fit=tr.Fit(0))


def saved(path, between=(), last=(), output=None, bad=None, inputs=("n", 48), extra=(), **attributes):
    """Write x · a → nodes between → · b → last nodes."""
    weights = {"a.weight": RNG.standard_normal((48, 64)), "b.weight": RNG.standard_normal((64, 32)), **dict(extra)}
    weights = {name: np.asarray(array, np.float32) for name, array in weights.items()}
    if bad is not None:
        weights["b.weight"][3, 4] = bad
    nodes = [
        helper.make_node("MatMul", ["x", "a.weight"], ["h"], "a"),
        *(between or [helper.make_node("Relu", ["h"], ["r"], "relu")]),
        helper.make_node("MatMul", ["r", "b.weight"], ["y"], "b"),
        *last,
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, inputs)],
        [output or helper.make_tensor_value_info("y", TensorProto.FLOAT, None if len(inputs) > 2 else ["n", 32])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    if len(inputs) > 2:
        graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [*inputs[:-1], 32]))
    opsets = [helper.make_opsetid("", 15), helper.make_opsetid("ai.onnx.ml", 1)]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())
    return path


def noise(**attributes):
    return [
        helper.make_node("RandomNormalLike", ["h"], ["n1"], "noise", dtype=1, **attributes),
        helper.make_node("Add", ["h", "n1"], ["r"], "add"),
    ]


def commands(path):
    """Return what compares outputs of a model."""
    return {
        "check": lambda: tr.check(path, path, options=OPTIONS),
        "compress": lambda: tr.compress(path, path.with_name("s.onnx"), {"params": 1.2}, options=OPTIONS),
        "compress, fitted": lambda: tr.compress(
            path, path.with_name("s.onnx"), {"params": 1.2}, calibration=X, options=OPTIONS
        ),
        "plan": lambda: tr.plan(path, {"params": 1.2}, calibration=X, options=OPTIONS),
        "int8": lambda: tr.quantize(path, path.with_name("s.onnx"), "int8", calibration=X, options=OPTIONS),
        "record": lambda: tr.regress.record(path, path.with_name("b.json"), options=OPTIONS),
        "fp16": lambda: tr.quantize(path, path.with_name("s.onnx"), "fp16", options=OPTIONS),
    }


def test_noise_is_found_before_any_work(tmp_path):
    path = saved(tmp_path / "m.onnx", noise())
    for call in commands(path).values():
        with pytest.raises(tr.ModelError, match=r"m\.onnx: output 'y' differs by .* because .* random numbers \(noise: Random"):
            call()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx"]


def test_noise_with_a_seed_and_dropout_in_inference_are_compared(tmp_path):
    assert tr.check(seeded := saved(tmp_path / "s.onnx", noise(seed=1.0)), seeded).holds
    dropout = [helper.make_node("Dropout", ["h"], ["r"], "drop")]
    assert tr.check(path := saved(tmp_path / "m.onnx", dropout), path).holds


def test_outputs_that_are_no_tensors_are_told_before_the_work(tmp_path):
    maps = helper.make_sequence_type_proto(
        helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    )
    last = [
        helper.make_node("Softmax", ["y"], ["p"], "softmax", axis=1),
        helper.make_node("ZipMap", ["p"], ["z"], "zip", domain="ai.onnx.ml", classlabels_int64s=list(range(32))),
    ]
    path = saved(tmp_path / "m.onnx", last=last, output=helper.make_value_info("z", maps))
    for call in commands(path).values():
        with pytest.raises(tr.ModelError, match=r"m\.onnx: output 'z' has type seq.*only tensors can be compared"):
            call()
    assert not path.with_name("s.onnx").exists()


@pytest.mark.parametrize(("bad", "what"), [(np.nan, "NaN"), (np.inf, "an infinite value")])
def test_a_weight_that_is_not_finite_is_named(bad, what, tmp_path):
    path = saved(tmp_path / "m.onnx", bad=bad)
    others = {
        "accuracy": lambda: tr.accuracy(path, path, data={"x": X["x"], "labels": np.zeros(len(X["x"]), int)}),
        "bench": lambda: tr.bench([path]),
        "package": lambda: tr.package(path, tmp_path / "triton"),
        "serve": lambda: tr.serve(path),
    }
    for name, call in (commands(path) | others).items():
        with pytest.raises(tr.TensorrailError) as caught:
            call()
        assert f"weight 'b.weight' holds {what} at [3, 4]" in str(caught.value), name
    assert f"warning: weight 'b.weight' holds {what} at [3, 4]" in str(tr.inspect(path))
    assert not (tmp_path / "triton").exists()


def test_an_infinite_weight_of_an_attention_is_named_and_what_is_added_to_its_scores_may_be_infinite():
    model = attention_model(RNG, scores=np.zeros((1, 1, 6, 6)))
    del model.graph.input[1]
    model.graph.initializer.append(numpy_helper.from_array(np.triu(np.full((1, 1, 6, 6), -np.inf, np.float32), 1), "scores"))
    assert weight_fault(model) == ""
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[3, 4] = np.inf
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "qkv.weight"))
    assert weight_fault(model).startswith("weight 'qkv.weight' holds an infinite value at [3, 4]")


def test_an_attention_without_a_bias_is_refused_before_it_ends_the_process(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(attention_model(RNG, bias=False), path)
    with pytest.raises(tr.ModelError, match="without a bias"):  # first, so that a fault here does not end the tests
        open_session(path)
    timing = tr.Timing(seconds=0.05, processes=2, shapes={"x": (2, 6, 16)})
    data = {"x": RNG.standard_normal((4, 6, 16)).astype(np.float32)}
    options = tr.Options(timing=timing)
    calls = {
        "check": lambda: tr.check(path, path, options=options),
        "bench": lambda: tr.bench([path], options=options),
        "compress": lambda: tr.compress(path, tmp_path / "s.onnx", {"params": 1.2}, options=options),
        "quantize": lambda: tr.quantize(path, tmp_path / "s.onnx", "int8", calibration=data, options=options),
        "accuracy": lambda: tr.accuracy(path, path, data=data | {"labels": np.zeros(4, int)}, options=options),
    }
    for name, call in calls.items():
        with pytest.raises(tr.TensorrailError) as caught:
            call()
        assert "node 'attention' is a com.microsoft.Attention without a bias" in str(caught.value), name
        assert str(caught.value).endswith("add a bias of zeros as its third input"), name


def test_infinite_values_in_a_mask_are_no_fault(tmp_path):
    mask = {"mask": np.triu(np.full((8, 64), -np.inf), 1)}
    path = saved(tmp_path / "m.onnx", [helper.make_node("Add", ["h", "mask"], ["r"], "masked")], extra=mask)
    assert tr.inspect(path).notes == ()
    assert tr.bench([path], options=tr.Options(timing=tr.Timing(batch=8, seconds=0.05, processes=1))).latencies


def test_errors_do_not_name_temporary_files(tmp_path):
    with (
        pytest.raises(tr.ModelError, match=r"^the dense model: fails beside the factored model$") as caught,
        scratch() as folder,
    ):
        raise tr.ModelError(f"{folder}/dense.onnx: fails beside {folder}/kept/factored.onnx")
    assert "/" not in str(caught.value)
    broken = onnx.ModelProto.FromString(saved(tmp_path / "m.onnx").read_bytes())
    broken.graph.node[0].input[1] = "b.weight"
    for call in (
        lambda: tr.inspect(broken),
        lambda: tr.check(broken, broken),
        lambda: tr.quantize(broken, tmp_path / "q", "fp16"),
    ):
        with pytest.raises(tr.TensorrailError) as caught:
            call()
        assert tempfile.gettempdir() not in str(caught.value).replace(str(tmp_path), "")
        assert "tensorrail-" not in str(caught.value)


def test_inspect_marks_sizes_that_were_not_given(tmp_path):
    path = saved(tmp_path / "m.onnx", inputs=(1, "frames", 48))
    default = tr.inspect(path)
    assert "input 'x' has axis 'frames' of any size" in str(default)
    assert "x=1,50,48" in default.notes[0]
    given = tr.inspect(path, options=tr.Options(timing=tr.Timing(shapes={"x": (1, 50, 48)})))
    assert (given.notes, given.macs) == ((), 50 * default.macs)
    assert tr.inspect(saved(tmp_path / "b.onnx")).notes == ()
    unnamed = tr.inspect(saved(tmp_path / "u.onnx", inputs=(1, None, 48)))
    assert "input 'x' has axis 1 of any size" in unnamed.notes[0]
    several = tr.inspect(saved(tmp_path / "c.onnx", inputs=("n", "frames", 48)))
    assert "dynamic axes, all set to the batch size" in several.notes[0]


def test_inspect_names_computed_and_quantized_weights_and_those_in_bodies(tmp_path):
    value = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    branch = lambda name: helper.make_graph(  # noqa: E731
        [helper.make_node("MatMul", ["h", name], ["z"], name)], name, [], [value],
        [numpy_helper.from_array(np.ones((64, 64), np.float32), name)],
    )  # fmt: skip
    between = [
        helper.make_node("Add", ["w", "delta"], ["sum"], "sum"),
        helper.make_node("MatMul", ["h", "sum"], ["m"], "adapted"),
        helper.make_node("ReduceMax", ["h"], ["top"], "top", keepdims=0),
        helper.make_node("Greater", ["top", "zero"], ["c"], "greater"),
        helper.make_node("If", ["c"], ["i"], "choice", then_branch=branch("inner1"), else_branch=branch("inner2")),
        helper.make_node("Add", ["m", "i"], ["r"], "add"),
    ]
    extra = {"w": np.ones((64, 64)), "delta": np.ones((64, 64)), "zero": 0.0}
    report = tr.inspect(saved(tmp_path / "m.onnx", between, extra=extra))
    assert [(layer.weight, layer.params) for layer in report.layers if layer.name == "adapted"] == [("sum", 64 * 64)]
    assert "bodies of If 'choice', whose weights are: inner1 (4,096), inner2 (4,096)" in str(report.notes)
    tr.quantize(path := saved(tmp_path / "d.onnx"), tmp_path / "q.onnx", "int8", calibration=X, options=OPTIONS)
    quantized = tr.inspect(tmp_path / "q.onnx")
    assert [layer.params for layer in quantized.layers] == [layer.params for layer in tr.inspect(path).layers]
    assert quantized.notes == (f"quantized weights, not among the parameters: {48 * 64 + 64 * 32:,} values",)


def test_inspect_says_how_shapes_are_given(tmp_path, cli):
    path = saved(tmp_path / "m.onnx", [helper.make_node("Reshape", ["h", "shape"], ["r"], "reshape")])
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("shape", TensorProto.INT64, ["axes"]))
    path.write_bytes(model.SerializeToString())
    code, _, err = cli("inspect", path)
    assert (code, "give the shapes of the inputs" in err, "--shape" in err) == (2, True, True)
