"""Where inputs come from: an npz file, a folder of npz, npy or image files, or arrays in memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from tensorrail_runtime.errors import ModelError, UsageError, first_line
from tensorrail_runtime.feeds.folders import left_out, listed
from tensorrail_runtime.feeds.pictures import SUFFIXES, Preprocessing, picture
from tensorrail_runtime.sessions.inputs import load_arrays
from tensorrail_runtime.sessions.values import native
from tensorrail_runtime.tables import plain

Source = Path | str | Mapping[str, np.ndarray] | Sequence[Mapping[str, np.ndarray]]
"""An npz file or a folder, arrays by input name, or several such mappings, as the files of a folder hold them."""

Part = tuple[str, dict[str, np.ndarray]]
"""Where arrays are from, for error messages, and the arrays."""

_ARRAYS = frozenset({".npy", ".npz"})
_log = logging.getLogger(__name__)

_FLOATS = ("tensor(float)", "tensor(float16)", "tensor(double)")


def files_of(folder: Path) -> list[Path]:
    """Return the files of a folder, and of the folders in it, that are read as inputs."""
    return list(listed(folder, _ARRAYS | SUFFIXES).files)


def read_parts(
    source: Source, inputs: Sequence[ort.NodeArg], most: int | None = None, images: Preprocessing | None = None
) -> list[Part]:
    """Return the arrays of a source: one part for a file, a mapping or a folder of images, else one for each file of a folder.

    Args:
        source: the file, folder or arrays.
        inputs: the inputs that need values; the first one has the arrays of npy files and images.
        most: largest number of images, which are spread evenly over the folder; default: all.
        images: how images become inputs; default: as for ImageNet models.

    Raises:
        ModelError: a file cannot be read, or there is none.

    """
    if isinstance(source, Mapping):
        return [("inputs", _arrays("inputs", source))]
    if not isinstance(source, Path | str):
        if not isinstance(source, list | tuple) or not all(isinstance(part, Mapping) for part in source):
            raise UsageError(
                f"inputs: expected a path or arrays by input name, such as {{'image': array}}, got {type(source).__name__}"
            )
        return [(where := f"inputs[{k}]", _arrays(where, part)) for k, part in enumerate(source)]
    path = Path(source)
    if not path.is_dir():
        return [(str(path), load_arrays(path))]
    arrays, pictures = _files(path)
    if arrays:
        parts = list(_array_files(arrays, inputs[0].name if inputs else ""))
        _require_same_names(path, parts)
        return parts
    return [(str(path), _pictures(path, pictures, inputs, most, images or Preprocessing()))]


def _files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the files of arrays of a folder, or its images; files of other kinds are left out and named in the log."""
    try:
        listing = listed(folder, _ARRAYS | SUFFIXES)
    except OSError as error:
        raise ModelError(f"{folder}: cannot be read ({error.filename}: {error.strerror})") from None
    arrays = [file for file in listing.files if file.suffix.lower() in _ARRAYS]
    pictures = [file for file in listing.files if file.suffix.lower() in SUFFIXES]
    if arrays and pictures:
        raise ModelError(
            f"{folder}: expected files of one kind, got arrays, such as {arrays[0].name}, and images, such as "
            f"{pictures[0].name}; move one kind to another folder"
        )
    expected = f"npz or npy files, or images ({', '.join(sorted(SUFFIXES))})"
    if not listing.files:
        found = f"; found {len(listing.others)} other files, such as {listing.others[0].name}" if listing.others else ""
        raise ModelError(f"{folder}: no inputs found; expected {expected}{found}")
    if others := left_out(folder, listing.others, expected):
        _log.warning("%s", plain(others))
    return arrays, pictures


def _arrays(where: str, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what is given by name as arrays, such as lists of numbers."""
    arrays = {}
    for name, values in given.items():
        try:
            arrays[name] = native(values)
        except (ValueError, TypeError, RuntimeError) as error:  # such as lists of unequal length, a tensor on a GPU
            raise ModelError(f"{where}: {name!r} is not an array ({first_line(error)}); expected a NumPy array") from None
    return arrays


def _pictures(
    folder: Path, files: Sequence[Path], inputs: Sequence[ort.NodeArg], most: int | None, images: Preprocessing
) -> dict[str, np.ndarray]:
    if not inputs:
        raise ModelError(f"{folder}: found images, which have no labels; provide npz files with arrays and `labels`")
    if len(inputs) != 1:
        raise ModelError(
            f"{folder}: found images for a model with {len(inputs)} inputs; provide an npz file with one array per input"
        )
    entry = inputs[0]
    sized = len(entry.shape) == 4 and all(isinstance(size, int) for size in entry.shape[1:])
    if not sized or entry.shape[1] not in (1, 3) or entry.type not in _FLOATS:
        raise ModelError(
            f"{folder}: found images for input {entry.name!r}, {entry.type} of shape {entry.shape}; expected floats "
            "(batch, 1 or 3, height, width) of known size: provide an npz file instead"
        )
    picks = np.linspace(0, len(files) - 1, min(most or len(files), len(files))).astype(int)
    return {entry.name: np.stack([picture(files[k], entry.shape[1:], images) for k in picks])}


def _array_files(files: Sequence[Path], name: str) -> Iterator[Part]:
    for file in files:
        if file.suffix.lower() == ".npz":
            yield str(file), load_arrays(file)
            continue
        try:
            array = np.load(file, allow_pickle=False)
        except Exception as error:  # noqa: BLE001 - NumPy parses the header as Python, which fails in many ways
            raise ModelError(f"{file}: not a plain npy array ({first_line(error)})") from None
        if not isinstance(array, np.ndarray):
            array.close()
            raise ModelError(f"{file}: expected a plain npy array, got several arrays in one file: rename it to .npz")
        yield str(file), {name: native(array)}


def _require_same_names(folder: Path, parts: Sequence[Part]) -> None:
    first, expected = parts[0]
    for file, arrays in parts[1:]:
        if arrays.keys() != expected.keys():
            names = ", ".join(expected)
            raise ModelError(
                f"{folder}: {Path(file).name} holds {', '.join(arrays)}; expected {names} as in {Path(first).name}"
            )
