"""Shards as torch.distributed.checkpoint (DCP) sees them: boxes of the whole tensor."""

from itertools import product
from math import prod
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from ..sharding.layout import Layout
from ..sharding.ranges import Ranges


class Boxes(Tensor):
    """A tensor of the whole shape that stands for this rank's shard of it, for DCP to save and to load into.

    A shard holds contiguous ranges of each dim; every combination of them is one box. DCP writes a box that several ranks hold
    only once, and fills any box from any others. So the whole tensor is saved, and plain torch can read it too.

    It is a tensor only because DCP takes nothing else: it has no memory of its own (DCP reads and writes the shard's) and no
    operations. It implements DCP's protocol for tensors of other libraries, as DTensor does.
    """

    @staticmethod
    def __new__(cls, shard: Tensor, layout: Layout) -> "Boxes":
        """A tensor of the shape ``layout.shape`` for ``shard``, whose shape is ``layout.local_shape``.

        Raises:
            ValueError: when ``shard`` has another shape.
        """
        if tuple(shard.shape) != layout.local_shape:
            raise ValueError(
                f"a shard of shape {tuple(shard.shape)} was given for {layout.shape} cut as {layout.describe()}, which makes "
                f"{layout.local_shape}; check partition_dim and partition_stride."
            )
        make: Any = torch.Tensor._make_wrapper_subclass
        whole: Boxes = make(cls, layout.shape, dtype=shard.dtype, device=shard.device)
        return whole

    def __init__(self, shard: Tensor, layout: Layout) -> None:
        self.shard, self.layout_of_shard = shard.detach(), layout
        self.boxes = cut(self.shard, layout)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:  # type: ignore[override]
        """Refuse every operation: there are no entries to compute with."""
        raise NotImplementedError(f"{func}: Boxes only shows a shard to a checkpoint; compute with the shard itself.")

    def __create_write_items__(self, key: str, _: Any) -> list[WriteItem]:
        """The boxes that this rank can write."""
        return [
            WriteItem(
                index=MetadataIndex(key, offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(offsets, box), properties=TensorProperties.create_from_tensor(box), size=self.size()
                ),
            )
            for offsets, box in self.boxes.items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """The boxes that this rank wants to read."""
        return [_chunk(offsets, box) for offsets, box in self.boxes.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """View of the shard's memory that is one box."""
        assert index.offset is not None
        return self.boxes[index.offset]


def cut(shard: Tensor, layout: Layout) -> dict[torch.Size, Tensor]:
    """The boxes of ``shard``: offset in the whole tensor → view of ``shard``."""
    if not prod(layout.shape):
        # Without a box, a tensor without entries would be missing in the checkpoint.
        return {torch.Size([0] * layout.ndim): shard.new_empty(layout.shape)}
    held = [
        ((0, size),) if split is None else split.held[split.axis.index]
        for size, split in zip(layout.shape, layout.splits, strict=True)
    ]
    boxes = {}
    for ranges in product(*map(_with_positions, held)):
        view = shard
        for dim, (lo, hi, position) in enumerate(ranges):
            view = view.narrow(dim, position, hi - lo)
        boxes[torch.Size([lo for lo, _, _ in ranges])] = view
    return boxes


def _with_positions(ranges: Ranges) -> list[tuple[int, int, int]]:
    """``(lo, hi, position of lo in the shard)`` of each range."""
    position, out = 0, []
    for lo, hi in ranges:
        out.append((lo, hi, position))
        position += hi - lo
    return out


def _chunk(offsets: torch.Size, box: Tensor) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=offsets, sizes=box.size())
