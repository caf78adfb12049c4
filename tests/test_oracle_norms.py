"""Optimizers that scale by norms, against libraries and against the papers' formulas in numpy; float64."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import pytorch_optimizer
import torch
import torch.distributed as dist
from torch import nn

from core import engine
from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.optimizer_config import OptimizerConfig
from core.optimizer.rules.bge_adam import BGEAdam
from core.optimizer.rules.hn_adam import HNAdam
from core.optimizer.rules.lamb_lars import Lamb, Lars
from core.optimizer.rules.mars import Mars
from core.philox import Key, normal
from core.process_groups_config import ProcessGroupCollection
from core.sharding.layout import Layout
from tests.support.sharding import Weights
from tests.support.whole_and_part import LAYOUTS, gradients, part

SHAPES = [(5, 12), (12, 5), (7,), (3, 4, 5), ()]
STEPS = 12
ALL: list[tuple[Any, dict[str, Any]]] = [
    (Lamb, {}),
    (Lamb, {"max_grad_norm": 1.0}),
    (Lars, {"weight_decay": 0.05}),
    (Mars, {"clip": "global"}),
    (Mars, {"clip": "tensor"}),
    (BGEAdam, {"variant": "paper"}),
    (BGEAdam, {"variant": "entropy"}),
    (HNAdam, {"variant": "paper"}),
    (HNAdam, {"variant": "trustformers"}),
]

Formula = Callable[..., np.ndarray]


def random(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(random(i, shape)) for i, shape in enumerate(SHAPES)]


def gradient(i: int, step: int) -> torch.Tensor:
    """Of parameter ``i``; they differ in size, so that some norms are above 1 and some below."""
    return random(1000 * step + i + 50, SHAPES[i]) * 10.0 ** (1 - i)


def trained(cls: Any, scale: Callable[[int], float] = lambda step: 1.0, **kwargs: Any) -> list[nn.Parameter]:
    params = parameters()
    optimizer = cls(params, **kwargs)
    for step in range(1, STEPS + 1):
        for i, p in enumerate(params):
            p.grad = gradient(i, step) * scale(step)
        optimizer.step()
    return params


def computed(formula: Formula, **kwargs: Any) -> list[np.ndarray]:
    """What ``formula(p, g, s, t, i, …)`` makes of the same parameters, each with a dict s for its state."""
    params: list[Any] = [p.detach().numpy() for p in parameters()]
    states: list[dict[str, Any]] = [{} for _ in params]
    for t in range(1, STEPS + 1):
        params = [formula(p, gradient(i, t).numpy(), states[i], t, i, **kwargs) for i, p in enumerate(params)]
    return params


def check(got: list[nn.Parameter], wanted: list[Any]) -> None:
    for mine, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.detach(), torch.as_tensor(other).detach(), rtol=1e-12, atol=1e-12)


def ratio(a: float, b: float) -> float:
    return a / b if a > 0 and b > 0 else 1.0


def lamb_formula(p, g, s, t, i, *, lr, weight_decay, eps=1e-6, scale=lambda step: 1.0):
    """You et al. 2019, algorithm 2, with φ(x) = x."""
    g = g * scale(t)
    m = s["m"] = 0.9 * s.get("m", 0) + 0.1 * g
    v = s["v"] = 0.999 * s.get("v", 0) + 0.001 * g * g
    r = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + eps) + weight_decay * p
    return p - lr * ratio(np.linalg.norm(p), np.linalg.norm(r)) * r


def lars_formula(p, g, s, t, i, *, lr, momentum, weight_decay, eta):
    """You et al. 2017, algorithm 1, with the learning rate outside of the momentum."""
    local = ratio(eta * np.linalg.norm(p), np.linalg.norm(g) + weight_decay * np.linalg.norm(p))
    v = s["v"] = momentum * s.get("v", 0) + local * (g + weight_decay * p)
    return p - lr * v


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_lamb_is_the_papers(decay):
    settings = {"lr": 0.1, "weight_decay": decay}
    check(trained(Lamb, **settings), computed(lamb_formula, **settings))


def global_factor(step: int, limit: float, of: Callable[[int, int], torch.Tensor]) -> float:
    norm = math.sqrt(sum(float(of(i, step).square().sum()) for i in range(len(SHAPES))))
    return min(1.0, limit / (norm + 1e-6))


@pytest.mark.parametrize("limit", [3.0, 1e6])
def test_lamb_scales_gradients_by_their_global_norm_first(limit):
    settings = {"lr": 0.1, "weight_decay": 0.05}
    wanted = computed(lamb_formula, scale=lambda step: global_factor(step, limit, gradient), **settings)
    check(trained(Lamb, max_grad_norm=limit, **settings), wanted)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_lars_is_the_papers(momentum, decay):
    settings = {"lr": 2.0, "momentum": momentum, "weight_decay": decay}
    check(trained(Lars, trust_coefficient=0.01, **settings), computed(lars_formula, eta=0.01, **settings))


def test_lars_is_pytorch_optimizers_on_matrices():
    settings = {"lr": 2.0, "weight_decay": 0.05, "trust_coefficient": 0.01}
    matrices = [i for i, shape in enumerate(SHAPES) if len(shape) > 1]
    got, wanted = trained(Lars, **settings), trained(pytorch_optimizer.LARS, **settings)
    check([got[i] for i in matrices], [wanted[i] for i in matrices])


def test_mars_is_pytorch_optimizers_but_for_what_that_adds_to_v():
    settings = {"lr": 0.1, "eps": 0.0, "weight_decay": 0.05}
    wanted = trained(pytorch_optimizer.MARS, optimize_1d=True, **settings)
    for mine, other in zip(trained(Mars, clip="tensor", **settings), wanted, strict=True):
        torch.testing.assert_close(mine.detach(), other.detach(), rtol=1e-6, atol=1e-6)


def corrected(i: int, step: int, gamma: float, beta1: float) -> torch.Tensor:
    """MARS: c = g + γβ₁/(1-β₁)·(g - g₋)."""
    before = gradient(i, step - 1) if step > 1 else torch.zeros(SHAPES[i], dtype=torch.float64)
    return gradient(i, step) + gamma * beta1 / (1 - beta1) * (gradient(i, step) - before)


def mars(p, g, s, t, i, *, clip, limit, lr=0.1, beta1=0.95, beta2=0.99, gamma=0.025, eps=1e-8, decay=0.05):
    def of(k: int, step: int) -> torch.Tensor:
        return corrected(k, step, gamma, beta1)

    c = of(i, t).numpy()
    if limit and clip == "tensor":
        c = c / max(1, np.linalg.norm(c) / limit)
    elif limit:
        c = c * global_factor(t, limit, of)
    s["m"] = beta1 * s.get("m", 0) + (1 - beta1) * c
    s["v"] = beta2 * s.get("v", 0) + (1 - beta2) * c**2
    return p - lr * (s["m"] / (1 - beta1**t) / (np.sqrt(s["v"] / (1 - beta2**t)) + eps) + decay * p)


@pytest.mark.parametrize("limit", [1.0, 5.0, None])
@pytest.mark.parametrize("clip", ["global", "tensor"])
def test_mars_is_its_formula(clip, limit):
    got = trained(Mars, lr=0.1, weight_decay=0.05, clip=clip, max_grad_norm=limit)
    check(got, computed(mars, clip=clip, limit=limit))


def bge_paper(p, g, s, t, i, *, seed, lr=0.1, eps=1e-8, decay=0.05):
    g = g + decay * p
    m = s.get("m", np.zeros_like(g))
    change = np.linalg.norm(g - m) / (np.linalg.norm(m) + 1e-8)
    beta1, beta2 = (
        float(np.clip(low + (high - low) * (1 - change), low, high)) for low, high in ((0.5, 0.9), (0.9, 0.999))
    )
    s["m"] = beta1 * m + (1 - beta1) * g
    s["v"] = beta2 * s.get("v", 0) + (1 - beta2) * g**2
    s["predicted"] = 0.5 * s.get("predicted", 0) + 0.5 * g
    noise = float(normal(Key(seed, f"parameter {i}", t, "bge_adam"), (), dtype=torch.float64)) / math.sqrt(g.size)
    rate = lr * math.sqrt(1 - beta2**t) / (1 - beta1**t) * (1 + 0.01 * noise)
    return p - rate * s["predicted"] / (np.sqrt(s["v"]) + eps)


@pytest.mark.parametrize("seed", [0, 1])
def test_bge_adam_is_its_formula(seed):
    check(trained(BGEAdam, lr=0.1, weight_decay=0.05, seed=seed), computed(bge_paper, seed=seed))


def bge_entropy(p, g, s, t, i, lr=0.1, eps=1e-8, decay=0.05, betas=(0.9, 0.999)):
    q = np.abs(g) / np.abs(g).sum()
    entropy = max(1e-6, -(q * np.log(q)).sum())
    g = g * np.exp(-0.1 * entropy * q)
    beta1 = np.clip(betas[0] * (1 + 0.05 * entropy), 0.1, 0.99)
    beta2 = np.clip(betas[1] * (1 - 0.05 * entropy), 0.9, 0.9999)
    s["m"] = beta1 * s.get("m", 0) + (1 - beta1) * g
    s["v"] = beta2 * s.get("v", 0) + (1 - beta2) * g**2
    return p - lr * (s["m"] / (1 - beta1**t) / (np.sqrt(s["v"] / (1 - beta2**t)) + eps) + decay * p)


def test_bge_adam_by_entropy_is_its_formula():
    check(trained(BGEAdam, lr=0.1, weight_decay=0.05, variant="entropy"), computed(bge_entropy))


def hn_paper(p, g, s, t, i, *, lam0, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, decay=0.05):
    before = s.get("m", np.zeros_like(g))
    power = lam0 - np.linalg.norm(before) / max(np.linalg.norm(before), np.linalg.norm(g))
    m = s["m"] = beta1 * before + (1 - beta1) * g
    v = s["v"] = beta2 * s.get("v", 0) + (1 - beta2) * np.abs(g) ** power
    if power < 2:
        v = s["largest"] = np.maximum(s.get("largest", 0), v)
    return p - lr * (m / (v ** (1 / power) + eps) + decay * p)


@pytest.mark.parametrize("lam0", [1.5, 2.3, 3.9])
def test_hn_adam_is_its_formula(lam0):
    check(trained(HNAdam, lr=0.1, weight_decay=0.05, lam0=lam0), computed(hn_paper, lam0=lam0))


def hn_trustformers(p, g, s, t, i, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, decay=0.05):
    s["m"] = beta1 * s.get("m", 0) + (1 - beta1) * g
    s["v"] = beta2 * s.get("v", 0) + (1 - beta2) * g**2
    u = s["m"] / (1 - beta1**t) / (np.sqrt(s["v"] / (1 - beta2**t)) + eps)
    norm = np.linalg.norm(u)
    return p - lr * (max(norm / (norm + 0.1), 0.1) * u + decay * p)


def test_hn_adam_of_trustformers_is_its_formula():
    got = trained(HNAdam, lr=0.1, weight_decay=0.05, variant="trustformers", betas=(0.9, 0.999))
    check(got, computed(hn_trustformers))


def test_lam0_is_drawn_by_the_seed_and_saved():
    drawn = [HNAdam(parameters(), seed=seed).param_groups[0]["lam0"] for seed in range(20)]
    assert all(2 <= lam0 < 4 for lam0 in drawn)
    assert len(set(drawn)) == 20
    assert HNAdam(parameters(), seed=7).param_groups[0]["lam0"] == drawn[7]
    other = HNAdam(parameters(), seed=8)
    other.load_state_dict(HNAdam(parameters(), seed=7).state_dict())
    assert other.param_groups[0]["lam0"] == drawn[7]


@pytest.mark.parametrize("lam0", [1.0, 0.0, float("inf"), float("nan")])
def test_lam0_must_leave_a_power(lam0):
    with pytest.raises(ValueError, match=r"lam0=.* must be a finite number above 1"):
        HNAdam(parameters(), lam0=lam0)


def ids(case: tuple[Any, dict[str, Any]]) -> str:
    return "-".join([case[0].__name__, *map(str, case[1].values())])


@pytest.mark.parametrize("case", ALL, ids=ids)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zeros", [False, True])
def test_zero_gradients_leave_everything_finite(case, dtype, zeros):
    cls, kwargs = case
    params = [nn.Parameter(p.detach().to(dtype) * (0 if zeros else 1)) for p in parameters()]
    optimizer = cls(params, lr=0.1, **kwargs)
    for step, scale in enumerate((0, 0, 1e-30, 1, 0)):
        before = [p.detach().clone() for p in params]
        for i, p in enumerate(params):
            p.grad = (gradient(i, step) * scale).to(dtype)
        optimizer.step()
        for p in params:
            assert p.isfinite().all()
            assert all(x.isfinite().all() for x in optimizer.state[p].values())
        if scale == 1 and dtype == torch.float64:  # fewer bits may round the step away
            assert all(not torch.equal(p.detach(), old) for p, old in zip(params, before, strict=True))


def test_lamb_moves_a_parameter_of_zeros_by_adams_step():
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    p.grad = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    Lamb([p], lr=0.1, eps=0.0).step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.1, 0.1, -0.1], dtype=torch.float64))


def test_gradients_are_left_as_they_are():
    for cls, kwargs in ALL:
        params = parameters()
        for i, p in enumerate(params):
            p.grad = gradient(i, 1)
        cls(params, lr=0.1, **kwargs).step()
        assert all(torch.equal(p.grad, gradient(i, 1)) for i, p in enumerate(params))


def test_norms_of_large_float32_tensors_have_all_their_digits():
    x = torch.randn(1, 2048, 2048, generator=torch.Generator().manual_seed(0)) * 0.02
    lay = Layout.whole(x.shape[1:])

    def rule() -> Iterator[Any]:
        return (yield lay.norm(x), lay.rms(x))

    norm, rms = engine.run([("x", rule())])[0]
    exact = float(x.double().square().sum().sqrt())
    assert float(norm) == pytest.approx(exact, rel=1e-6)
    assert float(rms) == pytest.approx(exact / 2048, rel=1e-6)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(("name", "kwargs", "expected"), [("lamb", {}, 1), ("lamb", {"max_grad_norm": 1.0}, 2)])
def test_lamb_asks_once_for_all_parameters(world, monkeypatch, name, kwargs, expected):
    params, groups, _ = part(world, {"tp": 2}, False, gradients())
    optimizer = Lamb(list(params.values()), pg_collection=groups, **kwargs)
    made = []
    original = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda *a, **k: (made.append(1), original(*a, **k))[1])
    optimizer.step()
    assert len(made) == expected


def clipped_steps(world: Any, axes: dict[str, int], cls: Any, kwargs: dict[str, Any]) -> None:
    """A norm over the whole model: over pipeline stages too, and copies count once."""
    runs = []
    for layout in ({}, axes):
        params, groups, cut = part(world, layout, False, gradients(0))
        optimizer = cls(list(params.values()), lr=0.1, weight_decay=0.05, pg_collection=groups, **kwargs)
        for step in range(10):
            whole = gradients(step + 3)
            for name, p in params.items():
                p.grad = cut(whole[name])
            optimizer.step()
        runs.append((params, cut))
    (whole_params, _), (mine, cut) = runs
    for name, p in mine.items():
        torch.testing.assert_close(p.detach(), cut(whole_params[name].detach()), rtol=1e-9, atol=1e-11)


GLOBAL = [(Lamb, {"max_grad_norm": 1.0}), (Mars, {"clip": "global"})]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("case", GLOBAL, ids=ids)
@pytest.mark.parametrize("axes", [{"tp": 2}, {"pp": 2}, {"dp": 2}], ids=str)
def test_global_norms_are_those_of_the_whole_model_on_2_ranks(world, axes, case):
    clipped_steps(world, axes, *case)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("case", GLOBAL, ids=ids)
@pytest.mark.parametrize("axes", [axes for axes in LAYOUTS if len(axes) == 2], ids=str)
def test_global_norms_are_those_of_the_whole_model_on_4_ranks(world, axes, case):
    clipped_steps(world, axes, *case)


def test_settings_come_from_the_config_by_name():
    model = Weights({"0.weight": nn.Parameter(torch.ones(4, 4)), "3.bias": nn.Parameter(torch.ones(4))})
    config = OptimizerConfig(optimizer="lamb", lr=0.1, weight_decay=0.03, adam_beta1=0.8)
    chain = get_optimizer(config, [model], ProcessGroupCollection())
    assert chain.param_groups[0]["betas"] == (0.8, 0.999)
    assert chain.param_groups[0]["eps"] == 1e-6
    for name, betas in (("mars", (0.95, 0.99)), ("hn_adam", (0.9, 0.99))):
        chain = get_optimizer(OptimizerConfig(optimizer=name, lr=0.1), [model], ProcessGroupCollection())
        assert list(chain.members) == [name]
        assert chain.param_groups[0]["betas"] == betas
