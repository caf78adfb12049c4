"""Resuming from what another run saved: with another learning rate, layer-wise or not, or by Megatron-Core's own optimizer.

Megatron-Core finds a saved parameter group by its settings, the learning rate among them, and its place by the structure of
the optimizer that saved it. Where ours is in a chain, groups are found by what they are for, wherever they stand.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from .settings import flags
from .upstream import CHAIN, DISTRIBUTED, LAYER_WISE, MAPPING, lookup, patch

HERE = "shardstep"
"""Key under which this run's part stands while a checkpoint is loaded, out of the way of how the saved one was built."""

RATES = ("max_lr", "min_lr")
"""Settings of a parameter group that may be others than the saved ones: this run's hold."""

_OURS: WeakSet[Optimizer] = WeakSet()
_SHARDING, _RESHARDABLE = "distrib_optim_sharding_type", "fully_reshardable"
_MAIN, _TYPE = "fp32_from_fp16_params", "param_state_sharding_type"


def resumes[T: Optimizer](optimizer: T) -> T:
    """Register ``optimizer`` as one of ours, so that chains that hold it load what other runs saved; returns it."""
    _OURS.add(optimizer)
    return optimizer


def resume_across() -> None:
    """Let Megatron-Core's chains that hold one of ours load what other runs saved. A second call changes nothing."""
    for cls in (f"{CHAIN}:ChainedOptimizer", f"{LAYER_WISE}:LayerWiseDistributedOptimizer"):
        patch(cls, "sharded_state_dict", partial(_outermost, _shown))
        patch(cls, "load_state_dict", partial(_outermost, _loaded))


_inside: ContextVar[bool] = ContextVar("_inside", default=False)


def _outermost(ours: Callable[..., Any], original: Callable[..., Any], chain: Any, *args: Any, **kwargs: Any) -> Any:
    """``ours`` for a chain with one of our optimizers; Megatron-Core's own for all others, and for chains inside of it."""
    if _inside.get() or not any(_is_ours(member) for member in _members(chain)):
        return original(chain, *args, **kwargs)
    before = _inside.set(True)
    try:
        return ours(chain, partial(original, chain), *args, **kwargs)
    finally:
        _inside.reset(before)


def _members(chain: Any) -> Iterator[Any]:
    for member in chain.chained_optimizers:
        yield from _members(member) if hasattr(member, "chained_optimizers") else (member,)


def _is_ours(member: Any) -> bool:
    return getattr(member, "optimizer", None) in _OURS


def _is_distributed(member: Any) -> bool:
    (cls,) = lookup(DISTRIBUTED, "DistributedOptimizer")
    return isinstance(member, cls)


def _parts(chain: Any, state: Any) -> Iterator[tuple[Any, Any]]:
    """Each optimizer of ``chain`` that steps, with its part of ``state``."""
    members = chain.chained_optimizers
    if len(members) > 1 and len(state) != len(members):
        raise ValueError(
            f"a state dict of {len(state)} optimizers was given to a chain of {len(members)}; resume with the flags that it was "
            f"saved with, or save in the torch_dist format, which other runs can load."
        )
    for i, member in enumerate(members):
        part = state if len(members) == 1 else state[i]
        yield from _parts(member, part) if hasattr(member, "chained_optimizers") else ((member, part),)


def _shown(
    chain: Any, theirs: Callable[..., Any], model_sharded_state_dict: Any, is_loading: bool = False, **kwargs: Any
) -> Any:
    """Megatron-Core's ``sharded_state_dict``; a state dict that is to be loaded into stands under a key of its own."""
    if not is_loading:
        return theirs(model_sharded_state_dict, is_loading, **kwargs)
    (local,) = lookup(MAPPING, "LocalNonpersistentObject")
    metadata = dict(kwargs.pop("metadata", None) or {})
    if any(_is_distributed(member) for member in _members(chain)):
        # A plain run's checkpoint names no format; this one has its keys.
        metadata.setdefault(_SHARDING, _RESHARDABLE)
    state = theirs(model_sharded_state_dict, is_loading, metadata=metadata, **kwargs)
    for _, part in _parts(chain, state):
        if isinstance(part.get(_MAIN), list):
            # Megatron-Core loses the empty lists of groups without parameters here, and takes the next group for them.
            part[_MAIN] = dict(enumerate(part[_MAIN]))
        if _TYPE in part:
            part[_TYPE] = local(part[_TYPE])
    return {HERE: state}


def _loaded(chain: Any, theirs: Callable[..., Any], state_dict: Any) -> None:
    """Megatron-Core's ``load_state_dict``, which finds the saved settings of each group wherever they stand.

    Raises:
        ValueError: before anything is changed, for a group that has no counterpart among the saved ones.
    """
    saved = list(_saved_groups(state_dict))
    shown = isinstance(state_dict, dict) and HERE in state_dict
    state = state_dict[HERE] if shown else state_dict
    parts = list(_parts(chain, state))
    found = [[_counterpart(group, saved) for group in member.param_groups] for member, _ in parts]
    for (member, part), groups in zip(parts, found, strict=True):
        _fill(member, part, groups, shown=shown)
    theirs(state)
    if flags().get("use_checkpoint_opt_param_scheduler"):
        for (member, _), groups in zip(parts, found, strict=True):
            for group, settings in zip(member.param_groups, groups, strict=True):
                group.update({key: settings[key] for key in (*RATES, "lr") if key in settings})


def _saved_groups(state: Any) -> Iterator[dict[str, Any]]:
    """The settings of all parameter groups in a loaded state dict, with the ``step`` that their parameters have in common."""
    if isinstance(state, Mapping):
        if "param_groups" in state:
            step = (state.get("state") or {}).get("common_step")
            for group in state["param_groups"]:
                if settings := {k: v for k, v in group.items() if k != "params"}:
                    yield settings if step is None else {**settings, "step": step}
        else:
            for value in state.values():
                yield from _saved_groups(value)
    elif isinstance(state, Sequence) and not isinstance(state, str):
        for value in state:
            yield from _saved_groups(value)


def _counterpart(group: Mapping[str, Any], saved: list[dict[str, Any]]) -> dict[str, Any]:
    """The saved settings of the parameters of ``group``."""
    (theirs,) = lookup(CHAIN, "param_group_identifier_keys")
    keys = tuple(dict.fromkeys((*theirs, "optimizer", *RATES)))  # 0.18 has the last ones in the groups, not in these
    wanted = _identity(group, keys)
    fixed = [i for i, key in enumerate(keys) if key not in RATES]
    near = [other for other in saved if all(_identity(other, keys)[i] == wanted[i] for i in fixed)]
    candidates = [other for other in near if _identity(other, keys) == wanted] or near
    if not candidates:
        raise ValueError(
            f"the checkpoint has no parameter group with {_said(group, keys)}; it has {_listed(saved, keys)}. Give this run the "
            f"same settings per parameter (weight decay of biases, decoupled learning rate), or leave the optimizer's state out "
            f"with --no-load-optim."
        )
    first = candidates[0]
    if any(_without_rates(other) != _without_rates(first) for other in candidates[1:]):
        raise ValueError(
            f"the checkpoint has {len(candidates)} parameter groups with {_said(group, keys)} that differ in more than their "
            f"learning rates, and which one is meant cannot be told; resume with the learning rates that it was saved with."
        )
    return first


def _identity(group: Mapping[str, Any], keys: Sequence[str]) -> tuple[Any, ...]:
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in keys)


def _without_rates(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in (*RATES, "lr")}


def _said(group: Mapping[str, Any], keys: Sequence[str]) -> str:
    values = zip(keys, _identity(group, keys), strict=True)
    return ", ".join(f"{key}={value}" for key, value in values if value is not None and key not in RATES)


def _listed(groups: list[dict[str, Any]], keys: Sequence[str]) -> str:
    return "; ".join(dict.fromkeys(_said(group, keys) for group in groups)) or "none"


def _fill(member: Any, part: dict[str, Any], groups: list[dict[str, Any]], *, shown: bool) -> None:
    """Put the settings ``groups`` into ``part``, as ``member`` looks for them."""
    (plain,) = lookup(CHAIN, "FP32Optimizer")
    inner = part if isinstance(member, plain) else part.setdefault("optimizer", {})
    given = inner.get("param_groups") or [{} for _ in groups]
    step = next((group["step"] for group in groups if group.get("step") is not None), None)
    settings = [_settings(member, *pair) for pair in zip(member.param_groups, groups, strict=True)]
    if _keeps_step_in_groups(member) and step is not None:
        settings = [{**group, "step": int(step)} for group in settings]
    inner["param_groups"] = [
        {**group, **({"params": old["params"]} if "params" in old else {})}
        for group, old in zip(settings, given, strict=True)
    ]
    if shown and not _is_distributed(member):
        state = inner.setdefault("state", {})
        if step is not None and not _keeps_step_in_groups(member):
            state["common_step"] = (
                step if isinstance(step, Tensor) else torch.tensor(float(step), dtype=torch.float32, device="cpu")
            )
        if hasattr(member, "fp32_from_float16_groups"):
            main = part.get(_MAIN, {})
            part[_MAIN] = [main.get(i, []) for i in range(len(groups))]


def _settings(member: Any, group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for ``group``: the saved ones, with this run's learning rates where they differ."""
    now = {key: value for key, value in group.items() if key != "params"}
    if not _is_ours(member):
        now.update({key: value for key, value in saved.items() if key != "step"})
    else:
        now.update({key: value for key, value in saved.items() if key in now})
    if any(saved.get(key) != group.get(key) for key in RATES):
        now.update({key: group[key] for key in (*RATES, "lr") if key in group})
    return now


def _keeps_step_in_groups(member: Any) -> bool:
    """Whether ``step`` is a setting of a group: with the distributed optimizer, and Transformer Engine's or Apex's Adam."""
    return _is_distributed(member) or not (_is_ours(member) or type(member.optimizer).__module__.startswith("torch."))
