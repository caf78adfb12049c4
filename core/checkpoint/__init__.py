"""Checkpoints on ``torch.distributed.checkpoint``: saved on one layout, resumed on any other."""

from .background import Background
from .directory import latest_step
from .loading import Difference, Loaded, load
from .ranks import CheckpointError, NewerFormatError
from .saving import save

__all__ = ["Background", "CheckpointError", "Difference", "Loaded", "NewerFormatError", "latest_step", "load", "save"]
