"""Running means and Adam's step, as several optimizers use them: on lists, on stacks, and by torch's fused kernel."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from ....sharding.state import StateSpec
from ...steps.argument_checks import choice

MU_DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}
"""Names of the dtypes in which a mean of gradients can be kept; None: the parameter's, but at least float32."""

SPECS = {"step": StateSpec("", dtype=torch.float32), "exp_avg": StateSpec("*"), "exp_avg_sq": StateSpec("*")}
"""The state that :func:`adam_step_` works on."""


def check_mu_dtype(mu_dtype: str | None) -> None:
    """Raise ValueError unless ``mu_dtype`` is None or a name in :data:`MU_DTYPES`."""
    if mu_dtype is not None:
        choice("mu_dtype", mu_dtype, [name for name in MU_DTYPES if name])


def bias_corrections(step: Tensor, betas: tuple[float, ...]) -> tuple[float, ...]:
    """Advance ``step``, a scalar on the host, by 1 to t in place; returns 1 - βᵗ for each β."""
    t = float(step.add_(1))
    return tuple(1 - beta**t for beta in betas)


def mean_square_(squares: list[Tensor], grads: list[Tensor], beta: float) -> None:
    """``v ← βv + (1-β)g²`` in place."""
    torch._foreach_mul_(squares, beta)
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta)


def denominators(squares: list[Tensor], scale: float, eps: float, eps_root: float = 0.0) -> list[Tensor]:
    """``√(scale·v + eps_root) + eps``, in new tensors."""
    if eps_root:
        roots = list(torch._foreach_mul(squares, scale))
        torch._foreach_add_(roots, eps_root)
        torch._foreach_sqrt_(roots)
    else:
        roots = list(torch._foreach_sqrt(squares))
        if scale != 1:
            torch._foreach_mul_(roots, math.sqrt(scale))
    torch._foreach_add_(roots, eps)
    return roots


def per_parameter(x: Tensor, like: Tensor) -> Tensor:
    """``x`` (B,), one number per parameter, as (B, 1, …, 1) in the dtype and on the device of ``like`` (B, *shard)."""
    return x.to(device=like.device, dtype=like.dtype).view(-1, *[1] * (like.ndim - 1))


def bias_correction(beta: float, step: Tensor, like: Tensor) -> Tensor:
    """1 - βᵗ for the step counts ``step`` (B,), computed in float64; (B, 1, …, 1) of the dtype of ``like``.

    Source: Kingma & Ba 2014, section 3, https://arxiv.org/abs/1412.6980
    """
    return per_parameter(1 - torch.pow(beta, step.double()), like)


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
        g: Gradients of the block, or tensors in their place; of the same shape.
        s: State :data:`SPECS` of the whole stack; the block of the means is updated. ``step`` counts the steps before this
            one; the calling rule must advance it after the last block.
        group: Parameter group with ``betas`` and ``eps``.
        at: Index of the block in the stack.
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
        params: Contiguous tensors of one dtype and device.
        grads: Gradients of ``params``.
        states: State name → state of each tensor, of the same dtype; ``step`` is a float32 scalar on the same device.
        group: Parameter group with ``lr``, ``betas``, ``eps`` and ``weight_decay``.
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
