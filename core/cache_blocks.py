"""Blocks of tensors that fit the cache, for work on CPU that goes over its tensors several times."""

from collections.abc import Iterator, Sequence
from math import prod

from torch import Tensor

BLOCK_BYTES = {"cpu": 2**19}
"""Size of a block in bytes, by device type; every cut into blocks follows from it. A foreach kernel on CPU goes through its
tensors once per operation; blocks that stay in the cache between operations make a rule of eight operations 1.5 times as fast.
Other devices get whole tensors, so that few kernels are launched."""

At = tuple[slice, ...]
"""Index of a block in a tensor."""


def row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of ``tensors``, which have equal shapes, cut into blocks along dim -2 (vectors: along dim -1)."""
    like = tensors[0]
    limit = BLOCK_BYTES.get(like.device.type)
    dim = -min(2, like.ndim)
    rows = like.shape[dim] if like.ndim else 0
    row_bytes = like.numel() // max(1, rows) * max(x.element_size() for x in tensors)
    if limit is None or rows * row_bytes <= limit:
        yield tensors
        return
    step = max(1, limit // max(1, row_bytes))
    for at in range(0, rows, step):
        yield tuple(x.narrow(dim, at, min(step, rows - at)) for x in tensors)


def flat_blocks(columns: Sequence[Sequence[Tensor]], entries: int) -> Iterator[list[list[Tensor]]]:
    """Groups of flat views of contiguous tensors in parallel lists; tensors that are too large for a group are cut.

    Args:
        columns: Lists of equal length, such as parameters, gradients and one state; tensors with one index have equal sizes.
        entries: Largest number of entries in each list of a group.

    Yields:
        One list of views per column, for each group.
    """
    pieces = [[piece for x in column for piece in x.view(-1).split(entries)] for column in columns]
    start = held = 0
    for at, piece in enumerate(pieces[0]):
        if held + piece.numel() > entries:
            yield [column[start:at] for column in pieces]
            start, held = at, 0
        held += piece.numel()
    if held:
        yield [column[start:] for column in pieces]


def index_blocks(x: Tensor) -> Iterator[At]:
    """Indices of blocks of ``x`` (B, *shard) that are contiguous in each shard; the cut does not depend on the dtype."""
    limit = BLOCK_BYTES.get(x.device.type)
    # Twice as many float32 entries as in a usual block, because rules that cut in this way hold few tensors at a time.
    entries = x.numel() if limit is None else 2 * limit // 4
    for rest in _index_blocks(x.shape[1:], entries // max(1, len(x))):
        yield slice(None), *rest


def _index_blocks(shape: Sequence[int], limit: int) -> Iterator[At]:
    if prod(shape) <= limit or not shape:
        yield ()
        return
    step = max(1, limit // max(1, prod(shape[1:])))
    for i in range(0, shape[0], step):
        for rest in _index_blocks(shape[1:], limit):
            yield slice(i, i + step), *rest
