"""`tensorrail`: the commands, and how an error ends.

Exit codes: 0 what was asked holds, 1 it was measured and falls short, 2 bad input, 3 a fault of tensorrail's own (with its
traceback), 130 interrupted.
"""

from __future__ import annotations

import functools
import importlib
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


# The errors that mean bad input, by the module that defines them: modules not imported cannot have raised.
_BAD_INPUT = {
    "tensorrail_exporter.errors": ("PlanError", "GraphError", "TargetError"),
    "tensorrail_trainer.recipe": ("RecipeError",),
    "tensorrail_trainer.loop": ("TrainingError",),
    "tensorrail_trainer.checkpoints": ("CheckpointError",),
    "tensorrail_trainer.data": ("DataError",),
    "tensorrail_trainer.weights": ("WeightsError",),
    "tensorrail_runtime.session": ("ModelError",),
}
_INTERRUPTED = "interrupted; `tensorrail run … --resume` goes on from the last finished epoch"
# The modules of the extras other than `train`.
_EXTRAS = {
    "export": ("onnx_graphsurgeon", "safetensors", "tensorly"),
    "serve": ("fastapi", "prometheus_client", "ray", "starlette", "uvicorn"),
}


def main() -> None:
    """Run the command line; an expected error is one line on stderr, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of another encoding shows `?` for a character that it lacks
            stream.reconfigure(errors="replace")
    try:
        # By itself typer would draw its errors as boxes, below two lines of usage.
        code = parser()(prog_name="tensorrail", standalone_mode=False) or 0
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("tensorrail_exporter", "tensorrail_trainer"):
            _crash()
        extra = next((name for name, modules in _EXTRAS.items() if missing in modules), "train")
        _fail(f"this command needs {missing}: pip install 'tensorrail[{extra}]'", 2)
    except OSError as error:
        _fail(f"{error.filename or 'file'}: {error.strerror or error}", 2)
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not look like a measurement that falls short
        if hasattr(error, "format_message"):  # typer's own, of a class that it does not export
            _fail_usage(error)
        if type(error).__name__ == "Abort":  # Ctrl-C, of older versions of typer
            _fail(_INTERRUPTED, 130)
        if not isinstance(error, _known_errors()):
            _crash()
        _fail(" ".join(str(error).split()), getattr(error, "exit_code", 2))
    if code == 130:
        _fail(_INTERRUPTED, 130)
    sys.exit(code)


@functools.cache
def parser() -> Any:  # of a class that typer does not export
    """Return the whole command line as it is parsed, made once: that takes longer than most commands that are refused."""
    return typer.main.get_command(app)


def _known_errors() -> tuple[type[Exception], ...]:
    loaded = [(importlib.import_module(name), names) for name, names in _BAD_INPUT.items() if name in sys.modules]
    return tuple(getattr(module, name) for module, names in loaded for name in names)


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
