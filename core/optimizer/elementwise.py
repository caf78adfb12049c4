"""Optimizers whose update of an entry needs nothing but that entry: no requests, no stacks, any cut of the parameters."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layout import Layout, Rule
from ..placements import local, local_gradient
from ..state import StateSpec
from .buckets import as_state
from .sharded_optimizer import ShardedStep, check_gradients

States = Mapping[str, list[Tensor]]


class ElementwiseStep(ShardedStep):
    """Mixin for a ``torch.optim.Optimizer`` class whose rule is one call on lists of tensors (foreach or fused)."""

    def specs(self, group: Mapping[str, Any]) -> Mapping[str, StateSpec]:
        """What each parameter of ``group`` keeps between steps."""
        raise NotImplementedError

    def state_specs(self, group: Mapping[str, Any], layout: Layout) -> Mapping[str, StateSpec]:
        """The same for every layout."""
        return self.specs(group)

    def update_(self, params: list[Tensor], grads: list[Tensor], states: States, group: Mapping[str, Any]) -> None:
        """Update ``params`` and ``states`` in place; all lists run in the order of ``params``."""
        raise NotImplementedError

    def updates(self) -> Iterator[tuple[str, Rule]]:
        """One rule per group, dtype and device."""
        check_gradients(self.param_groups)
        for group in self.param_groups:
            self._init_group(group)
            alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((p.dtype, p.device), []).append(p)
            for params in alike.values():
                yield self._name(params[0]), self._update(params, group)

    @torch.no_grad()
    def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = False) -> None:
        for p in group["params"]:
            state = self.state[p]
            shard = local(p)
            layout = None
            for name, spec in self.specs(group).items():
                present = state.get(name)
                if present is not None and spec.dims == "*" and local(present).shape != shard.shape:
                    raise ValueError(
                        f"{self._name(p)}: state {name!r} has shape {tuple(local(present).shape)} but the shard here has "
                        f"{tuple(shard.shape)}; load a state of the same layout, or reshard it first."
                    )
                if present is None:
                    layout = layout or self.layout(p)
                    fresh = spec.allocate(layout, 1, dtype=shard.dtype, device=shard.device)[0]
                    state[name] = as_state(fresh, p, spec, layout) if spec.dims == "*" else fresh

    def take_state(self) -> None:
        """As in the base class."""
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].update({k: v.clone() for k, v in self.state[p].items() if isinstance(v, Tensor)})
        super().take_state()

    def _update(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> Rule:
        names = self.specs(group)
        states = {name: [local(self.state[p][name]) for p in params] for name in names}
        shards, grads = [local(p) for p in params], [local_gradient(p) for p in params]
        dtype = torch.promote_types(shards[0].dtype, torch.float32)
        # 16-bit parameters are updated in float32, as their state is kept, and rounded to nearest. Fused kernels go through
        # memory in order, whatever the strides are.
        wide = [shard.to(dtype).contiguous() for shard in shards]
        self.update_(wide, [g.to(dtype).contiguous() for g in grads], states, group)
        for shard, updated in zip(shards, wide, strict=True):
            if updated is not shard:
                shard.copy_(updated)
        return
        yield  # a rule that asks for nothing
