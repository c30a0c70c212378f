"""`tensorrail package`: options reach the configuration, one table and one record, bad input is one line."""

import json

import numpy as np
import onnx
from conftest import make_model
from onnx import helper


def test_options_reach_the_configuration(cli, small_path, tmp_path):
    record = tmp_path / "p.json"
    options = (
        "--provider cuda --threads 2 --level basic --max-batch 16 --preferred 8 --preferred 4 --max-delay 100 --instances 3"
    )
    more = "--gpu 1 --warmup 2 --warmup-data random --name net --versions 2,1 --tf32"
    arguments = ("package", small_path, "--triton", tmp_path / "r", "--dense", small_path, *options.split(), *more.split())
    code, printed, _ = cli(*arguments, "--json", record)
    assert code == 0
    assert "batches up to 16" in printed
    assert f"version 1: {small_path}; version 2: {small_path}" in printed
    assert "answers in a batch of two differ by" in printed
    written = " ".join((tmp_path / "r" / "net" / "config.pbtxt").read_text().split())
    for expected in (
        'name: "net" backend: "onnxruntime" default_model_filename: "model.onnx" max_batch_size: 16',
        'input { name: "x" data_type: TYPE_FP32 dims: [16, 8, 8] }',
        'output { name: "y" data_type: TYPE_FP32 dims: [10] }',
        "version_policy { specific { versions: [1, 2] } }",
        "instance_group { count: 3 kind: KIND_GPU gpus: [1] }",
        'optimization { graph { level: -1 } execution_accelerators { gpu_execution_accelerator { name: "cuda" parameters '
        '{ key: "use_tf32" value: "1" } } } }',
        'parameters { key: "intra_op_thread_count" value { string_value: "2" } }',
        "dynamic_batching { preferred_batch_size: [4, 8] max_queue_delay_microseconds: 100 }",
        "dims: [16, 8, 8] random_data: true } } count: 2 }",
    ):
        assert expected in written
    (made,) = json.loads(record.read_text())["models"]
    assert (made["name"], made["max_batch"], made["types"]) == ("net", 16, {"x": "TYPE_FP32", "y": "TYPE_FP32"})


def test_a_model_without_a_batch_needs_its_shape(cli, tmp_path):
    path = tmp_path / "text.onnx"
    model = make_model([helper.make_node("Relu", ["x"], ["y"])], {}, {"x": [1, "t"]}, {"y": [1, "t"]})
    onnx.save(model, path)
    code, _, err = cli("package", path, "--triton", tmp_path / "r")
    assert (code, err.count("\n")) == (2, 1)
    assert "such as x=1,8" in err
    code, printed, _ = cli("package", path, "--triton", tmp_path / "r", "--shape", "x=1,8", "--no-dynamic-batching")
    assert code == 0
    assert "no batching" in printed


def test_bad_input_is_one_line_and_leaves_nothing(cli, small_path, tmp_path):
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"\x08garbage")
    truncated = tmp_path / "truncated.onnx"
    truncated.write_bytes(small_path.read_bytes()[:-100])
    other = tmp_path / "other.onnx"
    weights = {"w": np.eye(3, dtype=np.float32)}
    onnx.save(make_model([helper.make_node("MatMul", ["x", "w"], ["y"])], weights, {"x": ["n", 3]}, {"y": ["n", 3]}), other)
    repository = tmp_path / "r"
    before = sorted(tmp_path.iterdir())
    cases = [
        ((garbage,), "garbage.onnx: not an ONNX model"),
        ((truncated,), "truncated.onnx: not an ONNX model"),
        ((tmp_path / "none.onnx",), "none.onnx: cannot be read"),
        ((small_path, "--name", "../up"), "expected a model name of letters"),
        ((small_path, "--dense", other), "expected versions with the same inputs and outputs, got x TYPE_FP32 [-1, 3]"),
        ((small_path, "--separate"), "give the dense model as well"),
        ((small_path, "--versions", "new"), "--versions: expected latest, all, or numbers such as 1,2, got 'new'"),
        ((small_path, "--versions", "2"), "some of [1], got [2]"),
        ((small_path, "--level", "most"), "unknown graph optimization level 'most'"),
        ((small_path, "--provider", "tpu"), "unknown provider 'tpu'"),
        ((small_path, "--preferred", 9, "--max-batch", 4), "from 1 to the largest batch, 4, got 9"),
        ((small_path, "--warmup-data", "ones"), "expected warm-up data zero or random, got 'ones'"),
        ((small_path, "--shape", "x"), "expected a shape such as name=1,3,224,224"),
        ((small_path, "--shape", "x=1,3,8,8"), "input 'x': expected shape [-1, 16, 8, 8], got [1, 3, 8, 8]"),
    ]
    for arguments, reason in cases:
        code, _, err = cli("package", *arguments, "--triton", repository)
        assert code == 2, arguments
        assert err.count("\n") == 1, err
        assert reason in err
    code, _, err = cli("package", small_path, "--triton", tmp_path / "no" / "where")
    assert (code, err.count("\n"), f"the folder {tmp_path / 'no'} does not exist" in err) == (2, 1, True), err
    assert sorted(tmp_path.iterdir()) == before
