"""Leaving a run before its last step: on a signal, after some minutes, or at a step. All ranks leave together."""

import signal
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Exits:
    """Knows when to leave the loop, from the moment it is entered as a context.

    Args:
        signals: Those that are taken note of instead of ending the process; empty for none.
        minutes: Time after which to leave; 0: no matter how long.
        interval: Leave after a step that is a multiple of it; None: after none.
    """

    def __init__(
        self, *, signals: Sequence[signal.Signals] = (), minutes: float = 0.0, interval: int | None = None
    ) -> None:
        self._signals, self._seconds, self._interval = signals, 60 * minutes, interval
        self._received = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Take over the signals; only the main thread can."""
        self._began = time.monotonic()
        self._before = {number: signal.signal(number, self._take) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def due(self, done: int, device: torch.device) -> str:
        """Why to leave after step ``done``; empty: go on.

        All ranks call it after every step, and get one answer: a signal to any of them counts for all, and so does the
        clock that is first. One small reduction, where signals or the clock matter.
        """
        if self._interval and done % self._interval == 0:
            return f"step {done} is a multiple of --exit-interval {self._interval}"
        received, late = self._agree(device)
        if received:
            return f"{signal.Signals(received).name} was received"
        return f"--exit-duration-in-mins {self._seconds / 60:g} are over" if late else ""

    def _agree(self, device: torch.device) -> tuple[int, bool]:
        late = 0 < self._seconds <= time.monotonic() - self._began
        if not dist.is_initialized() or not (self._signals or self._seconds):
            return self._received, late
        votes = torch.tensor([self._received, late], device=device)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return int(votes[0]), bool(votes[1])

    def _take(self, number: int, _: FrameType | None) -> None:
        self._received = number
