"""Compares the optimizer state in a Megatron-Core checkpoint with what this run keeps, before anything is read."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from ..checkpoint.together import CheckpointError, GroupOrDefault, joined
from .resume import HERE
from .sharded_state import OWNERS_STEP
from .upstream import LOADING, lookup, patch

_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.([^.]+)\.(.+)")
_BUCKETS = re.compile(r"(?:chained_\d+\.)?optimizer\.distributed\.")
_MAIN = "fp32_param"
_ALSO = {"param": _MAIN}
"""Names that the distributed optimizer has for the same state."""


class Slot(NamedTuple):
    """One state tensor of one parameter, all layers of it together."""

    parameter: str
    name: str


def check_before_loading() -> None:
    """Let Megatron-Core's ``load`` compare first, where one of ours is loaded. A second call changes nothing."""
    patch(LOADING, "load", _load)


def _load(theirs: Callable[..., Any], sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
    """Megatron-Core's ``load``, after the comparison.

    Raises:
        CheckpointError: on all ranks, when a state dict with one of ours asks for state that the checkpoint does not have, or
            has other state for the same parameters.
    """
    ours = list(_ours(sharded_state_dict))
    if ours:
        (metadata,) = lookup(LOADING, "load_tensors_metadata")
        shapes = {key: tuple(tensor.global_shape) for key, tensor in metadata(checkpoint_dir).items()}
        tensors = [place for tree in ours for place in _tensors(tree)]
        weights = {x.key for *_, x in _tensors(sharded_state_dict) if getattr(x.data, "dtype", None) == torch.float32}
        _fit(tensors, weights, shapes, checkpoint_dir, kwargs.get("process_group"))
    return theirs(sharded_state_dict, checkpoint_dir, *args, **kwargs)


def _ours(state: Any) -> Iterator[Any]:
    if isinstance(state, dict):
        for key, value in state.items():
            yield from (value,) if key == HERE else _ours(value)


def slot_of(key: str) -> Slot | None:
    """The state tensor that has this key in a checkpoint; None for a key that is no state of a parameter."""
    match = _STATE.fullmatch(key)
    return match and Slot(match[2], _ALSO.get(match[1], match[1]))


type _Place = tuple[Any, Any, Any]
"""Container, key in it, and what is there: a tensor that is to be loaded."""


def _tensors(state: Any) -> Iterator[_Place]:
    """The tensors that are to be loaded and have a key in the checkpoint."""
    for at, value in list(state.items() if isinstance(state, dict) else enumerate(state)):
        if isinstance(value, dict | list):
            yield from _tensors(value)
        elif hasattr(value, "key") and hasattr(value, "data"):
            yield state, at, value


def _fit(
    tensors: list[_Place], weights: set[str], found: dict[str, tuple[int, ...]], where: Any, group: GroupOrDefault
) -> None:
    """Give ``tensors`` the keys that the checkpoint has; mutates them, and leaves out of their containers what can be missing.

    Those are the count of steps, which all parameters may have in common, and copies of ``weights`` that are in float32 anyway.
    """
    places = {slot: key for key in sorted(found) if (slot := slot_of(key))}
    wanted = [(slot, *place) for place in tensors if (slot := slot_of(place[2].key))]
    needed = {x for x, *_ in wanted if x.name != OWNERS_STEP and not (x.name == _MAIN and x.parameter in weights)}
    buckets = [x for *_, x in tensors if _BUCKETS.match(x.key) and hasattr(x, "local_shape")]
    unfit = [x.key for x in buckets if found.get(x.key) != tuple(x.global_shape)]
    if joined(unfit, group):
        raise CheckpointError(_of_buckets(where, "the run that saved it"))
    _compare(set(joined(needed, group)), found.keys(), places, where)
    for slot, container, at, tensor in wanted:
        if slot in places:
            tensor.key = places[slot]
        else:
            del container[at]


def _of_buckets(where: Any, what: str) -> str:
    return (
        f"{where} holds state of {what} in the distributed optimizer's own buckets (dp_reshardable), which only the same "
        f"optimizer on the same tensor- and pipeline-parallel sizes can read. Resume there once, save with "
        f"--dist-ckpt-optim-fully-reshardable, and load that; or leave the state out with --no-load-optim."
    )


def _compare(needed: set[Slot], found: Collection[str], places: Mapping[Slot, str], where: Any) -> None:
    """Raise CheckpointError unless the checkpoint has just what is ``needed`` of each parameter."""
    kept, saved = _by_parameter(needed), _by_parameter(places)
    other = [name for name in sorted(kept) if kept[name] != saved.get(name, set())]
    mains = sorted(slot.parameter for slot in needed if slot.name == _MAIN and slot not in places)
    if not other and not mains:
        return
    bucketed = any(map(_BUCKETS.match, found))
    if not saved and not bucketed:
        raise CheckpointError(f"{where} has no state of an optimizer; start it anew with --no-load-optim.")
    first = other[0] if other else mains[0]
    if bucketed and not saved.get(first):
        raise CheckpointError(_of_buckets(where, first))
    if not other:
        raise CheckpointError(
            f"{where} was saved by a run in float32: it has no float32 copy of {first} beside the weight, which this run needs. "
            f"Resume in float32, or leave the optimizer's state out with --no-load-optim."
        )
    raise CheckpointError(
        f"{where} has other state than this run's optimizer keeps, for {len(other)} of {len(kept)} parameters: of {first} it "
        f"has {_said(saved.get(first))}, and {_said(kept[first])} is needed. Resume with the optimizer and the settings "
        f"that it was saved with, or leave the state out with --no-load-optim."
    )


def _by_parameter(slots: Iterable[Slot]) -> dict[str, set[str]]:
    """Parameter → names of its state, without what Megatron-Core keeps for itself or for all parameters together."""
    names: dict[str, set[str]] = {}
    for slot in slots:
        names.setdefault(slot.parameter, set()).update({slot.name} - {_MAIN, OWNERS_STEP})
    return names


def _said(names: set[str] | None) -> str:
    return ", ".join(sorted(names or ())) or "nothing"
