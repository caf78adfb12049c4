"""Refuses wrong input of a user, in the same way in all tools: one line on stderr, exit code 2."""

import difflib
import sys
import time
from collections.abc import Iterable
from typing import NoReturn

EXIT_CODE = 2
_PATIENCE_S = 10.0
"""Time for which other ranks wait for rank 0 to print: a launcher that sees one worker end stops the others."""


class UsageError(ValueError):
    """An error about a value of the user, which says what was given, what is possible and what to do.

    Args:
        flag: Origin of the value: ``--lr``, ``lr in job.yaml``, ``RANK``.
        value: Value that was given; None if there is none.
        problem: Statement of what is wrong with the value.
        possible: Values or range that are possible.
        hint: Advice what to do next.
    """

    def __init__(self, flag: str, value: object, problem: str, *, possible: str = "", hint: str = "") -> None:
        self.flag, self.value = flag, value
        subject = flag if value is None else f"{flag} {value}"
        text = f"{subject}: {problem}"
        if possible:
            text += f"; possible: {possible}"
        if hint:
            text += f"; hint: {hint}"
        super().__init__(" ".join(text.split()))


def nearest(word: str, known: Iterable[str]) -> str:
    """The hint ``did you mean 'muon'?``; empty if no known word is similar."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else ""


def refuse(error: Exception, *, rank: int, program: str = "pretrain") -> NoReturn:
    """Print ``error`` on stderr, which is one line for a :class:`UsageError`, and exit with code 2.

    Rank 0 prints at once. Every other rank waits for rank 0, since nearly all refusals are the same on all ranks. If nothing
    has stopped the rank by then, only this rank has the fault, and it prints with its number.
    """
    if rank == 0:
        print(f"{program}: error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(_PATIENCE_S)
        print(f"{program}: error on rank {rank}: {error}", file=sys.stderr, flush=True)
    sys.exit(EXIT_CODE)
