"""Writes a checkpoint from one process, a tensor at a time, in the form that several ranks write."""

import io
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from math import prod
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from core.checkpoint import CheckpointError, directory, latest_step
from core.checkpoint.manifest import Manifest
from core.checkpoint.saving import COMMON

from ..usage import UsageError

SMALLEST_BOX = 1 << 16
"""Smallest piece of a tensor, in bytes, that gets a box of its own."""


class Writer:
    """A new checkpoint in ``path``, visible when it is complete; a context manager that removes what failed.

    DCP's own writer keeps all tensors of a file in memory until the file is complete; this one keeps none.

    Args:
        path: Directory of the checkpoints; made if it does not exist.
        step: Number of finished steps.
        files: Number of files with tensors; as many ranks can read them in parallel.

    Raises:
        UsageError: ``path`` holds a checkpoint of ``step`` or of a later step.
        CheckpointError: ``path`` cannot be written, or another job saves there.
    """

    def __init__(self, path: str, step: int, files: int = 1) -> None:
        parent = Path(path)
        if (parent / directory.folder_of(step)).exists():
            raise UsageError("DST", path, f"holds a checkpoint of step {step} already", hint="give another directory")
        if step < (newest := latest_step(parent) or 0):
            problem = f"holds step {newest}; step {step} would become the newest"
            raise UsageError("DST", path, problem, hint="give another directory")
        self.staging = directory.begin(parent, step)
        self._open = ExitStack()
        self._files: list[IO[bytes]] = []
        self._saved: dict[str, STORAGE_TYPES] = {}
        self._written: list[WriteResult] = []
        self._count = files

    def __enter__(self) -> Self:
        self._files = [
            self._open.enter_context((self.staging / f"__{i}_0.distcp").open("wb")) for i in range(self._count)
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            return
        with suppress(OSError):  # closing flushes, which fails where the write did
            self._open.close()
        shutil.rmtree(self.staging, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(
                f"cannot write to {self.staging.parent}: {directory.why(error)}. Earlier checkpoints are as they were."
            ) from None

    def add(self, key: str, whole: Tensor) -> None:
        """Write a tensor, cut along its largest dim over all files; a small one goes into the smallest file."""
        if key in self._saved:
            raise CheckpointError(f"{key} comes twice: two names of the source become this one.")
        chunks, whole = [], whole.detach()
        for offsets, box, file in self._cut(whole):
            chunks.append(ChunkStorageMetadata(offsets, box.size()))
            # torch.save of a view writes all of the memory behind it.
            copy = box.clone(memory_format=torch.contiguous_format)
            self._put(MetadataIndex(key, offsets), file, partial(torch.save, copy))
        self._saved[key] = TensorStorageMetadata(TensorProperties.create_from_tensor(whole), whole.size(), chunks)

    def add_raw(self, name: str, raw: bytes) -> None:
        """Write an object in the bytes in which another checkpoint stores it."""
        self._put(MetadataIndex(name), 0, lambda stream: stream.write(raw))
        self._saved[name] = BytesStorageMetadata()

    def add_file(self, name: str, raw: bytes) -> None:
        """Write ``raw`` to a file of its own."""
        with (self.staging / name).open("wb") as file:
            file.write(raw)
            os.fsync(file.fileno())

    def add_common(self, common: Mapping[str, Any]) -> None:
        """Write what Megatron-Core keeps besides tensors."""
        raw = io.BytesIO()
        torch.save([dict(common)], raw)
        self.add_raw(COMMON, raw.getvalue())

    def commit(self, manifest: Manifest) -> Path:
        """Make this the newest checkpoint; returns its folder."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        self._open.close()
        FileSystemWriter(self.staging).finish(Metadata(self._saved), [self._written])
        return directory.commit(self.staging, manifest, {})

    def _put(self, index: MetadataIndex, file: int, write: Callable[[IO[bytes]], Any]) -> None:
        stream = self._files[file]
        start = stream.tell()
        write(stream)
        length = stream.tell() - start
        self._written.append(WriteResult(index, length, _StorageInfo(Path(stream.name).name, start, length)))

    def _cut(self, whole: Tensor) -> list[tuple[torch.Size, Tensor, int]]:
        """Offsets, contents and file number of each box."""
        count, size = len(self._files), max(whole.shape, default=0)
        if count == 1 or size < count or prod(whole.shape) * whole.itemsize < count * SMALLEST_BOX:
            smallest = min(range(count), key=lambda i: self._files[i].tell())
            return [(torch.Size([0] * whole.ndim), whole, smallest)]
        dim, boxes, at = whole.shape.index(size), [], 0
        for file, box in enumerate(whole.tensor_split(count, dim)):
            boxes.append((torch.Size([at if d == dim else 0 for d in range(whole.ndim)]), box, file))
            at += box.shape[dim]
        return boxes
