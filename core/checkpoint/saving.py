"""Saving a run."""

import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.optim import Optimizer

from ..process_groups_config import ProcessGroupCollection
from . import directory as folders
from . import rng
from .contents import Contents, process_groups
from .manifest import Manifest, json_copy, merge_groups
from .ranks import CheckpointError, distributed, gather, on_first, rank, together


def save(
    directory: str | Path,
    *,
    step: int,
    model_chunks: Sequence[nn.Module],
    optimizer: Optimizer | None = None,
    consumed_samples: int = 0,
    schedule: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    pg_collection: Any = None,
) -> Path:
    """Write a checkpoint that :func:`load` reads on any layout, and plain ``torch.distributed.checkpoint`` as whole tensors.

    All ranks of the default process group call it. The checkpoint comes into sight, and becomes the newest one, when it is
    complete on all of them; until then ``directory`` is as before. Mutates nothing of the run.

    Args:
        directory: Made when it is not there; on a file system that all ranks share.
        step: Finished steps.
        model_chunks: This rank's modules; names of parameters and buffers must be global.
        optimizer: An optimizer of this package, or a chain of them.
        consumed_samples: Position in the data.
        schedule: State of the learning-rate schedule; what JSON can hold.
        extra: Anything else to have back; what JSON can hold.
        pg_collection: Process groups; default: the optimizer's.

    Returns:
        The checkpoint's folder, ``directory/iter_0000100``.

    Raises:
        CheckpointError: on all ranks, when it fails on any.
    """
    pgs = process_groups(pg_collection, optimizer)
    contents = together(lambda: Contents.of(model_chunks, optimizer, pgs))
    layout, ranks = whereabouts(pgs)
    groups = merge_groups(group for groups in gather(contents.groups) for group in groups)

    manifest = together(
        lambda: Manifest(
            step=step,
            consumed_samples=consumed_samples,
            layout=layout,
            ranks=ranks,
            optimizers=sorted({group.optimizer for group in groups}),
            groups=groups,
            schedule=json_copy("schedule", None if schedule is None else dict(schedule)),
            extra=json_copy("extra", dict(extra or {})),
        )
    )
    staging = on_first(lambda: folders.begin(Path(directory), step))
    try:
        metadata = _write(contents.tensors | {rng.key(rank()): rng.pack()}, staging)
        written = {info.relative_path for info in metadata.storage_data.values()}
        return on_first(lambda: folders.commit(staging, manifest, written))
    except CheckpointError:
        if rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def whereabouts(pgs: ProcessGroupCollection) -> tuple[dict[str, int], list[list[int]]]:
    """The size of each mesh axis, and the position of every rank on them."""
    axes = [pgs.axis(name) for name in ("pp", "dp", "tp")]
    return {axis.name: axis.size for axis in axes}, gather([axis.index for axis in axes])


def _write(tensors: dict[str, Tensor], staging: Path) -> Metadata:
    writer = FileSystemWriter(staging)
    try:
        with warnings.catch_warnings():
            # One process is not a mistake.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            metadata: Metadata = dcp_save(tensors, storage_writer=writer, no_dist=not distributed())
    except CheckpointException as error:
        raise CheckpointError(
            f"cannot save to {staging.parent}: {reasons(error)}. Earlier checkpoints are as they were."
        ) from None
    return metadata


def reasons(error: CheckpointException) -> str:
    """What went wrong where, in one line."""
    found = [f"rank {i}: {type(failure).__name__}: {failure}" for i, (failure, _) in error.failures.items()]
    return "; ".join(found)
