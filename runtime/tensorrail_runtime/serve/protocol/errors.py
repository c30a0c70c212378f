"""The error for requests that cannot be answered."""

from __future__ import annotations


class ProtocolError(ValueError):
    """A request cannot be answered; `status` is the HTTP status, and the message gives the reason in one line."""

    def __init__(self, reason: str, status: int = 400) -> None:
        super().__init__(reason)
        self.status = status
