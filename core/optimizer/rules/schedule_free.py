"""Schedule-free optimizers: gradients are taken at an interpolation of the iterates and their average."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...eager import runs_eagerly
from ...process_groups_config import ProcessGroupCollection
from ...sharding.parameter_layout import local
from ...sharding.state import StateSpec
from ..steps.argument_checks import check_adam, non_negative
from ..steps.elementwise import ElementwiseStep, States
from ..steps.weight_decay import METHOD, decay_, equivalent
from .parts.adam_parts import denominators, mean_square_


class ScheduleFree(ElementwiseStep):
    """Base of the schedule-free optimizers, which differ in the direction u (:meth:`directions`).

    ``z ← z - γ·u(y)``; ``x ← (1-c)·x + c·z``; ``y ← (1-β)·z + β·x``. z is state; the parameter holds y while training, and
    x, the weights to evaluate, after :meth:`eval`. A new optimizer is in training mode.

    Each parameter has its own step count, sum of weights, largest rate and mode in the state, so that a run continues in the
    mode in which its checkpoint was saved.
    """

    needs = "eval() before a validation, train() after it"

    def specs(self, group: Mapping[str, Any]) -> Mapping[str, StateSpec]:
        """``z`` like the parameter; scalars."""
        scalar = StateSpec("", dtype=torch.float64, host=True)
        return {"z": StateSpec("*"), "k": scalar, "weight_sum": scalar, "lr_max": scalar, "evaluating": scalar}

    def beta(self, group: Mapping[str, Any]) -> float:
        """β of the interpolation, in (0, 1)."""
        raise NotImplementedError

    def directions(
        self, params: list[Tensor], grads: list[Tensor], states: States, group: Mapping[str, Any]
    ) -> list[Tensor]:
        """u at y, weight decay included."""
        raise NotImplementedError

    def decayed_update_(
        self, params: list[Tensor], grads: list[Tensor], states: States, group: Mapping[str, Any]
    ) -> None:
        """As in the base class, but z decays together with y, as by the rule's own weight decay."""
        if group.get(METHOD) not in (None, "l2"):
            group = {**group, METHOD: None, "weight_decay": equivalent(group, group["rate"])}
        super().decayed_update_(params, grads, states, group)

    def scalars(self, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> dict[str, Any]:
        """Advance the step count ``k``; returns the warmed-up ``rate`` γ and the weight c of z in x."""
        k = float(state["k"].add_(1))
        warmup = group["warmup_steps"]
        rate = float(group["lr"]) * (min(k / warmup, 1.0) if warmup else 1.0)
        state["lr_max"].clamp_min_(rate)
        weight = k ** group["r"] * float(state["lr_max"]) ** group["weight_lr_power"]
        total = float(state["weight_sum"].add_(weight))
        return {"k": k, "rate": rate, "c": weight / total if total else 0.0}

    def update_(self, params: list[Tensor], grads: list[Tensor], states: States, group: Mapping[str, Any]) -> None:
        """Algorithm 1, with y in place of x: eliminating x gives ``y ← (1-c)·y + c·z - γ·(1 - β·(1-c))·u``."""
        z, rate, c, beta = states["z"], group["rate"], group["c"], self.beta(group)
        if group["k"] == 1:
            torch._foreach_copy_(z, params)
        steps = self.directions(params, grads, states, group)
        torch._foreach_lerp_(params, z, c)
        torch._foreach_add_(params, steps, alpha=rate * (beta * (1 - c) - 1))
        torch._foreach_sub_(z, steps, alpha=rate)

    def check_step(self) -> None:
        """As in the base class.

        Raises:
            RuntimeError: in evaluation mode.
        """
        super().check_step()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and self.state.get(p, {}).get("evaluating"):
                    raise RuntimeError(
                        f"{self._name(p)} holds the averaged weights: the optimizer is in evaluation mode, or was when its "
                        f"checkpoint was saved. Call its train() before the forward pass of a training step."
                    )

    @runs_eagerly
    @torch.no_grad()
    def train(self) -> None:
        """Put y, the weights to train with, into the parameters, in place; no effect in training mode."""
        self._interpolate(evaluating=False)

    @runs_eagerly
    @torch.no_grad()
    def eval(self) -> None:
        """Put the average x into the parameters, in place, to evaluate or export; no effect in evaluation mode."""
        self._interpolate(evaluating=True)

    def _interpolate(self, *, evaluating: bool) -> None:
        self.take_state()
        for group in self.param_groups:
            beta = self.beta(group)
            weight = 1 - 1 / beta if evaluating else 1 - beta
            for p in group["params"]:
                state = self.state[p]
                if bool(state["evaluating"]) == evaluating:
                    continue
                if state["k"] > 0:  # before the first step x, y and z are equal
                    z, shard = local(state["z"]), local(p)
                    shard.copy_(torch.lerp(shard.to(z.dtype), z, weight))
                state["evaluating"].fill_(evaluating)


def _check(what: str, beta: float, warmup_steps: int, r: float, weight_lr_power: float) -> None:
    for name, value in (("warmup_steps", warmup_steps), ("r", r), ("weight_lr_power", weight_lr_power)):
        non_negative(name, value)
    if beta == 0:
        raise ValueError(
            f"{what}=0 must be above 0, because eval() restores the average from y, which is z alone at 0; 0.9 is usual."
        )


class ScheduleFreeAdamW(ScheduleFree):
    """AdamW without a learning-rate schedule; as ``schedulefree.AdamWScheduleFree``, but it starts in training mode.

    Call :meth:`eval` before evaluating or exporting the model, and :meth:`train` before going on.

    Args:
        params: Parameters or parameter groups, any shapes, DTensors or plain tensors.
        lr: Learning rate γ after the warm-up; leave it constant.
        betas: β of the interpolation in (0, 1), and decay of the mean of g² in [0, 1).
        eps: Added to the denominator.
        weight_decay: wd ≥ 0, at y.
        warmup_steps: Steps in which the learning rate rises from 0.
        r: Power of the step k in its weight kʳ in the average; ≥ 0.
        weight_lr_power: Power of the largest learning rate so far in the same weight; ≥ 0.
        pg_collection: Process groups, for the layout of what is saved.

    Raises:
        ValueError: for an argument out of range.

    Source: Defazio et al. 2024, algorithm 1, https://arxiv.org/abs/2405.15682
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        check_adam(lr, betas, eps, weight_decay)
        _check("betas[0]", betas[0], warmup_steps, r, weight_lr_power)
        super().__init__(
            params,
            pg_collection,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            r=r,
            weight_lr_power=weight_lr_power,
        )

    def specs(self, group: Mapping[str, Any]) -> Mapping[str, StateSpec]:
        """As in the base class, and ``exp_avg_sq`` like the parameter."""
        return {**super().specs(group), "exp_avg_sq": StateSpec("*")}

    def beta(self, group: Mapping[str, Any]) -> float:
        """β1."""
        return float(group["betas"][0])

    def directions(
        self, params: list[Tensor], grads: list[Tensor], states: States, group: Mapping[str, Any]
    ) -> list[Tensor]:
        """``g / (√v̂ + ε) + wd·y``."""
        beta2 = group["betas"][1]
        mean_square_(states["exp_avg_sq"], grads, beta2)
        roots = denominators(states["exp_avg_sq"], 1 / (1 - beta2 ** group["k"]), group["eps"])
        steps = list(torch._foreach_div(grads, roots))
        if group["weight_decay"]:
            torch._foreach_add_(steps, params, alpha=group["weight_decay"])
        return steps


class ScheduleFreeSGD(ScheduleFree):
    """SGD without a learning-rate schedule; as ``schedulefree.SGDScheduleFree``, but it starts in training mode.

    Args:
        params: Parameters or parameter groups, any shapes, DTensors or plain tensors.
        lr: Learning rate γ after the warm-up; leave it constant. 10 to 50 times that of SGD with momentum.
        momentum: β of the interpolation, in (0, 1).
        weight_decay: Coefficient; this and the following arguments as in :class:`ScheduleFreeAdamW`.
        warmup_steps: Steps of the warm-up.
        r: Power of the step in the weight of an iterate.
        weight_lr_power: Power of the learning rate in that weight.
        pg_collection: Process groups, for the layout of what is saved.

    Raises:
        ValueError: for an argument out of range.

    Source: Defazio et al. 2024, equations 2 to 4, https://arxiv.org/abs/2405.15682
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        check_adam(lr, (momentum,), 0.0, weight_decay, count=1)
        _check("momentum", momentum, warmup_steps, r, weight_lr_power)
        super().__init__(
            params,
            pg_collection,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            r=r,
            weight_lr_power=weight_lr_power,
        )

    def beta(self, group: Mapping[str, Any]) -> float:
        """The momentum."""
        return float(group["momentum"])

    def directions(
        self, params: list[Tensor], grads: list[Tensor], states: States, group: Mapping[str, Any]
    ) -> list[Tensor]:
        """``g + wd·y``."""
        return decay_(params, grads, group, "l2")
