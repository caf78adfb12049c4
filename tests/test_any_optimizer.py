"""What a user expects of every optimizer: it gets down, stands still without a gradient, and refuses what it cannot serve."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.optimizer.emerging_optimizers import get_optimizer, list_optimizers
from core.optimizer.registry import entry_of
from tests.support.variants import ALL, IDS, Shapes, config

NAMES = list_optimizers()


@pytest.mark.parametrize(("name", "kwargs"), ALL, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_gradients_leave_no_nan(name, kwargs, dtype):
    model = Shapes().to(dtype)
    optimizer = get_optimizer(config(name, kwargs, 1e-2), [model])
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p in model.parameters():
        assert p.isfinite().all()
        for value in optimizer.state[p].values():
            assert not isinstance(value, Tensor) or not value.is_floating_point() or value.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_shape_is_served_or_refused_at_construction_by_name(name):
    cls: Any = entry_of(name).optimizer_cls
    for shape in ((), (5,), (4, 3, 2), (8, 4, 3, 3)):
        p = nn.Parameter(torch.ones(shape))
        if entry_of(name).default_param_overrides:
            with pytest.raises(ValueError, match="odd"):
                cls([("odd", p)], lr=0.1)
        else:
            p.grad = torch.ones_like(p)
            cls([("odd", p)], lr=0.1).step()
            assert p.isfinite().all()


def quadratic(name: str, kwargs: dict[str, Any], lr: float, steps: int) -> float:
    """What remains of ½ Σ hᵢⱼ (wᵢⱼ - w*ᵢⱼ)², condition 1000, after ``steps`` with ``lr`` decaying to 0."""
    model, target = reachable(name, kwargs, 0), reachable(name, kwargs, 1).weight.detach()
    curvature = torch.logspace(0, -1.5, 8)[:, None] * torch.logspace(0, -1.5, 12)
    optimizer = get_optimizer(config(name, kwargs, lr), [model])

    def loss() -> Tensor:
        return (curvature * (model.weight - target).square()).sum() / 2

    first, last = descend(loss, optimizer, lr, steps)
    return last / first


def reachable(name: str, kwargs: dict[str, Any], seed: int) -> nn.Linear:
    """Random weights where the optimizer keeps them: some hold the weights on a manifold."""
    torch.manual_seed(seed)
    model = nn.Linear(12, 8, bias=False)
    optimizer = get_optimizer(config(name, kwargs, 1e-12), [model])
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    return model


TEXT = ("the quick brown fox jumps over the lazy dog while seven wizards hex the black quartz judge. " * 40)[:2048]


def language_model(name: str, kwargs: dict[str, Any], lr: float, steps: int) -> tuple[float, float]:
    """Loss of a small two-layer model of the next character, before and after."""
    letters = sorted(set(TEXT))
    ids = torch.tensor([letters.index(c) for c in TEXT])
    context = torch.stack([ids[i : len(ids) - 3 + i] for i in range(3)], 1)
    torch.manual_seed(0)
    size = len(letters)
    model = nn.Sequential(nn.Embedding(size, 16), nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, size))
    optimizer = get_optimizer(config(name, kwargs, lr), [model])

    def loss() -> Tensor:
        return F.cross_entropy(model(context), ids[3:])

    return descend(loss, optimizer, lr, steps)


def descend(loss: Callable[[], Tensor], optimizer: Any, lr: float, steps: int) -> tuple[float, float]:
    """The loss before and after ``steps`` with ``lr`` decaying to 0."""
    first = loss().item()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        _backward(loss, optimizer, step)
        optimizer.step()
    _evaluate(optimizer)
    return first, loss().item()


def _backward(loss: Any, optimizer: Any, step: int) -> None:
    def gradients() -> None:
        optimizer.zero_grad()
        loss().backward()

    for member in optimizer.optimizers:
        if hasattr(member, "update_hessian") and step % member.hessian_interval == 0:
            if member.estimator == "hutchinson":
                member.update_hessian(gradients)
            else:
                gradients()
                member.update_hessian(batch_size=1)
    gradients()


def _evaluate(optimizer: Any) -> None:
    for member in optimizer.optimizers:
        if hasattr(member, "eval"):
            member.eval()


RATE = 0.05
RATES: dict[str, tuple[float, float]] = {
    "adafactor": (0.3, RATE),
    "eo_soap": (RATE, 0.01),
    "lars": (3.0, 10.0),
    "mop": (0.3, RATE),
    "muon_hyperball": (RATE, 0.3),
    "muon_optax": (0.3, RATE),
    "oblique_adam": (0.3, RATE),
    "oblique_sgd": (0.3, RATE),
    "polargrad": (0.3, RATE),
    "radam": (0.3, RATE),
    "schedule_free_sgd": (1.0, 1.0),
    "sgd": (0.3, 0.3),
    "shampoo": (0.3, RATE),
    "sinkhorn_muon": (1.0, RATE),
    "spel": (0.3, RATE),
}
"""Learning rates for the quadratic and the language model, where :data:`RATE` is too small or too large."""


LEFT = {"sinkhorn_muon": (0.2, 0.95)}
"""What may be left of the two losses, where a tenth and a half are out of reach: these weights stay mixing matrices."""


@pytest.mark.parametrize(("name", "kwargs"), ALL, ids=IDS)
def test_an_ill_conditioned_quadratic_gets_down(name, kwargs):
    assert quadratic(name, kwargs, RATES.get(name, (RATE, RATE))[0], 150) < LEFT.get(name, (0.1, 0.5))[0]


@pytest.mark.parametrize(("name", "kwargs"), ALL, ids=IDS)
def test_a_language_model_learns(name, kwargs):
    first, last = language_model(name, kwargs, RATES.get(name, (RATE, RATE))[1], 60)
    assert last < first * LEFT.get(name, (0.1, 0.5))[1]
