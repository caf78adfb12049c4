"""The check that the ranks of a group ask for the same things; slow, for debugging."""

from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup


def compare(requests: list[tuple[Any, ...]], group: ProcessGroup | None) -> None:
    """Check that all ranks of ``group`` make the same requests, each described by a label and further values.

    Raises:
        RuntimeError: on each rank that differs from another one; names the first request that differs.
    """
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, requests, group=group)
    for rank, other in enumerate(everyone):
        if other != requests:
            pairs = enumerate(zip(requests, other, strict=False))
            first = next((i for i, (a, b) in pairs if a != b), min(len(requests), len(other)))
            ours, theirs = (str(asked[first]) if first < len(asked) else "nothing" for asked in (requests, other))
            raise RuntimeError(
                f"the ranks of a group ask for different things: this rank for {ours}, rank {rank} of the group for {theirs}. "
                f"Every rank must hold the same parameters, with gradients on all ranks or on none."
            )
