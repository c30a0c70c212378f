"""The files of a folder: those that are read, and those that are left out, which are counted and named."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

_NAMED = 3


@dataclass(frozen=True)
class Listing:
    """The files below a folder, in the order of their paths."""

    root: Path
    files: tuple[Path, ...]
    """The files that are read."""
    others: tuple[Path, ...]
    """The files with other suffixes, which are left out."""


def listed(root: Path, suffixes: Collection[str]) -> Listing:
    """List the files in a folder and in its subfolders.

    Files and folders whose names start with a dot are no data: file managers and other programs leave them, such as `._1.wav`
    on macOS.

    Args:
        root: the folder.
        suffixes: the suffixes of the files that are read, in small letters; capitals count as well.

    Returns:
        The files that are read, and those that are left out.

    Raises:
        OSError: a folder cannot be read.

    """
    files: list[Path] = []
    entered: set[str] = set()
    for name, folders, names in os.walk(root, onerror=_refuse, followlinks=True):
        entered.add(os.path.realpath(name))
        # A link to a folder is followed, unless it leads back to one that was read already.
        folders[:] = sorted(
            each
            for each in folders
            if not each.startswith(".")
            and not (Path(name, each).is_symlink() and os.path.realpath(Path(name, each)) in entered)
        )
        files += [Path(name, each) for each in names if not each.startswith(".")]
    files.sort()
    wanted = [path.suffix.lower() in suffixes for path in files]
    return Listing(
        root,
        tuple(path for path, take in zip(files, wanted, strict=True) if take),
        tuple(path for path, take in zip(files, wanted, strict=True) if not take),
    )


def left_out(root: Path, others: Sequence[Path], expected: str) -> str:
    """Return how many files of a folder are left out, and their names.

    Args:
        root: the folder.
        others: the files that are left out.
        expected: what is read, such as "images (.jpg, .png)".

    Returns:
        One line; an empty text if no file is left out.

    """
    if not others:
        return ""
    names = ", ".join(str(path.relative_to(root)) for path in others[:_NAMED])
    more = ", …" if len(others) > _NAMED else ""
    return f"{root}: {len(others)} file{'s' if len(others) > 1 else ''} left out, {names}{more}: expected {expected}"


def _refuse(error: OSError) -> NoReturn:
    raise error
