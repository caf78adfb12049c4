"""Saving while training goes on."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from .boxes import Boxes
from .together import Group, distributed


class Background:
    """A thread that writes one checkpoint at a time, from copies in memory of the host.

    All ranks of the default process group make one, and give it to every ``save``. The copies take as much memory as weights
    and state of this rank, and are kept for the next save. Where there are process groups, it makes a gloo group of its own, so
    that its collectives do not mix with those of training.
    """

    def __init__(self) -> None:
        self.group: Group = dist.new_group(backend="gloo") if distributed() else None
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._path: Path | None = None
        self._failure: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> Path | None:
        """Wait until the last save is complete on all ranks; its folder, None when there is none that was not waited for.

        To be called by all ranks, before the process groups are destroyed too.

        Raises:
            CheckpointError: on all ranks, when the save has failed.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return self._path

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of this rank's shards, in memory of the host; nothing may be under way."""
        copies = {}
        for key, x in tensors.items():
            source = x.shard if isinstance(x, Boxes) else x
            kept = self._copies.get(key)
            if kept is None or kept.shape != source.shape or kept.dtype != source.dtype:
                kept = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            copies[key] = kept.copy_(source, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self._copies = dict(copies)
        return {
            key: Boxes(copies[key], x.layout_of_shard) if isinstance(x, Boxes) else copies[key]
            for key, x in tensors.items()
        }

    def start(self, write: Callable[[], Path]) -> None:
        """Let the thread do ``write``; nothing may be under way."""
        assert self._thread is None

        def run() -> None:
            try:
                self._path = write()
            except BaseException as failure:  # told by wait(), on the thread that trains
                self._failure = failure

        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()
