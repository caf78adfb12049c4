"""Small weights and gradients, and what ``step()`` makes of them: what functional optimizers are compared with."""

from typing import Any

import torch
from torch import Tensor, nn

from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.optimizer_config import OptimizerConfig
from tests.support.sharding import Weights

SHAPES = {"a.weight": (12, 8), "b.weight": (8, 16), "c.weight": (12, 8), "c.bias": (16,)}
LR = 0.1
SETTINGS: dict[str, dict[str, Any]] = {"apollo": {"apollo_rank": 3}}


def weights(shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    return {name: random(i, shape) for i, (name, shape) in enumerate(shapes.items())}


def gradients(step: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    return {name: random(100 * (step + 1) + i, shape) for i, (name, shape) in enumerate(shapes.items())}


def random(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def schedule(step: int) -> float:
    return LR * 0.5**step


def configured(name: str, **kwargs: Any) -> OptimizerConfig:
    return OptimizerConfig.from_dict({"optimizer": name, "lr": LR, **SETTINGS.get(name, {}), **kwargs})


class Stepped:
    """The parameters as ``step()`` makes them."""

    def __init__(self, config: OptimizerConfig, params: dict[str, Tensor], **kwargs: Any) -> None:
        self.params = {name: nn.Parameter(p.clone()) for name, p in params.items()}
        self.optimizer = get_optimizer(config, [Weights(self.params)], **kwargs)
        self.rates = [group["lr"] / LR for group in self.optimizer.param_groups]

    def step(self, grads: dict[str, Tensor | None], lr: float, clip: float = 0.0) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = lr * rate
        for name, p in self.params.items():
            g = grads[name]
            p.grad = None if g is None else g.clone()
        if clip:
            self.optimizer.clip_grad_norm_(clip)
        self.optimizer.step()


def check_equal(mine: dict[str, Tensor], wanted: dict[str, Any]) -> None:
    assert mine.keys() == wanted.keys()
    for name, p in mine.items():
        torch.testing.assert_close(p, wanted[name].detach(), rtol=0, atol=0, msg=name)
