"""Converts a file of ``torch.save`` to a checkpoint, and a checkpoint to such a file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.checkpoint import CheckpointError, extra_state
from core.checkpoint.contents import MODEL, STATE, Group, base_of, parameter_of
from core.checkpoint.manifest import Manifest, config_digest
from core.checkpoint.plain import copied

from ..usage import UsageError
from .source import Source, count, harmless
from .writer import Writer

SLOTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
"""Slots of the state of torch's optimizers that have the same meaning in this package."""
ONE_PROCESS: dict[str, Any] = {"layout": {"pp": 1, "dp": 1, "tp": 1}, "ranks": [[0, 0, 0]]}


def from_torch(path: Path, directory: str, files: int) -> tuple[Path, list[str]]:
    """Write a checkpoint of what ``path`` holds: ``{"model": state_dict, "optimizer": state_dict}``, or a state_dict alone.

    Returns:
        The new folder, and notes on what is not in it.

    Raises:
        UsageError: ``path`` is not a file.
        CheckpointError: The file could execute code, holds something else, or holds an optimizer whose state is not known.
    """
    if not path.is_file():
        raise UsageError("SRC", path, "is not a file", possible="what torch.save wrote")
    content = harmless(path, str(path))
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a state_dict is needed.")
    is_model = not isinstance(content.get("model"), Mapping)
    model, entries = (content, {}) if is_model else (content["model"], content)
    kept = {name: x for name, x in model.items() if str(name).rpartition(".")[2] == extra_state.NAME}
    model = {name: x for name, x in model.items() if name not in kept}
    if odd := [str(name) for name, x in model.items() if not _is_dense(x) or not isinstance(name, str)]:
        raise CheckpointError(
            f"{path}: {', '.join(odd[:3])} of the model is no ordinary tensor; a state_dict is needed."
        )
    model, tied = _once(model)
    optimizer = entries.get("optimizer")
    groups, state = ([], {}) if optimizer is None else _optimizer(optimizer, model, str(path))
    steps = [count(x, key) for key, x in state.items() if key.startswith(f"{STATE}step.")]
    step = count(entries.get("step", max(steps, default=0)), f"step of {path}")
    with Writer(directory, step, files) as writer:
        for name, x in model.items():
            writer.add(f"{MODEL}{name}", x)
        for name, value in kept.items():
            writer.add(*_extra_state(name, value, str(path)))
        for key, x in state.items():
            writer.add(key, x)
        writer.add_common({"iteration": step})
        made = writer.commit(
            Manifest(
                step=step,
                consumed_samples=count(entries.get("consumed_samples", 0), f"consumed_samples of {path}"),
                optimizers=sorted({group.optimizer for group in groups}),
                groups=groups,
                schedule=_entry(entries, "schedule", path),
                extra=_entry(entries, "extra", path) or {},
                config=config_digest(groups),
                **ONE_PROCESS,
            )
        )
    return made, [f"{other} is {name}, and is written once" for other, name in tied.items()]


def to_torch(source: Source, path: Path) -> list[str]:
    """Write a checkpoint as one file, with the state under its parameter's name; returns the keys that were left out.

    ``torch.load(weights_only=True)`` reads the file. All tensors are in memory at the same time.

    Raises:
        UsageError: ``path`` already exists.
        CheckpointError: The file cannot be written.
    """
    if path.exists():
        raise UsageError("DST", path, "is there already", hint="give the name of a new file")
    model: dict[str, Any] = {}
    state: dict[str, dict[str, Tensor]] = {}
    left_out = list(source.reader.objects())
    for key in source.reader.tensors():
        if key.startswith(MODEL):
            model[key.removeprefix(MODEL)] = source.reader.whole(key)
        elif key.startswith(STATE) and base_of(key) == (key, 0):
            name = parameter_of(key)
            slot = key.removeprefix(STATE).removesuffix(f".{name}")
            state.setdefault(name, {})[slot] = source.reader.whole(key)
        elif key.startswith(extra_state.PREFIX) and extra_state.is_of_all_ranks(key):
            name = f"{key.removeprefix(extra_state.PREFIX)}.{extra_state.NAME}".removeprefix(".")
            model[name] = extra_state.unpacked(source.reader.whole(key))
        else:
            left_out.append(key)
    manifest = source.manifest
    groups = [{"params": g.parameters, "optimizer": g.optimizer, **g.settings} for g in manifest.groups]
    whole = {
        "model": model,
        "optimizer": {"state": state, "param_groups": groups},
        **{name: getattr(manifest, name) for name in ("step", "consumed_samples", "schedule", "extra")},
    }
    partial = path.with_name(f"{path.name}.tmp")
    try:
        torch.save(whole, partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch's own writer raises the latter when a disk is full
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error}") from None
    return left_out


def _once(model: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, each once, and for tensors that have two names the second name → the first."""
    first: dict[Any, str] = {}
    tied = {}
    for name, x in model.items():
        place: Any = (x.data_ptr(), x.dtype, x.shape, x.stride()) if x.numel() else name
        if first.setdefault(place, name) != name:
            tied[name] = first[place]
    return {name: x for name, x in model.items() if name not in tied}, tied


def _optimizer(state_dict: Any, model: Mapping[str, Tensor], where: str) -> tuple[list[Group], dict[str, Tensor]]:
    """The groups, and key → state, from the state_dict of an optimizer of torch or from what :func:`to_torch` wrote."""
    if not _is_state_dict(state_dict):
        raise CheckpointError(f'{where}: "optimizer" is not the state_dict of an optimizer.')
    listed = state_dict["param_groups"]
    names = _names(listed, model, where)
    groups = []
    for group in listed:
        settings = {
            name: x.item() if isinstance(x, Tensor) and x.numel() == 1 else x
            for name, x in group.items()
            if name not in ("params", "param_names", "optimizer")
        }
        groups.append(Group(_class(group, where), _json(settings, where), [names[i] for i in group["params"]]))
    ours = all("optimizer" in group for group in listed)  # then every slot is one of ours, of any shape
    out = {}
    for i, of_parameter in state_dict["state"].items():
        for slot, x in of_parameter.items():
            if x is None:
                continue  # SGD's without momentum
            name = names.get(i)
            if name is None or not _is_dense(x) or not (ours or slot in SLOTS):
                raise CheckpointError(
                    f"{where}: {slot} of parameter {i} is not known; possible: {', '.join(SLOTS)}, tensors of parameters "
                    f"that are in a group."
                )
            if slot != "step" and not ours and x.shape != model[name].shape:
                raise CheckpointError(
                    f"{where}: {slot} of parameter {i} is {tuple(x.shape)}, but {name} is {tuple(model[name].shape)}: the "
                    f"optimizer was not made from parameters in the order of this model."
                )
            out[f"{STATE}{slot}.{name}"] = x
    return groups, out


def _is_state_dict(value: Any) -> bool:
    def is_dict(x: Any, kind: Any = str) -> bool:
        return isinstance(x, dict) and all(isinstance(key, kind) for key in x)

    def is_group(group: Any) -> bool:
        if not is_dict(group) or not isinstance(group.get("params"), list):
            return False
        ids, names = group["params"], group.get("param_names", [""] * len(group["params"]))
        return all(isinstance(i, int | str) for i in ids) and isinstance(names, list) and len(names) == len(ids)

    return (
        is_dict(value)
        and isinstance(value.get("param_groups"), list)
        and all(map(is_group, value["param_groups"]))
        and is_dict(value.get("state"), int | str)
        and all(map(is_dict, value["state"].values()))
    )


def _is_dense(x: Any) -> bool:
    """Whether ``x`` is an ordinary dense tensor on the CPU."""
    dense = isinstance(x, Tensor) and x.layout is torch.strided and x.device.type == "cpu"
    return dense and not x.is_quantized and not x.is_nested


def _entry(entries: Mapping[str, Any], name: str, path: Path) -> dict[str, Any] | None:
    value = entries.get(name)
    return None if value is None else _plain(value, name, str(path))


def _plain(value: Any, name: str, where: str) -> dict[str, Any]:
    try:
        copy = copied(name, value)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: {error}") from None
    if not isinstance(copy, dict):
        raise CheckpointError(f"{where}: {name} is a {type(copy).__name__}; a dict is needed.")
    return copy


def _json(settings: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        copy: dict[str, Any] = json.loads(json.dumps(settings))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: the settings of a parameter group cannot be kept: {error}.") from None
    return copy


def _extra_state(name: str, value: Any, where: str) -> tuple[str, Tensor]:
    """Key and bytes of a module's extra state, which a state_dict calls ``name``."""
    try:
        return f"{extra_state.PREFIX}{name.removesuffix(extra_state.NAME).removesuffix('.')}", extra_state.packed(
            name, value
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: {error}") from None


def _names(listed: Sequence[Mapping[str, Any]], model: Mapping[str, Tensor], where: str) -> dict[int | str, str]:
    """Number of a parameter in the state_dict of the optimizer → name of the parameter."""
    names: dict[int | str, str] = {}
    for group in listed:
        ids = group["params"]
        if all(isinstance(i, str) for i in ids):
            names |= {i: i for i in ids}
        elif "param_names" in group:
            names |= dict(zip(ids, group["param_names"], strict=True))
        elif len(listed) == 1 and len(ids) == len(model):
            names |= dict(zip(ids, model, strict=True))
        else:
            count = sum(len(group["params"]) for group in listed)
            raise CheckpointError(
                f"{where}: the optimizer counts its {count} parameters in {len(listed)} groups, and which of the model's "
                f"{len(model)} tensors they are is not said. Give names to the optimizer (model.named_parameters()) before it "
                f"is saved, or convert the model alone."
            )
    if lost := [name for name in names.values() if not isinstance(name, str) or name not in model]:
        raise CheckpointError(f"{where}: the optimizer has {lost[0]}, which is not in the model.")
    return names


def _class(group: Mapping[str, Any], where: str) -> str:
    """Name of this package's class for the group's optimizer, which is recognized by settings that only it has."""
    if isinstance(group.get("optimizer"), str):
        return str(group["optimizer"])
    if "ns_steps" in group:
        return "TensorParallelMuon"
    if "dampening" in group:
        return "SGD"
    if "amsgrad" in group and "decoupled_weight_decay" in group and not group["amsgrad"]:
        return "AdamW" if group["decoupled_weight_decay"] else "Adam"
    raise CheckpointError(
        f"{where}: an optimizer with the settings {', '.join(sorted(group))} is not known; possible: torch's Adam and AdamW "
        f"without amsgrad, SGD and Muon. Convert the model alone."
    )
