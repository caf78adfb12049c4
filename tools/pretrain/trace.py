"""A Chrome trace of what each rank does: open it in chrome://tracing or Perfetto, or draw it with tools.plot.timeline."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PHASES, CHUNKS = 0, 1
"""Rows of a rank ("threads"): the phases of the job; forward and backward of the pipeline's micro-batches."""


class Trace:
    """Spans of time on this rank, by the clock of its host.

    Args:
        process: Number of this rank.
        stage: Pipeline stage of this rank.
        device: Device that is synchronized at both ends of a span, so that tracing slows a GPU down.
        keep: Number of steps to keep, the last ones.
    """

    def __init__(self, process: int, stage: int, device: torch.device, keep: int = 3) -> None:
        self._process, self._stage, self._device, self._keep = process, stage, device, keep
        self._events: list[dict[str, Any]] = []
        self._phase: tuple[str, int, int] | None = None

    def at(self, phase: str, step: int) -> None:
        """Begin ``phase``, which lasts until the next call; an empty ``phase`` only ends the last one."""
        now = self._now()
        if self._phase is not None:
            name, begun, of_step = self._phase
            self._add(name, begun, now, PHASES, of_step)
            if of_step != step:
                self._events = [event for event in self._events if event["args"]["step"] > of_step - self._keep]
        self._phase = (phase, now, step) if phase else None

    def follow(self, stages: Iterable[Any]) -> None:
        """Trace forward and backward of each micro-batch of these ``PipelineStage``; replaces their methods."""
        for stage in stages:
            for direction in ("forward", "backward"):
                method = f"{direction}_one_chunk"
                setattr(stage, method, self._timed(direction, getattr(stage, method)))

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Trace the body as one span."""
        begun = self._now()
        yield
        self._add(name, begun, self._now(), CHUNKS, self._phase[2] if self._phase else 0)

    def write(self, path: Path) -> None:
        """Write the spans of all ranks to ``path``. All ranks call it, and rank 0 writes.

        Raises:
            OSError: on rank 0, when ``path`` cannot be written.
        """
        all_events: list[Any] = [self._events]
        if dist.is_initialized():
            all_events = [None] * dist.get_world_size()
            dist.all_gather_object(all_events, self._events)
        if self._process == 0:
            events = [event for events in all_events for event in events]
            path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.span(name):
                return function(*args, **kwargs)

        return run

    def _add(self, name: str, begun: int, ended: int, row: int, step: int) -> None:
        times = {"ts": begun / 1e3, "dur": (ended - begun) / 1e3}  # microseconds, says the format
        what = {"name": name, "ph": "X", "pid": self._process, "tid": row}
        self._events.append({**what, **times, "args": {"step": step, "stage": self._stage}})

    def _now(self) -> int:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.time_ns()
