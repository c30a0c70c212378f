"""Checkpoints: one file an epoch and phase, the last two kept, written whole, read without running code.

torch writes them as zip files with a checksum for each tensor, which it does not compare itself when it reads.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tensorrail_runtime.records import write_bytes

_KEEP = 2


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written; one line with the file, the reason and what is still there."""


class Checkpoints:
    """The checkpoints of a run folder. `note` is told, in a line, of files that were refused while loading."""

    def __init__(self, folder: Path, note: Callable[[str], None] = lambda _: None) -> None:
        self.folder, self.note = folder, note

    def save(self, phase: str, epoch: int, state: dict[str, Any]) -> None:
        """Write the state after `epoch` epochs of a phase and remove all but the last two of that phase.

        Raises `CheckpointError` when the disk is full or the folder may not be written to; what was there stays.
        """
        buffer = io.BytesIO()
        torch.save(state | {"phase": phase, "epoch": epoch}, buffer)
        path = self.folder / f"{phase}-{epoch:04d}.pt"
        try:
            write_bytes(path, buffer.getvalue())
        except OSError as error:
            kept = [old.name for old in self._files(phase)[-1:]]
            raise CheckpointError(
                f"checkpoint {path} cannot be written ({error.strerror or error}); {kept[0] if kept else 'the phase before'} "
                "is whole: make room, or the folder writable, and go on with --resume"
            ) from None
        for old in self._files(phase)[:-_KEEP]:
            old.unlink(missing_ok=True)

    def latest(self, phase: str) -> dict[str, Any] | None:
        """Return the newest state of a phase that can be read, or None when there is none."""
        refused: list[str] = []
        found = None
        for path in reversed(self._files(phase)):
            found = _read(path, phase)
            if found is not None:
                break
            refused.append(path.name)
        if refused:
            instead = f"going on from epoch {found['epoch']}" if found else f"phase {phase} starts anew"
            self.note(f"refused the damaged checkpoint {', '.join(refused)}; {instead}")
        return found

    def _files(self, phase: str) -> list[Path]:
        found = {file: place[1] for file in self.folder.glob("*.pt") if (place := place_of(file)) and place[0] == phase}
        return sorted(found, key=found.__getitem__)


def place_of(path: Path) -> tuple[str, int] | None:
    """Return the phase and the epoch that a checkpoint's name says; None for a file that is not called like one."""
    found = re.fullmatch(r"(.+)-([0-9]{4,6})\.pt", path.name)
    return (found[1], int(found[2])) if found else None


def _read(path: Path, phase: str) -> dict[str, Any] | None:
    """Return the state in a file, or None when it is damaged or no state of this phase."""
    try:
        with zipfile.ZipFile(path) as parts:
            if parts.testzip() is not None:
                return None
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001 - a damaged file raises whatever its bytes say
        return None
    whole = isinstance(state, dict) and state.get("phase") == phase and isinstance(state.get("epoch"), int)
    return state if whole else None
