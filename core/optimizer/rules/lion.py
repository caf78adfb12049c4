"""Lion: steps by the sign of a momentum."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...process_groups_config import ProcessGroupCollection
from ...sharding.state import StateSpec
from ..steps.argument_checks import check_adam
from ..steps.elementwise import ElementwiseStep, States
from ..steps.weight_decay import decay_
from .parts.adam_parts import MU_DTYPES, check_mu_dtype


class Lion(ElementwiseStep):
    """``p ← p - lr·(sign(β1·m + (1-β1)·g) + wd·p)``; ``m ← β2·m + (1-β2)·g``.

    Args:
        params: Parameters or parameter groups, any shapes, DTensors or plain tensors.
        lr: Learning rate; a third to a tenth of AdamW's.
        betas: β1 of the step and β2 of the momentum, in [0, 1).
        weight_decay: wd ≥ 0, decoupled; three to ten times AdamW's.
        mu_dtype: Dtype of the stored momentum, ``float32`` or ``bfloat16``; None: the parameter's, but at least float32.
        pg_collection: Process groups, for the layout of what is saved.

    The sign of NaN is 0: a gradient that is not a number leaves its entry's mean NaN and the weight alone. Check gradients first
    (``clip_grad_norm_``).

    Raises:
        ValueError: for an argument out of range.

    Source: Chen et al. 2023, algorithm 2, https://arxiv.org/abs/2302.06675
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-3,
        mu_dtype: Literal["float32", "bfloat16"] | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        check_adam(lr, betas, 0.0, weight_decay)
        check_mu_dtype(mu_dtype)
        super().__init__(params, pg_collection, lr=lr, betas=betas, weight_decay=weight_decay, mu_dtype=mu_dtype)

    def specs(self, group: Mapping[str, Any]) -> Mapping[str, StateSpec]:
        """``exp_avg`` like the parameter."""
        return {"exp_avg": StateSpec("*", dtype=MU_DTYPES[group["mu_dtype"]])}

    def update_(self, params: list[Tensor], grads: list[Tensor], states: States, group: Mapping[str, Any]) -> None:
        """Algorithm 2."""
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        steps = list(torch._foreach_lerp(states["exp_avg"], grads, 1 - beta1))
        torch._foreach_sign_(steps)
        torch._foreach_lerp_(states["exp_avg"], grads, 1 - beta2)
        decay_(params, grads, group, "decoupled")
        torch._foreach_add_(params, steps, alpha=-lr)
