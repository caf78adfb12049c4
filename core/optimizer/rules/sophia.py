"""Sophia: momentum over an estimate of the Hessian's diagonal, clipped entry by entry."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...eager import runs_eagerly
from ...philox import Key, rademacher
from ...process_groups_config import ProcessGroupCollection
from ...sharding.parameter_layout import check_gradient, local, local_gradient
from ...sharding.state import StateSpec
from ..steps.argument_checks import check_adam, choice, non_negative
from ..steps.elementwise import ElementwiseStep, States
from ..steps.state_views import as_state
from ..steps.weight_decay import decay_

Products = Sequence[Tensor | None]


class Sophia(ElementwiseStep):
    """``m ← β1·m + (1-β1)·g``; ``p ← p - lr·(clip(m / max(ρ·h, ε), ±1) + wd·p)``.

    h is a running mean of estimates of the Hessian's diagonal. :meth:`update_hessian` makes them; call it before the first
    step and then every ``hessian_interval`` steps. Between its calls h stays. Where h is not positive the step is ±lr.

    Args:
        params: Parameters or parameter groups, any shapes, DTensors or plain tensors.
        lr: Learning rate, the largest change of an entry besides its decay.
        betas: β1 of the momentum and β2 of h, in [0, 1).
        rho: ρ > 0; larger values clip fewer entries.
        eps: ε > 0.
        weight_decay: wd ≥ 0, decoupled.
        estimator: Estimator in :meth:`update_hessian`: ``hutchinson``, from products of the Hessian and random signs, or
            ``gnb``, from gradients for labels drawn from the model.
        hessian_interval: Steps between calls of :meth:`update_hessian`; the training loop reads it and makes the calls.
        seed: Seed of the random signs.
        pg_collection: Process groups, for the layout of what is saved.

    Raises:
        ValueError: for an argument out of range.

    Source: Liu et al. 2023, algorithm 3, https://arxiv.org/abs/2305.14342
    """

    needs = "update_hessian() every hessian_interval steps"

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        eps: float = 1e-12,
        weight_decay: float = 0.1,
        estimator: Literal["hutchinson", "gnb"] = "hutchinson",
        hessian_interval: int = 10,
        seed: int = 0,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        check_adam(lr, betas, eps, weight_decay)
        choice("estimator", estimator, ("hutchinson", "gnb"))
        for name, value in (("rho", rho), ("eps", eps), ("hessian_interval", hessian_interval)):
            non_negative(name, value)
            if value == 0:
                raise ValueError(f"{name}=0 must be above 0.")
        self.estimator, self.hessian_interval, self.seed = estimator, hessian_interval, seed
        super().__init__(params, pg_collection, lr=lr, betas=betas, rho=rho, eps=eps, weight_decay=weight_decay)

    def specs(self, group: Mapping[str, Any]) -> Mapping[str, StateSpec]:
        """``exp_avg`` and ``hessian`` like the parameter; ``hessian_step``, a scalar, counts the estimates."""
        return {
            "exp_avg": StateSpec("*"),
            "hessian": StateSpec("*"),
            "hessian_step": StateSpec("", dtype=torch.float32, host=True),
        }

    def one_pass(self, group: Mapping[str, Any]) -> bool:
        """False, because a step does not need the scalar."""
        return False

    def update_(self, params: list[Tensor], grads: list[Tensor], states: States, group: Mapping[str, Any]) -> None:
        """Algorithm 3, lines 6 and 12 to 13."""
        lr = float(group["lr"])
        torch._foreach_lerp_(states["exp_avg"], grads, 1 - group["betas"][0])
        decay_(params, grads, group, "decoupled")
        curvatures = list(torch._foreach_mul(states["hessian"], group["rho"]))
        torch._foreach_clamp_min_(curvatures, group["eps"])
        steps = list(torch._foreach_div(states["exp_avg"], curvatures))
        torch._foreach_clamp_min_(steps, -1.0)
        torch._foreach_clamp_max_(steps, 1.0)
        torch._foreach_add_(params, steps, alpha=-lr)

    @runs_eagerly
    @torch.no_grad()
    def update_hessian(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        probes: Sequence[Tensor] | None = None,
        products: Products | None = None,
        hvp: Literal["differences", "double_backward"] = "differences",
        epsilon: float = 1e-3,
        batch_size: int | None = None,
    ) -> None:
        """Update h by an estimate ĥ of the Hessian's diagonal, ``h ← β2·h + (1-β2)·ĥ``; parameters and ``.grad`` stay.

        With ``estimator="gnb"`` (algorithm 2): put the gradient of the mean loss over labels drawn from the model's own
        predictions into ``.grad``, then call ``update_hessian(batch_size=B)``: ĥ = B·g².

        With ``estimator="hutchinson"`` (algorithm 1): ĥ = u ⊙ Hu with signs u. Pass either ``probes=`` u from :meth:`probes`
        and ``products=`` Hu, or a ``closure``:

        * ``hvp="differences"``: the closure computes loss and ``.grad`` at the present parameters, including all collectives.
          It is called twice, with shifted parameters, and must use one batch. Hu = (g(p + εu) - g(p - εu)) / 2ε.
        * ``hvp="double_backward"``: the closure returns the loss with its graph and calls no backward. Exact if every operation
          can be differentiated twice; only for parameters that one rank holds alone.

        Args:
            closure: The closure described above.
            probes: Random signs u for each parameter, in the order of the groups and laid out like the parameters.
            products: Products Hu in the same order; None leaves a parameter's h alone.
            hvp: Method that computes Hu with the closure.
            epsilon: ε > 0, in units of the parameters.
            batch_size: B, the number of terms of the mean loss, over all data-parallel ranks.

        Raises:
            ValueError: for arguments that do not go together, wrong shapes, and parameters that ``hvp`` cannot serve.
        """
        self.take_state()
        params = [p for group in self.param_groups for p in group["params"]]
        if self.estimator == "gnb":
            others = closure is not None or probes is not None or products is not None
            if batch_size is None or batch_size <= 0 or others:
                raise ValueError(
                    f"estimator='gnb' takes gradients from .grad and batch_size > 0, nothing else; got batch_size={batch_size}."
                )
            for p in params:
                check_gradient(p)
            gradients = [None if p.grad is None else local_gradient(p) for p in params]
            self._take(params, [None if g is None else batch_size * g.to(_wide(g)).square() for g in gradients])
            return
        has_products = probes is not None and products is not None
        if batch_size is not None or has_products == (closure is not None) or (probes is None) != (products is None):
            raise ValueError("estimator='hutchinson' takes either a closure, or probes and products.")
        choice("hvp", hvp, ("differences", "double_backward"))
        if closure is not None:
            probes = self.probes()
            products = (
                self._differences(params, probes, closure, epsilon)
                if hvp == "differences"
                else self._double_backward(params, probes, closure)
            )
        assert probes is not None
        assert products is not None
        estimates = []
        for p, u, product in zip(params, probes, products, strict=True):
            if product is not None and local(product).shape != local(p).shape:
                raise ValueError(
                    f"{self._name(p)}: a product of shape {tuple(local(product).shape)} for a shard of {tuple(local(p).shape)}; "
                    f"give Hu in the order and layout of the parameters."
                )
            estimates.append(None if product is None else local(u) * local(product))
        self._take(params, estimates)

    @runs_eagerly
    def probes(self) -> list[Tensor]:
        """Random signs u of the next estimate, for each parameter in the order of the groups and laid out like it."""
        self.take_state()
        probes = []
        for group in self.param_groups:
            for p in group["params"]:
                lay, shard = self.layout(p), local(p)
                key = Key(self.seed, self._key(p), int(self.state[p]["hessian_step"]), "sophia")
                u = rademacher(key, lay, dtype=_wide(shard), device=shard.device)
                probes.append(as_state(u, p, StateSpec("*"), lay))
        return probes

    def _take(self, params: Sequence[Tensor], estimates: Products) -> None:
        betas = {p: group["betas"][1] for group in self.param_groups for p in group["params"]}
        for p, estimate in zip(params, estimates, strict=True):
            if estimate is not None:
                h = local(self.state[p]["hessian"])
                h.lerp_(estimate.to(h.dtype), 1 - betas[p])
                self.state[p]["hessian_step"].add_(1)

    def _differences(
        self, params: Sequence[Tensor], probes: Sequence[Tensor], closure: Callable[[], Any], epsilon: float
    ) -> Products:
        if not epsilon > 0:
            raise ValueError(f"epsilon={epsilon} must be above 0.")
        for p in params:
            if p.element_size() < 4:
                raise ValueError(
                    f"{self._name(p)}: {p.dtype} rounds a shift by {epsilon} away; keep the parameters in float32, or give "
                    f"probes and products."
                )
        values, kept = [local(p).clone() for p in params], [p.grad for p in params]
        sides: list[list[Tensor | None]] = []
        try:
            for shift in (epsilon, -epsilon):
                for p, value, u in zip(params, values, probes, strict=True):
                    local(p).copy_(value.add(local(u), alpha=shift))
                    p.grad = None
                with torch.enable_grad():
                    closure()
                sides.append([None if p.grad is None else local_gradient(p).clone() for p in params])
        finally:
            for p, value, g in zip(params, values, kept, strict=True):
                local(p).copy_(value)
                p.grad = g
        return [None if a is None or b is None else (a - b) / (2 * epsilon) for a, b in zip(*sides, strict=True)]

    def _double_backward(
        self, params: Sequence[Tensor], probes: Sequence[Tensor], closure: Callable[[], Any]
    ) -> Products:
        for p in params:
            lay = self.layout(p)
            if not lay.is_whole or any(axis.size > 1 for axis in lay.copies):
                raise ValueError(
                    f"{self._name(p)} is shared by several ranks ({lay.describe()}), across which double_backward does not "
                    f"differentiate; use hvp='differences'."
                )
        with torch.enable_grad():
            gradients = torch.autograd.grad(closure(), params, create_graph=True, allow_unused=True)
        used = [i for i, g in enumerate(gradients) if g is not None]
        curved = [i for i in used if gradients[i].requires_grad]
        products: list[Tensor | None] = [torch.zeros_like(params[i]) if i in used else None for i in range(len(params))]
        if curved:
            computed = torch.autograd.grad(
                [gradients[i] for i in curved],
                [params[i] for i in used],
                [probes[i].to(gradients[i].dtype) for i in curved],
                materialize_grads=True,
            )
            for i, product in zip(used, computed, strict=True):
                products[i] = product
        return products


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
