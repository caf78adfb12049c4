"""Opens a checkpoint without executing anything in it; what could be executed is refused."""

import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.checkpoint import CheckpointError, digests, directory, manifest
from core.checkpoint.manifest import Manifest
from core.checkpoint.reader import SafeReader

from ..usage import UsageError

LEGACY = "common.pt"
"""File in which older Megatron-Core kept what is not a tensor; if a newer entry exists too, it reads this file."""
_MEGATRON_CLASSES = (
    *("megatron.core.enums.ModelType", "megatron.core.optimizer.optimizer_config.OptimizerConfig"),
    *(f"megatron.core.rerun_state_machine.Rerun{name}" for name in ("Diagnostic", "Mode", "State")),
    *(f"megatron.core.transformer.enums.{name}" for name in ("AttnBackend", "CudaGraphModule", "CudaGraphScope")),
    "megatron.core.transformer.enums.InferenceCudaGraphScope",
    *("argparse.Namespace", "types.SimpleNamespace", "pathlib.PosixPath", "signal.Signals", "_io.BytesIO"),
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype"),
    *("numpy.dtypes.UInt32DType", "torch._C.Generator"),
)
"""Classes that Megatron-Core's own objects may name. None of them is imported: each object becomes a :class:`Record`."""


class Record:
    """A stand-in for an object of another package, with its constructor's arguments and its attributes."""

    def __init__(self, *made_from: Any) -> None:
        self.made_from = made_from

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


@dataclass(frozen=True)
class Source:
    """A checkpoint whose sizes are right and whose metadata is harmless; its contents are not verified.

    Attributes:
        folder: Folder of the checkpoint.
        manifest: Manifest of the checkpoint.
        digests: Name → SHA-256 of each file, as they were written.
        reader: Reader of the tensors.
    """

    folder: Path
    manifest: Manifest
    digests: dict[str, str]
    reader: SafeReader

    def verify(self) -> list[str]:
        """Names of the files whose contents are not what was written."""
        return digests.wrong(self.folder, self.digests, sorted(self.manifest.files))

    def verified(self) -> "Source":
        """This source, after a check of all files.

        Raises:
            CheckpointError: A file is not what was written; a copy of it would look undamaged.
        """
        if wrong := self.verify():
            raise CheckpointError(
                f"{self.folder}: the contents of {', '.join(wrong)} are not what was written (SHA-256)."
            )
        return self


def open_source(path: str, step: int | None = None) -> Source:
    """Open the newest checkpoint in ``path``, or the one of ``step``, or ``path`` itself if it is a checkpoint.

    Raises:
        UsageError: ``path`` is not a directory.
        CheckpointError: The checkpoint is damaged, or holds something that could execute code.
    """
    folder = find(path, step)[0]
    written_manifest, recorded = directory.inspect(folder)
    return Source(folder, written_manifest, recorded, safe_reader(folder))


def find(path: str, step: int | None = None) -> list[Path]:
    """Folders of the checkpoints in ``path``, newest first.

    Raises:
        UsageError: ``path`` is not a directory.
        CheckpointError: There is no checkpoint.
    """
    root = Path(path).resolve()
    if not root.is_dir():
        problem = "is a file" if root.exists() else "does not exist"
        raise UsageError("DIR", path, problem, possible="what --save wrote to, or one iter_… folder in it")
    single = re.fullmatch(r"(?:\.old_)?iter_(\d+)", root.name)
    if single or (root / manifest.NAME).exists() or (root / ".metadata").exists():
        if step is not None and not (single and int(single[1]) == step):
            raise UsageError("--step", step, f"{root.name} is one checkpoint", hint="give the directory above it")
        return [root]
    folders, problems = directory.candidates(root, step)
    for problem in problems:
        print(f"ckpt: warning: {problem}", file=sys.stderr)
    return folders


def safe_reader(folder: Path) -> SafeReader:
    """A reader of ``folder``, after a check that all of its objects are harmless.

    Raises:
        CheckpointError: An object names something that could execute code.
    """
    reader = SafeReader(folder)
    for key in reader.objects():
        harmless(reader.raw(key), f"{folder}: {key}")
    if (folder / LEGACY).is_file():
        harmless(folder / LEGACY, f"{folder / LEGACY}")
    return reader


def harmless(raw: bytes | Path, where: str) -> Any:
    """Read what ``torch.save`` wrote, weights-only; objects of Megatron-Core are returned as :class:`Record`.

    Raises:
        CheckpointError: The data names something that could execute code, or is damaged.
    """
    try:
        with torch.serialization.safe_globals([(Record, name) for name in _MEGATRON_CLASSES]):
            return torch.load(io.BytesIO(raw) if isinstance(raw, bytes) else raw, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it names {named[1]}, which could execute code" if named else f"{type(error).__name__}: it is damaged"
        raise CheckpointError(f"{where} is refused: {what}; load only checkpoints that you trust.") from None


def count(value: Any, what: str) -> int:
    """``value`` as a number of steps or samples.

    Raises:
        CheckpointError: ``value`` is not a whole number from 0 to 10¹⁸.
    """
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = -1
    if not 0 <= number < 10**18:
        raise CheckpointError(f"{what} is {str(value)[:40]!r}; a whole number is needed.")
    return number
