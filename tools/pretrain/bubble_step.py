"""The optimizer step in the pipeline's bubble: a stage steps when its own backward is done, without waiting for the others."""

from collections.abc import Callable

import torch
from torch import Tensor

from core import engine
from core.faults import FaultError, Guard, Verdict
from core.optimizer.chained import ChainedOptimizer
from core.optimizer.speculative_step import SpeculativeStep
from core.optimizer.steps.global_norm import begin_norm, clip_factor
from core.sharding.parameter_layout import local_gradient


class BubbleStep:
    """Steps a stage before the other stages' losses and norms are known, and undoes the step if they do not allow it.

    This stage's part of the norm is sent before the step, since the other stages wait for it. The first stage is the last to
    finish its backward and has no bubble, so it waits. After a step whose gradients were clipped all stages wait, because the
    next gradients will most likely be clipped as well. The result equals that of the ordinary order, bit for bit.

    Args:
        optimizer: Optimizer of this stage.
        guard: Guard that judges each step.
        has_bubble: Whether this stage finishes before another.
        tell: Called with ``optimizer`` when a step begins.

    Attributes:
        ahead: Number of steps that were taken in the bubble and kept.
        undone: Number of steps that were taken in the bubble and undone.

    Raises:
        ValueError: when the optimizer itself reduces over all stages.
    """

    def __init__(
        self,
        optimizer: ChainedOptimizer,
        guard: Guard,
        *,
        has_bubble: bool,
        tell: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self._optimizer, self._guard, self._tell = optimizer, guard, tell
        self._speculative, self._has_bubble = SpeculativeStep(optimizer), has_bubble
        self._was_clipped = self._begun = False
        self._norm: Callable[[], Tensor] | None = None
        self.ahead = self.undone = 0

    def begin(self) -> None:
        """Take the step if it will probably be kept. All ranks call it, with final gradients."""
        self._norm = begin_norm(self._optimizer.entries(), self._optimizer.pg_collection)
        if self._has_bubble and not self._was_clipped and self._is_finite():
            self._tell("optimizer")
            self._speculative.step()
            self._begun = True

    def settle(self, step: int, loss: float, max_norm: float) -> Verdict:
        """Let all ranks judge the step, and take, undo or redo it accordingly; all ranks call it after :meth:`begin`.

        Args:
            step: Number of the step, for messages.
            loss: Loss over all stages.
            max_norm: Largest global norm of the gradients; 0 for no clipping.

        Raises:
            FaultError: as :meth:`Guard.judge` raises it; parameters and state are then as before :meth:`begin`.
        """
        assert self._norm is not None
        try:
            verdict = self._guard.judge(step, loss, max_norm=max_norm, total=self._norm())
        except FaultError:
            self._undo()
            raise
        norm = torch.tensor(verdict.norm, dtype=torch.float64)
        self._was_clipped = max_norm > 0 and bool(clip_factor(norm, max_norm) < 1)
        if not verdict.take or self._was_clipped:
            self._undo()
        if verdict.take and not self._begun:
            self._tell("optimizer")
            self._optimizer.step()
        self.ahead += self._begun
        self._begun = False
        return verdict

    def _undo(self) -> None:
        if self._begun:
            self._speculative.undo()
            self.undone += 1
        self._begun = False

    def _is_finite(self) -> bool:
        """Whether all gradients of this stage are finite: optimizers may fail on others, and only the guard may stop a run."""
        entries = self._optimizer.entries()
        gradients = [local_gradient(p) for _, p, _ in entries if p.grad is not None]
        # A sum of absolute values is finite where each of them is, short of an overflow, which may wait as well.
        sums = [g.abs().sum(dtype=torch.float64) for g in gradients]
        local_sum = torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64)
        groups = self._optimizer.pg_collection
        group = groups.domain(tuple(groups.axis(name) for name in ("tp", "dp"))).group
        return bool(engine.reduced("gradients of the stage", local_sum, "sum", group)().isfinite())
