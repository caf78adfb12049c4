"""Roots, eigenvectors, norms and rotations of square matrices."""

import torch
from torch import Tensor
from torch.linalg import vector_norm

MAX_ROTATION = 1 / 8
"""Largest coefficient of a generator of norm 1 in :func:`rotate_towards_symmetry`; the second-order exponential is accurate up to
there. psgd_torch's value."""


def eigen(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,), rising, and eigenvectors (n, n), in columns, of symmetric ``a`` (n, n); NaN if ``a`` is not finite."""
    # In float32 LAPACK sometimes fails on many nearly equal eigenvalues, as low-rank statistics have them.
    for matrix in (a, a.double()):
        try:
            values, vectors = torch.linalg.eigh(matrix)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        return values.to(a.dtype), vectors.to(a.dtype)
    if a.isfinite().all():
        raise RuntimeError(f"no eigenvalues were found for a {len(a)} x {len(a)} matrix, not even in float64.")
    return torch.full_like(a[0], torch.nan), torch.full_like(a, torch.nan)


def matrix_inverse_root(a: Tensor, order: int, *, eps: float) -> Tensor:
    """(A + eps·I)^(-1/order) of a positive semidefinite matrix.

    Args:
        a: (n, n), symmetric; float32 or float64.
        order: Order of the root, 2 for the square root.
        eps: Number above 0, because an eigenvalue of 0 has no inverse.

    Returns:
        (n, n), symmetric.
    """
    values, vectors = eigen(a)
    # Rounding leaves eigenvalues of 0 slightly negative.
    roots = values.clamp_min(0).add(eps).pow(-1 / order)
    return (vectors * roots) @ vectors.mT


# emerging-optimizers has the next two functions for one matrix at a time, with random numbers from torch's global generator.


def norm_lower_bound(a: Tensor, probe: Tensor) -> Tensor:
    """A lower bound, (N,), on the spectral norms of symmetric or skew-symmetric ``a`` (N, d, d), mostly a close one.

    Power iterations on vectors around the longest row; ``probe`` is standard normal, (N, 4, d).

    Source: github.com/lixilinx/psgd_torch
    """
    tiny = torch.finfo(a.dtype).tiny
    scale = a.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)
    a = a / scale
    energy, longest = a.square().mean(-1).max(-1, keepdim=True)
    row = a.take_along_dim(longest.unsqueeze(-1), 1) * energy.clamp_min(tiny).rsqrt().unsqueeze(-1)
    x = (row + probe) @ a
    for _ in range(5):
        x = (x / x.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)) @ a
    x = (x / vector_norm(x, dim=-1, keepdim=True).clamp_min(tiny)) @ a
    longest_image: Tensor = vector_norm(x, dim=-1).amax(-1)
    return longest_image * scale.flatten()


def rotate_towards_symmetry(q: Tensor, probe: Tensor) -> Tensor:
    """exp(a·R)·Q to second order, R = (Qᵀ - Q)/‖Qᵀ - Q‖: a step towards the rotation of Q that is nearest to I.

    QᵀQ stays what it is. ``a`` ≤ 1/8 maximizes the trace of the result along R.

    Args:
        q: (N, d, d).
        probe: Standard normal, (N, 4, d).

    Source: github.com/lixilinx/psgd_torch (the Procrustes step)
    """
    r = q.mT - q
    r /= norm_lower_bound(r, probe).clamp_min(torch.finfo(q.dtype).tiny)[:, None, None]
    rq = r @ q
    rrq = r @ rq
    slope, curvature = (x.diagonal(dim1=-2, dim2=-1).sum(-1) for x in (rq, rrq))
    a = torch.where(curvature < 0, (-slope / curvature).clamp(0, MAX_ROTATION), MAX_ROTATION)[:, None, None]
    return q + a * (rq + a / 2 * rrq)
