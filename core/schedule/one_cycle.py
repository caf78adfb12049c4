"""The one-cycle policy: the learning rate rises and falls once, while momentum falls and rises.

Source: https://arxiv.org/abs/1708.07120; phases and defaults are those of torch's ``OneCycleLR``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from .curves import fall
from .registry import register_scheduler
from .setting_ranges import check_ranges

Anneal = Literal["cosine", "linear"]


def _check_one_cycle(settings: Mapping[str, Any]) -> None:
    check_ranges(settings)
    if settings["three_phase"] and settings["pct_start"] > 0.5:
        raise ValueError(
            f"pct_start is {settings['pct_start']}, and with three phases the fall takes as long as the rise; possible: [0, 0.5]."
        )


@register_scheduler("one-cycle", check=_check_one_cycle)
def one_cycle(
    step: int,
    *,
    total: int,
    pct_start: float = 0.3,
    anneal: Anneal = "cosine",
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
) -> float:
    """Rise from ``1 / div_factor`` to 1, then fall to ``1 / (div_factor * final_div_factor)`` at step ``total - 1``.

    Args:
        pct_start: Share of the steps in which the factor rises.
        three_phase: Fall in as many steps as the rise took to the first factor, and then to the last factor.
    """
    first = 1.0 / div_factor
    last = first / final_div_factor
    return _along(step, (first, 1.0, first, last) if three_phase else (first, 1.0, last), total, pct_start, anneal)


def one_cycle_momentum(
    step: int,
    *,
    total: int,
    pct_start: float = 0.3,
    anneal: Anneal = "cosine",
    base_momentum: float = 0.85,
    max_momentum: float = 0.95,
    three_phase: bool = False,
) -> float:
    """Momentum, or first beta, for `one_cycle`: ``base_momentum`` at the highest learning rate, ``max_momentum`` at the ends."""
    high, low = max_momentum, base_momentum
    return _along(step, (high, low, high, high) if three_phase else (high, low, high), total, pct_start, anneal)


def one_cycle_ends(total: int, pct_start: float, three_phase: bool) -> list[float]:
    """Steps at which the phases end; not always whole numbers."""
    ends = [pct_start * total - 1, 2 * pct_start * total - 2] if three_phase else [pct_start * total - 1]
    return [*ends, total - 1]


def _along(step: int, values: Sequence[float], total: int, pct_start: float, anneal: str) -> float:
    step, start = min(step, total - 1), 0.0
    ends = one_cycle_ends(total, pct_start, three_phase=len(values) > 3)
    for high, low, end in zip(values[:-1], values[1:], ends, strict=True):
        if step <= end:
            return fall(anneal, (step - start) / (end - start), high, low) if end > start else low
        start = end
    return values[-1]
