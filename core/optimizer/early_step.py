"""A step that begins during backward: matrices travel to their owners as soon as their gradients are final."""

from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from .. import engine
from ..eager import runs_eagerly
from ..sharding.parameter_layout import check_gradient, local_gradient
from .chained import ChainedOptimizer, finish_step
from .members import members_of
from .steps.base import ShardedStep
from .steps.bookkeeping import make_ready, pending
from .steps.global_norm import clip_factor


class EarlyStep:
    """Takes one step of ``optimizer`` while the last backward of the step runs inside this context.

    ::

        with EarlyStep(optimizer):
            loss.backward()  # no optimizer.step() afterwards

    Matrices of owner mode are sent in waves, the last layer's first, and updated as they arrive, so that communication with
    the owners overlaps with the rest of backward. All other parameters are updated when the context is left. The result is
    that of ``optimizer.step()``, but a gradient that is not finite is only noticed after parameters have changed.

    The ranks that share a parameter must run the same backward. Gradients are final when autograd has added them up, or
    when ``reduce`` has returned.

    Args:
        optimizer: A chain, or one optimizer of this project.
        clip_grad: Largest global norm of the gradients; 0: no clipping.
        norm: Global norm of the gradients, if it is known before backward.
        reduce: Makes a parameter's ``.grad`` final in place, by a sum over data-parallel ranks, if nothing else does so.

    Raises:
        ValueError: for ``clip_grad`` without ``norm``.
    """

    def __init__(
        self,
        optimizer: ChainedOptimizer | ShardedStep,
        *,
        clip_grad: float = 0.0,
        norm: float | None = None,
        reduce: Callable[[Tensor], None] | None = None,
    ) -> None:
        if clip_grad > 0 and norm is None:
            raise ValueError(
                f"clip_grad={clip_grad} needs the norm of all gradients before the first parameter changes, but a step during "
                f"backward changes parameters before all gradients are there; pass clip_grad=0, or the norm if it is known, "
                f"or call optimizer.step() after backward."
            )
        self._optimizer = optimizer
        self._reduce = reduce
        known = None if norm is None else torch.tensor(norm, dtype=torch.float64, device="cpu")
        self._factor = 1.0 if known is None or not clip_grad else float(clip_factor(known, clip_grad))

    @runs_eagerly
    def __enter__(self) -> Self:
        """Register hooks on the gradients."""
        self._members: list[Any] = list(members_of(self._optimizer))
        make_ready(self._members)
        queue = [item for member in self._members if isinstance(member, ShardedStep) for item in member.travelling()]
        # The order in which backward finishes their gradients; it is equal on all ranks.
        self._queue = deque(sorted(queue, key=lambda item: -item.position))
        self._run = engine.Run(entries=max((item.entries for item in queue), default=0))
        self._final: set[int] = set()
        params = [p for member in self._members for group in member.param_groups for p in group["params"]]
        self._hooks = [p.register_post_accumulate_grad_hook(self._ready) for p in params if p.requires_grad]
        return self

    @runs_eagerly
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the step, unless backward failed; in that case some parameters may have changed already."""
        for hook in self._hooks:
            hook.remove()
        if error is None:
            with torch.no_grad():
                self._check_unchanged()
                finish_step(self._members, self._run)
        elif self._run.begun:
            error.add_note("an early step had begun: some parameters may have taken it. Load the last checkpoint.")

    def _check_unchanged(self) -> None:
        if self._run.begun and (list(members_of(self._optimizer)) != self._members or pending(self._members)):
            raise RuntimeError(
                "the groups or the state of the optimizer were replaced during the backward of an early step, which had begun: "
                "some parameters have taken it. Load the last checkpoint, and change the optimizer outside of the context."
            )

    @runs_eagerly
    @torch.no_grad()
    def _ready(self, p: Tensor) -> None:
        check_gradient(p)
        if self._reduce is not None:
            self._reduce(p)
        if self._factor != 1.0:
            local_gradient(p).mul_(self._factor)
        self._final.add(id(p))
        while self._queue and all(id(q) in self._final for q in self._queue[0].params):
            self._run.add(self._queue.popleft().begin())
