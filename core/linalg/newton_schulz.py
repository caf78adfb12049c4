"""Newton-Schulz orthogonalization of whole and of sharded matrices.

Both forms evaluate the same polynomial. *Classic* iterates on X; *Gram* iterates on R = X X^T, m × m for m ≤ n, and
multiplies X once: fewer operations on wide matrices, and on shards one reduction of R instead of one per iteration.
"""

from collections.abc import Generator, Sequence
from functools import partial
from typing import Any

import torch
from emerging_optimizers.orthogonalized_optimizers.muon_utils import _COEFFICIENT_SETS, get_coefficient_iterator
from torch import Tensor

from ..layout import Layout
from .precision import matmul_precision
from .products import is_large, product, symmetric_product

Coefficients = Sequence[tuple[float, float, float]]

EPS = 1e-15
"""Smallest norm that is divided by: a zero matrix stays zero, anything that float32 can square is normalised."""

SMALL = 2**17
"""Entries of a bfloat16 matrix up to which CPU is quicker at a float32 iteration than at compiling kernels for its norm."""


def coefficients(coefficient_type: str, steps: int) -> Coefficients:
    """(a, b, c) of each of ``steps`` iterations, from the installed ``emerging_optimizers``, in the order it uses.

    Raises:
        ValueError: for a set that the library names but does not carry (``custom``).
    """
    if coefficient_type not in _COEFFICIENT_SETS:
        raise ValueError(
            f"coefficient_type {coefficient_type!r} has no coefficients; possible: {sorted(_COEFFICIENT_SETS)}."
        )
    repeats_last = coefficient_type in ("polar_express", "cans", "deepseekv4")
    mode = "repeat_last" if repeats_last else "cycle"
    return tuple(get_coefficient_iterator(steps, _COEFFICIENT_SETS[coefficient_type], mode=mode))


def newton_schulz(
    x: Tensor, lay: Layout, *, coefs: Coefficients, precision: str, scale: float = 1.0, eps: float = 0.0
) -> Generator[Any, Any, Tensor]:
    """``scale`` times the orthogonalization of each whole matrix.

    Args:
        x: (B, m, n), this rank's shards; bfloat16, float32 or float64.
        lay: Their layout; the shorter dim of the whole matrix must not be split.
        coefs: Polynomial of each iteration.
        precision: Arithmetic of float32 products: ``highest``, ``high`` or ``medium`` (:mod:`.precision`).
        scale: Factor of the result.
        eps: Added to the Frobenius norm that the matrix is divided by at first.

    Returns:
        Laid out as ``x``, in its dtype.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
    """
    long = lay.long_dim
    if lay.is_whole and len(x) > 1 and is_large(x if long == -1 else x.mT):
        alone = [newton_schulz(one, lay, coefs=coefs, precision=precision, scale=scale, eps=eps) for one in x.split(1)]
        return torch.cat((yield alone))
    arithmetic = partial(matmul_precision, precision, x.device)
    if lay.is_whole and (x.dtype == torch.bfloat16 or max(lay.shape) < 1.25 * min(lay.shape)):
        with arithmetic():
            return (
                _classic(x, coefs, scale, eps)
                if long == -1
                else _transposed(_classic(_transposed(x), coefs, scale, eps))
            )
    # Never a bfloat16 Gram: its rounding is multiplied by a^2 in every iteration and overflows.
    wide = x if x.dtype == torch.float64 else x.float()
    inv = wide.new_ones(())
    for first, steps in _groups(coefs):
        with arithmetic():
            wide_first = wide if long == -1 else wide.mT
            gram = symmetric_product(wide_first, wide_first.mT)
        r = yield lay.across(gram, long)
        if first:
            # The trace of the Gram matrix is the squared Frobenius norm.
            inv = r.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].sqrt().add(eps).clamp_min(EPS).reciprocal()
            r = r * inv.square()
        with arithmetic():
            q = _gram_polynomial(r, steps)
            if first:
                q = q * inv
            wide = q @ wide if long == -1 else wide @ q
    return (wide * scale if scale != 1.0 else wide).to(x.dtype)


def flops(m: int, n: int) -> float:
    """Operations that a whole m × n matrix takes, up to a factor: what owners are dealt by."""
    m, n = min(m, n), max(m, n)
    return 6.0 * m * m * n + 14.0 * m**3


def _classic(x: Tensor, coefs: Coefficients, scale: float, eps: float) -> Tensor:
    """(B, m, n) with m ≤ n, in the dtype of ``x``."""
    norms = torch.linalg.vector_norm(x, dim=(-2, -1), dtype=torch.promote_types(x.dtype, torch.float32))
    # The norm goes into the first iteration's factors: dividing x by it would round every entry once more. One matrix
    # at a time, because the factors are numbers.
    # oneDNN compiles a bfloat16 product anew for each value of a factor; float32 products are not compiled.
    small = x.device.type == "cpu" and x[0].numel() <= SMALL
    wide = x.to(norms.dtype) if small else x
    first = [
        _step(wide[i : i + 1], coefs[0], 1 / norm, scale if len(coefs) == 1 else 1.0)
        for i, norm in enumerate(norms.add(eps).clamp_min(EPS).tolist())
    ]
    x = (torch.cat(first) if len(first) > 1 else first[0]).to(x.dtype)
    for i, abc in enumerate(coefs[1:], 2):
        x = _step(x, abc, 1.0, scale if i == len(coefs) else 1.0)
    return x


def _step(x: Tensor, abc: tuple[float, float, float], inv: float, scale: float) -> Tensor:
    a, b, c = abc
    gram = symmetric_product(x, x.mT, alpha=inv * inv)
    poly = symmetric_product(gram, gram, gram, beta=b, alpha=c)
    return product(poly, x, x, beta=a * inv * scale, alpha=inv * scale)


def _transposed(x: Tensor) -> Tensor:
    """(B, n, m), contiguous: products are slow on a transposed view, and torch copies one matrix faster than a stack."""
    return torch.stack([matrix.mT.contiguous() for matrix in x]) if len(x) > 1 else x[0].mT.contiguous()[None]


def _groups(coefs: Coefficients) -> list[tuple[bool, Coefficients]]:
    """Iterations between restarts, which form R anew from X: R knows singular values only down to sqrt(eps)."""
    count = -(-2 * len(coefs) // 7)
    starts = [-(-i * len(coefs) // count) for i in range(count)]
    return [(i == 0, coefs[i:j]) for i, j in zip(starts, [*starts[1:], len(coefs)], strict=True)]


def _gram_polynomial(r: Tensor, coefs: Coefficients) -> Tensor:
    """Q with Q X = the iterations ``coefs`` applied to X, for R = X X^T. All factors are polynomials in R and commute."""
    q: Tensor | None = None
    for i, (a, b, c) in enumerate(coefs):
        z = symmetric_product(r, r, r, beta=b, alpha=c)
        if q is None:
            q = z.clone()
            q.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            q = symmetric_product(q, z, q, beta=a)
        if i < len(coefs) - 1:
            rz = symmetric_product(r, z, r, beta=a)
            r = symmetric_product(rz, z, rz, beta=a)
    assert q is not None
    return q
