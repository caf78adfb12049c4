"""Optimizer state that Forgather saved, converted to ours."""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..sharding.layout import Layout
from ..sharding.tp_modes import shard_of

_NAMES = {"m": "exp_avg", "v": "exp_avg_sq", "scaled_grad": "update_norm"}
"""Forgather's names of tensors that differ from ours by name alone."""

_SETTINGS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "eps": lambda eps: {"eps": eps[0], "min_scale": eps[1]} if isinstance(eps, list | tuple) else {"eps": eps},
    "decay_rate": lambda rate: {"decay_rate": -rate},
    "relative_step": lambda on: {"multiply_by_parameter_scale": on},
}
"""Forgather's settings of a group that ours have under other names or with another sign."""


def from_forgather_state(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict for ``optimizer.load_state_dict`` from one that Forgather's AdamW, Adafactor or Apollo has saved.

    ====================  =================================  ===================================================
    Forgather             ours                               what changes
    ====================  =================================  ===================================================
    ``m``, ``v``          ``exp_avg``, ``exp_avg_sq``        the name
    ``row``, ``col``      ``row``, ``col``                   sums become means, of the parameter's number of dims
    ``row``, no ``col``   ``v``                              the name
    ``scaled_grad``       ``update_norm``                    the name
    ``projector``         ``projection``                     the matrix of an online PCA; nothing of a random one
    ====================  =================================  ===================================================

    Settings of the groups are taken over, a learning rate also from a tensor. The state of Forgather's generator
    (``sr_generator_state``) is left out: our noise depends on seed and step alone. So is a random projection of APOLLO, which is
    drawn anew: until the next draw, the moments are of another subspace, as after any draw.

    Args:
        optimizer: Our ``AdamWSR``, ``AdafactorSR`` or ``Apollo`` for the same parameters in the same order, not a chain of them;
            not changed. Where its parameters are sharded, this rank's part of each whole state tensor is taken.
        state_dict: What Forgather saved, of whole parameters; not changed. Tensors may be shared with the result.

    Raises:
        ValueError: for an optimizer that does not declare its state; for a state that lacks a part or has one of another shape,
            naming parameter and part; and for groups that do not fit.
    """
    if not hasattr(optimizer, "state_layouts"):
        raise ValueError(
            f"a {type(optimizer).__name__} is none of AdamWSR, AdafactorSR and Apollo; convert for the member of the chain."
        )
    ours = optimizer.state_dict()
    theirs = state_dict["param_groups"]
    sizes = [[len(group["params"]) for group in groups] for groups in (theirs, ours["param_groups"])]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the state has parameter groups of {sizes[0]} parameters and this optimizer of {sizes[1]}; build it with the same "
            f"groups."
        )
    states = {}
    for group, saved, new in zip(optimizer.param_groups, theirs, ours["param_groups"], strict=True):
        new.update(_settings(saved, new))
        for p, old, number in zip(group["params"], saved["params"], new["params"], strict=True):
            if old in state_dict["state"]:
                states[number] = _state(optimizer, p, group, state_dict["state"][old])
    kept = {key: value for key, value in ours.items() if key not in ("state", "projectors", "sr_generator_state")}
    return {**kept, "state": states}


def _settings(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``saved`` that ``ours`` has, too, by our names."""
    converted: dict[str, Any] = {}
    for name, value in saved.items():
        value = float(value) if isinstance(value, Tensor) and name != "params" else value
        # Adafactor alone has settings of another form than ours.
        converted |= _SETTINGS[name](value) if name in _SETTINGS and "min_scale" in ours else {name: value}
    if "beta2_cap" in ours and "betas" in saved:
        converted["beta2_cap"] = saved["betas"][1]
    return {name: value for name, value in converted.items() if name in ours and name not in ("params", "param_names")}


def _state(optimizer: Any, p: Tensor, group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of ``p``, this rank's part of it."""
    lay: Layout = optimizer.layout(p)
    name = optimizer._name(p)
    whole = {_NAMES.get(key, key): value for key, value in saved.items()}
    layouts = optimizer.state_layouts(p, group)
    if {"row", "col"} <= layouts.keys() and whole.get("col") is not None:
        cols = lay.shape[-1]  # each entry of row is a sum over so many entries
        whole |= {"row": whole["row"] / cols, "col": whole["col"] / (prod(lay.shape) // cols)}
    elif "row" in saved and "row" not in layouts:
        whole["v"] = saved["row"]
    if "projection" in layouts:
        whole["projection"] = _projection(saved.get("projector"), lay)
    if missing := [slot for slot in layouts if not isinstance(whole.get(slot), Tensor)]:
        raise ValueError(
            f"{name}: Forgather's state has {sorted(map(str, saved))}, from which {missing} of this optimizer cannot be made; "
            f"convert a state of the same kind of optimizer."
        )
    state = {}
    for slot, layout in layouts.items():
        value = whole[slot]
        if value.numel() != prod(layout.shape):
            raise ValueError(
                f"{name}: Forgather's state for {slot!r} has shape {tuple(value.shape)}, and the whole one is of "
                f"{tuple(layout.shape)} here; convert the state of the whole parameter."
            )
        state[slot] = shard_of(value.reshape(1, *layout.shape), layout)[0]
    return state


def _projection(projector: Any, lay: Layout) -> Tensor | None:
    """The (d, rank) matrix of an online PCA, which is kept transposed where columns are projected."""
    a = getattr(projector, "A", None)
    return a if a is None or lay.shape[-2] < lay.shape[-1] else a.mT
