"""The choice of the checkpoint to load: the newest one whose files are what was written."""

import warnings
from pathlib import Path

import torch.distributed as dist

from . import digests
from .directory import candidates, inspect
from .manifest import Manifest
from .together import CheckpointError, NewerFormatError, distributed, joined, on_first, rank, together


def choose(directory: Path, step: int | None, *, verify: bool) -> tuple[Path, Manifest, list[str]]:
    """Choose an undamaged checkpoint; all ranks call it, and each reads its share of the files to verify.

    Args:
        directory: Directory that was passed to ``save``.
        step: Step of the only checkpoint to load. None for the newest; when that is damaged, the one before it, with a warning.
        verify: Compare digests, not only sizes.

    Returns:
        Folder of the checkpoint, its manifest, and what is wrong with the newer ones, a line each.

    Raises:
        CheckpointError: on all ranks, when every candidate is damaged, or a newer version of this package wrote one.
    """
    folders, problems = on_first(lambda: candidates(directory, step))
    for folder in folders:
        manifest, problem = _inspect(folder, verify)
        if manifest is None:
            problems.append(problem)
            continue
        if problems and rank() == 0:
            warnings.warn(f"{' '.join(problems)} Loading {folder} instead.", stacklevel=3)
        return folder, manifest, problems
    advice = "load another step" if step is not None else "none is whole"
    raise CheckpointError(f"cannot load from {directory}: {advice}. " + " ".join(problems))


def _inspect(folder: Path, verify: bool) -> tuple[Manifest | None, str]:
    """The manifest of an undamaged checkpoint, or None and what is wrong."""

    def inspect_or_explain() -> tuple[Manifest | None, dict[str, str], str]:
        try:
            return *inspect(folder), ""
        except NewerFormatError:
            raise
        except CheckpointError as damage:
            return None, {}, str(damage)

    manifest, recorded, problem = on_first(inspect_or_explain)
    if manifest is None or not verify:
        return manifest, problem
    ranks = dist.get_world_size() if distributed() else 1
    # Sorted by size, so that large files go to different ranks.
    names = sorted(manifest.files, key=lambda name: (-manifest.files[name], name))[rank() :: ranks]
    damaged = joined(together(lambda: digests.wrong(folder, recorded, names)))
    if damaged:
        return None, f"{folder}: the contents of {', '.join(damaged)} are not what was written (SHA-256)."
    return manifest, ""
