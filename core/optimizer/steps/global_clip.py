"""Base of optimizers that scale their updates by a norm over all parameters on all ranks."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...engine import Work
from ...sharding.parameter_layout import local
from .global_norm import Entry, clip_factor, global_norm
from .stacked import StackedStep
from .weight_decay import METHOD, decay_first_


class GlobalClip(StackedStep):
    """Base of optimizers whose rule scales updates so that a norm over all parameters of the optimizer is bounded.

    Attributes:
        max_norm: Largest norm; None turns the scaling off.
        scale: Factor for the current step, a float64 scalar; None without ``max_norm``.
        bystanders: Parameters of this rank that belong to other optimizers or are frozen. If this one has none here, they say
            which ranks the norm is summed over, in which this rank takes part.
    """

    max_norm: float | None
    scale: Tensor | None
    bystanders: Sequence[Entry] = ()

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
            group_of = {p: group for group in self.param_groups for p in group["params"]}
            buckets = [bucket for group in self.param_groups for bucket in self._buckets(group)]
            entries = [(bucket.label, p, bucket.layout) for bucket in buckets for p in bucket.params]
            if not entries:
                norm = global_norm(self.bystanders, self._groups, lambda p, g: ())
            else:
                norm = global_norm(entries, self._groups, lambda p, g: self._scaled(p, g, group_of[p]))
            self.scale = clip_factor(norm, self.max_norm)
        return super().updates()
