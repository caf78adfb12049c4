"""Muon and its adaptive variants as rules: momentum, orthogonalization of the whole matrix, second moment, scale.

A rule does not know how the shards of a matrix are combined: :class:`How` gives it a function that orthogonalizes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ...cache_blocks import row_blocks
from ...sharding.layout import Layout
from ...sharding.requests import Rule
from ...sharding.state import StateSpec
from ...sharding.tp_modes import Deferred

Group = Mapping[str, Any]
Scale = Callable[[int, int], float]
Moment2 = Literal["adamuon", "normuon", "namo"]


@dataclass(frozen=True)
class How:
    """Arguments of the rules in this file besides the parameter group.

    Attributes:
        orthogonalize: ``orthogonalize(u, layout, scale)``, a rule that returns the shards of ``scale(m, n) · NS(U)`` for each
            whole (m, n) matrix U, or part of a fused one, with shards ``u`` (B, *shard); None as ``scale`` means 1.
        scale: ``scale(m, n)``, the factor of the update for a whole (m, n) matrix.
        nesterov: Whether to look one step ahead.
        l2: Whether the group's weight decay is added to the gradient.
    """

    orthogonalize: Callable[[Tensor | Deferred, Layout, Scale | None], Rule]
    scale: Scale
    nesterov: bool
    l2: bool


def muon(p: Tensor, g: Tensor, s: Any, lay: Layout, group: Group, *, how: How) -> Rule:
    """Muon's update of stacks (B, *shard), ``scale(m, n) · NS(U)``; updates the momentum ``s.momentum_buffer``.

    Source: https://kellerjordan.github.io/posts/muon/
    """
    u = direction(p, g, s, group, how)
    return (yield how.orthogonalize(u, lay, how.scale))


def direction(p: Tensor, g: Tensor, s: Any, group: Group, how: How) -> Deferred:
    """The direction U that Muon orthogonalizes, and the update of the momentum M.

    Both are computed when U is written: while a wave is packed, directly into the buffer that is sent to the owner.
    """
    mu, decay = group["momentum"], group["weight_decay"] if how.l2 else 0

    def write(out: Tensor) -> None:
        for u, m, grad, weight in row_blocks(out, s.momentum_buffer, g, p):
            grad = grad.to(m.dtype).add(weight, alpha=decay) if decay else grad.to(m.dtype)
            m.lerp_(grad, 1 - mu)  # M ← μM + (1-μ)G
            u.copy_(grad.lerp(m, mu) if how.nesterov else m)  # U = (1-μ)G + μM, or M without Nesterov

    return Deferred(tuple(g.shape), s.momentum_buffer.dtype, g.device, write)


def adaptive_muon(
    p: Tensor, g: Tensor, s: Any, lay: Layout, group: Group, *, how: How, method: Moment2, align_rms: bool = False
) -> Rule:
    """Muon's update with a second moment of NS(U); the scale comes last. Updates ``s.momentum_buffer``, ``s.moment2_buffer``."""
    u: Tensor | Deferred = direction(p, g, s, group, how)
    dtype, v, rates = u.dtype, s.moment2_buffer, {"beta2": group["beta2"], "eps": group["eps"]}
    if method == "namo":
        u = u.form() if isinstance(u, Deferred) else u
        # The sums are formed now, while gradient and direction exist, and sent later, so as not to delay the matrices.
        norms = lay.norm(g.to(dtype)), lay.norm(u)
    o = (yield how.orthogonalize(u, lay, None)).to(dtype)
    del u
    if method == "namo":
        o = namo(o, v, *(yield norms), **rates)
    elif method == "normuon":
        o = yield normuon(o, v, lay, **rates)
    else:
        o = yield adamuon(o, v, lay, **rates, align_rms=align_rms)
    return o * lay.per_part(how.scale, o)


def moment2_spec(method: Moment2, lay: Layout) -> StateSpec:
    """State of the second moment of a parameter laid out as ``lay``."""
    if method == "adamuon":
        return StateSpec("*")
    if method == "namo":
        return StateSpec("1")
    return StateSpec("i1" if averaged_dim(lay) == -1 else "1j")


def averaged_dim(lay: Layout) -> int:
    """The dim that NorMuon averages over, which leaves one number for each index of the whole matrix's longer side."""
    return -1 if lay.shape[-2] >= lay.shape[-1] else -2


def adamuon(o: Tensor, v: Tensor, lay: Layout, *, beta2: float, eps: float, align_rms: bool = False) -> Rule:
    """Elementwise second moment of the orthogonalized direction ``o``; updates ``v``.

    With ``align_rms`` the result is scaled to the Frobenius norm of ``o``; without, its entries are near 1.

    Source: https://arxiv.org/abs/2507.11005, which scales to a constant instead.
    """
    v.lerp_(o.square(), 1 - beta2)
    adapted = o / (v.sqrt() + eps)
    if not align_rms:
        return adapted
    before, after = yield lay.norm(o), lay.norm(adapted)
    return adapted * (before / after.clamp_min(eps))


def normuon(o: Tensor, v: Tensor, lay: Layout, *, beta2: float, eps: float) -> Rule:
    """Divide ``o`` by the root of a second moment per row or column and restore its Frobenius norm; updates ``v``.

    Source: https://arxiv.org/abs/2510.05491, algorithm 1; the norm is kept as in emerging-optimizers.
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
    """Scale ``o`` by one number per matrix, ‖U‖ / (√(mean ‖G‖²) + eps); norms are (B, 1, 1); updates ``v`` (B, 1).

    Source: https://arxiv.org/abs/2602.17080
    """
    v.lerp_(gradient_norm.square().flatten(1), 1 - beta2)
    return o * (direction_norm.flatten(1) / (v.sqrt() + eps)).unsqueeze(-1)
