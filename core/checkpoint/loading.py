"""Resuming a run."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.optim import Optimizer

from . import directory as folders
from . import rng
from .compare import compare_keys, compare_optimizers, compare_tensors, optimizer_rows, table
from .contents import MODEL, STATE, Contents, Group, process_groups
from .manifest import Manifest
from .ranks import CheckpointError, distributed, gather, on_first, rank, together
from .reader import SafeReader
from .saving import reasons, whereabouts


@dataclass(frozen=True)
class Difference:
    """An optimizer setting that is not what it was; the one of this run stays.

    Attributes:
        name: Optimizer and setting, ``AdamW.weight_decay``.
        saved: Its value in the checkpoint; None also where it had none.
        now: Its value in this run; None also where it has none.
        parameters: Names of the parameters that it applies to.
    """

    name: str
    saved: Any
    now: Any
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Loaded:
    """What came out of a checkpoint besides tensors.

    Attributes:
        path: Its folder.
        step: Finished steps.
        consumed_samples: Position in the data.
        schedule: As given to ``save``; None without one.
        extra: As given to ``save``.
        optimizer_loaded: Whether the optimizer's state was loaded.
        rng_restored: Whether the random number generators go on where they were: only on the layout that was saved.
        differences: Optimizer settings that are not what they were.
        saved_layout: Name of a mesh axis → its size, in the run that saved.
        layout: The same of this run.
    """

    path: Path
    step: int
    consumed_samples: int
    schedule: dict[str, Any] | None
    extra: dict[str, Any]
    optimizer_loaded: bool
    rng_restored: bool
    differences: tuple[Difference, ...]
    saved_layout: dict[str, int]
    layout: dict[str, int]

    def notes(self) -> list[str]:
        """What a user should know, a line each."""
        saved, now = (" x ".join(f"{k} {n}" for k, n in layout.items()) for layout in (self.saved_layout, self.layout))
        lines = [f"resumed from {self.path} at step {self.step}, saved on {saved}, now {now}"]
        if not self.optimizer_loaded:
            lines.append("the optimizer starts with fresh state")
        if not self.rng_restored:
            why = ": they belong to the layout that was saved" if self.saved_layout != self.layout else ""
            lines.append(f"random number generators were not restored{why}")
        for d in self.differences:
            lines.append(f"{d.name} was {d.saved} and is now {d.now} ({len(d.parameters)} parameters)")
        return lines


def load(
    directory: str | Path,
    *,
    model_chunks: Sequence[nn.Module],
    optimizer: Optimizer | None = None,
    step: int | None = None,
    load_optimizer: bool = True,
    load_rng: bool = True,
    pg_collection: Any = None,
) -> Loaded:
    """Load a checkpoint into a run that is built and laid out already, in place.

    All ranks of the default process group call it. Overwrites parameters, persistent buffers and optimizer state; the
    settings of the optimizer stay. Compares everything before it touches anything, and executes no code that a checkpoint
    may hold. The optimizer takes no step.

    Args:
        directory: What ``save`` was given.
        model_chunks: This rank's modules.
        optimizer: The optimizer that was saved.
        step: Which checkpoint; None for the newest.
        load_optimizer: False leaves the optimizer's state as it is; then any optimizer will do.
        load_rng: False leaves the random number generators as they are.
        pg_collection: Process groups; default: the optimizer's.

    Raises:
        CheckpointError: on all ranks, when there is no such checkpoint, or it is damaged, or does not fit; see its text.
    """
    pgs = process_groups(pg_collection, optimizer)
    wanted = optimizer if load_optimizer else None
    contents = together(lambda: Contents.of(model_chunks, wanted, pgs))
    path, manifest = on_first(lambda: folders.open_checkpoint(Path(directory), step))
    reader = SafeReader(path)
    metadata = together(reader.read_metadata)
    _check(path, contents, manifest, metadata, with_state=wanted is not None)
    layout, ranks = whereabouts(pgs)
    tensors = dict(contents.tensors)
    generators = _generators(metadata) if load_rng and manifest.ranks == ranks else None
    if generators is not None:
        tensors[rng.key(rank())] = generators
    _read(tensors, reader)
    if generators is not None:
        rng.unpack(generators)
    return Loaded(
        path=path,
        step=manifest.step,
        consumed_samples=manifest.consumed_samples,
        schedule=manifest.schedule,
        extra=manifest.extra,
        optimizer_loaded=wanted is not None,
        rng_restored=generators is not None,
        differences=_differences(contents.groups, manifest.groups),
        saved_layout=manifest.layout,
        layout=layout,
    )


def _check(path: Path, contents: Contents, manifest: Manifest, metadata: Metadata, *, with_state: bool) -> None:
    saved = metadata.state_dict_metadata
    groups = [group for groups in gather(contents.groups) for group in groups]
    changed = compare_optimizers(groups, manifest.groups) if with_state else {}
    skip = set(changed)
    mine = together(lambda: compare_tensors(contents.tensors, saved, skip))
    rows = [row for rows in gather(mine) for row in rows] + optimizer_rows(changed)
    keys = [key for keys in gather(list(contents.tensors)) for key in keys]
    rows += compare_keys(keys, saved, skip, (MODEL, STATE) if with_state else (MODEL,))
    if rows:
        raise CheckpointError(table(str(path), rows))


def _generators(metadata: Metadata) -> Tensor | None:
    """Memory for this rank's generators, whose size is that of the saved text."""
    found = metadata.state_dict_metadata.get(rng.key(rank()))
    return torch.empty(found.size, dtype=torch.uint8) if isinstance(found, TensorStorageMetadata) else None


def _read(tensors: dict[str, Tensor], reader: SafeReader) -> None:
    try:
        with warnings.catch_warnings():
            # One process is not a mistake.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp_load(tensors, storage_reader=reader, no_dist=not distributed())
    except CheckpointException as error:
        raise CheckpointError(
            f"{reader.path} is damaged: {reasons(error)}. Some of it was loaded: do not go on with this model; "
            f"load an older step."
        ) from None


def _differences(here: Iterable[Group], saved: Iterable[Group]) -> tuple[Difference, ...]:
    had = {name: group.settings for group in saved for name in group.parameters}
    mine: dict[tuple[str, str, str], tuple[Any, Any, list[str]]] = {}
    for group in here:
        for name in group.parameters:
            before = had.get(name, {})
            for setting in sorted({*before, *group.settings}):
                was, now = before.get(setting), group.settings.get(setting)
                if was != now:
                    key = (f"{group.optimizer}.{setting}", repr(was), repr(now))
                    mine.setdefault(key, (was, now, []))[2].append(name)
    merged: dict[tuple[str, str, str], tuple[Any, Any, list[str]]] = {}
    for of_rank in gather(mine):
        for key, (was, now, names) in of_rank.items():
            merged.setdefault(key, (was, now, []))[2].extend(names)
    return tuple(
        Difference(name, was, now, tuple(dict.fromkeys(names)))
        for (name, _, _), (was, now, names) in sorted(merged.items())
    )
