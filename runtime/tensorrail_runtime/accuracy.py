"""Top-1 accuracy of an ONNX classifier on data."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tensorrail_runtime.records import Record
from tensorrail_runtime.session import ModelError, open_session, run


class Accuracy(Record):
    """Correct answers out of all, and the percentage."""

    correct: int
    total: int

    @property
    def percent(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * self.correct / self.total


def accuracy(path: Path | str, images: np.ndarray, labels: np.ndarray, *, batch: int = 64, provider: str = "cpu") -> Accuracy:
    """Return the top-1 accuracy of a model with one input (N, …) and class scores (N, classes) as its first output."""
    if not len(images) or len(images) != len(labels):
        raise ModelError(f"accuracy needs as many images as labels, and {len(images)} and {len(labels)} came")
    session = open_session(path, provider=provider)
    name, output = session.get_inputs()[0].name, session.get_outputs()[0].name
    correct = 0
    for start in range(0, len(images), batch):
        scores = run(session, {name: images[start : start + batch]})[output]
        correct += int((scores.argmax(1) == labels[start : start + batch]).sum())
    return Accuracy(correct=correct, total=len(labels))
