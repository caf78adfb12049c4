"""Shapes of a fall from a high value to a low one, by the share of it that is over."""

import math
from collections.abc import Callable

COEFFICIENTS: dict[str, Callable[[float], float]] = {
    "exponential": lambda share: 2.0 * 0.5**share - 1.0,
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
    "minus_sqrt": lambda share: 1.0 - math.sqrt(share),
}
"""How much of the way is left, from 1 to 0. Curves and names are those of Megatron-Core's ``--lr-wsd-decay-style``."""

HARMONIC = "harmonic"
FALLS = (*COEFFICIENTS, HARMONIC)


def fall(shape: str, share: float, high: float = 1.0, low: float = 0.0) -> float:
    """From ``high`` at ``share`` 0 to ``low`` at ``share`` 1.

    Args:
        shape: One of ``FALLS``; ``harmonic`` is linear in the inverse, and needs ``low`` > 0.

    Source of ``harmonic``: https://arxiv.org/abs/2410.05192
    """
    if shape == HARMONIC:
        return 1.0 / (share / low + (1.0 - share) / high)
    return low + (high - low) * COEFFICIENTS[shape](share)
