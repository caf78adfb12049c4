"""Projections of a matrix's shorter side onto ``rank`` directions, for optimizers with low-rank state.

A matrix here is ``x`` (B, d, k): d is the shorter side of the whole matrix, the one that is projected, k the one that is
kept. A projection is (B, d, rank), cut like d.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ....philox import Key, normal
from ....sharding.layout import Layout
from ....sharding.requests import Rule
from ....sharding.state import StateSpec

Projector = Literal["normal", "orthogonal", "online_pca"]
RandomKind = Literal["normal", "orthogonal"]
Orthonormalize = Literal["none", "qr", "norm"]

FIRST_FIT = 100
"""Largest number of gradient steps in the first fit; later fits take one step."""


@dataclass(frozen=True)
class Sides:
    """The projected and the kept dim of the whole matrix, counted from the end."""

    projected: int
    kept: int

    @classmethod
    def of(cls, lay: Layout) -> "Sides":
        """Sides for a matrix of layout ``lay``: the shorter dim is projected, or dim -1 of a square matrix."""
        return cls(-2, -1) if lay.shape[-2] < lay.shape[-1] else cls(-1, -2)

    def turned(self, x: Tensor) -> Tensor:
        """``x`` transposed from (B, rows, cols) to (B, d, k), or back."""
        return x if self.projected == -2 else x.mT

    def letter(self, dim: int) -> str:
        """The letter of ``dim`` in a :class:`StateSpec`."""
        return {-2: "i", -1: "j"}[dim]


def projection_specs(group: Mapping[str, Any], lay: Layout) -> dict[str, StateSpec]:
    """The state ``projection`` (d, rank) of online PCA; no state for random projections, which can be drawn again."""
    sides = Sides.of(lay)
    letters = sides.letter(sides.projected) + "r"
    return {"projection": StateSpec(letters, rank=group["rank"])} if group["projector"] == "online_pca" else {}


Drawn = dict[str, tuple[tuple[Any, ...], Tensor]]
"""Random projections that are kept until the next one is due, by parameter name; no state, so never saved."""


def projection(x: Tensor, s: Any, lay: Layout, group: Mapping[str, Any], drawn: Drawn) -> Rule:
    """The projections for step ``s.step``, scaled to keep the size of random vectors: (B, d, rank) in the dtype of ``x``.

    ``normal``: independent entries of variance 1/rank. ``orthogonal``: random orthonormal columns times √(d/rank). Both are
    drawn anew every ``update_steps`` steps from (seed, name, number of the draw). ``online_pca``: orthonormal at first, then
    fitted to the gradient every ``update_steps`` steps, times √(d/rank); updates ``s.projection``.
    """
    steps = [int(t) for t in s.step]
    if group["projector"] == "online_pca":
        due = [i for i, t in enumerate(steps) if (t - 1) % group["update_steps"] == 0]
        yield [_refit(i, x, s, lay, group, first=steps[i] == 1) for i in due]
        return s.projection * _scale(lay, group)
    made = []
    for name, t in zip(s.names, steps, strict=True):
        number = (t - 1) // group["update_steps"]
        what = (number, x.dtype, x.device, *(group[k] for k in ("seed", "projector", "rank")))
        if drawn.get(name, (None,))[0] != what:
            drawn[name] = what, draw(_layout(lay, group["rank"]), group["projector"], group["seed"], name, number, x)
        made.append(drawn[name][1])
        if group["lazy"]:
            del drawn[name]
    return torch.stack(made)


def draw(where: Layout, how: RandomKind, seed: int, name: str, number: int, like: Tensor) -> Tensor:
    """The random projection ``number`` of the parameter ``name``, laid out as ``where``, (d, rank); see :func:`projection`."""
    key, (d, rank) = Key(seed, name, number, "projection"), where.shape
    if how == "normal":
        return normal(key, where, dtype=like.dtype, device=like.device) / math.sqrt(rank)
    return orthonormal(key, where, like) * math.sqrt(d / rank)


def orthonormal(key: Key, where: Layout, like: Tensor) -> Tensor:
    """Random orthonormal columns, laid out as ``where``, (d, rank): every rank draws the whole and keeps its rows."""
    q, r = torch.linalg.qr(normal(key, where.shape, dtype=torch.float64, device=like.device))
    q = (q * r.diagonal().sign()).to(like.dtype)
    split = where.splits[0]
    return q if split is None else torch.cat([q[:0], *(q[lo:hi] for lo, hi in split.held[split.axis.index])])


def _refit(i: int, x: Tensor, s: Any, lay: Layout, group: Mapping[str, Any], *, first: bool) -> Rule:
    x, a = x[i : i + 1], s.projection[i : i + 1]
    if first:
        a.copy_(orthonormal(Key(group["seed"], s.names[i], 0, "projection"), _layout(lay, group["rank"]), a))
    yield fit(a, x, lay, FIRST_FIT if first else 1, group["pca_orthonormalize"])


def fit(a: Tensor, x: Tensor, lay: Layout, max_steps: int, orthonormalize: Orthonormalize) -> Rule:
    """Gradient steps on ``mean((A Aᵀ X - X)²)``, with Aᵀ X held fixed, at the rate 1/(var(X) + 1e-6); mutates ``a``.

    Args:
        a: A, (1, d, rank).
        x: X, (1, d, k).
        lay: Layout of the matrix.
        max_steps: Largest number of steps; they end earlier when one lowers the mean by no more than 1e-4·var(X).
        orthonormalize: Change of A after each step: ``qr``, by Cholesky of AᵀA; ``norm``, of the columns; or ``none``.
    """
    sides, size = Sides.of(lay), math.prod(lay.shape)
    mean = yield lay.mean(x)
    var = (yield lay.sum((x - mean).square())) / max(1, size - 1)
    previous = None
    for _ in range(max_steps):
        down = yield lay.across(a.mT @ x, sides.projected)
        error = a @ down - x
        slope, loss = yield lay.across((2 / size) * error @ down.mT, sides.kept), lay.mean(error.square())
        a.sub_(slope / (var + 1e-6))
        yield _orthonormalize(a, lay, sides, orthonormalize)
        if not loss.isfinite() or (previous is not None and -1e-4 * var <= loss - previous <= 0):
            break
        previous = loss


def _orthonormalize(a: Tensor, lay: Layout, sides: Sides, how: Orthonormalize) -> Rule:
    if how == "norm":
        a.div_((yield lay.across(a.square().sum(-2, keepdim=True), sides.projected)).sqrt())
    if how == "qr":
        # The slope is orthogonal to A's columns, so AᵀA is at least the identity and forming it costs no accuracy.
        gram = yield lay.across(a.double().mT @ a.double(), sides.projected)
        r = torch.linalg.cholesky_ex(gram).L.mT
        a.copy_(torch.linalg.solve_triangular(r, a.double(), upper=True, left=False))


def _layout(lay: Layout, rank: int) -> Layout:
    dim = Sides.of(lay).projected
    return Layout((lay.shape[dim], rank), (lay.splits[dim], None))


def _scale(lay: Layout, group: Mapping[str, Any]) -> float:
    return math.sqrt(lay.shape[Sides.of(lay).projected] / group["rank"])
