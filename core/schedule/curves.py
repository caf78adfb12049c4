"""Curves that fall from a high value to a low one, as functions of the share of the fall that is over."""

import math
from collections.abc import Callable

COEFFICIENTS: dict[str, Callable[[float], float]] = {
    "exponential": lambda share: 2.0 * 0.5**share - 1.0,
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
    "minus_sqrt": lambda share: 1.0 - math.sqrt(share),
}
"""Name of a curve → share of the height that is left, from 1 to 0. Curves and names are those of Megatron-Core's
``--lr-wsd-decay-style``."""

HARMONIC = "harmonic"
FALLS = (*COEFFICIENTS, HARMONIC)
"""Names of all curves that :func:`fall` knows."""


def fall(shape: str, share: float, high: float = 1.0, low: float = 0.0) -> float:
    """Value of a fall from ``high`` at ``share`` 0 to ``low`` at ``share`` 1.

    Args:
        shape: One of ``FALLS``; with ``harmonic`` the inverse of the value is linear, so ``low`` must be above 0.
        share: Share of the fall that is over, 0 to 1.
        high: First value.
        low: Last value.

    Source of ``harmonic``: https://arxiv.org/abs/2410.05192
    """
    if shape == HARMONIC:
        return 1.0 / (share / low + (1.0 - share) / high)
    return low + (high - low) * COEFFICIENTS[shape](share)
