"""Opening a checkpoint for the tools: nothing in it is executed, and what could be is refused."""

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
"""Where Megatron-Core kept what is no tensor before it had an entry; where both are, it reads this one."""
_MEGATRONS = (
    *("megatron.core.enums.ModelType", "megatron.core.optimizer.optimizer_config.OptimizerConfig"),
    *(f"megatron.core.rerun_state_machine.Rerun{name}" for name in ("Diagnostic", "Mode", "State")),
    *(f"megatron.core.transformer.enums.{name}" for name in ("AttnBackend", "CudaGraphModule", "CudaGraphScope")),
    "megatron.core.transformer.enums.InferenceCudaGraphScope",
    *("argparse.Namespace", "types.SimpleNamespace", "pathlib.PosixPath", "signal.Signals", "_io.BytesIO"),
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype"),
    *("numpy.dtypes.UInt32DType", "torch._C.Generator"),
)
"""What Megatron-Core's own objects may name. None of it is imported: each becomes a :class:`Record`."""


class Record:
    """Stands for an object of another package: what it was made from, and its attributes."""

    def __init__(self, *made_from: Any) -> None:
        self.made_from = made_from

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


@dataclass(frozen=True)
class Source:
    """A checkpoint whose sizes are right and whose metadata is harmless; its contents are not verified.

    Attributes:
        folder: Where it lies.
        manifest: What it says of itself.
        digests: Name → SHA-256 of its files.
        reader: Of its tensors.
    """

    folder: Path
    manifest: Manifest
    digests: dict[str, str]
    reader: SafeReader

    def verify(self) -> list[str]:
        """Names of the files whose contents are not what was written."""
        return digests.wrong(self.folder, self.digests, sorted(self.manifest.files))

    def verified(self) -> "Source":
        """This one.

        Raises:
            CheckpointError: when a file is not what was written: a copy of it would look whole.
        """
        if wrong := self.verify():
            raise CheckpointError(
                f"{self.folder}: the contents of {', '.join(wrong)} are not what was written (SHA-256)."
            )
        return self


def open_source(path: str, step: int | None = None) -> Source:
    """The newest checkpoint under ``path``, or the one of ``step``, or the one that ``path`` itself is.

    Raises:
        UsageError: ``path`` is no directory.
        CheckpointError: It is damaged, or holds something that could execute code.
    """
    folder = find(path, step)[0]
    said, digests = directory.inspect(folder)
    return Source(folder, said, digests, safe_reader(folder))


def find(path: str, step: int | None = None) -> list[Path]:
    """Folders of checkpoints under ``path``, newest first.

    Raises:
        UsageError: ``path`` is no directory.
        CheckpointError: There is none.
    """
    given = Path(path).resolve()
    if not given.is_dir():
        problem = "is a file" if given.exists() else "does not exist"
        raise UsageError("DIR", path, problem, possible="what --save wrote to, or one iter_… folder in it")
    alone = re.fullmatch(r"(?:\.old_)?iter_(\d+)", given.name)
    if alone or (given / manifest.NAME).exists() or (given / ".metadata").exists():
        if step is not None and not (alone and int(alone[1]) == step):
            raise UsageError("--step", step, f"{given.name} is one checkpoint", hint="give the directory above it")
        return [given]
    found, problems = directory.candidates(given, step)
    for problem in problems:
        print(f"ckpt: warning: {problem}", file=sys.stderr)
    return found


def safe_reader(folder: Path) -> SafeReader:
    """Reads ``folder``, all of whose objects are harmless.

    Raises:
        CheckpointError: when one names something that could execute code.
    """
    reader = SafeReader(folder)
    for key in reader.objects():
        harmless(reader.raw(key), f"{folder}: {key}")
    if (folder / LEGACY).is_file():
        harmless(folder / LEGACY, f"{folder / LEGACY}")
    return reader


def harmless(raw: bytes | Path, where: str) -> Any:
    """What ``torch.save`` wrote, read weights-only; objects of Megatron-Core come back as :class:`Record`.

    Raises:
        CheckpointError: when it names something that could execute code, or is damaged.
    """
    try:
        with torch.serialization.safe_globals([(Record, name) for name in _MEGATRONS]):
            return torch.load(io.BytesIO(raw) if isinstance(raw, bytes) else raw, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it names {named[1]}, which could execute code" if named else f"{type(error).__name__}: it is damaged"
        raise CheckpointError(f"{where} is refused: {what}; load only checkpoints that you trust.") from None


def count(value: Any, what: str) -> int:
    """``value`` as a number of steps or samples, which it should be.

    Raises:
        CheckpointError: when it is not.
    """
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = -1
    if not 0 <= number < 10**18:
        raise CheckpointError(f"{what} is {str(value)[:40]!r}; a whole number is needed.")
    return number
