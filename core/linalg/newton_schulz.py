"""Newton-Schulz orthogonalization of whole and of sharded matrices."""

from collections.abc import Generator
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..sharding.layout import Layout
from .iteration import iterate
from .matmul_precision import matmul_precision
from .products import runs_unbatched
from .variants import SIXTEEN_BIT_DTYPES, Coefficients, Variant, variant_for

MAX_BATCH_SENSITIVE_ROWS = 16
"""Rows up to which torch chooses the kernel of 16-bit products on CPU by how many matrices are stacked, which changes bits; such
matrices run one at a time."""

ALIGNMENT = 64
"""Bytes. Some processors' kernels choose their path, and so the last bits, by the alignment of each matrix: matrices whose size
puts the next one of a stack off this alignment run one at a time, and one that arrives off it is copied first."""


def newton_schulz(
    x: Tensor,
    lay: Layout,
    *,
    coefs: Coefficients,
    precision: str,
    scale: float = 1.0,
    eps: float = 0.0,
    variant: Variant | None = None,
) -> Generator[Any, Any, Tensor]:
    """``scale`` times the orthogonalization of each whole matrix.

    A matrix of zeros gives zeros. X is divided by max(‖X‖ + ``eps``, :data:`.iteration.MIN_NORM`): below that norm the result
    shrinks with X, to zero in float16. For float32 shards on an accelerator it shrinks below a norm of 1e-15 already, because
    the host does not wait for the norm. A NaN, an infinity or a norm above 1.8e19 (in float64 1.3e154) makes that whole matrix
    NaN, and no other of the stack.

    Args:
        x: (B, m, n), this rank's shards; bfloat16, float32 or float64. Not changed.
        lay: Layout of each matrix; the shorter dim of the whole matrix must not be split.
        coefs: Coefficients of each iteration.
        precision: Arithmetic of float32 products: ``highest``, ``high`` or ``medium`` (:mod:`.matmul_precision`).
        scale: Factor of the result.
        eps: Number added to the Frobenius norm that the matrix is divided by at first.
        variant: Variant of the iteration; default :func:`.variants.variant_for`.

    Returns:
        A tensor of the layout and dtype of ``x``.

    Raises:
        ValueError: for a 16-bit ``variant`` on shards, for one whose dtype differs from that of float32 or float64 matrices, or
            for one whose restarts do not fit ``coefs``.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
    """
    if variant is None:
        variant = variant_for(lay.shape, x.dtype, precision, x.device, coefs, whole=lay.is_whole)
    elif variant.dtype in SIXTEEN_BIT_DTYPES and not lay.is_whole:
        raise ValueError(f"shards ({lay.describe()}) need a float32 or float64 variant, got {variant}.")
    elif variant.dtype != x.dtype != torch.bfloat16:
        raise ValueError(f"{x.dtype} matrices need a variant in that dtype, got {variant}.")
    if lay.is_whole and not x.numel():
        return torch.zeros_like(x)
    wide = lay.long_dim == -1
    unbatched = runs_unbatched(x if wide else x.mT)
    in_16_bits = variant.dtype in SIXTEEN_BIT_DTYPES
    batch_sensitive = x.is_cpu and (
        (in_16_bits and min(lay.shape) <= MAX_BATCH_SENSITIVE_ROWS) or not _stack_is_aligned(lay, variant.dtype)
    )
    if lay.is_whole and len(x) > 1 and (unbatched or batch_sensitive):
        settings: dict[str, Any] = {"precision": precision, "scale": scale, "eps": eps, "variant": variant}
        return torch.cat((yield [newton_schulz(matrix, lay, coefs=coefs, **settings) for matrix in x.split(1)]))
    # Products of 16-bit and of small matrices are slow on a transposed view.
    transpose = lay.is_whole and not wide and x.is_cpu and (in_16_bits or not unbatched)
    operand = _transposed(x) if transpose else _aligned(x) if lay.is_whole else x
    unstack = unbatched and len(x) == 1
    steps = iterate(
        operand[0] if unstack else operand,
        variant.groups(coefs),
        variant.dtype,
        wide=wide or transpose,
        is_whole=lay.is_whole,
        scale=scale,
        eps=eps,
    )
    arithmetic = partial(matmul_precision, precision, x.device)
    # The iteration frees its input as soon as it can; a reference from here would keep it.
    del x, operand
    out = yield from _driven(steps, lay, arithmetic)
    out = out[None] if unstack else out
    return _transposed(out) if transpose else out


def relative_cost(m: int, n: int) -> float:
    """Operations that a whole m × n matrix takes, up to a factor; the weight by which matrices are dealt to owners."""
    m, n = min(m, n), max(m, n)
    return 6.0 * m * m * n + 14.0 * m**3


def _driven(steps: Generator[Tensor, Tensor, Tensor], lay: Layout, arithmetic: Any) -> Generator[Any, Any, Tensor]:
    """Run ``steps`` to its result; each tensor that it yields is summed over the ranks that split the matrix and sent back."""
    total: Any = None
    while True:
        # Left while other rules run, because torch's setting is global.
        with arithmetic():
            try:
                total = steps.send(total)
                while lay.is_whole:
                    total = steps.send(total)
            except StopIteration as end:
                out: Tensor = end.value
                return out
        total = yield lay.across(total, lay.long_dim)


def _stack_is_aligned(lay: Layout, dtype: torch.dtype) -> bool:
    """Whether each matrix of an aligned stack of X, and of R = X Xᵀ, begins at a multiple of :data:`ALIGNMENT`."""
    return not any(entries * dtype.itemsize % ALIGNMENT for entries in (prod(lay.shape), min(lay.shape) ** 2))


def _aligned(x: Tensor) -> Tensor:
    return x.clone() if x.is_cpu and x.data_ptr() % ALIGNMENT else x


def _transposed(x: Tensor) -> Tensor:
    """(B, n, m), contiguous; torch copies one matrix faster than a stack."""
    return torch.stack([matrix.mT.contiguous() for matrix in x]) if len(x) > 1 else x[0].mT.contiguous()[None]
