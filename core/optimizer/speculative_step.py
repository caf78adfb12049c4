"""A step that is taken before all ranks know whether it is valid, and undone if it is not."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..eager import runs_eagerly
from ..sharding.parameter_layout import local
from .chained import ChainedOptimizer
from .steps.bookkeeping import make_ready
from .steps.global_clip import GlobalClip


class SpeculativeStep:
    """Takes a step of ``optimizer`` that :meth:`undo` reverts, bit for bit.

    Whether a step is valid and how its gradients are clipped depends on all ranks, by the global norm. A pipeline stage whose
    backward is done would have to wait for that norm. Instead it steps at once, as if nothing were clipped, and repeats the
    step if that was wrong::

        ahead = SpeculativeStep(optimizer)
        ahead.step()                     # in the pipeline's bubble
        norm = optimizer.clip_grad_norm_(1.0)  # waits for the other stages
        if clip_factor(torch.tensor(norm, dtype=torch.float64), 1.0) < 1:
            ahead.undo()
            optimizer.step()

    The next forward pass must not begin before the norm is known. From the first step on, this takes the memory of a second
    copy of this rank's parameters and state.

    Args:
        optimizer: The optimizer of one pipeline stage.

    Raises:
        ValueError: when the optimizer itself scales by a norm over several stages.
    """

    def __init__(self, optimizer: ChainedOptimizer) -> None:
        for name, member in optimizer.members.items():
            if isinstance(member, GlobalClip) and member.max_norm is not None and _stages(optimizer) > 1:
                raise ValueError(
                    f"{name} itself scales by a norm over all pipeline stages (max_norm={member.max_norm}), so no stage can "
                    f"step before the others. Turn that norm off (max_norm None) and clip gradients instead."
                )
        self._optimizer = optimizer
        self._copies: list[Tensor] = []
        self._taken = False

    @runs_eagerly
    @torch.no_grad()
    def step(self) -> None:
        """Take the step; mutates parameters and state."""
        make_ready(self._optimizer.optimizers)  # the state that is copied is the state that the step changes
        tensors = list(self._tensors())
        if [_kind(x) for x in self._copies] != [_kind(x) for x in tensors]:
            self._copies = [torch.empty_like(x) for x in tensors]
        for copy, x in zip(self._copies, tensors, strict=True):
            copy.copy_(x)
        self._settings = [_settings(group) for group in self._optimizer.param_groups]
        self._taken = True
        self._optimizer.step()

    @runs_eagerly
    @torch.no_grad()
    def undo(self) -> None:
        """Restore parameters, state and settings from before :meth:`step`, in place; gradients are left alone."""
        assert self._taken, "there is no step to undo"
        for copy, x in zip(self._copies, self._tensors(), strict=True):
            x.copy_(copy)
        for group, settings in zip(self._optimizer.param_groups, self._settings, strict=True):
            group.update(settings)
        self._taken = False

    def _tensors(self) -> Iterable[Tensor]:
        """This rank's shards of all tensors that a step may change."""
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                yield local(p)
                for _, value in sorted(self._optimizer.state[p].items()):
                    if isinstance(value, Tensor):
                        yield local(value)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _kind(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.device


def _stages(optimizer: ChainedOptimizer) -> int:
    return optimizer.pg_collection.axis("pp").size
