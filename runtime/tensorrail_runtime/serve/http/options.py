"""The options of `tensorrail serve` and their checks."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from tensorrail_runtime.errors import ModelError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
MIB = 1 << 20


@dataclass(frozen=True)
class RequestLimits:
    """Limits on each request.

    Attributes:
        body: the largest body of a request, in bytes.
        seconds: how long a request may take until its answer.
        accepted: how many requests are accepted at the same time.

    """

    body: int = 64 * MIB
    seconds: float = 30.0
    accepted: int = 256

    def check(self) -> None:
        """Raise `ModelError` for a limit that no request can meet."""
        if self.body < 1 or not (math.isfinite(self.seconds) and self.seconds > 0) or self.accepted < 1:
            raise ModelError(f"expected limits of at least 1 byte, more than 0 seconds and at least 1 request, got {self}")


@dataclass(frozen=True)
class ServeOptions:
    """How a model is served.

    Attributes:
        name: the name of the model in requests.
        host: the address to listen at.
        port: the port to listen at, 0 for any free one.
        address: the Ray cluster: `auto` or HOST:PORT of its head; None starts a local Ray.
        replicas: the number of replicas.
        max_batch: the largest number of samples in a run; 1 turns batching off.
        wait: how many seconds a batch that is not full waits for more requests.
        threads: the number of ONNX Runtime's threads in each replica; 0 divides the processors that this
            process may use among the replicas.
        provider: "cpu", "cuda" or "tensorrt".
        cpus: the number of CPUs that Ray reserves for each replica.
        gpus: the number of GPUs that Ray reserves for each replica; None: 1 with "cuda" or "tensorrt", else 0.
        limits: the limits of a request.
        shadow: the ONNX file of a model that runs on a sample of the requests as well.
        fraction: the share of requests that the shadow model gets.
        grace: how many seconds accepted requests have to finish after the server is told to stop.

    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    address: str | None = None
    replicas: int = 1
    max_batch: int = 8
    wait: float = 0.005
    threads: int = 0
    provider: str = "cpu"
    cpus: float = 1.0
    gpus: float | None = None
    limits: RequestLimits = RequestLimits()
    shadow: Path | None = None
    fraction: float = 0.01
    grace: float = 30.0

    @property
    def reserved_gpus(self) -> float:
        """The number of GPUs that Ray reserves for each replica."""
        return float(self.provider != "cpu") if self.gpus is None else self.gpus

    def check(self) -> None:
        """Raise `ModelError` for a value outside its range; the message is one line."""
        self.limits.check()
        gpus = self.reserved_gpus
        for invalid, reason in (
            (
                not _NAME.fullmatch(self.name),
                f"expected a model name of letters, digits, `.`, `_` and `-`, got {self.name!r}: give another name",
            ),
            (not 0 <= self.port <= 65535, f"expected a port from 0 (any free port) to 65535, got {self.port}"),
            (self.replicas < 1, f"expected 1 or more replicas, got {self.replicas}"),
            (self.max_batch < 1, f"expected a largest batch of 1 or more samples, got {self.max_batch}"),
            (not 0 <= self.wait <= 60, f"expected a batch to wait 0 to 60 seconds, got {self.wait:g}"),
            (not 0 < self.cpus < math.inf, f"expected more than 0 CPUs per replica, got {self.cpus:g}"),
            (
                not (gpus == 0 or 1e-4 <= gpus < 1 or (1 <= gpus < math.inf and gpus == int(gpus))),
                f"expected 0 GPUs per replica, a share from 0.0001 to 1, or a whole number of them, got {gpus:g}",
            ),
            (
                not 0 < self.fraction <= 1,
                f"expected a share of shadowed requests above 0 and at most 1, got {self.fraction:g}",
            ),
            (not 0 <= self.grace < math.inf, f"expected 0 or more seconds to finish accepted requests, got {self.grace:g}"),
            (
                self.address is not None and "://" in self.address,
                f"expected `auto` or HOST:PORT of the cluster's head, got {self.address!r}: the server calls its replicas "
                f"itself and must run on a node of the cluster",
            ),
        ):
            if invalid:
                raise ModelError(reason)


def on_loopback(host: str) -> bool:
    """Return whether the name or address of a host is a loopback address."""
    return host in ("localhost", "::1") or host.startswith("127.")
