"""Muon for tensor-parallel parameters, with Megatron-Core's names and arguments."""

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

import torch
from emerging_optimizers.orthogonalized_optimizers import (
    OrthogonalizedOptimizer,
    get_muon_scale_factor,
)
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ... import engine
from ...cache_blocks import row_blocks
from ...cost.auto import Choice, Rates, choices
from ...linalg.autotune import Plan, plan_for
from ...linalg.matmul_precision import compute_dtype
from ...linalg.newton_schulz import newton_schulz, relative_cost
from ...linalg.variants import is_fast_in_bfloat16, variant_for
from ...process_groups_config import ProcessGroupCollection, by_name, gather
from ...sharding.layout import Layout
from ...sharding.parameter_layout import layout_of, local
from ...sharding.requests import Rule
from ...sharding.state import StateSpec
from ...sharding.tp_modes import TP_MODES, Deferred, MatrixMode, exact_modes, on_matrix, tp_mode_names, working_axes
from ..steps.argument_checks import choice, fraction, non_negative
from ..steps.stacked import RuleFunction, StackedStep
from .muon import How, Scale, muon
from .parts.ns_coefficients import NsCoeffs, ns_coefficients

TensorParallelMode = MatrixMode
SCALE_MODES = ("shape_scaling", "spectral", "unit_rms_norm")
PRECISIONS = ("highest", "high", "medium")


class TensorParallelMuon(StackedStep, OrthogonalizedOptimizer):
    """Muon whose step is that of the whole matrix, however the matrix is sharded.

    ``W ← (1 - lr·wd)·W``; ``M ← μM + (1-μ)G``; ``U = (1-μ)G + μM`` with Nesterov, else ``M``;
    ``W ← W - lr · scale(m, n) · extra_scale_factor · NS(U)``, all of the whole matrix (of each part of a fused one).

    Args:
        params: 2-D parameters, or parameter groups. DTensors, or plain tensors with Megatron's attributes.
        lr: Learning rate.
        momentum: μ, in [0, 1).
        nesterov: Look one step ahead.
        weight_decay: wd ≥ 0.
        use_decoupled_weight_decay: False adds ``wd·W`` to the gradient instead.
        split_qkv: Whether q, k and v of a fused weight are orthogonalized separately.
        is_qkv_fn: ``is_qkv_fn(p)`` says whether ``p`` is a fused QKV weight; by default its attribute ``is_qkv`` does.
        qkv_split_shapes: Rows of q, k, v (and gate) in one query group; an attribute of that name on the parameter wins.
            For other fused weights (gate/up) a parameter's attribute ``matrix_parts`` holds the rows.
        fp32_matmul_prec: ``highest``, ``high`` (tf32) or ``medium`` (bfloat16 Newton-Schulz).
        coefficient_type: Set of Newton-Schulz coefficients (:data:`core.linalg.coefficients.COEFFICIENT_SETS`), or ``custom`` for
            ``ns_coeffs``.
        num_ns_steps: Newton-Schulz iterations, at least 1; exactly 5 with ``cubic5``.
        scale_mode: ``shape_scaling``, ``spectral`` or ``unit_rms_norm``.
        extra_scale_factor: Additional factor of the update.
        pg_collection: Process groups, ours or Megatron-Core's; needed when plain tensors are sharded or replicated.
        tp_mode: Mode in which shards are combined (:func:`~.tp_modes.on_matrix`); all but ``blockwise`` are exact. ``auto``
            takes for each matrix the exact mode with the least predicted time (:mod:`core.cost.auto`).
        ns_coeffs: Coefficients (a, b, c) of ``custom``: three numbers, or three for each iteration
            (:func:`~.parts.ns_coefficients.ns_coefficients`).
        ns_plan: Choice of the Newton-Schulz variant for whole matrices of each shape (:mod:`core.linalg.variants`):
            ``static``: by rule; ``tune``: the fastest of the variants that are as exact, measured once and cached; or the path
            of a file with such a plan.
        auto_rates: Rates from which ``auto`` predicts: FLOP/s of products, bytes/s of memory, seconds of latency and bytes/s
            of the link; None measures them once.
        use_syrk: Argument of Megatron-Core's class for a kernel that is not used here; only False is possible.

    Raises:
        ValueError: for an argument out of range, a parameter that is not 2-D, or a split that does not fit.

    Source: https://kellerjordan.github.io/posts/muon/
    """

    kind = "matrix"
    matrices_only = True
    widens = False
    modes = exact_modes()
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
        tp_mode: TensorParallelMode = "duplicated",
        *,
        ns_coeffs: NsCoeffs | None = None,
        ns_plan: str = "static",
        auto_rates: Rates | None = None,
        use_syrk: Literal[False] = False,
    ) -> None:
        if use_syrk:
            raise ValueError(
                "use_syrk=True asks for emerging-optimizers' Triton kernel, which this class does not run; leave it out."
            )
        if num_ns_steps < 1:
            raise ValueError(f"num_ns_steps must be at least 1, got {num_ns_steps}")
        coefs = ns_coefficients(coefficient_type, num_ns_steps, ns_coeffs)
        non_negative("lr", lr)
        fraction("momentum", momentum)
        non_negative("weight_decay", weight_decay)
        choice("fp32_matmul_prec", fp32_matmul_prec, PRECISIONS)
        choice("scale_mode", scale_mode, SCALE_MODES)
        choice("tp_mode", tp_mode, tp_mode_names())
        if auto_rates is not None and (len(auto_rates) != 4 or not all(rate > 0 for rate in auto_rates)):
            raise ValueError(
                f"auto_rates={auto_rates} must be four positive numbers: FLOP/s of products, bytes/s of memory, seconds of "
                f"latency and bytes/s of the link."
            )
        self.tp_mode: TensorParallelMode = tp_mode
        self.auto_rates = auto_rates
        self.ns_plan = ns_plan
        self._plan: Plan | None = None
        self.split_qkv = split_qkv
        self.is_qkv_fn = is_qkv_fn or (lambda p: bool(getattr(p, "is_qkv", False)))
        self.qkv_split_shapes = qkv_split_shapes
        self.prepare(pg_collection)
        self.scale_mode = scale_mode
        self.extra_scale_factor = extra_scale_factor
        self._chosen: dict[Layout, Choice] = {}
        self.coefficient_type = coefficient_type
        self.num_ns_steps = num_ns_steps
        self.ns_coeffs = ns_coeffs
        self._coefs = coefs
        # A weak reference, because a cycle would keep all state alive until garbage is collected.
        me = weakref.ref(self)
        # Called by name: with super(), AdaptiveMuon's MRO would call a class that takes other arguments.
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
        self._fast_in_bfloat16 = self._all_fast_in_bfloat16()

    def orthogonalize(self, p: Tensor, grad: Tensor, **kwargs: Any) -> Tensor:
        """The scaled, orthogonalized shard for this one parameter.

        Args:
            p: The parameter.
            grad: (m, n) shard of its momentum.
            kwargs: Ignored; accepted as the base class does.
        """
        rule = self._orthogonalized(local(grad)[None], self.layout(p), self._scale)
        with torch.no_grad():
            out: Tensor = engine.run([(self._name(p), rule)])[0][0]
        return out.to(grad.dtype)

    def layout(self, p: Tensor) -> Layout:
        """Layout of ``p`` and its parts; in ``blockwise`` mode this rank's shard counts as the whole matrix."""
        lay = layout_of(p, self._groups, part_sizes=self._part_sizes(p), name=self._name(p))
        if self.tp_mode == "blockwise":
            return lay.block
        return replace(lay, domain=self._groups.domain(working_axes(lay, self.tp_mode)))

    def state_layouts(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Layout | None]:
        """As in the base class; in ``blockwise`` mode only state of the parameter's shape is part of a whole tensor."""
        if self.tp_mode != "blockwise":
            return super().state_layouts(p, group)
        whole = layout_of(p, self._groups, name=self._name(p))
        specs = self.state_specs(group, self.layout(p))
        return {name: spec.layout(whole) if spec.dims == "*" else None for name, spec in specs.items()}

    def mode_of(self, p: Tensor) -> str:
        """The tensor-parallel mode; for ``auto`` its choice and prediction. All ranks must call this in the same order."""
        return self._choice(self.layout(p)).label

    def state_specs(self, group: Mapping[str, Any], layout: Layout) -> Mapping[str, StateSpec]:
        """``momentum_buffer``, like the parameter."""
        return {"momentum_buffer": StateSpec("*")}

    def traffic(self, layout: Layout) -> tuple[float, int]:
        """As in the base class: work of the costliest part, and entries of the largest."""
        choice = self._choice(layout)
        parts = choice.layout.part_layouts
        entries = max(map(TP_MODES[choice.mode].brings, parts))
        return (max(relative_cost(*part.shape) for part in parts), entries) if entries else (0.0, 0)

    def rule(self, group: Mapping[str, Any]) -> RuleFunction:
        """Muon's (:func:`~.muon.muon`)."""
        return partial(muon, how=self._how)

    @property
    def _how(self) -> How:
        return How(self._orthogonalized, self._scale, self.nesterov, self.weight_decay_method == "l2")

    def _orthogonalized(self, u: Tensor | Deferred, lay: Layout, scale: Scale | None) -> Rule:
        """``scale(m, n) · NS(U)`` of each whole matrix with shards in ``u`` (B, m, n); see :mod:`.muon`."""
        precision = self.fp32_matmul_prec

        def of_matrix(x: Tensor, matrix: Layout) -> Rule:
            variant = self._plan.get((matrix.shape[0], matrix.shape[1])) if self._plan and matrix.is_whole else None
            variant = variant or variant_for(
                matrix.shape,
                x.dtype,
                precision,
                x.device,
                self._coefs,
                whole=matrix.is_whole,
                fast_in_bfloat16=self._fast_in_bfloat16,
            )
            factor = scale(*matrix.shape) if scale else 1.0
            return newton_schulz(
                x, matrix, coefs=self._coefs, precision=precision, scale=factor, eps=self._norm_eps, variant=variant
            )

        choice = self._choice(lay)
        # Casting before shards are sent halves the bytes, and gives the owner the numbers of an unsharded run.
        dtype = compute_dtype(u.dtype, precision)
        x = u.to(dtype) if isinstance(u, Tensor) else replace(u, dtype=dtype)
        return (yield on_matrix(of_matrix, x, choice.layout, choice.mode, relative_cost))

    def _choice(self, lay: Layout) -> Choice:
        """Mode for matrices of layout ``lay``. All ranks that share parameters must call this in the same order."""
        if self.ns_plan != "static" and self._plan is None:
            params = [p for group in self.param_groups for p in group["params"]]
            self._plan = plan_for(
                self.ns_plan,
                [part.shape for p in params for part in self.layout(p).part_layouts],
                dtype=self._travels_in(params[0]),
                precision=self.fp32_matmul_prec,
                device=local(params[0]).device,
                coefs=self._coefs,
                agree=self._agree,
            )
        if self.tp_mode != "auto":
            return Choice(self.tp_mode, lay, self.tp_mode)
        if lay not in self._chosen:
            # The choice is made for all matrices together, because owners share the work of all.
            params = [p for group in self.param_groups for p in group["params"]]
            counts = Counter(self.layout(p) for p in params)
            counts.setdefault(lay, 1)
            self._chosen = choices(
                counts,
                self._groups,
                device=local(params[0]).device,
                dtype=self._travels_in(params[0]),
                precision=self.fp32_matmul_prec,
                iterations=self.num_ns_steps,
                rates=self.auto_rates,
            )
        return self._chosen[lay]

    def _apply(self, p: Tensor, update: Tensor, group: Mapping[str, Any]) -> None:
        lr, decay = float(group["lr"]), group["weight_decay"] if self.weight_decay_method == "decoupled" else 0
        hooked = type(self).pre_weight_update_fn_inplace is not OrthogonalizedOptimizer.pre_weight_update_fn_inplace
        # By blocks in one pass, unless a hook has to see the whole parameter between decay and update.
        for q, u in [(p, update)] if hooked else row_blocks(p, update):
            if decay:
                q.add_(q, alpha=-decay * lr)
            self.pre_weight_update_fn_inplace(q, u)
            q.add_(u, alpha=-lr)
        self.post_weight_update_fn_inplace(p)

    def _agree(self, make: Callable[[], Plan]) -> Plan:
        """Call ``make`` on one of the ranks that share parameters; return its result, or raise its error, on all of them."""
        domain = self._groups.domain(by_name((self._groups.axis("tp"), self._groups.axis("dp"))))
        made: Any = None
        if domain.index == 0:
            try:
                made = make()
            except ValueError as error:
                made = error
        made = domain.gather(made)[0]
        if isinstance(made, ValueError):
            raise made
        return cast(Plan, made)

    def _all_fast_in_bfloat16(self) -> bool:
        """Whether all ranks that may compute the same matrix are fast in bfloat16; one that is not decides for all."""
        params = [p for group in self.param_groups for p in group["params"]]
        fast = is_fast_in_bfloat16()
        if any(local(p).is_cpu for p in params) and self.fp32_matmul_prec == "medium":
            layouts = [layout_of(p, self._groups, name=self._name(p)) for p in params]
            axes = {axis.ranks: axis for lay in layouts for one in (*lay.axes, *lay.copies) for axis in one.of_mesh}
            for axis in by_name(tuple(axes.values())):
                fast = all(gather(fast, axis.group)) if axis.size > 1 else fast
        return fast

    def _travels_in(self, p: Tensor) -> torch.dtype:
        return compute_dtype(torch.promote_types(p.dtype, torch.float32), self.fp32_matmul_prec)

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
        lay = replace(Layout.whole(x.shape), domain=ProcessGroupCollection().domain(()))
        rule = self._orthogonalized(x[None], lay, self._scale)
        out: Tensor = engine.run([("matrix", rule)])[0][0]
        return out.to(x.dtype)
