"""All that a rule may ask the engine for, and what a rule is. Pure data: nothing here communicates."""

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
        boxes: Per rank, the indices it holds of each dim; None for nothing.
        sources: Per rank that wants some of the tensor, the ranks that together hold one copy of it.
    """

    domain: Domain
    boxes: tuple[tuple[Ranges, ...] | None, ...]
    sources: tuple[tuple[int, ...], ...]

    @cached_property
    def shared(self) -> dict[Any, Any]:
        """What :mod:`core.engine.exchange` has found out about ways from here, to find it out once."""
        return {}

    @cached_property
    def entries(self) -> tuple[int, ...]:
        """How many entries each rank holds."""
        return tuple(0 if box is None else prod(total(ranges) for ranges in box) for box in self.boxes)

    @property
    def local_shape(self) -> tuple[int, ...] | None:
        """Sizes of what this rank holds, or None."""
        box = self.boxes[self.domain.index]
        return None if box is None else tuple(total(ranges) for ranges in box)


@dataclass(frozen=True)
class Reduce:
    """Ask for ``finish`` of the reduction of ``x`` over ``groups``. The engine may overwrite ``x``.

    ``team`` marks what the ranks of a team ask each other while the others of their domain do not.
    """

    x: Tensor
    op: Op
    groups: tuple[ProcessGroup, ...]
    finish: Callable[[Tensor], Tensor] | None = None
    team: bool = False


@dataclass
class Move:
    """Ask for a stack of tensors in another placement; the answer is (B, *local shape), or None where it holds nothing.

    Attributes:
        x: (B, *local shape) of the source placement, or what writes it into a tensor of that shape, once; None where that
            holds nothing.
        batch: B.
        src: Where the tensors are.
        dst: Where they shall be.
        dtype: Their dtype.
        device: Their device.
    """

    x: "Tensor | Fill | None"
    batch: int
    src: Placement
    dst: Placement
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Deal:
    """Ask which rank of ``domain``, or which team, shall work on each of ``count`` matrices that cost ``cost`` each."""

    domain: Domain
    count: int
    cost: float


Fill = Callable[[Tensor], object]
Request = Reduce | Move | Deal
Rule = Generator[Any, Any, Any]
"""Yields requests or other rules, or tuples or lists of them; is sent their answers in the same form; returns a result."""
