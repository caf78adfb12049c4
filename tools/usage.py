"""The one way in which the tools refuse what a user gave: one line on stderr, exit code 2."""

import difflib
import sys
import time
from collections.abc import Iterable
from typing import NoReturn

EXIT_CODE = 2
# How long a rank that is not the first waits for the first to speak. A launcher that sees one worker end stops the
# others, so a rank that left at once could silence the one that prints.
_PATIENCE_S = 10.0


class UsageError(ValueError):
    """What was given, what is possible, what to do.

    Args:
        flag: where the value came from: ``--lr``, ``lr in job.yaml``, ``RANK``.
        value: what was given; None where nothing was.
        problem: what is wrong with it.
        possible: the values or the range that would do.
        hint: what to do next.
    """

    def __init__(self, flag: str, value: object, problem: str, *, possible: str = "", hint: str = "") -> None:
        self.flag, self.value = flag, value
        given = flag if value is None else f"{flag} {value}"
        text = f"{given}: {problem}"
        if possible:
            text += f"; possible: {possible}"
        if hint:
            text += f"; hint: {hint}"
        super().__init__(" ".join(text.split()))


def nearest(word: str, known: Iterable[str]) -> str:
    """``did you mean 'muon'?``, or nothing when no known word is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else ""


def refuse(error: Exception, *, rank: int, program: str = "pretrain") -> NoReturn:
    """Print ``error`` on stderr, which for a `UsageError` is one line, and exit with code 2.

    Rank 0 prints at once. Every other rank waits for it, since nearly all refusals are the same on all ranks; if
    nothing has stopped this rank by then, the fault is its own, and it prints with its number.
    """
    if rank == 0:
        print(f"{program}: error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(_PATIENCE_S)
        print(f"{program}: error on rank {rank}: {error}", file=sys.stderr, flush=True)
    sys.exit(EXIT_CODE)
