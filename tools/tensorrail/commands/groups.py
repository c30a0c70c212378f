"""Options that belong together: each group is a function whose parameters are options and whose result is a settings object."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

_WRITTEN = ("out", "front", "json", "junit", "benchmark_json", "markdown", "annotations")
"""The names of the options whose files are written."""


@dataclass(frozen=True)
class Group:
    """A default value of a command's parameter: the options of `make` stand in the parameter's place."""

    make: Callable[..., Any]  # Any: the settings object of the group


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with the options of its groups as parameters of its own, as typer reads them."""
    own = _parameters(command)
    groups = {name: parameter.default for name, parameter in own.items() if isinstance(parameter.default, Group)}
    options = {name: _parameters(group.make) for name, group in groups.items()}

    @functools.wraps(command)
    def call(**given: Any) -> None:  # Any: the values of the options
        _require_utf8(given)
        _require_no_loss(given)
        for option, value in given.items():
            _require_number(option, value)
        made = {name: groups[name].make(**{option: given.pop(option) for option in options[name]}) for name in groups}
        command(**given, **made)

    parameters = []
    for name, parameter in own.items():
        parameters += list(options[name].values()) if name in groups else [parameter]
    keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    call.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined] # what typer reads
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in keyword_only} | {"return": None}
    del call.__wrapped__  # or the options would be read from the command itself
    return call


def _require_utf8(given: Mapping[str, Any]) -> None:  # Any: the values of the options
    """Raise `ModelError` for a name that is not valid UTF-8: neither ONNX Runtime nor a JSON file takes it."""
    texts = [text for value in given.values() for text in (value if isinstance(value, list) else [value])]
    for text in texts:
        if isinstance(text, Path | str) and any("\ud800" <= character <= "\udfff" for character in str(text)):
            from tensorrail_runtime.records import require_utf8

            require_utf8(text)


def _require_no_loss(given: Mapping[str, Any]) -> None:  # Any: the values of the options
    """Raise `ModelError` if a file that is to be written is read as well, and `UsageError` if it is written twice."""
    named = [(name, Path(given[name])) for name in _WRITTEN if given.get(name) is not None]
    if not named:
        return
    from tensorrail.front import front_files
    from tensorrail.inputs import require_writable
    from tensorrail_runtime.errors import UsageError
    from tensorrail_runtime.records import is_stream

    written = [(name, file) for name, path in named for file in (front_files(path) if name == "front" else (path,))]
    others = [value for name, value in given.items() if name not in _WRITTEN]
    read = [path for value in others for path in (value if isinstance(value, list) else [value])]
    known: dict[Path, str] = {}
    for name, path in written:
        option = f"--{name.replace('_', '-')}"
        if (other := known.setdefault(path.resolve(), option)) != option and not is_stream(path):
            raise UsageError(f"{other} and {option} write the same file, {path}: give each a file of its own")
        require_writable(path, *(value for value in read if isinstance(value, Path)), given.get("model"))


def _require_number(option: str, value: object) -> None:
    """Raise `UsageError` for a number that is NaN or infinite: no limit and no comparison holds or fails with it."""
    if isinstance(value, float) and not math.isfinite(value):
        from tensorrail_runtime.errors import UsageError

        raise UsageError(f"--{option.replace('_', '-')}: expected a finite number, got {value}")


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters with their annotations as objects; the returned class may be imported for type checkers only."""
    annotations = {name: text for name, text in function.__annotations__.items() if name != "return"}
    hints = get_type_hints(SimpleNamespace(__annotations__=annotations), function.__globals__, include_extras=True)
    parameters = inspect.signature(function).parameters
    return {name: parameter.replace(annotation=hints[name]) for name, parameter in parameters.items()}
