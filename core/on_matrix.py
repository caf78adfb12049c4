"""How the shards of a matrix come together for a rule that needs the whole of it: the tensor-parallel modes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .layout import Deal, Layout, Mode, Move, Placement, Rule

MatrixRule = Callable[[Tensor, Layout], Rule]
"""``fn(x, layout)``: a rule on stacks (B, m, n) of shards; its result is laid out as ``x``, in the dtype of ``x``."""


def on_matrix(fn: MatrixRule, x: Tensor, lay: Layout, mode: Mode, cost: Callable[[int, int], float]) -> Rule:
    """Run ``fn`` on each whole matrix, and on each part of a fused one.

    Args:
        fn: What to do with a matrix.
        x: (B, *shard), this rank's shards.
        lay: Their layout, with the domain that ``mode`` needs (:func:`domain_axes`).
        mode: ``blockwise``: this rank's shard is the matrix. ``duplicated``: every rank gathers the whole and keeps its
            shard of the result. ``distributed``: ``fn`` works on shards and reduces through its layout. ``owner``: one
            rank gets the whole of each matrix, works, and sends the shards back.
        cost: Work for a whole (m, n) matrix, by which owners are dealt.

    Returns:
        Laid out as ``x``.
    """
    run = _MODES[mode]
    results = yield [run(fn, piece, part, cost) for piece, part in lay.split_parts(x)]
    return lay.join_parts(results)


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


def _owner(fn: MatrixRule, x: Tensor, lay: Layout, cost: Callable[[int, int], float]) -> Rule:
    assert lay.domain is not None
    if lay.domain.size == 1:
        return (yield fn(x, lay))
    owners: list[int] = yield Deal(lay.domain, len(x), cost(*lay.shape))
    wholes = yield [_move(x[i : i + 1], lay.placement, lay.owners[owner]) for i, owner in enumerate(owners)]
    mine = [whole for whole in wholes if whole is not None]
    out = (yield fn(_cat(mine), Layout.whole(lay.shape))).split(1) if mine else ()
    results = iter(out)
    back = [
        _move(next(results) if owner == lay.domain.index else None, lay.owners[owner], lay.placement, like=x)
        for owner in owners
    ]
    return _cat((yield back))


_MODES: dict[str, Any] = {
    "blockwise": _blockwise,
    "duplicated": _duplicated,
    "distributed": _distributed,
    "owner": _owner,
}


def _move(x: Tensor | None, src: Placement, dst: Placement, *, like: Tensor | None = None) -> Move:
    ref = like if like is not None else x
    assert ref is not None
    return Move(x, 1 if x is None else len(x), src, dst, ref.dtype, ref.device)


def shard_of(whole: Tensor, lay: Layout) -> Tensor:
    """What this rank holds of ``whole`` (B, *whole shape)."""
    for dim, split in enumerate(lay.splits, -lay.ndim):
        if split is not None:
            pieces = [whole.narrow(dim, lo, hi - lo) for lo, hi in split.held[split.axis.index]]
            whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim) if pieces else whole.narrow(dim, 0, 0)
    return whole


def _cat(stacks: list[Tensor]) -> Tensor:
    return stacks[0] if len(stacks) == 1 else torch.cat(stacks)
