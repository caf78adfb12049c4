"""PSGD with Kronecker factors on a grid of blocks: Quad and Skew, one rule with two ways to update a factor.

Each block G (d, e) of the whole matrix has factors Q_l (d, d) and Q_r (e, e); it is preconditioned as P_l·G·P_r, P = QᵀQ, and
both factors are fitted until that has unit variance: Q moves against E = z·(T - c), T = X·Xᵀ of the preconditioned block X, c its
other side. The grid, the clip and the defaults are eFormer's (https://github.com/erfanzar/eFormer).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...linalg.roots import norm_lower_bound, rotate_towards_symmetry
from ...philox import Key, normal
from ...process_groups_config import ProcessGroupCollection
from ..steps.argument_checks import choice, fraction, non_negative, positive, whole_number
from ..steps.weight_decay import decay_
from ..steps.whole_tensor import STEP_COUNT, WholeMode, WholeState, WholeStep

BETA_LIPSCHITZ = 0.95
"""Decay of the running bound on the curvature of a factor's objective."""

LEAST_LR = 0.4
"""Step size of the factors at which its decay ends."""

BALANCE_EVERY = 100
"""Steps from one balancing of Q_l against Q_r to the next."""

LARGEST_RMS = 1.1
"""Largest root mean square of a preconditioned matrix; larger ones are clipped to it."""

PROBES = 4
"""Number of random vectors from which a spectral norm is estimated."""


class WhiteKron(WholeStep):
    """Whitens the momentum of each block of the matrix; a subclass says how the factors move.

    The momentum, corrected for bias, is cut along the whole matrix's grid of blocks, those at the lower and right edge smaller
    where the grid does not fit. The preconditioned matrix U is clipped to a root mean square of 1.1 (1 is what fitted factors
    make it); ``W ← (1 - lr·wd)·W - lr·U``. State: momentum, and Q_l, Q_r and their bounds L_l, L_r for each block.

    Args:
        params: 2-D parameters, or parameter groups. DTensors, or plain tensors with Megatron's attributes.
        lr: Learning rate.
        momentum: Decay of the running mean of the gradient, in [0, 1).
        weight_decay: wd ≥ 0, decoupled.
        lr_style: ``adam`` divides U by 5, so that learning rates found for Adam serve; None does not.
        normalize_grads: Divide the momentum by its norm first.
        block_size: Side of a block, at least 1.
        max_size_dense: A side of the matrix that is longer is not cut, and only the diagonal of its factors kept.
        preconditioner_lr: Step size of the factors, in (0, 1]; decays as 1/√(1 + t/10⁴), to 0.4 if it starts above.
        preconditioner_init_scale: The first Q_l and Q_r are this times the identity; > 0.
        precond_dtype: Dtype of the stored Q_l and Q_r; None for the parameter's, but at least float32. bfloat16, the authors'
            choice, takes half the memory, but its 8 bits lose every change below 0.2 %. Arithmetic uses the parameter's dtype.
        noise_scale: Size of the noise added to the momentum from which the factors are fitted, > 0; without noise they would
            grow without bound where the gradient stays 0.
        seed: Seed of that noise and of the probes for spectral norms. Both depend on the seed, the parameter's name and the
            step alone, and so are equal on every layout and in resumed runs.
        tp_mode: Mode in which shards are combined (:class:`~.whole_tensor.WholeStep`).
        pg_collection: Process groups, ours or Megatron-Core's; needed when plain tensors are sharded or replicated.

    Raises:
        ValueError: for an argument out of range, or a parameter that is not 2-D.
    """

    matrices_only = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        lr_style: Literal["adam"] | None = "adam",
        normalize_grads: bool = False,
        block_size: int = 256,
        max_size_dense: int = 16384,
        preconditioner_lr: float = 0.7,
        preconditioner_init_scale: float = 1.0,
        precond_dtype: torch.dtype | None = None,
        noise_scale: float = 1e-9,
        seed: int = 42,
        tp_mode: WholeMode = "owner",
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        non_negative("lr", float(lr))
        fraction("momentum", momentum)
        non_negative("weight_decay", weight_decay)
        choice("lr_style", str(lr_style), ("adam", "None"))
        whole_number("block_size", block_size, 1)
        positive("max_size_dense", max_size_dense)
        positive("preconditioner_init_scale", preconditioner_init_scale)
        positive("noise_scale", noise_scale)
        if not 0 < preconditioner_lr <= 1:
            raise ValueError(f"preconditioner_lr={preconditioner_lr} must be above 0 and at most 1.")
        if precond_dtype is not None and not precond_dtype.is_floating_point:
            raise ValueError(f"precond_dtype={precond_dtype} must be a floating-point dtype, such as torch.bfloat16.")
        self.tp_mode = tp_mode
        self.seed = seed
        self.block_size = block_size
        self.max_size_dense = max_size_dense
        self.precond_dtype = precond_dtype
        super().__init__(
            params,
            pg_collection,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            lr_style=lr_style,
            normalize_grads=normalize_grads,
            preconditioner_lr=preconditioner_lr,
            preconditioner_init_scale=preconditioner_init_scale,
            noise_scale=noise_scale,
        )

    def new_factor(self, q: Tensor, e: Tensor, probe: Tensor) -> Tensor:
        """The factor Q after a step against E.

        Args:
            q: Factors Q (N, d, d), or (N, d) where only the diagonal is kept.
            e: E, symmetric and of the shape of ``q``.
            probe: Standard normal numbers (N, 4, d).
        """
        raise NotImplementedError

    def cost(self, shape: tuple[int, ...]) -> float:
        """Relative work, by the number of entries, because blocks of equal size cost the same."""
        return float(math.prod(shape))

    def whole_specs(self, shape: tuple[int, ...], group: Mapping[str, Any]) -> Mapping[str, WholeState]:
        """``step``, ``momentum`` (m, n), and for the k-th region of blocks its factors and the bounds on their curvature.

        For N blocks of (d, e), row by row: ``Ql{k}`` (N, d, d) and ``Qr{k}`` (N, e, e), or (N, d) and (N, e) where diagonal, in
        ``precond_dtype``; ``Ll{k}`` and ``Lr{k}`` (N,).
        """
        specs = {"step": STEP_COUNT, "momentum": WholeState(shape)}
        for k, region in enumerate(self._regions(shape)):
            for side, size in zip("lr", region.block, strict=True):
                n, diagonal = region.blocks, size > self.max_size_dense
                first: float | Literal["eye"] = 1.0 if diagonal else "eye"
                dims = (n, size) if diagonal else (n, size, size)
                specs[f"Q{side}{k}"] = WholeState(dims, first, dtype=self.precond_dtype)
                specs[f"L{side}{k}"] = WholeState((n,))
        return specs

    def update_whole_(self, p: Tensor, g: Tensor, s: Any, group: Mapping[str, Any], name: str) -> None:
        t, lr = int(s.step.add_(1)), float(group["lr"])
        m = s.momentum.lerp_(g, 1 - group["momentum"]) / (1 - group["momentum"] ** t)
        if group["normalize_grads"]:
            m /= m.norm() + 1e-6
        noisy = m.add(self._normal(p, p.shape, name, t, "noise"), alpha=group["noise_scale"])
        regions = self._regions(p.shape)
        # All probes come from one draw, because each draw takes many small kernels, however few its numbers are.
        sizes = [region.blocks * PROBES * size for region in regions for size in region.block]
        probes = iter(self._normal(p, (sum(sizes),), name, t, "probes").split(sizes))
        u = torch.empty_like(p)
        for k, region in enumerate(regions):
            q = [getattr(s, f"Q{side}{k}") for side in "lr"]
            if t == 1:
                for factor in q:
                    factor.mul_(group["preconditioner_init_scale"])
            if t % BALANCE_EVERY == 0:
                balance_(*q)
            x = precondition(q[0].to(p.dtype), q[1].to(p.dtype), region.cut(noisy))
            for side, factor, y in zip("lr", q, (x, x.mT), strict=True):
                probe = next(probes).view(len(factor), PROBES, factor.shape[-1])
                e = excess(y, getattr(s, f"L{side}{k}"), probe, diagonal=factor.ndim == 2)
                e *= factor_lr(group["preconditioner_lr"], t)
                factor.copy_(self.new_factor(factor.to(p.dtype), e, probe))
            region.paste_(u, precondition(q[0].to(p.dtype), q[1].to(p.dtype), region.cut(m)))
        u *= LARGEST_RMS / u.square().mean().sqrt().clamp_min(LARGEST_RMS)
        if group["lr_style"] == "adam":
            u /= 5
        decay_([p], [g], group, "decoupled")
        p.add_(u, alpha=-lr)

    def _normal(self, like: Tensor, shape: tuple[int, ...], name: str, t: int, purpose: str) -> Tensor:
        return normal(Key(self.seed, name, t, purpose), shape, dtype=like.dtype, device=like.device)

    def _regions(self, shape: tuple[int, ...]) -> "list[Region]":
        m, n = (size if size > self.max_size_dense else min(size, self.block_size) for size in shape)
        return [Region(rows, cols) for rows in spans(shape[0], m) for cols in spans(shape[1], n)]


class Quad(WhiteKron):
    """PSGD-QUAD: factors stay symmetric, ``Q ← (I - E/2)·Q·(I - E/2)``. Arguments and errors as :class:`WhiteKron`.

    Source: Li 2024, https://arxiv.org/abs/2402.11858 (QUAD in the author's psgd_torch)
    """

    def new_factor(self, q: Tensor, e: Tensor, probe: Tensor) -> Tensor:
        if q.ndim == 2:
            return q * (1 - e / 2).square()
        q = q - e @ q / 2
        q = q - q @ e / 2
        return (q + q.mT) / 2


class Skew(WhiteKron):
    """PSGD-PRO: ``Q ← (I - E)·Q``, a step Q^0.5·E·Q^1.5, rotated towards symmetry. Arguments and errors as :class:`WhiteKron`.

    Source: Li 2024, https://arxiv.org/abs/2402.11858 (Q0.5EQ1.5 in the author's psgd_torch)
    """

    def new_factor(self, q: Tensor, e: Tensor, probe: Tensor) -> Tensor:
        return q * (1 - e) if q.ndim == 2 else rotate_towards_symmetry(q - e @ q, probe)


@dataclass(frozen=True)
class Region:
    """Blocks of equal size that fill a rectangle of a matrix.

    Attributes:
        rows: First row, end, and rows of a block.
        cols: First column, end, and columns of a block.
    """

    rows: tuple[int, int, int]
    cols: tuple[int, int, int]

    @property
    def block(self) -> tuple[int, int]:
        """Sizes of a block."""
        return self.rows[2], self.cols[2]

    @property
    def grid(self) -> tuple[int, int]:
        """Numbers of blocks in a column and in a row of the grid."""
        return (self.rows[1] - self.rows[0]) // self.rows[2], (self.cols[1] - self.cols[0]) // self.cols[2]

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return math.prod(self.grid)

    def cut(self, x: Tensor) -> Tensor:
        """The blocks (N, d, e) of the whole ``x`` (m, n), row by row of the grid."""
        return self._tiles(x).transpose(1, 2).reshape(-1, *self.block)

    def paste_(self, x: Tensor, blocks: Tensor) -> None:
        """Put ``blocks`` (N, d, e) back into ``x`` (m, n)."""
        self._tiles(x).copy_(blocks.unflatten(0, self.grid).transpose(1, 2))

    def _tiles(self, x: Tensor) -> Tensor:
        """A view (grid rows, d, grid columns, e)."""
        (rows, cols), (d, e) = self.grid, self.block
        x = x[self.rows[0] : self.rows[1], self.cols[0] : self.cols[1]]
        tiles: Tensor = x.unflatten(-1, [cols, e]).unflatten(0, [rows, d])
        return tiles


def spans(size: int, block: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, block) of the part of ``size`` that whole blocks fill, and of the rest."""
    full = size - size % block if size else 0
    if full:
        yield 0, full, block
    if full < size:
        yield full, size, size - full


def precondition(ql: Tensor, qr: Tensor, x: Tensor) -> Tensor:
    """``QlᵀQl · X · QrᵀQr`` of each block of ``x`` (N, d, e)."""

    def half(q: Tensor, x: Tensor) -> Tensor:
        return q.square().unsqueeze(-1) * x if q.ndim == 2 else q.mT @ (q @ x)

    return half(qr, half(ql, x).mT).mT


def excess(x: Tensor, bound: Tensor, probe: Tensor, *, diagonal: bool) -> Tensor:
    """``(T - c) / L``: how far the rows of preconditioned blocks are from white, in units of a bound on the largest seen.

    T = X·Xᵀ; c, its mean for white X, is the length of a row; ℓ = ‖T‖ + c; L ← max(0.95·L + 0.05·ℓ, ℓ).

    Args:
        x: Preconditioned blocks (N, d, e).
        bound: L, (N,); updated.
        probe: Standard normal numbers (N, 4, d).
        diagonal: Whether to keep only the diagonal of T.

    Returns:
        (N, d, d), or (N, d) for the diagonal.
    """
    c = x.shape[-1]
    t = x.square().sum(-1) if diagonal else x @ x.mT
    largest = (t.amax(-1) if diagonal else norm_lower_bound(t, probe)) + c
    bound.copy_(torch.maximum(bound.lerp(largest, 1 - BETA_LIPSCHITZ), largest))
    if diagonal:
        return (t - c) / bound[:, None]
    t.diagonal(dim1=-2, dim2=-1).sub_(c)
    return t / bound[:, None, None]


def balance_(ql: Tensor, qr: Tensor) -> None:
    """Scale each pair of factors so that their largest entries are equal in size; their product stays."""
    left, right = (q.abs().flatten(1).amax(1) for q in (ql, qr))
    ratio = (right / left).sqrt()
    ql.mul_(ratio.view(-1, *[1] * (ql.ndim - 1)))
    qr.div_(ratio.view(-1, *[1] * (qr.ndim - 1)))


def factor_lr(preconditioner_lr: float, t: int) -> float:
    """Step size of the factors at step ``t``, counted from 1."""
    return max(preconditioner_lr / math.sqrt(1 + t / 1e4), min(preconditioner_lr, LEAST_LR))
