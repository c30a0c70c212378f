"""Files that are read are never written over: models, their external data, calibration inputs, plans and recipes."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest

import tensorrail as tr
from tensorrail.inputs import require_writable
from tensorrail_exporter.graphs import io


@pytest.fixture
def stored(small_model, tmp_path):
    """Return a model with external data, its data file, a plan for it, and inputs in a folder."""
    path = tmp_path / "m.onnx"
    onnx.save_model(small_model, path, save_as_external_data=True, location="w.data", size_threshold=16)
    plan = {"version": 1, "layers": [{"name": "fc", "format": "svd", "modes": [10, 32], "ranks": [2]}]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "inputs").mkdir()
    np.savez(tmp_path / "inputs" / "x.npz", x=np.random.default_rng(0).standard_normal((8, 16, 8, 8)).astype(np.float32))
    return path


COMMANDS = [
    "export m.onnx --plan plan.json -o {}",
    "export m.onnx --plan plan.json -o o.onnx --json {}",
    "quantize m.onnx --to fp16 -o {}",
    "quantize m.onnx --to int8 --calibration inputs -o {}",
    "compress m.onnx --target params=2 -o {}",
    "compress m.onnx --target params=2 -o o.onnx --also fp16 --json {}",
    "plan m.onnx --target params=2 -o {}",
    "plan m.onnx --target params=2 --json {}",
    "inspect m.onnx --json {}",
    "check m.onnx m.onnx --json {}",
    "bench m.onnx m.onnx --json {}",
    "accuracy m.onnx --data inputs --json {}",
    "regress record m.onnx -o {}",
    "regress check m.onnx m.onnx --junit {}",
    "regress check m.onnx m.onnx --markdown {}",
    "package m.onnx --triton repository --json {}",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_external_data_are_not_written_over(command, stored, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "w.data").read_bytes()
    for written in ("w.data", f"../{tmp_path.name}/w.data", "link"):
        if written == "link" and not (tmp_path / "link").exists():
            (tmp_path / "link").symlink_to("w.data")
        code, _, err = cli(*command.format(written).split())
        assert (code, "is also read, as external data of m.onnx, and would be lost" in err) == (2, True), err
    assert (tmp_path / "w.data").read_bytes() == before
    assert not (tmp_path / "o.onnx").exists()


def test_other_files_that_are_read_are_not_written_over(stored, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("name: x\nmodel: {name: resnet18, weights: m.onnx}\n")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for command, reason in (
        ("quantize m.onnx --to int8 --calibration inputs -o inputs/x.npz", "as a file of inputs"),
        ("check m.onnx m.onnx --data inputs/x.npz --json inputs/x.npz", "is also read, and would be lost"),
        ("export m.onnx --plan plan.json -o o.onnx --json plan.json", "is also read, and would be lost"),
        ("inspect m.onnx --json m.onnx", "expected the name of a JSON file"),
        ("run recipe.yaml --json recipe.yaml", "is also read, and would be lost"),
        ("export m.onnx --plan plan.json -o o.json --json o.json", "--out and --json write the same file"),
    ):
        code, _, err = cli(*command.split())
        assert (code, reason in err) == (2, True), err
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_folder_that_may_not_be_written_to_is_told_before_any_work(stored, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    closed = tmp_path / "closed"
    closed.mkdir()
    (closed / "times.jsonl").write_text("")
    (tmp_path / "link.onnx").symlink_to(closed / "o.onnx")
    closed.chmod(0o500)
    access = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == closed and mode & os.W_OK) and access(path, mode))
    try:
        for command in (
            "quantize m.onnx --to fp16 -o closed/o.onnx",
            "quantize m.onnx --to fp16 -o link.onnx",
            "inspect m.onnx --json closed/o.json",
            "regress record m.onnx -o base.json --history closed/new.jsonl",
        ):
            code, _, err = cli(*command.split())
            assert (code, f"cannot be written: no permission to write to {closed}; expected" in err) == (2, True), err
        (tmp_path / "lost.onnx").symlink_to(tmp_path / "none" / "o.onnx")
        with pytest.raises(tr.ModelError, match=r"lost.onnx: cannot be written: the folder .*none does not exist"):
            tr.quantize(stored, "lost.onnx", "fp16")
        require_writable(closed / "times.jsonl", append=True)  # nothing new comes into its folder
        assert cli("inspect", "m.onnx", "--json", "/dev/null")[0] == 0
    finally:
        closed.chmod(0o700)
    assert [file.name for file in closed.iterdir()] == ["times.jsonl"]
    assert not (tmp_path / "base.json").exists()


def test_functions_protect_external_data_as_commands_do(stored, tmp_path):
    before = (tmp_path / "w.data").read_bytes()
    data = tmp_path / "w.data"
    for write in (
        lambda: tr.export(stored, data, tmp_path / "plan.json"),
        lambda: tr.quantize(stored, data, "fp16"),
        lambda: tr.compress(stored, data, {"params": 2}),
        lambda: tr.regress.record(stored, data),
    ):
        with pytest.raises(tr.ModelError, match=r"is also read, as external data of .*m\.onnx, and would be lost"):
            write()
    assert data.read_bytes() == before


def test_a_file_beside_a_model_may_be_written(stored, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o.onnx").write_bytes(b"old")
    for _ in range(2):  # once as new files, once over them
        code, _, err = cli("export", "m.onnx", "--plan", "plan.json", "-o", "o.onnx", "--json", "o.json")
        assert code == 0, err
        code, _, err = cli("check", "m.onnx", "m.onnx", "--data", ".", "--json", "o.json")
        assert code == 0, err


def test_data_of_a_large_model_leave_those_of_a_renamed_one_alone(small_model, tmp_path, monkeypatch):
    monkeypatch.setattr(io, "_LARGEST_FILE", 1)
    tr.save_model(small_model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx.data").exists()
    shutil.copy(tmp_path / "model.onnx", tmp_path / "renamed")  # no ending: what a file holds counts
    renamed = tr.load_model(tmp_path / "renamed")
    for tensor in small_model.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(0 * onnx.numpy_helper.to_array(tensor), tensor.name))
    for number in (2, 3):  # a file that a model reads is never overwritten, also not its own
        tr.save_model(small_model, tmp_path / "model.onnx")
        files = sorted(file.name for file in tmp_path.iterdir())
        assert files == ["model.onnx", f"model.onnx.{number}.data", "model.onnx.data", "renamed"]
    assert tr.load_model(tmp_path / "renamed") == renamed
    assert not onnx.numpy_helper.to_array(tr.load_model(tmp_path / "model.onnx").graph.initializer[0]).any()


def test_data_of_a_large_model_in_another_folder_are_refused_first(small_model, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    onnx.save_model(small_model, tmp_path / "m.onnx", save_as_external_data=True, location="w.data", size_threshold=16)
    shutil.move(tmp_path / "w.data", tmp_path / "sub" / "o.onnx.data")
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "sub/o.onnx.data" if entry.key == "location" else entry.value
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    monkeypatch.setattr("tensorrail.inputs._LARGE", 1)
    with pytest.raises(tr.ModelError, match=r"would be written to o\.onnx\.data .* and .*m\.onnx reads them there"):
        tr.quantize(tmp_path / "m.onnx", tmp_path / "sub" / "o.onnx", "fp16")


def test_a_model_in_the_repository_that_is_replaced_is_refused(small_path, tmp_path):
    tr.package(small_path, tmp_path / "repository", contents=tr.Repository(name="m"))
    inside = tmp_path / "repository" / "m" / "1" / "model.onnx"
    with pytest.raises(tr.ModelError, match="which is read and would be lost"):
        tr.package(inside, tmp_path / "repository", contents=tr.Repository(name="m", overwrite=True))
    assert inside.exists()


def test_a_model_goes_into_a_pipe(cli, small_path, tmp_path):
    plan, pipe, read = tmp_path / "plan.json", tmp_path / "pipe", []
    tr.Plan(layers=(tr.LayerPlan(name="fc", format="svd", modes=(10, 32), ranks=(2,)),)).save(plan)
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    code, _, message = cli("export", small_path, "--plan", plan, "-o", pipe)
    reader.join(30)
    assert (code, reader.is_alive()) == (0, False), message
    assert len(onnx.load_from_string(read[0]).graph.node) > len(onnx.load(small_path).graph.node)
    code, _, message = cli("quantize", small_path, "--to", "fp16", "-o", pipe)
    assert (code, "expected a file, got a pipe or device" in message) == (2, True)


def test_data_of_a_large_model_go_when_a_small_one_replaces_it(small_model, tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    with monkeypatch.context() as limited:
        limited.setattr(io, "_LARGEST_FILE", 2000)
        io.save_model(small_model, path)
    assert (tmp_path / "m.onnx.data").exists()
    io.save_model(small_model, path)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
