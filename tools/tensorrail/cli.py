"""`tensorrail`: the commands, and how an error ends.

Exit codes: 0 what was asked for holds, 1 it was measured and does not hold, 2 bad input, 3 internal error (with its traceback),
130 interrupted by Ctrl-C, 141 the reader of its output has gone before there was a result, 143 stopped by SIGTERM.
"""

from __future__ import annotations

import functools
import io
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
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
from tensorrail.terminal import plain, print_nowhere

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich takes longer to import than all else
)
for command in (run, train, plan, compress, export, quantize, check, accuracy, bench, inspect, package, serve):
    app.command(command.__name__.rpartition(".")[2])(command.command)
app.add_typer(regress.app, name="regress")


def _show_versions(asked: bool) -> None:
    if not asked:
        return
    from importlib.metadata import PackageNotFoundError, version

    versions = []
    for name in ("tensorrail", "onnxruntime-gpu", "onnxruntime", "onnx", "torch"):
        with suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    print(", ".join(versions), flush=True)
    raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_versions, help="Show the installed versions in one line."),
    ] = False,
) -> None:
    """Low-rank networks from training to ONNX Runtime: train, export, check, bench, regress."""


_PACKAGES = ("tensorrail", "tensorrail_runtime", "tensorrail_exporter", "tensorrail_trainer")
_LOOP = "Symlink loop from "
_RESUMABLE = ("run", "train")  # commands that continue from the last finished epoch


class _Terminated(BaseException):
    """SIGTERM: raised, so that temporary copies of models are removed as after Ctrl-C."""


def _terminate(*_: object) -> NoReturn:
    raise _Terminated


def main() -> None:
    """Run the command line; an expected error is one line on stderr, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of another encoding shows `?` for a character that it lacks
            stream.reconfigure(errors="replace")
    with suppress(ValueError):  # in a thread that is not the main one
        signal.signal(signal.SIGTERM, _terminate)
    try:
        # By itself typer would draw its errors as boxes, below two lines of usage.
        code = parser()(prog_name="tensorrail", standalone_mode=False) or 0
    except (Exception, SystemExit, _Terminated) as error:  # noqa: BLE001 - it must not look like a measurement that falls short
        _end(error)
    if code == 130:
        _fail(_interrupted(), 130)
    sys.exit(code)


def _end(error: BaseException) -> NoReturn:
    """End the program as an error asks for."""
    if isinstance(error, _Terminated):
        _fail(_interrupted(), 143)
    if isinstance(error, ModuleNotFoundError):
        if missing_extra(error) is None:
            _crash()
        _fail(str(MissingExtraError("this command", error)), 2)
    if isinstance(error, OSError):
        _fail(f"{error.filename or 'file'}: {error.strerror or error}", 2)
    if isinstance(error, RuntimeError) and str(error).startswith(_LOOP):  # of Path.resolve
        _fail(f"{str(error).removeprefix(_LOOP)}: a link that leads to itself; expected a file or a folder", 2)
    if hasattr(error, "format_message"):  # typer's own, of a class that it does not export
        _fail_usage(error)
    if type(error).__name__ == "Abort":  # Ctrl-C, of older versions of typer
        _fail(_interrupted(), 130)
    if _is_expected(error):
        _fail(" ".join(str(error).split()), getattr(error, "exit_code", 2))
    if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):  # how typer answers it
        sys.exit(141)
    place = _own_code(error)
    if isinstance(error, SystemExit):
        if place:
            _fail(f"{place} ended the program with exit code {error.code}", 2)
        raise error
    if place:
        _fail(f"{place} failed ({type(error).__name__}: {' '.join(str(error).split())})", 2)
    _crash()


def _interrupted() -> str:
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    how = f"; `tensorrail {command} … --resume` continues from the last finished epoch" if command in _RESUMABLE else ""
    return f"interrupted{how}"


@functools.cache
def parser() -> Any:  # of a class that typer does not export
    """Return the whole command line as it is parsed, made once: that takes longer than most commands that are refused."""
    return typer.main.get_command(app)


def _is_expected(error: BaseException) -> bool:
    """Return whether tensorrail raised it on purpose; where its errors were never imported, it cannot have."""
    errors = sys.modules.get("tensorrail_runtime.errors")
    return errors is not None and isinstance(error, errors.TensorrailError)


def _own_code(error: BaseException) -> str:
    """Return where code of the user raised an error, or called what raised it; empty if none took part."""
    packages = [Path(module.__file__).parent for name, module in sys.modules.items() if name in _PACKAGES and module.__file__]
    known = [Path(sys.prefix), Path(sys.base_prefix), *packages]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename).absolute()
        if file.is_file() and not any(file.is_relative_to(folder) for folder in known):
            return f"{frame.filename}, line {frame.lineno}, in {frame.name}:"
    return ""


def _fail_usage(error: Any) -> NoReturn:
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError" and context is not None:
        _tell(context.get_help())
        sys.exit(2)
    where = context.command_path if context is not None else "tensorrail"
    _fail(f"{' '.join(error.format_message().split()).removesuffix('.')}; see `{where} --help`", 2)


def _crash() -> NoReturn:
    _tell(traceback.format_exc().rstrip())
    _fail("internal error, not caused by your input; please report it with the lines above", 3)


def _fail(message: str, code: int) -> NoReturn:
    _tell(f"tensorrail: {plain(message)}")
    sys.exit(code)


def _tell(text: str) -> None:
    """Print to stderr; where its reader has gone, the exit code stays what it is."""
    try:
        print(text, file=sys.stderr)
    except BrokenPipeError:
        print_nowhere(sys.stderr)
