"""How reports and progress look on a terminal, and in a log."""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from tensorrail_runtime.progress import Progress as Listener
    from tensorrail_runtime.tables import Part, PrintedRecord

_MINUTE = 60.0


@functools.cache
def console() -> Console:
    """Return the console; rich is imported when something is shown, which `--help` does without."""
    from rich.console import Console

    from tensorrail_runtime.tables import WIDTH

    class Continuing(Console):
        """A console whose command goes on, and ends with its own exit code, if the reader of a pipe has gone."""

        def on_broken_pipe(self) -> None:
            print_nowhere(sys.stdout)

    # Names come from files, which may be a stranger's: no mark-up is read in them.
    terminal = Continuing(markup=False, emoji=False)
    return terminal if terminal.is_terminal else Continuing(markup=False, emoji=False, width=WIDTH)


def print_nowhere(stream: TextIO) -> None:
    """Drop what is still printed to a stream whose reader has gone, such as `head` in `tensorrail … | head`."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def plain(text: str) -> str:
    """Return text without the characters that would steer a terminal.

    As `tensorrail_runtime.tables.plain`, whose package imports ONNX Runtime: that would slow down each error of usage, and an
    error that says that ONNX Runtime is missing could not be shown.
    """
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def say(text: str) -> None:
    """Print a line, whatever the names in it hold."""
    console().print(plain(text), soft_wrap=True)


def show(parts: Sequence[Part]) -> None:
    """Print the tables and lines of a report."""
    from tensorrail_runtime.tables import show as show_on

    show_on(parts, console())


def finish(
    report: PrintedRecord, json: Path | None, holds: bool = True, last: str = "", also: Callable[[], object] = lambda: None
) -> NoReturn:
    """Write a report as JSON where asked, print it and a last line, and end with exit code 0, or 1 where it does not hold.

    `also` writes further files. The report is printed even if a file cannot be written.
    """
    import typer

    try:
        if json is not None:
            report.save(json)
        also()
    finally:
        show(report.shown())
        if last:
            say(last)
    raise typer.Exit(0 if holds else 1)


@contextmanager
def progress_bar(*, stays: bool = False) -> Iterator[Listener]:
    """Yield a listener that shows progress: a bar with the time left on a terminal, lines elsewhere.

    Args:
        stays: bars stay on the terminal when their stage has ended.

    """
    if not console().is_terminal:
        with _Log() as log:
            yield log
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(24), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[detail]}", markup=False), console=console(), transient=not stays) as bars:
        yield _Bars(bars)


class _Bars:
    """One bar for each kind of stage; the first word of a stage is its kind."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, share: float, detail: str = "") -> None:
        if stage == "note":
            self.bars.print(plain(detail))
            return
        kind = stage.partition(" ")[0]
        if kind not in self.tasks:
            self.tasks[kind] = self.bars.add_task(plain(stage), total=1.0, detail="")
        self.bars.update(self.tasks[kind], description=plain(stage), completed=share, detail=plain(detail))


class _Log:
    """One line for each stage, and one a minute while a stage goes on, so that a log shows life."""

    def __init__(self) -> None:
        self.stage, self.text, self.printed = "", "", time.monotonic()
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.clock = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Log:
        self.clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.clock.join()

    def __call__(self, stage: str, share: float, detail: str = "") -> None:
        with self.lock:
            if stage == "note":
                self._print(detail)
                return
            self.text = f"{stage}, {100 * share:.0f} %" + (f": {detail}" if detail else "")
            if stage != self.stage:
                self.stage = stage
                self._print(f"{stage}  {detail}" if detail else stage)

    def _watch(self) -> None:
        while not self.ended.wait(1.0):
            with self.lock:
                if self.stage and time.monotonic() - self.printed >= _MINUTE:
                    self._print(self.text)

    def _print(self, text: str) -> None:
        try:
            print(plain(text), flush=True)
        except BrokenPipeError:
            print_nowhere(sys.stdout)
        self.printed = time.monotonic()
