"""Second moments factored into one number per row and one per column, and passes over large shards by blocks."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import prod

import torch
from torch import Tensor

from ....cache_blocks import At, index_blocks
from ....sharding.layout import Layout
from ....sharding.requests import Reduce, Rule
from ....sharding.state import StateSpec


@dataclass(frozen=True)
class Factoring:
    """Dims of a whole tensor, counted from the end, that a factored moment averages over; other dims are batch dims.

    Attributes:
        rows: Dims that the row factor keeps and the column factor averages over.
        cols: Dims that the column factor keeps and the row factor averages over.
    """

    rows: tuple[int, ...]
    cols: tuple[int, ...]

    def specs(self, ndim: int, row: str, col: str) -> dict[str, StateSpec]:
        """State called ``row`` and ``col`` of a parameter of ``ndim`` dims."""
        averaged = {row: self.cols, col: self.rows}
        return {
            name: StateSpec("".join("1" if d in over else "k" for d in range(-ndim, 0)))
            for name, over in averaged.items()
        }


def last_two(shape: Sequence[int]) -> Factoring | None:
    """Factoring by the last two dims; None for fewer than two dims."""
    return Factoring((-2,), (-1,)) if len(shape) > 1 else None


def flattened(shape: Sequence[int]) -> Factoring | None:
    """Factoring by the last dim and all other dims flattened to one; None for fewer than two dims."""
    return Factoring(tuple(range(-len(shape), -1)), (-1,)) if len(shape) > 1 else None


def two_largest(shape: Sequence[int]) -> Factoring | None:
    """Factoring by the two largest dims, the later ones of equal sizes; None for fewer than two dims."""
    if len(shape) < 2:
        return None
    first, second = sorted(sorted(range(-len(shape), 0), key=lambda d: (shape[d], d))[-2:])
    return Factoring((first,), (second,))


def part(x: Tensor, at: At) -> Tensor:
    """The part of ``x`` that broadcasts against the block ``at`` of a tensor, where ``x`` broadcasts against the tensor."""
    return x[tuple(slice(None) if size == 1 else s for size, s in zip(x.shape, at, strict=False))]


class SquareSums:
    """Sums over rows and over columns of the squares of a shard that arrives block by block.

    Args:
        like: A tensor of the shard's shape, (B, *shard).
        dims: Dims of rows and columns.
    """

    def __init__(self, like: Tensor, dims: Factoring) -> None:
        self.dims = dims
        self.row, self.col = (
            like.new_zeros([1 if d - like.ndim in over else n for d, n in enumerate(like.shape)])
            for over in (dims.cols, dims.rows)
        )

    def add(self, square: Tensor, at: At) -> None:
        """Add the squared block ``at`` to the sums."""
        part(self.row, at).add_(square.sum(self.dims.cols, keepdim=True))
        part(self.col, at).add_(square.sum(self.dims.rows, keepdim=True))


def square_sums(x: Tensor, dims: Factoring) -> SquareSums:
    """Sums of the squares of ``x``, (B, *shard), over its rows and columns."""
    sums = SquareSums(x, dims)
    for at in index_blocks(x):
        sums.add(x[at].square(), at)
    return sums


def inverse_roots(
    row: Tensor, col: Tensor, sums: SquareSums, lay: Layout, *, fresh: Tensor | float, eps: float, floor: float = 0.0
) -> Rule:
    """Update the running means ``row`` and ``col`` of x² + eps; their rank-1 estimate of the mean of x² + eps is V.

    Args:
        row: Running row means, (B, *shard) with the column dims 1; updated.
        col: Running column means, (B, *shard) with the row dims 1; updated.
        sums: Sums of x² over this rank's part of each row and column.
        lay: Layout of x.
        fresh: Weight of x² in the running means, in (0, 1]; a number or (B, 1, …, 1).
        eps: Added to x².
        floor: Lower bound of the mean of ``row`` in the denominator of V.

    Returns:
        r, c, shaped as ``row`` and ``col``, with r·c = V^(-1/2) = (row · col / mean(row))^(-1/2).

    Source: Shazeer & Stern 2018, algorithm 4, https://arxiv.org/abs/1804.04235
    """
    dims = sums.dims
    rows, cols = yield lay.across(sums.row, *dims.cols), lay.across(sums.col, *dims.rows)
    row.lerp_(rows / prod(lay.shape[d] for d in dims.cols) + eps, fresh)
    col.lerp_(cols / prod(lay.shape[d] for d in dims.rows) + eps, fresh)
    mean = yield lay.mean(row, *dims.rows)
    # Each factor has its own root, because the product of two tiny factors is 0 in float32; the clamp keeps it finite.
    tiny = torch.finfo(row.dtype).tiny
    return (row / mean.clamp_min(floor)).clamp_min_(tiny).rsqrt_(), col.clamp_min(tiny).rsqrt_()


def inverse_root(v: Tensor, floor: float = 0.0) -> Tensor:
    """max(v, floor²)^(-1/2), always finite: the scale of tensors that are not factored."""
    return v.clamp_min(max(floor**2, torch.finfo(v.dtype).tiny)).rsqrt_()


@dataclass(frozen=True)
class Scaling:
    """Multiplication of a shard (B, *shard) by min(r·c, cap), computed block by block.

    Attributes:
        r: Factor of the rows, or of the entries.
        c: Factor of the columns, or ones.
        dims: Dims of rows and columns; None if ``r`` has a factor for each entry.
        cap: Largest factor, (B, 1, …, 1) or a number; None for no limit.
    """

    r: Tensor
    c: Tensor
    dims: Factoring | None
    cap: Tensor | float | None = None

    def times(self, k: Tensor | float) -> "Scaling":
        """This scaling times k, (B, 1, …, 1) and not negative."""
        return replace(self, r=self.r * k, cap=None if self.cap is None else self.cap * k)

    def blocks(self, x: Tensor) -> Iterator[tuple[At, Tensor]]:
        """(index, new tensor with the scaled block) for each block of ``x``."""
        for at in index_blocks(x):
            r, c = part(self.r, at), part(self.c, at)
            # Multiplied from the left, a zero stays zero even if r·c overflows.
            yield at, (x[at] * r).mul_(c) if self.cap is None else (r * c).clamp_(max=self.cap).mul_(x[at])

    def subtract_(self, p: Tensor, x: Tensor, keep: Tensor | float | None = None) -> None:
        """p ← keep · p - scaled ``x``, in place; None means a ``keep`` of 1."""
        for at in index_blocks(x):
            piece = p[at]
            if keep is not None:
                piece.mul_(keep)
            r, c = part(self.r, at), part(self.c, at)
            if self.cap is None:
                piece.addcmul_(x[at] * r, c, value=-1)
            else:
                piece.addcmul_((r * c).clamp_(max=self.cap), x[at], value=-1)

    def rms(self, x: Tensor, lay: Layout) -> Reduce:
        """Root mean square of the scaled ``x`` over the whole tensor; (B, 1, …, 1)."""
        if self.dims is None or self.cap is not None:
            return rms((u for _, u in self.blocks(x)), lay)
        rows = torch.zeros_like(self.r)
        for at in index_blocks(x):
            weighted = x[at] * part(self.c, at)
            part(rows, at).add_(torch.linalg.vector_norm(weighted, dim=self.dims.cols, keepdim=True).square_())
        return rms([rows.sqrt_().mul_(self.r)], lay)


def rms(pieces: Iterable[Tensor], lay: Layout) -> Reduce:
    """Root mean square of a whole tensor whose shard (B, *shard) comes in pieces; (B, 1, …, 1)."""
    total = reduce(torch.add, map(_square_norm, pieces))
    return replace(lay.across(total), finish=lambda x: (x / prod(lay.shape)).sqrt())


def _square_norm(x: Tensor) -> Tensor:
    # A reduction dim by dim reads x in order and on all threads, and each sum has few terms.
    for dim in range(x.ndim - 1, 0, -1):
        x = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x.square()
