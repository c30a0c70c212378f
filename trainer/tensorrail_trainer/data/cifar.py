"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), read from their published folders.

The files are Python pickles. They are read by a restricted unpickler that knows plain containers and stand-ins for NumPy
arrays, which accept only a shape, an integer type and bytes: a file cannot run code or address memory.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tensorrail_runtime.errors import DataError
from tensorrail_trainer.data.splits import Dataset, InMemory

_PIXELS = 3 * 32 * 32
_Constants = tuple[torch.Tensor, torch.Tensor]


def cifar10(
    root: str = "data/cifar-10-batches-py",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    validation: int = 0,
) -> Dataset:
    """Read CIFAR-10 from its published folder.

    Args:
        root: the folder with five training files and a test file; default `data/cifar-10-batches-py`.
        mean: three numbers to standardize the channels with, for pixel values from 0 to 1; default: those of all
            training images, with those that `validation` leaves out. Pretrained weights need the constants that they were
            trained with.
        std: three standard deviations, given together with `mean`.
        validation: the number of training images, equally many of each class and always the same ones, that are left out of
            training and take the place of the test split. Choose settings with them, and use the test images once, at the
            end. Default 0: the published splits.

    Returns:
        Images (N, 3, 32, 32) and 10 classes.

    Raises:
        DataError: a file cannot be read, or is not of CIFAR-10, or no such number of images can be left out.

    """
    folder = Path(root)
    train = [_read(folder / f"data_batch_{k}", b"labels") for k in range(1, 6)]
    test = [_read(folder / "test_batch", b"labels")]
    return _dataset("CIFAR-10", folder, 10, train, test, _given(mean, std), validation)


def cifar100(
    root: str = "data/cifar-100-python",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    validation: int = 0,
) -> Dataset:
    """Read CIFAR-100 with fine labels from its published folder; the other arguments are as for `cifar10`."""
    folder = Path(root)
    train, test = ([_read(folder / name, b"fine_labels")] for name in ("train", "test"))
    return _dataset("CIFAR-100", folder, 100, train, test, _given(mean, std), validation)


def _given(mean: Sequence[float] | None, std: Sequence[float] | None) -> _Constants | None:
    if mean is None and std is None:
        return None
    for name, values in (("mean", mean), ("std", std)):
        if values is None or len(values) != 3 or not all(isinstance(value, int | float) for value in values):
            raise DataError(f"{name}: expected three numbers, one per channel, for pixel values from 0 to 1, got {values}")
    if min(std or ()) <= 0:
        raise DataError(f"std: expected numbers above 0, got {std}")
    constants = [255 * torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1) for values in (mean, std)]
    return constants[0], constants[1]


def _dataset(
    name: str,
    folder: Path,
    classes: int,
    train: list[Any],
    test: list[Any],
    given: _Constants | None,
    validation: int = 0,
) -> Dataset:
    """Return both splits, stored as uint8 (N, 3, 32, 32) and standardized in each batch."""
    splits = []
    for parts in (train, test):
        x = torch.from_numpy(np.concatenate([images for images, _ in parts]))
        y = torch.from_numpy(np.concatenate([labels for _, labels in parts]))
        splits.append((x, y))
        if y.max() >= classes:
            raise DataError(
                f"{folder}: expected labels 0 to {classes - 1}, got {int(y.max())}; check that it is the folder of {name}"
            )
    mean, deviation = given or _statistics(splits[0][0])
    kind = "test"
    if validation:
        splits, kind = _with_validation(*splits[0], classes, validation), "validation"
    source = f"{name} ({folder.name}), {len(splits[0][1])} training and {len(splits[1][1])} {kind} images"
    return Dataset(source, classes, *(InMemory(x, y, mean, deviation) for x, y in splits))


def _with_validation(
    images: torch.Tensor, labels: torch.Tensor, classes: int, count: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Split training images into those that stay and `count` for validation, equally many of each class."""
    fewest = int(torch.bincount(labels, minlength=classes).min())
    if not isinstance(count, int) or count < 0 or count % classes or count // classes >= fewest:
        raise DataError(
            f"validation: expected a multiple of the {classes} classes below {fewest * classes}, got {count}: as many training "
            "images of each class are left out"
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))  # the same for every seed of a recipe
    left_out = torch.cat([order[labels[order] == k][: count // classes] for k in range(classes)]).sort().values
    stays = torch.ones(len(labels), dtype=torch.bool)
    stays[left_out] = False
    return [(images[stays], labels[stays]), (images[left_out], labels[left_out])]


def _statistics(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and standard deviation of each channel, (1, C, 1, 1), from the histogram of the bytes."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    values = torch.arange(256, dtype=torch.float64)
    mean = counts @ values / counts.sum(1)
    deviation = (counts @ values**2 / counts.sum(1) - mean**2).clamp_min(1e-12).sqrt()
    return mean.float().reshape(1, -1, 1, 1), deviation.float().reshape(1, -1, 1, 1)


def _read(path: Path, labels: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
        with path.open("rb") as file:
            raw = _Reader(file, encoding="bytes").load()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a file of the published CIFAR folder") from None
    except Exception as error:  # noqa: BLE001 - a broken pickle can raise any exception
        raise DataError(f"{path}: not a published CIFAR file ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(raw, dict) or not {b"data", labels} <= raw.keys():
        raise DataError(f"{path}: not a published CIFAR file: expected the keys data and {labels.decode()}")
    images, classes = (_values(raw[key]) for key in (b"data", labels))
    if classes is None or classes.ndim != 1:
        raise DataError(f"{path}: not a published CIFAR file: expected labels that are integers from 0")
    if images is None or images.dtype != np.uint8 or images.shape != (len(classes), _PIXELS):
        raise DataError(f"{path}: not a published CIFAR file: expected uint8 data of shape ({len(classes)}, {_PIXELS})")
    if not len(classes) or classes.min() < 0:
        raise DataError(f"{path}: not a published CIFAR file: expected labels that are integers from 0")
    return images.reshape(-1, 3, 32, 32), classes.astype(np.int64)


class _Reader(pickle.Unpickler):  # noqa: S301 - find_class allows NumPy arrays only
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs") from None


class _Numbers:
    """Stands for a `numpy.dtype` in a file: integers of 1 to 8 bytes."""

    def __init__(self, code: Any) -> None:
        text = code.decode("ascii") if isinstance(code, bytes) else str(code)
        if text not in _NUMBERS:
            raise pickle.UnpicklingError(f"it holds an array of {text[:20]!r}, which no CIFAR file needs")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(">" if state[1] in (">", b">") else "<")


class _Array:
    """Stands for a `numpy.ndarray` in a file: its values, copied from the bytes."""

    values: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, numbers, fortran, raw = state
        if type(numbers) is not _Numbers or type(raw) is not bytes:
            raise pickle.UnpicklingError("it holds an array without its bytes")
        self.values = np.frombuffer(raw, numbers.dtype).reshape(shape, order="F" if fortran else "C")


def _encoded(text: Any, encoding: Any) -> bytes:
    if encoding not in ("latin1", b"latin1") or type(text) is not str:
        raise pickle.UnpicklingError("it holds text that is no array's bytes")
    return text.encode("latin1")


def _values(content: Any) -> np.ndarray | None:
    """Return the values of an array or of a list of integers; None for anything else."""
    if type(content) is _Array:
        return content.values
    if type(content) is list and all(type(value) is int and abs(value) < 2**31 for value in content):
        return np.array(content, np.int64)
    return None


_NUMBERS = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")
# Functions, and only the name of the class that `_reconstruct` receives: a file can call them but cannot change any class.
_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): lambda code, *_: _Numbers(code),
    ("numpy", "ndarray"): "numpy.ndarray",
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("_codecs", "encode"): _encoded,
}
