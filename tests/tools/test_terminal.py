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
