"""What a rule is, and all that it may ask the engine for. Pure data: this module does not communicate."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..process_groups_config import Domain
from .ranges import Ranges, total

Op = Literal["sum", "max"]


@dataclass(frozen=True, eq=False)
class Placement:
    """Which part of a whole tensor each rank of a domain holds.

    Attributes:
        domain: The ranks.
        boxes: Per rank, the indices that it holds of each dim; None when it holds nothing.
        sources: Per rank that receives a part of the tensor, the ranks that together hold one copy of it.
    """

    domain: Domain
    boxes: tuple[tuple[Ranges, ...] | None, ...]
    sources: tuple[tuple[int, ...], ...]

    @cached_property
    def shared(self) -> dict[Any, Any]:
        """Cache of :mod:`core.engine.exchange`: the rectangles that ranks of this placement share with those of others."""
        return {}

    @cached_property
    def entries(self) -> tuple[int, ...]:
        """Number of entries that each rank holds."""
        return tuple(0 if box is None else prod(total(ranges) for ranges in box) for box in self.boxes)

    @property
    def local_shape(self) -> tuple[int, ...] | None:
        """Shape of the part that this rank holds; None when it holds nothing."""
        box = self.boxes[self.domain.index]
        return None if box is None else tuple(total(ranges) for ranges in box)


@dataclass(frozen=True)
class Reduce:
    """Ask for a reduction over process groups.

    Attributes:
        x: This rank's values; the engine may overwrite them.
        op: ``sum`` or ``max``.
        groups: The process groups to reduce over, one after the other.
        finish: Applied to the reduced values; None returns them as they are.
        team: Whether the ranks of a team ask each other, while the other ranks of their domain do not take part.
    """

    x: Tensor
    op: Op
    groups: tuple[ProcessGroup, ...]
    finish: Callable[[Tensor], Tensor] | None = None
    team: bool = False


@dataclass
class Move:
    """Ask for a stack of tensors in another placement.

    The answer is (B, *local shape) in the target placement, or None on a rank that holds nothing there.

    Attributes:
        x: (B, *local shape) in the source placement, or a function that writes the stack into a tensor of that shape and is
            called once; None on a rank that holds nothing. The engine sets it to None when the stack is sent.
        batch: B, the number of tensors in the stack.
        src: Placement of the tensors now.
        dst: Placement to bring them to.
        dtype: Dtype of the tensors.
        device: Device of the tensors.
    """

    x: "Tensor | Fill | None"
    batch: int
    src: Placement
    dst: Placement
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Deal:
    """Ask which rank of ``domain``, or which team, works on each of ``count`` matrices with ``cost`` each: a list of indices."""

    domain: Domain
    count: int
    cost: float


Fill = Callable[[Tensor], object]
"""Writes a stack into the tensor that it is given."""

Request = Reduce | Move | Deal
Rule = Generator[Any, Any, Any]
"""A generator that yields requests or other rules, or tuples or lists of them, is sent their answers in the same form, and
returns a result."""
