"""Adam and AdamW by torch's own fused kernels, on shards."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import Optimizer, ParamsT

from ..process_groups_config import ProcessGroupCollection
from ..state import StateSpec
from .checks import fraction, non_negative
from .elementwise import ElementwiseStep, States


class Adam(ElementwiseStep, Optimizer):  # type: ignore[misc]
    """Adam with L2 regularization; state as in ``torch.optim.Adam``.

    Args:
        params: Parameters or parameter groups, any shapes, DTensors or plain tensors.
        lr: Learning rate.
        betas: Decays of the running means of the gradient and its square, in [0, 1).
        eps: Added to the denominator.
        weight_decay: Coefficient, ≥ 0.
        pg_collection: Process groups, for the layout of what is saved.

    Raises:
        ValueError: for an argument out of range.

    Source: Kingma & Ba 2014, algorithm 1, https://arxiv.org/abs/1412.6980
    """

    decoupled = False

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        non_negative("lr", float(lr))
        if len(betas) != 2:
            raise ValueError(f"betas={betas} must be two numbers, of the gradient's mean and of its square's.")
        fraction("betas[0]", betas[0])
        fraction("betas[1]", betas[1])
        non_negative("eps", eps)
        non_negative("weight_decay", weight_decay)
        self.pg_collection = pg_collection
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.take_state()

    def specs(self, group: Mapping[str, Any]) -> Mapping[str, StateSpec]:
        """``exp_avg``, ``exp_avg_sq`` like the parameter; ``step`` a scalar."""
        return {"step": StateSpec("", dtype=torch.float32), "exp_avg": StateSpec("*"), "exp_avg_sq": StateSpec("*")}

    def update_(self, params: list[Tensor], grads: list[Tensor], states: States, group: Mapping[str, Any]) -> None:
        """Algorithm 1."""
        beta1, beta2 = group["betas"]
        adam(
            params,
            grads,
            states["exp_avg"],
            states["exp_avg_sq"],
            [],
            states["step"],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            decoupled_weight_decay=self.decoupled,
        )


class AdamW(Adam):
    """Adam with decoupled weight decay; state as in ``torch.optim.AdamW``. Arguments as :class:`Adam`.

    Source: Loshchilov & Hutter 2017, algorithm 2, https://arxiv.org/abs/1711.05101
    """

    decoupled = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, pg_collection)
