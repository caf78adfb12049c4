"""What an optimizer knows about its parameters, kept true while others replace its state, groups and parameters.

``torch.optim`` lets everybody assign ``state`` and ``param_groups``, change the lists and dicts in them, and load a state with
hooks that rewrite it. So before each step an optimizer compares what it has made of its parameters with what is there now.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...sharding.parameter_layout import local
from ..members import members_of

StateChange = Callable[[], None]
"""Makes or takes over state of one parameter or bucket, in place."""

Fingerprint = tuple[tuple[int, ...], ...]

_NOT_A_SETTING = {"differentiable"}
"""Keys that torch puts into ``defaults`` after the groups were made."""


def make_ready(members: Sequence[Any]) -> None:
    """Check all that a step needs, then make missing state and take over state that somebody put there.

    Args:
        members: Optimizers; those that are not of this package are left alone.

    Raises:
        ValueError: before anything is changed, for gradients, groups or state that do not fit.
    """
    changes = pending(members)
    for member in _ours(members):
        member.check_step()
    apply(changes)
    for member in _ours(members):
        member.has_stepped = True


def pending(members: Sequence[Any]) -> list[StateChange]:
    """What must be done to the state of ``members`` before a step; empty in an ordinary step.

    Raises:
        ValueError: for groups or state that do not fit.
    """
    for member in _ours(members):
        member.check_groups()
    return [
        change for member in _ours(members) for group in member.param_groups for change in member.state_changes(group)
    ]


@torch.no_grad()
def apply(changes: Sequence[StateChange]) -> None:
    """Make all ``changes``."""
    for change in changes:
        change()


def _ours(members: Sequence[Any]) -> Iterator[Any]:
    return (member for member in members if hasattr(member, "state_changes"))


def fingerprint(groups: Sequence[dict[str, Any]]) -> Fingerprint:
    """Numbers that differ when another group, or another parameter in a group, stands somewhere in ``groups``.

    The caller keeps groups and parameters alive, so that no later object has the number of an earlier one.
    """
    return tuple((id(group), *map(id, group["params"])) for group in groups)


def check_settings(optimizer: Any) -> None:
    """Raise ValueError for a parameter group that lacks a setting, as one may that did not come through ``add_param_group``."""
    needed = optimizer.defaults.keys() - _NOT_A_SETTING
    for k, group in enumerate(optimizer.param_groups):
        if not needed <= group.keys():
            raise ValueError(
                f"parameter group {k} of {type(optimizer).__name__} lacks the settings {sorted(needed - group.keys())}; "
                f"put them in, or add the group with add_param_group, which fills them in."
            )


def keep_names(groups: Sequence[dict[str, Any]], known: MutableMapping[Tensor, str]) -> None:
    """Let ``param_names`` of each group follow its parameters; mutates both arguments.

    Somebody who shortens or reorders ``group["params"]`` may forget the names beside them.

    Args:
        groups: Parameter groups; those without ``param_names`` are left alone.
        known: Parameter → its name, of all parameters that were ever seen.
    """
    for group in groups:
        if "param_names" not in group:
            continue
        params, given = group["params"], group["param_names"]
        at_place = given if len(given) == len(params) else [f"parameter of shape {tuple(p.shape)}" for p in params]
        names = [known.setdefault(p, name) for p, name in zip(params, at_place, strict=True)]
        if names != given:
            group["param_names"] = names


def refuse_part(name: str, held: Mapping[str, Any], slots: Sequence[str]) -> None:
    """Refuse the state ``held`` of the parameter called ``name`` if it has some of ``slots`` and not the others.

    Raises:
        ValueError: because zeros in their place would be the step of another optimizer, or of another time.
    """
    if held and (missing := [slot for slot in slots if slot not in held]):
        raise ValueError(
            f"{name}: its state has {sorted(map(str, held))} but lacks {missing}; give it the whole state of this optimizer, "
            f"or none, with which it begins anew."
        )


def as_tensor(name: str, slot: str, value: Any) -> Tensor:
    """``value`` as a tensor, which a number of an older state may not be yet.

    Raises:
        ValueError: for anything that is neither.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, bool | int | float):
        return torch.tensor(value, dtype=torch.float64, device="cpu")
    raise ValueError(f"{name}: state {slot!r} is {type(value).__name__}; give a tensor or a number.")


def fitting(
    name: Callable[[], str],
    slot: str,
    value: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    reshapes: bool,
) -> Tensor:
    """``value`` as the state ``slot`` that an optimizer declares: itself, or a copy where it has another dtype or device.

    Args:
        name: Returns the name of the parameter; called for an error only.
        slot: Name of the state.
        value: A tensor, a DTensor or a number.
        shape: Shape that this rank keeps.
        dtype: Dtype that the optimizer keeps.
        device: Device that the optimizer keeps it on.
        reshapes: Whether a single entry may have another shape, as a count of steps of another version has.

    Raises:
        ValueError: when it has another shape, or is no number.
    """
    present = value if isinstance(value, Tensor) else as_tensor(name(), slot, value)
    held = local(present)
    if held.shape != shape:
        if not reshapes or (held.numel(), prod(shape)) != (1, 1):
            raise ValueError(
                f"{name()}: state {slot!r} has shape {tuple(held.shape)} but this rank keeps {tuple(shape)} of it; load a "
                f"state of the same optimizer and layout, with groups added in the same order, or reshard it first."
            )
        present = held.reshape(shape)
    return present.to(device=device, dtype=dtype).contiguous()


@contextmanager
def without_gone(optimizer: Any) -> Iterator[None]:
    """Hide, in this context, the state of parameters that are in no group any longer, for which torch has no number."""
    every = optimizer.state
    present = {id(p) for group in optimizer.param_groups for p in group["params"]}
    kept = {p: held for p, held in every.items() if not isinstance(p, Tensor) or id(p) in present}
    if len(kept) == len(every):
        yield
        return
    optimizer.state = defaultdict(dict, kept)
    try:
        yield
    finally:
        optimizer.state = every


def load_state(optimizer: Any, state_dict: dict[str, Any], load: Callable[[dict[str, Any]], None]) -> None:
    """Load ``state_dict`` into ``optimizer``; what does not fit is refused, and state and groups are then as before.

    Hooks decide as torch documents: pre-hooks about what is loaded, and post-hooks about what it becomes.

    Args:
        optimizer: An optimizer of this package, or a chain of optimizers.
        state_dict: State dict of such an optimizer.
        load: torch's own ``load_state_dict``.
    """
    before = optimizer.state, optimizer.param_groups
    given: list[dict[str, Any]] = []
    taken = False

    def take(_: Any) -> None:
        nonlocal taken
        _fill_settings(optimizer)
        _put_exactly(optimizer, given[0])
        apply(pending(members_of(optimizer)))
        taken = True

    # The pre-hook is the last one and the post-hook is the first, so that those of others work on what is really loaded.
    hooks = [
        optimizer.register_load_state_dict_pre_hook(lambda _, final: given.append(final)),
        optimizer.register_load_state_dict_post_hook(take, prepend=True),
    ]
    try:
        load(state_dict)
    except Exception:
        if not taken:
            optimizer.__setstate__({"state": before[0], "param_groups": before[1]})
        raise
    finally:
        for hook in hooks:
            hook.remove()
    apply(pending(members_of(optimizer)))


def _fill_settings(optimizer: Any) -> None:
    """Give groups that an older version saved the settings that it did not have; mutates the groups."""
    for member in _ours(members_of(optimizer)):
        for group in member.param_groups:
            for name, value in member.defaults.items():
                group.setdefault(name, value)


def _put_exactly(optimizer: Any, given: dict[str, Any]) -> None:
    """Put copies of the declared tensors of ``given`` into the state, where torch has put them cast to the parameter's dtype."""
    ids = [i for group in given["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    number = {id(p): i for i, p in zip(ids, params, strict=True)}
    for member in _ours(members_of(optimizer)):
        for group in member.param_groups:
            for p in group["params"]:
                saved = given["state"].get(number[id(p)])
                for slot in member.state_layouts(p, group) if saved else ():
                    if isinstance(saved.get(slot), Tensor):
                        optimizer.state[p][slot] = saved[slot].detach().clone()
