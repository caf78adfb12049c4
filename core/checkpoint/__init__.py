"""Checkpoints on ``torch.distributed.checkpoint``: saved on one layout, resumed on any other."""

from .directory import latest_step
from .loading import Difference, Loaded, load
from .ranks import CheckpointError
from .saving import save

__all__ = ["CheckpointError", "Difference", "Loaded", "latest_step", "load", "save"]
