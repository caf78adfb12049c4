"""BGE-Adam: Adam whose β follow how fast the gradient changes."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...philox import Key, normal
from ...process_groups_config import ProcessGroupCollection
from ...sharding.layout import Layout
from ...sharding.requests import Rule
from ...sharding.state import StateSpec
from ..steps.argument_checks import check_adam, choice, non_negative
from ..steps.stacked import RuleFunction, StackedStep
from .parts.adam_parts import per_parameter

VARIANTS = ("paper", "entropy")

BETA1_RANGE, BETA2_RANGE = (0.5, 0.9), (0.9, 0.999)
"""Least and largest β of ``paper``."""
PREDICTION = 0.5
"""α of ``paper``: decay of the running mean that predicts the gradient."""
NOISE = 0.01
"""Weight of the noise of ``paper``."""
ENTROPY_LIMITS, ENTROPY_FLOOR = ((0.1, 0.99), (0.9, 0.9999)), 1e-6
"""Least and largest β of ``entropy``, and the lower bound of the entropy."""
ENTROPY_GAINS, ENTROPY_SCALE = (0.05, -0.05), 0.1
"""Coefficients by which ``entropy`` changes the β and the gradient."""


def paper(p: Tensor, g: Tensor, s: Any, lay: Layout, group: Mapping[str, Any]) -> Rule:
    """The paper's three changes to Adam: dynamic β, gradient prediction ĝ, and noise (its "entropy weight").

    ``c = ‖g - m‖ / (‖m‖ + 1e-8)``; ``β = clip(βₘᵢₙ + (βₘₐₓ - βₘᵢₙ)(1 - c))``; ``ĝ ← αĝ + (1-α)g``;
    ``√(1-β₂ᵗ) / (1-β₁ᵗ) · (1 + 0.01·n) · ĝ / (√v + ε)``. n is drawn from the distribution of the mean of as many standard normal
    numbers as the whole parameter has entries; weight decay is added to the gradient.
    """
    g = g.add(p, alpha=group["weight_decay"])
    change, size = yield lay.norm(g - s.exp_avg), lay.norm(s.exp_avg)
    still = 1 - change.double() / (size.double() + 1e-8)
    beta1, beta2 = (low + (high - low) * still.clamp(0, 1) for low, high in (BETA1_RANGE, BETA2_RANGE))
    means_(s, g, beta1, beta2)
    s.predicted_grad.lerp_(g, 1 - PREDICTION)
    t = [int(step) for step in s.step.add_(1)]
    keys = [Key(group["seed"], name, step, "bge_adam") for name, step in zip(s.names, t, strict=True)]
    noise = torch.stack([normal(key, (), dtype=torch.float64) for key in keys]) / math.sqrt(math.prod(lay.shape))
    correction1, correction2 = (1 - beta ** per_parameter(s.step, beta) for beta in (beta1, beta2))
    rate = correction2.sqrt() / correction1 * (1 + NOISE * per_parameter(noise, beta1))
    return (s.exp_avg_sq.sqrt().add_(group["eps"])).reciprocal_().mul_(s.predicted_grad).mul_(rate.to(p.dtype))


def entropy(p: Tensor, g: Tensor, s: Any, lay: Layout, group: Mapping[str, Any]) -> Rule:
    """Adam whose β and gradient depend on the Shannon entropy H of ``q = |g| / Σ|g|``.

    ``β₁(1 + 0.05·H)`` and ``β₂(1 - 0.05·H)``, within limits; ``g·exp(-0.1·H·q)``; weight decay is decoupled.
    """
    size = g.abs()
    total, weighted = yield lay.sum(size), lay.sum(torch.xlogy(size, size))
    # H = Σ q·ln(1/q), from sums that one round of reductions gives; 0 for a gradient of zeros.
    safe = torch.where(total > 0, total, 1).double()
    chaos = (safe.log() - weighted.double() / safe).clamp_min(ENTROPY_FLOOR)
    beta1, beta2 = (
        (beta * (1 + gain * chaos)).clamp(*limits)
        for beta, gain, limits in zip(group["betas"], ENTROPY_GAINS, ENTROPY_LIMITS, strict=True)
    )
    g = size.mul_((-ENTROPY_SCALE * chaos / safe).to(p.dtype)).exp_().mul_(g)
    means_(s, g, beta1, beta2)
    s.step.add_(1)
    correction1, correction2 = (1 - beta ** per_parameter(s.step, beta) for beta in (beta1, beta2))
    root = s.exp_avg_sq.div(correction2.to(p.dtype)).sqrt_().add_(group["eps"])
    return (s.exp_avg / root).div_(correction1.to(p.dtype)).add_(p, alpha=group["weight_decay"])


def means_(s: Any, g: Tensor, beta1: Tensor, beta2: Tensor) -> None:
    """Adam's running means with a β for each parameter, (B, 1, …, 1) in float64."""
    s.exp_avg.lerp_(g, (1 - beta1).to(g.dtype))
    s.exp_avg_sq.lerp_(g.square(), (1 - beta2).to(g.dtype))


class BGEAdam(StackedStep):
    """BGE-Adam: dynamic **b**\\ eta, **g**\\ radient prediction and **e**\\ ntropy weighting.

    Two rules go by this name. ``paper`` is that of the paper below as two independent public ports of it agree, and was not
    checked against the authors' code. ``entropy`` is another one, found only in the source code of the library trustformers;
    that library's reading of the name, "bias-corrected gradient estimation", has no source that we know of. Its code adds 1e-8
    within the logarithm of the entropy and leaves out the smallest entries; here the entropy is exact.

    Args:
        params: Parameters or parameter groups, any shapes, DTensors or plain tensors.
        lr: Learning rate.
        betas: For ``entropy``: decays at entropy 0, in [0, 1). ``paper`` has its own range of each.
        eps: Added to the denominator.
        weight_decay: ≥ 0; added to the gradient by ``paper``, decoupled in ``entropy``.
        variant: The rule.
        seed: Seed of the noise of ``paper``, which depends on it, the parameter's name and the step alone.
        pg_collection: Process groups, ours or Megatron-Core's; needed when plain tensors are sharded.

    Raises:
        ValueError: for an argument out of range.

    Source: Shao et al. 2024, "An improved BGE-Adam optimization algorithm based on entropy weighting and adaptive gradient
    strategy", https://doi.org/10.3390/sym16050623
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        variant: Literal["paper", "entropy"] = "paper",
        seed: int = 0,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        check_adam(lr, betas, eps, weight_decay)
        choice("variant", variant, VARIANTS)
        non_negative("seed", seed)
        super().__init__(
            params,
            pg_collection,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            variant=variant,
            seed=seed,
        )

    def state_specs(self, group: Mapping[str, Any], layout: Layout) -> Mapping[str, StateSpec]:
        """``exp_avg``, ``exp_avg_sq`` and, in ``paper``, ``predicted_grad`` like the parameter; ``step`` a scalar."""
        specs = {
            "step": StateSpec("", dtype=torch.float32, host=True),
            "exp_avg": StateSpec("*"),
            "exp_avg_sq": StateSpec("*"),
        }
        return {**specs, "predicted_grad": StateSpec("*")} if group["variant"] == "paper" else specs

    def rule(self, group: Mapping[str, Any]) -> RuleFunction:
        """The rule of the group's variant."""
        return paper if group["variant"] == "paper" else entropy
