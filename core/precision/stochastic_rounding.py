"""Stochastic rounding of float32 to bfloat16: small updates of 16-bit parameters are kept on average, not lost."""

import torch
from torch import Tensor


def stochastic_round(x: Tensor, noise: Tensor) -> Tensor:
    """``x`` rounded to one of its two bfloat16 neighbours, with the probabilities that make its mean ``x``.

    Args:
        x: float32, any shape. Infinities and NaN are kept.
        noise: Integers of the shape of ``x``, of which the lowest 16 bits are used: random and independent
            (:func:`core.philox.bits`).

    Returns:
        A bfloat16 tensor of the shape of ``x``. Values that bfloat16 can hold are unchanged.

    Raises:
        ValueError: when ``x`` is not float32.

    Source: Zamirai et al. 2020, "Revisiting BFloat16 Training", https://arxiv.org/abs/2010.06192
    """
    if x.dtype != torch.float32:
        raise ValueError(
            f"stochastic rounding is from float32 to bfloat16; got {x.dtype}. Convert it to float32 first."
        )
    # A carry out of the 16 bits that are dropped happens with probability (dropped bits) / 2¹⁶.
    bits = x.contiguous().view(torch.int32) + (noise & 0xFFFF).int()
    rounded = (bits & ~0xFFFF).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).bfloat16()
