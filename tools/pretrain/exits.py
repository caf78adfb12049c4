"""Leaves a run before its last step, on a signal, after some minutes or at a step; all ranks leave together."""

import signal
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Exits:
    """Knows when to leave the training loop; the clock starts when it is entered as a context.

    Args:
        signals: Signals that are noted instead of ending the process.
        minutes: Time after which to leave; 0 for no limit.
        interval: Leave after a step that is a multiple of this number; None for no such step.
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
        """Reason to leave after step ``done``; empty when training goes on.

        All ranks call it after every step and get the same answer: a signal to any rank counts for all, and so does the
        first clock that runs out. It takes one small reduction if signals or minutes were given.
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
