"""Downloads packages by name and version, checks them, and unzips what is needed of them."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

_LARGEST = 1 << 30  # bytes of one unzipped file


@dataclass(frozen=True)
class Cache:
    """Wheels, and what was unzipped of them."""

    wheels: Path
    """Folder of the wheels; a wheel that is missing is downloaded into it."""
    unzipped: Path
    """Folder with one folder for each package."""

    def __call__(self, requirement: str) -> Path:
        """Return the folder of an unzipped package.

        Args:
            requirement: the package and its version, such as `nudenet==3.4.2`.

        Raises:
            RuntimeError: pip could not download it, or the wheel holds names or files that it should not.

        """
        folder = self.unzipped / requirement.replace("==", "-")
        if not folder.is_dir():
            wheel = self._wheel(requirement) or self._downloaded(requirement)
            partial = folder.with_name(f"{folder.name}.partial")
            unzip(wheel, partial)
            partial.rename(folder)
        return folder

    def _wheel(self, requirement: str) -> Path | None:
        stem = "-".join(_normal(part) for part in requirement.split("=="))
        found = [path for path in self.wheels.glob("*.whl") if _normal(path.name).startswith(f"{stem}-")]
        return found[0] if found else None

    def _downloaded(self, requirement: str) -> Path:
        self.wheels.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "-q",
            "-d",
            self.wheels,
            requirement,
        ]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        wheel = self._wheel(requirement)
        if done.returncode or wheel is None:
            raise RuntimeError(f"{requirement}: pip download failed: {done.stderr.strip() or 'no wheel came'}")
        return wheel


def unzip(wheel: Path, folder: Path) -> None:
    """Unzip a wheel, except for its scripts and programs.

    Args:
        wheel: the file.
        folder: the folder to write to; it may exist.

    Raises:
        RuntimeError: a name leads out of the folder, or a file is too large.

    """
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            parts = Path(entry.filename).parts
            if entry.filename.startswith("/") or ".." in parts:
                raise RuntimeError(f"{wheel.name}: the file name {entry.filename!r} leads out of the package")
            if entry.file_size > _LARGEST:
                raise RuntimeError(
                    f"{wheel.name}: {entry.filename} has {entry.file_size:,} bytes, expected at most {_LARGEST:,}"
                )
            if not parts[0].endswith(".data"):
                archive.extract(entry, folder)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower().replace("_", "-")
