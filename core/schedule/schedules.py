"""Pure functions ``step -> factor``, for ``torch.optim.lr_scheduler.LambdaLR``.

``step`` is the number of optimizer steps already finished, so the first step of a run uses the factor at 0. A factor
of 1 is the peak learning rate; ``floor`` is the lowest learning rate divided by the peak. All of them warm up linearly
from 0 over ``warmup`` steps and stay at ``floor`` after ``total``. Style names and curves are those of Megatron-Core's
``OptimizerParamScheduler``.
"""

import math
from collections.abc import Callable
from functools import partial

Schedule = Callable[[int], float]

# How the last part of `wsd` falls from 1 to 0, by the share of it that is over.
_ANNEALS: dict[str, Callable[[float], float]] = {
    "exponential": lambda share: 2.0 * 0.5**share - 1.0,
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
    "minus_sqrt": lambda share: 1.0 - math.sqrt(share),
}

DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
WSD_DECAY_STYLES = tuple(_ANNEALS)


def constant(step: int, *, warmup: int = 0) -> float:
    """Linear warm-up, then 1 for ever."""
    return step / warmup if step < warmup else 1.0


def linear(step: int, *, warmup: int, total: int, floor: float = 0.0) -> float:
    """Linear warm-up, then a straight line to ``floor`` at ``total``."""
    return _decay(step, warmup=warmup, start=warmup, total=total, floor=floor, anneal="linear")


def cosine(step: int, *, warmup: int, total: int, floor: float = 0.0) -> float:
    """Linear warm-up, then half a cosine to ``floor`` at ``total``. Source: https://arxiv.org/abs/1608.03983"""
    return _decay(step, warmup=warmup, start=warmup, total=total, floor=floor, anneal="cosine")


def inverse_square_root(step: int, *, warmup: int, total: int, floor: float = 0.0) -> float:
    """Linear warm-up, then ``sqrt(warmup / step)``, never below ``floor``; ``floor`` after ``total``.

    Source: https://arxiv.org/abs/1706.03762, section 5.3
    """
    if step < warmup:
        return step / warmup
    if step > total:
        return floor
    return max(floor, math.sqrt(max(warmup, 1) / max(step, 1)))


def wsd(step: int, *, warmup: int, total: int, decay: int, floor: float = 0.0, anneal: str = "exponential") -> float:
    """Warm-up, stable, decay: linear warm-up, 1, and over the last ``decay`` steps before ``total`` down to ``floor``.

    Args:
        anneal: the shape of the fall, one of ``WSD_DECAY_STYLES``.

    Source: https://arxiv.org/abs/2404.06395; the names of the falls are Megatron-Core's ``--lr-wsd-decay-style``.
    """
    return _decay(step, warmup=warmup, start=total - decay, total=total, floor=floor, anneal=anneal)


def make_schedule(
    style: str,
    *,
    warmup: int,
    total: int,
    floor: float = 0.0,
    wsd_decay: int | None = None,
    wsd_anneal: str = "exponential",
) -> Schedule:
    """The schedule that Megatron-Core calls ``style`` (``--lr-decay-style``), with its lengths filled in.

    Args:
        warmup: steps of linear warm-up, 0 <= warmup < total.
        total: the step at which the floor is reached.
        floor: lowest factor, in [0, 1].
        wsd_decay: length of the last part of ``WSD``, in steps.

    Raises:
        ValueError: unknown style, or lengths that do not fit each other.
    """
    if not 0 <= warmup < total:
        raise ValueError(f"warmup is {warmup} steps of {total}; possible: 0 <= warmup < total. Shorten the warm-up.")
    if not 0.0 <= floor <= 1.0:
        raise ValueError(f"floor is {floor}; possible: [0, 1]. It is the lowest learning rate divided by the peak.")
    if style == "constant":
        return partial(constant, warmup=warmup)
    if style == "linear":
        return partial(linear, warmup=warmup, total=total, floor=floor)
    if style == "cosine":
        return partial(cosine, warmup=warmup, total=total, floor=floor)
    if style == "inverse-square-root":
        return partial(inverse_square_root, warmup=warmup, total=total, floor=floor)
    if style == "WSD":
        if wsd_decay is None or not 0 < wsd_decay <= total - warmup:
            raise ValueError(
                f"WSD needs the length of its decay; given {wsd_decay}, possible: 1..{total - warmup} "
                f"(what the warm-up of {warmup} leaves of {total} steps)."
            )
        if wsd_anneal not in _ANNEALS:
            raise ValueError(f"unknown WSD decay style {wsd_anneal!r}; possible: {', '.join(_ANNEALS)}.")
        return partial(wsd, warmup=warmup, total=total, decay=wsd_decay, floor=floor, anneal=wsd_anneal)
    raise ValueError(f"unknown decay style {style!r}; possible: {', '.join(DECAY_STYLES)}.")


def _decay(step: int, *, warmup: int, start: int, total: int, floor: float, anneal: str) -> float:
    """Up from 0 to 1 until ``warmup``, 1 until ``start``, down to ``floor`` until ``total``."""
    if step < warmup:
        return step / warmup
    if step <= start:
        return 1.0
    if step > total:
        return floor
    return floor + (1.0 - floor) * _ANNEALS[anneal]((step - start) / (total - start))
