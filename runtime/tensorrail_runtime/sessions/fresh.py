"""Runs a function in a fresh process, which has its own memory, loads the libraries itself and has no warm caches."""

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
    """Run a function of this package in a fresh process and return its result.

    Nothing is imported from the current folder, which may contain untrusted files.

    Args:
        function: `module:function`; the function takes the request and returns a string.
        request: the argument, a JSON value.

    Returns:
        The string that the function returned.

    Raises:
        ModelError: the function raised it, or the process failed.

    """
    command = [sys.executable, "-P", "-c", _START, function]
    completed = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    if completed.returncode:
        last_line = (completed.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(last_line.removeprefix("ModelError: "))
    return completed.stdout
