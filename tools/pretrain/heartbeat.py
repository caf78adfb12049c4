"""Names the missing rank when a collective fails: every rank writes to a store what it is doing.

The error of a collective does not say so: NCCL and gloo know a socket or a time-out, not the rank that sleeps elsewhere.
"""

import json
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Self

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store

from core import engine

EVERY_S = 0.5
"""Longest time between two beats."""
PAUSE_S = 0.05
"""Shortest time between two beats. A new phase is written at once, unless a beat was written just before."""
SILENT_S = 2.0
"""A rank without a beat for this time is dead, or stopped."""
GRACE_S = 3.0
"""Time for which a rank whose collective failed watches the others; ranks that wait, too, notice at about the same time."""
_ROOT = Path(__file__).parents[2]


class LostRankError(RuntimeError):
    """A collective failed, because a rank is dead or did not reach it.

    Attributes:
        speaker: Rank that should print the message, which is the same on all ranks that waited.
    """

    def __init__(self, text: str, speaker: int) -> None:
        super().__init__(text)
        self.speaker = speaker


@dataclass
class Beat:
    """What a rank writes about itself.

    Attributes:
        number: Number of the beat, counted from 1.
        step: Training step that the rank is at, counted from 1; 0 before the first.
        phase: Phase of the step: ``forward``, ``optimizer``, …
        inside: Module of the model that the rank entered last, or the parameter that its last collective was for.
        place: Line of the program that the rank is at, or was at when a collective failed.
        since: Seconds in this phase.
        state: ``at work``, ``waiting`` (the rank's collective has failed), or how the rank ended.
    """

    number: int = 0
    step: int = 0
    phase: str = "start"
    inside: str = ""
    place: str = ""
    since: float = 0.0
    state: str = "at work"

    def __str__(self) -> str:
        parts = [f"step {self.step}" if self.step else "", self.phase, self.inside and f"at {self.inside}", self.place]
        return ", ".join(part for part in parts if part)


class Heartbeat:
    """Writes to the store what this rank is doing, from a thread of its own; works while it is entered as a context.

    Args:
        store: Store that all ranks share, through a connection of its own: another user's wait would delay the beats.
        rank: Number of this rank.
        size: Number of ranks.
        timeout: Time-out of collectives, for the message.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        self._store, self._rank, self._size, self._timeout = store, rank, size, timeout
        self._own_beat = Beat()
        self._entered = time.monotonic()
        self._main = threading.get_ident()
        self._first = Beat()  # last beat of rank 0, for its beats are lost with the store, which rank 0 may hold
        self._over = False
        self._news = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._write()
        self._thread.start()
        engine.on_collective(self._collective_for)
        return self

    def __exit__(self, *_: object) -> None:
        engine.on_collective(None)
        self._over = True
        self._news.set()
        self._thread.join()

    def at(self, phase: str, step: int | None = None) -> None:
        """Note that this rank begins ``phase``, and a new ``step`` if one is given. The thread writes it to the store."""
        self._own_beat.phase, self._own_beat.inside = phase, ""
        if step is not None:
            self._own_beat.step = step
        self._entered = time.monotonic()
        self._news.set()

    def follow(self, model: nn.Module) -> None:
        """Note every module of ``model`` with parameters of its own when forward or backward reaches it; adds hooks to them."""
        for name, module in model.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(lambda *_, name=name: self._note("forward", name))
                module.register_forward_hook(lambda _, __, out, name=name: self._follow_back(out, name))

    def _follow_back(self, out: object, name: str) -> None:
        if isinstance(out, Tensor) and out.requires_grad:
            out.register_hook(lambda _: self._note("backward", name))

    def _collective_for(self, label: str) -> None:
        self._own_beat.inside = label

    def _note(self, phase: str, name: str) -> None:
        if self._own_beat.phase in ("forward", "backward") and self._own_beat.phase != phase:
            self.at(phase)
        self._own_beat.inside = name

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Tell the other ranks when the body fails, and name the missing rank when a collective has failed.

        Raises:
            LostRankError: instead of the error of a collective.
        """
        try:
            yield
        except Exception as error:
            self._own_beat.place = _place(_frames_of(error))
            if not _is_of_a_collective(error):
                self._own_beat.state = f"failed: {type(error).__name__}"
                self._try_to_write()
                raise
            self._own_beat.state = "waiting"
            self._try_to_write()
            text, speaker = self._blame()
            raise LostRankError(f"{text} [{_first_line(error)}]", speaker) from error
        self._own_beat.state = "ended"
        self._try_to_write()

    def _blame(self) -> tuple[str, int]:
        """The message about the ranks that are missing, and the first of the ranks that waited."""
        try:
            beats, silent = self._look()
        except RuntimeError:
            text = (
                f"rank 0 is gone, and with it the store: it was last heard of at {self._first}. Rank {self._rank} waited for it "
                f"in {self._own_beat}."
            )
            return text, self._rank
        waiting = [rank for rank, beat in beats.items() if beat.state == "waiting"]
        away = [rank for rank in beats if rank not in waiting]
        # Beside a rank that is gone, one that is at work may only not have noticed it yet.
        verb = "is still" if any(rank in silent or beats[rank].state != "at work" for rank in away) else "is stuck"
        parts = []
        for rank in away:
            beat = beats[rank]
            if beat.state != "at work":
                parts.append(f"rank {rank} {beat.state}, in {beat}")
            elif rank in silent:
                parts.append(f"rank {rank} does not answer (dead, or stopped): it was last heard of in {beat}")
            else:
                parts.append(f"rank {rank} {verb} in {beat}, for {beat.since:.0f} s")
        parts = parts or ["every rank waits for another one"]
        waits: dict[str, list[int]] = {}
        for rank in waiting:
            waits.setdefault(str(beats[rank]), []).append(rank)
        waiters = "; ".join(f"rank {', '.join(map(str, ranks))} in {where}" for where, ranks in waits.items())
        limit = f"--distributed-timeout-minutes {self._timeout.total_seconds() / 60:g}"
        return f"{'; '.join(parts)}. Waiting for it: {waiters}. ({limit})", waiting[0]

    def _look(self) -> tuple[dict[int, Beat], set[int]]:
        """The last beat of every rank, and the silent ranks; waits until each rank is settled, or for :data:`GRACE_S`."""
        began = time.monotonic()
        numbers: dict[int, tuple[int, float]] = {}
        while True:
            now, beats = time.monotonic(), self._read(range(self._size))
            for rank, beat in beats.items():
                if rank not in numbers or numbers[rank][0] != beat.number:
                    numbers[rank] = beat.number, now
            silent = {rank for rank, (_, heard) in numbers.items() if now - heard >= SILENT_S}
            settled = all(beat.state != "at work" or rank in silent for rank, beat in beats.items())
            if settled or now - began >= GRACE_S:
                return beats, silent
            time.sleep(EVERY_S / 2)

    def _beat(self) -> None:
        while True:
            time.sleep(PAUSE_S)
            self._news.wait(EVERY_S - PAUSE_S)
            self._news.clear()
            if self._over:
                return
            if self._own_beat.state == "at work":
                self._own_beat.place = _place(_frames_from(sys._current_frames().get(self._main)))
            try:
                self._write()
                self._first = self._read([0])[0]
            except RuntimeError:
                return  # the store is gone with the rank that held it; the next collective fails

    def _try_to_write(self) -> None:
        try:
            self._write()
        except RuntimeError:
            return  # the store is gone with the rank that held it

    def _write(self) -> None:
        with self._lock:
            self._own_beat.number += 1
            self._own_beat.since = time.monotonic() - self._entered
            self._store.set(_key(self._rank), json.dumps(asdict(self._own_beat)))

    def _read(self, ranks: Sequence[int]) -> dict[int, Beat]:
        with self._lock:
            texts = self._store.multi_get([_key(rank) for rank in ranks])
        return {rank: Beat(**json.loads(text)) for rank, text in zip(ranks, texts, strict=True)}


def meet(store: Store, rank: int, size: int, patience: timedelta) -> None:
    """Wait until all ranks have started, for at most ``patience``, whatever the time-out of collectives is.

    Raises:
        LostRankError: when a rank has not started; names all of these.
    """
    store.set(_started(rank), "")
    try:
        store.wait([_started(other) for other in range(size)], patience)
    except RuntimeError:
        absent = [str(other) for other in range(size) if not store.check([_started(other)])]
        text = f"rank {', '.join(absent)} did not start within {patience.total_seconds():g} s of rank {rank}"
        raise LostRankError(text, rank) from None


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _started(rank: int) -> str:
    return f"started/{rank}"


def _is_of_a_collective(error: BaseException | None) -> bool:
    # Gloo has no exception of its own; what it raises names its source file.
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower()):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).partition("\n")[0].strip()


type Frames = Iterable[tuple[str, int, str]]
"""File, line and function, the innermost first."""


def _frames_from(frame: FrameType | None) -> Frames:
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back


def _frames_of(error: BaseException) -> Frames:
    while error.__cause__ is not None:
        error = error.__cause__
    frames = [(f.f_code.co_filename, line, f.f_code.co_name) for f, line in traceback.walk_tb(error.__traceback__)]
    return reversed(frames)


def _place(frames: Frames) -> str:
    """``all_reduce from tools/pretrain/parallel.py:304 in _sum``: the call, and the line of ours it comes from."""
    call = ""
    for file, line, function in frames:
        path = Path(file)
        if path.is_relative_to(_ROOT) and "site-packages" not in path.parts:
            where = f"{path.relative_to(_ROOT)}:{line} in {function}"
            return f"{call} from {where}" if call else where
        if path.name == "distributed_c10d.py":
            call = function
    return call
