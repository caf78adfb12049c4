"""How the shards of a matrix come together for a rule that needs the whole of it: the tensor-parallel modes."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .layout import Layout, Mode
from .requests import Deal, Fill, Move, Placement, Rule

MatrixRule = Callable[[Tensor, Layout], Rule]
"""``fn(x, layout)``: a rule on stacks (B, m, n) of shards; its result is laid out as ``x``, in the dtype of ``x``."""


@dataclass(frozen=True)
class Deferred:
    """A stack (B, *shard) that is written where it goes, instead of being formed first and copied there.

    Attributes:
        shape: Its sizes.
        dtype: Its dtype.
        device: Its device.
        fill: Writes it; called once, whether or not this rank needs it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    fill: Fill

    def form(self) -> Tensor:
        """The stack."""
        x = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        self.fill(x)
        return x


def on_matrix(fn: MatrixRule, x: Tensor | Deferred, lay: Layout, mode: Mode, cost: Callable[[int, int], float]) -> Rule:
    """Run ``fn`` on each whole matrix, and on each part of a fused one.

    Args:
        fn: What to do with a matrix.
        x: (B, *shard), this rank's shards.
        lay: Their layout, with the ranks that ``mode`` works with as its domain.
        mode: ``blockwise``: this rank's shard is the matrix. ``duplicated``: every rank gathers the whole and keeps its
            shard of the result. ``distributed``: ``fn`` works on shards and reduces through its layout. ``owner``: one
            rank (or team of ranks, when the domain has teams) gets the whole of each matrix, works, and sends the shards back.
        cost: Work for a whole (m, n) matrix, by which owners are dealt.

    Returns:
        Laid out as ``x``.
    """
    if isinstance(x, Deferred):
        if mode == "owner" and travels(lay, mode) and x.shape[0] == 1 and not lay.parts:
            return (yield _owner(fn, x, lay, cost))
        x = x.form()
    run = _MODES[mode]
    results = yield [run(fn, piece, part, cost) for piece, part in lay.split_parts(x)]
    return lay.join_parts(results)


def travels(lay: Layout, mode: Mode) -> bool:
    """Whether ranks send each other something for the matrices of ``lay``, in waves."""
    if mode == "owner":
        return lay.domain is not None and lay.domain.size > 1
    return mode != "blockwise" and not lay.is_whole


def _blockwise(fn: MatrixRule, x: Tensor, lay: Layout, cost: Any) -> Rule:
    return (yield fn(x, lay.block)) if x.numel() else x


def _duplicated(fn: MatrixRule, x: Tensor, lay: Layout, cost: Any) -> Rule:
    if lay.is_whole:
        return (yield fn(x, lay))
    whole = yield _move(x, lay.placement, lay.everywhere)
    return shard_of((yield fn(whole, Layout.whole(lay.shape))), lay)


def _distributed(fn: MatrixRule, x: Tensor, lay: Layout, cost: Any) -> Rule:
    if lay.splits_long_dim_only:
        return (yield fn(x, lay))
    recut = lay.recut
    long = yield _move(x, lay.placement, recut.placement)
    out = yield fn(long, recut)
    return (yield _move(out, recut.placement, lay.placement))


def _owner(fn: MatrixRule, x: Tensor | Deferred, lay: Layout, cost: Callable[[int, int], float]) -> Rule:
    if not travels(lay, "owner"):
        assert isinstance(x, Tensor)
        return (yield fn(x, lay))
    assert lay.domain is not None
    me, dtype, device = lay.domain.index // lay.domain.team_size, x.dtype, x.device
    owners: list[int] = yield Deal(lay.domain, x.shape[0], cost(*lay.shape))
    shards = x.split(1) if isinstance(x, Tensor) else (x.fill,)
    # Nothing that has left for its buffer is held on to: it would stay in memory while the wave travels.
    wholes = yield [
        Move(shard, 1, lay.placement, lay.owners[owner], dtype, device)
        for shard, owner in zip(shards, owners, strict=True)
    ]
    del x, shards
    mine = [whole for whole in wholes if whole is not None]
    wholes.clear()
    rule = fn(_cat(mine), lay.at_owner) if mine else None
    mine.clear()
    results = deque(() if rule is None else (yield rule).split(1))
    del rule
    back = yield [
        Move(results.popleft() if owner == me else None, 1, lay.owners[owner], lay.placement, dtype, device)
        for owner in owners
    ]
    return _cat(back)


_MODES: dict[str, Any] = {
    "blockwise": _blockwise,
    "duplicated": _duplicated,
    "distributed": _distributed,
    "owner": _owner,
}


def _move(x: Tensor, src: Placement, dst: Placement) -> Move:
    return Move(x, len(x), src, dst, x.dtype, x.device)


def shard_of(whole: Tensor, lay: Layout) -> Tensor:
    """What this rank holds of ``whole`` (B, *whole shape)."""
    for dim, split in enumerate(lay.splits, -lay.ndim):
        if split is not None:
            pieces = [whole.narrow(dim, lo, hi - lo) for lo, hi in split.held[split.axis.index]]
            whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim) if pieces else whole.narrow(dim, 0, 0)
    return whole


def _cat(stacks: list[Tensor]) -> Tensor:
    return stacks[0] if len(stacks) == 1 else torch.cat(stacks)
