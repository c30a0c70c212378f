"""Who speaks (Resemblyzer, LSTM) and whether someone speaks (Silero, whose state is carried on), on synthetic speech."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

import tensorrail as tr
from real.network import Arrays, Data, Network, Packages, count_of, first, from_wheel
from real.ocr import docstrings
from real.voices import PACKAGE, RATE, VOICES, mel_spectrogram, spoken

_FRAMES = 160  # 1.6 s
_STEP, _CONTEXT = 512, 64  # samples
_SPEECH = 0.5  # probability from which a step is speech


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
    """Spectrograms of 1.6 s: half of the voices for calibration, the others held out, with their numbers."""
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


def recordings(packages: Packages, share: float) -> Data:
    """Recordings of sentences with pauses and noise, as steps of 576 samples; one long one is for calibration."""
    folder = packages(PACKAGE)
    calibration = frames(_recording(folder, VOICES[0::2], count_of(512, share), seed=3))
    aside = np.stack([frames(_recording(folder, VOICES[1 + 2 * k :: 2], count_of(256, share), seed=10 + k)) for k in range(12)])
    return Data({"input": calibration}, {"input": aside})


def frames(audio: np.ndarray) -> np.ndarray:
    """Return the steps (N, 576) of a recording: 512 new samples each, behind the last 64 of the step before."""
    new = audio.reshape(-1, _STEP)
    before = np.concatenate([np.zeros((1, _CONTEXT), np.float32), new[:-1, -_CONTEXT:]])
    return np.concatenate([before, new], 1)


def probabilities(model: Path, inputs: Arrays) -> Arrays:
    """Run a model along recordings (N, steps, 576), side by side, and return the probability of speech (N, steps)."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    steps = inputs["input"].swapaxes(0, 1)
    state, found = np.zeros((2, steps.shape[1], 128), np.float32), []
    for step in steps:
        output, state = session.run(None, {"input": step, "state": state, "sr": np.array(RATE, np.int64)})
        found.append(output[:, 0])
    return {"output": np.stack(found, 1)}


def speech_found(outputs: Arrays, dense: Arrays, truth: Any) -> float:
    """Share of the steps that are speech, or not, for both models."""
    return float(np.mean((first(outputs) >= _SPEECH) == (first(dense) >= _SPEECH)))


def _recording(folder: Path, voices: tuple[str, ...], steps: int, seed: int) -> np.ndarray:
    """Return a recording of so many steps: sentences of changing voices, pauses, noise of changing strength."""
    random = np.random.default_rng(seed)
    parts: list[np.ndarray] = []
    for number, text in enumerate(sentences(seed, 64)):
        parts += [spoken(folder, voices[number % len(voices)], text) * random.uniform(0.1, 1.0)]
        parts += [np.zeros(int(random.integers(8_000, 40_000)), np.float32)]
        if sum(map(len, parts)) >= steps * _STEP:
            break
    audio = np.concatenate(parts)[: steps * _STEP]
    audio = np.pad(audio, (0, steps * _STEP - len(audio)))
    strength = 10 ** np.interp(np.arange(len(audio)), np.linspace(0, len(audio), 8), random.uniform(-4, -1.5, 8))
    return (audio + strength * random.standard_normal(len(audio))).astype(np.float32)


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
STATEFUL = {
    "Silero VAD": Network(
        "silero-vad==6.2.3",
        from_wheel("silero_vad/data/silero_vad_16k_op15.onnx"),
        recordings,
        speech_found,
        "steps of the same decision as dense",
        "synthetic speech",
        {"input": (1, _CONTEXT + _STEP), "state": (2, 1, 128)},
        {"constants": {"sr": RATE}, "batch_axes": {"state": 1}, "states": {"state": "stateN"}},
        probabilities,
    ),
}
"""Networks that need `tr.InputRules`."""
