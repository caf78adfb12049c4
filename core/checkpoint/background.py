"""Saving while training goes on."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from .boxes import Boxes
from .together import GroupOrDefault, distributed


class Background:
    """A thread that writes one checkpoint at a time, from copies in memory of the host.

    All ranks of the default process group make one, and pass it to every ``save``. The copies take as much memory as this rank's
    weights and state, and their memory is kept for the next save. Where torch.distributed is initialized, it makes a gloo group
    of its own, so that its collectives do not mix with those of training.
    """

    def __init__(self) -> None:
        self.group: GroupOrDefault = dist.new_group(backend="gloo") if distributed() else None
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._path: Path | None = None
        self._failure: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> Path | None:
        """Wait until the last save is complete on all ranks.

        All ranks call it; the last time before the process groups are destroyed.

        Returns:
            The checkpoint's folder; None when no save was started since the last call.

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
        """Copies of this rank's shards in host memory, by key; no save may be under way.

        The memory of the last call's copies is overwritten.
        """
        copies = {}
        for key, x in tensors.items():
            source = x.shard if isinstance(x, Boxes) else x
            copy = self._copies.get(key)
            if copy is None or copy.shape != source.shape or copy.dtype != source.dtype:
                copy = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=source.is_cuda)
            copies[key] = copy.copy_(source, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self._copies = dict(copies)
        return {
            key: Boxes(copies[key], x.layout_of_shard) if isinstance(x, Boxes) else copies[key]
            for key, x in tensors.items()
        }

    def start(self, write: Callable[[], Path]) -> None:
        """Run ``write`` on the thread; no save may be under way."""
        assert self._thread is None

        def run() -> None:
            try:
                self._path = write()
            except BaseException as failure:  # wait() raises it, on the thread that trains
                self._failure = failure

        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()
