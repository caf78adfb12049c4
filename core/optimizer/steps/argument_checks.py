"""Checks of constructor arguments; each error says what was given and what is possible."""

import math
from collections.abc import Sequence
from difflib import get_close_matches


def choice(name: str, value: str, possible: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``possible``."""
    if value not in possible:
        raise ValueError(f"{name}={value!r} is unknown; possible: {', '.join(possible)}.")


def non_negative(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is a finite number ≥ 0."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value} must be a finite number of at least 0.")


def fraction(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value} must be at least 0 and below 1.")


def whole_number(name: str, value: int, least: int) -> None:
    """Raise ValueError unless ``value`` is an integer of at least ``least``."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value} must be a whole number of at least {least}.")


def positive(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is a finite number > 0."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value} must be a finite number above 0.")


def check_adam(lr: float, betas: tuple[float, ...], eps: float, weight_decay: float, *, count: int = 2) -> None:
    """Raise ValueError for an argument out of range; ``count`` is the number of betas."""
    non_negative("lr", float(lr))
    if len(betas) != count:
        raise ValueError(f"betas={betas} must be {count} numbers, each the decay of one running mean.")
    for i, beta in enumerate(betas):
        fraction(f"betas[{i}]", beta)
    non_negative("eps", eps)
    non_negative("weight_decay", weight_decay)


def unknown(what: str, name: str, valid: list[str] | tuple[str, ...]) -> str:
    """Error text for a ``name`` that is not in ``valid``; it suggests the most similar names and lists all.

    ``what`` is the noun that precedes the name, such as ``optimizer``.
    """
    near = get_close_matches(name, valid, n=3)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    return f"unknown {what} {name!r}; {hint}possible: {', '.join(sorted(valid))}."
