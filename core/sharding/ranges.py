"""Sets of indices along one dim, as ascending lists of half-open ranges, and how two of them overlap."""

from collections.abc import Iterable
from typing import NamedTuple

Range = tuple[int, int]
Ranges = tuple[Range, ...]


class Overlap(NamedTuple):
    """A run of ``length`` indices that two sets share, by its position within each set."""

    left: int
    right: int
    length: int


def total(ranges: Ranges) -> int:
    """Number of indices."""
    return sum(hi - lo for lo, hi in ranges)


def merge(ranges: Iterable[Range]) -> Ranges:
    """``ranges`` without empty ones, and with neighbours joined: the same indices in the same order."""
    out: list[Range] = []
    for lo, hi in ranges:
        if lo == hi:
            continue
        if out and out[-1][1] == lo:
            out[-1] = (out[-1][0], hi)
        else:
            out.append((lo, hi))
    return tuple(out)


def overlap(left: Ranges, right: Ranges) -> tuple[Overlap, ...]:
    """The indices that ``left`` and ``right`` share, in the order of ``left``.

    Example: ``overlap(((2, 6),), ((0, 3), (4, 9)))`` is ``(Overlap(0, 2, 1), Overlap(2, 3, 2))``: index 2 is
    the first of ``left`` and the third of ``right``; indices 4 and 5 are the third of ``left``, the fourth of ``right``.
    """
    out: list[Overlap] = []
    left_start = 0
    for left_lo, left_hi in left:
        right_start = 0
        for right_lo, right_hi in right:
            lo, hi = max(left_lo, right_lo), min(left_hi, right_hi)
            if lo < hi:
                out.append(Overlap(left_start + lo - left_lo, right_start + lo - right_lo, hi - lo))
            right_start += right_hi - right_lo
        left_start += left_hi - left_lo
    return tuple(out)


def chunk(size: int, parts: int, index: int, *, stride: int = 1) -> Ranges:
    """The indices of part ``index`` when ``size`` indices are cut as ``torch.chunk`` cuts, in each of ``stride`` blocks anew.

    ``stride=2`` is Megatron's ``partition_stride`` of a fused gate/up weight: every rank holds a piece of the gate
    and a piece of the up projection.
    """
    block = size // stride
    width = -(-block // parts)
    lo, hi = min(index * width, block), min((index + 1) * width, block)
    return merge((s * block + lo, s * block + hi) for s in range(stride))


def repeat(sizes: tuple[int, ...], total_size: int) -> tuple[Ranges, ...]:
    """For each entry of ``sizes``, the indices it covers when the entries repeat over ``total_size`` indices.

    Example: ``repeat((2, 1), 6)`` is ``(((0, 2), (3, 5)), ((2, 3), (5, 6)))``.
    """
    period = sum(sizes)
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return tuple(
        merge((base + start, base + start + size) for base in range(0, total_size, period))
        for start, size in zip(starts, sizes, strict=True)
    )
