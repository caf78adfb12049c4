"""Products whose result is known to be symmetric."""

import torch
from torch import Tensor

PANELS = 4
"""Row panels of the lower triangle: they skip three eighths of the product, and are still large enough to run at full speed."""


def symmetric_product(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, beta: float = 0.0, alpha: float = 1.0
) -> Tensor:
    """``alpha A B + beta C``, for a result that is symmetric.

    On CPU a large float32 result is computed by row panels of its lower triangle and mirrored.

    Args:
        a: (B, m, k).
        b: (B, k, m); ``A B`` must be symmetric up to rounding.
        c: (B, m, m), symmetric; None for zero.
        beta: Factor of ``c``.
        alpha: Factor of the product.

    Returns:
        (B, m, m).
    """
    m = a.shape[-2]
    if a.device.type != "cpu" or a.dtype != torch.float32 or len(a) > 1 or m < 512:
        return torch.baddbmm(a.new_empty(1) if c is None else c, a, b, beta=beta, alpha=alpha)
    out = a.new_empty(1, m, m)
    width = -(-m // PANELS)
    spans = [(lo, min(lo + width, m)) for lo in range(0, m, width)]
    for lo, hi in spans:
        add = a.new_empty(1) if c is None else c[0, lo:hi, :hi]
        torch.addmm(add, a[0, lo:hi], b[0, :, :hi], beta=beta, alpha=alpha, out=out[0, lo:hi, :hi])
    for lo, hi in spans:
        out[0, lo:hi, hi:] = out[0, hi:, lo:hi].mT
    return out
