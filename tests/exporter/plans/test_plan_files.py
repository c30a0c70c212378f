import numpy as np
import pytest

from tensorrail_exporter import GraphError, LayerPlan, Plan, PlanError, load_cores, save_cores
from tensorrail_exporter.graphs.io import load_model

LAYER = LayerPlan(name="a.b", format="tt", modes=(4, 6), ranks=(1, 2, 1))


def test_plan_survives_its_file(tmp_path):
    plan = Plan(layers=(LAYER,))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"version": 2, "layers": []}', "version: expected 1, got 2"),
        ('{"version": 1, "layers": [], "more": 1}', "more: unknown key"),
        ('{"version": 1}', "layers: required"),
        ("{", "Invalid JSON"),
        ('{"layers": [{"name": "a", "format": "qq", "modes": [2], "ranks": [1, 1]}]}', "expected one of .*tt"),
        ('{"layers": [{"name": "a", "format": "tt", "modes": ["2"], "ranks": [1, 1]}]}', "layers.0.modes.0"),
    ],
)
def test_a_bad_plan_says_its_key(tmp_path, text, reason):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=f"(?i){path.name}: .*{reason}"):
        Plan.load(path)


def test_a_layer_planned_twice_is_refused():
    with pytest.raises(ValueError, match=r"'a\.b' appears 2 times"):
        Plan(layers=(LAYER, LAYER))


def test_cores_survive_their_file(tmp_path, rng):
    cores = {"a.b": [rng.standard_normal((1, 4, 2)), rng.standard_normal((2, 6, 1))]}
    save_cores(tmp_path / "c.safetensors", cores)
    again = load_cores(tmp_path / "c.safetensors", Plan(layers=(LAYER,)))
    for one, other in zip(cores["a.b"], again["a.b"], strict=True):
        np.testing.assert_array_equal(one, other)


def test_cores_of_other_layers_and_truncated_files_are_refused(tmp_path, rng):
    path = tmp_path / "c.safetensors"
    save_cores(path, {"other": [rng.standard_normal((1, 4, 1))]})
    with pytest.raises(PlanError, match=r"no cores for the planned layer 'a.b'; the file holds cores for other"):
        load_cores(path, Plan(layers=(LAYER,)))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(PlanError, match="not a readable safetensors file"):
        load_cores(path, Plan(layers=(LAYER,)))


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x09"])
def test_a_file_that_is_no_model_is_refused(tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(GraphError, match=r"m\.onnx: "):
        load_model(path)


@pytest.mark.parametrize("ending", ["json", "onnxtxt", "textproto", "bin"])
def test_a_model_is_read_whatever_its_file_is_called(small_model, tmp_path, ending):
    path = tmp_path / f"m.{ending}"
    path.write_bytes(small_model.SerializeToString())
    assert load_model(path) == small_model
    path.write_text('{"a": 1}')
    with pytest.raises(GraphError, match=rf"m\.{ending}: not an ONNX model"):
        load_model(path)
