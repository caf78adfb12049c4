"""Every registered optimizer with each of its rules, what settings those take in a config, and a parameter of each kind."""

from typing import Any

import torch
from torch import nn

from core.optimizer.emerging_optimizers import list_optimizers
from core.optimizer.optimizer_config import OptimizerConfig

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "micro_adam": [{"density": 0.1, "window": 4, "block_size": 100, "quant_block_size": 24}],
    "adafactor": [
        {"min_dim_size_to_factor": 8, "momentum": 0.9, "weight_decay_rate": 1e-3},
        {"min_dim_size_to_factor": 20},  # between the sizes of shards and wholes
        {"variant": "torch"},
        {"variant": "forgather", "multiply_by_parameter_scale": True},
    ],
    "apollo": [
        {"rank": 3},
        {"rank": 3, "projector": "orthogonal", "mini": True, "update_steps": 3, "lazy": False},
        {"rank": 2, "projector": "online_pca", "update_steps": 3, "decay_after": True},
        {"rank": 2, "projector": "online_pca", "pca_orthonormalize": "norm", "scale": 4.0, "scale_front": True},
    ],
    "bge_adam": [{"variant": "paper"}, {"variant": "entropy"}],
    "hn_adam": [{"lam0": 3.3}, {"lam0": 2.2}, {"variant": "trustformers"}],
    "lamb": [{}, {"max_grad_norm": 1.0}],
    "mars": [{"clip": "global"}, {"clip": "tensor"}],
    "adaptive_muon": [{"moment2_method": "normuon"}, {"align_rms": True}, {"moment2_method": "namo"}],
    "adam": [{}, {"eps_root": 1e-6, "mu_dtype": "float32"}],
    "ademamix": [{"alpha_warmup": 6, "beta3_warmup": 8}, {"betas": (0.0, 0.999, 0.9999)}],
    "rmsprop": [{"momentum": 0.9, "nesterov": True, "initial_scale": 1.0}, {"variant": "torch"}],
    "schedule_free_adamw": [{"warmup_steps": 4}],
    "muon_optax": [{}, {"nesterov": False, "adaptive": True}],
    "sgd": [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.5}],
    "shampoo": [{"precondition_frequency": 3}, {"beta": 0.9, "momentum": 0.9, "grafting": "adagrad"}],
    "soap": [{"precondition_frequency": 2}, {"max_precond_dim": 30, "normalize_grads": True}],
    "quad": [{"block_size": 16}, {"block_size": 16, "max_size_dense": 40, "normalize_grads": True}],
    "skew": [{"block_size": 16}, {"block_size": 16, "max_size_dense": 40}],
}
"""Settings to try of optimizers that have several rules; the others run as they are, by being registered."""

ALL = [(name, kwargs) for name in list_optimizers() for kwargs in VARIANTS.get(name, [{}])]
IDS = [f"{name}-{'-'.join(map(str, kwargs.values()))}" for name, kwargs in ALL]


def config(name: str, kwargs: dict[str, Any], lr: float, weight_decay: float = 0.0) -> OptimizerConfig:
    settings = {f"{name}_{argument}": value for argument, value in kwargs.items()}
    return OptimizerConfig.from_dict({"optimizer": name, "lr": lr, "weight_decay": weight_decay, **settings})


class Shapes(nn.Module):
    """A parameter of each kind."""

    def __init__(self) -> None:
        super().__init__()
        for i, shape in enumerate([(24, 64), (64, 24), (16,), (8, 4, 3, 3), ()]):
            self.register_parameter(f"weight{i}", nn.Parameter(torch.full(shape, 0.5)))
