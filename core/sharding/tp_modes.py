"""The tensor-parallel modes: the ways in which the shards of a matrix come together for a rule that needs the whole of it.

:data:`TP_MODES` is the one list of them. Whoever asks what is exact, what travels, which ranks take part or what a flag
offers asks this table, so that a new mode is one entry here and one cost in :data:`core.cost.model.COSTS`.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from inspect import isgenerator
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..process_groups_config import Axis, by_name
from .layout import Layout
from .requests import Deal, Fill, Move, Placement, Rule

MatrixRule = Callable[[Tensor, Layout], Rule]
"""``fn(x, layout)``: a rule on stacks (B, m, n) of shards; its result is laid out as ``x``, in the dtype of ``x``."""

MatrixCost = Callable[[int, int], float]
"""``cost(rows, cols)``: the work for a whole matrix, by which owners are dealt."""


@dataclass(frozen=True)
class Deferred:
    """A stack (B, *shard) that is written straight into the buffer that needs it, instead of being formed and copied there.

    Attributes:
        shape: Sizes of the stack.
        dtype: Dtype of the stack.
        device: Device of the stack.
        fill: Writes the stack into a tensor of that shape; called once, whether or not this rank needs the result.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    fill: Fill

    def form(self) -> Tensor:
        """The stack as a tensor."""
        x = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        self.fill(x)
        return x


@dataclass(frozen=True)
class TpMode:
    """One way in which the shards of a matrix come together.

    Attributes:
        summary: What happens to a matrix, for ``--help``.
        exact: Whether the result is that of the whole matrix, however it is sharded.
        run: ``run(fn, x, layout, cost)``: a rule that applies the :data:`MatrixRule` ``fn`` to each matrix of the stack ``x``,
            (B, *shard). The result is laid out as ``x``. ``layout`` is one matrix, without parts.
        brings: ``brings(layout)``: entries that one matrix of this layout brings to a rank at most, by which waves are filled;
            0 when nothing travels.
        copies_share: Whether ranks that hold copies of a shard share the work. The domain then spans the copy axes too.
        takes_deferred: Whether ``run`` also takes one matrix as a :class:`Deferred`, when something travels.
        whole_tensors: Whether optimizers that know only whole tensors have the mode, too: their state lives on one rank
            for good, or on all.
    """

    summary: str
    exact: bool
    run: Callable[[MatrixRule, Any, Layout, MatrixCost], Rule]
    brings: Callable[[Layout], int]
    copies_share: bool = False
    takes_deferred: bool = False
    whole_tensors: bool = False


def on_matrix(fn: MatrixRule, x: Tensor | Deferred, lay: Layout, mode: str, cost: MatrixCost) -> Rule:
    """Run ``fn`` on each whole matrix, and on each part of a fused one.

    Args:
        fn: What to do with a matrix.
        x: (B, *shard), this rank's shards.
        lay: Layout of the matrices, with the ranks that ``mode`` works with as its domain.
        mode: A name in :data:`TP_MODES`.
        cost: Work for a whole matrix.

    Returns:
        A stack laid out as ``x``.
    """
    entry = TP_MODES[mode]
    if isinstance(x, Deferred):
        if entry.takes_deferred and entry.brings(lay) and x.shape[0] == 1 and not lay.parts:
            return (yield entry.run(fn, x, lay, cost))
        x = x.form()
    results = yield [entry.run(fn, piece, part, cost) for piece, part in lay.split_parts(x)]
    return lay.join_parts(results)


def work_at(
    owner: int | None,
    fn: Callable[[Tensor], Any],
    x: Tensor | Deferred,
    lay: Layout,
    *,
    batch: int | None = None,
    dtype: torch.dtype | None = None,
) -> Rule:
    """Bring a stack of whole tensors to where they are worked on, work on them there, and bring the result back.

    Args:
        owner: Index of the rank (or team) of ``lay.domain`` that works; None when every rank works on the whole.
        fn: ``fn(wholes)``, called where the tensors arrive: returns a stack of whole tensors, or a rule whose result is one.
        x: (B, *shard), this rank's shards.
        lay: Layout of the shards, without parts.
        batch: Number of tensors that ``fn`` returns; None for B.
        dtype: Dtype of what ``fn`` returns; None for that of ``x``.

    Returns:
        (batch, *shard): this rank's shards of what ``fn`` returned.
    """
    batch, dtype, device = batch or x.shape[0], dtype or x.dtype, x.device
    there = None if _is_alone(lay) else lay.everywhere if owner is None else lay.owners[owner]
    if there is None:
        wholes = x.form() if isinstance(x, Deferred) else x
    else:
        source = x.fill if isinstance(x, Deferred) else x
        wholes = yield Move(source, x.shape[0], lay.placement, there, x.dtype, device)
        del source
    del x
    result = None
    if wholes is not None:
        answer = fn(wholes)
        # A rule holds what it works on, and may let go of it.
        del wholes
        result = (yield answer) if isgenerator(answer) else answer
        del answer
    if there is None or owner is None:
        assert isinstance(result, Tensor)
        return shard_of(result, lay)
    return (yield Move(result, batch, there, lay.placement, dtype, device))


def shard_of(whole: Tensor, lay: Layout) -> Tensor:
    """This rank's shard of ``whole`` (B, *whole shape)."""
    for dim, split in enumerate(lay.splits, -lay.ndim):
        if split is not None:
            pieces = [whole.narrow(dim, lo, hi - lo) for lo, hi in split.held[split.axis.index]]
            whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim) if pieces else whole.narrow(dim, 0, 0)
    return whole


def _blockwise(fn: MatrixRule, x: Tensor, lay: Layout, cost: MatrixCost) -> Rule:
    return (yield fn(x, lay.block)) if x.numel() else x


def _duplicated(fn: MatrixRule, x: Tensor, lay: Layout, cost: MatrixCost) -> Rule:
    if lay.is_whole:
        return (yield fn(x, lay))
    return (yield work_at(None, lambda wholes: fn(wholes, Layout.whole(lay.shape)), x, lay))


def _distributed(fn: MatrixRule, x: Tensor, lay: Layout, cost: MatrixCost) -> Rule:
    if lay.splits_long_dim_only:
        return (yield fn(x, lay))
    recut = lay.recut
    long = yield _move(x, lay.placement, recut.placement)
    out = yield fn(long, recut)
    return (yield _move(out, recut.placement, lay.placement))


def _owner(fn: MatrixRule, x: Tensor | Deferred, lay: Layout, cost: MatrixCost) -> Rule:
    if _is_alone(lay):
        assert isinstance(x, Tensor)
        return (yield fn(x, lay))
    assert lay.domain is not None
    me, dtype, device = lay.domain.index // lay.domain.team_size, x.dtype, x.device
    owners: list[int] = yield Deal(lay.domain, x.shape[0], cost(*lay.shape))
    shards = x.split(1) if isinstance(x, Tensor) else (x.fill,)
    # Nothing that has left for its buffer is held on to: it would stay in memory while the wave travels.
    arrivals = yield [
        Move(shard, 1, lay.placement, lay.owners[owner], dtype, device)
        for shard, owner in zip(shards, owners, strict=True)
    ]
    del x, shards
    # One stack of all that this rank owns, unlike work_at(): small matrices are worked on together.
    owned = [whole for whole in arrivals if whole is not None]
    arrivals.clear()
    rule = fn(_cat(owned), lay.at_owner) if owned else None
    owned.clear()
    results = deque(() if rule is None else (yield rule).split(1))
    del rule
    back = yield [
        Move(results.popleft() if owner == me else None, 1, lay.owners[owner], lay.placement, dtype, device)
        for owner in owners
    ]
    return _cat(back)


def _is_alone(lay: Layout) -> bool:
    return lay.domain is None or lay.domain.size == 1


def _move(x: Tensor, src: Placement, dst: Placement) -> Move:
    return Move(x, len(x), src, dst, x.dtype, x.device)


def _cat(stacks: list[Tensor]) -> Tensor:
    return stacks[0] if len(stacks) == 1 else torch.cat(stacks)


def _shard_and_gram(lay: Layout) -> int:
    """Entries of a shard, recut, and of the Gram matrix of the short side."""
    ranks = prod(axis.size for axis in lay.axes)
    return 0 if lay.is_whole else prod(lay.shape) // ranks + min(lay.shape) ** 2


TP_MODES: dict[str, TpMode] = {
    "duplicated": TpMode(
        "every rank gathers the whole matrix and keeps its shard of the result",
        exact=True,
        run=_duplicated,
        brings=lambda lay: 0 if lay.is_whole else prod(lay.shape),
        whole_tensors=True,
    ),
    "distributed": TpMode(
        "ranks work on their shards and reduce Gram matrices",
        exact=True,
        run=_distributed,
        brings=_shard_and_gram,
    ),
    "owner": TpMode(
        "one rank, or a team of ranks, gets the whole matrix, works and sends the shards back",
        exact=True,
        run=_owner,
        brings=lambda lay: 0 if _is_alone(lay) else prod(lay.shape),
        copies_share=True,
        takes_deferred=True,
        whole_tensors=True,
    ),
    "blockwise": TpMode(
        "each shard is taken for a matrix of its own: not exact",
        exact=False,
        run=_blockwise,
        brings=lambda lay: 0,
    ),
}
"""The modes, by the names that ``tp_mode`` takes."""

AUTO = "auto"
"""Value of ``tp_mode`` that is a choice between the exact modes, made for each matrix (:mod:`core.cost.auto`)."""


def tp_mode_names() -> tuple[str, ...]:
    """All that ``tp_mode`` may be for an optimizer of matrices."""
    return (*TP_MODES, AUTO)


def exact_modes() -> tuple[str, ...]:
    """The modes whose step is that of the whole matrix."""
    return tuple(name for name, mode in TP_MODES.items() if mode.exact)


def working_axes(lay: Layout, name: str) -> tuple[Axis, ...]:
    """The mesh axes, by name, whose ranks work on a matrix together in a mode; :data:`AUTO` may choose any of the modes."""
    shared = name == AUTO or TP_MODES[name].copies_share
    return by_name((*lay.axes, *lay.copies) if shared else lay.axes)


if TYPE_CHECKING:
    MatrixMode = str
    WholeMode = str
else:
    # Constructors are annotated with these, and flags offer what the annotation lists.
    MatrixMode = Literal[tp_mode_names()]
    WholeMode = Literal[tuple(name for name, mode in TP_MODES.items() if mode.whole_tensors)]
