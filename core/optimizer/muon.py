"""Muon and adaptive Muon for tensor-parallel parameters, with Megatron-Core's names and arguments."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, Literal, cast, get_args

import torch
from emerging_optimizers.orthogonalized_optimizers import (
    AdaptiveMuon,
    OrthogonalizedOptimizer,
    get_muon_scale_factor,
)
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import engine
from ..layout import Layout, Mode, Rule
from ..linalg.newton_schulz import coefficients, flops, newton_schulz
from ..on_matrix import Deferred, travels
from ..placements import layout_of, local
from ..process_groups_config import ProcessGroupCollection
from ..state import StateSpec
from . import orthogonal
from .blocks import row_blocks
from .buckets import RuleFunction
from .checks import choice, fraction, non_negative
from .sharded_optimizer import ShardedStep

SCALE_MODES = ("shape_scaling", "spectral", "unit_rms_norm")
PRECISIONS = ("highest", "high", "medium")


class TensorParallelMuon(ShardedStep, OrthogonalizedOptimizer):
    """Muon whose step is the step of the whole matrix, however it is sharded.

    ``W ← (1 - lr·wd)·W``; ``M ← μM + (1-μ)G``; ``U = (1-μ)G + μM`` with Nesterov, else ``M``;
    ``W ← W - lr · scale(m, n) · extra_scale_factor · NS(U)``, all of the whole matrix (of each part of a fused one).

    Args:
        params: 2-D parameters, or parameter groups. DTensors, or plain tensors with Megatron's attributes.
        lr: Learning rate.
        momentum: μ, in [0, 1).
        nesterov: Look one step ahead.
        weight_decay: wd ≥ 0.
        use_decoupled_weight_decay: False adds ``wd·W`` to the gradient instead.
        split_qkv: Orthogonalize q, k and v of a fused weight apart.
        is_qkv_fn: Tells which parameters are fused; default: those with a true attribute ``is_qkv``.
        qkv_split_shapes: Rows of q, k, v (and gate) in one query group; an attribute of that name on the parameter wins.
            A parameter's attribute ``matrix_parts`` says the same of any other fused weight (gate/up).
        fp32_matmul_prec: ``highest``, ``high`` (tf32) or ``medium`` (bfloat16 Newton-Schulz).
        coefficient_type: Set of Newton-Schulz coefficients of emerging-optimizers.
        num_ns_steps: Newton-Schulz iterations, at least 1.
        scale_mode: ``shape_scaling``, ``spectral`` or ``unit_rms_norm``.
        extra_scale_factor: Another factor of the update.
        pg_collection: Process groups, ours or Megatron-Core's; needed when plain tensors are sharded or replicated.
        tp_mode: How shards come together (:func:`core.on_matrix.on_matrix`); all but ``blockwise`` are exact.

    Raises:
        ValueError: for an argument out of range, a parameter that is not 2-D, or a split that does not fit.

    Source: https://kellerjordan.github.io/posts/muon/
    """

    kind = "matrix"
    matrices_only = True
    widens = False
    modes = ("duplicated", "distributed", "owner")
    _norm_eps = 0.0

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3e-4,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.01,
        use_decoupled_weight_decay: bool = True,
        split_qkv: bool = False,
        is_qkv_fn: Callable[[Tensor], bool] | None = None,
        qkv_split_shapes: Sequence[int] | None = None,
        fp32_matmul_prec: str = "medium",
        coefficient_type: str = "quintic",
        num_ns_steps: int = 5,
        scale_mode: str = "spectral",
        extra_scale_factor: float = 1.0,
        pg_collection: ProcessGroupCollection | None = None,
        tp_mode: Literal["blockwise", "duplicated", "distributed", "owner"] = "duplicated",
    ) -> None:
        if num_ns_steps < 1:
            raise ValueError(f"num_ns_steps must be at least 1, got {num_ns_steps}")
        non_negative("lr", lr)
        fraction("momentum", momentum)
        non_negative("weight_decay", weight_decay)
        choice("fp32_matmul_prec", fp32_matmul_prec, PRECISIONS)
        choice("scale_mode", scale_mode, SCALE_MODES)
        choice("tp_mode", tp_mode, get_args(Mode))
        self.tp_mode: Mode = tp_mode
        self.split_qkv = split_qkv
        self.is_qkv_fn = is_qkv_fn or (lambda p: bool(getattr(p, "is_qkv", False)))
        self.qkv_split_shapes = qkv_split_shapes
        self.pg_collection = pg_collection
        self.scale_mode = scale_mode
        self.extra_scale_factor = extra_scale_factor
        self.coefficient_type = coefficient_type
        self.num_ns_steps = num_ns_steps
        # Not the optimizer itself: a cycle would keep all state alive until the garbage collector comes by.
        me = weakref.ref(self)
        self._coefs = coefficients(coefficient_type, num_ns_steps)
        # By name, not super(): in AdaptiveMuon's MRO the next class takes other arguments.
        OrthogonalizedOptimizer.__init__(
            self,
            params,
            lr,
            momentum,
            weight_decay,
            nesterov=nesterov,
            weight_decay_method="decoupled" if use_decoupled_weight_decay else "l2",
            fp32_matmul_prec=fp32_matmul_prec,
            scaled_orthogonalize_fn=lambda x: cast(TensorParallelMuon, me())._whole(x),
        )
        self.take_state()

    def orthogonalize(self, p: Tensor, grad: Tensor, **kwargs: Any) -> Tensor:
        """The scaled, orthogonalized shard for this one parameter.

        Args:
            p: The parameter.
            grad: (m, n) shard of its momentum.
            kwargs: Ignored; accepted as the base class does.
        """
        rule = self._orthogonal(local(grad)[None], self.layout(p), scaled=True)
        with torch.no_grad():
            out: Tensor = engine.run([(self._name(p), rule)])[0][0]
        return out.to(grad.dtype)

    step = ShardedStep.step

    def layout(self, p: Tensor) -> Layout:
        """Where ``p`` and its parts live; its own shard for the whole in ``blockwise`` mode."""
        lay = layout_of(p, self._groups, part_sizes=self._part_sizes(p), name=self._name(p))
        if self.tp_mode == "blockwise":
            return lay.block
        axes = (*lay.axes, *lay.copies) if self.tp_mode == "owner" else lay.axes
        return replace(lay, domain=self._groups.domain(tuple(sorted(axes, key=lambda axis: axis.name))))

    def state_layouts(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Layout | None]:
        """As in the base class; in ``blockwise`` mode only what follows the parameter elementwise has a place in the whole."""
        if self.tp_mode != "blockwise":
            return super().state_layouts(p, group)
        whole = layout_of(p, self._groups, name=self._name(p))
        specs = self.state_specs(group, self.layout(p))
        return {name: spec.layout(whole) if spec.dims == "*" else None for name, spec in specs.items()}

    def mode(self) -> str:
        """The tensor-parallel mode."""
        return self.tp_mode

    def state_specs(self, group: Mapping[str, Any], layout: Layout) -> Mapping[str, StateSpec]:
        """``momentum_buffer``, like the parameter."""
        return {"momentum_buffer": StateSpec("*")}

    def traffic(self, layout: Layout) -> tuple[float, int]:
        """As in the base class: the dearest of the parts, and the largest."""
        if not travels(layout, self.tp_mode):
            return 0.0, 0
        shapes = [part.shape for part in layout.part_layouts]
        return max(flops(*shape) for shape in shapes), max(prod(shape) for shape in shapes)

    def rule(self, group: Mapping[str, Any]) -> RuleFunction:
        """Momentum, then orthogonalization."""
        return self._muon

    def _muon(self, p: Tensor, g: Tensor, s: Any, lay: Layout, group: Mapping[str, Any]) -> Rule:
        return (yield self._orthogonal(self._momentum(p, g, s, group), lay, scaled=True))

    def _momentum(self, p: Tensor, g: Tensor, s: Any, group: Mapping[str, Any]) -> Deferred:
        """The direction to orthogonalize, and the update of its buffer."""
        mu, decay = group["momentum"], group["weight_decay"] if self.weight_decay_method == "l2" else 0

        def write(out: Tensor) -> None:
            decayed = g.to(s.momentum_buffer.dtype).add(p, alpha=decay) if decay else g
            orthogonal.write_momentum(out, decayed, s.momentum_buffer, mu=mu, nesterov=self.nesterov)

        return Deferred(tuple(g.shape), s.momentum_buffer.dtype, g.device, write)

    def _orthogonal(self, u: Tensor | Deferred, lay: Layout, *, scaled: bool) -> Rule:
        def fn(x: Tensor, matrix: Layout) -> Rule:
            scale = self._scale(*matrix.shape) if scaled else 1.0
            precision = self.fp32_matmul_prec
            return newton_schulz(x, matrix, coefs=self._coefs, precision=precision, scale=scale, eps=self._norm_eps)

        return orthogonal.orthogonal(u, lay, fn, mode=self.tp_mode, precision=self.fp32_matmul_prec)

    def _apply(self, p: Tensor, update: Tensor, group: Mapping[str, Any]) -> None:
        lr, decay = float(group["lr"]), group["weight_decay"] if self.weight_decay_method == "decoupled" else 0
        hooked = type(self).pre_weight_update_fn_inplace is not OrthogonalizedOptimizer.pre_weight_update_fn_inplace
        # In one pass, unless somebody wants to see the whole parameter between decay and update.
        for q, u in [(p, update)] if hooked else row_blocks(p, update):
            if decay:
                q.add_(q, alpha=-decay * lr)
            self.pre_weight_update_fn_inplace(q, u)
            q.add_(u, alpha=-lr)
        self.post_weight_update_fn_inplace(p)

    def _scale(self, rows: int, cols: int) -> float:
        return float(get_muon_scale_factor(rows, cols, mode=self.scale_mode) * self.extra_scale_factor)

    def _part_sizes(self, p: Tensor) -> Sequence[int] | None:
        if not (self.split_qkv and self.is_qkv_fn(p)):
            return getattr(p, "matrix_parts", None)
        sizes: Sequence[int] | None = getattr(p, "qkv_split_shapes", None) or self.qkv_split_shapes
        if sizes is None:
            raise ValueError(
                f"{self._name(p)}: split_qkv is on and this is a fused QKV weight, but its split is unknown; "
                f"pass qkv_split_shapes=(q, k, v) rows of one query group, or set that attribute on the parameter."
            )
        return sizes

    def _whole(self, x: Tensor) -> Tensor:
        rule = self._orthogonal(
            x[None], replace(Layout.whole(x.shape), domain=ProcessGroupCollection().domain(())), scaled=True
        )
        out: Tensor = engine.run([("matrix", rule)])[0][0]
        return out.to(x.dtype)


class TensorParallelAdaptiveMuon(TensorParallelMuon, AdaptiveMuon):
    """Muon with a second moment of the orthogonalized direction, whose statistics are those of the whole matrix.

    As :class:`TensorParallelMuon`, and:

    Args:
        moment2_method: ``adamuon`` (elementwise), ``normuon`` (per index of the longer side) or ``namo`` (one number).
        beta2: Decay of the second moment, in [0, 1).
        eps: Added to, or smallest value of, what is divided by.

    The second moment is of the unscaled direction, and the scale is applied once, after it.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3e-4,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.01,
        use_decoupled_weight_decay: bool = True,
        split_qkv: bool = False,
        is_qkv_fn: Callable[[Tensor], bool] | None = None,
        qkv_split_shapes: Sequence[int] | None = None,
        fp32_matmul_prec: str = "medium",
        coefficient_type: str = "quintic",
        num_ns_steps: int = 5,
        scale_mode: str = "spectral",
        extra_scale_factor: float = 1.0,
        pg_collection: ProcessGroupCollection | None = None,
        tp_mode: Literal["blockwise", "duplicated", "distributed", "owner"] = "duplicated",
        moment2_method: orthogonal.Moment2 = "adamuon",
        beta2: float = 0.95,
        eps: float = 1e-8,
    ) -> None:
        choice("moment2_method", moment2_method, get_args(orthogonal.Moment2))
        fraction("beta2", beta2)
        non_negative("eps", eps)
        if moment2_method == "namo" and not use_decoupled_weight_decay:
            raise ValueError("moment2_method 'namo' needs the raw gradient; use decoupled weight decay with it.")
        self.moment2_method = moment2_method
        self._adaptive = {"beta2": beta2, "eps": eps}
        super().__init__(
            params,
            lr,
            momentum,
            nesterov,
            weight_decay,
            use_decoupled_weight_decay,
            split_qkv,
            is_qkv_fn,
            qkv_split_shapes,
            fp32_matmul_prec,
            coefficient_type,
            num_ns_steps,
            scale_mode,
            extra_scale_factor,
            pg_collection,
            tp_mode,
        )

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; see :meth:`ShardedStep.step`."""
        return ShardedStep.step(self, closure)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; ``beta2`` and ``eps`` may differ by group."""
        self.defaults.update(self._adaptive)
        super().add_param_group(param_group)

    def state_specs(self, group: Mapping[str, Any], layout: Layout) -> Mapping[str, StateSpec]:
        """``momentum_buffer`` like the parameter; ``moment2_buffer`` by method."""
        return {
            **super().state_specs(group, layout),
            "moment2_buffer": orthogonal.moment2_spec(self.moment2_method, layout),
        }

    def rule(self, group: Mapping[str, Any]) -> RuleFunction:
        """Momentum, orthogonalization, second moment, scale."""
        return self._adaptive_muon

    def _adaptive_muon(self, p: Tensor, g: Tensor, s: Any, lay: Layout, group: Mapping[str, Any]) -> Rule:
        u = self._momentum(p, g, s, group)
        if self.moment2_method == "namo":
            formed = u.form()
            # Asked here, while gradient and direction are at hand, and sent later, for not to delay the matrices.
            norms = lay.norm(g.to(u.dtype)), lay.norm(formed)
            o = (yield self._orthogonal(formed, lay, scaled=False)).to(u.dtype)
            del formed
            o = orthogonal.namo(o, s.moment2_buffer, *(yield norms), beta2=group["beta2"], eps=group["eps"])
        else:
            o = (yield self._orthogonal(u, lay, scaled=False)).to(u.dtype)
            adapt = orthogonal.normuon if self.moment2_method == "normuon" else orthogonal.adamuon
            o = yield adapt(o, s.moment2_buffer, lay, beta2=group["beta2"], eps=group["eps"])
        return o * lay.per_part(self._scale, o)
