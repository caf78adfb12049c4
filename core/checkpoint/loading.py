"""Loading of checkpoints into a run."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import STORAGE_TYPES, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.optim import Optimizer

from ..process_groups_config import gather
from ..torch_defaults import torch_defaults
from . import extra_state, rng
from .choose import choose
from .compare import Mismatch, compare_keys, compare_optimizers, compare_tensors, optimizer_rows, selection, table
from .contents import MODEL, STATE, Contents, Group, parameter_of, process_groups
from .manifest import Manifest
from .reader import SafeReader
from .saving import reasons, whereabouts
from .together import CheckpointError, distributed, joined, rank, together


@dataclass(frozen=True)
class Difference:
    """An optimizer setting whose value differs from the checkpoint's; this run's value stays.

    Attributes:
        name: Optimizer and setting, as in ``AdamW.weight_decay``.
        saved: Value in the checkpoint; None also where the checkpoint lacks the setting.
        now: Value in this run; None also where this run lacks the setting.
        parameters: Names of the parameters that the setting applies to.
    """

    name: str
    saved: Any
    now: Any
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Loaded:
    """Contents of a loaded checkpoint besides its tensors.

    Attributes:
        path: Folder of the checkpoint.
        step: Number of finished steps.
        consumed_samples: Position in the data, in samples.
        schedule: State of the learning-rate schedule that was passed to ``save``; None without one.
        extra: Additional values that were passed to ``save``.
        keys: Keys of what any rank loaded, without those of random number generators.
        rng_restored: Whether the random number generators were restored; they are only on the layout that was saved.
        differences: Optimizer settings that differ from the checkpoint's.
        saved_layout: Name of each mesh axis → its size in the run that saved.
        layout: Name of each mesh axis → its size in this run.
        skipped: Problems of newer checkpoints that were passed over, a line each.
    """

    path: Path
    step: int
    consumed_samples: int
    schedule: dict[str, Any] | None
    extra: dict[str, Any]
    keys: tuple[str, ...]
    rng_restored: bool
    differences: tuple[Difference, ...]
    saved_layout: dict[str, int]
    layout: dict[str, int]
    skipped: tuple[str, ...] = ()

    @property
    def optimizer_loaded(self) -> bool:
        """Whether any state of the optimizer was loaded."""
        return any(key.startswith(STATE) for key in self.keys)

    def notes(self) -> list[str]:
        """Messages for the user about this load, a line each."""
        saved, now = (" x ".join(f"{k} {n}" for k, n in layout.items()) for layout in (self.saved_layout, self.layout))
        lines = [f"passed over: {problem}" for problem in self.skipped]
        lines += [f"resumed from {self.path} at step {self.step}, saved on {saved}, now {now}"]
        if not self.optimizer_loaded:
            lines.append("the optimizer starts with fresh state")
        if not self.rng_restored:
            why = ": they belong to the layout that was saved" if self.saved_layout != self.layout else ""
            lines.append(f"random number generators were not restored{why}")
        for d in self.differences:
            lines.append(f"{d.name} was {d.saved} and is now {d.now} ({len(d.parameters)} parameters)")
        return lines


@torch_defaults()
def load(
    directory: str | Path,
    *,
    model_chunks: Sequence[nn.Module],
    optimizer: Optimizer | None = None,
    step: int | None = None,
    load_optimizer: bool = True,
    load_rng: bool = True,
    only: Sequence[str] = (),
    verify: bool = True,
    pg_collection: Any = None,
) -> Loaded:
    """Load a checkpoint in place into a run that is already built and sharded, on any layout.

    All ranks of the default process group call it. Overwrites parameters, persistent buffers, the modules' extra state and
    optimizer state; the settings of the optimizer stay. Compares everything before it changes anything, and executes no code
    that a checkpoint may hold. The optimizer takes no step. When the newest checkpoint is damaged, the newest undamaged one is
    loaded, with a warning.

    Args:
        directory: Directory that was passed to ``save``.
        model_chunks: This rank's modules.
        optimizer: Optimizer whose state was saved.
        step: Step of the only checkpoint to load; None for the newest.
        load_optimizer: False leaves the optimizer's state as it is, and the optimizer may differ from the saved one.
        load_rng: False leaves the random number generators as they are.
        only: Patterns (``model.layers.0.*``) of the keys to load; everything else stays as it is, generators too. Keys are
            ``model.<name>``, ``optimizer.state.<slot>.<name>`` and ``extra_state.<module>``. Without patterns all keys are
            loaded, and this run and the checkpoint must have the same keys.
        verify: False compares only the sizes of files with what was written, not their contents.
        pg_collection: Process groups; default: the optimizer's.

    Raises:
        CheckpointError: on all ranks, when there is no such checkpoint, it is damaged, or it does not fit this run.
    """
    pgs = process_groups(pg_collection, optimizer)
    wanted = optimizer if load_optimizer else None
    contents = together(lambda: Contents.of(model_chunks, wanted, pgs))
    path, manifest, skipped = choose(Path(directory), step, verify=verify)
    reader = SafeReader(path)
    saved = together(reader.read_metadata).state_dict_metadata
    tensors, holders = dict(contents.tensors), together(lambda: extra_state.holders(model_chunks))
    if only:
        _check_patterns(only, joined([*tensors, *(f"{extra_state.PREFIX}{name}" for name in holders)]))
        tensors, saved = selection(tensors, only), selection(saved, only)
        holders = {name: h for name, h in holders.items() if selection({f"{extra_state.PREFIX}{name}": h}, only)}
    keys = sorted({*joined(tensors)})
    groups = joined(contents.groups)
    layout, ranks = whereabouts(pgs)
    states, unfit = extra_state.to_read(holders, saved, same_layout=manifest.ranks == ranks)
    _check(path, tensors, keys, groups, manifest, saved, unfit, complete=not only)
    packed = {key: torch.empty(size, dtype=torch.uint8, device="cpu") for key, size in states.values()}
    generators = _generators(saved) if load_rng and manifest.ranks == ranks else None
    if generators is not None:
        tensors[rng.key(rank())] = generators
    _read(tensors | packed, reader)
    together(lambda: extra_state.put(holders, {name: packed[key] for name, (key, _) in states.items()}))
    if generators is not None:
        rng.unpack(generators)
    return Loaded(
        path=path,
        step=manifest.step,
        consumed_samples=manifest.consumed_samples,
        schedule=manifest.schedule,
        extra=manifest.extra,
        keys=(*keys, *sorted({*joined(packed)})),
        rng_restored=generators is not None,
        differences=_differences(contents.groups, manifest.groups),
        saved_layout=manifest.layout,
        layout=layout,
        skipped=tuple(skipped),
    )


def _check(
    path: Path,
    tensors: Mapping[str, Tensor],
    keys: Sequence[str],
    groups: Sequence[Group],
    manifest: Manifest,
    saved: Mapping[str, STORAGE_TYPES],
    unfit: Sequence[Mismatch],
    *,
    complete: bool,
) -> None:
    """Refuse a checkpoint that does not fit, and this rank's ``unfit`` extra states.

    With ``complete`` all optimizers are compared, not only those of ``keys``.
    """
    with_state = {parameter_of(key) for key in keys if key.startswith(STATE)}
    changed = compare_optimizers(groups, manifest.groups) if with_state else {}
    if not complete:
        changed = {name: pair for name, pair in changed.items() if name in with_state}
    skip = set(changed)
    local_rows = together(lambda: compare_tensors(tensors, saved, skip))
    rows = joined([*local_rows, *unfit]) + optimizer_rows(changed)
    rows += compare_keys(keys, saved, skip, (MODEL, STATE) if with_state else (MODEL,))
    if rows:
        raise CheckpointError(table(str(path), rows))


def _check_patterns(only: Sequence[str], keys: Sequence[str]) -> None:
    if unmatched := [pattern for pattern in only if not selection(dict.fromkeys(keys), [pattern])]:
        examples = ", ".join(sorted(keys)[:3])
        raise CheckpointError(
            f"no key of this run matches {', '.join(map(repr, unmatched))}; nothing was loaded. Keys are like {examples}; * "
            f"stands for any characters."
        )


def _generators(saved: Mapping[str, STORAGE_TYPES]) -> Tensor | None:
    """An empty tensor to load the state of this rank's random number generators into; None where none was saved."""
    metadata = saved.get(rng.key(rank()))
    return (
        torch.empty(metadata.size, dtype=torch.uint8, device="cpu")
        if isinstance(metadata, TensorStorageMetadata)
        else None
    )


def _read(tensors: dict[str, Tensor], reader: SafeReader) -> None:
    try:
        with warnings.catch_warnings():
            # torch warns when a single process loads without process groups.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp_load(tensors, storage_reader=reader, no_dist=not distributed())
    except CheckpointException as error:
        raise CheckpointError(
            f"{reader.path} is damaged: {reasons(error)}. Some of it was loaded: do not go on with this model; "
            f"load an older step."
        ) from None


def _differences(current: Iterable[Group], saved: Iterable[Group]) -> tuple[Difference, ...]:
    """Settings that differ, of the parameters of all ranks."""
    saved_settings = {name: group.settings for group in saved for name in group.parameters}
    on_this_rank: dict[tuple[str, str, str], tuple[Any, Any, list[str]]] = {}
    for group in current:
        for name in group.parameters:
            before = saved_settings.get(name, {})
            for setting in sorted({*before, *group.settings}):
                was, now = before.get(setting), group.settings.get(setting)
                if was != now:
                    key = (f"{group.optimizer}.{setting}", repr(was), repr(now))
                    on_this_rank.setdefault(key, (was, now, []))[2].append(name)
    merged: dict[tuple[str, str, str], tuple[Any, Any, list[str]]] = {}
    for on_rank in gather(on_this_rank):
        for key, (was, now, names) in on_rank.items():
            merged.setdefault(key, (was, now, []))[2].extend(names)
    return tuple(
        Difference(name, was, now, tuple(dict.fromkeys(names)))
        for (name, _, _), (was, now, names) in sorted(merged.items())
    )
