"""Saving of checkpoints."""

import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.optim import Optimizer

from ..process_groups_config import ProcessGroupCollection, gather
from ..torch_defaults import torch_defaults
from . import digests, extra_state, plain, rng
from .background import Background
from .contents import Contents, process_groups
from .directory import begin, commit, folder_of, why
from .manifest import Manifest, config_digest, merge_groups
from .together import CheckpointError, GroupOrDefault, distributed, joined, on_first, rank, together

COMMON = "common_state/shard_0_1"
"""Key of the object that Megatron-Core keeps besides tensors; this package writes it and does not read it."""
SMALLEST_KEEP = 2
"""Smallest ``keep``: with a single checkpoint there is none to fall back on when it is damaged."""


@torch_defaults()
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
    keep: int | None = None,
    background: Background | None = None,
) -> Path:
    """Write a checkpoint that :func:`load` reads on any layout, and plain ``torch.distributed.checkpoint`` as whole tensors.

    It holds what the modules' ``state_dict`` and the optimizer's hold, under names that wrappers (``torch.compile``, data
    parallelism, activation checkpointing) do not change; anything that cannot be saved is refused by name.

    All ranks of the default process group call it. The checkpoint becomes visible, and the newest one, when it is complete on
    all of them; until then the checkpoints in ``directory`` stay as they were. Mutates nothing of the run. Megatron-Core's
    ``dist_checkpointing`` reads it too (format ``torch_dist``).

    Args:
        directory: Directory of the checkpoints, on a file system that all ranks share; made if it does not exist. One job at a
            time saves there. A relative path is below the working directory at the time of this call.
        step: Number of finished steps.
        model_chunks: This rank's modules; names of parameters and buffers must be global.
        optimizer: An optimizer of this package, or a chain of them.
        consumed_samples: Position in the data, in samples.
        schedule: State of the learning-rate schedule, of the types that :func:`.plain.text` takes; it comes back equal.
        extra: Additional values for :func:`load` to return, of the same types.
        pg_collection: Process groups; default: the optimizer's.
        keep: Number of checkpoints to keep, the newest ones up to ``step``; at least 2. None keeps all.
        background: Writer that works while training goes on: ``save`` returns when everything is copied, and
            ``background.wait()`` returns when the checkpoint is complete. ``save`` first waits for the writer's last save.

    Returns:
        The checkpoint's folder, ``directory/iter_0000100``.

    Raises:
        CheckpointError: on all ranks, when saving fails on any; also when the writer's last save has failed.
    """
    directory = Path(directory).absolute()
    if background:
        background.wait()
    pgs = process_groups(pg_collection, optimizer)
    contents = together(lambda: Contents.of(model_chunks, optimizer, pgs))
    kept_by_modules = extra_state.tensors(extra_state.holders(model_chunks))
    layout, ranks = whereabouts(pgs)
    groups = merge_groups(joined(contents.groups))

    def describe() -> Manifest:
        if keep is not None and keep < SMALLEST_KEEP:
            raise ValueError(f"keep is {keep}; keep at least {SMALLEST_KEEP} checkpoints, or None for all.")
        return Manifest(
            step=step,
            consumed_samples=consumed_samples,
            layout=layout,
            ranks=ranks,
            optimizers=sorted({group.optimizer for group in groups}),
            groups=groups,
            schedule=plain.copied("schedule", None if schedule is None else dict(schedule)),
            extra=plain.copied("extra", dict(extra or {})),
            config=config_digest(groups),
        )

    manifest = together(describe)
    staging = on_first(lambda: begin(directory, step))
    tensors = contents.tensors | kept_by_modules | {rng.key(rank()): rng.pack()}
    if background is None:
        return _write(tensors, staging, manifest, keep)
    group, copies = background.group, background.copy(tensors)
    background.start(lambda: _write(copies, staging, manifest, keep, group))
    return staging.with_name(folder_of(step))


def whereabouts(pgs: ProcessGroupCollection) -> tuple[dict[str, int], list[list[int]]]:
    """The size of each mesh axis, and the position of every rank on them."""
    axes = [pgs.axis(name) for name in ("pp", "dp", "tp")]
    return {axis.name: axis.size for axis in axes}, gather([axis.index for axis in axes])


def _write(
    tensors: Mapping[str, Tensor], staging: Path, manifest: Manifest, keep: int | None, group: GroupOrDefault = None
) -> Path:
    """Write the files, then digest them, each rank its own; then make the checkpoint visible, on rank 0."""
    try:
        _write_tensors(tensors, staging, manifest.step, group)
        names = [file.name for file in staging.glob(f"__{rank()}_*")]
        local_digests = together(lambda: digests.digests(staging, names), group)
        written = dict(joined(local_digests.items(), group))
        return on_first(lambda: _commit(staging, manifest, written, keep), group)
    except CheckpointError:
        if rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _write_tensors(tensors: Mapping[str, Tensor], staging: Path, step: int, group: GroupOrDefault) -> None:
    contents: dict[str, Any] = {**tensors, COMMON: [{"iteration": step}]}
    try:
        with warnings.catch_warnings():
            # torch warns when a single process saves without process groups.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp_save(
                contents,
                storage_writer=FileSystemWriter(staging),
                planner=DefaultSavePlanner(flatten_state_dict=False),
                process_group=group,
                no_dist=not distributed(),
            )
    except CheckpointException as error:
        raise _cannot_save(staging.parent, reasons(error)) from None


def _commit(staging: Path, manifest: Manifest, written: dict[str, str], keep: int | None) -> Path:
    try:
        return commit(staging, manifest, written, keep)
    except OSError as error:
        raise _cannot_save(staging.parent, why(error)) from None


def _cannot_save(directory: Path, reason: str) -> CheckpointError:
    # torch's error does not always say that a disk is full.
    free = shutil.disk_usage(directory).free / 1e6
    return CheckpointError(
        f"cannot save to {directory}, with {free:.1f} MB free there: {reason}. Earlier checkpoints are as they were."
    )


def reasons(error: CheckpointException) -> str:
    """The failures of all ranks, in one line."""
    failures = [f"rank {i}: {type(failure).__name__}: {failure}" for i, (failure, _) in error.failures.items()]
    return "; ".join(failures)
