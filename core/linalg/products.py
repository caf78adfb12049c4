"""Products of stacks of matrices, in the form that is fastest on the device.

The form depends on the matrix alone, never on how many are stacked: the same matrix gives the same bits in every layout.
The limits below were measured on CPU.
"""

import torch
from torch import Tensor

MIN_UNBATCHED_ROWS = 512
"""Rows from which a CPU multiplies the matrices of a stack faster one at a time, each by a call of its own."""

FLOAT32_PANELS = 4
"""Row panels of a float32 lower triangle: they skip three eighths of the product, and still run at full speed."""

MIN_BFLOAT16_PANEL_ROWS = 1024
"""Rows from which panels pay in bfloat16; two panels of a smaller matrix take as long as the whole product."""

MIN_BFLOAT16_PANEL_RATIO = 2
"""Ratio of columns to rows from which panels pay in bfloat16."""


def runs_unbatched(x: Tensor) -> bool:
    """Whether the matrices of the stack ``x`` (B, m, k), or the matrix ``x`` (m, k), are multiplied one at a time."""
    return x.is_cpu and x.shape[-2] >= MIN_UNBATCHED_ROWS


def is_single_unbatched(x: Tensor) -> bool:
    """Whether the stack ``x`` (B, m, k) is a single matrix that runs unbatched."""
    return len(x) == 1 and runs_unbatched(x)


def product(a: Tensor, b: Tensor, c: Tensor | None = None, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """``alpha A B + beta C``.

    Args:
        a: (m, k) or (B, m, k); B is 1 where it :func:`runs_unbatched`.
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
    if is_single_unbatched(a):
        return product(a[0], b[0], c if c is None else c[0], beta=beta, alpha=alpha)[None]
    if c is not None:
        return torch.baddbmm(c, a, b, beta=beta, alpha=alpha)
    return torch.bmm(a, b) if alpha == 1.0 else torch.baddbmm(a.new_empty(1), a, b, beta=0, alpha=alpha)


def symmetric_product(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """:func:`product` for a result that is symmetric up to rounding, as ``c`` must be.

    Where that is faster, a CPU computes row panels of the lower triangle (:func:`triangle_panels`) and mirrors them.
    """
    if a.ndim == 3 and is_single_unbatched(a):
        return symmetric_product(a[0], b[0], c if c is None else c[0], beta=beta, alpha=alpha)[None]
    panels = triangle_panels(a) if a.ndim == 2 and runs_unbatched(a) else 1
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


def triangle_panels(a: Tensor) -> int:
    """Row panels in which the lower triangle of a symmetric product of ``a`` (m, k) is computed on CPU; 1: no panels."""
    if a.dtype == torch.float32:
        return FLOAT32_PANELS
    m, k = a.shape[-2:]
    long_enough = m >= MIN_BFLOAT16_PANEL_ROWS and k >= MIN_BFLOAT16_PANEL_RATIO * m
    return 2 if a.dtype == torch.bfloat16 and long_enough else 1
