"""Sets values to zero that are so small that they change no output, but slow a processor down.

x86 processors take more than a hundred cycles for an operation on a denormal number, below 1.2e-38 in float32. Trained networks
have channels that ended near zero, with weights of 1e-38 and biases alike; their cores have many such values, and a small
convolution then takes many times its time.
"""

from __future__ import annotations

import numpy as np

_NEGLIGIBLE = 1e-30  # products with activations above 1e-8 are no denormals yet
_SMALL = 1e-10  # a tensor whose largest value is below it is left as it is


def without_negligible(values: np.ndarray) -> np.ndarray:
    """Return float32 values with those below 1e-30 set to zero, and others as they are.

    Args:
        values: cores, a weight or a bias, of any shape. A tensor of other types, or whose values are all small, is not changed.

    Returns:
        The values, or a copy.

    """
    if values.dtype != np.float32 or not values.size:
        return values
    sizes = np.abs(values)
    tiny = (sizes < _NEGLIGIBLE) & (values != 0)
    if not tiny.any() or float(sizes.max()) < _SMALL:
        return values
    return np.where(tiny, np.float32(0), values)
