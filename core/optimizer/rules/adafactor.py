"""Adafactor with the conventions of optax, torch or Forgather: one rule with three sets of defaults."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...philox import Key, bits
from ...precision.stochastic_rounding import stochastic_round
from ...process_groups_config import ProcessGroupCollection
from ...sharding.layout import Layout
from ...sharding.requests import Rule
from ...sharding.state import StateSpec
from ..steps.argument_checks import choice, fraction, non_negative, positive
from ..steps.stacked import RuleFunction, StackedStep
from .parts.adam_parts import per_parameter
from .parts.factored import (
    Factoring,
    Scaling,
    flattened,
    inverse_root,
    inverse_roots,
    last_two,
    rms,
    square_sums,
    two_largest,
)
from .parts.rounding import RoundsStochastically, check_kernels

Variant = Literal["optax", "torch", "forgather"]

_DEFAULTS: dict[str, dict[str, Any]] = {
    "optax": {
        "lr": 1e-3,
        "weight_decay": 0.0,
        "beta2_cap": 1.0,
        "eps": 1e-30,
        "multiply_by_parameter_scale": True,
        "min_dim_size_to_factor": 128,
    },
    "torch": {
        "lr": 1e-2,
        "weight_decay": 0.0,
        "beta2_cap": 1.0,
        "eps": None,
        "multiply_by_parameter_scale": True,
        "min_dim_size_to_factor": 1,
    },
    "forgather": {
        "lr": 1e-3,
        "weight_decay": 1e-2,
        "beta2_cap": 0.999,
        "eps": 1e-30,
        "multiply_by_parameter_scale": False,
        "min_dim_size_to_factor": 1,
    },
}
_FACTORING = {"optax": two_largest, "torch": last_two, "forgather": flattened}


class Adafactor(StackedStep):
    """Adam's second moment from a factor per row and one per column, with the update's size bounded; no first moment.

    ``V`` is the rank-1 estimate of the running mean of ``g²`` with decay ``β2(t) = min(1 - (t - decay_offset)^-decay_rate,
    beta2_cap)``; ``u = g/√V``, divided by ``max(1, RMS(u)/clip_threshold)``; ``p ← p - lr · max(min_scale, RMS(p)) · u``.
    All means and RMS are of the whole tensor. A variant is a set of defaults and these conventions:

    ======================  ============================  ========================  =================================
    \\                       optax                         torch                     forgather
    ======================  ============================  ========================  =================================
    factored dims           the two largest               the last two              the last against all others
    where V is small        g² + eps                      V ≥ eps²                  g² + eps
    learning rate           lr                            min(lr, 1/√t)             lr
    weight decay            lr · wd                       lr · wd                   lr · max(min_scale, RMS(p)) · wd
    lr                      1e-3                          1e-2                      1e-3
    weight_decay            0                             0                         0.01
    beta2_cap               1 (none)                      1 (none)                  0.999
    eps                     1e-30                         epsilon of the dtype      1e-30
    …_by_parameter_scale    True                          True                      False
    min_dim_size_to_factor  128                           1                         1
    ======================  ============================  ========================  =================================

    State: ``row`` and ``col``, running means of g² over the dims that the other one keeps (Forgather holds sums; V is the
    same), shaped as the parameter with size 1 there; ``v``, shaped as the parameter, where it is not factored; ``m`` with
    momentum.

    Args:
        params: Parameters or parameter groups, any shapes, DTensors or plain tensors.
        lr: Learning rate; None for the variant's.
        variant: ``optax``, ``torch`` or ``forgather``.
        decay_rate: Exponent of the second moment's decay, ≥ 0.
        decay_offset: Number of steps before the decay begins to count, ≥ 0.
        beta2_cap: Largest decay, in [0, 1]; None for the variant's.
        eps: Regularizes V, > 0; None for the variant's.
        min_scale: Least scale of a parameter, ≥ 0.
        clip_threshold: Largest RMS of u, > 0; None for any.
        multiply_by_parameter_scale: Whether lr is relative to RMS(p), what Forgather calls ``relative_step``; None for the
            variant's.
        factored: False keeps ``v`` of every parameter.
        min_dim_size_to_factor: Least whole size of every factored dim; a tensor with a smaller one keeps ``v``. None for
            the variant's.
        momentum: Decay of a running mean of the finished update, in [0, 1); None for none.
        dtype_momentum: Dtype of that running mean; None for the parameter's, but at least float32.
        weight_decay: Coefficient, ≥ 0; None for the variant's.
        weight_decay_rate: Share of p that every step subtracts, independent of lr, as in optax; ≥ 0.
        pg_collection: Process groups of the parameters.

    Raises:
        ValueError: for an argument out of range.

    Source: Shazeer & Stern 2018, algorithms 4 to 6, https://arxiv.org/abs/1804.04235
    """

    returns = "parameter"

    def __init__(
        self,
        params: ParamsT,
        lr: float | None = None,
        variant: Variant = "optax",
        decay_rate: float = 0.8,
        decay_offset: int = 0,
        beta2_cap: float | None = None,
        eps: float | None = None,
        min_scale: float = 1e-3,
        clip_threshold: float | None = 1.0,
        multiply_by_parameter_scale: bool | None = None,
        factored: bool = True,
        min_dim_size_to_factor: int | None = None,
        momentum: float | None = None,
        dtype_momentum: torch.dtype | None = None,
        weight_decay: float | None = None,
        weight_decay_rate: float = 0.0,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        choice("variant", variant, get_args(Variant))
        arguments = {
            "lr": lr,
            "weight_decay": weight_decay,
            "beta2_cap": beta2_cap,
            "eps": eps,
            "multiply_by_parameter_scale": multiply_by_parameter_scale,
            "min_dim_size_to_factor": min_dim_size_to_factor,
        }
        defaults = _DEFAULTS[variant] | {name: value for name, value in arguments.items() if value is not None}
        for name in ("lr", "weight_decay", "beta2_cap", "min_dim_size_to_factor"):
            non_negative(name, float(defaults[name]))
        non_negative("decay_rate", decay_rate)
        non_negative("decay_offset", decay_offset)
        non_negative("min_scale", min_scale)
        non_negative("weight_decay_rate", weight_decay_rate)
        if defaults["beta2_cap"] > 1:
            raise ValueError(f"beta2_cap={beta2_cap} must be at most 1, which is no cap.")
        if eps is not None:
            positive("eps", eps)
        if clip_threshold is not None:
            positive("clip_threshold", clip_threshold)
        if momentum is not None:
            fraction("momentum", momentum)
        self.variant = variant
        super().__init__(
            params,
            pg_collection,
            **defaults,
            decay_rate=decay_rate,
            decay_offset=decay_offset,
            min_scale=min_scale,
            clip_threshold=clip_threshold,
            factored=factored,
            momentum=momentum,
            dtype_momentum=dtype_momentum,
            weight_decay_rate=weight_decay_rate,
        )

    def state_specs(self, group: Mapping[str, Any], layout: Layout) -> Mapping[str, StateSpec]:
        """``step``; ``row`` and ``col``, or ``v``; ``m`` with momentum."""
        dims = self._factoring(group, layout)
        second = {"v": StateSpec("*")} if dims is None else dims.specs(layout.ndim, "row", "col")
        first = {} if group["momentum"] is None else {"m": StateSpec("*", dtype=group["dtype_momentum"])}
        return {"step": StateSpec("", dtype=torch.float32, host=True), **second, **first}

    def rule(self, group: Mapping[str, Any]) -> RuleFunction:
        """Algorithm 4, with algorithm 5's clipping and algorithm 6's parameter scale."""
        return self._step

    def _factoring(self, group: Mapping[str, Any], layout: Layout) -> Factoring | None:
        dims = _FACTORING[self.variant](layout.shape)
        if dims is None or not group["factored"]:
            return None
        sizes = [layout.shape[d] for d in (*dims.rows, *dims.cols)]
        return dims if min(sizes) >= group["min_dim_size_to_factor"] else None

    def _step(self, p: Tensor, g: Tensor, s: Any, lay: Layout, group: Mapping[str, Any]) -> Rule:
        """The new parameters, in the memory of ``p``."""
        s.step.add_(1)
        t = s.step.double()
        fresh = (t - group["decay_offset"]).clamp_min(1) ** -group["decay_rate"]
        fresh = per_parameter(fresh.clamp_min(1 - group["beta2_cap"]), p)
        eps = torch.finfo(p.dtype).eps if group["eps"] is None else group["eps"]
        added, floor, cap = (0.0, eps, 1 / eps) if self.variant == "torch" else (eps, 0.0, None)
        dims = self._factoring(group, lay)
        if dims is None:
            s.v.lerp_(g.square().add_(added), fresh)
            scaling = Scaling(inverse_root(s.v, floor), torch.ones_like(fresh), None)
        else:
            sums = square_sums(g, dims)
            r, c = yield inverse_roots(s.row, s.col, sums, lay, fresh=fresh, eps=added, floor=floor)
            scaling = Scaling(r, c, dims, cap)

        excess, scale = yield self._excess(scaling, g, lay, group), self._scale(p, lay, group)
        lr = float(group["lr"])
        rate = scale * (per_parameter(t.rsqrt().clamp_max(lr), p) if self.variant == "torch" else lr)
        decay = group["weight_decay"] * (rate if self.variant == "forgather" else lr) + group["weight_decay_rate"]
        keep = 1 - decay if group["weight_decay"] or group["weight_decay_rate"] else None
        scaling = scaling.times(rate / excess)
        if group["momentum"] is None:
            scaling.subtract_(p, g, keep)
            return p
        if keep is not None:
            p.mul_(keep)
        for at, u in scaling.blocks(g):
            mean = torch.lerp(s.m[at].to(u.dtype), u, 1 - group["momentum"])
            s.m[at] = mean
            p[at].sub_(mean)
        return p

    def _excess(self, scaling: Scaling, g: Tensor, lay: Layout, group: Mapping[str, Any]) -> Rule:
        """Divisor of u: the ratio of its RMS to the threshold, at least 1."""
        if group["clip_threshold"] is None:
            return 1.0
        return ((yield scaling.rms(g, lay)) / group["clip_threshold"]).clamp_min(1)

    def _scale(self, p: Tensor, lay: Layout, group: Mapping[str, Any]) -> Rule:
        """Factor of the learning rate: the RMS of the parameter, at least ``min_scale``, or 1 without parameter scale."""
        if not group["multiply_by_parameter_scale"]:
            return 1.0
        return (yield rms([p], lay)).clamp_min(group["min_scale"])


class AdafactorSR(RoundsStochastically, Adafactor):
    """:class:`Adafactor` with Forgather's conventions and argument names.

    Args:
        params: Parameters or parameter groups, any shapes, DTensors or plain tensors.
        lr: Learning rate.
        decay_rate: Exponent of the second moment's decay, ≤ 0: ``β2(t) = min(1 - t^decay_rate, betas[1])``.
        clip_threshold: Largest RMS of the update before lr, > 0.
        betas: The second is the cap of the second moment's decay, in [0, 1); the first is without effect, since there is no
            first moment.
        eps: Added to g²; least scale of a parameter under ``relative_step``.
        weight_decay: Coefficient, ≥ 0.
        relative_step: Whether lr is relative to the RMS of the parameter (the paper's parameter scale; there is no schedule).
        torch_compile: Refused, because there is no compiled step.
        bf16_stochastic_round: Round bfloat16 parameters stochastically; no effect on others.
        use_triton: Refused as long as there are no Triton kernels.
        seed: Seed of the rounding, which depends on it, the parameter's name, the step and the index in the whole tensor alone.
        pg_collection: Process groups of the parameters.

    Raises:
        ValueError: for an argument out of range, and for ``use_triton`` with ``relative_step``.
        ImportError: for ``use_triton`` where Triton is not installed.

    Source: Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235; Zamirai et al. 2020, https://arxiv.org/abs/2010.06192
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        decay_rate: float = -0.8,
        clip_threshold: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: tuple[float, float] = (1e-30, 1e-3),
        weight_decay: float = 0.01,
        relative_step: bool = False,
        torch_compile: bool = False,
        bf16_stochastic_round: bool = True,
        use_triton: bool = False,
        seed: int = 5489,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        check_kernels(torch_compile=torch_compile, use_triton=use_triton, relative_step=relative_step)
        self._rounding = {"bf16_stochastic_round": bf16_stochastic_round, "seed": seed}
        if decay_rate > 0:
            raise ValueError(f"decay_rate={decay_rate} must be at most 0: the decay is 1 - t**decay_rate.")
        for name, value in (("betas", betas), ("eps", eps)):
            if len(value) != 2:
                raise ValueError(f"{name}={value} must be two numbers.")
        fraction("betas[1]", betas[1])
        super().__init__(
            params,
            lr,
            variant="forgather",
            decay_rate=-decay_rate,
            beta2_cap=betas[1],
            eps=eps[0],
            min_scale=eps[1],
            clip_threshold=clip_threshold,
            multiply_by_parameter_scale=relative_step,
            weight_decay=weight_decay,
            pg_collection=pg_collection,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; ``bf16_stochastic_round`` and ``seed`` may differ by group."""
        self.defaults.update(self._rounding)
        super().add_param_group(param_group)

    def rule(self, group: Mapping[str, Any]) -> RuleFunction:
        """Algorithm 4, then rounding of the stored parameters."""
        return self._rounded if group["bf16_stochastic_round"] else self._step

    def _rounded(self, p: Tensor, g: Tensor, s: Any, lay: Layout, group: Mapping[str, Any]) -> Rule:
        new = yield self._step(p, g, s, lay, group)
        if s.stored != torch.bfloat16:
            return new
        keys = [Key(group["seed"], name, int(t), "bfloat16 rounding") for name, t in zip(s.names, s.step, strict=True)]
        noise = torch.stack([bits(key, lay, device=p.device)[0] for key in keys])
        return stochastic_round(new, noise).to(new.dtype)
