"""Adam, AdamW and RAdam on shards, with torch's fused kernels where these have the rule."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...process_groups_config import ProcessGroupCollection
from ...sharding.state import StateSpec
from ..steps.argument_checks import check_adam, non_negative
from ..steps.elementwise import ElementwiseStep, States
from ..steps.weight_decay import decay_
from .parts.adam_parts import MU_DTYPES, bias_corrections, check_mu_dtype, denominators, fused_adam_, mean_square_


class Adam(ElementwiseStep):
    """Adam with L2 regularization; state as in ``torch.optim.Adam``.

    Args:
        params: Parameters or parameter groups, any shapes, DTensors or plain tensors.
        lr: Learning rate.
        betas: Decays of the running means of the gradient and its square, in [0, 1).
        eps: Added to the denominator.
        weight_decay: Coefficient, ≥ 0.
        eps_root: Added under the root, ≥ 0; keeps its derivative finite at zero.
        mu_dtype: Dtype of the stored mean of the gradient, ``float32`` or ``bfloat16``; None: the parameter's, but at least
            float32.
        correct_bias: False uses the means as they are, without dividing them by 1 - βᵗ.
        pg_collection: Process groups, for the layout of what is saved.
        nesterov: Look one step ahead: ``β1·m/(1-β1ᵗ⁺¹) + (1-β1)·g/(1-β1ᵗ)`` takes the place of ``m/(1-β1ᵗ)``, as in optax.

    Raises:
        ValueError: for an argument out of range.

    Source: Kingma & Ba 2014, algorithm 1, https://arxiv.org/abs/1412.6980; Nesterov: Dozat 2016,
    https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ
    """

    decoupled = False

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        eps_root: float = 0.0,
        mu_dtype: Literal["float32", "bfloat16"] | None = None,
        correct_bias: bool = True,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        nesterov: bool = False,
    ) -> None:
        check_adam(lr, betas, eps, weight_decay)
        non_negative("eps_root", eps_root)
        check_mu_dtype(mu_dtype)
        super().__init__(
            params,
            pg_collection,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            eps_root=eps_root,
            mu_dtype=mu_dtype,
            correct_bias=correct_bias,
            nesterov=nesterov,
        )

    def specs(self, group: Mapping[str, Any]) -> Mapping[str, StateSpec]:
        """``exp_avg``, ``exp_avg_sq`` like the parameter; ``step`` a scalar, on the device if the fused kernel reads it."""
        return {
            "step": StateSpec("", dtype=torch.float32, host=not self.one_pass(group)),
            "exp_avg": StateSpec("*", dtype=MU_DTYPES[group["mu_dtype"]]),
            "exp_avg_sq": StateSpec("*"),
        }

    def one_pass(self, group: Mapping[str, Any]) -> bool:
        """Whether torch's fused kernel implements the rule with these settings."""
        plain = group["correct_bias"] and not group["nesterov"]
        return bool(plain and not group["eps_root"] and group["mu_dtype"] is None)

    def scalars(self, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> dict[str, Any]:
        """``rate`` α and ``scale`` s of ``p ← p - α·m / (√(s·v + eps_root) + ε)``; with Nesterov also the weights of m and g."""
        correction1, correction2 = bias_corrections(state["step"], group["betas"])
        beta1, lr = group["betas"][0], float(group["lr"])
        next1 = 1 - beta1 ** (float(state["step"]) + 1)
        if not group["correct_bias"]:
            correction1 = correction2 = next1 = 1.0
        if group["nesterov"]:
            return {"rate": lr, "scale": 1 / correction2, "ahead": (beta1 / next1, (1 - beta1) / correction1)}
        return {"rate": lr / correction1, "scale": 1 / correction2}

    def update_(self, params: list[Tensor], grads: list[Tensor], states: States, group: Mapping[str, Any]) -> None:
        """Algorithm 1."""
        if not self.one_pass(group):
            grads = decay_(params, grads, group, "decoupled" if self.decoupled else "l2")
            means, squares = states["exp_avg"], states["exp_avg_sq"]
            torch._foreach_lerp_(means, grads, 1 - group["betas"][0])
            mean_square_(squares, grads, group["betas"][1])
            roots = denominators(squares, group["scale"], group["eps"], group["eps_root"])
            if group["nesterov"]:
                of_mean, of_gradient = group["ahead"]
                means = list(torch._foreach_mul(means, of_mean))
                torch._foreach_add_(means, grads, alpha=of_gradient)
            torch._foreach_addcdiv_(params, means, roots, -group["rate"])
            return
        fused_adam_(params, grads, states, group, decoupled=self.decoupled)


class AdamW(Adam):
    """Adam with decoupled weight decay; state as in ``torch.optim.AdamW``. Arguments as :class:`Adam`.

    Source: Loshchilov & Hutter 2017, algorithm 2, https://arxiv.org/abs/1711.05101
    """

    decoupled = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        eps_root: float = 0.0,
        mu_dtype: Literal["float32", "bfloat16"] | None = None,
        correct_bias: bool = True,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        nesterov: bool = False,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, eps_root, mu_dtype, correct_bias, pg_collection, nesterov=nesterov
        )


class RAdam(ElementwiseStep):
    """Adam that steps by the mean gradient alone until its second moment has settled; as ``torch.optim.RAdam``.

    Args:
        params: Parameters or parameter groups, any shapes, DTensors or plain tensors.
        lr: Learning rate.
        betas: Decays of the running means of the gradient and its square, in [0, 1).
        eps: Added to √v, before the bias of v is corrected.
        weight_decay: Coefficient, ≥ 0.
        decoupled_weight_decay: Shrink the parameters by ``lr·weight_decay``; False adds it to the gradient.
        pg_collection: Process groups, for the layout of what is saved.

    Raises:
        ValueError: for an argument out of range.

    Source: Liu et al. 2019, algorithm 2, https://arxiv.org/abs/1908.03265
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        check_adam(lr, betas, eps, weight_decay)
        super().__init__(
            params,
            pg_collection,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
        )

    def specs(self, group: Mapping[str, Any]) -> Mapping[str, StateSpec]:
        """As Adam's."""
        step = StateSpec("", dtype=torch.float32, host=True)
        return {"step": step, "exp_avg": StateSpec("*"), "exp_avg_sq": StateSpec("*")}

    def scalars(self, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> dict[str, Any]:
        """``rate`` of the step, and whether it is ``rectified``. ρ: length of the averages of g²; r: equation 5."""
        beta2 = group["betas"][1]
        correction1, correction2 = bias_corrections(state["step"], group["betas"])
        t, limit = float(state["step"]), 2 / (1 - beta2) - 1
        rho = limit - 2 * t * (1 - correction2) / correction2
        rate = float(group["lr"]) / correction1
        if rho <= 5:
            return {"rate": rate, "rectified": False}
        r = math.sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho))
        return {"rate": rate * r * math.sqrt(correction2), "rectified": True}

    def update_(self, params: list[Tensor], grads: list[Tensor], states: States, group: Mapping[str, Any]) -> None:
        """Algorithm 2, lines 5 to 14."""
        grads = decay_(params, grads, group, "decoupled" if group["decoupled_weight_decay"] else "l2")
        means, squares = states["exp_avg"], states["exp_avg_sq"]
        torch._foreach_lerp_(means, grads, 1 - group["betas"][0])
        mean_square_(squares, grads, group["betas"][1])
        if group["rectified"]:
            torch._foreach_addcdiv_(params, means, denominators(squares, 1.0, group["eps"]), -group["rate"])
        else:
            torch._foreach_add_(params, means, alpha=-group["rate"])
