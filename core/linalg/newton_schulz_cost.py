"""Predicted work of the Newton-Schulz iteration of one matrix: operations, memory traffic, memory."""

from dataclasses import dataclass
from functools import cache
from math import ceil

import torch

from .products import MIN_UNBATCHED_ROWS, triangle_panels
from .variants import SIXTEEN_BIT_DTYPES, variant_for

_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
"""Bytes of an entry as it travels → its dtype."""


@dataclass(frozen=True)
class Work:
    """Work of one rank for one matrix.

    Attributes:
        flops: Operations in a dtype as narrow as that in which matrices travel.
        gram_flops: Operations in float32 where that is wider.
        traffic: Bytes that are read and written in order.
        turned: Bytes that are read and written by copies that turn rows into columns.
        memory: Bytes of temporary tensors.
        rounds: Number of Gram matrices that are formed, one after the other.
    """

    flops: float
    gram_flops: float
    traffic: float
    turned: float
    memory: float
    rounds: int


def total_flops(
    rows: int, cols: int, itemsize: int, *, iterations: int = 5, ranks: int = 1, device: str = "cuda"
) -> float:
    """Operations of :func:`newton_schulz_work` in all dtypes."""
    work = newton_schulz_work(rows, cols, itemsize, iterations=iterations, ranks=ranks, device=device)
    return work.flops + work.gram_flops


@cache
def newton_schulz_work(
    rows: int, cols: int, itemsize: int, *, iterations: int = 5, ranks: int = 1, device: str = "cuda"
) -> Work:
    """Work of :func:`.newton_schulz.newton_schulz` on one rank, for a matrix whose longer side is cut over ``ranks``.

    Only the number of coefficients counts, not their values: the additional restart of steep sets in float16 is left out.

    Args:
        rows: Rows of the whole matrix.
        cols: Columns of the whole matrix.
        itemsize: Bytes of an entry as it travels: 2 for bfloat16, 4 or 8.
        iterations: Number of iterations, at least 1.
        ranks: Ranks that share the matrix. Several ranks reduce Gram matrices, and each repeats the algebra on them.
        device: Type of device, ``cpu`` or ``cuda``.
    """
    m, n = min(rows, cols), max(rows, cols)
    coefs = ((1.0, 0.0, 0.0),) * iterations
    variant = variant_for((m, n), _DTYPES[itemsize], "highest", torch.device(device), coefs, whole=ranks == 1)
    groups = [len(group) for group in variant.groups(coefs)]
    rounds, algebra = len(groups), sum(4 * steps - 3 for steps in groups)
    n = ceil(n / ranks)
    compute_itemsize = variant.dtype.itemsize
    operations, operands, mirrored = _products(m, n, rounds, algebra, variant.dtype, device)
    # X is read for its norm, or cast there and back. Every product but those that form R adds a matrix, and those that
    # join two steps add the sum of two.
    is_cast = compute_itemsize != itemsize or variant.dtype == torch.float16
    casts = 2 * (1 + itemsize / compute_itemsize) if is_cast else 1
    joins = sum(steps - 1 for steps in groups)
    elements = (casts + rounds) * m * n + (algebra + 7 * joins) * m * m
    slow_transposed = variant.dtype in SIXTEEN_BIT_DTYPES or m < MIN_UNBATCHED_ROWS
    transposed = rows > cols and ranks == 1 and device == "cpu" and slow_transposed
    return Work(
        flops=operations if compute_itemsize == itemsize else 0.0,
        gram_flops=operations if compute_itemsize > itemsize else 0.0,
        traffic=compute_itemsize * (elements + operands),
        turned=compute_itemsize * (mirrored + (4 * m * n if transposed else 0)),
        memory=(itemsize + 2 * compute_itemsize) * m * n + 4.0 * compute_itemsize * m * m,
        rounds=rounds,
    )


def iteration_work(m: int, n: int, dtype: torch.dtype, device: str) -> tuple[float, float, float]:
    """Operations, bytes of traffic and turned bytes of one classic iteration's products on an m x n matrix, m <= n."""
    operations, operands, mirrored = _products(m, n, 1, 1, dtype, device)
    return operations, dtype.itemsize * (operands + m * m + m * n), dtype.itemsize * mirrored


def _products(m: int, n: int, rounds: int, algebra: int, dtype: torch.dtype, device: str) -> tuple[float, float, float]:
    """Work of ``rounds`` Gram matrices and as many products with X, and of ``algebra`` symmetric m x m products.

    Returns:
        Operations, entries of operands and results, and entries that are read and written to mirror computed triangles.
    """
    operations = operands = mirrored = 0.0
    for k, symmetric, times in ((n, True, rounds), (m, True, algebra), (n, False, rounds)):
        share = _computed(m, k, dtype, device) if symmetric else 1.0
        operations += 2.0 * m * m * k * share * times
        operands += (m * m + 2.0 * m * k) * times
        mirrored += 2 * (1 - share) * m * m * times
    return operations, operands, mirrored


def _computed(m: int, k: int, dtype: torch.dtype, device: str) -> float:
    """Computed share of a symmetric m x m product that contracts k; the rest is mirrored."""
    unbatched = device == "cpu" and m >= MIN_UNBATCHED_ROWS
    panels = triangle_panels(torch.empty(m, k, dtype=dtype, device="meta")) if unbatched else 1
    width = ceil(m / panels)
    starts = range(0, m, width)
    return sum(min(width, m - lo) * min(lo + width, m) for lo in starts) / m**2
