"""Elementwise optimizers against torch, pytorch_optimizer, schedulefree, and formulas read from the papers, in float64."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import pytorch_optimizer
import schedulefree
import torch
from torch import Tensor

from core.optimizer.rules.adam import Adam, AdamW, RAdam
from core.optimizer.rules.ademamix import AdEMAMix
from core.optimizer.rules.lion import Lion
from core.optimizer.rules.rmsprop import RMSprop
from core.optimizer.rules.schedule_free import ScheduleFreeAdamW, ScheduleFreeSGD
from core.optimizer.rules.sgd import SGD
from core.optimizer.rules.sophia import Sophia
from core.optimizer.steps import elementwise

STEPS = 12
LR = 0.03
SHAPES = ((4, 9), (9, 4), (7,), (2, 3, 3), ())


def draws(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def train(make: Callable[..., torch.optim.Optimizer], rates: list[float], **kwargs: Any) -> list[Tensor]:
    params = [torch.nn.Parameter(x) for x in draws(100)]
    optimizer = make(params, lr=rates[0], **kwargs)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        for p, g in zip(params, draws(step), strict=True):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in params]


CONSTANT = [LR] * STEPS
VARYING = [LR * math.cos(step / 9) for step in range(STEPS)]

PEERS: list[tuple[Any, dict[str, Any], Any, dict[str, Any]]] = [
    (SGD, {}, torch.optim.SGD, {}),
    (SGD, {"momentum": 0.9, "weight_decay": 0.1}, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    (SGD, {"momentum": 0.9, "nesterov": True}, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (SGD, {"momentum": 0.9, "dampening": 0.3}, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
    (SGD, {"momentum": 0.9, "dampening": 1.0}, torch.optim.SGD, {"momentum": 0.9, "dampening": 1.0}),
    (Adam, {"weight_decay": 0.1}, torch.optim.Adam, {"weight_decay": 0.1}),
    (Adam, {"mu_dtype": "float32", "eps": 1e-2}, torch.optim.Adam, {"eps": 1e-2}),
    (AdamW, {}, torch.optim.AdamW, {}),
    (AdamW, {"betas": (0.7, 0.8), "eps": 1e-2}, torch.optim.AdamW, {"betas": (0.7, 0.8), "eps": 1e-2}),
    (RAdam, {"weight_decay": 0.1}, torch.optim.RAdam, {"weight_decay": 0.1}),
    (RAdam, {"betas": (0.8, 0.7)}, torch.optim.RAdam, {"betas": (0.8, 0.7)}),  # never rectified
    (
        RAdam,
        {"eps": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True},
        torch.optim.RAdam,
        {"eps": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    (RMSprop, {"variant": "torch", "weight_decay": 0.1}, torch.optim.RMSprop, {"weight_decay": 0.1}),
    (
        RMSprop,
        {"variant": "torch", "momentum": 0.9, "decay": 0.8},
        torch.optim.RMSprop,
        {"momentum": 0.9, "alpha": 0.8},
    ),
    (Lion, {"weight_decay": 0.1}, pytorch_optimizer.Lion, {"weight_decay": 0.1}),
    (
        AdEMAMix,
        {"weight_decay": 0.1},
        pytorch_optimizer.AdEMAMix,
        {"weight_decay": 0.1, "weight_decouple": True},
    ),
    (
        ScheduleFreeAdamW,
        {"weight_decay": 0.1, "warmup_steps": 5, "r": 0.5},
        schedulefree.AdamWScheduleFree,
        {"weight_decay": 0.1, "warmup_steps": 5, "r": 0.5},
    ),
    (ScheduleFreeAdamW, {"betas": (0.6, 0.7)}, schedulefree.AdamWScheduleFree, {"betas": (0.6, 0.7)}),
    (
        ScheduleFreeSGD,
        {"weight_decay": 0.1, "warmup_steps": 5, "weight_lr_power": 1.0},
        schedulefree.SGDScheduleFree,
        {"weight_decay": 0.1, "warmup_steps": 5, "weight_lr_power": 1.0},
    ),
]


@pytest.mark.parametrize("rates", [CONSTANT, VARYING], ids=["constant", "varying"])
@pytest.mark.parametrize(("ours", "kwargs", "theirs", "their_kwargs"), PEERS)
def test_peers_take_the_same_steps(ours, kwargs, theirs, their_kwargs, rates):
    tolerance = 1e-5 if "mu_dtype" in kwargs else 1e-12  # a mean stored in float32
    for mine, other in zip(train(ours, rates, **kwargs), train(theirs, rates, **their_kwargs), strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


# Formulas: one parameter, yielding its value after every step.


def adam(p, gradients, rates, *, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, decay=0.01, correct=True):
    """Optax's: Kingma & Ba 2014, algorithm 1, with eps_root under the root."""
    m = v = 0.0
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        m_hat, v_hat = (m / (1 - b1**t), v / (1 - b2**t)) if correct else (m, v)
        p = p - lr * decay * p - lr * m_hat / (np.sqrt(v_hat + eps_root) + eps)
        yield p


def rmsprop(p, gradients, rates, *, decay=0.9, eps=1e-8, initial=0.0, momentum=0.0, nesterov=False, shrink=0.0):
    """Optax's: eps under the root, and a trace of what was multiplied by the learning rate."""
    v, trace = initial, 0.0
    for g, lr in zip(gradients, rates, strict=True):
        v = decay * v + (1 - decay) * g**2
        u = -lr * g / np.sqrt(v + eps)
        trace = u + momentum * trace
        p = p - lr * shrink * p + (u + momentum * trace if nesterov else trace)
        yield p


def ademamix(
    p, gradients, rates, *, b1=0.9, b2=0.999, b3=0.9999, alpha=5.0, eps=1e-8, decay=0.01, alpha_warmup=0, warmup=0
):
    """Pagliardini et al. 2024, algorithm 1; schedulers of the authors' code."""

    def half_life(beta):
        return math.log(0.5) / math.log(beta + 1e-8) - 1

    m1 = m2 = v = 0.0
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), 1):
        a = alpha * min(t / alpha_warmup, 1) if alpha_warmup else alpha
        b = b3
        if t < warmup:
            share = t / warmup
            b = 0.5 ** (1 / ((1 - share) * half_life(b1) + share * half_life(b3) + 1))
        m1, m2, v = b1 * m1 + (1 - b1) * g, b * m2 + (1 - b) * g, b2 * v + (1 - b2) * g**2
        p = p - lr * ((m1 / (1 - b1**t) + a * m2) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * p)
        yield p


def formula_steps(formula: Callable[..., Iterator[Any]], rates: list[float], **kwargs: Any) -> list[Tensor]:
    gradients = list(zip(*([g.numpy() for g in draws(step)] for step in range(STEPS)), strict=True))
    ends = [list(formula(p.numpy(), gs, rates, **kwargs))[-1] for p, gs in zip(draws(100), gradients, strict=True)]
    return [torch.as_tensor(end, dtype=torch.float64) for end in ends]


FORMULAS: list[tuple[Any, dict[str, Any], Any, dict[str, Any]]] = [
    (AdamW, {"eps_root": 1e-2}, adam, {"eps_root": 1e-2}),
    (AdamW, {"correct_bias": False, "eps": 1e-3}, adam, {"correct": False, "eps": 1e-3}),
    (AdamW, {"eps_root": 1e-3, "correct_bias": False}, adam, {"correct": False, "eps_root": 1e-3}),
    (RMSprop, {}, rmsprop, {}),
    (RMSprop, {"momentum": 0.9, "weight_decay": 0.1}, rmsprop, {"momentum": 0.9, "shrink": 0.1}),
    (
        RMSprop,
        {"momentum": 0.8, "nesterov": True, "initial_scale": 1.0, "decay": 0.7, "eps": 1e-3},
        rmsprop,
        {"momentum": 0.8, "nesterov": True, "initial": 1.0, "decay": 0.7, "eps": 1e-3},
    ),
    (AdEMAMix, {"alpha_warmup": 8}, ademamix, {"alpha_warmup": 8}),
    (AdEMAMix, {"beta3_warmup": 20}, ademamix, {"warmup": 20}),
    (
        AdEMAMix,
        {"alpha_warmup": 5, "beta3_warmup": 7, "alpha": 8.0},
        ademamix,
        {"alpha_warmup": 5, "warmup": 7, "alpha": 8.0},
    ),
    (AdEMAMix, {"betas": (0.0, 0.999, 0.99), "beta3_warmup": 9}, ademamix, {"b1": 0.0, "b3": 0.99, "warmup": 9}),
]


@pytest.mark.parametrize("rates", [CONSTANT, VARYING], ids=["constant", "varying"])
@pytest.mark.parametrize(("ours", "kwargs", "formula", "their_kwargs"), FORMULAS)
def test_the_formula_takes_the_same_steps(ours, kwargs, formula, their_kwargs, rates):
    for mine, other in zip(train(ours, rates, **kwargs), formula_steps(formula, rates, **their_kwargs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


EVERY = [
    (SGD, {}),
    (SGD, {"momentum": 0.9, "dampening": 0.5}),
    (Adam, {}),
    (AdamW, {"eps_root": 1e-8, "mu_dtype": "bfloat16"}),
    (RAdam, {}),
    (RMSprop, {"momentum": 0.9}),
    (RMSprop, {"variant": "torch"}),
    (Lion, {"mu_dtype": "bfloat16"}),
    (AdEMAMix, {}),
    (AdEMAMix, {"betas": (0.0, 0.999, 0.9999)}),
    (ScheduleFreeAdamW, {"warmup_steps": 3}),
    (ScheduleFreeSGD, {}),
    (Sophia, {}),
]
every = pytest.mark.parametrize(("cls", "kwargs"), EVERY)


def run(cls: Any, params: list[torch.nn.Parameter], steps: int, **kwargs: Any) -> Any:
    optimizer = cls(params, lr=0.01, weight_decay=0.1, **kwargs)
    for step in range(steps):
        for i, p in enumerate(params):
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
            p.grad = g.to(p.dtype)
        optimizer.step()
    return optimizer


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_change_no_bit(cls, kwargs, dtype, monkeypatch):
    results = []
    for size in (2**30, 64 * 4):
        monkeypatch.setitem(elementwise.BLOCK_BYTES, "cpu", size)
        params = [torch.nn.Parameter(torch.ones(s, dtype=dtype)) for s in ((40, 33), (5,), (0, 3), (70,), (), (64,))]
        optimizer = run(cls, params, 4, **kwargs)
        results.append([p.detach() for p in params] + [x for p in params for x in optimizer.state[p].values()])
    assert all(map(torch.equal, *results))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zero_gradients_leave_finite_parameters(cls, kwargs, dtype):
    p = torch.nn.Parameter(torch.ones(3, 4, dtype=dtype))
    optimizer = cls([p], lr=0.01, **kwargs)
    for _ in range(8):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert p.isfinite().all()
    assert all(x.isfinite().all() for x in optimizer.state[p].values())


@every
def test_a_parameter_without_gradient_is_left_alone(cls, kwargs):
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = cls([p, q], lr=0.01, weight_decay=0.1, **kwargs)
    before = {name: x.clone() for name, x in optimizer.state[q].items()}
    for _ in range(3):
        p.grad = torch.ones(3)
        optimizer.step()
    assert torch.equal(q, torch.ones(3))
    assert all(torch.equal(x, before[name]) for name, x in optimizer.state[q].items())
    q.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(q, torch.ones(3))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_goes_on_bit_for_bit(cls, kwargs, dtype):
    p = torch.nn.Parameter(torch.ones(5, 4, dtype=dtype))
    first = run(cls, [p], 3, **kwargs)
    q = torch.nn.Parameter(p.detach().clone())
    second = cls([q], lr=0.01, weight_decay=0.1, **kwargs)
    second.load_state_dict(first.state_dict())
    for name, x in first.state[p].items():
        assert second.state[q][name].dtype == x.dtype
        assert torch.equal(second.state[q][name], x)
    for _ in range(2):
        p.grad, q.grad = torch.full_like(p, 0.3), torch.full_like(q, 0.3)
        first.step()
        second.step()
    assert torch.equal(p, q)


def test_a_mean_in_bfloat16_takes_half_the_memory_and_nearly_the_same_steps():
    for cls in (AdamW, Lion):
        p, q = (torch.nn.Parameter(torch.ones(6, 7)) for _ in range(2))
        narrow, wide = run(cls, [p], 6, mu_dtype="bfloat16"), run(cls, [q], 6)
        assert narrow.state[p]["exp_avg"].dtype == torch.bfloat16
        torch.testing.assert_close(narrow.state[p]["exp_avg"].float(), wide.state[q]["exp_avg"], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("cls", "kwargs", "text"),
    [
        (Adam, {"mu_dtype": "float16"}, "mu_dtype='float16' is unknown; possible: float32, bfloat16"),
        (AdEMAMix, {"betas": (0.9, 0.99)}, "must be 3 numbers"),
        (AdEMAMix, {"alpha_warmup": -1}, "alpha_warmup=-1"),
        (RMSprop, {"variant": "tf"}, "possible: optax, torch"),
        (RMSprop, {"nesterov": True}, "momentum above 0"),
        (SGD, {"momentum": 0.9, "nesterov": True, "dampening": 0.1}, "dampening=0.1"),
        (SGD, {"dampening": 2.0}, "dampening=2.0"),
        (Lion, {"betas": (0.9, 1.0)}, r"betas\[1\]=1.0"),
        (ScheduleFreeAdamW, {"betas": (0.0, 0.9)}, r"betas\[0\]=0 must be above 0"),
        (ScheduleFreeSGD, {"r": -1.0}, "r=-1.0"),
        (Sophia, {"rho": 0.0}, "rho=0 must be above 0"),
        (Sophia, {"estimator": "exact"}, "possible: hutchinson, gnb"),
    ],
)
def test_bad_arguments_are_named(cls, kwargs, text):
    with pytest.raises(ValueError, match=text):
        cls([torch.nn.Parameter(torch.ones(2))], lr=0.1, **kwargs)
