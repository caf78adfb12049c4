"""RMSProp in the forms of optax and torch."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...process_groups_config import ProcessGroupCollection
from ...sharding.state import StateSpec
from ..steps.argument_checks import choice, fraction, non_negative
from ..steps.elementwise import ElementwiseStep, States
from ..steps.weight_decay import decay_
from .parts.adam_parts import denominators, mean_square_

DECAYS = {"optax": 0.9, "torch": 0.99}


class RMSprop(ElementwiseStep):
    """``v ← decay·v + (1-decay)·g²``, then a step by ``g`` over the root of ``v``, with momentum.

    The two variants differ in the place of ε, and in the quantity that the momentum accumulates:

    * ``optax``: ``b ← μb + lr·g/√(v + ε)``; ``p ← p - b``, with Nesterov ``p - (μb + lr·g/√(v + ε))``; weight decay decoupled.
    * ``torch``: ``b ← μb + g/(√v + ε)``; ``p ← p - lr·b``; weight decay added to the gradient. As ``torch.optim.RMSprop``.

    Args:
        params: Parameters or parameter groups, any shapes, DTensors or plain tensors.
        lr: Learning rate.
        decay: Decay of v, in [0, 1); None: 0.9 for ``optax``, 0.99 for ``torch``.
        eps: ε ≥ 0; with 0, a gradient that was always zero gives NaN.
        initial_scale: v before the first step, ≥ 0.
        momentum: μ, in [0, 1); 0 keeps no momentum.
        nesterov: Look one step ahead; needs momentum.
        weight_decay: Coefficient, ≥ 0.
        variant: ``optax`` or ``torch``.
        pg_collection: Process groups, for the layout of what is saved.

    Raises:
        ValueError: for an argument out of range.

    Source: Tieleman & Hinton 2012, lecture 6.5, https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        decay: float | None = None,
        eps: float = 1e-8,
        initial_scale: float = 0.0,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        variant: Literal["optax", "torch"] = "optax",
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        choice("variant", variant, list(DECAYS))
        decay = DECAYS[variant] if decay is None else decay
        fraction("decay", decay)
        fraction("momentum", momentum)
        for name, value in (("lr", float(lr)), ("eps", eps), ("initial_scale", initial_scale)):
            non_negative(name, value)
        non_negative("weight_decay", weight_decay)
        if nesterov and not momentum:
            raise ValueError("nesterov=True needs a momentum above 0; got momentum=0.")
        super().__init__(
            params,
            pg_collection,
            lr=lr,
            decay=decay,
            eps=eps,
            initial_scale=initial_scale,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            variant=variant,
        )

    def specs(self, group: Mapping[str, Any]) -> Mapping[str, StateSpec]:
        """``square_avg``, and ``momentum_buffer`` if there is momentum, like the parameter; ``step`` a scalar."""
        momentum = {"momentum_buffer": StateSpec("*")} if group["momentum"] else {}
        return {"step": StateSpec("", dtype=torch.float32, host=True), "square_avg": StateSpec("*"), **momentum}

    def scalars(self, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> dict[str, Any]:
        """Whether this step is the ``first``."""
        return {"first": float(state["step"].add_(1)) == 1}

    def update_(self, params: list[Tensor], grads: list[Tensor], states: States, group: Mapping[str, Any]) -> None:
        """The rule above."""
        optax, lr, squares = group["variant"] == "optax", float(group["lr"]), states["square_avg"]
        if group["first"] and group["initial_scale"]:
            torch._foreach_add_(squares, group["initial_scale"])
        grads = decay_(params, grads, group, "decoupled" if optax else "l2")
        mean_square_(squares, grads, group["decay"])
        eps, eps_root = (0.0, group["eps"]) if optax else (group["eps"], 0.0)
        roots = denominators(squares, 1.0, eps, eps_root)
        if not group["momentum"]:
            torch._foreach_addcdiv_(params, grads, roots, -lr)
            return
        steps = list(torch._foreach_div(grads, roots))
        if optax:
            torch._foreach_mul_(steps, lr)
        buffers = states["momentum_buffer"]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, steps)
        if group["nesterov"]:
            torch._foreach_add_(steps, buffers, alpha=group["momentum"])
        else:
            steps = buffers
        torch._foreach_sub_(params, steps, alpha=1.0 if optax else lr)
