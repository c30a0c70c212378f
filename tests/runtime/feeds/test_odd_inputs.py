"""Inputs of length 0, files that hold what one run takes, and random integers that a model refuses."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import tensorrail as tr
from tensorrail_runtime.feeds.loading import load_batches
from tensorrail_runtime.feeds.pictures import Preprocessing, picture
from tensorrail_runtime.sessions.inputs import parse_shapes
from tensorrail_runtime.sessions.session import open_session


def saved(path, nodes, inputs, outputs, weights=()):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [value(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in dict(weights).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


@pytest.fixture
def decoder(tmp_path, rng):
    """Return a model whose past has length 0 in the first step."""
    nodes = [
        helper.make_node("Concat", ["past", "x"], ["all"], "concat", axis=1),
        helper.make_node("MatMul", ["all", "w"], ["y"], "product"),
    ]
    inputs = {"x": (TensorProto.FLOAT, ["b", "s", 8]), "past": (TensorProto.FLOAT, ["b", "p", 8])}
    return saved(tmp_path / "m.onnx", nodes, inputs, {"y": ["b", "t", 8]}, {"w": rng.standard_normal((8, 8), np.float32)})


def test_a_past_of_length_0_is_an_input(decoder, tmp_path, rng):
    x = rng.standard_normal((6, 1, 8)).astype(np.float32)
    arrays = {"x": x, "past": np.zeros((6, 0, 8), np.float32)}
    np.savez(tmp_path / "x.npz", **arrays)
    batches = load_batches(tmp_path / "x.npz", open_session(decoder), batch=4)
    assert [feed["past"].shape for feed in batches.feeds] == [(4, 0, 8), (2, 0, 8)]
    assert tr.check(decoder, decoder, inputs=tmp_path / "x.npz").batches == (6,)
    shapes = parse_shapes(["x=1,1,8", "past=1,0,8"])
    assert tr.inspect(decoder, options=tr.Options(timing=tr.Timing(shapes=shapes))).macs == 8 * 8
    report = tr.quantize(
        decoder, tmp_path / "q.onnx", tr.Quantization("int8", tolerance=1), calibration=arrays,
        options=tr.Options(timing=tr.Timing(seconds=0.05)),
    )  # fmt: skip
    assert report.samples == 1  # of six, the others are for the ranges


@pytest.mark.parametrize("text", ["x=0,3", "x=1,-1", "x=1,a", "x="])
def test_other_sizes_are_refused(text):
    with pytest.raises(tr.ModelError, match="expected a shape such as"):
        parse_shapes([text])


def test_no_samples_are_refused(decoder):
    arrays = {"x": np.zeros((0, 1, 8), np.float32), "past": np.zeros((0, 0, 8), np.float32)}
    with pytest.raises(tr.ModelError, match="the array of input 'x' holds no data"):
        load_batches(arrays, open_session(decoder), batch=4)


def test_arrays_of_the_declared_shapes_are_one_run(tmp_path):
    nodes = [helper.make_node("ReduceSum", ["h"], ["s"], "sum", keepdims=0), helper.make_node("Add", ["x", "s"], ["y"], "add")]
    inputs = {"x": (TensorProto.FLOAT, [1, 8]), "h": (TensorProto.FLOAT, [2, 1, 4])}
    path = saved(tmp_path / "m.onnx", nodes, inputs, {"y": [1, 8]})
    arrays = {"x": np.ones((1, 8)), "h": np.ones((2, 1, 4))}
    batches = load_batches(arrays, open_session(path), batch=16)
    assert (batches.whole, [feed["h"].shape for feed in batches.feeds]) == (True, [(2, 1, 4)])
    with pytest.raises(tr.ModelError, match="the arrays of the inputs differ in length"):
        load_batches({**arrays, "x": np.ones((3, 8))}, open_session(path), batch=16)


def test_a_run_that_refuses_random_integers_says_what_to_give(tmp_path, rng):
    nodes = [helper.make_node("Gather", ["table", "i"], ["y"], "gather")]
    weights = {"table": rng.standard_normal((1, 8)).astype(np.float32)}
    path = saved(tmp_path / "m.onnx", nodes, {"i": (TensorProto.INT64, ["n"])}, {"y": ["n", 8]}, weights)
    with pytest.raises(tr.ModelError, match=r"the values of i are random, 0 and 1: give valid inputs .* such as i=0"):
        tr.check(path, path)
    assert tr.check(path, path, options=tr.Options(inputs=tr.InputRules(constants={"i": 0}))).holds
    assert tr.check(path, path, inputs={"i": np.zeros(5, np.int64)}).holds


@pytest.fixture
def same(tmp_path):
    """Return a model that gives its input, and an empty folder for data."""
    nodes = [helper.make_node("Identity", ["x"], ["y"], "same")]
    path = saved(tmp_path / "same.onnx", nodes, {"x": (TensorProto.FLOAT, ["n", 4])}, {"y": ["n", 4]})
    folder = tmp_path / "data"
    folder.mkdir()
    return path, folder


@pytest.fixture
def labelled(same, rng):
    """Return a model that gives its input, and a folder with 20 and 30 samples, of which one label is in the wrong file."""
    path, folder = same
    x = rng.standard_normal((50, 4)).astype(np.float32)
    labels = x.argmax(1)
    np.savez(folder / "1.npz", x=x[:20], labels=labels[:19])
    np.savez(folder / "2.npz", x=x[20:], labels=labels[19:])
    return path, folder


def test_labels_in_the_wrong_file_are_refused(labelled):
    path, folder = labelled
    with pytest.raises(tr.ModelError, match=r"expected one label per sample, got 20 samples and labels of shape \(19,\)"):
        tr.accuracy(path, data=folder)
    with pytest.raises(
        tr.ModelError, match=r"1\.npz: expected one label per sample, got 20 samples and labels of shape \(19,\)"
    ):
        load_batches(folder, open_session(path), batch=8)


def test_a_long_narrow_image_is_refused_before_it_takes_gigabytes(tmp_path):
    images = pytest.importorskip("PIL.Image")
    images.new("L", (1, 60_000)).save(tmp_path / "thin.png")
    with pytest.raises(tr.ModelError, match="this image of 1×60000 would have 256×15360000: crop it, or leave it out"):
        picture(tmp_path / "thin.png", (3, 224, 224), Preprocessing())


def test_a_damaged_header_of_an_array_is_one_line(same):
    path, folder = same
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 4), ("
    padded = header + b" " * (117 - len(header)) + b"\n"
    (folder / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + bytes(32))
    with pytest.raises(tr.ModelError, match=r"x\.npy: not a plain npy array"):
        load_batches(folder, open_session(path), batch=8)


def test_what_is_given_and_has_no_effect_is_refused(labelled, rng):
    path, _ = labelled
    x = rng.standard_normal((6, 4)).astype(np.float32)
    data = tr.Labelled({"x": x}, x.argmax(1))
    with pytest.raises(tr.UsageError, match="metric: the data are scored by 'top1', got 'top5'"):
        tr.accuracy(path, data=data, metric="top5")
    assert tr.accuracy(path, data=data, metric="top1").mean == 1.0
    with pytest.raises(tr.UsageError, match="inputs: expected inputs or batch sizes, got none"):
        tr.check(path, path, inputs=[])
    with pytest.raises(tr.ModelError, match="labels: expected one for each of the 2 models, got 1"):
        tr.bench([path, path], labels=["one"])
