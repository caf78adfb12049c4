"""Possible values of the settings of schedules, by the names that all schedules of this package share."""

import math
from collections.abc import Callable, Mapping
from typing import Any

_WHOLE: dict[str, int] = {"warmup": 0, "total": 1, "decay": 0, "cooldown": 0, "t_0": 1, "interval": 1, "begin": -1}
"""Setting that is a whole number of steps → its smallest possible value."""

_REAL: dict[str, tuple[Callable[[float], bool], str]] = {
    "floor": (lambda x: 0 <= x <= 1, "[0, 1]. It is the lowest learning rate divided by the peak"),
    "init": (lambda x: 0 <= x <= 1, "[0, 1]. It is the first learning rate divided by the peak"),
    "constant": (lambda x: x > 0, "> 0. It is the constant learning rate divided by the peak"),
    "pct_start": (lambda x: 0 <= x <= 1, "[0, 1]. It is the share of the steps that go up"),
    "gamma": (lambda x: 0 < x <= 1, "(0, 1]. Take one below 1 to decay"),
    "t_mult": (lambda x: x >= 1, ">= 1. It is how much longer each cycle is than the one before"),
    "power": (lambda x: x > 0, "> 0. 1 is a straight line"),
    "exponent": (lambda x: x > 0, "> 0. 1 is the plain cosine"),
    "tau": (lambda x: x > 0, "> 0, in steps"),
    "div_factor": (lambda x: x >= 1, ">= 1. It is the peak divided by the first learning rate"),
    "final_div_factor": (lambda x: x >= 1, ">= 1. It is the first learning rate divided by the last"),
}
"""Setting that is a real number → check of its value, and text of the error: possible values and meaning."""


def check_ranges(settings: Mapping[str, Any]) -> None:
    """Refuse settings that no schedule can have, alone or together; settings of other names are not checked.

    Raises:
        ValueError: names the setting, its value and the possible values.
    """
    for setting, value in settings.items():
        if setting in _WHOLE and (not isinstance(value, int) or isinstance(value, bool) or value < _WHOLE[setting]):
            least = _WHOLE[setting]
            raise ValueError(f"{setting} is {value!r}; possible: whole numbers >= {least}. It is a number of steps.")
        if setting in _REAL:
            fits, possible = _REAL[setting]
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or not fits(value):
                raise ValueError(f"{setting} is {value!r}; possible: {possible}.")
    _check_lengths(settings)


def _check_lengths(settings: Mapping[str, Any]) -> None:
    warmup, total = settings.get("warmup", 0), settings.get("total")
    if total is not None and warmup >= total:
        raise ValueError(f"warmup is {warmup} steps of {total}; possible: 0 <= warmup < total. Shorten the warm-up.")
    if total is not None and "decay" in settings and not 0 < settings["decay"] <= total - warmup:
        raise ValueError(
            f"decay is {settings['decay']} steps; possible: 1..{total - warmup} "
            f"(what the warm-up of {warmup} leaves of {total} steps)."
        )
    start = warmup + settings.get("cooldown", 0)
    if 0 <= settings.get("begin", -1) < start:
        raise ValueError(
            f"annealing begins at step {settings['begin']}; possible: -1 for never, or {start} and later: warm-up and "
            f"cooldown come first."
        )
