"""`tensorrail quantize`: one table, one record, one file written whole or not at all, and exit codes."""

import json

import numpy as np
import onnx
import pytest
from conftest import make_model
from onnx import TensorProto, helper, numpy_helper

import tensorrail as tr
from tensorrail_exporter.calibrate.inputs import Calibration
from tensorrail_exporter.calibrate.split import split
from tensorrail_exporter.precision.reduce import PrecisionReport

QUICK = ("--duration", 0.1)


@pytest.fixture
def data(tmp_path, rng):
    """A file of 20 samples with labels; the first sixteen and the last four make two batches."""
    path = tmp_path / "x.npz"
    np.savez(path, x=rng.standard_normal((20, 16, 8, 8)).astype(np.float32), labels=rng.integers(0, 10, 20))
    return path


@pytest.fixture
def large_path(tmp_path, rng):
    """Two products with values of 10⁵ between them, which fp16 does not hold."""
    weights = {
        "a.weight": (2e4 * rng.standard_normal((8, 8))).astype(np.float32),
        "b.weight": (rng.standard_normal((8, 8)) / 2e4).astype(np.float32),
    }
    nodes = [helper.make_node("MatMul", ["x", "a.weight"], ["h"]), helper.make_node("MatMul", ["h", "b.weight"], ["y"])]
    path = tmp_path / "large.onnx"
    onnx.save(make_model(nodes, weights, {"x": ["n", 8]}, {"y": ["n", 8]}), path)
    return path


def types(path):
    return {numpy_helper.to_array(tensor).dtype.name for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize(("choice", "largest"), [("--reduce-range", 64), ("--no-reduce-range", 127)])
def test_int8_weights_have_the_bits_that_were_asked_for(choice, largest, cli, small_path, data, tmp_path):
    out = tmp_path / "small.onnx"
    assert cli("quantize", small_path, "--to", "int8", "-o", out, "--calibration", data, choice, *QUICK)[0] == 0
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(out).graph.initializer}
    assert np.abs(weights["conv.weight_quantized"]).max() == largest
    code, _, err = cli("quantize", small_path, "--to", "fp16", "-o", out, choice, *QUICK)
    assert (code, "reduce_range is a choice for int8 weights, got fp16" in err) == (2, True)


@pytest.mark.parametrize(
    ("to", "dtype", "judged"), [("fp16", "float16", "20 given samples"), ("int8", "int8", "5 held-out samples")]
)
def test_one_table_with_bytes_parity_accuracy_and_latency_and_one_record(to, dtype, judged, cli, small_path, data, tmp_path):
    out, record = tmp_path / "small.onnx", tmp_path / "r.json"
    arguments = ("quantize", small_path, "--to", to, "-o", out, "--calibration", data, "--data", data, *QUICK)
    code, printed, err = cli(*arguments, "--batch", 2, "--json", record)
    assert (code, err) == (0, "")
    assert dtype in types(out)
    for shown in (
        "fp32",
        to,
        "file (bytes)",
        "relative L2 of y",
        "top-1 agreement",
        "top1",
        "latency p50 (ms), batch 2",
        "speed-up",
    ):
        assert shown in printed
    report = PrecisionReport.model_validate_json(record.read_text())
    assert (f"{report.samples} {judged.split(maxsplit=1)[1]}", report.latency.batch, report.holds) == (judged, 2, True)
    assert judged in " ".join(printed.split())
    assert f"{report.bytes_before:,}" in printed
    assert f"{report.bytes_after:,}" in printed
    assert f"{to} is {report.verdict} than fp32 here" in printed
    assert json.loads(record.read_text())["version"] == 1
    assert not list(tmp_path.glob(".*"))


def test_threads_and_the_number_of_samples_can_be_given(cli, small_path, data, tmp_path):
    record = tmp_path / "r.json"
    arguments = ("quantize", small_path, "--to", "int8", "-o", tmp_path / "q.onnx", "--calibration", data, *QUICK)
    assert cli(*arguments, "--threads", 1, "--samples", 8, "--json", record)[0] == 0
    report = PrecisionReport.model_validate_json(record.read_text())
    assert (report.samples, report.latency.threads) == (2, 1)  # a quarter is held out


def test_inputs_set_aside_change_nothing_in_the_int8_model(small_path, rng, tmp_path):
    """Neither ranges nor weights depend on them; the difference that is reported is of them alone."""
    values = rng.standard_normal((64, 16, 8, 8)).astype(np.float32)
    aside = split(Calibration(({"x": values},))).judged.feeds
    rows = [k for k in range(64) if any((values[k] == row).all() for feed in aside for row in feed["x"])]
    others = values.copy()
    others[rows] *= 3.0
    options = tr.Options(timing=tr.Timing(seconds=0.1))
    reports = [
        tr.quantize(small_path, tmp_path / f"{name}.onnx", "int8", calibration={"x": inputs}, options=options)
        for name, inputs in (("a", values), ("b", others))
    ]
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert [(report.inputs, report.samples) for report in reports] == [("held out", 32)] * 2
    assert reports[1].parity.worst > 2 * reports[0].parity.worst  # their values leave the ranges


def test_int8_of_too_few_inputs_to_set_some_aside_says_so(cli, small_path, data, tmp_path):
    record = tmp_path / "r.json"
    arguments = ("quantize", small_path, "--to", "int8", "-o", tmp_path / "q.onnx", "--calibration", data, *QUICK)
    code, printed, _ = cli(*arguments, "--samples", 3, "--json", record)
    assert code == 0
    assert "3 given samples" in " ".join(printed.split())
    assert "int8 was fitted to these samples, since none were held out" in " ".join(printed.split())
    assert PrecisionReport.model_validate_json(record.read_text()).inputs == "given"


def test_a_slower_model_is_called_slower(cli, small_path, tmp_path, monkeypatch):
    from tensorrail_exporter.precision import reduce as precision

    measured = precision.bench

    def slow(*arguments, **options):
        report = measured(*arguments, **options)
        ratio = report.ratios[0].model_copy(update={"value": 0.5, "low": 0.4, "high": 0.6})
        return report.model_copy(update={"ratios": (ratio,)})

    monkeypatch.setattr(precision, "bench", slow)
    code, printed, _ = cli("quantize", small_path, "--to", "fp16", "-o", tmp_path / "o.onnx", *QUICK)
    assert code == 0
    assert "fp16 is slower than fp32 here: this processor computes in fp32" in printed
    assert "0.50× [0.40, 0.60]" in printed
    assert "faster" not in printed


def test_out_of_tolerance_ends_with_1_and_the_ranges(cli, small_path, data, tmp_path):
    out = tmp_path / "o.onnx"
    arguments = ("quantize", small_path, "--to", "int8", "-o", out, "--calibration", data, *QUICK)
    code, printed, _ = cli(*arguments, "--tolerance", 1e-6)
    assert code == 1
    assert out.exists()
    assert "OUT OF tolerance 1e-06" in printed
    assert "ranges in fp32, the most suspicious first" in printed
    assert "conv.weight" in printed
    code, printed, _ = cli(*arguments, "--keep", "conv", "--method", "percentile")
    assert code == 0
    assert "still fp32: conv (Conv, kept)" in printed


@pytest.mark.parametrize("to", ["fp16", "int8"])
def test_what_cannot_be_measured_is_not_written_and_a_shape_helps(to, cli, tmp_path, rng):
    path, data, out = tmp_path / "m.onnx", tmp_path / "x.npz", tmp_path / "o.onnx"
    weights = {"w": rng.standard_normal((4, 3, 3, 3)).astype(np.float32)}
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv")
    onnx.save(make_model([node], weights, {"x": ["n", 3, "h", "v"]}, {"y": ["n", 4, "p", "q"]}), path)
    np.savez(data, x=rng.standard_normal((4, 3, 8, 8)).astype(np.float32))
    arguments = ("quantize", path, "--to", to, "-o", out, "--calibration", data, *QUICK)
    code, _, err = cli(*arguments, "--shape", "x=1,3,2,2")
    assert code == 2
    assert "cannot run the model on these inputs" in err
    assert not list(tmp_path.glob("*o.onnx*"))
    assert cli(*arguments)[0] == 0  # heights and widths are those of the calibration inputs
    assert [file.name for file in tmp_path.glob("*o.onnx*")] == ["o.onnx"]
    assert cli(*arguments, "--shape", "x=1,3,9,7")[0] == 0
    if to == "fp16":  # without calibration the random inputs have the shape that is given
        random = [one for one in arguments if one not in ("--calibration", data)]
        code, _, err = cli(*random)
        assert (code, "cannot run the model on these inputs" in err) == (2, True)
        assert cli(*random, "--shape", "x=1,3,8,8")[0] == 0


def test_external_data_move_with_the_model(cli, small_path, data, tmp_path, monkeypatch):
    monkeypatch.setattr("tensorrail_exporter.graphs.io._LARGEST_FILE", 0)
    monkeypatch.setattr("tensorrail_exporter.graphs.io._SMALL", 0)
    out, record = tmp_path / "o.onnx", tmp_path / "r.json"
    assert cli("quantize", small_path, "--to", "fp16", "-o", out, *QUICK, "--json", record)[0] == 0
    assert sorted(file.name for file in tmp_path.glob("*o.onnx*")) == ["o.onnx", "o.onnx.data"]
    assert json.loads(record.read_text())["bytes_after"] == sum(file.stat().st_size for file in tmp_path.glob("o.onnx*"))
    assert "float16" in types(out)


def test_overflow_shows_the_ranges_and_the_keep_that_helps(cli, large_path, tmp_path):
    out = tmp_path / "o.onnx"
    code, printed, err = cli("quantize", large_path, "--to", "fp16", "-o", out, *QUICK)
    assert code == 2
    assert err.count("\n") == 1
    assert "layer a: overflows in fp16" in err
    assert "in fp32: a, b" in err
    assert "beyond fp16" in printed
    assert not out.exists()
    assert cli("quantize", large_path, "--to", "fp16", "-o", out, "--keep", "a", "--keep", "b", *QUICK)[0] == 0


def test_bad_input_is_one_line_and_exit_code_2(cli, small_path, data, tmp_path, rng):
    out, garbage, unlabelled, other = (tmp_path / name for name in ("o.onnx", "g.onnx", "u.npz", "z.npz"))
    garbage.write_bytes(b"garbage")
    np.savez(unlabelled, x=rng.standard_normal((2, 16, 8, 8)).astype(np.float32))
    np.savez(other, z=np.zeros((2, 4), np.float32))
    quantized = tmp_path / "q.onnx"
    assert cli("quantize", small_path, "--to", "int8", "-o", quantized, "--calibration", data, *QUICK)[0] == 0
    model = onnx.load(small_path)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(model, tmp_path / "h.onnx")
    cases = [
        ((small_path, "--to", "int8"), "int8 needs typical inputs for the ranges of activations: give calibration inputs, 100"),
        ((small_path, "--to", "bf16"), "unknown precision 'bf16': expected one of fp16, int8"),
        ((small_path, "--to", "fp16", "--method", "minmax"), "fp16 needs no calibration"),
        ((small_path, "--to", "int8", "--calibration", data, "--method", "mean"), "unknown calibration method 'mean'"),
        (
            (small_path, "--to", "int8", "--calibration", other),
            "input 'x' expects shape [batch, 16, 8, 8], got an array of shape [2, 4]",
        ),
        ((small_path, "--to", "int8", "--calibration", garbage), "not an npz file"),
        (
            (small_path, "--to", "fp16", "--metric", "top5"),
            "metric 'top5' scores labelled data, got no data: give data with labels",
        ),
        ((small_path, "--to", "fp16", "--data", unlabelled), "expected an array 'labels'"),
        ((small_path, "--to", "fp16", "--keep", "nowhere"), "layer nowhere: listed in keep, but not in the graph"),
        ((small_path, "--to", "fp16", "--provider", "tpu"), "unknown provider 'tpu'"),
        ((quantized, "--to", "int8", "--calibration", data), "already quantized"),
        ((quantized, "--to", "fp16"), "already quantized"),
        ((tmp_path / "h.onnx", "--to", "fp16"), "fp16 expects a model with float32 weights"),
        ((garbage, "--to", "fp16"), "g.onnx"),
        ((tmp_path / "none.onnx", "--to", "fp16"), "none.onnx"),
    ]
    for arguments, reason in cases:
        code, _, err = cli("quantize", *arguments, "-o", out, *QUICK)
        assert code == 2, arguments
        assert err.count("\n") == 1, err
        assert reason in err, err
    assert not out.exists()
    code, _, err = cli("quantize", small_path, "--to", "fp16", "-o", small_path, *QUICK)
    assert (code, "is also read, and would be lost" in err) == (2, True)
    assert not list(tmp_path.glob(".*"))
