"""Checkpoints on ``torch.distributed.checkpoint``: saved on one layout, resumed on any other."""

from .background import Background
from .directory import latest_step
from .loading import Difference, Loaded, load
from .saving import save
from .together import CheckpointError, NewerFormatError

__all__ = ["Background", "CheckpointError", "Difference", "Loaded", "NewerFormatError", "latest_step", "load", "save"]
