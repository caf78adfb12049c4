"""MARS: Adam with gradients whose noise is reduced by means of the gradient of the step before."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...cache_blocks import index_blocks
from ...process_groups_config import ProcessGroupCollection
from ...sharding.layout import Layout
from ...sharding.parameter_layout import local
from ...sharding.requests import Rule
from ...sharding.state import StateSpec
from ..steps.argument_checks import check_adam, choice, non_negative
from ..steps.global_clip import GlobalClip
from ..steps.stacked import RuleFunction
from .parts.adam_parts import SPECS, adam_step_

CLIPS = ("global", "tensor")


class Mars(GlobalClip):
    """MARS-AdamW in the paper's "approximate" form, where the earlier gradient g₋ comes from its own batch.

    ``c = g + γβ₁/(1-β₁)·(g - g₋)`` is clipped, and AdamW takes a step with c as gradient. Before the first step ``g₋`` is 0,
    as in the authors' code.

    Args:
        params: Parameters or parameter groups, any shapes, DTensors or plain tensors.
        lr: Learning rate.
        betas: Decays of the running means of c and its square, in [0, 1).
        gamma: γ ≥ 0, how much of the difference is added.
        eps: Added to the denominator.
        weight_decay: ≥ 0; decoupled: parameters shrink by ``lr·weight_decay``.
        clip: ``global``: scale all c by the norm over all parameters of this optimizer in the whole model, or ``tensor``: each
            parameter's c by its own norm, as the paper does.
        max_grad_norm: Largest norm of c; None or 0: no clipping.
        pg_collection: Process groups, ours or Megatron-Core's; needed when plain tensors are sharded, and for ``global`` over
            pipeline stages, of which each must then have a parameter here.

    Raises:
        ValueError: for an argument out of range.

    Source: Yuan et al. 2024, MARS-AdamW, https://arxiv.org/abs/2411.10438
    """

    returns = "parameter"

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        gamma: float = 0.025,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip: Literal["global", "tensor"] = "global",
        max_grad_norm: float | None = 1.0,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        check_adam(lr, betas, eps, weight_decay)
        non_negative("gamma", gamma)
        choice("clip", clip, CLIPS)
        non_negative("max_grad_norm", max_grad_norm or 0.0)
        self.max_norm = (max_grad_norm or None) if clip == "global" else None
        self.max_tensor_norm = (max_grad_norm or None) if clip == "tensor" else None
        super().__init__(params, pg_collection, lr=lr, betas=betas, gamma=gamma, eps=eps, weight_decay=weight_decay)

    def state_specs(self, group: Mapping[str, Any], layout: Layout) -> Mapping[str, StateSpec]:
        """``exp_avg``, ``exp_avg_sq`` and ``previous_grad`` like the parameter; ``step`` a scalar."""
        return {**SPECS, "previous_grad": StateSpec("*")}

    def scaled(self, p: Tensor, g: Tensor, group: Mapping[str, Any]) -> Iterator[Tensor]:
        """Pieces of the corrected gradient."""
        return (c for _, c in corrected(g[None], local(self.state[p]["previous_grad"])[None], group))

    def rule(self, group: Mapping[str, Any]) -> RuleFunction:
        """MARS-AdamW."""
        return self._mars

    def _mars(self, p: Tensor, g: Tensor, s: Any, lay: Layout, group: Mapping[str, Any]) -> Rule:
        scale = self.scale
        if self.max_tensor_norm is not None:
            norm = yield lay.norm(torch.lerp(s.previous_grad, g, look_ahead(group)))
            scale = (self.max_tensor_norm / norm).clamp(max=1)
        p = p.contiguous()
        for at, c in corrected(g, s.previous_grad, group):
            s.previous_grad[at] = g[at]
            c = c if scale is None else c.mul_(scale)
            adam_step_(p[at], c, s, group, at, lr=float(group["lr"]), weight_decay=group["weight_decay"])
        s.step.add_(1)
        return p


def corrected(g: Tensor, previous: Tensor, group: Mapping[str, Any]) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """(index, new tensor) for each block of ``c = g + γβ₁/(1-β₁)·(g - g₋)``, on stacks (B, *shard)."""
    for at in index_blocks(previous):
        yield at, torch.lerp(previous[at], g[at].to(previous.dtype), look_ahead(group))


def look_ahead(group: Mapping[str, Any]) -> float:
    """``1 + γβ₁/(1-β₁)``, the factor k in ``c = g₋ + k·(g - g₋)``."""
    beta1 = float(group["betas"][0])
    return 1 + float(group["gamma"]) * beta1 / (1 - beta1)
