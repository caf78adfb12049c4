"""The engine's environment variables, and how large a wave is."""

import os

WAVE = "SHARDSTEP_WAVE"
"""Environment variable: entries of whole matrices that a rank takes in per wave. Results do not depend on it, bit for bit."""

CHECK = "SHARDSTEP_CHECK"
"""Environment variable: ``1`` makes the ranks of a group compare their requests before each collective; slow, for debugging."""

SMALLEST_WAVE = {"cpu": 2**20}
"""Least entries of a wave by type of device, elsewhere 2^24, unless :data:`WAVE` is set; fewer are not worth two collectives."""


def wave_entries(device: str) -> int:
    """Entries of whole matrices that a rank takes in per wave on a ``cpu``, ``cuda``, …, unless one matrix is larger."""
    return SMALLEST_WAVE.get(device, 2**24)


def wave_limit(largest: int, device: str) -> int:
    """Entries that a wave may bring to a rank.

    Args:
        largest: Entries of the largest whole matrix that travels.
        device: Type of its device: ``cpu``, ``cuda``, ….

    Raises:
        ValueError: when :data:`WAVE` is not a positive whole number.
    """
    setting = os.environ.get(WAVE)
    if setting is None:
        return max(wave_entries(device), largest)
    if not setting.isdecimal() or int(setting) < 1:
        raise ValueError(
            f"{WAVE} is {setting!r}, but must be a whole number of entries, at least 1; unset it for the default."
        )
    return int(setting)


def checks_ranks() -> bool:
    """Whether :data:`CHECK` is set to 1.

    Raises:
        ValueError: when it is set to anything but 0 or 1.
    """
    setting = os.environ.get(CHECK, "0")
    if setting not in ("", "0", "1"):
        raise ValueError(
            f"{CHECK} is {setting!r}, but must be 1, to compare what ranks ask for, or 0 or unset for no checks."
        )
    return setting == "1"
