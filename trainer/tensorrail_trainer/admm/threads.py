"""How many of NumPy's threads compute between training steps."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

from threadpoolctl import ThreadpoolController

SMALL = 2**20
"""Values of a matrix up to which one thread computes its decomposition."""


def one_thread_if_small(values: int) -> AbstractContextManager[object]:
    """Return a context in which NumPy decomposes a matrix of up to `SMALL` values with one thread.

    torch's threads spin after every step, and NumPy's threads beside them took several times as long as one.

    Args:
        values: the number of values of the matrix.

    """
    return _libraries().limit(limits=1, user_api="blas") if values <= SMALL else nullcontext()


@lru_cache(maxsize=1)
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()  # cached, since it searches the process for libraries
