"""Products of stacks of matrices, by the form that the device is fastest at.

Which form is chosen depends on the matrix alone, never on how many are stacked: the same matrix gives the same bits in every
layout.
"""

import torch
from torch import Tensor

LARGE = 512
"""Rows from which a matrix on CPU is worth a call of its own."""

PANELS = 4
"""Row panels of the lower triangle: they skip three eighths of the product, and still run at full speed."""


def is_large(x: Tensor) -> bool:
    """Whether matrices of the stack ``x`` (B, m, k) go one at a time."""
    return x.device.type == "cpu" and x.shape[-2] >= LARGE


def product(a: Tensor, b: Tensor, c: Tensor | None = None, *, beta: float = 0.0, alpha: float = 1.0) -> Tensor:
    """``alpha A B + beta C``.

    Args:
        a: (B, m, k); B is 1 when it :func:`is_large`.
        b: (B, k, n).
        c: (B, m, n); None for zero.
        beta: Factor of ``c``.
        alpha: Factor of the product.

    Returns:
        (B, m, n).
    """
    add = a.new_empty(1) if c is None else c
    if is_large(a) and len(a) == 1:
        return torch.addmm(add[0], a[0], b[0], beta=beta, alpha=alpha)[None]
    return torch.baddbmm(add, a, b, beta=beta, alpha=alpha)


def symmetric_product(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, beta: float = 0.0, alpha: float = 1.0
) -> Tensor:
    """:func:`product` for a result (B, m, m) that is symmetric up to rounding, as ``c`` must be.

    A large float32 result on CPU is computed by row panels of its lower triangle and mirrored; bfloat16 units gain nothing by it.
    """
    if a.dtype != torch.float32 or not is_large(a) or len(a) > 1:
        return product(a, b, c, beta=beta, alpha=alpha)
    m = a.shape[-2]
    out = a.new_empty(1, m, m)
    width = -(-m // PANELS)
    spans = [(lo, min(lo + width, m)) for lo in range(0, m, width)]
    for lo, hi in spans:
        add = a.new_empty(1) if c is None else c[0, lo:hi, :hi]
        torch.addmm(add, a[0, lo:hi], b[0, :, :hi], beta=beta, alpha=alpha, out=out[0, lo:hi, :hi])
    for lo, hi in spans:
        out[0, lo:hi, hi:] = out[0, hi:, lo:hi].mT
    return out
