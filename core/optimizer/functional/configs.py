"""Configs with the names and the defaults of eFormer's, and what each means in settings of our optimizers.

``config_builders`` builds optimizers of them. ``to_dict``, ``from_dict``, ``to_json`` and ``from_json`` convert them; a dtype
may be given by its name.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from ...serializable import SerializationMixin
from ..rules.psgd import LEAST_LR
from ..steps.argument_checks import choice
from ..steps.constructor_settings import DTYPES
from ..weight_decay_mask import Mask

COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""The Newton-Schulz coefficients that emerging-optimizers calls ``simple``."""


@dataclass
class Config(SerializationMixin, ABC):
    """Base of the configs.

    Raises:
        ValueError: for the name of an unknown dtype, naming the field.
    """

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if "dtype" in f.name and isinstance(value, str):
                choice(f.name, value, list(DTYPES))
                setattr(self, f.name, DTYPES[value])

    @abstractmethod
    def settings(self, name: str) -> dict[str, Any]:
        """Settings of the optimizer that is registered as ``name``, for ``OptimizerConfig.from_dict``.

        Raises:
            NotImplementedError: for a field whose value our optimizer cannot follow.
        """

    def own_decay(self, param: nn.Parameter) -> float:
        """Coefficient of the weight decay that the optimizer has by itself for ``param``, before any from outside is added."""
        return 0.0

    @property
    def own_decay_mask(self) -> Mask | None:
        """Parameters with that weight decay; None: all."""
        return None


@dataclass
class AdamWConfig(Config):
    """AdamW without weight decay of its own.

    Attributes:
        b1: Decay of the mean gradient.
        b2: Decay of the mean squared gradient.
        eps: Added outside of the root.
        eps_root: Added inside of the root.
        mu_dtype: Dtype of the stored mean gradient, float32 or bfloat16; None: the parameter's, but at least float32.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 0.0
    mu_dtype: torch.dtype | str | None = None

    def settings(self, name: str) -> dict[str, Any]:
        """As in the base class."""
        return _adam(self.b1, self.b2, self.eps, self.eps_root, self.mu_dtype)


@dataclass
class AdafactorConfig(Config):
    """Adafactor in optax's form.

    Attributes:
        min_dim_size_to_factor: Least size of both factored dims.
        decay_rate: Exponent of the second moment's decay.
        decay_offset: Steps before the decay begins to count.
        multiply_by_parameter_scale: Whether the learning rate is relative to the RMS of the parameter.
        clipping_threshold: Largest RMS of an update; None for any.
        momentum: Decay of a mean of the updates; None for none.
        dtype_momentum: Dtype of that mean.
        weight_decay_rate: Share of the parameter that each step subtracts, independent of the learning rate.
        eps: Added to the squared gradient.
        factored: False keeps the whole second moment.
    """

    min_dim_size_to_factor: int = 128
    decay_rate: float = 0.8
    decay_offset: int = 0
    multiply_by_parameter_scale: bool = True
    clipping_threshold: float | None = 1.0
    momentum: float | None = None
    dtype_momentum: torch.dtype | str = torch.float32
    weight_decay_rate: float | None = None
    eps: float = 1e-30
    factored: bool = True

    def settings(self, name: str) -> dict[str, Any]:
        """As in the base class."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["clip_threshold"] = values.pop("clipping_threshold")
        values["weight_decay_rate"] = self.weight_decay_rate or 0.0
        return {f"{name}_{setting}": value for setting, value in values.items()}


@dataclass
class LionConfig(Config):
    """Lion, with the weight decay of 1e-3 that optax's has by default.

    Attributes:
        b1: Share of the momentum in a step.
        b2: Decay of the momentum.
        mu_dtype: Dtype of the stored momentum, float32 or bfloat16; None: the parameter's, but at least float32.
    """

    b1: float = 0.9
    b2: float = 0.99
    mu_dtype: torch.dtype | str | None = None

    def settings(self, name: str) -> dict[str, Any]:
        """As in the base class."""
        return {f"{name}_betas": (self.b1, self.b2), f"{name}_mu_dtype": _by_name("mu_dtype", self.mu_dtype)}

    def own_decay(self, param: nn.Parameter) -> float:
        """As in the base class."""
        return 1e-3


@dataclass
class RMSPropConfig(Config):
    """RMSProp in optax's form.

    Attributes:
        decay: Decay of the mean squared gradient.
        initial_scale: Mean squared gradient before the first step.
        momentum: Decay of a sum of the steps; None for none.
        nesterov: Whether momentum looks one step ahead; without momentum it has no effect.
        eps: Added inside of the root.
    """

    decay: float = 0.9
    initial_scale: float = 0.0
    momentum: float | None = None
    nesterov: bool = False
    eps: float = 1e-8

    def settings(self, name: str) -> dict[str, Any]:
        """As in the base class."""
        return {
            f"{name}_decay": self.decay,
            f"{name}_initial_scale": self.initial_scale,
            f"{name}_momentum": self.momentum or 0.0,
            f"{name}_nesterov": self.nesterov and bool(self.momentum),
            f"{name}_eps": self.eps,
        }


@dataclass
class MuonConfig(Config):
    """Muon in optax's form for matrices, AdamW for the rest.

    Attributes:
        ns_coeffs: Coefficients of each Newton-Schulz iteration.
        ns_steps: Newton-Schulz iterations.
        beta: Decay of the momentum.
        eps: Added to the norm that the momentum is divided by, and to AdamW's denominator.
        weight_decay: Coefficient for matrices.
        weight_decay_mask: Parameters with the two coefficients of this config; None: all.
        mu_dtype: Dtype of the stored momentum, float32 or bfloat16; None: the parameter's, but at least float32.
        nesterov: Whether Muon's momentum looks one step ahead.
        adaptive: Whether steps are scaled by their dual norm.
        adam_b1: Decay of AdamW's mean gradient.
        adam_b2: Decay of AdamW's mean squared gradient.
        adam_eps_root: Added inside of AdamW's root.
        adam_weight_decay: Coefficient for parameters that are no matrices.
    """

    ns_coeffs: tuple[float, ...] = COEFFICIENTS
    ns_steps: int = 5
    beta: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    weight_decay_mask: Any = None
    mu_dtype: torch.dtype | str | None = None
    nesterov: bool = True
    adaptive: bool = False
    adam_b1: float = 0.9
    adam_b2: float = 0.999
    adam_eps_root: float = 0.0
    adam_weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ns_coeffs = tuple(self.ns_coeffs)

    def settings(self, name: str) -> dict[str, Any]:
        """As in the base class."""
        custom = {f"{name}_coefficient_type": "custom", f"{name}_ns_coeffs": self.ns_coeffs}
        return {
            **(custom if self.ns_coeffs != COEFFICIENTS else {}),
            **({} if self.mu_dtype is None else {f"{name}_mu_dtype": _by_name("mu_dtype", self.mu_dtype)}),
            f"{name}_momentum": self.beta,
            f"{name}_num_ns_steps": self.ns_steps,
            f"{name}_eps": self.eps,
            f"{name}_nesterov": self.nesterov,
            f"{name}_adaptive": self.adaptive,
            **_adam(self.adam_b1, self.adam_b2, self.eps, self.adam_eps_root, None),
        }

    def own_decay(self, param: nn.Parameter) -> float:
        """As in the base class."""
        return self.weight_decay if param.ndim == 2 else self.adam_weight_decay

    @property
    def own_decay_mask(self) -> Mask | None:
        """As in the base class."""
        mask: Mask | None = self.weight_decay_mask
        return mask


@dataclass
class WhiteKronConfig(Config):
    """Quad and Skew for matrices, AdamW for the rest.

    Attributes:
        lr_style: ``adam`` divides updates by 5; None does not.
        b1: Decay of the mean gradient.
        normalize_grads: Whether the mean gradient is divided by its norm first.
        max_size_dense: Longest side whose factors are not diagonal.
        preconditioner_lr: Step size of the factors; it decays to 0.4, and a smaller one counts as 0.4.
        preconditioner_init_scale: The first factors are this times the identity.
        dtype: Dtype of the stored factors, bfloat16 or float32.
        scanned_layers: Only None: parameters that stack layers are not possible.
        block_size: Side of a block.
        pipeline_axis_name: No effect: the layout of the parameters says which rank works on what.
        pipeline_axis_size: No effect, for the same reason.
        params_partition_specs: No effect, for the same reason.
        noise_scale: Size of the noise that the factors are fitted with.
        weight_decay: Coefficient.
        weight_decay_mask: Parameters with this coefficient; None: all.
    """

    lr_style: str | None = "adam"
    b1: float = 0.95
    normalize_grads: bool = False
    max_size_dense: int = 16384
    preconditioner_lr: float = 0.7
    preconditioner_init_scale: float = 1.0
    dtype: torch.dtype | str = torch.bfloat16
    scanned_layers: Any = None
    block_size: int = 256
    pipeline_axis_name: str | None = None
    pipeline_axis_size: int = 1
    params_partition_specs: Any = None
    noise_scale: float = 1e-9
    weight_decay: float = 0.1
    weight_decay_mask: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"dtype={self.dtype} is unknown; possible: bfloat16, float32.")

    def settings(self, name: str) -> dict[str, Any]:
        """As in the base class."""
        if self.scanned_layers is not None:
            raise NotImplementedError(
                "scanned_layers: parameters that stack layers are not possible; pass each layer's."
            )
        same = (
            "lr_style",
            "normalize_grads",
            "max_size_dense",
            "preconditioner_init_scale",
            "block_size",
            "noise_scale",
        )
        return {
            **{f"{name}_{setting}": getattr(self, setting) for setting in same},
            f"{name}_momentum": self.b1,
            f"{name}_preconditioner_lr": max(self.preconditioner_lr, LEAST_LR),
            f"{name}_precond_dtype": self.dtype,
        }

    def own_decay(self, param: nn.Parameter) -> float:
        """As in the base class."""
        return self.weight_decay

    @property
    def own_decay_mask(self) -> Mask | None:
        """As in the base class."""
        mask: Mask | None = self.weight_decay_mask
        return mask


@dataclass
class MarsConfig(Config):
    """MARS, clipped by the norm over all parameters.

    Attributes:
        weight_decay: No effect, as in eFormer; give ``make_transformation`` a ``weight_decay``.
        beta1: Decay of the mean of corrected gradients.
        beta2: Decay of the mean of their squares.
        gamma: How much of the difference between two gradients is added.
        epsilon: Added to the denominator.
        max_grad_norm: Largest norm of the corrected gradient; None or 0 for any.
    """

    weight_decay: float = 0.1
    beta1: float = 0.95
    beta2: float = 0.99
    gamma: float = 0.025
    epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0

    def settings(self, name: str) -> dict[str, Any]:
        """As in the base class."""
        return {
            f"{name}_betas": (self.beta1, self.beta2),
            f"{name}_gamma": self.gamma,
            f"{name}_eps": self.epsilon,
            f"{name}_max_grad_norm": self.max_grad_norm,
        }


def _adam(b1: float, b2: float, eps: float, eps_root: float, mu_dtype: torch.dtype | str | None) -> dict[str, Any]:
    """Settings of AdamW; those that are not left at their defaults."""
    dtype = {} if mu_dtype is None else {"adam_mu_dtype": _by_name("mu_dtype", mu_dtype)}
    return {"adam_beta1": b1, "adam_beta2": b2, "adam_eps": eps, "adam_eps_root": eps_root, **dtype}


def _by_name(field: str, dtype: torch.dtype | str | None) -> str | None:
    """The name of a dtype in which a mean gradient can be stored."""
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None:
        choice(field, name, ("float32", "bfloat16"))
    return name
