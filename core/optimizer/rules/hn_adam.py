"""HN-Adam: Adam in which the power of the gradient depends on the ratio of the norms of mean and gradient."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...philox import Key, uniform
from ...process_groups_config import ProcessGroupCollection
from ...sharding.layout import Layout
from ...sharding.requests import Rule
from ...sharding.state import StateSpec
from ..steps.argument_checks import check_adam, choice, non_negative
from ..steps.stacked import RuleFunction, StackedStep
from .parts.adam_parts import SPECS, adam_step_

VARIANTS = ("paper", "trustformers")
THRESHOLD, LEAST = 0.1, 0.1
"""Constants of ``trustformers``: the norm at which a step is halved, and the least factor."""


def paper(p: Tensor, g: Tensor, s: Any, lay: Layout, group: Mapping[str, Any]) -> Rule:
    """Algorithm 2: ``Λ = Λ₀ - ‖m₋‖ / max(‖m₋‖, ‖g‖)``; ``v ← β₂v + (1-β₂)|g|^Λ``; ``m / (v^(1/Λ) + ε)``.

    Where Λ < 2, v is replaced by its largest value in steps with Λ < 2 so far. Means are used as they are, without correction
    of their bias.
    """
    beta1, beta2 = group["betas"]
    before, now = yield lay.norm(s.exp_avg), lay.norm(g)
    largest = torch.maximum(before, now)
    power = group["lam0"] - before / torch.where(largest > 0, largest, 1)
    s.exp_avg.lerp_(g, 1 - beta1)
    s.exp_avg_power.lerp_(g.abs().pow_(power), 1 - beta2)
    adapted = power < 2
    v = torch.where(adapted, torch.maximum(s.max_exp_avg_power, s.exp_avg_power), s.exp_avg_power)
    torch.where(adapted, v, s.max_exp_avg_power, out=s.max_exp_avg_power)
    root = v.pow_(1 / power).add_(group["eps"])
    return torch.div(s.exp_avg, root, out=root).add_(p, alpha=group["weight_decay"])


def trustformers(p: Tensor, g: Tensor, s: Any, lay: Layout, group: Mapping[str, Any]) -> Rule:
    """``max(‖u‖ / (‖u‖ + 0.1), 0.1) · u`` of Adam's direction u; weight decay is decoupled."""
    u = adam_step_(torch.zeros(p.shape, dtype=p.dtype, device=p.device), g, s, group)
    s.step.add_(1)
    norm = yield lay.norm(u)
    return u.mul_((norm / (norm + THRESHOLD)).clamp_min(LEAST)).add_(p, alpha=group["weight_decay"])


class HNAdam(StackedStep):
    """HN-Adam: hybrid Adam with an adaptive norm.

    Two rules go by this name. ``paper`` is algorithm 2 of the paper below; we know it from a public port that follows it line by
    line, not from the paper itself. ``trustformers`` is another one, found only in the source code of the library of that name,
    which it calls "hybrid norm"; the reading "hyperbolic Nesterov" of its documentation has no source that we know of.

    Args:
        params: Parameters or parameter groups, any shapes, DTensors or plain tensors.
        lr: Learning rate.
        betas: Decays of the running means of the gradient and of its power, in [0, 1); trustformers itself has (0.9, 0.999).
        eps: Added to the denominator.
        weight_decay: ≥ 0; decoupled.
        variant: The rule.
        lam0: Λ₀ > 1 of ``paper``; None draws one for all parameters, uniformly from [2, 4), by ``seed``: the same on every
            rank, and when a run is resumed with the same seed.
        seed: Seed of the draw of ``lam0``.
        pg_collection: Process groups, ours or Megatron-Core's; needed when plain tensors are sharded.

    Raises:
        ValueError: for an argument out of range.

    Source: Reyad, Sarhan & Arafa 2023, algorithm 2, https://doi.org/10.1007/s00521-023-08568-z
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        variant: Literal["paper", "trustformers"] = "paper",
        lam0: float | None = None,
        seed: int = 0,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        check_adam(lr, betas, eps, weight_decay)
        choice("variant", variant, VARIANTS)
        non_negative("seed", seed)
        if lam0 is None:
            lam0 = 2 + 2 * float(uniform(Key(seed, "hn_adam", purpose="lam0"), (), dtype=torch.float64))
        if not 1 < lam0 < float("inf"):
            raise ValueError(
                f"lam0={lam0} must be a finite number above 1: the power is up to 1 less, and must stay above 0."
            )
        super().__init__(
            params,
            pg_collection,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            variant=variant,
            lam0=lam0,
        )

    def state_specs(self, group: Mapping[str, Any], layout: Layout) -> Mapping[str, StateSpec]:
        """``exp_avg``, ``exp_avg_power`` and its maximum like the parameter; Adam's in ``trustformers``."""
        if group["variant"] == "trustformers":
            return SPECS
        return {"exp_avg": StateSpec("*"), "exp_avg_power": StateSpec("*"), "max_exp_avg_power": StateSpec("*")}

    def rule(self, group: Mapping[str, Any]) -> RuleFunction:
        """The rule of the group's variant."""
        return paper if group["variant"] == "paper" else trustformers
