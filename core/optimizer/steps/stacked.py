"""Base of optimizers that need numbers of whole tensors; one call of the rule updates a stack of parameters of one layout."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from ... import engine
from ...process_groups_config import ProcessGroupCollection
from ...sharding.layout import Layout
from ...sharding.parameter_layout import local, local_gradient
from ...sharding.requests import Rule
from ...sharding.state import StateSpec
from .base import ShardedStep, Travelling
from .bookkeeping import StateChange, as_tensor, refuse_part
from .state_views import as_state
from .weight_decay import decay_first_

STACK_BYTES = {"cpu": 2**18}
"""Bytes of the largest stack of gradients, by device. On CPU small matrices gain from one shared call, but large stacks do
not fit the cache."""

RuleFunction = Callable[[Tensor, Tensor, Any, Layout, Mapping[str, Any]], Rule]
"""``rule(p, g, state, layout, group)`` on stacks (B, *shard); :attr:`~StackedStep.returns` says what it returns.

``state`` has the stacks of the state as attributes, and ``names``, the keys of random numbers, and ``stored``, the dtype of
the stored parameters.
"""


def bucket_size(p: Tensor, layout: Layout) -> int:
    """Largest number of parameters like ``p`` in a bucket; equal on every rank, even if shards are uneven."""
    limit = STACK_BYTES.get(p.device.type, 2**26)
    largest = prod(layout.shape) // prod(axis.size for axis in layout.axes)
    return max(1, limit // max(1, largest * p.element_size()))


@dataclass
class Bucket:
    """Parameters of one group that one call of the rule updates.

    Attributes:
        params: B parameters with equal shard shapes, dtypes and layouts.
        layout: Layout of each of them.
        specs: Declarations of the state, by name.
        stacks: State name → (B, *state shard).
        names: Key of the random numbers of each parameter; errors name the first.
        begun: Whether the rule of this bucket began in this step already, during backward.
        fresh: Whether the stacks have their initial values still.
    """

    params: list[Tensor]
    layout: Layout
    specs: Mapping[str, StateSpec]
    stacks: dict[str, Tensor]
    names: list[str]
    begun: bool = False
    fresh: bool = True

    @property
    def label(self) -> str:
        """Name of the first parameter, by which errors name the bucket."""
        return self.names[0]

    @classmethod
    def make(cls, params: list[Tensor], layout: Layout, specs: Mapping[str, StateSpec], names: list[str]) -> "Bucket":
        """A bucket with initial state."""
        like = local(params[0])
        stacks = {
            name: spec.allocate(layout, len(params), dtype=like.dtype, device=like.device)
            for name, spec in specs.items()
        }
        return cls(params, layout, specs, stacks, names)

    def changes(self, state: MutableMapping[Tensor, dict[str, Any]]) -> Iterator[StateChange]:
        """What must be done so that ``state[p][name]`` are views of the stacks; changes nothing itself.

        A parameter without state gets its initial state, and a tensor that stands there instead of the view is copied into it.

        Raises:
            ValueError: when a state lacks a part, or a part has another shape than the stack.
        """
        slots, memory = list(self.stacks), {x.untyped_storage().data_ptr() for x in self.stacks.values()}
        for row, (p, name) in enumerate(zip(self.params, self.names, strict=True)):
            held = state.get(p, {})
            if not all(slot in held for slot in slots):
                refuse_part(name, held, slots)
                yield partial(self._begin_anew, row, state)
                continue
            for slot, stack in self.stacks.items():
                view, present = stack[row], as_tensor(name, slot, held[slot])
                shard = local(present)
                if shard.data_ptr() == view.data_ptr() and shard.shape == view.shape and shard.dtype == view.dtype:
                    continue
                if shard.shape != view.shape and (shard.numel(), view.numel()) != (1, 1):
                    raise ValueError(
                        f"{name}: state {slot!r} has shape {tuple(shard.shape)} but this optimizer keeps {tuple(view.shape)} "
                        f"here; load a state of the same optimizer and layout, or reshard it first."
                    )
                # Another row, as after two parameters have swapped their state, may be overwritten first.
                own = shard.untyped_storage().data_ptr() in memory
                yield partial(self._take_over, row, slot, shard.clone() if own else shard, state)
        if self.fresh:
            yield partial(setattr, self, "fresh", False)

    def _begin_anew(self, row: int, state: MutableMapping[Tensor, dict[str, Any]]) -> None:
        held = state.setdefault(self.params[row], {})
        for slot, stack in self.stacks.items():
            if not self.fresh:
                self.specs[slot].reset_(stack[row])
            held[slot] = as_state(stack[row], self.params[row], self.specs[slot], self.layout)

    def _take_over(self, row: int, slot: str, value: Tensor, state: MutableMapping[Tensor, dict[str, Any]]) -> None:
        p, view = self.params[row], self.stacks[slot][row]
        view.copy_(value.reshape(view.shape))
        state[p][slot] = as_state(view, p, self.specs[slot], self.layout)

    def update(
        self,
        rule: RuleFunction,
        apply: Callable[[Tensor, Tensor, Mapping[str, Any]], None],
        group: Mapping[str, Any],
        *,
        widens: bool,
    ) -> Rule:
        """A rule for the engine that updates the parameters with a gradient; the others and their state do not change."""
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
        settings: Mapping[str, Any],
        widens: bool,
    ) -> Rule:
        params = [local(self.params[i]) for i in rows]
        gradients = [local_gradient(self.params[i]) for i in rows]
        single = len(rows) == 1
        # Rules compute in float32 at least, whatever dtype the parameters have.
        wide = torch.promote_types(params[0].dtype, torch.float32) if widens else params[0].dtype
        p = (params[0].unsqueeze(0) if single else torch.stack(params)).to(wide)
        g = (gradients[0].unsqueeze(0) if single else torch.stack(gradients)).to(wide)
        (g,), group = decay_first_([p], [g], settings)
        for target, decayed in zip(params, p, strict=True) if group is not settings else ():
            if target.data_ptr() != decayed.data_ptr() or target.dtype != wide:
                target.copy_(decayed)
        state = SimpleNamespace(
            **{name: stack[rows[0] : rows[0] + 1] if single else stack for name, stack in self.stacks.items()},
            names=[self.names[i] for i in rows],
            stored=params[0].dtype,
        )
        for target, update in zip(params, (yield rule(p, g, state, self.layout, group)), strict=True):
            apply(target, update, group)


class StackedStep(ShardedStep):
    """Base of optimizers whose update needs numbers of the whole tensor, such as its norm or the means of its rows.

    A subclass declares the state (:meth:`state_specs`) and defines the rule (:meth:`rule`), a generator on stacks of
    parameters that yields a request wherever it needs such a number.
    """

    widens = True
    """Whether the rule receives 16-bit parameters and gradients cast to float32; a rule that casts by itself saves memory."""
    returns: Literal["update", "parameter"] = "update"
    """Meaning of the rule's result: an update, which is subtracted times ``lr``, or the new parameter itself."""

    def prepare(self, pg_collection: ProcessGroupCollection | None) -> None:
        """As in the base class."""
        super().prepare(pg_collection)
        self._made_buckets: dict[tuple[Any, ...], list[Bucket]] = {}

    def rule(self, group: Mapping[str, Any]) -> RuleFunction:
        """The rule that updates the parameters in ``group``."""
        raise NotImplementedError

    def traffic(self, layout: Layout) -> tuple[float, int]:
        """Relative work for a parameter of ``layout``, and entries of the largest tensor that is sent to an owner, or 0."""
        return 0.0, 0

    def updates(self) -> Iterator[engine.Work]:
        """The rules of one step, for :func:`engine.run`; a chain of optimizers runs those of all its members together."""
        for group in self.param_groups:
            for bucket in self._buckets(group):
                if not bucket.begun:
                    yield self._work(bucket, group)
                bucket.begun = False

    def travelling(self) -> Iterator[Travelling]:
        """The buckets whose matrices are sent to an owner; :meth:`updates` leaves out those that have begun by then."""
        position = {p: at for at, p in enumerate(p for group in self.param_groups for p in group["params"])}
        for group in self.param_groups if self.kind == "matrix" else ():
            for bucket in self._buckets(group):
                bucket.begun = False
                if entries := self.traffic(bucket.layout)[1]:
                    first = min(position[p] for p in bucket.params)
                    yield Travelling(bucket.params, first, entries, partial(self._begin, bucket, group))

    def _begin(self, bucket: Bucket, group: Mapping[str, Any]) -> engine.Work:
        bucket.begun = True
        return self._work(bucket, group)

    def _work(self, bucket: Bucket, group: Mapping[str, Any]) -> engine.Work:
        return engine.Work(bucket.label, self._scoped(bucket, group), *self.traffic(bucket.layout))

    def state_changes(self, group: dict[str, Any]) -> Iterator[StateChange]:
        """As in the base class."""
        for bucket in self._buckets(group):
            yield from bucket.changes(self.state)

    def _apply(self, p: Tensor, result: Tensor, group: Mapping[str, Any]) -> None:
        """Apply the rule's ``result`` for the shard ``p`` to it, in place."""
        if self.returns == "update":
            p.add_(result, alpha=-float(group["lr"]))
        # A rule that works in place has changed the parameter already, if the stack shares its memory.
        elif p.data_ptr() != result.data_ptr() or p.dtype != result.dtype:
            p.copy_(result)

    def _scoped(self, bucket: Bucket, group: Mapping[str, Any]) -> Rule:
        return bucket.update(self.rule(group), self._apply, group, widens=self.widens)

    def _buckets(self, group: Mapping[str, Any]) -> list[Bucket]:
        """The buckets of ``group``; built again when its list of parameters has changed."""
        made = self._made_buckets
        key = _key(group)
        if key not in made:
            alive = {_key(other) for other in self.param_groups}
            for gone in [k for k in made if k not in alive]:
                del made[gone]
            made[key] = list(self._make_buckets(group))
        return made[key]

    def _make_buckets(self, group: Mapping[str, Any]) -> Iterator[Bucket]:
        alike: dict[Any, list[Tensor]] = {}
        for p in group["params"]:
            self.check(p, group)
            shard = local(p)
            alike.setdefault((self.layout(p), shard.dtype, shard.device), []).append(p)
        for (layout, _, _), params in alike.items():
            size = bucket_size(local(params[0]), layout)
            for i in range(0, len(params), size):
                same = params[i : i + size]
                yield Bucket.make(same, layout, self.state_specs(group, layout), [self._key(p) for p in same])


def _key(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple((id(p), p.shape, p.dtype, p.device) for p in group["params"])
