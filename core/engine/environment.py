"""The engine's environment variables, and how large a wave is."""

import os

WAVE = "SHARDSTEP_WAVE"
"""Environment variable: entries of whole matrices that a rank takes in per wave; bits do not depend on it."""

CHECK = "SHARDSTEP_CHECK"
"""Environment variable: ``1`` makes the ranks of a group compare what they ask for before each collective; slow, to debug."""

SMALLEST_WAVE = {"cpu": 2**20}
"""Entries of a wave by device, elsewhere 2^24, when :data:`WAVE` is not set: a wave must be worth its two collectives."""


def wave_entries(device: str) -> int:
    """Entries of whole matrices that a rank takes in per wave on a ``cpu``, ``cuda``, …, unless one matrix is larger."""
    return SMALLEST_WAVE.get(device, 2**24)


def wave_limit(largest: int, device: str) -> int:
    """Entries that a wave may bring to a rank.

    Args:
        largest: Entries of the largest whole matrix that travels.
        device: Where it is: ``cpu``, ``cuda``, ….

    Raises:
        ValueError: when :data:`WAVE` is not a positive whole number.
    """
    given = os.environ.get(WAVE)
    if given is None:
        return max(wave_entries(device), largest)
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(
            f"{WAVE} is {given!r}, but must be a whole number of entries, at least 1; unset it for the default."
        )
    return int(given)


def checks_ranks() -> bool:
    """Whether the user asked for :data:`CHECK`.

    Raises:
        ValueError: when it is set to something else than 0 or 1.
    """
    given = os.environ.get(CHECK, "0")
    if given not in ("", "0", "1"):
        raise ValueError(
            f"{CHECK} is {given!r}, but must be 1, to compare what ranks ask for, or 0 or unset for no checks."
        )
    return given == "1"
