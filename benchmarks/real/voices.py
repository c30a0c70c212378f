"""Speech of many voices, made by eSpeak NG, and what networks of speech take as input."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

PACKAGE = "espeakng-loader==0.2.4"
RATE = 16_000  # samples per second

_SYNCHRONOUS, _CHARS = 2, 1  # AUDIO_OUTPUT_SYNCHRONOUS, espeakCHARS_UTF8
_RATE_UP, _RATE_DOWN = 320, 441  # 22,050 samples per second become 16,000
_FFT, _HOP, _MELS = 400, 160, 40  # 25 ms, 10 ms

_NAMES = """
Alex Alicia Andrea Andy Annie Denis Diogo Gene Henrique Hugo Jacky Lee Marco Mario Michael Mike Nguyen Reed adam
anika antonio aunty belinda benjamin boris caleb david ed edward f1 f2 f3 f4 f5 grandma grandpa gustave ian iven
john kaukovalta linda m1 m2 m3 m4 m5 m6 m7 m8 max michel miguel norbert pablo paul pedro quincy rob robert sandro
shelby steph travis victor zac
"""
VOICES = tuple(_NAMES.split())


@cache
def _library(folder: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(folder / "espeakng_loader" / "libespeak-ng.so"))
    if library.espeak_Initialize(_SYNCHRONOUS, 0, str(folder / "espeakng_loader").encode(), 0) <= 0:
        raise RuntimeError(f"{PACKAGE}: eSpeak NG found no voices in {folder}")
    return library


def spoken(folder: Path, voice: str, text: str) -> np.ndarray:
    """Return a text spoken by a voice of `VOICES`, 16,000 samples per second from −1 to 1.

    Args:
        folder: the folder of the unzipped package.
        voice: the voice.
        text: the text, in English.

    """
    library = _library(folder)
    chunks: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def take(samples, count, events):  # type: ignore[no-untyped-def]
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(take)
    if library.espeak_SetVoiceByName(f"en+{voice}".encode()):
        raise RuntimeError(f"{PACKAGE}: there is no voice {voice}")
    data = text.encode()
    library.espeak_Synth(data, len(data) + 1, 0, 0, 0, _CHARS, None, None)
    library.espeak_Synchronize()
    return resample_poly(np.concatenate(chunks).astype(np.float32) / 32768, _RATE_UP, _RATE_DOWN).astype(np.float32)


def mel_spectrogram(audio: np.ndarray) -> np.ndarray:
    """Return the power in 40 mel bands (frames, 40), one frame every 10 ms, in Slaney's form."""
    padded = np.pad(audio, _FFT // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FFT)[::_HOP]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_FFT) / _FFT)
    return (np.abs(np.fft.rfft(frames * window)) ** 2 @ _filters().T).astype(np.float32)


@cache
def _filters() -> np.ndarray:
    edges = _hertz(np.linspace(0, _mel(np.array(RATE / 2)), _MELS + 2))
    bins = np.fft.rfftfreq(_FFT, 1 / RATE)
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    return np.minimum(rising, falling).clip(0) * (2 / (edges[2:] - edges[:-2]))[:, None]


def _mel(hertz: np.ndarray) -> np.ndarray:
    return np.where(hertz < 1000, hertz * 3 / 200, 15 + 27 * np.log(np.maximum(hertz, 1000) / 1000) / np.log(6.4))


def _hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(np.log(6.4) * (mel - 15) / 27))
