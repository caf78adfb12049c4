"""What the ranks of a job settle together: when one of them fails, all of them raise, and say the same."""

from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist

from ..process_groups_config import gather

type Group = dist.ProcessGroup | None
"""Of the ranks that settle something; None: the default process group."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read: what was found, what is possible, what to do. Raised on all ranks."""


class NewerFormatError(CheckpointError):
    """A newer version wrote it; nothing is wrong with it."""


def distributed() -> bool:
    """Whether there are other ranks to agree with."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process among those of the default process group."""
    return dist.get_rank() if distributed() else 0


def joined[T](mine: Iterable[T], group: Group = None) -> list[T]:
    """What all ranks have, in rank order."""
    return [item for items in gather(list(mine), group) for item in items]


def together[T](do: Callable[[], T], group: Group = None) -> T:
    """This rank's ``do()``; when it fails on any rank, all of them raise.

    Raises:
        CheckpointError: with the text of the failures and the ranks they happened on.
    """
    result, failure = _attempt(do)
    failures = gather(failure and _text(failure), group)
    if any(failures):
        raise CheckpointError(_merge(failures)) from failure
    # One that did not fail has a result.
    return result  # type: ignore[return-value]


def on_first[T](do: Callable[[], T], group: Group = None) -> T:
    """``do()`` of rank 0, on every rank.

    Raises:
        CheckpointError: on all ranks, when it fails.
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
