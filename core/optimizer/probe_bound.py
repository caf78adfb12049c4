"""How far two correct steps of one parameter may lie apart.

The bound of an entry is ``t · (largest change of the parameter in this step) + eps · |entry|``. The second term is the rounding
of the new parameter to its dtype: its last bit may differ where the steps differ by nothing that counts. ``t`` is ``min(2¹⁴ ε,
⅓)``, and ε the precision of the arithmetic in which the step may be computed in another order:

* float64 or float32 (at least), for everything that is the same arithmetic on the same numbers (elementwise rules, whole
  tensors, ``owner`` and ``duplicated`` on CPU, where these are equal bit for bit) or is only reduced in another order (norms,
  means).
* that of the orthogonalization (``fp32_matmul_prec``: bfloat16 at ``medium``, tf32 at ``high`` on CUDA) for ``distributed``,
  and on CUDA for every mode, because there a kernel is chosen by the number of matrices that are worked on together.

2¹⁴ is what an orthogonalization in five iterations may make of rounding. In the directions in which a gradient is zero (it has
few tokens, or few experts got any) only rounding is left, and each iteration multiplies it by up to 3.4, all by up to 485.
Measured with gradients of rank 1 to 64, cut over 2 ranks: up to 1500 ε in float64, 2000 ε in float32. In 16-bit arithmetic such
directions are noise altogether: up to a quarter of the largest change, which the limit of a third lets pass. Shards that are
taken for matrices of their own make a difference of 0.2 to 0.8 of the largest change. So the comparison is sharp in float32 and
coarse in 16-bit arithmetic; ``fp32_matmul_prec="highest"`` for the step that is compared makes it sharp there, too.
"""

from typing import Any

import torch
from torch import Tensor

from ..linalg.matmul_precision import compute_dtype

GROWTH = 2.0**14
"""Largest factor by which a step makes rounding grow."""

AT_MOST = 1 / 3
"""Largest difference, in parts of the largest change, whatever the arithmetic."""

_TF32_EPS = 2.0**-10


def entry_bounds(before: Tensor, after: Tensor, optimizer: Any, mode: str) -> Tensor:
    """The bound for each entry of a whole parameter.

    Args:
        before: The parameter before the step.
        after: The parameter after the unsharded step.
        optimizer: Its optimizer.
        mode: Mode in which its shards come together.

    Returns:
        A tensor of the parameter's shape, in float32 at least.
    """
    wide = torch.promote_types(after.dtype, torch.float32)
    change = (after.to(wide) - before.to(wide)).abs()
    finite = change[change.isfinite()]
    largest = finite.max() if finite.numel() else change.new_zeros(())
    share = min(GROWTH * _precision(after, optimizer, mode), AT_MOST)
    return after.to(wide).abs().mul_(torch.finfo(after.dtype).eps).nan_to_num_().add_(share * largest)


def _precision(p: Tensor, optimizer: Any, mode: str) -> float:
    wide = torch.promote_types(p.dtype, torch.float32)
    precision = getattr(optimizer, "fp32_matmul_prec", None)
    if precision is None or (p.device.type == "cpu" and "distributed" not in mode):
        return torch.finfo(wide).eps
    if precision == "high" and p.is_cuda and wide == torch.float32:
        return _TF32_EPS
    return torch.finfo(compute_dtype(wide, precision)).eps
