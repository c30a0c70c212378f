r"""The two matrices of a head, with fewer values between them.

For matrices :math:`A` (I, d) and :math:`B` (J, d) of a head, and square roots :math:`S, T` of the second moments of what both
are multiplied with, the best :math:`A', B'` with r columns minimise :math:`‖S (A B^T - A' B'^T) T‖`: the truncated SVD of
:math:`S A (T B)^T` (Lin et al., *MoDeGPT*, arXiv:2408.09632, section 3.2). With the thin SVDs :math:`S A = U_a R_a` and
:math:`T B = U_b R_b` only that of the matrix :math:`R_a R_b^T` (d, d) is needed. Each of the two gets the root of the singular
values.
"""

from __future__ import annotations

import numpy as np

_FLOOR = 1e-4  # share of the mean eigenvalue: keeps directions that hardly occur from being lost
_ZERO = 1e-12  # share of the largest singular value


def narrowed(
    first: np.ndarray, second: np.ndarray, size: int, roots: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
) -> tuple[np.ndarray, np.ndarray]:
    """Return two matrices with fewer columns, whose product is nearest to that of the given ones.

    Args:
        first: the matrix A (I, d).
        second: the matrix B (J, d).
        size: the number r of columns.
        roots: S (I, I) and T (J, J), whose squares are the second moments of inputs; None: the identity.

    Returns:
        A' (I, r) and B' (J, r), with zeros in columns beyond the rank of A Bᵀ.

    """
    to_first, reduced_first = _thin(first, roots[0])
    to_second, reduced_second = _thin(second, roots[1])
    left, values, right = np.linalg.svd(reduced_first @ reduced_second.T)
    kept = min(size, len(values))
    scales = np.sqrt(values[:kept])
    pair = to_first @ (left[:, :kept] * scales), to_second @ (right[:kept].T * scales)
    return _padded(pair[0], size), _padded(pair[1], size)


def root(moment: np.ndarray) -> np.ndarray:
    """Return a matrix S with Sᵀ S = C of a second moment C (n, n); small eigenvalues are raised."""
    values, vectors = np.linalg.eigh(moment.astype(np.float64))
    raised = np.maximum(values, _FLOOR * max(float(values.mean()), 1e-30))
    return np.asarray((vectors * np.sqrt(raised)).T)


def _thin(matrix: np.ndarray, metric: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return A R⁺ (I, d) and R (d, d) of a matrix A (I, d), where S A = U R with orthonormal columns U."""
    weighted = matrix if metric is None else metric @ matrix
    _, values, right = np.linalg.svd(weighted, full_matrices=False)
    inverse = np.where(values > _ZERO * max(float(values[:1].sum()), 1e-30), 1 / np.maximum(values, 1e-300), 0.0)
    return matrix @ (right.T * inverse), values[:, None] * right


def _padded(matrix: np.ndarray, columns: int) -> np.ndarray:
    return np.pad(matrix, ((0, 0), (0, columns - matrix.shape[1])))
