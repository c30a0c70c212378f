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

from tensorrail_runtime.errors import CheckpointError
from tensorrail_runtime.records import write_bytes

_KEEP = 2


class Checkpoints:
    """The checkpoints of a run folder. `note` is told, in a line, of files that were refused while loading."""

    def __init__(self, folder: Path, note: Callable[[str], None] = lambda _: None) -> None:
        self.folder, self.note = folder, note

    def save(self, phase: str, epoch: int, state: dict[str, Any]) -> None:
        """Write the state after `epoch` epochs of a phase; of that phase only the one before it stays beside it.

        Those of later epochs go as well: they were refused, and the phase has gone on from an earlier one. Raises
        `CheckpointError` when the disk is full or the folder may not be written to; what was there stays.
        """
        buffer = io.BytesIO()
        torch.save(state | {"phase": phase, "epoch": epoch}, buffer)
        path = self.folder / f"{phase}-{epoch:04d}.pt"
        try:
            write_bytes(path, buffer.getvalue())
        except OSError as error:
            before = [old.name for old, at in self._files(phase).items() if at < epoch]
            last = f"{before[-1]} is the last complete one" if before else f"phase {phase} has no earlier one"
            raise CheckpointError(
                f"checkpoint {path} cannot be written ({error.strerror or error}); {last}; free some disk space or make the "
                "folder writable, then continue with --resume"
            ) from None
        files = self._files(phase)
        stay = [old for old, at in files.items() if at <= epoch][-_KEEP:]
        for old in files.keys() - set(stay):
            old.unlink(missing_ok=True)

    def latest(self, phase: str) -> dict[str, Any] | None:
        """Return the newest state of a phase that is whole, or None when there is none.

        Raises `CheckpointError` for a file that may not be read: it may be whole.
        """
        refused: list[str] = []
        state = None
        for path in reversed(list(self._files(phase))):
            state = _read(path, phase)
            if state is not None:
                break
            refused.append(path.name)
        if refused:
            instead = f"resuming from epoch {state['epoch']}" if state else f"phase {phase} starts from the beginning"
            self.note(f"ignored the damaged checkpoint {', '.join(refused)}; {instead}")
        return state

    def _files(self, phase: str) -> dict[Path, int]:
        """Return the files of a phase with their epochs, in the order of these."""
        found = {file: place[1] for file in self.folder.glob("*.pt") if (place := place_of(file)) and place[0] == phase}
        return dict(sorted(found.items(), key=lambda one: one[1]))


def place_of(path: Path) -> tuple[str, int] | None:
    """Return the phase and the epoch that a checkpoint's name says; None for a file that is not called like one."""
    found = re.fullmatch(r"(.+)-([0-9]{4,6})\.pt", path.name)
    return (found[1], int(found[2])) if found else None


def _read(path: Path, phase: str) -> dict[str, Any] | None:
    """Return the state in a file, or None when it is damaged or no state of this phase."""
    try:
        content = io.BytesIO(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({error.strerror or error}); make it readable, then continue with --resume"
        ) from None
    try:
        with zipfile.ZipFile(content) as parts:
            if parts.testzip() is not None:
                return None
        content.seek(0)
        state = torch.load(content, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001 - a damaged file raises whatever its bytes say
        return None
    whole = isinstance(state, dict) and state.get("phase") == phase and isinstance(state.get("epoch"), int)
    return state if whole else None
