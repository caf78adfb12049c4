"""AdamW in bfloat16 with stochastic rounding."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...philox import Key, bits
from ...precision.stochastic_rounding import stochastic_round
from ...process_groups_config import ProcessGroupCollection
from ...sharding.parameter_layout import local, local_gradient
from ...sharding.state import StateSpec
from ..steps.argument_checks import check_adam
from ..steps.elementwise import ElementwiseStep, States
from ..steps.weight_decay import decay_
from .parts.adam_parts import bias_corrections, denominators, mean_square_
from .parts.rounding import RoundsStochastically, check_kernels


class AdamWSR(RoundsStochastically, ElementwiseStep):
    """AdamW whose state is as wide as the gradient, and which rounds what it stores in bfloat16 stochastically.

    ``p ← (1 - lr·wd)·p``; ``m ← β1·m + (1-β1)·g``; ``v ← β2·v + (1-β2)·g²``;
    ``p ← p - lr·√(1-β2ᵗ)/(1-β1ᵗ) · m / (√v + ε)``: ε is not divided by the bias correction, unlike torch's AdamW.
    16-bit parameters and state are updated in float32. Rounding to nearest then loses any update below half a unit in the
    last place; stochastic rounding keeps it on average, so that bfloat16 needs no float32 copy of the parameters.

    Args:
        params: Parameters or parameter groups, any shapes, DTensors or plain tensors.
        lr: Learning rate.
        betas: β1, β2, decays of the running means of the gradient and its square, in [0, 1).
        eps: ε ≥ 0.
        weight_decay: wd ≥ 0, decoupled.
        torch_compile: Refused, because there is no compiled step.
        bf16_stochastic_round: Round bfloat16 parameters and state stochastically, each with noise of its own. No effect on
            other dtypes.
        seed: Seed of the noise, which depends on it, the parameter's name, the step and the index in the whole tensor alone:
            the same on every layout and copy, and when a run is resumed.
        pg_collection: Process groups, for the layout of what is saved.
        use_triton: Refused as long as there are no Triton kernels.

    Raises:
        ValueError: for an argument out of range.
        ImportError: for ``use_triton`` where Triton is not installed.

    Source: Loshchilov & Hutter 2017, algorithm 2, https://arxiv.org/abs/1711.05101, in the form of the Transformers library;
    Zamirai et al. 2020, https://arxiv.org/abs/2010.06192
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        torch_compile: bool = False,
        bf16_stochastic_round: bool = True,
        seed: int = 5489,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        use_triton: bool = False,
    ) -> None:
        check_kernels(torch_compile=torch_compile, use_triton=use_triton)
        check_adam(lr, betas, eps, weight_decay)
        super().__init__(
            params,
            pg_collection,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            bf16_stochastic_round=bf16_stochastic_round,
            seed=seed,
        )

    def specs(self, group: Mapping[str, Any]) -> Mapping[str, StateSpec]:
        """``exp_avg``, ``exp_avg_sq`` with the parameter's shape and dtype; ``step`` a scalar."""
        like = StateSpec("*", narrow=True)
        return {"step": StateSpec("", dtype=torch.float32, host=True), "exp_avg": like, "exp_avg_sq": like}

    def scalars(self, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> dict[str, Any]:
        """``rate``: lr·√(1-β2ᵗ)/(1-β1ᵗ)."""
        correction1, correction2 = bias_corrections(state["step"], group["betas"])
        return {"rate": float(group["lr"]) * math.sqrt(correction2) / correction1}

    def update_(self, params: list[Tensor], grads: list[Tensor], states: States, group: Mapping[str, Any]) -> None:
        """The rule above."""
        decay_(params, grads, group, "decoupled")
        torch._foreach_lerp_(states["exp_avg"], grads, 1 - group["betas"][0])
        mean_square_(states["exp_avg_sq"], grads, group["betas"][1])
        roots = denominators(states["exp_avg_sq"], 1.0, group["eps"])
        torch._foreach_addcdiv_(params, states["exp_avg"], roots, -group["rate"])

    def _step(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        if not group["bf16_stochastic_round"] or local(params[0]).dtype != torch.bfloat16:
            super()._step(params, group)
            return
        # One parameter at a time, so that only one is held in float32.
        for p in params:
            state = self.state[p]
            stored = [local(p), local(state["exp_avg"]), local(state["exp_avg_sq"])]
            value, mean, square = wide = [x.float() for x in stored]
            self.decayed_update_(
                [value], [local_gradient(p).float()], {"exp_avg": [mean], "exp_avg_sq": [square]}, group
            )
            key = Key(group["seed"], self._key(p), int(state["step"]), "bfloat16 rounding")
            noise = bits(key, self.layout(p), words=3, device=value.device)
            for target, x, n in zip(stored, wide, noise, strict=True):
                target.copy_(stochastic_round(x, n))
