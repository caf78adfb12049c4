"""Small dicts of random tensors, and a learning rate that falls, for tests of functional optimizers."""

import torch
from torch import Tensor

SHAPES = {"w": (3, 4), "b": (4,)}

Tree = dict[str, Tensor]


def tree(seed: int) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def lr(step: int) -> float:
    return 0.05 / (1 + step)
