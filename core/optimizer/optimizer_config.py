"""The config that names an optimizer and holds its settings. Field names are Megatron-Core's."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import update_wrapper
from types import NoneType
from typing import Any, Self, get_args

from .param_key import ParamKey, ParamPredicate, ParamWithNamePredicate
from .registry import all_settings, takers_of
from .steps.argument_checks import unknown
from .steps.constructor_settings import Setting, check_kind

__all__ = ["OptimizerConfig", "ParamKey", "ParamPredicate", "ParamWithNamePredicate"]


@dataclass
class _Fields:
    """The declared fields of :class:`OptimizerConfig`, which documents them, and the check of their values."""

    optimizer: str = "adamw"
    lr: float | None = None
    min_lr: float | None = None
    weight_decay: float = 0.01
    decoupled_weight_decay: bool = True
    weight_decay_method: str | None = None
    clip_grad: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    sgd_momentum: float = 0.9
    sgd_nesterov: bool = False
    muon_momentum: float = 0.95
    muon_nesterov: bool = False
    muon_split_qkv: bool = True
    muon_scale_mode: str = "spectral"
    muon_fp32_matmul_prec: str = "medium"
    muon_coefficient_type: str = "quintic"
    muon_num_ns_steps: int = 5
    muon_tp_mode: str = "owner"
    muon_extra_scale_factor: float = 1.0
    adaptive_muon_moment2_method: str = "adamuon"
    adaptive_muon_beta2: float = 0.95
    adaptive_muon_eps: float = 1e-8
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for f in fields(self):
            kinds = get_args(f.type) or (f.type,)  # float | None
            value = getattr(self, f.name)
            if f.name != "settings" and not (value is None and NoneType in kinds):
                check_kind(f.name, value, kinds[0])
        self.settings = {name: _setting(name).value(value) for name, value in self.settings.items()}
        vars(self).update(self.settings)


@dataclass(init=False)
class OptimizerConfig(_Fields):
    """Settings of every optimizer; an argument is read from ``{optimizer name}_{argument}``, or else from ``{argument}``.

    Besides the fields, each plain argument of each registered optimizer is a setting and an attribute, for example
    ``OptimizerConfig(optimizer="lion", lion_betas=(0.9, 0.98)).lion_betas``. Settings that are left out keep the optimizer's
    own default.

    Attributes:
        optimizer: Registered name.
        lr: Learning rate.
        min_lr: Learning rate at the end of a schedule.
        weight_decay: Coefficient of weight decay for every optimizer.
        decoupled_weight_decay: False adds weight decay to the gradient; ``sgd`` always does that.
        weight_decay_method: ``decoupled``, ``independent``, ``l2`` or ``palm`` (:func:`~.weight_decay.decay_`),
            for parameters without an override; None leaves ``decoupled_weight_decay`` in force, as each optimizer defines it.
        clip_grad: Largest global gradient norm; 0 for no clipping.
        adam_beta1: Decay of Adam's mean of the gradient.
        adam_beta2: Decay of Adam's mean of the squared gradient.
        adam_eps: Added to the denominator of adam and adamw; others have ``<name>_eps``.
        sgd_momentum: Momentum of SGD.
        sgd_nesterov: Nesterov momentum of SGD.
        muon_momentum: Momentum of Muon.
        muon_nesterov: Nesterov momentum of Muon.
        muon_split_qkv: Whether q, k and v of a fused weight are orthogonalized separately.
        muon_scale_mode: ``spectral``, ``shape_scaling`` or ``unit_rms_norm``.
        muon_fp32_matmul_prec: ``medium`` (bfloat16), ``high`` or ``highest``.
        muon_coefficient_type: Set of Newton-Schulz coefficients.
        muon_num_ns_steps: Newton-Schulz iterations.
        muon_tp_mode: ``owner``, ``distributed``, ``duplicated``, ``auto``, or ``blockwise``, which is not exact.
        muon_extra_scale_factor: Additional factor of Muon's update.
        adaptive_muon_moment2_method: ``adamuon``, ``normuon`` or ``namo``.
        adaptive_muon_beta2: Decay of adaptive Muon's second moment.
        adaptive_muon_eps: Number added to adaptive Muon's denominator.
        settings: Settings that are not fields, ``{"lion_betas": (0.9, 0.98)}``, given here or as keywords; each becomes an
            attribute.

    Raises:
        ValueError: for a keyword that is neither a field nor a setting of a registered optimizer, naming the nearest; for a
            value of another kind.
    """

    def __init__(self, *values: Any, **settings: Any) -> None:
        super().__init__(*values, **_in_fields(type(self), settings))

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """The config with these fields and settings.

        Raises:
            ValueError: as the constructor.
        """
        return cls(**_in_fields(cls, settings))


update_wrapper(OptimizerConfig.__init__, _Fields.__init__, assigned=())  # inspect.signature shows the declared fields.


def _in_fields(config_cls: type[_Fields], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``given`` with everything that is no field of ``config_cls`` moved into ``settings``."""
    names = {f.name for f in fields(config_cls)}
    declared = {name: value for name, value in given.items() if name in names}
    if others := {name: value for name, value in given.items() if name not in names}:
        declared["settings"] = {**declared.get("settings", {}), **others}
    return declared


def _setting(name: str) -> Setting:
    if takers := takers_of(name):
        # Errors then name the setting as the user wrote it.
        return replace(next(iter(takers.values())), argument=name)
    valid = [*(f.name for f in fields(OptimizerConfig)), *all_settings()]
    near = [v for v in valid if v.partition("_")[0] == name.partition("_")[0]]
    raise ValueError(unknown("optimizer setting", name, near or valid))
