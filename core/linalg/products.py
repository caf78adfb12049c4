"""Products of stacks of matrices, by the form that the device is fastest at.

Which form is chosen depends on the matrix alone, never on how many are stacked: the same matrix gives the same bits in every
layout.
"""

import torch
from torch import Tensor

LARGE = 512
"""Rows from which a matrix on CPU is worth a call of its own."""

PANELS = 4
"""Row panels of a float32 lower triangle: they skip three eighths of the product, and still run at full speed."""

LONG = 2
"""Ratio of the sides from which panels pay in bfloat16, for a matrix of :data:`MANY` rows."""

MANY = 1024
"""See :data:`LONG`; two panels of a smaller one take as long as the whole product."""


def is_large(x: Tensor) -> bool:
    """Whether matrices of the stack ``x`` (B, m, k) go one at a time."""
    return x.is_cpu and x.shape[-2] >= LARGE


def is_alone(x: Tensor) -> bool:
    """Whether the stack ``x`` is one matrix that goes alone."""
    return len(x) == 1 and is_large(x)


def product(a: Tensor, b: Tensor, c: Tensor | None = None, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """``alpha A B + beta C``.

    Args:
        a: (m, k) or (B, m, k); B is 1 when it :func:`is_large`.
        b: (k, n) or (B, k, n).
        c: (m, n) or (B, m, n); None for zero.
        beta: Factor of ``c``.
        alpha: Factor of the product.

    Returns:
        (m, n) or (B, m, n).
    """
    if a.ndim == 2:
        if c is not None:
            return torch.addmm(c, a, b, beta=beta, alpha=alpha)
        return torch.mm(a, b) if alpha == 1.0 else torch.addmm(a.new_empty(1), a, b, beta=0, alpha=alpha)
    if is_alone(a):
        return product(a[0], b[0], c if c is None else c[0], beta=beta, alpha=alpha)[None]
    if c is not None:
        return torch.baddbmm(c, a, b, beta=beta, alpha=alpha)
    return torch.bmm(a, b) if alpha == 1.0 else torch.baddbmm(a.new_empty(1), a, b, beta=0, alpha=alpha)


def symmetric_product(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """:func:`product` for a result that is symmetric up to rounding, as ``c`` must be.

    A large result on CPU is computed by row panels of its lower triangle and mirrored, where that pays.
    """
    if a.ndim == 3 and is_alone(a):
        return symmetric_product(a[0], b[0], c if c is None else c[0], beta=beta, alpha=alpha)[None]
    panels = _panels(a) if a.ndim == 2 and is_large(a) else 1
    if panels == 1:
        return product(a, b, c, beta=beta, alpha=alpha)
    m = len(a)
    out = a.new_empty(m, m)
    width = -(-m // panels)
    spans = [(lo, min(lo + width, m)) for lo in range(0, m, width)]
    add, beta = (a.new_empty(1).expand(m, m), 0.0) if c is None else (c, beta)
    for lo, hi in spans:
        torch.addmm(add[lo:hi, :hi], a[lo:hi], b[:, :hi], beta=beta, alpha=alpha, out=out[lo:hi, :hi])
    for lo, hi in spans:
        out[lo:hi, hi:] = out[hi:, lo:hi].mT
    return out


def _panels(a: Tensor) -> int:
    if a.dtype == torch.float32:
        return PANELS
    return 2 if a.dtype == torch.bfloat16 and a.shape[-2] >= MANY and a.shape[-1] >= LONG * a.shape[-2] else 1
