"""The members of a chain of optimizers, or a single optimizer as its own only member."""

from collections.abc import Sequence
from typing import Any


def members_of(optimizer: Any) -> Sequence[Any]:
    """The optimizers of a chain; ``optimizer`` alone if it is not a chain, and no members for None."""
    if optimizer is None:
        return ()
    members: Sequence[Any] = getattr(optimizer, "optimizers", (optimizer,))
    return members
