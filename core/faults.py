"""Numerical faults: steps that must not be taken, and state that must not be saved. All ranks decide together."""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from . import engine
from .eager import runs_eagerly
from .optimizer.chained import ChainedOptimizer
from .optimizer.clip import NonFiniteGradientError
from .process_groups_config import gather
from .sharding.parameter_layout import local, local_gradient

MAX_NAMED = 3
"""Number of tensors that an error names; the others are counted."""


class FaultError(ArithmeticError):
    """A step cannot be taken, or state is not finite. All ranks raise it together, with one text."""


@dataclass(frozen=True)
class Verdict:
    """The decision of all ranks about a step.

    Attributes:
        take: Whether to take the step.
        norm: Global norm of the gradients before clipping; NaN when it is not finite.
        reason: Reason to leave the step out; empty when it is taken.
    """

    take: bool
    norm: float
    reason: str = ""


class Guard:
    """Decides for each step whether to take it, with one small reduction over all ranks.

    ::

        loss.backward()
        verdict = guard.judge(step, loss.item(), max_norm=1.0)
        if verdict.take:
            optimizer.step()

    A step that is left out changes neither weights nor state. The loop goes on as if it had been taken: the step number, the
    position in the data and the learning-rate schedule, which is a function of the step, move on. Otherwise the same
    sequences would be trained on again, with the same fault.

    All ranks of the default process group make one, with the same arguments, and call it together.

    Args:
        optimizer: Optimizer of the parameters whose gradients are judged.
        on_non_finite: Action when a gradient or the loss is not finite on any rank: raise, or leave the step out.
        max_skipped: Number of steps left out in a row at which :meth:`judge` raises.
        loss_spike: Multiple of the running median of losses above which a step is left out; None for no limit.
        norm_spike: Multiple of the running median of gradient norms before clipping; None for no limit.
        window: Number of taken steps in the median. Until so many were taken, no step is left out as a spike.

    Attributes:
        skipped: Number of steps left out in all.
        in_a_row: Number of steps left out since the last one that was taken.

    Raises:
        ValueError: for an argument out of its range.
    """

    def __init__(
        self,
        optimizer: ChainedOptimizer,
        *,
        on_non_finite: Literal["error", "skip"] = "error",
        max_skipped: int = 10,
        loss_spike: float | None = None,
        norm_spike: float | None = None,
        window: int = 64,
    ) -> None:
        if on_non_finite not in ("error", "skip"):
            raise ValueError(f"on_non_finite is {on_non_finite!r}; possible: 'error', 'skip'.")
        for name, count in (("max_skipped", max_skipped), ("window", window)):
            if count < 1:
                raise ValueError(f"{name} is {count}; it must be at least 1.")
        for name, factor in (("loss_spike", loss_spike), ("norm_spike", norm_spike)):
            if factor is not None and not 1 < factor < math.inf:
                raise ValueError(f"{name} is {factor}; give a factor above 1, or None.")
        self._optimizer = optimizer
        self._skips = on_non_finite == "skip"
        self._max_skipped = max_skipped
        self._spikes = {"loss": loss_spike, "gradient norm": norm_spike}
        self._taken: dict[str, deque[float]] = {name: deque(maxlen=window) for name in self._spikes}
        self.skipped = self.in_a_row = 0

    @runs_eagerly
    def judge(self, step: int, loss: float, *, max_norm: float = 0.0, total: Tensor | None = None) -> Verdict:
        """Decide about the step whose gradients are in ``.grad``; clips the gradients and mutates nothing else.

        Args:
            step: Number of the step, for messages.
            loss: Loss of the step on this rank.
            max_norm: Largest global norm of the gradients; 0 for no clipping.
            total: Global norm of the gradients, if the caller knows it and ``loss`` is the same on all pipeline stages. Then the
                reduction covers only data-parallel replicas.

        Raises:
            FaultError: on all ranks, when a gradient or the loss is not finite on any rank and ``on_non_finite`` is ``error``;
                names parameter, rank and step. Also when ``max_skipped`` steps in a row were left out.
        """
        try:
            norm = self._optimizer.clip_grad_norm_(max_norm, total)
        except NonFiniteGradientError:
            norm = math.nan  # replicas may have finite gradients: raise only when they know, too
        finite = math.isfinite(loss) and math.isfinite(norm)
        local_values = (float(not finite), loss if finite else -math.inf, norm if finite else -math.inf)
        groups = self._optimizer.pg_collection
        group = _world() if total is None else groups.domain((groups.axis("dp"),)).group
        broken, loss_of_all, norm_of_all = _largest(local_values, self._optimizer, group)
        if broken:
            reason = self._broken(step, loss)
            if not self._skips:
                raise FaultError(
                    f"{reason}; nothing was changed. Lower the learning rate, look at the data of this step, or leave such "
                    f"steps out (on_non_finite='skip')."
                )
            return self._leave_out(norm, reason)
        values = {"loss": loss_of_all, "gradient norm": norm_of_all}
        if reason := self._spike(step, values):
            return self._leave_out(norm, reason)
        for name, value in values.items():
            self._taken[name].append(value)
        self.in_a_row = 0
        return Verdict(True, norm)

    def state_dict(self) -> dict[str, Any]:
        """Counters and the values in the running medians, of JSON types."""
        taken = {name: list(values) for name, values in self._taken.items()}
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "taken": taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``, a result of :meth:`state_dict`."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        for name, values in state["taken"].items():
            self._taken[name].clear()
            self._taken[name].extend(values)

    def _leave_out(self, norm: float, reason: str) -> Verdict:
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self._max_skipped:
            raise FaultError(
                f"{self.in_a_row} steps in a row were left out, which is the limit; the last one: {reason}. Resume from an "
                f"earlier checkpoint, with a lower learning rate or other data."
            )
        return Verdict(False, norm, reason)

    def _spike(self, step: int, values: Mapping[str, float]) -> str:
        """Description of the first value above its limit; empty when there is none."""
        for name, factor in self._spikes.items():
            taken = self._taken[name]
            if factor is not None and len(taken) == taken.maxlen and values[name] > factor * median(taken):
                usual = f"{median(taken):.4g}, the median of the last {len(taken)} steps"
                return f"step {step}: {name} {values[name]:.4g} is more than {factor:g} times {usual}"
        return ""

    def _broken(self, step: int, loss: float) -> str:
        """Description of what is not finite on any rank."""
        entries = self._optimizer.entries()
        bad = [name for name, p, _ in entries if p.grad is not None and not _all_finite([local_gradient(p)])]
        faults = _on_all_ranks([*(f"gradient of {name}" for name in bad), *([] if math.isfinite(loss) else ["loss"])])
        # When every gradient is finite, float64 cannot hold the norm.
        return f"step {step}: {_listed(faults)}" if faults else f"step {step}: gradient norm overflows float64"


@runs_eagerly
def check_state(optimizer: ChainedOptimizer, step: int) -> None:
    """Check that all weights and all optimizer state are finite; all ranks of the default process group call it.

    It reads them once and makes one small reduction.

    Args:
        optimizer: Optimizer whose parameters and state are checked.
        step: Number of finished steps, for the message.

    Raises:
        FaultError: on all ranks, when a weight or a state is not finite on any; names parameter, slot and rank.
    """
    tensors = list(_weights_and_state(optimizer))
    fault = float(not _all_finite([x for _, x in tensors]))
    if not any(_largest((fault,), optimizer, _world())):
        return
    faults = _on_all_ranks([name for name, x in tensors if not _all_finite([x])])
    raise FaultError(
        f"after step {step}: {_listed(faults)}. Leaving steps out does not repair that: resume from an earlier checkpoint."
    )


def _weights_and_state(optimizer: ChainedOptimizer) -> Iterator[tuple[str, Tensor]]:
    for name, p, _ in optimizer.entries():
        yield f"weight of {name}", local(p.detach())
        for slot, value in optimizer.state[p].items():
            if isinstance(value, Tensor) and value.is_floating_point():
                yield f"{slot} of {name}", local(value)


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    # The largest magnitude keeps NaN and infinity, does not overflow, and takes no memory.
    largest = [torch.linalg.vector_norm(x.detach(), math.inf).double().cpu() for x in tensors if x.numel()]
    return not largest or bool(torch.stack(largest).isfinite().all())


def _largest(values: Sequence[float], optimizer: ChainedOptimizer, group: dist.ProcessGroup | None) -> list[float]:
    """The largest of each value over the ranks of ``group``; None stands for a single rank."""
    if group is None:
        return list(values)
    device = next((local(p).device for _, p, _ in optimizer.entries()), torch.device("cpu"))
    votes = torch.tensor(values, dtype=torch.float64, device=device)
    largest: list[float] = engine.reduced("decision on the step", votes, "max", group)().tolist()
    return largest


def _on_all_ranks(names: list[str]) -> list[tuple[int, str]]:
    """(rank, name) of the ``names`` of all ranks."""
    return [(rank, name) for rank, of_rank in enumerate(gather(names)) for name in of_rank]


def _listed(faults: Sequence[tuple[int, str]]) -> str:
    named = ", ".join(f"{name} on rank {rank}" for rank, name in faults[:MAX_NAMED])
    rest = f" and {len(faults) - MAX_NAMED} more" if len(faults) > MAX_NAMED else ""
    return f"{named}{rest} {'are' if len(faults) > 1 else 'is'} not finite"


def _world() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
