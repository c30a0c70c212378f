"""How many of NumPy's threads compute between training steps."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

from threadpoolctl import ThreadpoolController

SMALL = 2**20
"""Values of a weight up to which one thread projects it."""
SYMMETRIC = 2**17
"""Values of a symmetric matrix up to which one thread computes its eigenvalues. On two cores beside torch's threads, one thread
took a twentieth of the time of two at 64 × 64, the same at 256 × 256, and 1.3 times as long at 512 × 512."""


def one_thread_if_small(values: int, most: int = SMALL) -> AbstractContextManager[object]:
    """Return a context in which NumPy decomposes a small matrix with one thread.

    torch's threads spin after every step, and NumPy's threads beside them take longer than one for small matrices.

    Args:
        values: the number of values of the matrix.
        most: the number of values up to which it is small.

    """
    return _libraries().limit(limits=1, user_api="blas") if values <= most else nullcontext()


@lru_cache(maxsize=1)
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()  # cached, since it searches the process for libraries
