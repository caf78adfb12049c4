"""The Newton-Schulz iteration on stacks of matrices.

Iterations are evaluated in groups: a group forms R = X X^T once, evaluates its polynomial on R, and then multiplies X by it.
"""

from collections.abc import Generator, Sequence
from math import isfinite, log2, sqrt

import torch
from torch import Tensor

from ..cache_blocks import BLOCK_BYTES
from .products import product, symmetric_product
from .variants import SIXTEEN_BIT_DTYPES, Coefficients

MIN_NORM = 1e-30
"""Smallest norm that X is divided by. A matrix with a smaller norm stays below norm 1, and a zero matrix stays zero."""

MIN_SQUARABLE_NORM = 2.0**-50
"""Frobenius norm below which squares of entries are too close to float32's smallest number to be exact."""

PRESCALE = 2.0**80
"""Factor for matrices below :data:`MIN_SQUARABLE_NORM`; multiplying by a power of two is exact."""

FLOAT16_NORM = 2.0**6
"""Norm at which float16 matrices are kept: their small entries keep their digits, and R stays far below the maximum, 65504."""

MAX_STACKED_BFLOAT16_ENTRIES = 2**15
"""Entries per bfloat16 matrix up to which a CPU is faster with one float32 iteration of the stack than with one per matrix."""

NORM_BLOCK_ENTRIES = BLOCK_BYTES["cpu"] // 8
"""Entries whose squares are summed at a time: in float32, half the size of a usual second-level cache."""

MAX_UNSHIFTED_NORM = 2.0**30
"""Largest norm of a bfloat16 matrix on CPU that is iterated as it is, and reciprocal of the smallest one."""


def iterate(
    x: Tensor,
    groups: Sequence[Coefficients],
    dtype: torch.dtype,
    *,
    wide: bool,
    is_whole: bool,
    scale: float,
    eps: float,
) -> Generator[Tensor, Tensor, Tensor]:
    """``scale`` times the iterations of ``groups`` on X / (‖X‖ + eps).

    The norm is divided by where that rounds least. In 16 bits, X is divided before the first iteration. In float32 and float64,
    the first R gives the norm, as the root of its trace, and is divided instead of X. Large bfloat16 matrices on CPU go through
    :func:`_iterate_unnormalized`.

    Args:
        x: X, (B, m, n), or this rank's columns of it; X^T or this rank's rows of it where ``wide`` is False. Without the stack
            dimension for a single matrix that :func:`.products.runs_unbatched` on CPU. Not changed.
        groups: Coefficients of the iterations, one entry for each Gram matrix R that is formed from X.
        dtype: Arithmetic of the iterations; 16 bits only for whole matrices.
        wide: Whether ``x`` holds X (m <= n), not X^T.
        is_whole: Whether this rank has the whole matrix.
        scale: Factor of the result.
        eps: Number added to the Frobenius norm.

    Yields:
        X X^T of this rank's columns, (B, m, m); the caller sends its sum over ranks.

    Returns:
        A tensor of the shape and dtype of ``x``.
    """
    result_dtype, norm_of_x = x.dtype, 1.0
    if dtype == torch.bfloat16 and x.is_cpu and x.shape[-2] * x.shape[-1] > MAX_STACKED_BFLOAT16_ENTRIES:
        coefs = [abc for group in groups for abc in group]
        if x.ndim == 2:
            return _iterate_unnormalized(x, coefs, scale, eps)
        return torch.stack([_iterate_unnormalized(matrix, coefs, scale, eps) for matrix in x])
    in_16_bits = dtype in SIXTEEN_BIT_DTYPES
    if in_16_bits:
        x, norm_of_x = _normalized(x, dtype, eps)
    else:
        x = x.to(dtype)
    prescale = x.new_ones(())
    if is_whole and not x.is_cpu and not in_16_bits:
        # Always multiplied, by 1 as a rule: to look whether that is needed, the host would have to wait.
        prescale = _prescale(_norms(x)).to(x.dtype)
        x = x * prescale
    for i, group in enumerate(groups):
        r = yield _gram(x, wide)
        factor: Tensor | float = 1.0
        if i == 0 and not in_16_bits:
            norms = _root_of_trace(r)
            # Every rank has this R, so either all of them or none ask for another one.
            if x.is_cpu and bool((norms < MIN_SQUARABLE_NORM).any()):
                prescale = _prescale(norms).to(x.dtype)
                x = x * prescale
                r = yield _gram(x, wide)
                norms = _root_of_trace(r)
            factor = _inverse(norms, eps * prescale, MIN_NORM * prescale)
            r = r * factor.square()
        q, p = _polynomial(r, group, norm_of_x**-2, split_identity=dtype != torch.float16)
        if i == len(groups) - 1 and dtype != torch.float16:
            factor = factor * scale
        x = _apply_polynomial(x, q, p, factor, wide)
        if dtype == torch.bfloat16:
            x = x.to(dtype)
    if dtype == torch.float16:
        return _multiplied(x, x.new_full((1,) * x.ndim, scale / norm_of_x, dtype=torch.float32), result_dtype)
    return x.to(result_dtype)


def _iterate_unnormalized(x: Tensor, coefs: Coefficients, scale: float, eps: float) -> Tensor:
    """The iterations on one bfloat16 matrix (m, n) on CPU, divided by its norm only at the end.

    oneDNN compiles a product anew for each value of ``beta``, not of ``alpha``, so the norm must not get into ``beta``; and
    dividing X by it first would round every entry once more, where later iterations amplify that most. R and P are divided as
    they are formed, so only X is larger than usual.
    """
    norm = _norm(x)
    if not isfinite(norm):
        return torch.full_like(x, torch.nan)
    if not norm:
        return torch.zeros_like(x)
    inverse = 1 / max(norm + eps, MIN_NORM)
    if not 1 / MAX_UNSHIFTED_NORM < norm < MAX_UNSHIFTED_NORM:
        # Later iterations must neither overflow nor vanish; a power of two is exact.
        shift = 2.0 ** -max(-100, min(100, round(log2(norm))))
        x, inverse = x * shift, inverse / shift
    for a, b, c in coefs:
        r = symmetric_product(x, x.mT, alpha=inverse**2)
        x = product(symmetric_product(r, r, r, beta=b, alpha=c), x, x, beta=a)
    return x * (inverse * scale)


def _normalized(x: Tensor, dtype: torch.dtype, eps: float) -> tuple[Tensor, float]:
    """X for 16-bit iterations, and its norm (but for ``eps``): 64 in float16, 1 in float32 before bfloat16 iterations."""
    # One rounding for division and cast. In bfloat16 even that is one too many, so the first iteration is in float32.
    norm, first_dtype = (FLOAT16_NORM, dtype) if dtype == torch.float16 else (1.0, torch.float32)
    return _multiplied(x, norm * _inverse(_norms(x), eps, MIN_NORM), first_dtype), norm


def _polynomial(
    r: Tensor, coefs: Coefficients, r_scale: float, *, split_identity: bool
) -> tuple[Tensor | float, Tensor]:
    """q and P such that (q I + P) X is the iterations ``coefs`` of X, for X X^T = ``r_scale`` R; changes nothing.

    All factors are polynomials in R and commute. With ``split_identity`` P holds no multiple of the identity, so that its
    rounding is no larger than that of X; float16 is more exact without it.
    """
    q = 0.0
    p = r
    for i, (a, b, c) in enumerate(coefs):
        # No more of these live at a time than are needed: for a square matrix each is as large as X.
        z = symmetric_product(r, r, r, beta=b * r_scale, alpha=c * r_scale**2)
        if i < len(coefs) - 1:
            rz = symmetric_product(r, z, r, beta=a)
            r = symmetric_product(rz, z, rz, beta=a)
            del rz
        if i == 0:
            q, p = a, z
        elif split_identity:
            p = symmetric_product(p, z, (p * a).add_(z, alpha=q))
            q *= a
        else:
            if i == 1:
                _diagonal(p).add_(q)
                q = 0.0
            p = symmetric_product(p, z, p, beta=a)
        del z
    if split_identity and len(coefs) > 1:
        # q I and P cancel where singular values have grown; the mean of P's diagonal moves to q, so that less cancels.
        mean = _diagonal(p).mean(-1, keepdim=True)
        _diagonal(p).sub_(mean)
        return mean[..., None] + q, p
    return q, p


def _apply_polynomial(x: Tensor, q: Tensor | float, p: Tensor, factor: Tensor | float, wide: bool) -> Tensor:
    """``factor`` (q X + P X), or its transpose where ``x`` holds X^T."""
    if x.ndim == 2:
        # A number goes into the product itself; on CPU reading it costs nothing.
        q, factor = float(q), float(factor)
    left, right = (p, x) if wide else (x, p)
    if isinstance(q, float) and isinstance(factor, float):
        return product(left, right, x if q else None, beta=q * factor, alpha=factor)
    p = p * factor
    left, right = (p, x) if wide else (x, p)
    return product(left, right, x * (q * factor))


def _gram(x: Tensor, wide: bool) -> Tensor:
    return symmetric_product(x, x.mT) if wide else symmetric_product(x.mT, x)


def _diagonal(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1)


def _prescale(norms: Tensor) -> Tensor:
    """The exact factor of each matrix that keeps the squares of its entries from vanishing; 1 for most."""
    return torch.where(norms < MIN_SQUARABLE_NORM, PRESCALE, 1.0)


def _root_of_trace(r: Tensor) -> Tensor:
    """Frobenius norms of X, (B, 1, 1), or (1, 1) for one R."""
    return _diagonal(r).sum(-1)[..., None, None].sqrt()


def _norm(x: Tensor) -> float:
    """Frobenius norm of one bfloat16 matrix; in blocks that fit the cache, which is twice as fast as torch's."""
    rows = max(1, NORM_BLOCK_ENTRIES // x.shape[-1])
    blocks = (block.float().flatten() for block in x.split(rows))
    norm = sqrt(sum(float(torch.dot(block, block)) for block in blocks))
    accurate = norm >= MIN_SQUARABLE_NORM or norm != norm
    return norm if accurate else float(torch.linalg.vector_norm(x, dtype=torch.float64))


def _norms(x: Tensor) -> Tensor:
    """Frobenius norms of a stack, (B, 1, 1) float32. Row by row: one sum of millions of squares loses its third digit."""
    # In float64 nothing vanishes. On CPU float64 takes many times as long, and looking at the outcome costs nothing.
    rows = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32 if x.is_cpu else torch.float64)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-2, keepdim=True)
    if x.is_cpu and bool((norms < MIN_SQUARABLE_NORM).any()):
        norms = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    return norms.float()


def _inverse(norms: Tensor, eps: Tensor | float, smallest: Tensor | float) -> Tensor:
    """1 / max(norms + eps, smallest); NaN, not 0, for an infinite norm, so that the result is not finite either."""
    return (norms.masked_fill(norms.isinf(), torch.nan) + eps).clamp_min(smallest).reciprocal()


def _multiplied(x: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` times float32 ``factors`` in ``dtype``, rounded once and in one pass."""
    return torch.mul(x, factors, out=torch.empty_like(x, dtype=dtype))
