"""The folders of checkpoints on disk: a new one becomes visible complete, or not at all.

One rank calls these functions; they communicate with no other rank.
"""

import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from . import digests, lock
from .manifest import NAME as MANIFEST
from .manifest import Manifest
from .together import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
"""Holds the step of the newest complete checkpoint; Megatron's name."""
MEGATRON = "metadata.json"
"""File by which Megatron-Core recognizes a checkpoint that it can read."""
_MEGATRON_TEXT = json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
_STAGING, _REPLACED = ".tmp_", ".old_"
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS, errno.EISDIR, errno.EACCES}
"""Errors of file systems that cannot make a directory durable, or do not let a process open one."""
_warned: set[Path] = set()
"""Directories for which the warning was given already."""


def folder_of(step: int) -> str:
    """Name of a checkpoint's folder, which is Megatron's name too."""
    return f"iter_{step:07d}"


def begin(directory: Path, step: int) -> Path:
    """Make a staging folder beside the checkpoints, to write a new one into; removes what interrupted saves left.

    Raises:
        CheckpointError: when ``directory`` cannot be written, or another job saves there.
    """
    staging = directory / f"{_STAGING}{folder_of(step)}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.hold(directory)
    except (FileExistsError, NotADirectoryError):
        raise CheckpointError(f"cannot save to {directory}: that is a file, or below one; give a directory.") from None
    except OSError as error:
        raise CheckpointError(
            f"cannot save to {directory}: {why(error)}; give a directory that can be written."
        ) from None
    _tidy(directory)
    try:
        staging.mkdir()
    except FileExistsError:
        raise CheckpointError(
            f"cannot save to {directory}: {staging.name}, which an interrupted save left there, cannot be removed; remove it."
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"cannot save to {directory}: {why(error)}; give a directory that can be written."
        ) from None
    return staging


def commit(staging: Path, manifest: Manifest, written: Mapping[str, str], keep: int | None = None) -> Path:
    """Make the complete checkpoint in ``staging`` the newest one.

    A crash before the first rename leaves the checkpoints as they were; a crash after it leaves this one complete.

    Args:
        staging: Folder from :func:`begin`.
        manifest: Manifest to write, without the sizes of the files, which are added here.
        written: Name → SHA-256 of the files that all ranks wrote.
        keep: Number of checkpoints to keep, including this one; older ones are removed. None keeps all.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: when a file that another rank wrote is not in ``staging``.
        OSError: when a file cannot be written.
    """
    _write(staging / MEGATRON, _MEGATRON_TEXT)
    sizes = {file.name: file.stat().st_size for file in sorted(staging.iterdir())}
    if lost := sorted(set(written) - set(sizes)):
        raise CheckpointError(
            f"{', '.join(lost)}, written by another rank, cannot be seen in {staging.parent}; it must be one file system "
            f"that all ranks share."
        )
    _write(staging / MANIFEST, replace(manifest, files=sizes).text())
    added = digests.digests(staging, {MANIFEST, *sizes} - set(written))
    _write(staging / digests.NAME, digests.text({**written, **added}))
    _sync(staging)
    directory, name = staging.parent, folder_of(manifest.step)
    final, replaced = directory / name, directory / f"{_REPLACED}{name}"
    if final.exists():
        final.rename(replaced)
    staging.rename(final)
    _sync(directory)
    tracker = directory / f"{_STAGING}{TRACKER}"
    _write(tracker, f"{manifest.step}")
    tracker.replace(directory / TRACKER)
    _sync(directory)
    _discard_or_warn(replaced)
    if keep is not None:
        _prune(directory, manifest.step, keep)
    return final


def discard(path: Path) -> None:
    """Remove a folder or a file, if it exists; of a symbolic link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def why(error: OSError) -> str:
    """The reason of ``error``, which not every one carries as ``strerror``."""
    return error.strerror or str(error) or type(error).__name__


def latest_step(directory: str | Path) -> int | None:
    """Step of the newest checkpoint in ``directory``; None where no checkpoint was saved."""
    tracked = _tracked(Path(directory))
    return tracked if isinstance(tracked, int) else max(_steps(Path(directory)), default=None)


def candidates(directory: Path, step: int | None) -> tuple[list[Path], list[str]]:
    """Folders of checkpoints to load, best first, and what is wrong with the directory, a sentence each.

    Args:
        directory: Directory of the checkpoints, as in :func:`begin`.
        step: Step of the only checkpoint to load; None for the newest, followed by older ones in case it is damaged.

    Raises:
        CheckpointError: when there is no such checkpoint.
    """
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise CheckpointError(f"cannot load from {directory}: it {what}; give the directory that --save wrote to.")
    steps = _steps(directory)
    if step is not None:
        if step not in steps:
            raise CheckpointError(f"no checkpoint of step {step} in {directory}{_among(steps)}.")
        return [_folder(directory, step)], []
    if not steps:
        if (directory / MANIFEST).exists():
            raise CheckpointError(
                f"{directory} is one checkpoint of several; give the directory above it, {directory.parent}."
            )
        raise CheckpointError(f"no checkpoint in {directory}: no save was ever completed there.")
    tracked, problems = _tracked(directory), []
    if isinstance(tracked, str):
        problems.append(f"{directory / TRACKER} {tracked}.")
        tracked = max(steps)
    elif tracked not in steps:
        problems.append(f"{directory / TRACKER} names step {tracked}, which is not there.")
    # Newer ones belong to an abandoned run. They are taken only when there are no others.
    chosen = [s for s in steps if s <= tracked] or steps
    return [_folder(directory, s) for s in sorted(chosen, reverse=True)], problems


def inspect(folder: Path) -> tuple[Manifest, dict[str, str]]:
    """A checkpoint's manifest, and the recorded digests of its files; checks the sizes of all files.

    Raises:
        NewerFormatError: when a newer version of this package wrote the checkpoint.
        CheckpointError: when the checkpoint is damaged, or another package wrote it.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise CheckpointError(f"{folder} has no {MANIFEST}: it was not written by this package, or is damaged.")
    try:
        written = digests.parse((folder / digests.NAME).read_text(errors="replace"))
        if digests.wrong(folder, written, [MANIFEST]):
            raise CheckpointError(f"{path} is not what {digests.NAME} says.")
        manifest = Manifest.parse(path.read_text(), str(path))
    except (ValueError, KeyError, OSError) as error:
        reason = why(error) if isinstance(error, OSError) else error
        raise CheckpointError(f"{folder / digests.NAME} is damaged: {reason}.") from None
    if set(written) != {MANIFEST, *manifest.files}:
        raise CheckpointError(f"{folder / digests.NAME} and {MANIFEST} name different files.")
    for name, size in manifest.files.items():
        actual = (folder / name).stat().st_size if (folder / name).exists() else None
        if actual != size:
            state = "is missing" if actual is None else f"has {actual} bytes"
            raise CheckpointError(f"{folder / name} {state}; {size} bytes were written.")
    if folder.name.removeprefix(_REPLACED) != folder_of(manifest.step):
        raise CheckpointError(f"{folder} holds step {manifest.step}: folders were swapped or renamed.")
    return manifest, written


def _steps(directory: Path) -> list[int]:
    """Steps of all checkpoints, rising. Includes one that a save of the same step had renamed away when it crashed."""
    names = {f.name.removeprefix(_REPLACED) for f in directory.glob("*iter_*") if not f.name.startswith(_STAGING)}
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"iter_\d{7,18}", name))


def _folder(directory: Path, step: int) -> Path:
    names = (folder_of(step), f"{_REPLACED}{folder_of(step)}")
    return next(directory / name for name in names if (directory / name).exists())


def _tracked(directory: Path) -> int | str:
    """The step that the tracker names, or what is wrong with it."""
    try:
        text = (directory / TRACKER).read_text(errors="replace").strip()
    except OSError as error:
        return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({why(error)})"
    return (
        int(text) if re.fullmatch(r"\d{1,18}", text) else f"should hold the number of a step, but holds {text[:40]!r}"
    )


def _tidy(directory: Path) -> None:
    """Remove what interrupted saves left, and restore a checkpoint that one of them had renamed away."""
    for path in directory.glob(f"{_STAGING}*"):
        _discard_or_warn(path)
    for path in directory.glob(f"{_REPLACED}*"):
        final = directory / path.name.removeprefix(_REPLACED)
        if final.exists():
            _discard_or_warn(path)
        else:
            path.rename(final)


def _prune(directory: Path, step: int, keep: int) -> None:
    """Remove all but the ``keep`` newest checkpoints up to ``step``; renamed first, so that no partial one is ever visible."""
    older = [s for s in _steps(directory) if s <= step][:-keep]
    for path in (directory / folder_of(s) for s in older):
        hidden = directory / f"{_STAGING}{path.name}"
        try:
            path.rename(hidden)
        except OSError as error:
            _warn_left(path, error)
        else:
            _discard_or_warn(hidden)


def _discard_or_warn(path: Path) -> None:
    """Remove what is no longer needed; where that fails, the run goes on, because what it needs is there."""
    try:
        discard(path)
    except OSError as error:
        _warn_left(path, error)


def _warn_left(path: Path, error: OSError) -> None:
    warnings.warn(f"{path} cannot be removed and takes up space: {why(error)}. Remove it yourself.", stacklevel=2)


def _among(steps: list[int]) -> str:
    return f"; there are steps {', '.join(map(str, steps))}" if steps else ""


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the names in ``folder`` durable, where its file system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
        if not {folder, folder.parent} & _warned:
            _warned.update({folder, folder.parent})
            warnings.warn(
                f"the file system of {folder} cannot make the names of files durable ({why(error)}): a checkpoint may be lost "
                f"if the machine that keeps the files loses power within seconds of the save.",
                stacklevel=2,
            )
