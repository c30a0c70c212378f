"""What the command line prints on terminals that are not UTF-8."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_character_that_the_terminal_lacks_is_replaced(encoding, small_path):
    command = [sys.executable, "-m", "tensorrail"]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    options = {"capture_output": True, "env": environment}
    done = subprocess.run([*command, "inspect", str(small_path)], check=False, **options)
    assert (done.returncode, done.stderr) == (0, b"")
    printed = done.stdout.decode(encoding)
    assert ("1?16?8?8" if encoding == "ascii" else "1×16×8×8") in printed
    failed = subprocess.run([*command, "inspect", str(small_path.with_name("größe → 2.onnx"))], check=False, **options)
    assert failed.returncode == 2
    assert failed.stderr.decode(encoding).startswith("tensorrail: ")


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("inspect {model} --json {record}", 0),
        ("bench {model} {model} --duration 0.1 --processes 0 --min-speedup 100 --json {record}", 1),
        ("inspect none.onnx", 2),
        ("--help", 141),
        ("--version", 141),
    ],
)
def test_a_reader_that_has_gone_changes_no_result(words, code, small_path, tmp_path):
    record = tmp_path / "record.json"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        command = [sys.executable, "-m", "tensorrail", *words.format(model=small_path, record=record).split()]
        both = code == 2  # the reason is printed to stderr
        done = subprocess.run(command, stdout=closed, stderr=closed if both else subprocess.PIPE, check=False)
    assert done.returncode == code, done.stderr
    assert not done.stderr
    assert record.exists() == ("{record}" in words)
