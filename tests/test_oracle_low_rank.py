"""APOLLO against its formulas in numpy, whose only input from here is the randomness."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.optimizer_config import OptimizerConfig
from core.optimizer.rules.apollo import Apollo, ApolloMini
from core.optimizer.rules.parts.projectors import draw, orthonormal
from core.philox import Key
from core.sharding.layout import Layout

SHAPES = ((5, 12), (12, 5), (6, 6))
STEPS = 12
LR = 0.03

Array = np.ndarray[Any, np.dtype[np.float64]]


def gradients(shape: tuple[int, int]) -> list[Array]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal(shape) * np.linspace(1, 2, shape[1]) for _ in range(STEPS)]


def train(shape: tuple[int, int], grads: list[Array], **kwargs: Any) -> tuple[Array, Array, Apollo]:
    """The weights before and after, and the optimizer."""
    start = np.random.default_rng(0).standard_normal(shape)
    p = torch.nn.Parameter(torch.tensor(start))
    optimizer = Apollo([("w", p)], lr=LR, **kwargs)
    for g in grads:
        p.grad = torch.tensor(g)
        optimizer.step()
    return start, p.detach().numpy(), optimizer


def apollo(w: Array, grads: list[Array], projections: list[Array], group: dict[str, Any]) -> Array:
    """Zhu et al. 2024, algorithm 1, with Chen et al. 2024's limiter; ``projections`` (d, rank), one a step."""
    wide = w.shape[0] < w.shape[1]
    (b1, b2), decay, root = group["betas"], group["lr"] * group["weight_decay"], math.sqrt(group["scale"])
    m: Array | float = 0.0
    v: Array | float = 0.0
    last = None
    for t, (g, p) in enumerate(zip(grads, projections, strict=True), 1):
        if not group["decay_after"]:
            w = w - decay * w
        r = p.T @ g if wide else g @ p
        channel = 0 if wide else 1
        m, v = b1 * m + (1 - b1) * r, b2 * v + (1 - b2) * r * r
        normed = m / (np.sqrt(v) + group["eps"])
        over = None if group["mini"] else channel
        factor = np.linalg.norm(normed, axis=over, keepdims=True) / (np.linalg.norm(r, axis=over, keepdims=True) + 1e-8)
        u = g * factor * (root if group["scale_front"] else 1.0)
        norm = np.linalg.norm(u)
        if last is not None and norm > 1.01 * (last + 1e-8):
            u *= 1.01 * (last + 1e-8) / norm
        last = np.linalg.norm(u)
        u *= 1.0 if group["scale_front"] else root
        w = w - group["lr"] * math.sqrt(1 - b2**t) / (1 - b1**t) * u
        if group["decay_after"]:
            w = w - decay * w
    return w


def close(got: Array, expected: Array) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("projector", ["normal", "orthogonal"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"mini": True, "scale": 128.0},
        {"scale": 4.0, "scale_front": True, "weight_decay": 0.1},
        {"weight_decay": 0.1, "decay_after": True, "lazy": False},
    ],
    ids=["plain", "mini", "front", "after"],
)
def test_apollo_is_the_paper_s(shape, projector, kwargs) -> None:
    grads = gradients(shape)
    start, got, optimizer = train(shape, grads, rank=3, update_steps=5, projector=projector, **kwargs)
    (group,) = optimizer.param_groups
    where, like = Layout.whole((min(shape), 3)), torch.empty(0, dtype=torch.float64)
    draws = [draw(where, projector, group["seed"], "w", t // 5, like) for t in range(STEPS)]
    close(got, apollo(start, grads, [p.numpy() for p in draws], group))


def test_random_projections_are_what_they_say() -> None:
    where, like = Layout.whole((400, 50)), torch.empty(0, dtype=torch.float64)
    p = draw(where, "normal", 0, "w", 0, like)
    assert p.shape == (400, 50)
    assert abs(p.var() - 1 / 50) < 5 * (1 / 50) * (2 / p.numel()) ** 0.5
    assert not torch.equal(p, draw(where, "normal", 0, "w", 1, like))
    q = draw(where, "orthogonal", 0, "w", 0, like)
    torch.testing.assert_close(q.T @ q, torch.eye(50, dtype=torch.float64) * 400 / 50, rtol=1e-12, atol=1e-12)


def pca(a: Array, x: Array, max_steps: int, orthonormalize: str) -> Array:
    """Gradient descent on mean((A Aᵀ X - X)²), Aᵀ X held fixed, until it gains less than 1e-4 of the variance."""
    var = x.var(ddof=1)
    losses: list[float] = []
    for _ in range(max_steps):
        down = a.T @ x
        error = a @ down - x
        losses.append((error**2).mean())
        a = a - 2 / x.size * error @ down.T / (var + 1e-6)
        if orthonormalize == "qr":
            q, r = np.linalg.qr(a)
            a = q * np.sign(np.diagonal(r))
        elif orthonormalize == "norm":
            a = a / np.linalg.norm(a, axis=0)
        if any(-1e-4 * var <= new - old <= 0 for old, new in pairwise(losses[-2:])):
            break
    return a


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", ["qr", "norm", "none"])
def test_online_pca_follows_the_gradient(shape, how) -> None:
    grads = gradients(shape)
    start, got, optimizer = train(shape, grads, rank=2, update_steps=3, projector="online_pca", pca_orthonormalize=how)
    wide = shape[0] < shape[1]
    where, like = Layout.whole((min(shape), 2)), torch.empty(0, dtype=torch.float64)
    a = orthonormal(Key(0, "w", 0, "projection"), where, like).numpy()
    projections = []
    for t, g in enumerate(grads):
        if t % 3 == 0:
            a = pca(a, g if wide else g.T, 100 if t == 0 else 1, how)
        projections.append(a * math.sqrt(min(shape) / 2))
    close(optimizer.state[optimizer.param_groups[0]["params"][0]]["projection"].numpy(), a)
    close(got, apollo(start, grads, projections, optimizer.param_groups[0]))


def test_the_first_fit_finds_the_principal_directions() -> None:
    g = gradients((5, 12))[0]
    *_, optimizer = train((5, 12), [g], rank=2, projector="online_pca")
    a = optimizer.state[optimizer.param_groups[0]["params"][0]]["projection"].numpy()
    left = np.linalg.svd(g)[0][:, :2]
    kept = np.linalg.norm(a.T @ g) ** 2 / np.linalg.norm(left.T @ g) ** 2
    assert kept > 0.97


@pytest.mark.parametrize("projector", ["normal", "orthogonal", "online_pca"])
def test_zero_gradients_change_nothing_and_do_not_freeze_what_follows(projector) -> None:
    zero = np.zeros((5, 12))
    start, got, _ = train((5, 12), [zero] * 3, projector=projector)
    assert np.array_equal(start, got)
    grads = gradients((5, 12))
    start, got, _ = train((5, 12), [zero, *grads, zero], projector=projector)
    assert np.isfinite(got).all() and np.abs(got - start).max() > LR


def test_state_is_low_rank_and_random_projections_are_not_kept() -> None:
    *_, optimizer = train((12, 5), gradients((12, 5)), rank=2)
    (state,) = optimizer.state.values()
    assert {name: tuple(x.shape) for name, x in state.items()} == {
        "step": (),
        "exp_avg": (2, 12),
        "exp_avg_sq": (2, 12),
        "update_norm": (),
    }


def test_mini_is_rank_one_with_one_factor() -> None:
    optimizer = Apollo.mini([torch.nn.Parameter(torch.ones(4, 3))])
    assert isinstance(optimizer, ApolloMini)
    (group,) = optimizer.param_groups
    assert (group["rank"], group["mini"], group["scale"]) == (1, True, 128.0)


def test_a_rank_above_the_shorter_side_is_refused_by_name() -> None:
    small, large = torch.nn.Parameter(torch.ones(4, 3)), torch.nn.Parameter(torch.ones(8, 8))
    with pytest.raises(ValueError, match=r"layer\.w: rank=4 must be from 1 to 3"):
        Apollo([("layer.w", small)], rank=4)
    optimizer = Apollo([large], rank=4)
    with pytest.raises(ValueError, match="rank=9 must be from 1 to 8"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(8, 8))], "rank": 9})
    assert len(optimizer.param_groups) == 1


def test_vectors_are_refused_by_name_and_routed_by_the_registry() -> None:
    with pytest.raises(ValueError, match=r"bias: Apollo works on matrices, but this parameter has shape \(4,\)"):
        Apollo([("bias", torch.nn.Parameter(torch.ones(4)))])
    model = torch.nn.Linear(4, 4)
    chained = get_optimizer(OptimizerConfig(optimizer="apollo", lr=0.1), [model])
    assert {type(member).__name__ for member in chained.members.values()} == {"Apollo", "AdamW"}
