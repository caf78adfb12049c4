"""Parameters of equal shard shape and layout, whose state is one stack and whose update is one call of the rule."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from ...sharding.layout import Layout
from ...sharding.parameter_layout import local, local_gradient
from ...sharding.requests import Rule
from ...sharding.state import StateSpec
from .weight_decay import decay_first_

STACK_BYTES = {"cpu": 2**18}
"""Largest stack of gradients by device: on CPU small matrices gain from sharing a call, large ones fall out of the cache."""

RuleFunction = Callable[[Tensor, Tensor, Any, Layout, Mapping[str, Any]], Rule]
"""``rule(p, g, state, layout, group)`` on stacks (B, *shard); its result is what to subtract, times lr.

``state`` has the state's stacks, ``names`` (keys of randomness), and ``stored``, the dtype that the parameters are kept in.
"""


def bucket_size(p: Tensor, layout: Layout) -> int:
    """How many parameters like this one a bucket may hold: the same on every rank, also where shards are uneven."""
    limit = STACK_BYTES.get(p.device.type, 2**26)
    largest = prod(layout.shape) // prod(axis.size for axis in layout.axes)
    return max(1, limit // max(1, largest * p.element_size()))


@dataclass
class Bucket:
    """Some parameters of one group.

    Attributes:
        params: B parameters with equal shard shapes, dtypes and layouts.
        layout: Theirs.
        specs: Declares the state.
        stacks: State name → (B, *state shard).
        names: What randomness of each is keyed by, and the first names them in errors.
        begun: Whether its part of the step that is being taken has begun already.
    """

    params: list[Tensor]
    layout: Layout
    specs: Mapping[str, StateSpec]
    stacks: dict[str, Tensor]
    names: list[str]
    begun: bool = False

    @property
    def label(self) -> str:
        """Names the parameters in errors."""
        return self.names[0]

    @classmethod
    def make(cls, params: list[Tensor], layout: Layout, specs: Mapping[str, StateSpec], names: list[str]) -> "Bucket":
        """A bucket with fresh state."""
        like = local(params[0])
        stacks = {
            name: spec.allocate(layout, len(params), dtype=like.dtype, device=like.device)
            for name, spec in specs.items()
        }
        return cls(params, layout, specs, stacks, names)

    def bind(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Make ``state[p][name]`` a view of the stack, taking over the value of a tensor that somebody put there.

        Raises:
            ValueError: when such a tensor has another shape than the state.
        """
        for name, stack in self.stacks.items():
            for p, view in zip(self.params, stack, strict=True):
                present = state[p].get(name)
                if present is not None:
                    shard = local(present)
                    if shard.data_ptr() == view.data_ptr() and shard.shape == view.shape and shard.dtype == view.dtype:
                        continue
                    if shard.shape != view.shape and (shard.numel(), view.numel()) != (1, 1):
                        raise ValueError(
                            f"{self.label}: state {name!r} has shape {tuple(shard.shape)} but this optimizer keeps "
                            f"{tuple(view.shape)} here; load a state of the same optimizer and layout, or reshard it first."
                        )
                    view.copy_(shard.reshape(view.shape))
                state[p][name] = as_state(view, p, self.specs[name], self.layout)

    def update(
        self,
        rule: RuleFunction,
        apply: Callable[[Tensor, Tensor, Mapping[str, Any]], None],
        group: Mapping[str, Any],
        *,
        widens: bool,
    ) -> Rule:
        """A rule for the engine: step the parameters that have a gradient, leave the others and their state alone."""
        live = [i for i, p in enumerate(self.params) if p.grad is not None]
        whole_stack = len(live) == len(self.params)
        pending = []
        for rows in [live] if whole_stack else [[i] for i in live]:
            pending.append(self._update(rows, rule, apply, group, widens))
        yield pending

    def _update(
        self,
        rows: Sequence[int],
        rule: RuleFunction,
        apply: Callable[[Tensor, Tensor, Mapping[str, Any]], None],
        given: Mapping[str, Any],
        widens: bool,
    ) -> Rule:
        params = [local(self.params[i]) for i in rows]
        gradients = [local_gradient(self.params[i]) for i in rows]
        single = len(rows) == 1
        # Rules compute in float32 at least, whatever the parameters are stored in.
        wide = torch.promote_types(params[0].dtype, torch.float32) if widens else params[0].dtype
        p = (params[0].unsqueeze(0) if single else torch.stack(params)).to(wide)
        g = (gradients[0].unsqueeze(0) if single else torch.stack(gradients)).to(wide)
        (g,), group = decay_first_([p], [g], given)
        for target, decayed in zip(params, p, strict=True) if group is not given else ():
            if target.data_ptr() != decayed.data_ptr() or target.dtype != wide:
                target.copy_(decayed)
        state = SimpleNamespace(
            **{name: stack[rows[0] : rows[0] + 1] if single else stack for name, stack in self.stacks.items()},
            names=[self.names[i] for i in rows],
            stored=params[0].dtype,
        )
        for target, update in zip(params, (yield rule(p, g, state, self.layout, group)), strict=True):
            apply(target, update, group)


def as_state(view: Tensor, p: Tensor, spec: StateSpec, layout: Layout) -> Tensor:
    """``view`` as users see it: a DTensor that shares its memory when the parameter is one, so that torch can reshard it.

    What belongs to this rank's block alone (a statistic in ``blockwise`` mode) has no place in the whole and stays plain.
    """
    if not isinstance(p, DTensor) or (spec.dims != "*" and layout.shape != p.shape):
        return view
    placements: list[Placement] = []
    for placement in p.placements:
        at = _dim_of(spec, placement.dim - p.ndim, p.ndim) if isinstance(placement, Shard | _StridedShard) else None
        if at is None:
            placements.append(Replicate())
        elif isinstance(placement, _StridedShard):
            placements.append(_StridedShard(at, split_factor=placement.split_factor))
        else:
            placements.append(Shard(at))
    shape = torch.Size(spec.layout(Layout.whole(p.shape)).shape)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(view, p.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def _dim_of(spec: StateSpec, parameter_dim: int, ndim: int) -> int | None:
    """The dim of the state that is sharded with ``parameter_dim``, or None."""
    if spec.dims == "*":
        return parameter_dim + ndim
    sharded = [d if c.islower() else None for c, d in zip(spec.dims, spec.follows, strict=True)]
    return sharded.index(parameter_dim) if parameter_dim in sharded else None
