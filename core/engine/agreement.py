"""The check that the ranks of a group ask for the same things; slow, for debugging."""

from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup


def compare(mine: list[tuple[Any, ...]], group: ProcessGroup | None) -> None:
    """See that all ranks of ``group`` have the same list; each entry begins with a label.

    Raises:
        RuntimeError: on the ranks that differ from another one; names the first entry that does.
    """
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    for rank, other in enumerate(everyone):
        if other != mine:
            at = next(
                (i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other))
            )
            here, there = (str(asks[at]) if at < len(asks) else "nothing" for asks in (mine, other))
            raise RuntimeError(
                f"the ranks of a group ask for different things: here {here}, on rank {rank} of the group {there}. "
                f"Every rank must hold the same parameters, with gradients on all ranks or on none."
            )
