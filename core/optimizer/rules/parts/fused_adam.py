"""Adam's step by torch's fused kernel, for rules that take it block by block or do something to it before they take it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from ....sharding.state import StateSpec

SPECS = {"step": StateSpec("", dtype=torch.float32), "exp_avg": StateSpec("*"), "exp_avg_sq": StateSpec("*")}
"""The state that :func:`adam_step_` works on."""


def adam_step_(
    x: Tensor,
    g: Tensor,
    s: Any,
    group: Mapping[str, Any],
    at: tuple[slice, ...] = (),
    *,
    lr: float = -1.0,
    weight_decay: float = 0.0,
) -> Tensor:
    """``x ← (1 - lr·λ)·x - lr · m̂ / (√v̂ + ε)`` after an update of Adam's running means, in one pass over memory.

    With the default ``lr``, Adam's direction is added to ``x``.

    Args:
        x: A contiguous block of a stack (B, *shard); updated.
        g: Its gradients, or what takes their place; of the same shape.
        s: State :data:`SPECS` of the whole stack; the block of the means is updated. ``step`` counts the steps before this
            one; the rule is to advance it when it is through with all blocks.
        group: Holds ``betas`` and ``eps``.
        at: Where the block is.
        lr: Learning rate.
        weight_decay: λ, decoupled.

    Returns:
        ``x``.

    Source: Kingma & Ba 2014, algorithm 1, https://arxiv.org/abs/1412.6980
    """
    states = {"exp_avg": list(s.exp_avg[at]), "exp_avg_sq": list(s.exp_avg_sq[at]), "step": list(s.step.clone())}
    fused_adam_(
        list(x), list(g.contiguous()), states, {**group, "lr": lr, "weight_decay": weight_decay}, decoupled=True
    )
    return x


def fused_adam_(
    params: list[Tensor],
    grads: list[Tensor],
    states: Mapping[str, list[Tensor]],
    group: Mapping[str, Any],
    *,
    decoupled: bool,
) -> None:
    """Torch's kernel on lists of tensors; updates ``params`` and ``states`` :data:`SPECS`, whose ``step`` it advances by 1.

    Args:
        params: Contiguous, all of one dtype and device.
        grads: Theirs.
        states: State name → their state, of the same dtype; ``step`` a float32 scalar on the same device.
        group: Holds ``lr``, ``betas``, ``eps`` and ``weight_decay``.
        decoupled: False adds weight decay to the gradient.
    """
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
        decoupled_weight_decay=decoupled,
    )
