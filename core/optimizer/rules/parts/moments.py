"""Running means, as rules on stacks use them."""

import torch
from torch import Tensor


def per_parameter(x: Tensor, like: Tensor) -> Tensor:
    """``x`` (B,), one number a parameter, as (B, 1, …, 1) of the dtype and device of ``like`` (B, *shard)."""
    return x.to(device=like.device, dtype=like.dtype).view(-1, *[1] * (like.ndim - 1))


def bias_correction(beta: float, step: Tensor, like: Tensor) -> Tensor:
    """1 - βᵗ for the step counts ``step`` (B,), computed in float64; (B, 1, …, 1) of the dtype of ``like``.

    Source: Kingma & Ba 2014, section 3, https://arxiv.org/abs/1412.6980
    """
    return per_parameter(1 - torch.pow(beta, step.double()), like)
