"""Runs a function in a fresh process, which has its own memory, loads the libraries itself and has no warm caches."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tensorrail_runtime.errors import ModelError

_KILLED = 9  # the signal by which Linux ends a process when memory runs out; Windows has no name for it
_NAMED = 3  # models in an error message

_ANSWER = "tensorrail-answer:"
_START = (
    "import os, sys, json, importlib\n"
    "answer = os.fdopen(os.dup(1), 'w', encoding='utf-8')\n"  # what else is printed, such as by a module, goes to stderr
    "os.dup2(2, 1)\n"
    "answer.write('\\n' + sys.argv[2])\n"  # before it, modules that Python loads at its start may have printed
    "name, function = sys.argv[1].split(':')\n"
    "from tensorrail_runtime.sessions.session import ModelError\n"
    "try:\n"
    "    answer.write(getattr(importlib.import_module(name), function)(json.load(sys.stdin)))\n"
    "    answer.close()\n"
    "except ModelError as error:\n"
    "    sys.exit('ModelError: ' + str(error))\n"
)


def fresh(function: str, request: object, models: Sequence[Path | str] = ()) -> str:
    """Run a function of this package in a fresh process and return its result.

    Nothing is imported from the current folder, which may contain untrusted files.

    Args:
        function: `module:function`; the function takes the request and returns a string.
        request: the argument, a JSON value.
        models: the models that the process runs, for error messages.

    Returns:
        The string that the function returned.

    Raises:
        ModelError: the function raised it, or the process failed.

    """
    command = [sys.executable, "-P", "-c", _START, function, _ANSWER]
    completed = subprocess.run(  # noqa: S603 - our own command
        command, input=json.dumps(request), capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if completed.returncode:
        lines = completed.stderr.strip().splitlines()
        if completed.returncode < 0 or not lines:
            raise ModelError(f"the fresh process{_running(models)} {_ending(completed.returncode, lines)}")
        raise ModelError(lines[-1].removeprefix("ModelError: "))
    return completed.stdout.partition("\n" + _ANSWER)[2]


def _running(models: Sequence[Path | str]) -> str:
    """Return which models a process ran, as text that follows a noun; empty where it is not known."""
    others = f" and {len(models) - _NAMED} others" if len(models) > _NAMED else ""
    return f" that ran {', '.join(map(str, models[:_NAMED]))}{others}" if models else ""


def _ending(code: int, lines: Sequence[str]) -> str:
    """Return how a process ended, in words, and what may help.

    Args:
        code: the exit code as `subprocess` gives it, negative for a signal.
        lines: what it wrote to stderr.

    """
    if code >= 0:
        return f"ended with exit code {code} and no message"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal
        name = "unknown"
    if -code == _KILLED:
        return f"was ended by signal {-code} ({name}), out of memory? Use a smaller batch, or close other programs"
    return f"was ended by signal {-code} ({name}){f': {lines[-1]}' if lines else ''}"
