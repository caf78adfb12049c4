"""Muon and its adaptive variants as rules: momentum, orthogonalization of the whole matrix, second moment."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from ...linalg.matmul_precision import compute_dtype
from ...linalg.newton_schulz import flops
from ...sharding.layout import Layout, Mode
from ...sharding.requests import Rule
from ...sharding.state import StateSpec
from ...sharding.tp_modes import Deferred, MatrixRule, on_matrix
from ..steps.cache_blocks import row_blocks

Group = Mapping[str, Any]
Scale = Callable[[int, int], float]
Moment2 = Literal["adamuon", "normuon", "namo"]


def momentum(g: Tensor, buffer: Tensor, *, mu: float, nesterov: bool) -> Tensor:
    """The direction U of M ← μM + (1-μ)G: M, or (1-μ)G + μM with Nesterov. Updates ``buffer``."""
    buffer.lerp_(g, 1 - mu)
    return g.lerp(buffer, mu) if nesterov else buffer


def write_momentum(out: Tensor, g: Tensor, buffer: Tensor, *, mu: float, nesterov: bool) -> None:
    """:func:`momentum` written into ``out``, in its dtype, block by block where a block fits the cache."""
    for o, b, h in row_blocks(out, buffer, g):
        o.copy_(momentum(h.to(b.dtype), b, mu=mu, nesterov=nesterov))


def orthogonal(u: Tensor | Deferred, lay: Layout, fn: MatrixRule, *, mode: Mode, precision: str) -> Rule:
    """``fn`` of the whole matrix of each momentum shard in ``u`` (B, m, n), in the arithmetic of ``precision``."""
    # Cast before the shards travel: half the bytes, and the owner sees what an unsharded run would see.
    dtype = compute_dtype(u.dtype, precision)
    x = u.to(dtype) if isinstance(u, Tensor) else replace(u, dtype=dtype)
    return (yield on_matrix(fn, x, lay, mode, flops))


def moment2_spec(method: Moment2, lay: Layout) -> StateSpec:
    """State of the second moment of a parameter laid out as ``lay``."""
    if method == "adamuon":
        return StateSpec("*")
    if method == "namo":
        return StateSpec("1")
    return StateSpec("i1" if averaged_dim(lay) == -1 else "1j")


def averaged_dim(lay: Layout) -> int:
    """The dim that NorMuon averages over: it keeps one number for each index of the longer side of the whole matrix."""
    return -1 if lay.shape[-2] >= lay.shape[-1] else -2


def adamuon(o: Tensor, v: Tensor, lay: Layout, *, beta2: float, eps: float, align_rms: bool = False) -> Rule:
    """Elementwise second moment of the orthogonalized direction ``o``; updates ``v``.

    With ``align_rms`` the result is brought back to the Frobenius norm of ``o``; without, its entries are near 1.

    Source: arXiv 2507.11005, whose alignment is to a constant instead.
    """
    v.lerp_(o.square(), 1 - beta2)
    adapted = o / (v.sqrt() + eps)
    if not align_rms:
        return adapted
    before, after = yield lay.norm(o), lay.norm(adapted)
    return adapted * (before / after.clamp_min(eps))


def normuon(o: Tensor, v: Tensor, lay: Layout, *, beta2: float, eps: float) -> Rule:
    """Second moment per row or column of the whole matrix, then back to the norm of ``o``; updates ``v``.

    Source: arXiv 2510.05491, algorithm 1; the norm is kept as in emerging-optimizers.
    """
    dim = averaged_dim(lay)
    square = yield lay.mean(o.square(), dim)
    v.lerp_(square, 1 - beta2)
    r = v.clamp_min(eps).rsqrt()
    # Both Frobenius norms follow from the mean squares, so the matrix need not be reduced a second time.
    before, after = yield lay.sum(square, -3 - dim), lay.sum(square * r.square(), -3 - dim)
    count = lay.shape[dim]
    return o * r * ((before * count).sqrt() / (after * count).sqrt().clamp_min(eps))


def namo(o: Tensor, v: Tensor, gradient_norm: Tensor, direction_norm: Tensor, *, beta2: float, eps: float) -> Tensor:
    """One number per matrix, ‖U‖ / (sqrt(mean ‖G‖²) + eps); norms are (B, 1, 1); updates ``v`` (B, 1).

    Source: arXiv 2602.17080.
    """
    v.lerp_(gradient_norm.square().flatten(1), 1 - beta2)
    return o * (direction_norm.flatten(1) / (v.sqrt() + eps)).unsqueeze(-1)
