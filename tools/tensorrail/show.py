"""How tables and progress look on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from tensorrail_trainer.run.pipeline import Progress as Listener
    from tensorrail_trainer.training.epochs import Epoch

# Names come from files, which may be a stranger's: no mark-up is read in them.
console = Console(markup=False, emoji=False)
if not console.is_terminal:
    console = Console(markup=False, emoji=False, width=160)  # a file or a pipe has no width of its own: room for whole cells


def say(text: str) -> None:
    """Print a line, whatever the names in it hold."""
    console.print(plain(text), soft_wrap=True)


def plain(text: str) -> str:
    """Return text without the characters that would steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print one table; numbers stand to the right, names to the left."""
    made = Table(title=plain(title), title_justify="left", header_style="bold")
    for index, name in enumerate(head):
        made.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*map(plain, row))
    console.print(made)


@contextmanager
def bar(what: str) -> Iterator[Callable[[float], None]]:
    """Show one bar with the time left while something runs; the function yielded is told the share that is done."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(40), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        task = bars.add_task(what, total=1.0)
        yield lambda share: bars.update(task, completed=share)


@contextmanager
def stages() -> Iterator[Callable[[str, float], None]]:
    """Show one bar that says what is being done; the function yielded is told the stage and the share of it that is done."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(30), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        task = bars.add_task("", total=1.0)
        kind = ""

        def update(stage: str, share: float) -> None:
            nonlocal kind
            if stage.partition(" ")[0] != kind:
                kind = stage.partition(" ")[0]
                bars.reset(task)
            bars.update(task, description=f"{plain(stage):<48.48}", completed=share)

        yield update


@contextmanager
def progress(shown: bool = True) -> Iterator[Listener]:
    """Show one bar a phase with epoch, loss, accuracy, residual and the time left; a line an epoch off a terminal."""
    from tensorrail_trainer.run.pipeline import Progress as Listener

    if not shown:
        yield Listener()
        return

    columns = (TextColumn("{task.description:<9}"), BarColumn(24), TextColumn("{task.fields[text]}", markup=False))
    # Off a terminal a bar would be noise: there each epoch is a line.
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, object] = {}

        def advance(name: str, done: float, total: float, text: str) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total, text="")
            bars.update(tasks[name], completed=done, text=text)  # type: ignore[arg-type]

        def epoch(row: Epoch, epochs: int, left: int) -> None:
            text = _line(row, epochs, left)
            advance(row.phase, row.epoch, epochs, text)
            if not console.is_terminal:
                print(f"{row.phase:<9} {text}", flush=True)

        def measuring(batch: int, share: float) -> None:
            advance(f"bench {batch}", share, 1.0, "dense and factored in turns")

        def note(text: str) -> None:
            bars.print(text) if console.is_terminal else print(text, flush=True)

        yield Listener(note=note, epoch=epoch, bench=measuring)


def say_projections(epochs: Sequence[Epoch]) -> None:
    """Say which share of ADMM's time went into projections, where there was ADMM."""
    from tensorrail_trainer.training.epochs import projection_share

    if (share := projection_share(epochs)) is not None:
        say(f"projections took {100 * share:.1f} % of the ADMM phase")


def _line(row: Epoch, epochs: int, left: int) -> str:
    residual = max((primal for primal, _ in row.residuals.values()), default=None)
    dual = max((dual for _, dual in row.residuals.values()), default=0.0)
    residuals = "" if residual is None else f"  residuals primal {residual:.4f} dual {dual:.4f}"
    remaining = timedelta(seconds=round(left * row.seconds))
    return (
        f"epoch {row.epoch}/{epochs}  loss {row.loss:.3f}  train {row.train_accuracy:.1f} %  "
        f"test {row.test_accuracy:.2f} %{residuals}  training left {remaining}"
    )
