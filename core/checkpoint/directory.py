"""Where checkpoints lie, and how one comes into sight: whole or not at all. Files only; one rank calls this."""

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from . import manifest as manifests
from .manifest import Manifest
from .ranks import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
"""Holds the step of the newest complete checkpoint; Megatron's name."""


def folder_of(step: int) -> str:
    """Name of a checkpoint's folder; Megatron's."""
    return f"iter_{step:07d}"


def begin(directory: Path, step: int) -> Path:
    """A new folder beside the others to write a checkpoint into.

    Raises:
        CheckpointError: when nothing can be written there.
    """
    staging = directory / f".tmp_{folder_of(step)}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        discard(staging)
        staging.mkdir()
    except (FileExistsError, NotADirectoryError):
        raise CheckpointError(f"cannot save to {directory}: that is a file, or below one; give a directory.") from None
    except OSError as error:
        raise CheckpointError(
            f"cannot save to {directory}: {error.strerror}; give a directory that can be written."
        ) from None
    return staging


def commit(staging: Path, manifest: Manifest, written: Iterable[str]) -> Path:
    """Make the complete checkpoint in ``staging`` the newest one.

    A crash before the first rename leaves the checkpoints as they were; one after it leaves this one complete.

    Args:
        staging: From :func:`begin`.
        manifest: Written with the sizes of the files.
        written: Names of the files that all ranks wrote.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: when a file that another rank wrote is not there.
    """
    sizes = {file.name: file.stat().st_size for file in sorted(staging.iterdir())}
    if lost := sorted(set(written) - set(sizes)):
        raise CheckpointError(
            f"{', '.join(lost)}, written by another rank, cannot be seen in {staging.parent}; it must be one file system "
            f"that all ranks share."
        )
    _write(staging / manifests.NAME, replace(manifest, files=sizes).text())
    _sync(staging)
    directory, name = staging.parent, folder_of(manifest.step)
    final, replaced = directory / name, directory / f".old_{name}"
    if final.exists():
        discard(replaced)
        final.rename(replaced)
    staging.rename(final)
    _sync(directory)
    tracker = directory / f".tmp_{TRACKER}"
    _write(tracker, f"{manifest.step}")
    tracker.replace(directory / TRACKER)
    _sync(directory)
    discard(replaced)
    return final


def discard(folder: Path) -> None:
    """Remove a folder that may be there."""
    if folder.exists():
        shutil.rmtree(folder)


def latest_step(directory: str | Path) -> int | None:
    """Step of the newest complete checkpoint in ``directory``; None where nothing was ever saved.

    Raises:
        CheckpointError: when the file that says so is damaged.
    """
    tracker = Path(directory) / TRACKER
    try:
        text = tracker.read_text(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not re.fullmatch(r"\d{1,18}", text):
        raise CheckpointError(
            f"{tracker} should hold the number of a step, but holds {text[:40]!r}; write the step of the folder "
            f"iter_… to load into it{_among(Path(directory))}."
        )
    return int(text)


def open_checkpoint(directory: Path, step: int | None) -> tuple[Path, Manifest]:
    """The folder of a complete checkpoint, and its manifest.

    Args:
        directory: What :func:`begin` was given.
        step: None for the newest.

    Raises:
        CheckpointError: when there is none, or its manifest or the sizes of its files are not what was written.
    """
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise CheckpointError(f"cannot load from {directory}: it {what}; give the directory that --save wrote to.")
    if step is None:
        step = latest_step(directory)
    if step is None:
        if (directory / manifests.NAME).exists():
            raise CheckpointError(
                f"{directory} is one checkpoint of several; give the directory above it, {directory.parent}."
            )
        raise CheckpointError(f"no checkpoint in {directory}: there is no {TRACKER}, so no save was ever completed.")
    # The second is the first, when a crash fell between the two renames of a step that was saved again.
    folder = next((f for f in (directory / folder_of(step), directory / f".old_{folder_of(step)}") if f.exists()), None)
    if folder is None:
        raise CheckpointError(f"no checkpoint of step {step} in {directory}{_among(directory)}.")
    path = folder / manifests.NAME
    if not path.exists():
        raise CheckpointError(f"{folder} has no {manifests.NAME}: it was not written by this package, or is damaged.")
    manifest = Manifest.parse(path.read_text(errors="replace"), str(path))
    for name, size in manifest.files.items():
        found = (folder / name).stat().st_size if (folder / name).exists() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(
                f"{folder / name} {state}; {size} bytes were written. The checkpoint is damaged; load an older step."
            )
    return folder, manifest


def _among(directory: Path) -> str:
    steps = sorted(int(f.name[5:]) for f in directory.glob("iter_*") if f.name[5:].isdecimal())
    return f"; there are steps {', '.join(map(str, steps))}" if steps else ""


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
