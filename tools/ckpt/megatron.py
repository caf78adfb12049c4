"""Converts a checkpoint of Megatron-Core (``torch_dist``) to one of this package, and back.

Megatron-Core stacks the layers of a stage under one key, puts no ``model.`` before the names, keeps one step for all parameters,
and beside weights of 16 bits the float32 weights that its optimizer steps. In checkpoints of this package every layer has its
own keys, and weights are these float32 weights. Names stay Megatron-Core's.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.checkpoint import CheckpointError, digests
from core.checkpoint.contents import MODEL, STATE, Group, base_of, parameter_of
from core.checkpoint.directory import MEGATRON
from core.checkpoint.manifest import Manifest, config_digest
from core.checkpoint.reader import SafeReader
from core.checkpoint.saving import COMMON

from .source import LEGACY, Source, count, find, harmless, open_source, safe_reader
from .torch_file import ONE_PROCESS
from .writer import Writer

LAYERS = ("stacked", "separate")
"""Forms of Megatron-Core's layers: one tensor, its default, or keys of their own (``non_homogeneous_layers``)."""
WEIGHTS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes of weights beside which Megatron-Core keeps float32 weights."""
MASTER = f"{STATE}fp32_param."
OPTIMIZERS = {
    frozenset({"exp_avg", "exp_avg_sq"}): "AdamW",
    frozenset({"momentum_buffer"}): "TensorParallelMuon",
    frozenset({"momentum_buffer", "moment2_buffer"}): "TensorParallelAdaptiveMuon",
}
"""Slots of a parameter's state in Megatron-Core → class of this package that has the same slots."""
_STACKED = re.compile(r"((?:[^.]+\.)*?layers)\.(?!\d+\.)(.+)")
_LAYER = re.compile(r"((?:[^.]+\.)*?(?<!mtp\.)layers)\.(\d+)\.(.+)")
_CHAINED = re.compile(r"chained_\d+\.(?=optimizer\.state\.)")


def from_megatron(path: str, step: int | None, directory: str, files: int) -> tuple[Path, list[str]]:
    """Convert what Megatron-Core saved in ``path``; returns the new folder, and notes on what has changed its form.

    Raises:
        CheckpointError: The checkpoint could execute code, has another format, or holds state that no optimizer of this
            package has.
    """
    folder = find(path, step)[0]
    _check_format(folder)
    reader = open_source(str(folder)).verified().reader if (folder / digests.NAME).exists() else safe_reader(folder)
    common, write_common = _common(folder, reader)
    keys = {_CHAINED.sub("", key): key for key in reader.tensors()}
    _check_keys(folder, keys)
    masters = {key.removeprefix(MASTER): key for key in keys if key.startswith(MASTER)}
    slots: dict[str, set[str]] = {}
    narrow: dict[str, str] = {}
    at = count(common.get("iteration", 0), f"the iteration of {folder}")
    with Writer(directory, at, files) as writer:
        for key, original in keys.items():
            if key in masters.values():
                continue
            whole = reader.whole(original)
            if key in masters:
                narrow[key] = str(whole.dtype).removeprefix("torch.")
                whole = _master(folder, key, whole, reader.whole(keys[masters[key]]))
            for name, x in _unstacked(key, whole):
                if key.startswith(STATE):
                    slots.setdefault(parameter_of(name), set()).add(name.removeprefix(STATE).partition(".")[0])
                writer.add(name if key.startswith(STATE) else f"{MODEL}{name}", x)
        groups = _groups(folder, slots)
        for name in [name for group in groups if group.optimizer == "AdamW" for name in group.parameters]:
            writer.add(f"{STATE}step.{name}", torch.tensor(_common_step(folder, common), dtype=torch.float32))
        for key in reader.objects():
            if key != COMMON:
                writer.add_raw(key, reader.raw(key))
        write_common(writer)
        layers = "stacked" if any(map(_STACKED.fullmatch, keys)) else "separate"
        manifest = Manifest(
            step=at,
            consumed_samples=count(getattr(common.get("args"), "consumed_train_samples", 0), f"samples of {folder}"),
            optimizers=sorted({group.optimizer for group in groups}),
            groups=groups,
            extra={"megatron": {"layers": layers, "weights": narrow}},
            config=config_digest(groups),
            **ONE_PROCESS,
        )
        made = writer.commit(manifest)
    notes = [f"weights are their float32 masters: {len(masters)} tensors of Megatron-Core"] if masters else []
    return made, [*notes, f"layers were {layers}; each now has keys of its own"]


def to_megatron(
    source: Source, directory: str, layers: str | None, weights: str | None, files: int
) -> tuple[Path, list[str]]:
    """Write a checkpoint for Megatron-Core's ``dist_checkpointing``; returns the new folder, and notes on what is not in it.

    Args:
        source: Checkpoint of this package.
        directory: Directory for Megatron-Core's ``--load``.
        layers: Form of the layers, one of :data:`LAYERS`. None for the form in which they came from Megatron-Core, or stacked.
        weights: Dtype of the weights of a run that trains in 16 bits, beside which float32 weights are written. None for the
            dtypes with which they came from Megatron-Core, or the dtypes that they have.
        files: Number of files with tensors.

    Raises:
        CheckpointError: Layers to be stacked have different shapes, dtypes or keys.
    """
    reader, manifest = source.reader, source.manifest
    origin = manifest.extra.get("megatron")
    origin = origin if isinstance(origin, dict) else {}
    stacked = (layers or origin.get("layers", "stacked")) == "stacked"
    narrow = _narrow(source, weights, origin.get("weights"))
    left_out = [key for key in reader.tensors() if not key.startswith((MODEL, STATE)) or base_of(key)[1]]
    wanted = [key for key in reader.tensors() if key not in left_out and not key.startswith(f"{STATE}step.")]
    common, write_common = _common(source.folder, reader)
    with Writer(directory, manifest.step, files) as writer:
        for key, parts in _stacks([key.removeprefix(MODEL) for key in wanted], stacked, source.folder).items():
            prefix = "" if key.startswith(STATE) else MODEL
            whole = _stack([f"{prefix}{part}" for part in parts], key != parts[0], reader)
            dtype = narrow.get(parts[0])
            if dtype is not None:
                writer.add(f"{MASTER}{key}", whole)
                whole = whole.to(dtype)
            writer.add(key, whole)
        for key in reader.objects():
            if key != COMMON:
                writer.add_raw(key, reader.raw(key))
        if "optimizer" in common:
            write_common(writer)
        else:
            writer.add_common({"iteration": manifest.step, "checkpoint_version": 3.0, **_step_of_all(source)})
        made = writer.commit(
            replace(manifest, groups=[], optimizers=[], config=config_digest([]), files={}, **ONE_PROCESS)
        )
    notes = [f"not in it, since only the layout that saved can use them: {', '.join(left_out)}"] if left_out else []
    if "optimizer" not in common:
        notes.append(
            "it has the tensors of the optimizer's state, but no settings of Megatron-Core's parameter groups, which only its "
            "own jobs know: load the weights alone (--no-load-optim), or give the groups from such a job"
        )
    return made, notes


def _check_format(folder: Path) -> None:
    try:
        backend = json.loads((folder / MEGATRON).read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        backend = None
    if backend != "torch_dist":
        problem = f"is of format {backend}" if backend else f"has no {MEGATRON} that says its format"
        raise CheckpointError(f"{folder} {problem}; possible: torch_dist of Megatron-Core.")


def _check_keys(folder: Path, keys: Iterable[str]) -> None:
    """Refuse flat buckets of the distributed optimizer, which belong to one layout and cannot be split into parameters."""
    if any(key.startswith(MODEL) for key in keys):
        raise CheckpointError(
            f"{folder} has keys that begin with {MODEL}: this package wrote it, and reads it as it is."
        )
    if flat := [key for key in keys if key.startswith("optimizer.") and not key.startswith(STATE)]:
        raise CheckpointError(
            f"{folder} has {flat[0]}, state of Megatron-Core's distributed optimizer for one layout; save with "
            f"--dist-ckpt-optim-fully-reshardable."
        )


def _common(folder: Path, reader: SafeReader) -> tuple[Mapping[str, Any], Callable[[Writer], None]]:
    """What Megatron-Core keeps besides tensors, and a function that writes the same bytes again."""
    legacy = folder / LEGACY
    where = legacy.name if legacy.is_file() else COMMON
    if where == COMMON and COMMON not in reader.objects():
        raise CheckpointError(f"{folder} has neither {COMMON} nor {LEGACY}: Megatron-Core did not write it.")
    raw = legacy.read_bytes() if where == LEGACY else reader.raw(COMMON)
    common = harmless(raw, f"{folder}: {where}")
    if where == COMMON:
        common = common[0] if isinstance(common, list) and len(common) == 1 else None
    if not isinstance(common, dict):
        raise CheckpointError(f"{folder}: {where} is not what Megatron-Core writes.")
    return common, partial(Writer.add_file if where == LEGACY else Writer.add_raw, name=where, raw=raw)


def _master(folder: Path, key: str, weight: Tensor, master: Tensor) -> Tensor:
    if not torch.equal(master.to(weight.dtype), weight):
        raise CheckpointError(
            f"{folder}: {key} and its float32 master differ by more than rounding; one of them is wrong."
        )
    return master


def _unstacked(key: str, whole: Tensor) -> list[tuple[str, Tensor]]:
    match = _STACKED.fullmatch(key)
    if not match or not whole.ndim:
        return [(key, whole)]
    return [(f"{match[1]}.{i}.{match[2]}", x) for i, x in enumerate(whole)]


def _groups(folder: Path, slots: Mapping[str, set[str]]) -> list[Group]:
    groups: dict[str, Group] = {}
    for name, of_parameter in slots.items():
        optimizer = OPTIMIZERS.get(frozenset(of_parameter))
        if optimizer is None:
            raise CheckpointError(
                f"{folder}: {name} has the state {', '.join(sorted(of_parameter))}, which no optimizer here has; possible: "
                f"{'; '.join(', '.join(sorted(known)) for known in OPTIMIZERS)}."
            )
        groups.setdefault(optimizer, Group(optimizer, {}, [])).parameters.append(name)
    return list(groups.values())


def _common_step(folder: Path, common: Mapping[str, Any]) -> int:
    """Number of steps of the optimizer, which Megatron-Core keeps for all parameters or for their groups."""
    for name in ("common_step", "step"):
        steps = {count(x, f"{name} of {folder}") for x in _values(common.get("optimizer"), name)}
        if len(steps) == 1:
            return steps.pop()
        if steps:
            raise CheckpointError(f"{folder}: optimizers at different steps, {sorted(steps)}; only one is possible.")
    raise CheckpointError(f"{folder}: {COMMON} does not say how many steps Adam has made.")


def _values(tree: Any, name: str) -> list[Any]:
    if isinstance(tree, dict):
        return [x for key, value in tree.items() for x in ([value] if key == name else _values(value, name))]
    return [x for value in tree for x in _values(value, name)] if isinstance(tree, list) else []


def _narrow(source: Source, weights: str | None, original: Any) -> dict[str, torch.dtype]:
    """Name of each float32 weight that Megatron-Core's model gets in 16 bits → dtype in the model."""
    with_state = [name for group in source.manifest.groups for name in group.parameters]
    tensors = source.reader.tensors()
    dtypes = original if isinstance(original, dict) else {}
    narrow = {}
    for name in with_state:
        dtype = weights or dtypes.get(name) or dtypes.get(_without_number(name))
        saved = tensors.get(f"{MODEL}{name}")
        if (
            isinstance(dtype, str)
            and dtype in WEIGHTS
            and saved is not None
            and saved.properties.dtype == torch.float32
        ):
            narrow[name] = WEIGHTS[dtype]
    return narrow


def _without_number(name: str) -> str:
    match = _LAYER.fullmatch(name)
    return f"{match[1]}.{match[3]}" if match else name


def _stacks(keys: Iterable[str], stacked: bool, folder: Path) -> dict[str, list[str]]:
    """Key of Megatron-Core → keys of this package that it is made of, in the order of layers."""
    stacks: dict[str, dict[int, str]] = {}
    for key in keys:
        match = _LAYER.fullmatch(key) if stacked else None
        stacks.setdefault(_without_number(key) if match else key, {})[int(match[2]) if match else 0] = key
    layers = max((len(parts) for parts in stacks.values()), default=0)
    for key, parts in stacks.items():
        if key not in parts.values() and sorted(parts) != list(range(layers)):
            raise CheckpointError(
                f"{folder}: {key} is not in each of {layers} layers, so they cannot be stacked; give --layers separate."
            )
    return {key: [parts[i] for i in sorted(parts)] for key, parts in stacks.items()}


def _stack(keys: list[str], stacked: bool, reader: SafeReader) -> Tensor:
    if not stacked:
        return reader.whole(keys[0])
    first = reader.whole(keys[0])
    whole = first.new_empty((len(keys), *first.shape))
    for i, key in enumerate(keys):
        layer = reader.whole(key)
        if layer.shape != first.shape or layer.dtype != first.dtype:
            raise CheckpointError(f"{key} is not like {keys[0]}, so they cannot be stacked; give --layers separate.")
        whole[i] = layer
    return whole


def _step_of_all(source: Source) -> dict[str, Any]:
    steps = {float(source.reader.whole(key)) for key in source.reader.tensors() if key.startswith(f"{STATE}step.")}
    if len(steps) > 1:
        raise CheckpointError(
            f"{source.folder}: parameters at different steps, {sorted(steps)}; Megatron-Core has one."
        )
    return {"optimizer": {"state": {"common_step": torch.tensor(steps.pop())}, "param_groups": []}} if steps else {}
