"""What a client is told when its request cannot be answered."""

from __future__ import annotations


class ProtocolError(ValueError):
    """A request that cannot be answered; `status` is the HTTP status, the text the reason in one line."""

    def __init__(self, reason: str, status: int = 400) -> None:
        super().__init__(reason)
        self.status = status
