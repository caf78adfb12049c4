"""Stochastic gradient descent with momentum."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from ..process_groups_config import ProcessGroupCollection
from ..state import StateSpec
from .checks import fraction, non_negative
from .elementwise import ElementwiseStep, States


class SGD(ElementwiseStep, Optimizer):  # type: ignore[misc]
    """``b ← μb + g + wd·p``; ``p ← p - lr·(g + wd·p + μb)`` with Nesterov, else ``p - lr·b``. As ``torch.optim.SGD``.

    Args:
        params: Parameters or parameter groups, any shapes, DTensors or plain tensors.
        lr: Learning rate.
        momentum: μ, in [0, 1); 0 keeps no state.
        weight_decay: wd ≥ 0, added to the gradient.
        nesterov: Look one step ahead; needs momentum.
        pg_collection: Process groups, for the layout of what is saved.

    Raises:
        ValueError: for an argument out of range.

    Source: Sutskever et al. 2013, section 2, in torch's form.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        non_negative("lr", float(lr))
        fraction("momentum", momentum)
        non_negative("weight_decay", weight_decay)
        if nesterov and not momentum:
            raise ValueError("nesterov=True needs a momentum above 0; got momentum=0.")
        self.pg_collection = pg_collection
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov})
        self.take_state()

    def specs(self, group: Mapping[str, Any]) -> Mapping[str, StateSpec]:
        """``momentum_buffer`` like the parameter, when there is momentum."""
        return {"momentum_buffer": StateSpec("*")} if group["momentum"] else {}

    def update_(self, params: list[Tensor], grads: list[Tensor], states: States, group: Mapping[str, Any]) -> None:
        """The rule above."""
        step = list(torch._foreach_add(grads, params, alpha=group["weight_decay"])) if group["weight_decay"] else grads
        if group["momentum"]:
            buffers = states["momentum_buffer"]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, step)
            step = list(torch._foreach_add(step, buffers, alpha=group["momentum"])) if group["nesterov"] else buffers
        torch._foreach_add_(params, step, alpha=-float(group["lr"]))
