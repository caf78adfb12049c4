"""Shampoo and SOAP: preconditioners that are Kronecker products of one factor for the rows and one for the columns."""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...linalg.roots import eigen, matrix_inverse_root
from ...process_groups_config import ProcessGroupCollection
from ..steps.argument_checks import choice, fraction, non_negative, positive, whole_number
from ..steps.weight_decay import decay_
from ..steps.whole_tensor import STEP_COUNT, WholeMode, WholeState, WholeStep

Graft = Literal["none", "sgd", "adagrad"]


class DenseFactors(WholeStep):
    """A :class:`~.whole.WholeStep` for matrices, whose factors have as many rows as the matrix has rows, or columns."""

    matrices_only = True

    def cost(self, shape: tuple[int, ...]) -> float:
        """Products with both factors, and their decompositions."""
        return super().cost(shape) + float(sum(n**3 for n in shape))


class Shampoo(DenseFactors):
    """``L ← L + G·Gᵀ``; ``R ← R + Gᵀ·G``; ``U = (L + ε)^(-1/4) · G · (R + ε)^(-1/4)``; ``W ← W - lr·(μ·M + U)``.

    All of the whole matrix. ``W ← (1 - lr·wd)·W`` comes first. The roots are computed at the first step and at every
    ``precondition_frequency``-th after it, and kept. State: L, R and their roots, M where μ > 0, and a diagonal for
    ``adagrad`` grafting.

    Args:
        params: 2-D parameters, or parameter groups. DTensors, or plain tensors with Megatron's attributes.
        lr: Learning rate.
        momentum: μ, in [0, 1); M ← μ·M + U.
        eps: ε > 0.
        beta: 1 for sums as above; below 1, in (0, 1), for running means L ← β·L + (1-β)·G·Gᵀ.
        weight_decay: wd ≥ 0, decoupled.
        precondition_frequency: Steps from one computation of the roots to the next, at least 1.
        grafting: Whose norm U is given: ``none``; ``sgd``: that of G; ``adagrad``: that of G / √(ΣG² + ε), which for β
            below 1 is RMSProp.
        tp_mode: How shards come together (:class:`~.whole.WholeStep`).
        pg_collection: Process groups, ours or Megatron-Core's; needed when plain tensors are sharded or replicated.

    Raises:
        ValueError: for an argument out of range, or a parameter that is not 2-D.

    Source: Gupta, Koren & Singer 2018, algorithm 1, https://arxiv.org/abs/1802.09568; grafting: Anil et al. 2020, section
    4, https://arxiv.org/abs/2002.09018
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        eps: float = 1e-4,
        beta: float = 1.0,
        weight_decay: float = 0.0,
        precondition_frequency: int = 10,
        grafting: Graft = "none",
        tp_mode: WholeMode = "owner",
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        non_negative("lr", float(lr))
        fraction("momentum", momentum)
        non_negative("weight_decay", weight_decay)
        choice("grafting", grafting, get_args(Graft))
        whole_number("precondition_frequency", precondition_frequency, 1)
        positive("eps", eps)
        if not 0 < beta <= 1:
            raise ValueError(f"beta={beta} must be above 0 and at most 1; 1 sums the statistics.")
        self.tp_mode = tp_mode
        super().__init__(
            params,
            pg_collection,
            lr=lr,
            momentum=momentum,
            eps=eps,
            beta=beta,
            weight_decay=weight_decay,
            precondition_frequency=precondition_frequency,
            grafting=grafting,
        )

    def whole_specs(self, shape: tuple[int, ...], group: Mapping[str, Any]) -> Mapping[str, WholeState]:
        """``L``, ``L_root`` (m, m); ``R``, ``R_root`` (n, n); ``momentum``, ``diagonal`` (m, n); ``step``."""
        left, right, full = WholeState((shape[0],) * 2), WholeState((shape[1],) * 2), WholeState(shape)
        specs = {"step": STEP_COUNT, "L": left, "R": right, "L_root": left, "R_root": right}
        if group["momentum"] > 0:
            specs["momentum"] = full
        if group["grafting"] == "adagrad":
            specs["diagonal"] = full
        return specs

    def update_whole_(self, p: Tensor, g: Tensor, s: Any, group: Mapping[str, Any], name: str) -> None:
        """Algorithm 1."""
        t, eps, beta = int(s.step.add_(1)), group["eps"], group["beta"]
        fresh = 1 - beta if beta < 1 else 1.0
        s.L.addmm_(g, g.mT, beta=beta, alpha=fresh)
        s.R.addmm_(g.mT, g, beta=beta, alpha=fresh)
        if (t - 1) % group["precondition_frequency"] == 0:
            s.L_root.copy_(matrix_inverse_root(s.L, 4, eps=eps))
            s.R_root.copy_(matrix_inverse_root(s.R, 4, eps=eps))
        u = s.L_root @ g @ s.R_root
        if group["grafting"] == "adagrad":
            s.diagonal.mul_(beta).addcmul_(g, g, value=fresh)
            g = g / s.diagonal.add(eps).sqrt_()
        if group["grafting"] != "none":
            u *= g.norm() / u.norm().clamp_min(torch.finfo(u.dtype).tiny)
        if group["momentum"] > 0:
            u = s.momentum.mul_(group["momentum"]).add_(u)
        decay_([p], [g], group, "decoupled")
        p.add_(u, alpha=-float(group["lr"]))


class Soap(DenseFactors):
    """Adam in the eigenbasis of Shampoo's factors, which follows them by one power iteration every few steps.

    With ``G' = Q_Lᵀ·G·Q_R``: ``M ← β1·M + (1-β1)·G``; ``V ← β2·V + (1-β2)·G'²``;
    ``W ← (1 - lr·wd)·(W - lr·√(1-β2ᵗ)/(1-β1ᵗ) · Q_L·(M' / (√V + ε))·Q_Rᵀ)``; then ``L ← βL + (1-β)G·Gᵀ``, and R alike.
    The first gradient of a parameter only makes L, R and their eigenvectors: the parameter is left as it is, weight decay
    included. State: L, R, Q_L, Q_R, M, and V in the rotated basis.

    Args:
        params: 2-D parameters, or parameter groups. DTensors, or plain tensors with Megatron's attributes.
        lr: Learning rate.
        betas: β1, β2, in [0, 1).
        shampoo_beta: β, in [0, 1); None for β2.
        eps: ε > 0.
        weight_decay: wd ≥ 0, decoupled.
        precondition_frequency: Steps from one power iteration to the next, at least 1.
        max_precond_dim: A dim of the whole matrix that is larger is not rotated.
        normalize_grads: Divide each update by its root mean square.
        correct_bias: Keep the factor √(1-β2ᵗ)/(1-β1ᵗ).
        tp_mode: How shards come together (:class:`~.whole.WholeStep`).
        pg_collection: Process groups, ours or Megatron-Core's; needed when plain tensors are sharded or replicated.

    Raises:
        ValueError: for an argument out of range, or a parameter that is not 2-D.

    Source: Vyas et al. 2024, algorithms 3 and 4, https://arxiv.org/abs/2409.11321
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        normalize_grads: bool = False,
        correct_bias: bool = True,
        tp_mode: WholeMode = "owner",
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        non_negative("lr", float(lr))
        if len(betas) != 2:
            raise ValueError(f"betas={betas} must be two numbers, of the gradient's mean and of its square's.")
        fraction("betas[0]", betas[0])
        fraction("betas[1]", betas[1])
        fraction("shampoo_beta", betas[1] if shampoo_beta is None else shampoo_beta)
        positive("eps", eps)
        non_negative("weight_decay", weight_decay)
        whole_number("precondition_frequency", precondition_frequency, 1)
        positive("max_precond_dim", max_precond_dim)
        self.tp_mode = tp_mode
        super().__init__(
            params,
            pg_collection,
            lr=lr,
            betas=betas,
            shampoo_beta=shampoo_beta,
            eps=eps,
            weight_decay=weight_decay,
            precondition_frequency=precondition_frequency,
            max_precond_dim=max_precond_dim,
            normalize_grads=normalize_grads,
            correct_bias=correct_bias,
        )

    def whole_specs(self, shape: tuple[int, ...], group: Mapping[str, Any]) -> Mapping[str, WholeState]:
        """``exp_avg``, ``exp_avg_sq`` (m, n); ``L``, ``Q_L`` (m, m); ``R``, ``Q_R`` (n, n); ``step``."""
        specs = {"step": STEP_COUNT, "exp_avg": WholeState(shape), "exp_avg_sq": WholeState(shape)}
        for side, size in zip("LR", shape, strict=True):
            if size <= group["max_precond_dim"]:
                specs[side] = specs[f"Q_{side}"] = WholeState((size, size))
        return specs

    def update_whole_(self, p: Tensor, g: Tensor, s: Any, group: Mapping[str, Any], name: str) -> None:
        """Algorithm 3."""
        t = int(s.step.add_(1)) - 1
        if t > 0:
            self._adam_(p, g, s, group, t)
        beta = group["betas"][1] if group["shampoo_beta"] is None else group["shampoo_beta"]
        for dim, (side, x) in enumerate((("L", g), ("R", g.mT))):
            if not hasattr(s, side):
                continue
            gram, basis = getattr(s, side), getattr(s, f"Q_{side}")
            gram.lerp_(x @ x.mT, 1 - beta)
            if t == 0:
                basis.copy_(eigen(gram)[1].flip(-1))
            elif t % group["precondition_frequency"] == 0:
                follow_(basis, gram, s.exp_avg_sq, dim)

    @staticmethod
    def _adam_(p: Tensor, g: Tensor, s: Any, group: Mapping[str, Any], t: int) -> None:
        """Lines 3 to 11: the ``t``-th update."""
        left, right = getattr(s, "Q_L", None), getattr(s, "Q_R", None)
        (beta1, beta2), lr, eps = group["betas"], float(group["lr"]), group["eps"]
        s.exp_avg.lerp_(g, 1 - beta1)
        s.exp_avg_sq.lerp_(rotate(g, left, right).square_(), 1 - beta2)
        u = rotate(s.exp_avg, left, right) / s.exp_avg_sq.sqrt().add_(eps)
        u = rotate(u, None if left is None else left.mT, None if right is None else right.mT)
        if group["normalize_grads"]:
            u /= u.square().mean().sqrt() + eps
        scale = math.sqrt(1 - beta2**t) / (1 - beta1**t) if group["correct_bias"] else 1.0
        p.add_(u, alpha=-lr * scale)
        decay_([p], [g], group, "decoupled")


def rotate(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """``leftᵀ · x · right``; None for the identity. ``x`` is (m, n); the result is new."""
    x = x.clone() if left is None else left.mT @ x
    return x if right is None else x @ right


def follow_(basis: Tensor, gram: Tensor, second_moment: Tensor, dim: int) -> None:
    """One power iteration of ``basis`` (n, n) towards the eigenvectors of ``gram`` (n, n), largest eigenvalue first.

    Mutates ``basis``, and ``second_moment`` (m, n), kept in that basis along ``dim``, whose entries move with its columns.

    Source: Vyas et al. 2024, algorithm 4; the order of columns as in the authors' code.
    """
    product = gram @ basis
    order = (basis * product).sum(0).argsort(descending=True, stable=True)
    second_moment.copy_(second_moment.index_select(dim, order))
    basis.copy_(torch.linalg.qr(product[:, order]).Q)
