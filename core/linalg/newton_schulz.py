"""Newton-Schulz orthogonalization of whole and of sharded matrices."""

from collections.abc import Generator
from functools import partial
from typing import Any

import torch
from emerging_optimizers.orthogonalized_optimizers.muon_utils import _COEFFICIENT_SETS, get_coefficient_iterator
from torch import Tensor

from ..sharding.layout import Layout
from .iteration import EPS, iterate
from .matmul_precision import matmul_precision
from .products import is_large
from .variants import NARROW, Coefficients, Variant, variant_for

__all__ = ["EPS", "Coefficients", "coefficients", "flops", "newton_schulz"]

FEW = 16
"""Rows up to which torch takes one kernel or another for 16-bit products on CPU by how many matrices are stacked."""


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

    A matrix of zeros gives zeros. X is divided by max(‖X‖ + ``eps``, :data:`EPS`): below that norm the result shrinks with X, to
    zero in float16; so it does below a norm of 1e-15 where float32 shards are on an accelerator, because the host does not
    wait for what is known only then. A NaN, an infinity or a norm above 1.8e19 (in float64 1.3e154) makes that whole matrix
    NaN, and no other of the stack.

    Args:
        x: (B, m, n), this rank's shards; bfloat16, float32 or float64. Not changed.
        lay: Their layout; the shorter dim of the whole matrix must not be split.
        coefs: Polynomial of each iteration.
        precision: Arithmetic of float32 products: ``highest``, ``high`` or ``medium`` (:mod:`.precision`).
        scale: Factor of the result.
        eps: Added to the Frobenius norm that the matrix is divided by at first.
        variant: How to evaluate it; default :func:`.variants.variant_for`.

    Returns:
        Laid out as ``x``, in its dtype.

    Raises:
        ValueError: for a 16-bit ``variant`` on shards, one in another dtype than matrices that are not bfloat16, or one whose
            restarts do not fit ``coefs``.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
    """
    if variant is None:
        variant = variant_for(lay.shape, x.dtype, precision, x.device, coefs, whole=lay.is_whole)
    elif variant.dtype in NARROW and not lay.is_whole:
        raise ValueError(f"shards ({lay.describe()}) need a float32 or float64 variant, got {variant}.")
    elif variant.dtype != x.dtype != torch.bfloat16:
        raise ValueError(f"{x.dtype} matrices need a variant in that dtype, got {variant}.")
    if lay.is_whole and not x.numel():
        return torch.zeros_like(x)
    wide = lay.long_dim == -1
    large = is_large(x if wide else x.mT)
    if lay.is_whole and len(x) > 1 and (large or (x.is_cpu and variant.dtype in NARROW and min(lay.shape) <= FEW)):
        settings: dict[str, Any] = {"precision": precision, "scale": scale, "eps": eps, "variant": variant}
        return torch.cat((yield [newton_schulz(one, lay, coefs=coefs, **settings) for one in x.split(1)]))
    # Products of 16-bit and of small matrices are slow on a transposed view.
    turn = lay.is_whole and not wide and x.is_cpu and (variant.dtype in NARROW or not large)
    given = _transposed(x) if turn else x
    alone = large and len(x) == 1
    steps = iterate(
        given[0] if alone else given,
        variant.groups(coefs),
        variant.dtype,
        wide=wide or turn,
        whole=lay.is_whole,
        scale=scale,
        eps=eps,
    )
    arithmetic = partial(matmul_precision, precision, x.device)
    # The iteration needs the matrix no longer than it says.
    del x, given
    out = yield from _driven(steps, lay, arithmetic)
    out = out[None] if alone else out
    return _transposed(out) if turn else out


def flops(m: int, n: int) -> float:
    """Operations that a whole m × n matrix takes, up to a factor: what owners are dealt by."""
    m, n = min(m, n), max(m, n)
    return 6.0 * m * m * n + 14.0 * m**3


def _driven(steps: Generator[Tensor, Tensor, Tensor], lay: Layout, arithmetic: Any) -> Generator[Any, Any, Tensor]:
    """The result of ``steps``, which is sent what it yields, summed over the ranks that split the matrix."""
    total: Any = None
    while True:
        # Not held while other rules run: torch's setting is global.
        with arithmetic():
            try:
                total = steps.send(total)
                while lay.is_whole:
                    total = steps.send(total)
            except StopIteration as end:
                out: Tensor = end.value
                return out
        total = yield lay.across(total, lay.long_dim)


def _transposed(x: Tensor) -> Tensor:
    """(B, n, m), contiguous; torch copies one matrix faster than a stack."""
    return torch.stack([matrix.mT.contiguous() for matrix in x]) if len(x) > 1 else x[0].mT.contiguous()[None]
