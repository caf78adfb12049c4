"""An optimizer and the members of a chain, looked at alike."""

from collections.abc import Sequence
from typing import Any


def members_of(optimizer: Any) -> Sequence[Any]:
    """The optimizers that a chain is made of; ``optimizer`` alone, when it is no chain; none of None."""
    if optimizer is None:
        return ()
    members: Sequence[Any] = getattr(optimizer, "optimizers", (optimizer,))
    return members
