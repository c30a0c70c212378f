"""Who speaks (Resemblyzer, LSTM), on synthetic speech."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

import tensorrail as tr
from real.network import Arrays, Data, Network, Packages, count_of, first
from real.ocr import docstrings
from real.voices import PACKAGE, VOICES, mel_spectrogram, spoken

_FRAMES = 160  # 1.6 s


class VoiceEncoder(nn.Module):
    """Resemblyzer's network: three LSTM layers, a linear layer and ReLU; the embedding has norm 1."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (N, 256) of spectrograms (N, frames, 40)."""
        _, (hidden, _) = self.lstm(mels)
        embedding = torch.relu(self.linear(hidden[-1]))
        return embedding / torch.norm(embedding, dim=1, keepdim=True)


def write_encoder(package: Path, path: Path) -> None:
    """Export the weights of the package."""
    stored = torch.load(package / "resemblyzer" / "pretrained.pt", map_location="cpu", weights_only=True)["model_state"]
    module = VoiceEncoder()
    module.load_state_dict({name: stored[name] for name in module.state_dict()})
    example = {"mels": torch.zeros(2, _FRAMES, 40)}
    tr.save_model(tr.to_onnx(module, example, output_names=["embedding"]), path)


def speakers(packages: Packages, share: float) -> Data:
    """Spectrograms of 1.6 s: half of the voices for calibration, the others set aside, with their numbers."""
    folder = packages(PACKAGE)
    calibration = _spectrograms(folder, VOICES[0::2], count_of(192, share), seed=1)
    count = count_of(320, share)
    return Data(
        {"mels": calibration},
        {"mels": _spectrograms(folder, VOICES[1::2], count, seed=2)},
        np.arange(count) % len(VOICES[1::2]),
    )


def nearest_speaker(outputs: Arrays, dense: Arrays, truth: np.ndarray) -> float:
    """Share of the samples whose nearest other sample, by cosine, is of the same voice."""
    embeddings = first(outputs)
    similarity = embeddings @ embeddings.T
    np.fill_diagonal(similarity, -np.inf)
    return float(np.mean(truth[similarity.argmax(1)] == truth))


def sentences(seed: int, count: int) -> list[str]:
    """Return sentences of the standard library's docstrings; even seeds get others than odd ones."""
    random = np.random.default_rng(seed)
    known = sorted({_sentence(text) for text in docstrings() if 30 < len(_sentence(text)) < 160})[seed % 2 :: 2]
    return [known[k] for k in random.permutation(len(known))[:count]]


def _sentence(text: str) -> str:
    return " ".join(text.partition("\n\n")[0].split())


def _spectrograms(folder: Path, voices: tuple[str, ...], count: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    known = sentences(seed, count)
    rows = []
    for number in range(count):
        audio = spoken(folder, voices[number % len(voices)], known[number % len(known)])
        mels = mel_spectrogram(audio * random.uniform(0.3, 1.0) + random.normal(0, 1e-3, len(audio)).astype(np.float32))
        begin = int(random.integers(0, max(1, len(mels) - _FRAMES)))
        rows.append(np.resize(mels[begin : begin + _FRAMES], (_FRAMES, 40)))
    return np.stack(rows)


NETWORKS = {
    "Resemblyzer LSTM": Network(
        "Resemblyzer==0.1.4",
        write_encoder,
        speakers,
        nearest_speaker,
        "nearest sample of the same voice",
        "synthetic speech",
    ),
}
