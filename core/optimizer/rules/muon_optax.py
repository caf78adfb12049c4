"""Muon by optax's rule: bias-corrected momentum, and a step that may be scaled by its dual norm."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...cost.auto import Rates
from ...process_groups_config import ProcessGroupCollection
from ...sharding.layout import Layout
from ...sharding.requests import Rule
from ...sharding.state import StateSpec
from ..steps.argument_checks import non_negative
from ..steps.stacked import RuleFunction
from .parts.adam_parts import MU_DTYPES, bias_correction, check_mu_dtype
from .parts.ns_coefficients import NsCoeffs
from .tensor_parallel_muon import TensorParallelMode, TensorParallelMuon


class OptaxMuon(TensorParallelMuon):
    """Muon as ``optax.contrib.muon`` has it, on shards.

    ``M ← βM + (1-β)G``; ``U = βM/(1-βᵗ⁺¹) + (1-β)G/(1-βᵗ)`` with Nesterov, else ``M/(1-βᵗ)``; ``O = NS(U/(‖U‖+ε))``, times
    ``⟨U, O⟩`` when adaptive; ``W ← (1 - lr·wd)·W - lr·√max(1, m/n)·O`` for a weight of m outputs and n inputs.

    Args:
        params: 2-D parameters, or parameter groups. DTensors, or plain tensors with Megatron's attributes.
        lr: Learning rate.
        momentum: β, in [0, 1).
        nesterov: Look one step ahead.
        weight_decay: wd ≥ 0, decoupled.
        adaptive: Scale each step by ⟨U, O⟩, its dual norm.
        eps: ε ≥ 0.
        coefficient_type: Set of Newton-Schulz coefficients; ``simple`` is optax's. ``custom`` takes ``ns_coeffs``.
        num_ns_steps: Newton-Schulz iterations.
        fp32_matmul_prec: As in :class:`TensorParallelMuon`; optax itself computes in the dtype of its input.
        pg_collection: Process groups; needed when plain tensors are sharded or replicated.
        tp_mode: Mode in which shards are combined, as for :class:`TensorParallelMuon`.
        ns_coeffs: As for :class:`TensorParallelMuon`.
        mu_dtype: Dtype in which M is stored, ``float32`` or ``bfloat16``; None: the parameter's, but at least float32. The step
            itself uses M before it is rounded to that.

    ``get_optimizer`` gives parameters that are not matrices to AdamW with the same ``nesterov`` and ``mu_dtype``, as optax does.

    Raises:
        ValueError: as :class:`TensorParallelMuon`.

    Source: https://kellerjordan.github.io/posts/muon/, in the form of optax.contrib.muon; the adaptive scale is the dual norm
    of Bernstein & Newhouse 2024, https://arxiv.org/abs/2409.20325
    """

    widens = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        adaptive: bool = False,
        eps: float = 1e-8,
        coefficient_type: str = "simple",
        num_ns_steps: int = 5,
        fp32_matmul_prec: str = "highest",
        pg_collection: ProcessGroupCollection | None = None,
        tp_mode: TensorParallelMode = "owner",
        *,
        ns_coeffs: NsCoeffs | None = None,
        mu_dtype: Literal["float32", "bfloat16"] | None = None,
        ns_plan: str = "static",
        auto_rates: Rates | None = None,
    ) -> None:
        non_negative("eps", eps)
        check_mu_dtype(mu_dtype)
        self.mu_dtype = mu_dtype
        self.adaptive, self.eps, self._norm_eps = adaptive, eps, eps
        super().__init__(
            params,
            lr,
            momentum,
            nesterov,
            weight_decay,
            coefficient_type=coefficient_type,
            num_ns_steps=num_ns_steps,
            fp32_matmul_prec=fp32_matmul_prec,
            scale_mode="shape_scaling",
            pg_collection=pg_collection,
            tp_mode=tp_mode,
            ns_coeffs=ns_coeffs,
            ns_plan=ns_plan,
            auto_rates=auto_rates,
        )

    def state_specs(self, group: Mapping[str, Any], layout: Layout) -> Mapping[str, StateSpec]:
        """``momentum_buffer`` like the parameter, in ``mu_dtype``; ``step`` a scalar."""
        return {
            "momentum_buffer": StateSpec("*", dtype=MU_DTYPES[self.mu_dtype]),
            "step": StateSpec("", dtype=torch.float32, host=True),
        }

    def rule(self, group: Mapping[str, Any]) -> RuleFunction:
        """The rule above."""
        return self._optax

    def _optax(self, p: Tensor, g: Tensor, s: Any, lay: Layout, group: Mapping[str, Any]) -> Rule:
        beta = group["momentum"]
        s.step += 1
        mean = s.momentum_buffer.to(g.dtype).lerp_(g, 1 - beta)
        if s.momentum_buffer.dtype != g.dtype:
            s.momentum_buffer.copy_(mean)
        u = mean / bias_correction(beta, s.step + self.nesterov, g)
        if self.nesterov:
            u = beta * u + (1 - beta) * g / bias_correction(beta, s.step, g)
        o = (yield self._orthogonalized(u, lay, None)).to(u.dtype)
        scale = lay.per_part(self._scale, o)
        if self.adaptive:
            parts = lay.split_parts(u * o)
            aligned = yield [part.sum(x) for x, part in parts]
            scale = scale * lay.join_parts([a.expand_as(x) for a, (x, _) in zip(aligned, parts, strict=True)])
        return o * scale
