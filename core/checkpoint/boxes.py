"""A shard as torch.distributed.checkpoint (DCP) sees it: boxes of the whole tensor."""

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

    Every combination of the contiguous ranges that the shard holds of each dim is one box. DCP writes a box that several
    ranks hold once, and reads any boxes from any others, so what is saved is the whole tensor, for plain torch too.

    Has no memory of its own (DCP reads and writes the shard's) and no operations: DCP takes only a real tensor for one.
    Implements DCP's protocol for tensors of other libraries, which DTensor implements too.
    """

    @staticmethod
    def __new__(cls, shard: Tensor, layout: Layout) -> "Boxes":
        """``shard`` is laid out as ``layout`` says.

        Raises:
            ValueError: when it has another shape.
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
        """Refuse: there is nothing to compute with."""
        raise NotImplementedError(f"{func}: Boxes only shows a shard to a checkpoint; compute with the shard itself.")

    def __create_write_items__(self, key: str, _: Any) -> list[WriteItem]:
        """What this rank can write."""
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
        """What this rank wants to read."""
        return [_chunk(offsets, box) for offsets, box in self.boxes.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """The memory of one box."""
        assert index.offset is not None
        return self.boxes[index.offset]


def cut(shard: Tensor, layout: Layout) -> dict[torch.Size, Tensor]:
    """Offset in the whole tensor → view of ``shard``, for each box of the whole that it holds."""
    if not prod(layout.shape):
        # Without a box a tensor that has no entries would not be in the checkpoint at all.
        return {torch.Size([0] * layout.ndim): shard.new_empty(layout.shape)}
    held = [
        ((0, size),) if split is None else split.held[split.axis.index]
        for size, split in zip(layout.shape, layout.splits, strict=True)
    ]
    boxes = {}
    for ranges in product(*map(_with_positions, held)):
        view = shard
        for dim, (lo, hi, at) in enumerate(ranges):
            view = view.narrow(dim, at, hi - lo)
        boxes[torch.Size([lo for lo, _, _ in ranges])] = view
    return boxes


def _with_positions(ranges: Ranges) -> list[tuple[int, int, int]]:
    """``(lo, hi, position of lo in the shard)`` of each range."""
    at, out = 0, []
    for lo, hi in ranges:
        out.append((lo, hi, at))
        at += hi - lo
    return out


def _chunk(offsets: torch.Size, box: Tensor) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=offsets, sizes=box.size())
