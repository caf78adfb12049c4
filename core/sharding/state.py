"""State tensors, declared by the dims that they share with their parameter.

Allocation, checkpoints and resharding follow from the declaration and need no code per optimizer.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from .layout import Layout


@dataclass(frozen=True, kw_only=True)
class StateTensor:
    """How the entries of a state tensor are stored, whatever its shape.

    Attributes:
        dtype: Dtype of the state; None for the parameter's, but at least float32.
        host: Whether the state stays in host memory, where a step reads it without waiting for the device.
    """

    dtype: torch.dtype | None = None
    host: bool = False

    def dtype_for(self, parameter: torch.dtype) -> torch.dtype:
        """The dtype of the state of a parameter of dtype ``parameter``."""
        return self.dtype or torch.promote_types(parameter, torch.float32)

    def device_for(self, parameter: torch.device) -> torch.device:
        """The device of the state of a parameter on the device ``parameter``."""
        return torch.device("cpu") if self.host else parameter


@dataclass(frozen=True)
class StateSpec(StateTensor):
    """One state tensor, declared by the dims that it shares with its parameter; storage as in :class:`StateTensor`.

    Attributes:
        dims: ``*`` for a tensor like the parameter. Otherwise a letter per dim: ``i`` and ``j`` follow the parameter's dims -2
            and -1 and are sharded with them, ``I`` and ``J`` have that dim's whole size on every rank, ``k`` follows the
            parameter's dim at the same place, ``1`` is a reduced dim of size 1, ``r`` a dim of size ``rank``.
            The empty string is a scalar per parameter.
        init: Values before the first step: zeros or the identity matrix.
        narrow: Whether, with ``dtype`` None, the state has the parameter's dtype even when that has 16 bits.
        rank: Size of the dims called ``r``.
    """

    dims: str = "*"
    init: Literal["zeros", "eye"] = "zeros"
    narrow: bool = False
    rank: int = 1

    def layout(self, parameter: Layout) -> Layout:
        """The layout of the state tensor of a parameter that is laid out as ``parameter``."""
        if self.dims == "*":
            return Layout(parameter.shape, parameter.splits, parameter.copies)
        sizes = {"1": 1, "r": self.rank}
        shape = tuple(
            sizes[c] if d is None else parameter.shape[d] for c, d in zip(self.dims, self.follows, strict=True)
        )
        splits = tuple(
            parameter.splits[d] if d is not None and c.islower() else None
            for c, d in zip(self.dims, self.follows, strict=True)
        )
        return Layout(shape, splits, parameter.copies)

    @property
    def follows(self) -> tuple[int | None, ...]:
        """For each letter of ``dims``, the dim of the parameter, from the end, with that size; None for ``1`` and ``r``."""
        size = len(self.dims)
        return tuple({"i": -2, "j": -1, "k": k - size}.get(c.lower()) for k, c in enumerate(self.dims))

    def dtype_for(self, parameter: torch.dtype) -> torch.dtype:
        """The dtype of the state of a parameter of dtype ``parameter``; that dtype itself for a ``narrow`` state."""
        return parameter if self.narrow and self.dtype is None else super().dtype_for(parameter)

    def allocate(self, parameter: Layout, count: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A stack of ``count`` fresh state tensors, (count, *shard), for parameters of ``dtype``."""
        shape = self.layout(parameter).local_shape
        dtype, device = self.dtype_for(dtype), self.device_for(device)
        fresh = torch.zeros(count, *shape, dtype=dtype, device=device)
        return self.reset_(fresh) if self.init == "eye" else fresh

    def reset_(self, state: Tensor) -> Tensor:
        """Put the values before the first step into ``state`` (..., *shard), in place; returns it."""
        if self.init == "eye":
            return state.copy_(torch.eye(state.shape[-1], dtype=state.dtype, device=state.device))
        return state.zero_()


def sizes(layout: Layout, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of this rank's shard and of the whole tensor."""
    return prod(layout.local_shape) * dtype.itemsize, prod(layout.shape) * dtype.itemsize
