"""Optax's Muon against its definition, in plain numpy."""

import numpy as np
import pytest
import torch

from core.optimizer.rules.muon_optax import OptaxMuon


def orthogonalized(u, eps):
    """optax.contrib's orthogonalize_via_newton_schulz, of inputs x outputs."""
    transposed = u.shape[0] > u.shape[1]
    x = u.T if transposed else u
    x = x / (np.linalg.norm(x) + eps)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if transposed else x


def optax_muon(w, grads, *, lr, beta=0.95, eps=1e-8, wd, nesterov, adaptive):
    mu = np.zeros_like(w)
    for t, g in enumerate(grads, 1):
        mu = beta * mu + (1 - beta) * g
        u = beta * mu / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t) if nesterov else mu / (1 - beta**t)
        o = orthogonalized(u, eps)
        if adaptive:
            o = o * np.sum(u * o)
        w = w - lr * (np.sqrt(max(1, w.shape[1] / w.shape[0])) * o + wd * w)
    return w


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_optax(shape, nesterov, adaptive):
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=shape), rng.normal(size=(12, *shape))
    p = torch.nn.Parameter(torch.tensor(start))
    optimizer = OptaxMuon([p], lr=0.02, weight_decay=0.1, nesterov=nesterov, adaptive=adaptive)
    for g in grads:
        p.grad = torch.tensor(g)
        optimizer.step()
    # Optax's weights are inputs x outputs.
    flipped = [g.T for g in grads]
    expected = optax_muon(start.T, flipped, lr=0.02, wd=0.1, nesterov=nesterov, adaptive=adaptive).T
    np.testing.assert_allclose(p.detach().numpy(), expected, rtol=0, atol=1e-12)
