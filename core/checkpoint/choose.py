"""Which checkpoint to load: the newest that is what was written."""

import warnings
from pathlib import Path

import torch.distributed as dist

from . import digests as sums
from . import directory as folders
from .manifest import Manifest
from .together import CheckpointError, NewerFormatError, distributed, joined, on_first, rank, together


def choose(directory: Path, step: int | None, *, verify: bool) -> tuple[Path, Manifest, list[str]]:
    """A checkpoint that is whole; all ranks call it, and each reads its share of the files to verify.

    Args:
        directory: What ``save`` was given.
        step: The only one to load; None for the newest, or the one before it when that is damaged, with a warning.
        verify: Compare digests, not only sizes.

    Returns:
        Its folder, its manifest, and what is wrong with those that were passed over.

    Raises:
        CheckpointError: on all ranks, when there is none that is whole, or a newer version wrote it.
    """
    found, problems = on_first(lambda: folders.candidates(directory, step))
    for folder in found:
        manifest, problem = _try(folder, verify)
        if manifest is None:
            problems.append(problem)
            continue
        if problems and rank() == 0:
            warnings.warn(f"{' '.join(problems)} Loading {folder} instead.", stacklevel=3)
        return folder, manifest, problems
    advice = "load another step" if step is not None else "none is whole"
    raise CheckpointError(f"cannot load from {directory}: {advice}. " + " ".join(problems))


def _try(folder: Path, verify: bool) -> tuple[Manifest | None, str]:
    def inspect() -> tuple[Manifest | None, dict[str, str], str]:
        try:
            return *folders.inspect(folder), ""
        except NewerFormatError:
            raise
        except CheckpointError as damage:
            return None, {}, str(damage)

    manifest, digests, problem = on_first(inspect)
    if manifest is None or not verify:
        return manifest, problem
    ranks = dist.get_world_size() if distributed() else 1
    # The largest first: those of a size go to different ranks.
    names = sorted(manifest.files, key=lambda name: (-manifest.files[name], name))[rank() :: ranks]
    wrong = joined(together(lambda: sums.wrong(folder, digests, names)))
    if wrong:
        return None, f"{folder}: the contents of {', '.join(wrong)} are not what was written (SHA-256)."
    return manifest, ""
