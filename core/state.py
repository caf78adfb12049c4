"""State tensors, declared by what they follow, so that allocation, checkpoints and resharding need no code per optimizer."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .layout import Layout


@dataclass(frozen=True)
class StateSpec:
    """How one state tensor relates to its parameter.

    Attributes:
        dims: ``*``: like the parameter. Otherwise a letter per dim: ``i`` and ``j`` follow the parameter's dims -2 and -1
            and are sharded with them, ``I`` and ``J`` have that dim's whole size on every rank, ``1`` is a reduced dim.
            The empty string is a scalar per parameter.
        init: What the tensor holds before the first step.
        dtype: Its dtype; None for the parameter's, but at least float32.
    """

    dims: str = "*"
    init: Literal["zeros", "eye"] = "zeros"
    dtype: torch.dtype | None = None

    def layout(self, parameter: Layout) -> Layout:
        """Where the state tensor lives when its parameter lives in ``parameter``."""
        if self.dims == "*":
            return Layout(parameter.shape, parameter.splits, parameter.copies)
        letters = {"i": -2, "j": -1}
        shape = tuple(1 if c == "1" else parameter.shape[letters[c.lower()]] for c in self.dims)
        splits = tuple(parameter.splits[letters[c]] if c in letters else None for c in self.dims)
        return Layout(shape, splits, parameter.copies)

    def allocate(self, parameter: Layout, count: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A stack of ``count`` fresh state tensors, (count, *shard), for parameters of ``dtype``."""
        shape = self.layout(parameter).local_shape
        dtype = self.dtype or torch.promote_types(dtype, torch.float32)
        if self.init == "eye":
            return torch.eye(shape[-1], dtype=dtype, device=device).expand(count, *shape).clone()
        return torch.zeros(count, *shape, dtype=dtype, device=device)
