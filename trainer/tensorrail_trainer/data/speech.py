"""Spoken digits in the layout of the Free Spoken Digit Dataset (Jackson et al.): one wav file per word.

Files are named `{digit}_{speaker}_{index}.wav`; the recordings with index 0 to 4 are the test split, as its authors define it.
Features are computed over windows of 25 ms every 10 ms: the logarithm of the power in bands of equal width on the mel scale,
m = 2595 log₁₀(1 + f / 700), or their cosine transform (Davis and Mermelstein 1980).
"""

from __future__ import annotations

import re
import wave
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from scipy.fft import dct

from tensorrail_runtime.errors import DataError
from tensorrail_runtime.feeds.folders import left_out
from tensorrail_trainer.data.files import files_below, unreadable
from tensorrail_trainer.data.splits import Dataset, InMemory

Features = Literal["logmel", "mfcc"]

_NAME = re.compile(r"([0-9])_([^_]+)_([0-9]+)\.wav", re.IGNORECASE)
_TEST = 5  # the first recordings of each speaker and digit
_WINDOW, _HOP = 0.025, 0.010  # seconds
_RATES = 400_000  # samples per second, at most: the memory of the filters grows with the rate in the file
_FLOOR = 1e-8  # relative to full scale, below the noise of 16 bits
_SCALES: dict[int, tuple[np.dtype[Any], float, float]] = {  # by bytes per sample: dtype, value of silence, full scale
    1: (np.dtype("u1"), 128.0, 128.0),
    2: (np.dtype("<i2"), 0.0, 2.0**15),
    4: (np.dtype("<i4"), 0.0, 2.0**31),
}


def speech(
    root: str, features: Features = "logmel", bands: int = 40, coefficients: int = 13, frames: int = 64, stack: int = 1
) -> Dataset:
    """Return recordings of spoken digits as sequences of features.

    Features are standardized by their mean and deviation over the training split. A longer recording is cut after `frames`
    windows; a shorter one is padded with zeros at the start, so that the last window is always the end of the recording.

    Args:
        root: the folder of the wav files, which may lie in subfolders. Other files are left out, and named in
            `Dataset.left_out`.
        features: `logmel` (default) or `mfcc`.
        bands: the number of mel bands; default 40.
        coefficients: the number of coefficients of `mfcc`, at most `bands`; default 13.
        frames: the number of windows per recording; default 64.
        stack: the number of neighbouring windows that form one step of the sequence, a divisor of `frames`; default 1.

    Returns:
        Sequences (N, frames / stack, stack · bands), or (N, frames / stack, stack · coefficients) for `mfcc`, float32.

    Raises:
        DataError: an argument is out of range, or the folder holds no such recordings.

    """
    if features not in get_args(Features):
        raise DataError(f"speech: unknown features {features!r}; expected one of {', '.join(get_args(Features))}")
    if min(bands, coefficients, frames) < 1 or (features == "mfcc" and coefficients > bands):
        raise DataError(
            f"speech: expected bands, coefficients and frames ≥ 1, and coefficients ≤ bands, got bands={bands}, "
            f"coefficients={coefficients}, frames={frames}"
        )
    if stack < 1 or frames % stack:
        raise DataError(f"speech: expected stack to be a divisor of frames={frames}, got {stack}")
    folder = Path(root)
    recordings: dict[bool, list[tuple[np.ndarray, int]]] = {False: [], True: []}  # training, test
    rates: dict[int, Path] = {}
    listing = files_below(folder, {".wav"}, "a folder of wav files")
    names: dict[str, Path] = {}
    for path in listing.files:
        match = _NAME.fullmatch(path.name)
        if match is None:
            raise DataError(f"{path}: expected a file name such as 7_jackson_32.wav (digit, speaker, index)")
        if names.setdefault(path.name.lower(), path) != path:
            raise DataError(f"{path}: is also {names[path.name.lower()]}; expected each recording once")
        sound, rate = _read(path, frames)
        rates.setdefault(rate, path)
        if len(rates) > 1:
            raise DataError(
                f"{path}: expected {next(iter(rates))} samples per second, as in the other files, got {rate}; resample it"
            )
        values = np.log(_power(sound, rate, bands) + _FLOOR)
        if features == "mfcc":
            values = dct(values, norm="ortho")[:, :coefficients]
        recordings[int(match[3]) < _TEST].append((values[:frames], int(match[1])))
    if not recordings[False] or not recordings[True]:
        raise DataError(
            f"{folder}: expected files named {{digit}}_{{speaker}}_{{index}}.wav, index 0 to {_TEST - 1} for the test, "
            f"found {len(recordings[False])} training and {len(recordings[True])} test recordings"
        )
    windows = np.concatenate([values for values, _ in recordings[False]])
    mean, deviation = windows.mean(0), np.maximum(windows.std(0), 1e-6)
    splits = []
    for clips in recordings.values():
        x = np.zeros((len(clips), frames, len(mean)), np.float32)
        for k, (values, _) in enumerate(clips):
            x[k, frames - len(values) :] = (values - mean) / deviation
        x = x.reshape(len(clips), frames // stack, -1)
        splits.append(InMemory(torch.from_numpy(x), torch.tensor([label for _, label in clips])))
    shape = f"{frames // stack}×{stack * len(mean)}"
    source = f"spoken digits ({folder.name}), {features} {shape}, {len(splits[0])} training and {len(splits[1])} test"
    others = left_out(folder, listing.others, "wav files")
    return Dataset(f"{source} recordings", 10, *splits, left_out=(others,) if others else ())


def speech_known(
    features: Features = "logmel", bands: int = 40, coefficients: int = 13, stack: int = 1, **_: Any
) -> Mapping[str, int]:
    """Return the arguments of a model for `speech`."""
    return {"inputs": stack * (coefficients if features == "mfcc" else bands), "classes": 10}


def _read(path: Path, frames: int) -> tuple[np.ndarray, int]:
    """Return the part of a recording that `frames` windows cover, (samples,) from −1 to 1, and its samples per second."""
    try:
        with wave.open(str(path), "rb") as file:
            rate, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
            raw = file.readframes(int(rate * (_WINDOW + frames * _HOP)))
        kind, zero, scale = _SCALES[width]
        sound = np.frombuffer(raw, kind).reshape(-1, channels).mean(1)
    except KeyError:
        raise DataError(f"{path}: expected 8, 16 or 32 bits per sample, got {8 * width}; convert the file") from None
    except Exception as error:  # noqa: BLE001 - a broken file can raise any exception
        raise unreadable(path, error, "a wav file of plain samples") from None
    if not len(sound) or not 1 / _HOP <= rate <= _RATES:
        raise DataError(
            f"{path}: expected a recording of up to {_RATES} samples per second, got {len(sound)} samples at {rate}"
        )
    return (sound - zero) / scale, rate


def _power(sound: np.ndarray, rate: int, bands: int) -> np.ndarray:
    """Return the power in each band and window, (windows, bands)."""
    length, hop = int(rate * _WINDOW), int(rate * _HOP)
    padded = np.pad(sound, (0, max(0, length - len(sound))))
    window = np.hanning(length + 1)[:-1]
    cut = np.lib.stride_tricks.sliding_window_view(padded, length)[::hop] * window
    filters = _filters(rate, 1 << (2 * length - 1).bit_length(), bands)
    spectrum = np.fft.rfft(cut, 2 * (filters.shape[1] - 1))
    return np.asarray((np.abs(spectrum) ** 2 / (window**2).sum()) @ filters.T)


@lru_cache(maxsize=4)
def _filters(rate: int, points: int, bands: int) -> np.ndarray:
    """Return triangular filters of equal width on the mel scale, each with sum 1: (bands, points / 2 + 1)."""
    highest = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, highest, bands + 2) / 2595) - 1)
    bins = np.linspace(0, rate / 2, points // 2 + 1)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    triangles = np.maximum(0, np.minimum(rising, falling))
    sums = triangles.sum(1, keepdims=True)
    if not sums.all():
        raise DataError(
            f"speech: bands={bands} is too many for {rate} samples per second: some bands hold no frequency; lower bands"
        )
    return np.asarray(triangles / sums)
