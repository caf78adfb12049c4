"""Base of optimizers whose update of an entry depends on that entry alone: no communication, any cut of the parameters."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...cache_blocks import BLOCK_BYTES, flat_blocks
from ...engine import Work
from ...sharding.layout import Layout
from ...sharding.parameter_layout import local, local_gradient
from ...sharding.requests import Rule
from ...sharding.state import StateSpec
from .base import ShardedStep
from .bookkeeping import StateChange, fitting, refuse_part
from .state_views import as_state
from .weight_decay import decay_first_

States = Mapping[str, list[Tensor]]


class ElementwiseStep(ShardedStep):
    """Base of optimizers whose update of an entry depends on that entry alone; the rule is a function of lists of tensors.

    A rule has two parts. :meth:`scalars` runs on the host once per parameter and step, and advances the step count and the
    like. :meth:`update_` changes entries; it is called several times per step, each time with pieces of parameters whose
    scalars are equal. With :meth:`one_pass` it is called once instead, with whole shards and the scalars as state.
    """

    kind = "elementwise"

    def specs(self, group: Mapping[str, Any]) -> Mapping[str, StateSpec]:
        """Declarations, by name, of the state that each parameter of ``group`` keeps between steps."""
        raise NotImplementedError

    def state_specs(self, group: Mapping[str, Any], layout: Layout) -> Mapping[str, StateSpec]:
        """As :meth:`specs`, which does not depend on the layout."""
        return self.specs(group)

    def scalars(self, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> dict[str, Any]:
        """Advance the scalars in one parameter's ``state`` by one step, in place.

        Returns:
            Numbers for :meth:`update_`, which receives them as entries of its ``group``.
        """
        return {}

    def one_pass(self, group: Mapping[str, Any]) -> bool:
        """Whether :meth:`update_` is called once per step, with whole shards and scalars.

        It is for a rule that goes through memory only once, and for one that keeps scalars without :meth:`scalars`.
        """
        plain = type(self).scalars is ElementwiseStep.scalars
        return plain and any(not spec.dims for spec in self.specs(group).values())

    def update_(self, params: list[Tensor], grads: list[Tensor], states: States, group: Mapping[str, Any]) -> None:
        """Update ``params`` and ``states`` in place; all lists run in the order of ``params``.

        Args:
            params: Pieces of parameters, in float32 at least; any shapes.
            grads: Gradients of the pieces; must not be changed.
            states: State name → pieces of the state, of the dtype of ``params``.
            group: The parameter group and what :meth:`scalars` returned.
        """
        raise NotImplementedError

    def decayed_update_(
        self, params: list[Tensor], grads: list[Tensor], states: States, group: Mapping[str, Any]
    ) -> None:
        """:meth:`update_` in place, after the weight decay that ``group`` may set to replace the rule's own."""
        grads, group = decay_first_(params, grads, group)
        self.update_(params, grads, states, group)

    def updates(self) -> Iterator[Work]:
        """One rule per group, dtype and device."""
        for group in self.param_groups:
            alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((p.dtype, p.device), []).append(p)
            for params in alike.values():
                yield Work(self._name(params[0]), self._update(params, group))

    def state_changes(self, group: dict[str, Any]) -> Iterator[StateChange]:
        """As in the base class."""
        specs = self.specs(group)
        slots = list(specs)
        for p in group["params"]:
            held = self.state.get(p, {})
            if not all(slot in held for slot in slots):
                refuse_part(self._name(p), held, slots)
                yield partial(self._make_state, p, specs)
                continue
            shard = local(p)
            for slot, spec in specs.items():
                shape = shard.shape if spec.dims == "*" else ()
                dtype, device = spec.dtype_for(shard.dtype), spec.device_for(shard.device)
                name = partial(self._name, p)
                taken = fitting(name, slot, held[slot], shape, dtype, device, reshapes=spec.dims != "*")
                if taken is not held[slot]:
                    yield partial(held.__setitem__, slot, taken)

    def _make_state(self, p: Tensor, specs: Mapping[str, StateSpec]) -> None:
        shard, layout = local(p), self.layout(p)
        state = self.state.setdefault(p, {})
        for slot, spec in specs.items():
            fresh = spec.allocate(layout, 1, dtype=shard.dtype, device=shard.device)[0]
            state[slot] = as_state(fresh, p, spec, layout) if spec.dims == "*" else fresh

    def _update(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> Rule:
        if self.one_pass(group):
            self._step(params, group)
        else:
            together: dict[tuple[tuple[str, Any], ...], list[Tensor]] = {}
            for p in params:
                together.setdefault(tuple(self.scalars(self.state[p], group).items()), []).append(p)
            for scalars, alike in together.items():
                self._step(alike, {**group, **dict(scalars)})
        return
        yield  # makes this a generator, one that requests nothing

    def _step(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        """Call :meth:`update_` on ``params``, piece by piece."""
        specs, whole = self.specs(group), self.one_pass(group)
        names = [name for name, spec in specs.items() if spec.dims == "*"]
        shards = [local(p) for p in params]
        # Contiguous copies, so that all columns are cut in the same order.
        targets = [shard.contiguous() for shard in shards]
        columns = [targets, [local_gradient(p).contiguous() for p in params]]
        columns += [[local(self.state[p][name]) for p in params] for name in names]
        scalars = {name: [self.state[p][name] for p in params] for name in specs if name not in names} if whole else {}
        # The update is computed in float32 at least; tensors stored in fewer bits are rounded to nearest afterwards.
        dtype = torch.promote_types(shards[0].dtype, torch.float32)
        size = None if whole else BLOCK_BYTES.get(shards[0].device.type)
        for block in flat_blocks(columns, size // dtype.itemsize) if size else [columns]:
            wide = [
                column if all(x.dtype == dtype for x in column) else [x.to(dtype) for x in column] for column in block
            ]
            self.decayed_update_(wide[0], wide[1], dict(zip(names, wide[2:], strict=True)) | scalars, group)
            for column, updated in zip(block[:1] + block[2:], wide[:1] + wide[2:], strict=True):
                if updated is not column:
                    torch._foreach_copy_(column, updated)
        for shard, target in zip(shards, targets, strict=True):
            if target is not shard:
                shard.copy_(target)
