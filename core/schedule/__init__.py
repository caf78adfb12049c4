"""Learning-rate schedules: pure functions from the number of finished steps to a factor of the peak learning rate."""

from .schedules import (
    DECAY_STYLES,
    WSD_DECAY_STYLES,
    constant,
    cosine,
    inverse_square_root,
    linear,
    make_schedule,
    wsd,
)

__all__ = [
    "DECAY_STYLES",
    "WSD_DECAY_STYLES",
    "constant",
    "cosine",
    "inverse_square_root",
    "linear",
    "make_schedule",
    "wsd",
]
