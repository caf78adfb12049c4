"""Schedules as pure functions ``step -> factor``, each with its source; `ScheduleLR` sets learning rates by them.

``step`` is the number of optimizer steps already finished, so the first step of a run uses the factor at 0. A factor of 1 is the
peak learning rate; ``floor`` is the lowest learning rate divided by the peak. Settings that they share:

    warmup: number of steps of a straight line from ``init`` to 1.
    total: step at which the floor is reached; the factor stays there afterwards.

Names and curves of the first five are those of Megatron-Core's ``OptimizerParamScheduler``.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from .curves import HARMONIC, fall
from .registry import register_scheduler
from .setting_ranges import check_ranges

WSDDecay = Literal["exponential", "linear", "cosine", "minus_sqrt", "harmonic"]
Annealing = Literal["exponential", "rsqrt"]


@register_scheduler("constant", check=check_ranges)
def constant(step: int, *, warmup: int = 0, init: float = 0.0) -> float:
    """Warm-up, then constant at 1."""
    return _warm(step, warmup, init) if step <= warmup else 1.0


@register_scheduler("linear", check=check_ranges)
def linear(step: int, *, warmup: int = 0, total: int, floor: float = 0.0, init: float = 0.0) -> float:
    """Warm-up, then a straight line to ``floor`` at ``total``."""
    if step <= warmup:
        return _warm(step, warmup, init)
    return fall("linear", _share(step, warmup, total), low=floor) if step < total else floor


@register_scheduler("cosine", check=check_ranges)
def cosine(
    step: int,
    *,
    warmup: int = 0,
    total: int,
    floor: float = 0.0,
    exponent: float = 1.0,
    clamp: bool = True,
    init: float = 0.0,
) -> float:
    """Warm-up, then half a cosine, to the power of ``exponent``, to ``floor`` at ``total``.

    Args:
        clamp: Stay at ``floor`` after ``total``; otherwise the cosine goes on, up to 1 again and down.

    Source: https://arxiv.org/abs/1608.03983, equation 5 without restarts; the exponent is optax's.
    """
    if step <= warmup:
        return _warm(step, warmup, init)
    if step > total and clamp:
        return floor
    return float(floor + (1.0 - floor) * fall("cosine", _share(step, warmup, total)) ** exponent)


@register_scheduler("inverse-square-root", check=check_ranges)
def inverse_square_root(step: int, *, warmup: int = 0, total: int, floor: float = 0.0, init: float = 0.0) -> float:
    """Warm-up, then ``sqrt(warmup / step)``, never below ``floor``; ``floor`` after ``total``.

    Source: https://arxiv.org/abs/1706.03762, section 5.3
    """
    if step <= warmup:
        return _warm(step, warmup, init)
    if step > total:
        return floor
    return max(floor, math.sqrt(max(warmup, 1) / max(step, 1)))


def _check_wsd(settings: Mapping[str, Any]) -> None:
    check_ranges(settings)
    if settings["anneal"] == HARMONIC and settings["floor"] == 0:
        raise ValueError(
            "floor is 0, and harmonic decay never gets there; possible: (0, 1]. Give a lowest learning rate."
        )


@register_scheduler("WSD", check=_check_wsd)
def wsd(
    step: int,
    *,
    warmup: int = 0,
    total: int,
    decay: int,
    floor: float = 0.0,
    anneal: WSDDecay = "exponential",
    init: float = 0.0,
) -> float:
    """Warm-up, stable, decay: after the warm-up 1, until the last ``decay`` steps before ``total`` fall to ``floor``.

    Args:
        decay: Number of steps of the decay.
        anneal: Curve of the decay; see `curves.fall`. ``harmonic`` needs a floor above 0.

    Source: https://arxiv.org/abs/2404.06395; the harmonic fall: https://arxiv.org/abs/2410.05192
    """
    if step <= warmup:
        return _warm(step, warmup, init)
    if step <= total - decay:
        return 1.0
    return fall(anneal, _share(step, total - decay, total), low=floor) if step < total else floor


@register_scheduler("cosine-with-restarts", check=check_ranges)
def cosine_with_restarts(
    step: int, *, warmup: int = 0, t_0: int = 1000, t_mult: float = 2.0, floor: float = 0.0, init: float = 0.0
) -> float:
    """Warm-up, then cosines from 1 to ``floor``: the first takes ``t_0`` steps, each ``t_mult`` times those of the one before.

    Source: https://arxiv.org/abs/1608.03983, equation 5
    """
    if step <= warmup:
        return _warm(step, warmup, init)
    step_of_cycle = step - warmup
    if t_mult == 1:
        step_of_cycle %= t_0
    for length in cycle_lengths(t_0, t_mult):
        if step_of_cycle < length:
            break
        step_of_cycle -= length
    return fall("cosine", step_of_cycle / length, low=floor)


def cycle_lengths(t_0: int, t_mult: float) -> Iterator[int]:
    """Length in steps of each cycle of `cosine_with_restarts`, without end; whole numbers for every ``t_mult``."""
    length = t_0
    while True:
        yield length
        length = round(min(length * t_mult, 2.0**53))


@register_scheduler("polynomial", check=check_ranges)
def polynomial(
    step: int, *, warmup: int = 0, total: int, power: float = 1.0, floor: float = 0.0, init: float = 0.0
) -> float:
    """Warm-up, then ``(1 - share of the way to total) ** power``, above ``floor``. Source: torch's ``PolynomialLR``."""
    if step <= warmup:
        return _warm(step, warmup, init)
    return floor + (1.0 - floor) * (1.0 - _share(step, warmup, total)) ** power if step < total else floor


@register_scheduler("exponential", check=check_ranges)
def exponential(
    step: int,
    *,
    warmup: int = 0,
    gamma: float,
    interval: int = 1,
    staircase: bool = False,
    floor: float = 0.0,
    init: float = 0.0,
) -> float:
    """Warm-up, then multiplied by ``gamma`` every ``interval`` steps, at least ``floor``. Source: torch's ``ExponentialLR``.

    Args:
        staircase: Fall at the end of each interval, instead of a little in each step.
    """
    if step <= warmup:
        return _warm(step, warmup, init)
    intervals = (step - warmup) // interval if staircase else (step - warmup) / interval
    return max(floor, float(gamma**intervals))


@register_scheduler("step", check=check_ranges)
def step_decay(
    step: int, *, warmup: int = 0, gamma: float = 0.1, interval: int, floor: float = 0.0, init: float = 0.0
) -> float:
    """Warm-up, then multiplied by ``gamma`` after every ``interval`` steps, at least ``floor``. Source: torch's ``StepLR``."""
    return exponential(step, warmup=warmup, gamma=gamma, interval=interval, staircase=True, floor=floor, init=init)


def _check_infinite(settings: Mapping[str, Any]) -> None:
    check_ranges(settings)
    if settings["floor"] == 0:
        raise ValueError("floor is 0, and annealing never gets there; possible: (0, 1]. Give a lowest learning rate.")
    if settings["begin"] >= 0 and settings["floor"] > settings["constant"]:
        raise ValueError(f"floor is {settings['floor']}, above the constant {settings['constant']}; lower it.")
    if settings["anneal"] == "rsqrt" and not settings["decay"]:
        raise ValueError("rsqrt annealing needs the number of its steps, but decay is 0; possible: 1 and more.")


@register_scheduler("infinite", check=_check_infinite)
def infinite(
    step: int,
    *,
    warmup: int = 0,
    cooldown: int = 0,
    constant: float = 1.0,
    begin: int = -1,
    anneal: Annealing = "exponential",
    tau: float = 1e4,
    decay: int = 0,
    floor: float,
    init: float = 0.0,
) -> float:
    """Warm-up, half a cosine from 1 to ``constant`` over ``cooldown`` steps, then ``constant``, until annealing begins, if ever.

    Without a cooldown the constant phase is at 1, and annealing still begins at ``constant``.

    Args:
        begin: Step at which annealing begins; -1 for never.
        anneal: ``exponential``: ``constant (floor / constant) ** ((step - begin) / (tau + begin))``, never below ``floor``;
            ``rsqrt``: the harmonic fall to ``floor`` over ``decay`` steps.

    Source: https://arxiv.org/abs/2503.02844, equation 1; ``rsqrt``: https://arxiv.org/abs/2410.05192
    """
    if step < warmup:
        return _warm(step, warmup, init)
    if step < warmup + cooldown:
        return fall("cosine", (step - warmup) / cooldown, low=constant)
    if begin < 0 or step < begin:
        return constant if cooldown else 1.0
    if anneal == "rsqrt":
        return fall(HARMONIC, (step - begin) / decay, constant, floor) if step < begin + decay else floor
    return float(max(floor, constant * (floor / constant) ** ((step - begin) / (tau + begin))))


def _warm(step: int, warmup: int, init: float) -> float:
    return init + (1.0 - init) * step / warmup if step < warmup else 1.0


def _share(step: int, start: int, end: int) -> float:
    return (step - start) / (end - start)
