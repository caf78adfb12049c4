"""Moving stacks of tensors between placements: one all-to-all, or one all-gather, for all of them together."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from ..sharding.ranges import Overlap, overlap
from ..sharding.requests import Move, Placement

Block = tuple[Overlap, ...]
"""A rectangle that two ranks share. Per dim: its position in the sender's shard and in the receiver's, and its length."""

Blocks = tuple[Block, ...]
"""All rectangles that two ranks share."""

Pieces = list[tuple[Block, Tensor]]
"""Rectangles, each with the part of a buffer that holds it."""


def exchange(moves: Sequence[Move]) -> Callable[[], list[Tensor | None]]:
    """Start one collective that answers all of ``moves``, which share domain, dtype and device.

    Returns:
        A function that waits for the collective and returns, for each move, (B, *local shape) in the target placement, or None
        where this rank holds nothing. An answer may be a view of a buffer that serves several moves.
    """
    domain = moves[0].src.domain
    assert domain.group is not None
    if all(move.dst.boxes[r] == move.dst.boxes[0] for move in moves for r in range(domain.size)):
        return _all_gather(moves)
    return _all_to_all(moves)


def _all_to_all(moves: Sequence[Move]) -> Callable[[], list[Tensor | None]]:
    domain, like = moves[0].src.domain, _like(moves)
    me, peers = domain.index, range(domain.size)
    outgoing = [[_blocks(move.src, move.dst, me, peer) for move in moves] for peer in peers]
    incoming = [[_blocks(move.src, move.dst, peer, me) for move in moves] for peer in peers]
    send_sizes, recv_sizes = (
        [sum(_numel(move, blocks) for move, blocks in zip(moves, row, strict=True)) for row in rows]
        for rows in (outgoing, incoming)
    )
    send = _packed(like.new_empty(sum(send_sizes)), moves, outgoing)
    recv = like.new_empty(sum(recv_sizes))
    work = dist.all_to_all_single(recv, send, recv_sizes, send_sizes, group=domain.group, async_op=True)
    return _arrival(work, [send], moves, recv.split(recv_sizes), incoming)


def _all_gather(moves: Sequence[Move]) -> Callable[[], list[Tensor | None]]:
    """Start one all-gather, for targets that are the same on every rank: each rank sends its pieces once.

    What a rank sends is padded to the length of the longest.
    """
    domain, like = moves[0].src.domain, _like(moves)
    me, peers = domain.index, range(domain.size)
    # Every rank wants the same, so what a peer would send to this rank is what it sends to all.
    incoming = [[_blocks(move.src, move.dst, peer, me) for move in moves] for peer in peers]
    longest = max(sum(_numel(move, blocks) for move, blocks in zip(moves, row, strict=True)) for row in incoming)
    send = _packed(like.new_empty(longest), moves, [incoming[me]])
    recv = like.new_empty(domain.size * longest)
    # Before torch 2.13 it has only the name that 2.13 warns of.
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    work = gather(recv, send, group=domain.group, async_op=True)
    return _arrival(work, [send], moves, recv.split(longest), incoming)


def _arrival(
    work: dist.Work, keep: list[Tensor], moves: Sequence[Move], buffers: Sequence[Tensor], blocks: list[list[Blocks]]
) -> Callable[[], list[Tensor | None]]:
    """A function that waits for ``work`` and puts each move's pieces together.

    Args:
        work: A collective that was started.
        keep: What must stay in memory until it has ended.
        moves: The moves that it answers.
        buffers: Per sender, where what it sends arrives.
        blocks: Per sender and move, the rectangles that it sends.
    """
    targets = [(move.batch, move.dst.local_shape, move.dtype, move.device) for move in moves]
    received: list[Pieces] = [[] for _ in moves]
    for buffer, row in zip(buffers, blocks, strict=True):
        start = 0
        for move, pieces, rectangles in zip(moves, received, row, strict=True):
            for block in rectangles:
                size = _numel(move, (block,))
                pieces.append((block, buffer[start : start + size]))
                start += size

    def arrive() -> list[Tensor | None]:
        work.wait()
        keep.clear()
        answers = [_unpack(*target, pieces) for target, pieces in zip(targets, received, strict=True)]
        received.clear()
        return answers

    return arrive


def _blocks(src: Placement, dst: Placement, sender: int, receiver: int) -> Blocks:
    """What ``sender`` gives to ``receiver``; found once for each pair of placements and ranks."""
    key = dst, sender, receiver
    if key not in src.shared:
        have, want = src.boxes[sender], dst.boxes[receiver]
        shares_nothing = have is None or want is None or sender not in src.sources[receiver]
        src.shared[key] = (
            ()
            if shares_nothing
            else tuple(product(*(overlap(h, w) for h, w in zip(have or (), want or (), strict=True))))
        )
    blocks: Blocks = src.shared[key]
    return blocks


def _slices(block: Block, side: str) -> tuple[slice, ...]:
    """The index of ``block`` in the stack of the sender (``side="left"``) or of the receiver (``"right"``)."""
    starts: Iterator[int] = (getattr(o, side) for o in block)
    return (slice(None), *(slice(start, start + o.length) for start, o in zip(starts, block, strict=True)))


def _shape(batch: int, block: Block) -> tuple[int, ...]:
    return (batch, *(o.length for o in block))


def _numel(move: Move, blocks: Blocks) -> int:
    return sum(prod(_shape(move.batch, block)) for block in blocks)


def _like(moves: Sequence[Move]) -> Tensor:
    return torch.empty(0, dtype=moves[0].dtype, device=moves[0].device)


def _packed(buffer: Tensor, moves: Sequence[Move], blocks: list[list[Blocks]]) -> Tensor:
    """``buffer``, filled with what each receiver gets, one after the other. Sets the moves' ``x`` to None.

    A move whose ``x`` is a function writes straight into the buffer when all of its shard has one place there.
    """
    start = 0
    places: list[Pieces] = [[] for _ in moves]
    for row in blocks:
        for move, pieces, rectangles in zip(moves, places, row, strict=True):
            for block in rectangles:
                size = _numel(move, (block,))
                pieces.append((block, buffer[start : start + size].view(_shape(move.batch, block))))
                start += size
    for move, pieces in zip(moves, places, strict=True):
        x, move.x = move.x, None
        if x is None:
            continue
        if callable(x):
            shape = (move.batch, *(move.src.local_shape or ()))
            if len(pieces) == 1 and pieces[0][1].shape == shape:
                x(pieces[0][1])
                continue
            x(formed := buffer.new_empty(shape))
            x = formed
        for block, place in pieces:
            place.copy_(x[_slices(block, "left")])
    return buffer


def _unpack(
    batch: int, shape: tuple[int, ...] | None, dtype: torch.dtype, device: torch.device, pieces: Pieces
) -> Tensor | None:
    if shape is None:
        return None
    if len(pieces) == 1 and _shape(batch, pieces[0][0]) == (batch, *shape):
        return pieces[0][1].view(batch, *shape)
    x = torch.empty((batch, *shape), dtype=dtype, device=device)
    for block, piece in pieces:
        x[_slices(block, "right")] = piece.view(_shape(batch, block))
    return x
