"""Stochastic gradient descent with momentum."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...process_groups_config import ProcessGroupCollection
from ...sharding.state import StateSpec
from ..steps.argument_checks import fraction, non_negative
from ..steps.elementwise import ElementwiseStep, States


class SGD(ElementwiseStep):
    """``b ← μb + (1-τ)(g + wd·p)``; ``p ← p - lr·(g + wd·p + μb)`` with Nesterov, else ``p - lr·b``. As ``torch.optim.SGD``.

    Args:
        params: Parameters or parameter groups, any shapes, DTensors or plain tensors.
        lr: Learning rate.
        momentum: μ, in [0, 1); 0 keeps no state.
        weight_decay: wd ≥ 0, added to the gradient.
        nesterov: Look one step ahead; needs momentum, and no dampening.
        dampening: τ, in [0, 1]; the first step has none.
        pg_collection: Process groups, for the layout of what is saved.

    Raises:
        ValueError: for an argument out of range.

    Source: Sutskever et al. 2013, section 2, https://proceedings.mlr.press/v28/sutskever13.html, in torch's form.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        dampening: float = 0.0,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        non_negative("lr", float(lr))
        fraction("momentum", momentum)
        non_negative("weight_decay", weight_decay)
        if not 0 <= dampening <= 1:
            raise ValueError(f"dampening={dampening} must be at least 0 and at most 1.")
        if nesterov and (not momentum or dampening):
            raise ValueError(
                f"nesterov=True needs a momentum above 0 and dampening=0; got momentum={momentum}, dampening={dampening}."
            )
        super().__init__(
            params,
            pg_collection,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
            dampening=dampening,
        )

    def specs(self, group: Mapping[str, Any]) -> Mapping[str, StateSpec]:
        """``momentum_buffer`` like the parameter, when there is momentum; ``step``, when there is dampening."""
        if not group["momentum"]:
            return {}
        step = {"step": StateSpec("", dtype=torch.float32, host=True)} if group["dampening"] else {}
        return {"momentum_buffer": StateSpec("*"), **step}

    def one_pass(self, group: Mapping[str, Any]) -> bool:
        """Whether torch's fused kernel is used; with dampening it is not, because a parameter's first step differs then."""
        return "step" not in self.specs(group)

    def scalars(self, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> dict[str, Any]:
        """This step's ``dampening``."""
        return {"dampening": group["dampening"] if state["step"].add_(1) > 1 else 0.0}

    def update_(self, params: list[Tensor], grads: list[Tensor], states: States, group: Mapping[str, Any]) -> None:
        """The rule above."""
        torch._fused_sgd_(
            params,
            grads,
            states.get("momentum_buffer", []),
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=float(group["lr"]),
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=False,
            is_first_step=False,
        )
