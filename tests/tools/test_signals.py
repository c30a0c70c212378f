"""A command that is told to stop removes its temporary copies of models and writes nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest


@pytest.fixture
def heeded():
    """Have Ctrl-C heeded: a shell starts what runs in the background with that signal ignored, which processes inherit."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded")
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGINT, 130, id="Ctrl-C", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, id="SIGTERM"),
    ],
)
def test_a_stopped_command_leaves_nothing_behind(number, code, small_path, tmp_path):
    temporary, out = tmp_path / "temporary", tmp_path / "out.onnx"
    temporary.mkdir()
    options = ("--target", "params=1.5", "--allow-slower", "--seconds", "300", "--cache", tmp_path / "cache")
    command = [sys.executable, "-m", "tensorrail", "compress", small_path, "-o", out, *options]
    with subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(temporary)},
    ) as process:
        lines = iter(process.stdout.readline, "")
        assert any(line.startswith("timing layers") for line in lines)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert errors.startswith("tensorrail: interrupted")
    assert errors.count("\n") == 1
    assert list(temporary.iterdir()) == []
    assert not out.exists()
