"""Temporary folders whose paths never appear in an error: a user has not seen these files."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tensorrail_runtime.errors import TensorrailError

_left: dict[str, int] = {}
"""Folders that are not removed yet, with the process that made them."""


@contextmanager
def scratch(prefix: str | None = None, beside: Path | None = None) -> Iterator[str]:
    """Yield a temporary folder; errors about a model in it name the model, such as `the dense model`, not its path.

    Args:
        prefix: how the folder's name starts; default `tmp`.
        beside: the folder that it is made in; default: that for temporary files.

    """
    # A signal may arrive at any line: a folder is noted before it is there, and forgotten once it is gone.
    folder = str(Path(beside or tempfile.gettempdir()).absolute() / f"{prefix or 'tmp'}{os.urandom(8).hex()}")
    _left[folder] = os.getpid()
    try:
        Path(folder).mkdir(mode=0o700)
        yield folder
    except TensorrailError as error:
        pattern = re.compile(rf"{re.escape(folder)}/(?:[^/\s:,]+/)*([^/\s:,]+?)(?:\.onnx)?(?=[\s:,;')\"]|$)")
        message = pattern.sub(lambda found: f"the {Path(found[1]).name} model".replace("model model", "model"), str(error))
        if message != str(error):
            error.args = (message, *error.args[1:])
        raise
    finally:
        _remove(folder)


def _remove(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if not Path(folder).exists():
        _left.pop(folder, None)


@atexit.register
def _remove_all() -> None:
    """Remove the folders whose removal was interrupted."""
    for folder in [folder for folder, process in _left.items() if process == os.getpid()]:
        _remove(folder)
