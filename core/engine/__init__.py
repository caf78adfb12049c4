"""All communication of a step. Rules run in lockstep, and each round of their requests is one collective per process group."""

from .environment import CHECK, WAVE, checks_ranks, wave_entries
from .rounds import DEPTH, Run, reduced, run
from .waves import Work, on_collective

__all__ = ["CHECK", "DEPTH", "WAVE", "Run", "Work", "checks_ranks", "on_collective", "reduced", "run", "wave_entries"]
