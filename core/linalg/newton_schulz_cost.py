"""What the Newton-Schulz iteration of one matrix takes: operations, memory traffic, memory."""

from dataclasses import dataclass
from functools import cache
from math import ceil

import torch

from .products import LARGE, _panels
from .variants import NARROW, variant_for

_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


@dataclass(frozen=True)
class Work:
    """Of one rank, for one matrix.

    Attributes:
        flops: Operations in a dtype as narrow as that in which matrices travel.
        gram_flops: Operations in float32 where that is wider.
        traffic: Bytes that pass through memory in order.
        turned: Bytes that are read and written by copies that turn rows into columns.
        memory: Temporary bytes.
        rounds: Gram matrices that are formed, one after the other.
    """

    flops: float
    gram_flops: float
    traffic: float
    turned: float
    memory: float
    rounds: int


def flops(rows: int, cols: int, itemsize: int, *, iterations: int = 5, ranks: int = 1, device: str = "cuda") -> float:
    """Operations of :func:`newton_schulz_work` in all dtypes."""
    work = newton_schulz_work(rows, cols, itemsize, iterations=iterations, ranks=ranks, device=device)
    return work.flops + work.gram_flops


@cache
def newton_schulz_work(
    rows: int, cols: int, itemsize: int, *, iterations: int = 5, ranks: int = 1, device: str = "cuda"
) -> Work:
    """What :func:`.newton_schulz.newton_schulz` does for a matrix whose longer side is cut over ``ranks``.

    Coefficients count for nothing but their number: sets so steep that they take a restart more in float16 are not known here.

    Args:
        rows: Of the whole matrix.
        cols: Of the whole matrix.
        itemsize: Bytes of an entry as it travels: 2 for bfloat16, 4 or 8.
        iterations: At least 1.
        ranks: That share the matrix. More than one reduce Gram matrices, and each repeats the algebra on them.
        device: Type of device.
    """
    m, n = min(rows, cols), max(rows, cols)
    coefs = ((1.0, 0.0, 0.0),) * iterations
    variant = variant_for((m, n), _DTYPES[itemsize], "highest", torch.device(device), coefs, whole=ranks == 1)
    groups = [len(group) for group in variant.groups(coefs)]
    rounds, algebra = len(groups), sum(4 * steps - 3 for steps in groups)
    n = ceil(n / ranks)
    wide = variant.dtype.itemsize
    operations, operands, mirrored = _products(m, n, rounds, algebra, variant.dtype, device)
    # The norm, or the cast there and back; to each product but those that form R a matrix is added, and to those that
    # join two steps the sum of two.
    casts = 2 * (1 + itemsize / wide) if wide != itemsize or variant.dtype == torch.float16 else 1
    joins = sum(steps - 1 for steps in groups)
    elements = (casts + rounds) * m * n + (algebra + 7 * joins) * m * m
    tall = rows > cols and ranks == 1 and device == "cpu" and (variant.dtype in NARROW or m < LARGE)
    return Work(
        flops=operations if wide == itemsize else 0.0,
        gram_flops=operations if wide > itemsize else 0.0,
        traffic=wide * (elements + operands),
        turned=wide * (mirrored + (4 * m * n if tall else 0)),
        memory=(itemsize + 2 * wide) * m * n + 4.0 * wide * m * m,
        rounds=rounds,
    )


def iteration_work(m: int, n: int, dtype: torch.dtype, device: str) -> tuple[float, float, float]:
    """Operations, traffic and turned bytes of the products of one classic iteration on an m x n matrix, m <= n."""
    operations, operands, mirrored = _products(m, n, 1, 1, dtype, device)
    return operations, dtype.itemsize * (operands + m * m + m * n), dtype.itemsize * mirrored


def _products(m: int, n: int, rounds: int, algebra: int, dtype: torch.dtype, device: str) -> tuple[float, float, float]:
    """Of ``rounds`` Gram matrices and products by X, and ``algebra`` symmetric products of m x m.

    Returns:
        Operations, entries of operands and results, and entries that are read and written to mirror what is not computed.
    """
    operations = operands = mirrored = 0.0
    for k, symmetric, times in ((n, True, rounds), (m, True, algebra), (n, False, rounds)):
        share = _computed(m, k, dtype, device) if symmetric else 1.0
        operations += 2.0 * m * m * k * share * times
        operands += (m * m + 2.0 * m * k) * times
        mirrored += 2 * (1 - share) * m * m * times
    return operations, operands, mirrored


def _computed(m: int, k: int, dtype: torch.dtype, device: str) -> float:
    """Share of a symmetric m x m product over k that is computed."""
    panels = _panels(torch.empty(m, k, dtype=dtype, device="meta")) if device == "cpu" and m >= LARGE else 1
    width = ceil(m / panels)
    starts = range(0, m, width)
    return sum(min(width, m - lo) * min(lo + width, m) for lo in starts) / m**2
