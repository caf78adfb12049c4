"""Optax's Muon against its definition, in plain numpy."""

import numpy as np
import pytest
import torch

from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.optimizer_config import OptimizerConfig
from core.optimizer.rules.adaptive_muon import TensorParallelAdaptiveMuon
from core.optimizer.rules.muon_optax import OptaxMuon
from core.optimizer.rules.tensor_parallel_muon import TensorParallelMuon

SIMPLE = [(3.4445, -4.7750, 2.0315)] * 5
FIVE = [(3.9, -6.0, 2.8), (3.4, -4.8, 2.1), (3.0, -4.0, 1.6), (2.5, -3.0, 1.1), (1.9, -1.3, 0.4)]


def orthogonalized(u, eps, coefs=SIMPLE):
    """optax.contrib's orthogonalize_via_newton_schulz, of inputs x outputs."""
    transposed = u.shape[0] > u.shape[1]
    x = u.T if transposed else u
    x = x / (np.linalg.norm(x) + eps)
    for first, third, fifth in coefs:
        a = x @ x.T
        x = first * x + (third * a + fifth * a @ a) @ x
    return x.T if transposed else x


def optax_muon(w, grads, *, lr, beta=0.95, eps=1e-8, wd, nesterov, adaptive, coefs=SIMPLE, stored=lambda mu: mu):
    kept = np.zeros_like(w)
    for t, g in enumerate(grads, 1):
        mu = beta * kept + (1 - beta) * g
        kept = stored(mu)
        u = beta * mu / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t) if nesterov else mu / (1 - beta**t)
        o = orthogonalized(u, eps, coefs)
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


def optax_adamw(w, grads, *, lr, b1, b2, eps, wd, nesterov):
    """optax.adamw, which optax.contrib.muon gives everything that is not 2-D, with its own nesterov."""
    m = v = np.zeros_like(w)
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        ahead = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        mean = ahead if nesterov else m / (1 - b1**t)
        w = w - lr * (mean / (np.sqrt(v / (1 - b2**t)) + eps) + wd * w)
    return w


def trained(optimizer, p, grads):
    for g in grads:
        p.grad = torch.tensor(g, dtype=p.dtype)
        optimizer.step()
    return p.detach().double().numpy()


@pytest.mark.parametrize("nesterov", [None, True, False])
def test_vectors_are_stepped_as_optax_steps_them(nesterov):
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=13), rng.normal(size=(12, 13))
    model = torch.nn.Module()
    model.gain = torch.nn.Parameter(torch.tensor(start))
    model.weight = torch.nn.Parameter(torch.ones(3, 2))
    settings = {} if nesterov is None else {"muon_optax_nesterov": nesterov}
    config = OptimizerConfig(optimizer="muon_optax", lr=0.02, weight_decay=0.1, adam_beta2=0.99, **settings)
    optimizer = get_optimizer(config, model, weight_decay_mask="gain")
    got = trained(optimizer, model.gain, grads)
    common = {"lr": 0.02, "b1": 0.9, "b2": 0.99, "eps": 1e-8, "wd": 0.1}
    expected = optax_adamw(start, grads, **common, nesterov=nesterov is not False)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_the_adam_of_other_optimizers_does_not_look_ahead():
    model = torch.nn.Linear(3, 2)
    for name in ("muon", "adamw"):
        members = get_optimizer(OptimizerConfig(optimizer=name, lr=0.1), model).members
        assert not members["adamw"].param_groups[0]["nesterov"]


def test_momentum_may_be_stored_in_bfloat16_as_in_optax():
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=(12, 40)), rng.normal(size=(6, 12, 40))
    p = torch.nn.Parameter(torch.tensor(start))
    optimizer = OptaxMuon([p], lr=0.02, mu_dtype="bfloat16")
    got = trained(optimizer, p, grads)
    assert optimizer.state[p]["momentum_buffer"].dtype == torch.bfloat16
    expected = optax_muon(
        start.T,
        [g.T for g in grads],
        lr=0.02,
        wd=0.0,
        nesterov=True,
        adaptive=False,
        stored=lambda mu: torch.tensor(mu).bfloat16().double().numpy(),
    ).T
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="mu_dtype='float16' is unknown; possible: float32, bfloat16"):
        OptaxMuon([p], mu_dtype="float16")


@pytest.mark.parametrize("cls", [TensorParallelMuon, TensorParallelAdaptiveMuon, OptaxMuon])
@pytest.mark.parametrize(
    ("given", "coefs"),
    [((2.0, -1.5, 0.5), [(2.0, -1.5, 0.5)] * 5), (FIVE, FIVE), ([x for triple in FIVE for x in triple], FIVE)],
    ids=["three numbers", "a list of them", "one list"],
)
def test_every_muon_takes_coefficients_of_one_s_own(cls, given, coefs):
    p = torch.nn.Parameter(torch.zeros(12, 40, dtype=torch.float64))
    settings = {"eps": 0.0} if cls is OptaxMuon else {"scale_mode": "shape_scaling"}
    g = np.random.default_rng(0).normal(size=(12, 40))
    if cls is TensorParallelAdaptiveMuon:
        # Each entry of the direction is divided by its own size.
        settings |= {"moment2_method": "adamuon", "beta2": 0.0, "eps": 0.0}
    optimizer = cls([p], lr=1.0, coefficient_type="custom", ns_coeffs=given, fp32_matmul_prec="highest", **settings)
    got = trained(optimizer, p, [g])
    direction = orthogonalized(g.T, 0.0, coefs).T
    if cls is TensorParallelAdaptiveMuon:
        direction = np.sign(direction)
    np.testing.assert_allclose(got, -direction, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cls", [TensorParallelMuon, TensorParallelAdaptiveMuon, OptaxMuon])
@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"coefficient_type": "custom"}, "'custom' needs its numbers: give ns_coeffs="),
        ({"coefficient_type": "quintic", "ns_coeffs": (1.0, 2.0, 3.0)}, "'quintic' has coefficients of its own"),
        ({"ns_coeffs": (1.0, 2.0, 3.0)}, "give coefficient_type='custom' with ns_coeffs"),
        ({"coefficient_type": "custom", "ns_coeffs": (1.0, 2.0)}, "three finite numbers, or three for each of the 5"),
        ({"coefficient_type": "custom", "ns_coeffs": FIVE[:2]}, "three for each of the 5 iterations"),
        ({"coefficient_type": "custom", "ns_coeffs": (1.0, float("nan"), 0.0)}, "three finite numbers"),
        ({"coefficient_type": "custom", "ns_coeffs": [(1.0, 2.0)] * 5}, r"the entry \(1.0, 2.0\); each list"),
    ],
)
def test_coefficients_that_do_not_fit_are_refused(cls, kwargs, said):
    with pytest.raises(ValueError, match=said):
        cls([torch.nn.Parameter(torch.ones(4, 3))], **kwargs)


def test_coefficients_come_from_a_config():
    config = OptimizerConfig(
        optimizer="muon", lr=0.1, muon_coefficient_type="custom", muon_ns_coeffs=[2.0, -1.5, 0.5], muon_num_ns_steps=1
    )
    member = get_optimizer(config, torch.nn.Linear(3, 2)).members["muon"]
    assert member.ns_coeffs == (2.0, -1.5, 0.5)
