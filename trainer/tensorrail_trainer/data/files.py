"""Splits whose samples are read from files when they are needed, and folders of classes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tensorrail_runtime.errors import DataError
from tensorrail_runtime.feeds.folders import Listing, listed
from tensorrail_trainer.data.loading import ALONE, CPU, loaded, workers_of
from tensorrail_trainer.data.splits import Augment, InMemory, Share, in_order

Read = Callable[[Path, int | None], Tensor]
"""Reads a file into values (…), uint8 or float32: without a seed unchanged, with a seed randomly augmented."""


@dataclass(frozen=True)
class Files:
    """A split that is read from its files, batch by batch, in `workers` processes (None: one per core, at most four).

    Batches are (x − mean) / deviation, both of a shape that broadcasts with a batch. For batches with an `Augment`, `read`
    receives a seed that depends on the seed of the batches and the index of the sample, and decides itself how to augment.
    """

    paths: Sequence[Path]
    y: Tensor  # (N,) int64
    read: Read
    mean: Tensor | None = None
    deviation: Tensor | None = None
    workers: int | None = None
    device: torch.device = CPU

    def __post_init__(self) -> None:
        if not len(self.y) or len(self.paths) != len(self.y):
            raise ValueError(
                f"expected one label per file and at least one file, got {len(self.paths)} files and {len(self.y)} labels"
            )
        workers_of(self.workers)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.y)

    def batches(
        self, picks: Sequence[Tensor], share: Share = ALONE, augment: Augment | None = None, seed: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield samples and labels. Raises `DataError` for a file that cannot be read."""
        own = None if augment is None else seed
        for x, y in loaded(self.sample, picks, share, own, workers_of(self.workers), self.device):
            values = x.float()
            if self.mean is not None and self.deviation is not None:
                values = (values - self.mean) / self.deviation
            yield values, y

    def to(self, device: torch.device) -> Files:
        """Return the same split with batches on a device."""
        mean, deviation = (None if value is None else value.to(device) for value in (self.mean, self.deviation))
        return replace(self, mean=mean, deviation=deviation, device=device)

    def held(self) -> InMemory:
        """Return the whole split read into memory, on the CPU, without augmentation."""
        samples: Tensor | None = None
        done = 0
        for x, _ in loaded(self.sample, in_order(len(self), 16), ALONE, None, workers_of(self.workers), CPU):
            if samples is None:
                samples = x.new_empty((len(self), *x.shape[1:]))
            elif x.shape[1:] != samples.shape[1:]:
                raise DataError(f"{self.paths[done]}: expected shape {tuple(samples.shape[1:])}, got {tuple(x.shape[1:])}")
            samples[done : done + len(x)] = x
            done += len(x)
        assert samples is not None  # noqa: S101 - a split has samples
        return InMemory(samples, self.y, self.mean, self.deviation)

    def sample(self, index: int, seed: int | None) -> tuple[Tensor, int]:
        """Return one sample as `read` returns it, and its label. Raises `DataError` if the file cannot be read."""
        path = self.paths[index]
        try:
            return self.read(path, seed), int(self.y[index])
        except DataError:
            raise
        except Exception as error:  # noqa: BLE001 - a broken file can raise any exception
            raise unreadable(path, error) from None


def unreadable(path: Path, error: Exception, expected: str = "") -> DataError:
    """Return an error of one line that says which file could not be read, and why."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120] or type(error).__name__
    return DataError(f"{path}: cannot be read ({reason})" + (f"; expected {expected}" if expected else ""))


def files_below(folder: Path, suffixes: Collection[str], expected: str) -> Listing:
    """Return the files in a folder and its subfolders. Raises `DataError` if one of them cannot be read."""
    try:
        return listed(folder, suffixes)
    except OSError as error:
        raise unreadable(Path(error.filename or folder), error, expected) from None


def loose_files(root: Path) -> list[Path]:
    """Return the files that lie in a folder of classes itself, where they belong to no class."""
    return sorted(path for path in root.iterdir() if path.is_file() and not path.name.startswith("."))


def class_folders(root: Path, expected: str) -> list[str]:
    """Return the sorted names of the folders in a folder, one per class. Raises `DataError` if there are none."""
    try:
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise unreadable(root, error, expected) from None
    if not names:
        raise DataError(f"{root}: no class folders found; expected {expected}")
    return names
