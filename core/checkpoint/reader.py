"""A reader that executes no code from a checkpoint; DCP's own unpickles the metadata file and calls whatever that names."""

import pickle
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan

from .together import CheckpointError

_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_KNOWN = {
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    # Megatron-Core keeps the plans of all ranks there.
    (_PLANNER, "SavePlan"),
    (_PLANNER, "TensorWriteData"),
    (_PLANNER, "WriteItem"),
    (_PLANNER, "WriteItemType"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),  # from Python 3.13 on
    ("pathlib._local", "WindowsPath"),
}
_STAND_INS: dict[tuple[str, str], type] = {
    (_MEGATRON, "MCoreMetadata"): Metadata,
    (_MEGATRON, "MCoreSavePlan"): SavePlan,
}
"""Subclasses in older versions of Megatron-Core, which may not be installed → the class that they extend."""


class SafeReader(FileSystemReader):
    """A reader of DCP directories whose metadata may name no classes but DCP's; tensors are read weights-only.

    The metadata is read once.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata, as DCP's method of this name returns it.

        Raises:
            CheckpointError: when the file is damaged, or names classes that no checkpoint needs.
        """
        if self._metadata is None:
            path = Path(self.path) / ".metadata"
            try:
                with path.open("rb") as file:
                    metadata = _Unpickler(file).load()
                sound = isinstance(metadata, Metadata) and _is_sound(metadata)
            except CheckpointError:
                raise
            except Exception as error:  # a damaged pickle can raise anything
                raise CheckpointError(
                    f"{path} cannot be read ({type(error).__name__}: {error}); load an older step."
                ) from None
            if not sound:
                raise CheckpointError(f"{path} is not the metadata of a checkpoint; load an older step.")
            self._metadata = metadata
        return self._metadata

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Key → metadata of each tensor."""
        saved = self.read_metadata().state_dict_metadata
        return {key: x for key, x in saved.items() if isinstance(x, TensorStorageMetadata)}

    def objects(self) -> list[str]:
        """Keys of entries that are no tensors; this package loads none of them."""
        return [
            key for key, x in self.read_metadata().state_dict_metadata.items() if isinstance(x, BytesStorageMetadata)
        ]

    def whole(self, key: str) -> Tensor:
        """One whole tensor, read box by box; takes the memory of the tensor and of one box.

        Raises:
            CheckpointError: when the files do not hold what the metadata says, or something that could execute code.
        """
        saved = self.tensors()[key]
        try:
            whole = torch.empty(saved.size, dtype=saved.properties.dtype, device="cpu")
            for chunk in saved.chunks:
                box = self._load(MetadataIndex(key, chunk.offsets))
                if not isinstance(box, Tensor) or box.size() != chunk.sizes or box.dtype != whole.dtype:
                    raise ValueError(f"{type(box).__name__} instead of {whole.dtype} {tuple(chunk.sizes)}")
                view = whole
                for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                    view = view.narrow(dim, offset, size)
                view.copy_(box)
        except Exception as error:  # a damaged file can raise anything
            raise self._damaged(key, error) from None
        return whole

    def raw(self, key: str) -> bytes:
        """The stored bytes of one object, a file of ``torch.save``, which is not unpickled.

        Raises:
            CheckpointError: when it cannot be read.
        """
        info = self.read_metadata().storage_data[MetadataIndex(key)]
        try:
            with (Path(self.path) / info.relative_path).open("rb") as file:
                file.seek(info.offset)
                raw: bytes = file.read(info.length)
                return raw
        except OSError as error:
            raise self._damaged(key, error) from None

    def _load(self, index: MetadataIndex) -> Any:
        info = self.read_metadata().storage_data[index]
        with (Path(self.path) / info.relative_path).open("rb") as file:
            return torch.load(self._slice_file(file, info), map_location="cpu", weights_only=True)

    def _damaged(self, key: str, error: Exception) -> CheckpointError:
        why = (str(error).splitlines() or [""])[0][:200]
        return CheckpointError(
            f"{self.path}: {key} cannot be read ({type(error).__name__}: {why}); its files are damaged, or not what a save "
            f"writes."
        )


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _STAND_INS:
            return _STAND_INS[module, name]
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _KNOWN or is_dtype:
            return super().find_class(module, name)
        raise CheckpointError(
            f"the checkpoint's metadata names {module}.{name}, which no checkpoint needs: reading it could execute code. "
            f"Refused; load only checkpoints that you trust."
        )


def _is_sound(metadata: Metadata) -> bool:
    """Whether boxes within each tensor have as many entries as it, and all data lies in files of the checkpoint's folder."""
    storage, saved = metadata.storage_data, metadata.state_dict_metadata
    if not all(_is_place(info) for info in storage.values()):
        return False
    for key, x in saved.items():
        if type(x) is BytesStorageMetadata:
            if MetadataIndex(key) not in storage:
                return False
        elif type(x) is not TensorStorageMetadata or not _is_tensor(key, x, storage):
            return False
    return all(isinstance(key, str) for key in saved)


def _is_place(info: Any) -> bool:
    name = info.relative_path
    return (
        type(info) is _StorageInfo
        and isinstance(name, str)
        and name not in ("", ".", "..")
        and not set(name) & set("/\\\0")
        and not info.transform_descriptors  # extensions would need classes of their own
        and min(info.offset, info.length) >= 0
    )


def _is_tensor(key: str, x: TensorStorageMetadata, storage: dict[MetadataIndex, _StorageInfo]) -> bool:
    boxes = [(chunk.offsets, chunk.sizes, storage[MetadataIndex(key, chunk.offsets)].length) for chunk in x.chunks]
    itemsize = x.properties.dtype.itemsize
    return (
        type(x.size) is torch.Size
        and all(type(chunk) is ChunkStorageMetadata for chunk in x.chunks)
        and all(
            offset >= 0 and size >= 0 and offset + size <= whole
            for offsets, sizes, _ in boxes
            for offset, size, whole in zip(offsets, sizes, x.size, strict=True)
        )
        and all(prod(sizes) * itemsize <= length for _, sizes, length in boxes)
        and sum(prod(sizes) for _, sizes, _ in boxes) == prod(x.size)
    )
