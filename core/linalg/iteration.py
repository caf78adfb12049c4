"""The iteration itself, on stacks of matrices: groups of steps on R = X X^T, and X multiplied after each group."""

from collections.abc import Generator, Sequence
from math import isfinite, log2, sqrt

import torch
from torch import Tensor

from .products import product, symmetric_product
from .variants import NARROW, Coefficients

EPS = 1e-30
"""Smallest norm that is divided by: a zero matrix stays zero, one with a smaller norm comes out smaller."""

VANISHING = 2.0**-50
"""Norm of a matrix below which the squares of its entries, in float32, are too small to be exact."""

LIFT = 2.0**80
"""What brings such a matrix near 1; exact."""

UNIT = 2.0**6
"""Norm of float16 matrices: their small entries keep their digits, and R stays far below the largest number, 65504."""

SMALL = 2**15
"""Entries of a bfloat16 matrix up to which CPU is quicker at one float32 iteration of the stack than at one of each matrix."""

BLOCK = 2**16
"""Entries whose squares are summed at a time: in float32, half the size of a usual second-level cache."""

LARGEST = 2.0**30
"""Norm from which, and below whose reciprocal, a bfloat16 matrix on CPU is brought near 1 first."""


def iterate(
    x: Tensor, groups: Sequence[Coefficients], dtype: torch.dtype, *, wide: bool, whole: bool, scale: float, eps: float
) -> Generator[Tensor, Tensor, Tensor]:
    """``scale`` times the iterations of ``groups`` on X / (‖X‖ + eps); ‖X‖ is the root of the trace of R where that is exact.

    Args:
        x: X, (B, m, n), or this rank's columns of it; with not ``wide``, X^T or this rank's rows. (m, n) for one on CPU that is
            worth calls of its own. The whole where ``dtype`` has 16 bits. Not changed.
        groups: Iterations between two Gram matrices.
        dtype: Of the arithmetic.
        wide: Whether ``x`` is X.
        whole: Whether it is the whole of it.
        scale: Factor of the result.
        eps: Added to the norm.

    Yields:
        X X^T of this rank's columns, (B, m, m); to be sent the sum over ranks.

    Returns:
        As ``x``, in its dtype.
    """
    given, size = x.dtype, 1.0
    if dtype == torch.bfloat16 and x.is_cpu and x.shape[-2] * x.shape[-1] > SMALL:
        coefs = [abc for group in groups for abc in group]
        if x.ndim == 2:
            return _unscaled(x, coefs, scale, eps)
        return torch.stack([_unscaled(one, coefs, scale, eps) for one in x])
    if dtype in NARROW:
        # Divided by the norm while it is cast. In bfloat16 that would be one rounding more, so the first iteration is in float32.
        size, first_dtype = (UNIT, dtype) if dtype == torch.float16 else (1.0, torch.float32)
        x = _rounded(x, size * _inverse(_norms(x), eps, EPS), first_dtype)
    else:
        x = x.to(dtype)
    lift = x.new_ones(())
    if whole and not x.is_cpu and dtype not in NARROW:
        # Without looking at the outcome, for which the host would have to wait.
        lift = _lift(_norms(x)).to(x.dtype)
        x = x * lift
    for i, group in enumerate(groups):
        r = yield _gram(x, wide)
        factor: Tensor | float = 1.0
        if i == 0 and dtype not in NARROW:
            norms = _root_of_trace(r)
            # Every rank has this R, so all or none of them ask for another one.
            if x.is_cpu and bool((norms < VANISHING).any()):
                lift = _lift(norms).to(x.dtype)
                x = x * lift
                r = yield _gram(x, wide)
                norms = _root_of_trace(r)
            factor = _inverse(norms, eps * lift, EPS * lift)
            r = r * factor.square()
        q, p = _polynomial(r, group, size**-2, apart=dtype != torch.float16)
        if i == len(groups) - 1 and dtype != torch.float16:
            factor = factor * scale
        x = _combined(x, q, p, factor, wide)
        if dtype == torch.bfloat16:
            x = x.to(dtype)
    return (
        _rounded(x, x.new_full((1,) * x.ndim, scale / size, dtype=torch.float32), given) if size != 1.0 else x.to(given)
    )


def _unscaled(x: Tensor, coefs: Coefficients, scale: float, eps: float) -> Tensor:
    """The iterations on one bfloat16 matrix (m, n) on CPU, which stays norm times too large until the end.

    oneDNN compiles a product anew for each value of ``beta``, not of ``alpha``, so the norm must not get into ``beta``; and
    dividing X by it first would round every entry once more, where later iterations amplify that most. R and P are as large
    as ever.
    """
    norm = _norm(x)
    if not isfinite(norm):
        return torch.full_like(x, torch.nan)
    if not norm:
        return torch.zeros_like(x)
    inverse = 1 / max(norm + eps, EPS)
    if not 1 / LARGEST < norm < LARGEST:
        # Exact. Later iterations must neither overflow nor vanish.
        shift = 2.0 ** -max(-100, min(100, round(log2(norm))))
        x, inverse = x * shift, inverse / shift
    for a, b, c in coefs:
        r = symmetric_product(x, x.mT, alpha=inverse**2)
        x = product(symmetric_product(r, r, r, beta=b, alpha=c), x, x, beta=a)
    return x * (inverse * scale)


def _polynomial(r: Tensor, coefs: Coefficients, unit: float, *, apart: bool) -> tuple[Tensor | float, Tensor]:
    """q and P with (q I + P) X = the iterations ``coefs`` on X, for X X^T = ``unit`` R; changes nothing.

    All factors are polynomials in R and commute. With ``apart`` the identity is kept out of P, whose rounding is then no larger
    than that of X; float16 is more exact without.
    """
    q = 0.0
    p = r
    for i, (a, b, c) in enumerate(coefs):
        # No more of these at a time than are needed: for a square matrix each is as large as X.
        z = symmetric_product(r, r, r, beta=b * unit, alpha=c * unit**2)
        if i < len(coefs) - 1:
            rz = symmetric_product(r, z, r, beta=a)
            r = symmetric_product(rz, z, rz, beta=a)
            del rz
        if i == 0:
            q, p = a, z
        elif apart:
            p = symmetric_product(p, z, (p * a).add_(z, alpha=q))
            q *= a
        else:
            if i == 1:
                _diagonal(p).add_(q)
                q = 0.0
            p = symmetric_product(p, z, p, beta=a)
        del z
    if apart and len(coefs) > 1:
        # q I and P cancel where singular values have grown; as little as can be.
        mean = _diagonal(p).mean(-1, keepdim=True)
        _diagonal(p).sub_(mean)
        return mean[..., None] + q, p
    return q, p


def _combined(x: Tensor, q: Tensor | float, p: Tensor, factor: Tensor | float, wide: bool) -> Tensor:
    """``factor`` (q X + P X)."""
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


def _lift(norms: Tensor) -> Tensor:
    return torch.where(norms < VANISHING, LIFT, 1.0)


def _root_of_trace(r: Tensor) -> Tensor:
    """(B, 1, 1), or (1, 1) for one R."""
    return _diagonal(r).sum(-1)[..., None, None].sqrt()


def _norm(x: Tensor) -> float:
    """Frobenius norm of a bfloat16 matrix; in blocks that fit the cache, twice as fast as torch's."""
    rows = max(1, BLOCK // x.shape[-1])
    blocks = (block.float().flatten() for block in x.split(rows))
    norm = sqrt(sum(float(torch.dot(block, block)) for block in blocks))
    return norm if norm >= VANISHING or norm != norm else float(torch.linalg.vector_norm(x, dtype=torch.float64))


def _norms(x: Tensor) -> Tensor:
    """(B, 1, 1) float32. Row by row: a sum of millions of squares in one go loses its third digit."""
    # In float64 nothing vanishes; on CPU that takes many times as long, and there a look at the outcome costs nothing.
    rows = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32 if x.is_cpu else torch.float64)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-2, keepdim=True)
    if x.is_cpu and bool((norms < VANISHING).any()):
        norms = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    return norms.float()


def _inverse(norms: Tensor, eps: Tensor | float, floor: Tensor | float) -> Tensor:
    """What X is multiplied by; NaN, not 0, for a norm that is infinite, so that no finite result comes of it."""
    return (norms.masked_fill(norms.isinf(), torch.nan) + eps).clamp_min(floor).reciprocal()


def _rounded(x: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` times float32 ``factors`` in ``dtype``, rounded once and in one pass."""
    return torch.mul(x, factors, out=torch.empty_like(x, dtype=dtype))
