import numpy as np
import onnx
import pytest
from conftest import make_model
from onnx import helper, numpy_helper

from tensorrail_runtime import ModelError, accuracy, bench, open_session, parity
from tensorrail_runtime.latency import Latency, ratio


def changed(path, name, change):
    """Return a copy of the model whose initializer `name` went through `change`."""
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))
    other = path.with_name(f"changed-{name}.onnx")
    onnx.save(model, other)
    return other


def test_a_model_equals_itself(small_path):
    result = parity(small_path, small_path)
    assert result.holds
    assert result.worst == 0
    assert result.outputs[0].top1_agreement == 1
    assert result.batches == (1, 7)


def test_a_known_difference_is_measured(small_path, rng):
    x = {"x": rng.standard_normal((4, 16, 8, 8)).astype(np.float32)}
    other = changed(small_path, "fc.bias", lambda bias: bias + np.float32(0.5))
    result = parity(small_path, other, inputs=[x], tolerance=1e-4)
    output = result.outputs[0]
    y = open_session(small_path).run(None, x)[0]
    assert not result.holds
    assert output.max_abs == pytest.approx(0.5, rel=1e-4)
    assert output.mean_abs == pytest.approx(0.5, rel=1e-4)
    assert output.relative_l2 == pytest.approx(0.5 * np.sqrt(y.size) / np.linalg.norm(y), rel=1e-4)
    assert output.top1_agreement == 1  # the same shift for every class


def test_nan_outputs_and_other_signatures_are_refused(small_path, tmp_path, rng):
    with pytest.raises(ModelError, match="'y' holds NaN"):
        parity(small_path, changed(small_path, "fc.bias", lambda bias: bias * np.nan))
    node = helper.make_node("Relu", ["z"], ["y"])
    onnx.save(make_model([node], {}, {"z": ["n", 10]}, {"y": ["n", 10]}), tmp_path / "other.onnx")
    with pytest.raises(ModelError, match="the models differ in their inputs"):
        parity(small_path, tmp_path / "other.onnx")


def test_wrong_inputs_providers_and_files_are_refused(small_path, tmp_path):
    with pytest.raises(ModelError, match="inputs are x, and other came"):
        parity(small_path, small_path, inputs=[{"other": np.zeros(1)}])
    with pytest.raises(ModelError, match="cannot run the model on these inputs"):
        parity(small_path, small_path, inputs=[{"x": np.zeros((1, 2, 8, 8), np.float32)}])
    with pytest.raises(ModelError, match="unknown provider 'tpu': expected one of cpu, cuda"):
        open_session(small_path, provider="tpu")
    with pytest.raises(ModelError, match="ONNX Runtime cannot load it"):
        open_session(tmp_path / "none.onnx")


def test_accuracy_counts_right_answers(small_path, rng):
    images = rng.standard_normal((50, 16, 8, 8)).astype(np.float32)
    labels = open_session(small_path).run(None, {"x": images})[0].argmax(1)
    labels[:10] = (labels[:10] + 1) % 10
    result = accuracy(small_path, images, labels, batch=16)
    assert (result.correct, result.total, result.percent) == (40, 50, 80.0)
    with pytest.raises(ModelError, match="as many images as labels"):
        accuracy(small_path, images[:0], labels[:0])


def test_models_are_timed_in_turns(small_path):
    shares = []
    result = bench([small_path, small_path], seconds=0.2, labels=("a", "b"), on_round=shares.append)
    assert [latency.model for latency in result.latencies] == ["a", "b"]
    assert all(len(latency.samples) == result.rounds >= 20 for latency in result.latencies)
    assert all(latency.p50 <= latency.p90 for latency in result.latencies)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    with pytest.raises(ModelError, match="at least one model"):
        bench([])


def test_the_interval_of_a_ratio_covers_the_truth(rng):
    def latency(name, scale):
        samples = tuple(scale * np.exp(0.2 * rng.standard_normal(400)))
        return Latency(model=name, samples=samples, p50=float(np.median(samples)), p90=float(np.percentile(samples, 90)))

    found = [ratio(latency("a", 2.0), latency("b", 1.0), seed) for seed in range(40)]
    covered = sum(r.low <= 2.0 <= r.high for r in found)
    assert covered >= 32  # 95 % nominal; 32 of 40 or fewer would come up once in some 5,000 times
    assert all(1.8 < r.value < 2.2 for r in found)
