"""Reading without executing: DCP's own reader unpickles its metadata file, and would call whatever that names."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from .ranks import CheckpointError

_METADATA = "torch.distributed.checkpoint.metadata"
_KNOWN = {
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),  # from Python 3.13 on
    ("pathlib._local", "WindowsPath"),
}


class SafeReader(FileSystemReader):
    """Reads a DCP directory whose metadata may name the classes of DCP and nothing else; tensors are read weights-only.

    Reads the metadata once.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """As in DCP.

        Raises:
            CheckpointError: when the file is damaged, or names anything else.
        """
        if self._metadata is None:
            path = Path(self.path) / ".metadata"
            try:
                with path.open("rb") as file:
                    found = _Unpickler(file).load()
            except CheckpointError:
                raise
            except Exception as error:  # a damaged pickle can raise anything
                raise CheckpointError(
                    f"{path} cannot be read ({type(error).__name__}: {error}); load an older step."
                ) from None
            if not isinstance(found, Metadata):
                raise CheckpointError(f"{path} is not the metadata of a checkpoint; load an older step.")
            self._metadata = found
        return self._metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _KNOWN or is_dtype:
            return super().find_class(module, name)
        raise CheckpointError(
            f"the checkpoint's metadata names {module}.{name}, which no checkpoint needs: reading it could execute code. "
            f"Refused; load only checkpoints that you trust."
        )
