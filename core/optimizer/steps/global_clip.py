"""Base of optimizers that scale their updates by a norm over all parameters on all ranks."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...engine import Work
from ...sharding.parameter_layout import local
from .base import check_gradients
from .global_norm import clip_factor, global_norm
from .stacked import StackedStep
from .weight_decay import METHOD, decay_first_


class GlobalClip(StackedStep):
    """Base of optimizers whose rule scales updates so that a norm over all parameters of the optimizer is bounded.

    Attributes:
        max_norm: Largest norm; None turns the scaling off.
        scale: Factor for the current step, a float64 scalar; None without ``max_norm``.
    """

    max_norm: float | None
    scale: Tensor | None

    def scaled(self, p: Tensor, g: Tensor, group: Mapping[str, Any]) -> Iterable[Tensor]:
        """Pieces of the quantity whose norm is bounded, for the parameter ``p`` and this rank's shard ``g`` of its gradient."""
        return (g,)

    def _scaled(self, p: Tensor, g: Tensor, group: Mapping[str, Any]) -> Iterable[Tensor]:
        if group.get(METHOD) == "l2":  # weight decay is then part of the gradient that the rule receives
            wide = torch.promote_types(g.dtype, torch.float32)
            (g,), group = decay_first_([local(p).to(wide)], [g.to(wide)], group)
        return self.scaled(p, g, group)

    @torch.no_grad()
    def updates(self) -> Iterator[Work]:
        """As in the base class, after one reduction for the norm."""
        self.scale = None
        if self.max_norm is not None:
            check_gradients(self.param_groups)
            self.take_state()
            group_of = {p: group for group in self.param_groups for p in group["params"]}
            buckets = [bucket for group in self.param_groups for bucket in self._buckets(group)]
            entries = [(bucket.label, p, bucket.layout) for bucket in buckets for p in bucket.params]
            norm = global_norm(entries, self._groups, lambda p, g: self._scaled(p, g, group_of[p]))
            self.scale = clip_factor(norm, self.max_norm)
        return super().updates()
