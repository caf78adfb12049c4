"""Steps that all ranks of a job take together: when one of them fails, all of them raise the same error."""

from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist

from ..process_groups_config import gather

type GroupOrDefault = dist.ProcessGroup | None
"""Process group of the ranks that act together; None for the default process group."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read. Raised on all ranks; its text says what is wrong and what to do."""


class NewerFormatError(CheckpointError):
    """A newer version of this package wrote the checkpoint, which is not damaged."""


def distributed() -> bool:
    """Whether torch.distributed is initialized."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Rank of this process in the default process group; 0 without one."""
    return dist.get_rank() if distributed() else 0


def joined[T](local_items: Iterable[T], group: GroupOrDefault = None) -> list[T]:
    """The items of all ranks, in rank order."""
    return [item for items in gather(list(local_items), group) for item in items]


def together[T](do: Callable[[], T], group: GroupOrDefault = None) -> T:
    """The result of this rank's ``do()``; when ``do`` fails on any rank, all of them raise.

    Raises:
        CheckpointError: with the texts of the failures and the ranks that they happened on.
    """
    result, failure = _attempt(do)
    failures = gather(failure and _text(failure), group)
    if any(failures):
        raise CheckpointError(_merge(failures)) from failure
    # No rank failed, so there is a result.
    return result  # type: ignore[return-value]


def on_first[T](do: Callable[[], T], group: GroupOrDefault = None) -> T:
    """The result of ``do()`` on rank 0, which only rank 0 calls, on every rank.

    Raises:
        CheckpointError: on all ranks, when ``do`` fails.
    """
    result, failure = _attempt(do) if rank() == 0 else (None, None)
    answer: list[Any] = [(result, failure and _text(failure))]
    if distributed():
        dist.broadcast_object_list(answer, src=0, group=group)
    result, problem = answer[0]
    if problem:
        raise CheckpointError(problem) from failure
    return result  # type: ignore[no-any-return]


def _attempt[T](do: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return do(), None
    except Exception as failure:
        return None, failure


def _text(failure: Exception) -> str:
    expected = isinstance(failure, CheckpointError | ValueError)
    return str(failure) if expected else f"{type(failure).__name__}: {failure}"


def _merge(failures: list[Any]) -> str:
    if len(set(failures)) == 1:
        return str(failures[0])
    ranks: dict[str, list[str]] = {}
    for i, text in enumerate(failures):
        if text:
            ranks.setdefault(text, []).append(str(i))
    return "\n".join(f"rank {', '.join(where)}: {text}" for text, where in ranks.items())
