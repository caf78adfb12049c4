"""Which optimizer, with which settings, for which parameters. Names are Megatron-Core's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from types import NoneType
from typing import Any, Self, get_args

import torch

from .steps.constructor_settings import Setting, check_kind


@dataclass(frozen=True)
class ParamPredicate:
    """A test of a parameter. Equal by name."""

    name: str
    fn: Callable[[torch.nn.Parameter], bool] = field(compare=False)

    def __call__(self, param: torch.nn.Parameter) -> bool:
        """Whether ``param`` passes."""
        return self.fn(param)


@dataclass(frozen=True)
class ParamWithNamePredicate:
    """A test of a parameter and its name. Equal by name of the test."""

    name: str
    fn: Callable[[torch.nn.Parameter, str], bool] = field(compare=False)

    def __call__(self, param: torch.nn.Parameter, name: str) -> bool:
        """Whether ``param`` called ``name`` passes."""
        return self.fn(param, name)


@dataclass(frozen=True, slots=True)
class ParamKey:
    """Selects parameters: any pattern, attribute or predicate that holds selects.

    Attributes:
        name: Glob pattern, or several, for the parameter's name.
        attr: Attribute, or several, that is true on the parameter.
        predicate: Test of the parameter, or several.
        with_name_predicate: Test of the parameter and its name, or several.
    """

    name: str | tuple[str, ...] = ()
    attr: str | tuple[str, ...] = ()
    predicate: ParamPredicate | tuple[ParamPredicate, ...] = ()
    with_name_predicate: ParamWithNamePredicate | tuple[ParamWithNamePredicate, ...] = ()

    def matches(self, param: torch.nn.Parameter, param_name: str) -> bool:
        """Whether the parameter is selected."""
        return (
            any(fnmatchcase(param_name, pattern) for pattern in _several(self.name))
            or any(getattr(param, attr, False) for attr in _several(self.attr))
            or any(test(param) for test in _several(self.predicate))
            or any(test(param, param_name) for test in _several(self.with_name_predicate))
        )

    def __str__(self) -> str:
        """The selection in words, for errors."""
        tests = [*_several(self.predicate), *_several(self.with_name_predicate)]
        return " or ".join([*_several(self.name), *(f".{a}" for a in _several(self.attr)), *(t.name for t in tests)])


@dataclass
class OptimizerConfig:
    """Settings of every optimizer; an optimizer takes ``{its name}_{argument}``, or else ``{argument}``.

    Besides the fields, any plain argument of any registered optimizer is a setting: :meth:`from_dict` takes
    ``lion_betas=(0.9, 0.98)``, and ``config.lion_betas`` gives it back. Of these, what nobody set is the optimizer's own default.

    Attributes:
        optimizer: Registered name.
        lr: Learning rate.
        min_lr: Where schedules end.
        weight_decay: Coefficient of weight decay, of every optimizer.
        decoupled_weight_decay: False adds it to the gradient; ``sgd`` always does.
        weight_decay_method: ``decoupled``, ``independent``, ``l2`` or ``palm`` (:func:`~.weight_decay.decay_`),
            for parameters that no override gives another; None: what the line above says, where and as each optimizer has it.
        clip_grad: Largest global gradient norm; 0 for no clipping.
        adam_beta1: Decay of Adam's mean of the gradient.
        adam_beta2: Decay of Adam's mean of the squared gradient.
        adam_eps: Added to the denominator of adam and adamw; others have ``<name>_eps``.
        sgd_momentum: Momentum of SGD.
        sgd_nesterov: Nesterov momentum of SGD.
        muon_momentum: Momentum of Muon.
        muon_nesterov: Nesterov momentum of Muon.
        muon_split_qkv: Orthogonalize q, k and v of a fused weight apart.
        muon_scale_mode: ``spectral``, ``shape_scaling`` or ``unit_rms_norm``.
        muon_fp32_matmul_prec: ``medium`` (bfloat16), ``high`` or ``highest``.
        muon_coefficient_type: Set of Newton-Schulz coefficients.
        muon_num_ns_steps: Newton-Schulz iterations.
        muon_tp_mode: ``owner``, ``distributed``, ``duplicated``, ``auto``, or ``blockwise``, which is not exact.
        muon_extra_scale_factor: Another factor of Muon's update.
        adaptive_muon_moment2_method: ``adamuon``, ``normuon`` or ``namo``.
        adaptive_muon_beta2: Decay of its second moment.
        adaptive_muon_eps: Added to its denominator.
        settings: Those that are not fields, ``{"lion_betas": (0.9, 0.98)}``; each becomes an attribute.

    Raises:
        ValueError: for one of ``settings`` that no registered optimizer has, naming the nearest; for a value of another kind.
    """

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

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """The config with these fields and settings of registered optimizers.

        Raises:
            ValueError: for one that does not exist; names the nearest.
        """
        names = [f.name for f in fields(cls)]
        own = {name: value for name, value in settings.items() if name in names}
        others = {name: value for name, value in settings.items() if name not in names}
        return cls(**{**own, "settings": {**own.get("settings", {}), **others}})


def _setting(name: str) -> Setting:
    # The registry imports this module.
    from .emerging_optimizers import all_settings, takers_of

    if takers := takers_of(name):
        return next(iter(takers.values()))
    valid = [*(f.name for f in fields(OptimizerConfig)), *all_settings()]
    near = [v for v in valid if v.partition("_")[0] == name.partition("_")[0]]
    raise ValueError(unknown("optimizer setting", name, near or valid))


def unknown(what: str, name: str, valid: list[str] | tuple[str, ...]) -> str:
    """An error text for a name that is none of ``valid``, with the nearest ones."""
    near = get_close_matches(name, valid, n=3)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    return f"unknown {what} {name!r}; {hint}possible: {', '.join(sorted(valid))}."


def _several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
