"""LSTM and GRU classifiers of sequences."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RecurrentClassifier(nn.Module):
    """LSTM or GRU layers over a sequence and a linear head on the last hidden state: (B, T, inputs) → (B, classes).

    In a bidirectional network the head uses the last states of both directions, each after the whole sequence.
    """

    rnn: nn.LSTM | nn.GRU

    def __init__(
        self,
        kind: type[nn.LSTM | nn.GRU],
        inputs: int,
        hidden: int,
        classes: int,
        layers: int,
        bidirectional: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.rnn = kind(inputs, hidden, layers, batch_first=True, dropout=dropout, bidirectional=bidirectional)
        self.classifier = nn.Linear(hidden * (2 if bidirectional else 1), classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores."""
        _, states = self.rnn(x)
        last = states[0] if isinstance(states, tuple) else states  # (layers · directions, B, hidden)
        features = torch.cat([last[-2], last[-1]], 1) if self.rnn.bidirectional else last[-1]
        scores: Tensor = self.classifier(features)
        return scores


class LSTMClassifier(RecurrentClassifier):
    """An LSTM over a sequence and a linear head: (B, T, inputs) → (B, classes)."""

    def __init__(
        self, inputs: int, hidden: int, classes: int, layers: int = 1, bidirectional: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__(nn.LSTM, inputs, hidden, classes, layers, bidirectional, dropout)


class GRUClassifier(RecurrentClassifier):
    """A GRU over a sequence and a linear head: (B, T, inputs) → (B, classes)."""

    def __init__(
        self, inputs: int, hidden: int, classes: int, layers: int = 1, bidirectional: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__(nn.GRU, inputs, hidden, classes, layers, bidirectional, dropout)
