"""Checkpoints: one file per epoch and phase, of which the last two are kept.

They are written atomically and read without running code. torch writes zip files with a checksum for each tensor but does not
compare it when reading; this module does.
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
    """The checkpoints of a run folder. `note` is called with one line for damaged files that are ignored while loading."""

    def __init__(self, folder: Path, note: Callable[[str], None] = lambda _: None) -> None:
        self.folder, self.note = folder, note

    def save(self, phase: str, epoch: int, state: dict[str, Any]) -> None:
        """Write the state after `epoch` epochs of a phase, and delete all but the previous checkpoint of the phase.

        Checkpoints of later epochs are deleted, too: they were damaged, and the phase resumed from an earlier one. Raises
        `CheckpointError` if the file cannot be written; the earlier checkpoints are kept then.
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
                "folder writable, then resume the run"
            ) from None
        files = self._files(phase)
        kept = [old for old, at in files.items() if at <= epoch][-_KEEP:]
        for old in files.keys() - set(kept):
            old.unlink(missing_ok=True)

    def latest(self, phase: str) -> dict[str, Any] | None:
        """Return the state of the newest undamaged checkpoint of a phase, or None if there is none.

        Raises `CheckpointError` for a file without read permission, and if memory is short, since it may be undamaged.
        """
        damaged: list[str] = []
        state = None
        for path in reversed(list(self._files(phase))):
            state = _read(path, phase)
            if state is not None:
                break
            damaged.append(path.name)
        if damaged:
            instead = f"resuming from epoch {state['epoch']}" if state else f"phase {phase} starts from the beginning"
            self.note(f"ignored the damaged checkpoint {', '.join(damaged)}; {instead}")
        return state

    def _files(self, phase: str) -> dict[Path, int]:
        """Return the files of a phase with their epochs, in the order of the epochs."""
        epochs = {file: place[1] for file in self.folder.glob("*.pt") if (place := place_of(file)) and place[0] == phase}
        return dict(sorted(epochs.items(), key=lambda item: item[1]))


def place_of(path: Path) -> tuple[str, int] | None:
    """Return the phase and the epoch from the name of a checkpoint, or None if it is not the name of a checkpoint."""
    match = re.fullmatch(r"(.+)-([0-9]{4,6})\.pt", path.name)
    return (match[1], int(match[2])) if match else None


def _read(path: Path, phase: str) -> dict[str, Any] | None:
    """Return the state in a file, or None if the file is damaged or holds no state of this phase."""
    try:
        content = io.BytesIO(path.read_bytes())
    except MemoryError:
        raise CheckpointError(f"checkpoint {path} does not fit into memory; free memory, then resume the run") from None
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({error.strerror or error}); make it readable, then resume the run"
        ) from None
    try:
        with zipfile.ZipFile(content) as archive:
            if archive.testzip() is not None:
                return None
        content.seek(0)
        state = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - a damaged file can raise any exception
        if isinstance(error, MemoryError) or "allocate" in str(error):
            raise CheckpointError(f"checkpoint {path} does not fit into memory; free memory, then resume the run") from None
        return None
    valid = isinstance(state, dict) and state.get("phase") == phase and isinstance(state.get("epoch"), int)
    return state if valid else None
