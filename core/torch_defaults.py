"""torch's own default dtype and device, for code of others that relies on them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Make float32 and the host the defaults of a scope, whatever the user has set, and restore the user's afterwards.

    torch keeps the default dtype for the whole process, so other threads see float32 too meanwhile.
    """
    before = torch.get_default_dtype()
    if before == torch.float32 and torch.get_default_device().type == "cpu":
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)
