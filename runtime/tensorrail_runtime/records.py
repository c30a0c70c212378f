"""The base class of all records, files that are written completely or not at all, and one-line validation errors."""

from __future__ import annotations

import os
import re
import secrets
from difflib import get_close_matches
from pathlib import Path
from reprlib import Repr

from pydantic import BaseModel, ConfigDict, ValidationError

from tensorrail_runtime.errors import ModelError

_SHORT = Repr()  # of a value in a message: one that refers to itself many times would take hours to write out
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200
_SHORT.maxlevel = 3
_STREAM = re.compile(r"/dev/(stdout|stderr|fd/\d+)|/proc/(self|\d+)/fd/\d+")


class Record(BaseModel):
    """An immutable record that rejects unknown keys and can be written as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def save(self, path: Path | str) -> None:
        """Write the record to a file as JSON."""
        write_text(path, self.model_dump_json(indent=1) + "\n")


def require_utf8(path: Path | str) -> None:
    """Raise `ModelError` for the name of a file that is not valid UTF-8, which ONNX Runtime cannot open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = str(path).encode(errors="surrogateescape").decode(errors="replace")
        raise ModelError(f"{shown}: the name is not valid UTF-8, which ONNX Runtime cannot open: rename the file") from None


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write a file under a temporary name and rename it, so that `path` never shows a partly written file.

    The bytes are written directly to a pipe or a device, such as /dev/stdout.

    Args:
        path: the file, in an existing folder; a file that exists is replaced.
        data: the content.

    Raises:
        OSError: the file cannot be written; the error has the name `path`.

    """
    path = Path(path)
    if is_stream(path):
        try:
            with path.open("ab") as stream:  # renaming would replace the pipe or device by a file
                stream.write(data)
        except OSError as error:
            error.filename = str(path)
            raise
        return
    path = path.resolve()  # so that a link stays a link
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # the caller's name, not the temporary one
        raise
    finally:
        temporary.unlink(missing_ok=True)


def is_stream(path: Path) -> bool:
    """Return whether a path is a pipe or a device, such as /dev/stdout, also where that is a file at present."""
    return bool(_STREAM.fullmatch(str(path))) or (path.exists() and not path.is_file() and not path.is_dir())


def write_text(path: Path | str, text: str) -> None:
    """Write a text file completely or not at all, as UTF-8."""
    write_bytes(path, text.encode())


def first_problem(error: ValidationError) -> str:
    """Return the first problem of a validation error in one line.

    Args:
        error: the error of pydantic.

    Returns:
        The key, what was expected and what was found, such as `seed: expected a valid integer, got 'one'`.

    """
    problems = error.errors(include_url=False)
    problem = problems[0]
    if problem["type"] == "json_invalid":
        return problem["msg"][:1].lower() + problem["msg"][1:]
    if problem["type"] == "missing":
        *folder, name = problem["loc"]
        for other in problems:  # the key may be there, misspelled
            *place, unknown = other["loc"]
            if other["type"] == "extra_forbidden" and place == folder and get_close_matches(str(unknown), [str(name)]):
                return f"{'.'.join(map(str, other['loc']))}: unknown key; did you mean {name!r}?"
    key = ".".join(map(str, problem["loc"])) or "the file"
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; check its spelling or remove it"
    if problem["type"] == "missing":
        return f"{key}: required but missing"
    got = "" if problem["type"].startswith(("json_invalid", "value_error")) else f", got {_SHORT.repr(problem['input']):.80}"
    message = problem["msg"].removeprefix("Value error, ")
    if message.startswith("Input should be "):
        expected = message.removeprefix("Input should be ")
        return f"{key}: expected {'a value ' * expected.startswith(('greater', 'less'))}{expected}{got}"
    return f"{key}: {message[:1].lower()}{message[1:]}{got}"
