"""Keeps steps out of the graphs of ``torch.compile``."""

from collections.abc import Callable
from typing import Any, cast

import torch

REASON = "a step of shardstep communicates and keeps books in Python; it runs eagerly, between two graphs"


def runs_eagerly[F: Callable[..., Any]](function: F) -> F:
    """Decorator: ``torch.compile`` calls ``function`` as it is, with all that it calls.

    Traced, some steps would be wrong without an error, because the tracer takes numbers that change from step to step for
    constants.
    """
    return cast(F, torch.compiler.disable(function, reason=REASON))
