"""The styles of weight decay, in one place for all optimizers."""

from collections.abc import Mapping
from typing import Any, get_args

import torch
from emerging_optimizers.mixin import WeightDecayT
from torch import Tensor

from .argument_checks import choice

METHOD = "weight_decay_method"
"""Setting of a parameter group that replaces the optimizer's own weight decay by one of :data:`METHODS`."""

METHODS: tuple[str, ...] = get_args(WeightDecayT)
"""The styles, by emerging-optimizers' names; see :func:`decay_`."""


def decay_(params: list[Tensor], grads: list[Tensor], group: Mapping[str, Any], method: str) -> list[Tensor]:
    """Weight decay of one step, with the coefficient λ = ``group["weight_decay"]`` and the group's ``lr``.

    ============= ==================
    method        what it does
    ============= ==================
    decoupled     ``p ← (1 - lr·λ)p``
    independent   ``p ← (1 - λ)p``
    palm          ``p ← (1 - lr²·λ)p``
    l2            ``g + λp`` takes the place of ``g``
    ============= ==================

    Args:
        params: Tensors; changed in place, unless ``method`` is ``l2``.
        grads: Gradients of the tensors; not changed.
        group: The parameter group.
        method: One of :data:`METHODS`.

    Returns:
        The gradients to use: ``grads`` themselves, or new tensors.

    Source: Loshchilov & Hutter 2017, section 2, https://arxiv.org/abs/1711.05101, for ``l2`` and ``decoupled``; Chowdhery et
    al. 2022, section 5, https://arxiv.org/abs/2204.02311, for ``palm``; ``emerging_optimizers.mixin`` for all four.
    """
    decay = group["weight_decay"]
    if not decay:
        return grads
    if method == "l2":
        return list(torch._foreach_add(grads, params, alpha=decay))
    torch._foreach_mul_(params, 1 - _share(method, float(group["lr"])) * decay)
    return grads


def decay_first_(
    params: list[Tensor], grads: list[Tensor], group: Mapping[str, Any]
) -> tuple[list[Tensor], Mapping[str, Any]]:
    """Apply :func:`decay_` in place by the group's method, if it has one, before a rule sees the parameters.

    Returns:
        The gradients and the settings for the rule; after such a decay these settings contain no weight decay.
    """
    method = group.get(METHOD)
    if method is None:
        return grads, group
    return decay_(params, grads, group, method), {**group, METHOD: None, "weight_decay": 0.0}


def equivalent(group: Mapping[str, Any], rate: float) -> float:
    """Coefficient with which ``decoupled`` decay at the learning rate ``rate`` equals the decay that the group asks for."""
    method = group.get(METHOD) or "decoupled"
    return float(group["weight_decay"]) * _share(method, rate) / rate if rate else 0.0


def check_method(group: Mapping[str, Any]) -> None:
    """Raise ValueError for a method that does not exist."""
    if group.get(METHOD) is not None:
        choice(METHOD, group[METHOD], METHODS)


def _share(method: str, lr: float) -> float:
    """Factor of the coefficient λ in ``p ← (1 - factor·λ)p``."""
    return {"decoupled": lr, "independent": 1.0, "palm": lr * lr}[method]
