"""What every record shares: strictness, one-line errors, and files that are written whole or not at all."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

_STREAM = re.compile(r"/dev/(stdout|stderr|fd/\d+)|/proc/(self|\d+)/fd/\d+")


class Record(BaseModel):
    """A frozen record that refuses unknown keys by name and writes itself as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def save(self, path: Path | str) -> None:
        """Write the record as JSON."""
        write_text(path, self.model_dump_json(indent=1) + "\n")


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write a file under a temporary name and rename it, so that no half-written file is ever seen under `path`.

    A pipe or a device, such as /dev/stdout, gets the bytes themselves.
    """
    path = Path(path)
    if _STREAM.fullmatch(str(path)) or (path.exists() and not path.is_file() and not path.is_dir()):
        with path.open("ab") as stream:  # a pipe or a device is written to: a file in its place would take it away
            stream.write(data)
        return
    path = path.resolve()  # a link stays one
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # the name that was asked for, not the temporary one
        raise
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write a text file whole or not at all."""
    write_bytes(path, text.encode())


def first_problem(error: ValidationError) -> str:
    """Return the first problem of a pydantic error as one line: the key, what was expected and what was found."""
    problem = error.errors(include_url=False)[0]
    key = ".".join(map(str, problem["loc"])) or "the file"
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; check its spelling or remove it"
    if problem["type"] == "missing":
        return f"{key}: required but missing"
    got = "" if problem["type"].startswith(("json_invalid", "value_error")) else f", got {problem['input']!r:.80}"
    message = problem["msg"].removeprefix("Value error, ")
    if message.startswith("Input should be "):
        expected = message.removeprefix("Input should be ")
        return f"{key}: expected {'a value ' * expected.startswith(('greater', 'less'))}{expected}{got}"
    return f"{key}: {message[:1].lower()}{message[1:]}{got}"
