"""Moving stacks of tensors between placements: one all-to-all, or one all-gather, for all of them together."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor

from .layout import Move, Placement
from .ranges import Overlap, overlap

Block = tuple[Overlap, ...]
"""One rectangle that two ranks share, per dim: its position in the sender's shard, in the receiver's, and its length."""


def exchange(moves: Sequence[Move]) -> list[Tensor | None]:
    """Answer ``moves``, which share domain, dtype and device, with one collective.

    Returns:
        For each move, (B, *local shape) in the target placement, or None where this rank holds nothing there. May be a
        view of a buffer that serves several moves.
    """
    domain = moves[0].src.domain
    blocks = cache(_blocks)
    assert domain.group is not None
    if all(move.dst.boxes[r] == move.dst.boxes[0] for move in moves for r in range(domain.size)):
        received = _all_gather(moves, blocks)
    else:
        received = _all_to_all(moves, blocks)
    return [_unpack(move, pieces) for move, pieces in zip(moves, received, strict=True)]


Blocks = Callable[[Placement, Placement, int, int], tuple[Block, ...]]
Pieces = list[tuple[Block, Tensor]]


def _all_to_all(moves: Sequence[Move], blocks: Blocks) -> list[Pieces]:
    domain, like = moves[0].src.domain, _like(moves)
    me, peers = domain.index, range(domain.size)
    send_sizes = [sum(_numel(move, blocks(move.src, move.dst, me, peer)) for move in moves) for peer in peers]
    recv_sizes = [sum(_numel(move, blocks(move.src, move.dst, peer, me)) for move in moves) for peer in peers]
    send, recv = like.new_empty(sum(send_sizes)), like.new_empty(sum(recv_sizes))
    at = 0
    for peer in peers:
        for move in moves:
            at = _pack(send, at, move, blocks(move.src, move.dst, me, peer))
    dist.all_to_all_single(recv, send, recv_sizes, send_sizes, group=domain.group)
    return _received(moves, blocks, recv.split(recv_sizes))


def _all_gather(moves: Sequence[Move], blocks: Blocks) -> list[Pieces]:
    """The same for targets that want the same everywhere: a rank sends each of its pieces once, padded to the longest."""
    domain, like = moves[0].src.domain, _like(moves)
    me, peers = domain.index, range(domain.size)
    # Every rank wants the same, so what a peer would send to me is what it sends to all.
    longest = max(sum(_numel(move, blocks(move.src, move.dst, peer, me)) for move in moves) for peer in peers)
    send, recv = like.new_empty(longest), like.new_empty(domain.size * longest)
    at = 0
    for move in moves:
        at = _pack(send, at, move, blocks(move.src, move.dst, me, me))
    dist.all_gather_single(recv, send, group=domain.group)
    return _received(moves, blocks, recv.split(longest))


def _received(moves: Sequence[Move], blocks: Blocks, buffers: Sequence[Tensor]) -> list[Pieces]:
    """What each move got, out of the buffer of each sender."""
    me = moves[0].src.domain.index
    received: list[Pieces] = [[] for _ in moves]
    for peer, buffer in enumerate(buffers):
        at = 0
        for move, pieces in zip(moves, received, strict=True):
            for block in blocks(move.src, move.dst, peer, me):
                size = _numel(move, (block,))
                pieces.append((block, buffer[at : at + size]))
                at += size
    return received


def _blocks(src: Placement, dst: Placement, sender: int, receiver: int) -> tuple[Block, ...]:
    have, want = src.boxes[sender], dst.boxes[receiver]
    if have is None or want is None or sender not in src.sources[receiver]:
        return ()
    return tuple(product(*(overlap(h, w) for h, w in zip(have, want, strict=True))))


def _at(block: Block, side: str) -> tuple[slice, ...]:
    starts: Iterator[int] = (getattr(o, side) for o in block)
    return (slice(None), *(slice(at, at + o.length) for at, o in zip(starts, block, strict=True)))


def _shape(move: Move, block: Block) -> tuple[int, ...]:
    return (move.batch, *(o.length for o in block))


def _numel(move: Move, blocks: Sequence[Block]) -> int:
    return sum(torch.Size(_shape(move, block)).numel() for block in blocks)


def _like(moves: Sequence[Move]) -> Tensor:
    return torch.empty(0, dtype=moves[0].dtype, device=moves[0].device)


def _pack(buffer: Tensor, at: int, move: Move, blocks: Sequence[Block]) -> int:
    for block in blocks:
        assert move.x is not None
        size = _numel(move, (block,))
        buffer[at : at + size].view(_shape(move, block)).copy_(move.x[_at(block, "left")])
        at += size
    return at


def _unpack(move: Move, pieces: Pieces) -> Tensor | None:
    shape = move.dst.local_shape
    if shape is None:
        return None
    if len(pieces) == 1 and _shape(move, pieces[0][0]) == (move.batch, *shape):
        return pieces[0][1].view(move.batch, *shape)
    x = torch.empty((move.batch, *shape), dtype=move.dtype, device=move.device)
    for block, piece in pieces:
        x[_at(block, "right")] = piece.view(_shape(move, block))
    return x
