"""Optimizers whose update of an entry needs nothing but that entry: no requests, no stacks, any cut of the parameters."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...cache_blocks import BLOCK_BYTES, flat_blocks
from ...engine import Work
from ...sharding.layout import Layout
from ...sharding.parameter_layout import local, local_gradient
from ...sharding.requests import Rule
from ...sharding.state import StateSpec
from .base import ShardedStep, check_gradients
from .state_views import as_state
from .weight_decay import decay_first_

States = Mapping[str, list[Tensor]]

CPU = torch.device("cpu")


class ElementwiseStep(ShardedStep):
    """Base of optimizers whose update of an entry needs nothing but that entry: the rule is one call on lists of tensors.

    A rule is in two parts. :meth:`scalars` counts steps and the like, on the host, once a parameter; :meth:`update_` changes
    entries, and is called several times a step, with pieces of the parameters that have equal scalars. A rule without
    :meth:`scalars` that keeps scalars, or one that goes through memory once anyway (:meth:`one_pass`), is called once, with
    whole shards and the scalars as state.
    """

    kind = "elementwise"

    def specs(self, group: Mapping[str, Any]) -> Mapping[str, StateSpec]:
        """What each parameter of ``group`` keeps between steps."""
        raise NotImplementedError

    def state_specs(self, group: Mapping[str, Any], layout: Layout) -> Mapping[str, StateSpec]:
        """The same for every layout."""
        return self.specs(group)

    def scalars(self, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> dict[str, Any]:
        """Advance the scalars in one parameter's ``state`` by a step.

        Returns:
            Numbers for :meth:`update_`, which finds them in its ``group``.
        """
        return {}

    def one_pass(self, group: Mapping[str, Any]) -> bool:
        """Whether :meth:`update_` wants whole shards, and the scalars too."""
        plain = type(self).scalars is ElementwiseStep.scalars
        return plain and any(not spec.dims for spec in self.specs(group).values())

    def update_(self, params: list[Tensor], grads: list[Tensor], states: States, group: Mapping[str, Any]) -> None:
        """Update ``params`` and ``states`` in place; all lists run in the order of ``params``.

        Args:
            params: Pieces of parameters, in float32 at least; any shapes.
            grads: Theirs, not to be changed.
            states: State name → pieces of the state, of the dtype of ``params``.
            group: The parameter group and what :meth:`scalars` returned.
        """
        raise NotImplementedError

    def decayed_update_(
        self, params: list[Tensor], grads: list[Tensor], states: States, group: Mapping[str, Any]
    ) -> None:
        """:meth:`update_`, after the weight decay that ``group`` asks for in place of the rule's own."""
        grads, group = decay_first_(params, grads, group)
        self.update_(params, grads, states, group)

    def updates(self) -> Iterator[Work]:
        """One rule per group, dtype and device."""
        check_gradients(self.param_groups)
        for group in self.param_groups:
            self._init_group(group)
            alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((p.dtype, p.device), []).append(p)
            for params in alike.values():
                yield Work(self._name(params[0]), self._update(params, group))

    @torch.no_grad()
    def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = False) -> None:
        specs = self.specs(group)
        for p in group["params"]:
            state = self.state[p]
            shard = local(p)
            layout = None
            for name, spec in specs.items():
                present = state.get(name)
                if present is None:
                    layout = layout or self.layout(p)
                    fresh = spec.allocate(layout, 1, dtype=shard.dtype, device=shard.device)[0]
                    state[name] = as_state(fresh, p, spec, layout) if spec.dims == "*" else fresh
                    continue
                here = local(present)
                if spec.dims == "*" and here.shape != shard.shape:
                    raise ValueError(
                        f"{self._name(p)}: state {name!r} has shape {tuple(here.shape)} but the shard here has "
                        f"{tuple(shard.shape)}; load a state of the same layout, or reshard it first."
                    )
                # torch's load_state_dict casts and moves state to what the parameter has.
                dtype, device = spec.dtype_for(shard.dtype), CPU if spec.host else shard.device
                if here.dtype != dtype or here.device != device or not here.is_contiguous():
                    state[name] = present.to(device=device, dtype=dtype).contiguous()

    def take_state(self) -> None:
        """As in the base class."""
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].update({k: v.clone() for k, v in self.state[p].items() if isinstance(v, Tensor)})
        super().take_state()

    def _update(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> Rule:
        if self.one_pass(group):
            self._step(params, group)
        else:
            together: dict[tuple[tuple[str, Any], ...], list[Tensor]] = {}
            for p in params:
                together.setdefault(tuple(self.scalars(self.state[p], group).items()), []).append(p)
            for scalars, some in together.items():
                self._step(some, {**group, **dict(scalars)})
        return
        yield  # a rule that asks for nothing

    def _step(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        """Call :meth:`update_` on ``params``, piece by piece."""
        specs, whole = self.specs(group), self.one_pass(group)
        names = [name for name, spec in specs.items() if spec.dims == "*"]
        shards = [local(p) for p in params]
        # Kernels go through memory in order, whatever the strides are.
        targets = [shard.contiguous() for shard in shards]
        columns = [targets, [local_gradient(p).contiguous() for p in params]]
        columns += [[local(self.state[p][name]) for p in params] for name in names]
        scalars = {name: [self.state[p][name] for p in params] for name in specs if name not in names} if whole else {}
        # 16-bit parameters are updated in float32, and what is stored in fewer bits is rounded to nearest afterwards.
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
