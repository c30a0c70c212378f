"""The history of a model's latency: what is added, what is refused, and the steps that are found."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from conftest import make_model
from onnx import helper

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.gate.history import Entry, add_entry, drawn, entry_of, history_of, read_entries
from tensorrail_runtime.gate.regress import record
from tensorrail_runtime.measure.timing import Conditions, Timing
from tensorrail_runtime.sessions.session import Session

QUICK = Conditions(Timing(seconds=0.05, processes=2))


def entries(times, model="m.onnx", machine="a, 2 cores", how="cpu, batch 1", versions=None):
    return [
        Entry(
            commit=f"{k:08x}",
            when=f"2026-01-01T00:00:{k:02}+00:00",
            model=model,
            machine=machine,
            how=how,
            onnxruntime=versions[k] if versions else "1.31.1",
            p50_ms=time,
        )
        for k, time in enumerate(times)
    ]


def noisy(rng, *parts):
    return np.concatenate([level * np.exp(0.006 * rng.standard_normal(count)) for level, count in parts])


def steps(times):
    (course,) = history_of(entries(times)).courses
    return [(step.commit, round(step.change, 2)) for step in course.steps]


def test_a_step_is_found_at_its_commit(rng):
    assert steps(noisy(rng, (10.0, 20), (10.6, 15))) == [("00000014", pytest.approx(0.06, abs=0.01))]
    assert [commit for commit, _ in steps(noisy(rng, (3.0, 9), (2.7, 9), (3.0, 9)))] == ["00000009", "00000012"]


def test_noise_and_single_disturbed_runs_are_no_steps(rng):
    alarms = sum(bool(steps(noisy(np.random.default_rng(seed), (1.0, 40)))) for seed in range(50))
    assert alarms <= 2
    times = noisy(rng, (1.0, 30))
    times[7] *= 2
    times[20] *= 1.5
    assert steps(times) == []


def test_a_step_of_few_runs_or_of_less_than_a_per_cent_is_none(rng):
    assert steps(noisy(rng, (1.0, 20), (1.5, 2))) == []
    assert steps([1.0] * 20 + [1.005] * 20) == []
    assert steps([1.0, 2.0]) == []


def test_a_step_names_the_onnx_runtime_that_made_it(rng):
    times = entries(noisy(rng, (1.0, 10), (1.1, 10)), versions=["1.30.0"] * 10 + ["1.31.1"] * 10)
    ((step,),) = (course.steps for course in history_of(times).courses)
    assert (step.place, step.onnxruntime) == (10, "1.31.1")


def test_what_the_inputs_are_tells_recordings_apart(small_path, tmp_path):
    recorded = record(small_path, tmp_path / "b.json", conditions=Conditions(Timing(seconds=0.05, processes=2)))
    assert entry_of(recorded).how == "cpu, default threads, batch 1"
    loops = recorded.model_copy(update={"constants": {"steps": 10.0}, "states": {"h": "hn"}, "on_data": True})
    assert entry_of(loops).how == "cpu, default threads, batch 1, steps=10.0, h from hn, on data"


def test_models_machines_and_settings_are_not_mixed(rng):
    first = entries(noisy(rng, (1.0, 10)))
    other = entries(noisy(rng, (5.0, 10)), machine="b, 64 cores")
    third = entries(noisy(rng, (2.0, 10)), model="n.onnx")
    fourth = entries(noisy(rng, (8.0, 10)), how="cpu, batch 8")
    mixed = [entry for row in zip(first, other, third, fourth, strict=True) for entry in row]
    courses = history_of(mixed).courses
    assert [(one.model, one.machine, one.how, len(one.entries), one.steps) for one in courses] == [
        ("m.onnx", "a, 2 cores", "cpu, batch 1", 10, ()),
        ("m.onnx", "b, 64 cores", "cpu, batch 1", 10, ()),
        ("n.onnx", "a, 2 cores", "cpu, batch 1", 10, ()),
        ("m.onnx", "a, 2 cores", "cpu, batch 8", 10, ()),
    ]


def test_entries_are_added_and_read(tmp_path):
    path, all_entries = tmp_path / "times.jsonl", entries([1.0, 2.0, 3.0])
    for entry in all_entries:
        add_entry(path, entry)
    assert read_entries(path) == tuple(all_entries)
    assert len(path.read_text().splitlines()) == 3
    path.write_text(path.read_text().rstrip("\n"))  # as some editors leave it
    add_entry(path, all_entries[0])
    assert len(read_entries(path)) == 4


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{}\n", r"not a history: line 1: .*commit"),
        (b"\xff\xfe", r"not a history: it is not a text file"),
        (b'{"commit": 1', r"not a history: line 1: "),
    ],
)
def test_another_file_is_not_added_to(text, reason, tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_bytes(text)
    with pytest.raises(ModelError, match=reason):
        add_entry(path, entries([1.0])[0])
    assert path.read_bytes() == text
    with pytest.raises(ModelError, match="cannot be read"):
        read_entries(tmp_path / "nowhere.jsonl")


def test_a_baseline_has_an_entry(tmp_path, monkeypatch):
    weights = {"w": np.eye(16, dtype=np.float32)}
    model = make_model([helper.make_node("MatMul", ["x", "w"], ["y"], "m")], weights, {"x": ["n", 16]}, {"y": ["n", 16]})
    onnx.save(model, tmp_path / "m.onnx")
    conditions = replace(QUICK, timing=replace(QUICK.timing, shapes={"x": (4, 16)}), settings=Session(threads=1))
    baseline = record(tmp_path / "m.onnx", tmp_path / "base.json", conditions=conditions)
    monkeypatch.setenv("GITHUB_SHA", "abcdef")
    entry = entry_of(baseline)
    assert (entry.commit, entry.model, entry.how) == ("abcdef", "m.onnx", "cpu, 1 threads, batch 1, x 4×16")
    assert entry.machine == f"{baseline.machine.processor}, {baseline.machine.cores} cores"
    assert min(map(min, baseline.processes)) <= entry.p50_ms <= max(map(max, baseline.processes))
    assert entry_of(baseline, "other").commit == "other"


def test_models_of_one_name_in_two_folders_are_told_apart(tmp_path, monkeypatch, in_this_process):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    weights = {"w": np.eye(4, dtype=np.float32)}
    model = make_model([helper.make_node("MatMul", ["x", "w"], ["y"], "m")], weights, {"x": ["n", 4]}, {"y": ["n", 4]})
    onnx.save(model, "a/m.onnx")
    baseline = record("a/m.onnx", "a/base.json", conditions=QUICK)
    (tmp_path / "a" / "link.onnx").symlink_to(tmp_path / "a" / "m.onnx")
    names = {path: entry_of(baseline, "one", path).model for path in ("a/m.onnx", "b/../b/m.onnx", "a/link.onnx", "../m.onnx")}
    assert list(names.values()) == ["a/m.onnx", "b/m.onnx", "a/link.onnx", "m.onnx"]
    assert entry_of(baseline, "one", tmp_path / "b" / "m.onnx").model == "b/m.onnx"


def test_the_picture_names_the_steps(rng):
    history = history_of(entries(noisy(rng, (1.0, 10), (1.2, 10)), model="$m$.onnx"))
    text = drawn(history)
    assert text.startswith("<?xml")
    assert "0000000a +" in text
    assert "$m$.onnx" in text
    assert "0000000a" in str(history)
