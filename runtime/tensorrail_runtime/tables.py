"""Reports as a person reads them: a record says which tables and lines it is shown as, and `print(report)` prints them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tensorrail_runtime.records import Record

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 160  # characters of a table that is not printed on a terminal


@dataclass(frozen=True)
class Table:
    """One table: its title, the names of its columns and its rows. Names are aligned to the left, numbers to the right."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


Part = Table | str
"""What a report is made of: a table, or one line of text."""


class PrintedRecord(Record):
    """A record that is printed as tables and lines."""

    def shown(self) -> tuple[Part, ...]:
        """Return the tables and lines that this report is printed as."""
        raise NotImplementedError

    def __str__(self) -> str:
        """Return the tables and lines as text."""
        from rich.console import Console

        console = Console(file=io.StringIO(), width=WIDTH, markup=False, emoji=False, color_system=None)
        show(self.shown(), console)
        text: str = console.file.getvalue()  # type: ignore[attr-defined] # the StringIO above
        return text.rstrip("\n")


def show(parts: Sequence[Part], console: Console) -> None:
    """Print tables and lines on a console of rich."""
    from rich.table import Table as Grid

    for part in parts:
        if isinstance(part, str):
            console.print(plain(part), soft_wrap=True)
            continue
        grid = Grid(title=plain(part.title), title_justify="left", header_style="bold")
        for index, name in enumerate(part.head):
            grid.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
        for row in part.rows:
            grid.add_row(*map(plain, row))
        console.print(grid)


def plain(text: str) -> str:
    """Return text without the characters that would steer a terminal: names come from files, which may be a stranger's."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def or_dash(value: float | None, form: str) -> str:
    """Return a number in a format of `format()`, and a dash where there is none."""
    return "–" if value is None else format(value, form)
