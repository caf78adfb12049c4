"""A copy of an optimizer for one whole parameter: the same class and settings, without process groups."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import engine
from ..sharding.tp_modes import AUTO
from .steps.base import ShardedStep
from .steps.global_clip import GlobalClip
from .steps.stacked import StackedStep


def unsharded(
    optimizer: Optimizer, group: dict[str, Any], name: str, p: nn.Parameter, state: dict[str, Any]
) -> Optimizer:
    """An optimizer of ``p`` alone that does what ``optimizer`` does for a parameter of ``group``.

    Args:
        optimizer: The optimizer whose class and settings are taken; it is not changed.
        group: One of its parameter groups, which is copied.
        name: Name of the parameter, by which randomness is keyed.
        p: The whole parameter, with its gradient; the copy steps it in place.
        state: State of the whole parameter, which is copied.
    """
    # A constructor would need arguments that nobody kept; these optimizers refuse copies only of their groups and state.
    copy: Any = object.__new__(type(optimizer))
    vars(copy).update(vars(optimizer))
    settings = {k: v.clone() if isinstance(v, Tensor) else v for k, v in group.items()}
    copy.param_groups = [{**settings, "params": [p], "param_names": [name]}]
    copy.state = defaultdict(dict, {p: state})
    if isinstance(copy, ShardedStep):
        copy.prepare(None)
        if getattr(copy, "tp_mode", None) == AUTO:
            copy.tp_mode = "duplicated"  # type: ignore[attr-defined]
        copy.take_state()
    return copy  # type: ignore[no-any-return]


@torch.no_grad()
def step_unsharded(copy: Optimizer, original: Optimizer) -> None:
    """Step ``copy``, which :func:`unsharded` made of ``original``, after ``original`` has taken the same step.

    An optimizer that scales by a norm over the model takes that of ``original``, because a copy knows one parameter only.
    """
    if not isinstance(copy, ShardedStep):
        copy.step()
        return
    clips = isinstance(copy, GlobalClip) and copy.max_norm is not None
    if isinstance(copy, GlobalClip) and isinstance(original, GlobalClip):
        copy.scale = original.scale
    engine.run(StackedStep.updates(copy) if clips else copy.updates())  # type: ignore[arg-type]
