r"""The truncated SVD that every format uses: accurate, and fast on matrices with one side much longer than the other.

For a float32 matrix :math:`M` (m, n) with m ≤ n, the Gram matrix :math:`MM^T` is formed and its m×m eigenproblem solved.
Squaring halves the number of digits, so the first attempt, in float32, resolves singular values down to about 1e-3 of the
largest. Its vectors :math:`U` are orthonormal anyway, and the part of the matrix outside their span is measured. If that
part is so small that the unresolved values could matter, everything is computed again in float64, which resolves values
down to 1e-8, below the rounding of float32 (6e-8). A float64 matrix takes the full SVD.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tensorly as tl

from tensorrail_exporter.formats.contraction import ArrayT

_CAPTURED = 1 - 1e-4  # share of the squared norm above which the float32 result is computed again in float64
_NEGLIGIBLE = 1e-7  # share of the largest singular value: the rounding of float32; directions of smaller values are noise


@contextmanager
def backend_of(array: ArrayT) -> Iterator[None]:
    """Make TensorLy compute with the library, and on the device, of `array` within this block."""
    name = "pytorch" if type(array).__module__.partition(".")[0] == "torch" else "numpy"
    with tl.backend_context(name, local_threadsafe=True):
        yield


def truncated_svd(matrix: ArrayT, n_eigenvecs: int | None = None, **_: object) -> tuple[ArrayT, ArrayT, ArrayT]:
    """Return the k leading singular triplets of a matrix: U (m, k), S (k,) and V (k, n).

    The signature is that of TensorLy's `svd=` argument. It must run inside `backend_of(matrix)`.

    Args:
        matrix: array (m, n) of NumPy or torch.
        n_eigenvecs: k; default and largest value is min(m, n).
        **_: further arguments that TensorLy passes; they are ignored.

    Raises:
        numpy.linalg.LinAlgError: the matrix contains infinity or NaN, with which LAPACK may not terminate.

    """
    rows, columns = matrix.shape
    largest = _largest(matrix)
    if not largest < math.inf:
        raise np.linalg.LinAlgError("expected a matrix of finite values, got infinity or NaN")
    count = min(rows, columns, n_eigenvecs or min(rows, columns))
    if str(matrix.dtype).endswith("float64"):
        u, s, v = tl.svd(matrix, full_matrices=False)
        return u[:, :count], s[:count], v[:count]
    oblong = tl.transpose(matrix) if rows > columns else matrix
    scale = 1.0 if 1e-9 < largest < 1e9 or not largest else largest  # squares of other values overflow float32
    if scale != 1.0:
        oblong = oblong / scale
    u, s, v, share = _gram_svd(oblong, count)
    if count < min(rows, columns) and share > _CAPTURED:
        u, s, v = (like(matrix, part) for part in _gram_svd(double(oblong), count)[:3])
    if scale != 1.0:
        s = s * scale
    return (tl.transpose(v), s, tl.transpose(u)) if rows > columns else (u, s, v)


def double(array: ArrayT) -> ArrayT:
    """Return the array in float64, on the same device."""
    either: Any = array
    wide: ArrayT = either.double() if hasattr(either, "double") else either.astype("float64")
    return wide


def like(array: ArrayT, other: ArrayT) -> ArrayT:
    """Return `other` converted to the dtype of `array`."""
    either: Any = other
    converted: ArrayT = either.to(array.dtype) if hasattr(either, "double") else either.astype(array.dtype)
    return converted


def _largest(matrix: ArrayT) -> float:
    """Return the largest magnitude, or NaN if the matrix contains one."""
    high, low = float(tl.max(matrix)), float(tl.min(matrix))
    return high if math.isnan(high) or high > -low else -low


def _gram_svd(matrix: ArrayT, count: int) -> tuple[ArrayT, ArrayT, ArrayT, float]:
    """Return U (m, k), S (k,) and V (k, n) of a matrix with m ≤ n, from the eigenvectors of M Mᵀ, and their share of ‖M‖²."""
    gram = double(tl.dot(matrix, tl.transpose(matrix)))
    _, vectors = tl.eigh(gram)  # eigenvalues ascend
    u = like(matrix, tl.flip(vectors[:, vectors.shape[1] - count :], axis=1))
    rows = tl.dot(tl.transpose(u), matrix)  # S V
    squares = tl.sum(rows * rows, axis=1)
    s = tl.sqrt(squares)
    floor = float(s[0]) * _NEGLIGIBLE if count else 0.0
    rows /= tl.reshape(tl.clip(s, floor or 1.0, None), (-1, 1))
    return u, s, rows, float(tl.sum(squares)) / (float(tl.trace(gram)) or 1.0)
