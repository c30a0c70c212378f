"""Calling a function in a fresh process: its own memory, its own load of the libraries, nothing warm."""

from __future__ import annotations

import json
import subprocess
import sys

from tensorrail_runtime.errors import ModelError

_START = (
    "import sys, json, importlib\n"
    "name, function = sys.argv[1].split(':')\n"
    "from tensorrail_runtime.sessions.session import ModelError\n"
    "try:\n"
    "    print(getattr(importlib.import_module(name), function)(json.load(sys.stdin)))\n"
    "except ModelError as error:\n"
    "    sys.exit('ModelError: ' + str(error))\n"
)


def fresh(function: str, request: object) -> str:
    """Return what `module:function` of this package returns for a JSON value; its `ModelError` is raised here.

    Nothing is imported from the current folder, which may hold a stranger's files.
    """
    command = [sys.executable, "-P", "-c", _START, function]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)  # noqa: S603 - ours
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(last.removeprefix("ModelError: "))
    return done.stdout
