"""LAMB and LARS: the step of each parameter is scaled by a ratio of two norms of whole tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...process_groups_config import ProcessGroupCollection
from ...sharding.layout import Layout
from ...sharding.requests import Rule
from ...sharding.state import StateSpec
from ..steps.argument_checks import check_adam, fraction, non_negative, positive
from ..steps.global_clip import GlobalClip
from ..steps.stacked import RuleFunction, StackedStep
from .parts.adam_parts import SPECS, adam_step_


def trust_ratio(norm: Tensor, other: Tensor) -> Tensor:
    """``norm / other``; 1 where either is 0, so that a parameter of zeros moves and a step of zeros stays one."""
    return torch.where((norm > 0) & (other > 0), norm / other, 1)


def lamb(p: Tensor, g: Tensor, s: Any, lay: Layout, group: Mapping[str, Any]) -> Rule:
    """``p ← p - lr · ‖p‖ / ‖r‖ · r`` with ``r = m̂ / (√v̂ + ε) + λp``; returns ``p``.

    State as of :func:`adam_step_`; updated.

    Source: You et al. 2019, algorithm 2, https://arxiv.org/abs/1904.00962
    """
    r = adam_step_((p * group["weight_decay"]).contiguous(), g, s, group)
    s.step.add_(1)
    p_norm, r_norm = yield lay.norm(p), lay.norm(r)
    return p.addcmul_(r, -float(group["lr"]) * trust_ratio(p_norm, r_norm))


def lars(p: Tensor, g: Tensor, s: Any, lay: Layout, group: Mapping[str, Any]) -> Rule:
    """``v ← μv + η‖p‖ / (‖g‖ + λ‖p‖) · (g + λp)``. State: ``momentum_buffer`` v, (B, *shard); updated.

    Source: You et al. 2017, algorithm 1, https://arxiv.org/abs/1708.03888
    """
    decay, eta = group["weight_decay"], group["trust_coefficient"]
    p_norm, g_norm = yield lay.norm(p), lay.norm(g)
    ratio = trust_ratio(eta * p_norm, g_norm + decay * p_norm)
    return s.momentum_buffer.mul_(group["momentum"]).addcmul_(g, ratio).addcmul_(p, decay * ratio)


class Lamb(GlobalClip):
    """LAMB: Adam's direction plus weight decay, scaled to the norm of the parameter.

    Args:
        params: Parameters or parameter groups, any shapes, DTensors or plain tensors.
        lr: Learning rate: the norm of a step divided by the norm of the parameter.
        betas: Decays of the running means of the gradient and its square, in [0, 1).
        eps: Added to the denominator.
        weight_decay: λ ≥ 0; part of the direction whose norm counts.
        max_grad_norm: Largest norm of the gradients over all parameters of this optimizer in the whole model; the rule scales
            them to it and leaves ``.grad`` unchanged. None or 0: no scaling.
        pg_collection: Process groups, ours or Megatron-Core's; needed when plain tensors are sharded, and for ``max_grad_norm``
            over pipeline stages, of which each must then have a parameter here.

    Raises:
        ValueError: for an argument out of range.

    Source: You et al. 2019, algorithm 2 with φ(x) = x, https://arxiv.org/abs/1904.00962
    """

    returns = "parameter"

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_grad_norm: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        check_adam(lr, betas, eps, weight_decay)
        non_negative("max_grad_norm", max_grad_norm or 0.0)
        self.max_norm = max_grad_norm or None
        super().__init__(params, pg_collection, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def state_specs(self, group: Mapping[str, Any], layout: Layout) -> Mapping[str, StateSpec]:
        """``exp_avg``, ``exp_avg_sq`` like the parameter; ``step`` a scalar."""
        return SPECS

    def rule(self, group: Mapping[str, Any]) -> RuleFunction:
        """Algorithm 2, with gradients scaled by :attr:`scale` if there is a ``max_grad_norm``."""
        scale = self.scale
        return lamb if scale is None else lambda p, g, s, lay, group: lamb(p, g * scale, s, lay, group)


class Lars(StackedStep):
    """LARS: SGD with momentum, its gradient scaled to a fraction of the norm of the parameter.

    The learning rate stands outside of the momentum, as in ``torch.optim.SGD``; the paper's stands inside.

    Args:
        params: Parameters or parameter groups, any shapes, DTensors or plain tensors.
        lr: Learning rate.
        momentum: μ, in [0, 1).
        weight_decay: λ ≥ 0.
        trust_coefficient: η > 0.
        pg_collection: Process groups, ours or Megatron-Core's; needed when plain tensors are sharded.

    Raises:
        ValueError: for an argument out of range.

    Source: You et al. 2017, algorithm 1, https://arxiv.org/abs/1708.03888
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        non_negative("lr", float(lr))
        fraction("momentum", momentum)
        non_negative("weight_decay", weight_decay)
        positive("trust_coefficient", trust_coefficient)
        super().__init__(
            params,
            pg_collection,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            trust_coefficient=trust_coefficient,
        )

    def state_specs(self, group: Mapping[str, Any], layout: Layout) -> Mapping[str, StateSpec]:
        """``momentum_buffer`` like the parameter."""
        return {"momentum_buffer": StateSpec("*")}

    def rule(self, group: Mapping[str, Any]) -> RuleFunction:
        """Algorithm 1."""
        return lars
