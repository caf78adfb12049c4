"""Where a logical tensor lives, and the requests about the whole of it that a rule may make. This module does not communicate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from ..process_groups_config import TEAM, Axis, Domain
from .ranges import Ranges, chunk, merge, overlap, total
from .requests import Op, Placement, Reduce

Mode = str
"""Name of a tensor-parallel mode in :data:`.tp_modes.TP_MODES`."""


@dataclass(frozen=True)
class Split:
    """How one dim is cut over a mesh axis.

    Attributes:
        axis: The mesh axis.
        held: For each index on the axis, the indices of the whole tensor that are held there, in the order they are held in.
    """

    axis: Axis
    held: tuple[Ranges, ...]

    @classmethod
    def even(cls, axis: Axis, size: int, *, stride: int = 1) -> "Split":
        """A cut of ``size`` indices into contiguous chunks, in each of ``stride`` blocks (:func:`.ranges.chunk`)."""
        return cls(axis, tuple(chunk(size, axis.size, i, stride=stride) for i in range(axis.size)))

    def within(self, part: Ranges) -> "Split":
        """This cut of the indices in ``part`` alone, counted within ``part``."""
        return replace(
            self, held=tuple(merge((o.right, o.right + o.length) for o in overlap(h, part)) for h in self.held)
        )


@dataclass(frozen=True)
class Layout:
    """A logical tensor of ``shape``, some of whose dims are split over mesh axes.

    Dims are counted from the end (-1, -2, …), so that every method also takes a stack ``(B, m, n)`` of tensors laid out as
    ``(m, n)``. Without splits every request is answered by plain torch: one process is no special case.

    Attributes:
        shape: Sizes of the whole tensor.
        splits: Per dim, how it is cut; None for a dim that every rank has all of.
        copies: Mesh axes whose ranks hold the same shard.
        parts: Row indices (dim -2) of each matrix in a fused weight; empty when the tensor is one matrix.
        domain: The ranks that hold a shard or a copy; needed for requests that move shards.
    """

    shape: tuple[int, ...]
    splits: tuple[Split | None, ...]
    copies: tuple[Axis, ...] = ()
    parts: tuple[Ranges, ...] = ()
    domain: Domain | None = None

    @classmethod
    def whole(cls, shape: Sequence[int], *, parts: tuple[Ranges, ...] = ()) -> "Layout":
        """A tensor that this rank holds entirely."""
        return cls(tuple(shape), (None,) * len(shape), parts=parts)

    @property
    def ndim(self) -> int:
        """Number of dims of the whole tensor."""
        return len(self.shape)

    @cached_property
    def local_shape(self) -> tuple[int, ...]:
        """Sizes of this rank's shard."""
        return tuple(
            size if split is None else total(split.held[split.axis.index])
            for size, split in zip(self.shape, self.splits, strict=True)
        )

    @property
    def is_whole(self) -> bool:
        """True when this rank's shard is the whole tensor."""
        return all(split is None for split in self.splits)

    @property
    def long_dim(self) -> int:
        """The longer dim, which the Gram matrix of the short side contracts; for a square matrix, the dim that is split."""
        rows, cols = self.shape[-2:]
        return -2 if rows > cols or (rows == cols and self.splits[-2] is not None and self.splits[-1] is None) else -1

    @property
    def splits_long_dim_only(self) -> bool:
        """True when the short dim is whole on this rank."""
        return self.splits[-3 - self.long_dim] is None

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The mesh axes that split the tensor."""
        return tuple(split.axis for split in self.splits if split is not None)

    @property
    def block(self) -> "Layout":
        """This rank's shard taken for a whole tensor."""
        return Layout.whole(self.local_shape, parts=tuple(rows for rows in self._local_rows if rows))

    def describe(self) -> str:
        """In words: ``whole``, or for each dim that is split something like ``dim -2 / tp 2``."""
        cuts = [f"dim {d} / {s.axis.name} {s.axis.size}" for d, s in zip(self._dims(()), self.splits, strict=True) if s]
        return ", ".join(cuts) or "whole"

    # Requests. Reduced dims are kept with size 1; no dims means all.

    def sum(self, x: Tensor, *dims: int) -> Reduce:
        """Sum of ``x`` over ``dims`` of the whole tensor."""
        over = self._dims(dims)
        # Without dims torch would sum over the stack, too.
        return self._reduce(x.sum(over, keepdim=True) if over else x, "sum", dims)

    def amax(self, x: Tensor, *dims: int) -> Reduce:
        """Largest entry of ``x`` over ``dims`` of the whole tensor."""
        over = self._dims(dims)
        return self._reduce(x.amax(over, keepdim=True) if over else x, "max", dims)

    def mean(self, x: Tensor, *dims: int) -> Reduce:
        """Mean of ``x`` over ``dims`` of the whole tensor."""
        count = prod(self.shape[d] for d in self._dims(dims))
        return replace(self.sum(x, *dims), finish=lambda s: s / count)

    def norm(self, x: Tensor, *dims: int) -> Reduce:
        """Euclidean norm of ``x`` over ``dims`` of the whole tensor."""
        return replace(self._sum_of_squares(x, dims), finish=torch.sqrt)

    def rms(self, x: Tensor, *dims: int) -> Reduce:
        """Root mean square of ``x`` over ``dims`` of the whole tensor."""
        return replace(self._sum_of_squares(x, dims), finish=lambda s: (s / self._count(dims)).sqrt())

    def across(self, x: Tensor, *dims: int) -> Reduce:
        """Sum, over the ranks that split ``dims``, of values (B, ...) that each computed from its shard, in one shape on all."""
        return self._reduce(x, "sum", dims)

    # Parts of a fused weight, each a matrix of its own.

    def split_parts(self, x: Tensor) -> list[tuple[Tensor, "Layout"]]:
        """This rank's shard of each part, (B, rows, n), and the layout of that part. Does not copy when there is one part."""
        if not self.parts:
            return [(x, self)]
        out = []
        for layout, rows in zip(self.part_layouts, self._local_rows, strict=True):
            pieces = [x[..., lo:hi, :] for lo, hi in rows]
            piece = pieces[0] if len(pieces) == 1 else torch.cat(pieces, -2) if pieces else x[..., :0, :]
            out.append((piece, layout))
        return out

    @cached_property
    def part_layouts(self) -> "tuple[Layout, ...]":
        """The layouts of the matrices that the tensor is made of; this layout when it is one matrix."""
        if not self.parts:
            return (self,)
        rows, cols = self.splits[-2], self.splits[-1]
        return tuple(
            replace(self, shape=(total(part), self.shape[-1]), splits=(rows and rows.within(part), cols), parts=())
            for part in self.parts
        )

    def join_parts(self, pieces: Sequence[Tensor]) -> Tensor:
        """Inverse of :meth:`split_parts`."""
        if not self.parts:
            return pieces[0]
        x = pieces[0].new_empty(*pieces[0].shape[:-2], *self.local_shape)
        for piece, rows in zip(pieces, self._local_rows, strict=True):
            start = 0
            for lo, hi in rows:
                x[..., lo:hi, :] = piece[..., start : start + hi - lo, :]
                start += hi - lo
        return x

    def per_part(self, factor: Callable[[int, int], float], like: Tensor) -> Tensor | float:
        """``factor(rows, cols)`` of the whole matrix; for parts, (local rows, 1) in the dtype of ``like``, by each row's part."""
        if not self.parts:
            return factor(self.shape[-2], self.shape[-1])
        column = like.new_empty(self.local_shape[-2], 1)
        for part, rows in zip(self.parts, self._local_rows, strict=True):
            for lo, hi in rows:
                column[lo:hi] = factor(total(part), self.shape[-1])
        return column

    # Placements for requests that move shards between ranks.

    @cached_property
    def placement(self) -> Placement:
        """What each rank of :attr:`domain` holds. A rank reads from the shards with its own position on the copy axes."""
        assert self.domain is not None
        split_axes = {axis.name for axis in self.axes}
        positions = [dict(zip(self.domain.axes, coord, strict=True)) for coord in self.domain.coords]
        boxes = tuple(
            tuple(
                ((0, size),) if split is None else split.held[position.get(split.axis.name, 0)]
                for size, split in zip(self.shape, self.splits, strict=True)
            )
            for position in positions
        )
        replica = [tuple(i for name, i in position.items() if name not in split_axes) for position in positions]
        sources = tuple(tuple(s for s, other in enumerate(replica) if other == own) for own in replica)
        # A dim that is not split leaves ranks of one replica with equal boxes; only the first of them sends.
        sources = tuple(
            tuple(s for k, s in enumerate(ss) if boxes[s] not in [boxes[q] for q in ss[:k]]) for ss in sources
        )
        return Placement(self.domain, boxes, sources)

    @cached_property
    def owners(self) -> tuple[Placement, ...]:
        """For each rank, or team, of the domain: the placement with the whole tensor on that rank and nothing elsewhere."""
        assert self.domain is not None
        size, team = self.domain.size, self.domain.team_size
        splits = self.at_owner.splits
        # Indices that each member of a team holds of each dim.
        boxes = [
            tuple(((0, n),) if split is None else split.held[r] for n, split in zip(self.shape, splits, strict=True))
            for r in range(team)
        ]
        placements = []
        for first in range(0, size, team):
            members = range(first, first + team)
            held = tuple(boxes[r - first] if r in members else None for r in range(size))
            placements.append(Placement(self.domain, held, (tuple(members),) * size))
        return tuple(placements)

    @property
    def at_owner(self) -> "Layout":
        """The layout of the matrix at its owner: whole, or with its longer dim cut over this rank's team."""
        assert self.domain is not None
        return Layout.whole(self.shape) if self.domain.team is None else self._recut_over(self.domain.team)

    @cached_property
    def everywhere(self) -> Placement:
        """The placement with the whole tensor on every rank."""
        assert self.domain is not None
        box = tuple(((0, n),) for n in self.shape)
        size = self.domain.size
        return Placement(self.domain, (box,) * size, tuple((r,) for r in range(size)))

    @cached_property
    def recut(self) -> "Layout":
        """The layout with the longer dim cut over the whole domain and the shorter one whole."""
        assert self.domain is not None
        size = self.domain.size
        axis = Axis("+".join(self.domain.axes), tuple(range(size)), self.domain.index, self.domain.group)
        domain = replace(self.domain, axes=(axis.name,), coords=tuple((r,) for r in range(size)))
        return replace(self._recut_over(axis), domain=domain)

    def _recut_over(self, axis: Axis) -> "Layout":
        long = -1 if self.shape[-1] >= self.shape[-2] else -2
        split = Split.even(axis, self.shape[long])
        return Layout(self.shape, (None, split) if long == -1 else (split, None))

    @cached_property
    def _local_rows(self) -> tuple[Ranges, ...]:
        held = self._held(-2)
        return tuple(merge((o.left, o.left + o.length) for o in overlap(held, part)) for part in self.parts)

    def _held(self, dim: int) -> Ranges:
        if self.ndim < -dim:
            return ((0, 1),)
        split = self.splits[dim]
        return ((0, self.shape[dim]),) if split is None else split.held[split.axis.index]

    def _sum_of_squares(self, x: Tensor, dims: tuple[int, ...]) -> Reduce:
        # Row by row: this takes one pass over x, and a float32 sum of millions of squares in one go loses its third digit.
        if -1 in self._dims(dims):
            x = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return self.sum(x.square(), *dims)

    def _count(self, dims: tuple[int, ...]) -> int:
        return prod(self.shape[d] for d in self._dims(dims))

    def _dims(self, dims: tuple[int, ...]) -> tuple[int, ...]:
        return dims or tuple(range(-self.ndim, 0))

    def _reduce(self, x: Tensor, op: Op, dims: tuple[int, ...]) -> Reduce:
        axes = [split.axis for split in (self.splits[d] for d in self._dims(dims)) if split is not None]
        groups = tuple(axis.group for axis in axes if axis.group is not None)
        return Reduce(x, op, groups, team=any(axis.name == TEAM for axis in axes))
