"""AdEMAMix: Adam with a second, slow mean of the gradient."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...process_groups_config import ProcessGroupCollection
from ...sharding.state import StateSpec
from ..steps.argument_checks import check_adam, non_negative
from ..steps.elementwise import ElementwiseStep, States
from ..steps.weight_decay import decay_
from .parts.adam_parts import bias_corrections, denominators, mean_square_


class AdEMAMix(ElementwiseStep):
    """``p ← p - lr·((m1/(1-β1ᵗ) + α·m2) / (√(v/(1-β2ᵗ)) + ε) + wd·p)``, where m1 and m2 are means of g with β1 and β3.

    Args:
        params: Parameters or parameter groups, any shapes, DTensors or plain tensors.
        lr: Learning rate.
        betas: β1 of the fast mean, β2 of the squares, β3 of the slow mean, in [0, 1); β1 = 0 keeps no fast mean.
        alpha: Weight of the slow mean, ≥ 0.
        eps: ε ≥ 0.
        weight_decay: wd ≥ 0, decoupled.
        alpha_warmup: Steps T_α in which α rises from 0; 0: none.
        beta3_warmup: Steps T_β3 in which the half-life of the slow mean rises from that of the fast one; 0: none.
        pg_collection: Process groups, for the layout of what is saved.

    Raises:
        ValueError: for an argument out of range.

    Source: Pagliardini, Ablin & Grangier 2024, algorithm 1, https://arxiv.org/abs/2409.03137
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        alpha_warmup: int = 0,
        beta3_warmup: int = 0,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        check_adam(lr, betas, eps, weight_decay, count=3)
        for name, value in (("alpha", alpha), ("alpha_warmup", alpha_warmup), ("beta3_warmup", beta3_warmup)):
            non_negative(name, value)
        super().__init__(
            params,
            pg_collection,
            lr=lr,
            betas=betas,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            alpha_warmup=alpha_warmup,
            beta3_warmup=beta3_warmup,
        )

    def specs(self, group: Mapping[str, Any]) -> Mapping[str, StateSpec]:
        """``exp_avg`` (unless β1 = 0), ``exp_avg_slow``, ``exp_avg_sq`` like the parameter; ``step`` a scalar."""
        fast = {"exp_avg": StateSpec("*")} if group["betas"][0] else {}
        step = StateSpec("", dtype=torch.float32, host=True)
        return {"step": step, **fast, "exp_avg_slow": StateSpec("*"), "exp_avg_sq": StateSpec("*")}

    def scalars(self, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> dict[str, Any]:
        """Bias corrections, and this step's α and β3."""
        correction1, correction2, _ = bias_corrections(state["step"], group["betas"])
        t = int(state["step"])
        return {
            "correction1": correction1,
            "correction2": correction2,
            "alpha": group["alpha"] * _progress(t, group["alpha_warmup"]),
            "beta3": _beta3(group["betas"][0], group["betas"][2], _progress(t, group["beta3_warmup"])),
        }

    def update_(self, params: list[Tensor], grads: list[Tensor], states: States, group: Mapping[str, Any]) -> None:
        """Algorithm 1."""
        lr, (beta1, beta2, _) = float(group["lr"]), group["betas"]
        slow, squares = states["exp_avg_slow"], states["exp_avg_sq"]
        torch._foreach_lerp_(slow, grads, 1 - group["beta3"])
        mean_square_(squares, grads, beta2)
        fast = states.get("exp_avg", grads)
        if beta1:
            torch._foreach_lerp_(fast, grads, 1 - beta1)
        roots = denominators(squares, 1 / group["correction2"], group["eps"])
        decay_(params, grads, group, "decoupled")
        torch._foreach_addcdiv_(params, fast, roots, -lr / group["correction1"])
        torch._foreach_addcdiv_(params, slow, roots, -lr * group["alpha"])


def _progress(t: int, warmup: int) -> float:
    return min(t / warmup, 1.0) if warmup else 1.0


def _beta3(start: float, end: float, progress: float) -> float:
    """β whose half-life lies ``progress`` of the way from that of ``start`` to that of ``end``; section 3 and appendix A.1."""

    # The authors' code keeps log(0) away in this way, also where β is not 0.
    def half_life(beta: float) -> float:
        return math.log(0.5) / math.log(beta + 1e-8) - 1

    if progress == 1:
        return end
    return float(0.5 ** (1 / ((1 - progress) * half_life(start) + progress * half_life(end) + 1)))
