"""The one-cycle policy: the learning rate goes up and down once, and momentum goes the other way.

Source: https://arxiv.org/abs/1708.07120; phases and defaults are those of torch's ``OneCycleLR``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from .curves import fall
from .registry import register_scheduler
from .setting_ranges import check_settings

Anneal = Literal["cosine", "linear"]


def _fits(settings: Mapping[str, Any]) -> None:
    check_settings(settings)
    if settings["three_phase"] and settings["pct_start"] > 0.5:
        raise ValueError(
            f"pct_start is {settings['pct_start']}, and with three phases going down takes as long; possible: [0, 0.5]."
        )


@register_scheduler("one-cycle", check=_fits)
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
    """From ``1 / div_factor`` up to 1, and down to ``1 / (div_factor * final_div_factor)`` at step ``total - 1``.

    Args:
        pct_start: The share of the steps that go up.
        three_phase: Go down as fast as up, and then from the first factor to the last.
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
    """The momentum, or first beta, that goes with `one_cycle`: ``base_momentum`` where the learning rate is highest."""
    high, low = max_momentum, base_momentum
    return _along(step, (high, low, high, high) if three_phase else (high, low, high), total, pct_start, anneal)


def one_cycle_ends(total: int, pct_start: float, three_phase: bool) -> list[float]:
    """The step at which each phase ends; not always a whole number."""
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
