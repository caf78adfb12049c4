"""What this package changes in classes of emerging-optimizers before it runs them, and what it has to tell about them."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT


def _counts_steps(cls: Any) -> type[Optimizer]:
    """psgd_pro that counts its steps. In release 0.3 it does not, so that the rate of its preconditioner never falls."""

    class PSGDPro(cls):
        __doc__ = cls.__doc__

        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            """One step of the library's class; afterwards each parameter's state counts one step more."""
            params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            steps = [self.state[p].get("step", 0) for p in params]
            loss: float | None = super().step(closure)
            for p, before in zip(params, steps, strict=True):
                self.state[p]["step"] = before + 1
            return loss

    return PSGDPro


def _multiplies_in_float32(cls: Any) -> type[Optimizer]:
    """A kind of SOAP without arguments for the arithmetic of its products, which would be TF32 on an accelerator."""

    class Soap(cls):
        __doc__ = cls.__doc__

        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            """One step of the library's class, with products in float32."""
            self.fp32_matmul_prec = self.qr_fp32_matmul_prec = "highest"
            loss: float | None = super().step(closure)
            return loss

    Soap.__name__ = cls.__name__
    return Soap


def _accepts_any_weights(cls: Any) -> type[Optimizer]:
    from emerging_optimizers.utils import SinkhornMapper

    class SinkhornMuon(cls):
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

    return SinkhornMuon


def _keeps_each_norm(cls: Any) -> type[Optimizer]:
    """Hyperball Muon as release 0.3 has it. Later ones need a radius, which must be the norm of every weight already."""
    if inspect.signature(cls).parameters["hyperball_radius"].default is None:
        return cls  # type: ignore[no-any-return]

    class MuonHyperball(cls):
        """Muon on spheres: each matrix keeps its norm, but for weight decay.

        With ``hyperball_radius`` the constructor scales each matrix to that norm, in place, which it then keeps exactly.
        """

        def __init__(
            self, *args: Any, hyperball_radius: float | None = None, hyperball_eps: float = 1e-15, **kwargs: Any
        ) -> None:
            self._radius, self._eps, self._norm = hyperball_radius, hyperball_eps, 0.0
            super(cls, self).__init__(*args, **kwargs)  # Muon's constructor
            with torch.no_grad():
                for p in (p for group in self.param_groups for p in group["params"]):
                    norm = p.norm()
                    if norm.item() == 0:
                        raise ValueError("MuonHyperball requires all parameters to have non-zero norm.")
                    if hyperball_radius is not None:
                        p.mul_(hyperball_radius / norm.clamp_min(hyperball_eps))

        def pre_weight_update_fn_inplace(self, p: Tensor, update: Tensor) -> None:
            """Scale ``update`` in place to the norm that ``p`` is to keep."""
            self._norm = p.norm().item() if self._radius is None else self._radius
            update.mul_(self._norm / update.norm().clamp_min(self._eps))

        def post_weight_update_fn_inplace(self, p: Tensor) -> None:
            """Scale ``p`` in place to that norm."""
            p.mul_(self._norm / p.norm().clamp_min(self._eps))

    return MuonHyperball


CORRECTED: dict[str, Callable[[Any], type[Optimizer]]] = {
    "muon_hyperball": _keeps_each_norm,
    "psgd_pro": _counts_steps,
    "rekls": _multiplies_in_float32,
    "sinkhorn_muon": _accepts_any_weights,
    "stacked_soap": _multiplies_in_float32,
}
"""Name in emerging-optimizers → a function that makes a corrected subclass of its class."""


def _psgd_state(optimizer: Any, p: nn.Parameter) -> dict[str, Any]:
    factors = [torch.eye(n, dtype=torch.float32, device=p.device) * optimizer.precond_init_scale for n in p.shape]
    bounds = [torch.ones((), dtype=torch.float32, device=p.device) for _ in p.shape]
    return {"step": 0, "exp_avg": torch.zeros_like(p), "Q": factors, "L": bounds}


def _sgd_state(optimizer: Any, p: nn.Parameter) -> dict[str, Any]:
    return {"momentum_buffer": torch.zeros_like(p)}


def _adam_state(optimizer: Any, p: nn.Parameter) -> dict[str, Any]:
    return {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def _iso_state(optimizer: Any, p: nn.Parameter) -> dict[str, Any]:
    (m, n), k = p.shape, min(p.shape)
    sizes = {"u": (m, k), "sigma": (k,), "v": (n, k), "momentum_u": (m, k), "momentum_v": (n, k)}
    return {
        "step": 0,
        **{name: torch.zeros(size, dtype=torch.float32, device=p.device) for name, size in sizes.items()},
    }


SPECIAL: dict[str, dict[str, Any]] = {
    "adaptive_muon": {"momentum": 0.95, "weight_decay": 0.01},
    "iso": {"initialise": _iso_state, "from_weights": True},
    "muon_hyperball": {"transient": ("hyperball_R",)},
    "oblique_adam": {"initialise": _adam_state, "float32_only": False},
    "oblique_sgd": {"initialise": _sgd_state, "float32_only": False},
    "psgd_pro": {"initialise": _psgd_state, "random": True},
    "tp_rekls": {"tp_group": None},  # no shards to gather: it is given whole matrices
}
"""Name in emerging-optimizers → arguments of ``on_whole_tensors``, for the classes that need any."""
