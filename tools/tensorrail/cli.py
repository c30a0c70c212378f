"""`tensorrail`: the commands, and how an error ends.

Exit codes: 0 what was asked holds, 1 it was measured and falls short, 2 bad input, 3 a fault of tensorrail's own (with its
traceback), 130 interrupted.
"""

from __future__ import annotations

import functools
import io
import sys
import traceback
from contextlib import suppress
from typing import Annotated, Any, NoReturn

import typer

from tensorrail.commands import (
    accuracy,
    bench,
    check,
    compress,
    export,
    inspect,
    package,
    plan,
    quantize,
    regress,
    run,
    serve,
    train,
)
from tensorrail.extras import MissingExtraError, missing_extra
from tensorrail.show import plain

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (run, train, plan, compress, export, quantize, check, accuracy, bench, inspect, package, serve):
    app.command(command.__name__.rpartition(".")[2])(command.command)
app.add_typer(regress.app, name="regress")


def _show_versions(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("tensorrail", "onnxruntime-gpu", "onnxruntime", "onnx", "torch"):
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    print(", ".join(found))
    raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_versions, help="Show what is installed in one line."),
    ] = False,
) -> None:
    """Low-rank networks from training to ONNX Runtime: train, export, check, bench, regress."""


_INTERRUPTED = "interrupted; `tensorrail run … --resume` goes on from the last finished epoch"


def main() -> None:
    """Run the command line; an expected error is one line on stderr, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of another encoding shows `?` for a character that it lacks
            stream.reconfigure(errors="replace")
    try:
        # By itself typer would draw its errors as boxes, below two lines of usage.
        code = parser()(prog_name="tensorrail", standalone_mode=False) or 0
    except ModuleNotFoundError as error:
        if missing_extra(error) is None:
            _crash()
        _fail(str(MissingExtraError("this command", error)), 2)
    except OSError as error:
        _fail(f"{error.filename or 'file'}: {error.strerror or error}", 2)
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not look like a measurement that falls short
        if hasattr(error, "format_message"):  # typer's own, of a class that it does not export
            _fail_usage(error)
        if type(error).__name__ == "Abort":  # Ctrl-C, of older versions of typer
            _fail(_INTERRUPTED, 130)
        if not _is_expected(error):
            _crash()
        _fail(" ".join(str(error).split()), getattr(error, "exit_code", 2))
    if code == 130:
        _fail(_INTERRUPTED, 130)
    sys.exit(code)


@functools.cache
def parser() -> Any:  # of a class that typer does not export
    """Return the whole command line as it is parsed, made once: that takes longer than most commands that are refused."""
    return typer.main.get_command(app)


def _is_expected(error: Exception) -> bool:
    """Return whether tensorrail raised it on purpose; where its errors were never imported, it cannot have."""
    errors = sys.modules.get("tensorrail_runtime.errors")
    return errors is not None and isinstance(error, errors.TensorrailError)


def _fail_usage(error: Any) -> NoReturn:
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError" and context is not None:
        print(context.get_help(), file=sys.stderr)
        sys.exit(2)
    where = context.command_path if context is not None else "tensorrail"
    _fail(f"{' '.join(error.format_message().split()).removesuffix('.')}; see `{where} --help`", 2)


def _crash() -> NoReturn:
    traceback.print_exc()
    _fail("a fault of its own, not of the files that came: please report it with the lines above", 3)


def _fail(message: str, code: int) -> NoReturn:
    print(f"tensorrail: {plain(message)}", file=sys.stderr)
    sys.exit(code)
