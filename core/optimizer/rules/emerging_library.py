"""The optimizers of emerging-optimizers, by name, exact on shards."""

import importlib
import warnings
from functools import cache
from typing import Any

import torch
from emerging_optimizers import registry
from emerging_optimizers.orthogonalized_optimizers.sinkhorn_muon import SinkhornMuon
from emerging_optimizers.utils import SinkhornMapper
from torch import nn
from torch.optim.optimizer import Optimizer, ParamsT

from ..steps.torch_class import LibraryStep, on_whole_tensors


class MappedSinkhornMuon(SinkhornMuon):
    """Sinkhorn-Muon that accepts any initial weights.

    With ``map_weights`` the constructor normalizes weights that are not Sinkhorn-normalized in place, as every step does,
    instead of refusing them. Other arguments are those of the base class.
    """

    def __init__(self, params: ParamsT, *args: Any, map_weights: bool = True, **kwargs: Any) -> None:
        weights: list[Any] = list(params)
        try:
            super().__init__(weights, *args, **kwargs)
        except ValueError:
            if not map_weights:
                raise
            mapper = SinkhornMapper(kwargs.get("num_iters", 20), kwargs.get("eps", 1e-8))
            for p in weights:
                mapper(p, inplace=True)
            super().__init__(weights, *args, **kwargs)


def _psgd_state(optimizer: Any, p: nn.Parameter) -> dict[str, Any]:
    factors = [torch.eye(n, dtype=torch.float32, device=p.device) * optimizer.precond_init_scale for n in p.shape]
    bounds = [torch.ones((), dtype=torch.float32, device=p.device) for _ in p.shape]
    return {"step": 0, "exp_avg": torch.zeros_like(p), "Q": factors, "L": bounds}


def _sgd_state(optimizer: Any, p: nn.Parameter) -> dict[str, Any]:
    return {"momentum_buffer": torch.zeros_like(p)}


def _adam_state(optimizer: Any, p: nn.Parameter) -> dict[str, Any]:
    return {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


MODULES = {
    "adaptive_muon": "orthogonalized_optimizers.adaptive_muon",
    "laprop": "scalar_optimizers.laprop",
    "lion": "scalar_optimizers.lion",
    "mop": "orthogonalized_optimizers.mop",
    "muon": "orthogonalized_optimizers.muon",
    "muon_hyperball": "orthogonalized_optimizers.muon_hyperball",
    "oblique_adam": "riemannian_optimizers.normalized_optimizer",
    "oblique_sgd": "riemannian_optimizers.normalized_optimizer",
    "polargrad": "orthogonalized_optimizers.polargrad",
    "psgd_pro": "psgd.psgd",
    "rekls": "soap.rekls",
    "scion": "orthogonalized_optimizers.scion",
    "sinkhorn_muon": "orthogonalized_optimizers.sinkhorn_muon",
    "soap": "soap.soap",
    "spel": "orthogonalized_optimizers.spel",
}
"""Name in emerging-optimizers' registry → module. Modules are imported on demand, since some load torch's compiler."""

LIBRARY = {f"eo_{name}" if name in ("adaptive_muon", "lion", "muon", "soap") else name: name for name in MODULES}
"""Name in this package → name in emerging-optimizers; names that this package uses itself become ``eo_<name>``."""

REPLACED: dict[str, type[Optimizer]] = {"sinkhorn_muon": MappedSinkhornMuon}

SPECIAL: dict[str, dict[str, Any]] = {
    "adaptive_muon": {"momentum": 0.95, "weight_decay": 0.01},
    "laprop": {"any_shape": True, "float32_only": False},
    "lion": {"any_shape": True, "float32_only": False},
    "muon_hyperball": {"transient": ("hyperball_R",)},
    "oblique_adam": {"initialise": _adam_state, "float32_only": False},
    "oblique_sgd": {"initialise": _sgd_state, "float32_only": False},
    "psgd_pro": {"initialise": _psgd_state, "random": True},
}
"""Arguments of :func:`on_whole_tensors`, for the classes that need any."""


@cache
def library_optimizer(name: str) -> type[LibraryStep]:
    """The whole-tensor version of the class that :data:`LIBRARY` lists as ``name``."""
    library_name = LIBRARY[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # raised inside torch while its compiler loads
        importlib.import_module(f"emerging_optimizers.{MODULES[library_name]}")
    cls = REPLACED.get(library_name, registry.get_optimizer_cls(library_name))
    return on_whole_tensors(cls, **SPECIAL.get(library_name, {}))
