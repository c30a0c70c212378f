"""Temporary folders whose paths never appear in an error: a user has not seen these files."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tensorrail_runtime.errors import TensorrailError


@contextmanager
def scratch(prefix: str | None = None, beside: Path | None = None) -> Iterator[str]:
    """Yield a temporary folder; errors about a model in it name the model, such as `the dense model`, not its path.

    Args:
        prefix: how the folder's name starts; default: Python's own.
        beside: the folder that it is made in; default: that for temporary files.

    """
    with tempfile.TemporaryDirectory(prefix=prefix, dir=beside) as folder:
        try:
            yield folder
        except TensorrailError as error:
            pattern = re.compile(rf"{re.escape(folder)}/(?:[^/\s:,]+/)*([^/\s:,]+?)(?:\.onnx)?(?=[\s:,;')\"]|$)")
            message = pattern.sub(lambda found: f"the {Path(found[1]).name} model".replace("model model", "model"), str(error))
            if message != str(error):
                error.args = (message, *error.args[1:])
            raise
