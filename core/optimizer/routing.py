"""Which optimizer and settings each parameter of a model gets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..process_groups_config import ProcessGroupCollection
from .optimizer_config import OptimizerConfig
from .param_key import ParamKey, ParamWithNamePredicate
from .steps.argument_checks import unknown
from .steps.weight_decay import METHOD

Overrides = Mapping[ParamKey, Mapping[str, Any]]

Mask = Callable[[str, nn.Parameter], bool] | str | Sequence[str]
"""Which parameters get weight decay: ``mask(name, param)``, or glob patterns of names (:func:`mask_overrides`)."""


@dataclass(frozen=True)
class Routed:
    """One parameter and what was decided for it.

    Attributes:
        name: Global name of the parameter.
        param: The parameter.
        optimizer: Name of its optimizer.
        settings: Settings of its parameter group besides the optimizer's own defaults.
    """

    name: str
    param: nn.Parameter
    optimizer: str
    settings: tuple[tuple[str, Any], ...]


def route(
    config: OptimizerConfig,
    model_chunks: Sequence[nn.Module],
    defaults: Overrides,
    overrides: Overrides,
    groups: ProcessGroupCollection,
    mask: Mask | None = None,
) -> list[Routed]:
    """Decide for every parameter that requires a gradient.

    ``overrides`` win over ``mask`` and that over ``defaults``, key by key; 1-D parameters get no weight decay unless one of
    these says otherwise. Override keys: ``optimizer``; ``lr`` (or Megatron's ``max_lr``), ``min_lr``, ``lr_mult``,
    ``wd_mult``, ``weight_decay``, ``weight_decay_method``; any other key is an argument that the optimizer keeps per group.

    Raises:
        ValueError: when two overrides disagree, or one, or a pattern of ``mask``, matches no parameter of any pipeline stage,
            or names collide.
    """
    named = _named_parameters(model_chunks)
    masked, patterns = ({}, []) if mask is None else mask_overrides(mask)
    _check_matches(named, [*overrides, *patterns], groups)
    routed = []
    for name, param in named.items():
        settings: dict[str, Any] = {} if param.ndim > 1 else {"wd_mult": 0.0}
        settings |= _combine(name, param, defaults) | _combine(name, param, masked)
        settings |= _combine(name, param, overrides)
        optimizer = settings.pop("optimizer", config.optimizer)
        routed.append(Routed(name, param, optimizer, _group_settings(config, settings)))
    return routed


def param_groups(routed: Sequence[Routed]) -> list[dict[str, Any]]:
    """Parameter groups, named, one for each distinct combination of settings."""
    by_settings: dict[tuple[tuple[str, Any], ...], list[tuple[str, nn.Parameter]]] = {}
    for r in routed:
        by_settings.setdefault(r.settings, []).append((r.name, r.param))
    return [{"params": params, **dict(settings)} for settings, params in by_settings.items()]


def mask_overrides(mask: Mask) -> tuple[dict[ParamKey, dict[str, float]], list[ParamKey]]:
    """``mask`` as overrides of parameter groups: ``wd_mult`` 1 where it holds, 0 elsewhere; and its patterns.

    A pattern selects what is decayed, and one that begins with ``!`` what is not: ``("!*.bias", "!*norm*")`` decays all but
    these. A parameter is decayed if none of the latter match and one of the former does, or there are none.
    """
    given = () if callable(mask) else (mask,) if isinstance(mask, str) else tuple(mask)
    decayed = mask if callable(mask) else _by_patterns(given)
    yes = ParamWithNamePredicate("weight_decay_mask", lambda param, name: bool(decayed(name, param)))
    no = ParamWithNamePredicate("not weight_decay_mask", lambda param, name: not decayed(name, param))
    masked = {ParamKey(with_name_predicate=yes): {"wd_mult": 1.0}, ParamKey(with_name_predicate=no): {"wd_mult": 0.0}}
    return masked, [ParamKey(name=pattern.removeprefix("!")) for pattern in given]


SETTINGS = ("lr", "min_lr", "lr_mult", "wd_mult", "weight_decay", METHOD, "start_wd", "end_wd")
"""Keys that any parameter group may have: schedules and Megatron's scheduler read them."""


def check_settings(name: str, optimizer: Optimizer) -> None:
    """Refuse group settings that the optimizer called ``name`` would ignore.

    Raises:
        ValueError: names the setting, the first parameter it was meant for, and what is possible.
    """
    possible = (*optimizer.defaults, *SETTINGS)
    for group in optimizer.param_groups:
        for setting in group:
            if setting not in (*possible, "params", "param_names"):
                raise ValueError(f"{group['param_names'][0]}: {unknown(f'setting of {name}', setting, possible)}")


def _named_parameters(model_chunks: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    named: dict[str, nn.Parameter] = {}
    for chunk in model_chunks:
        for name, param in chunk.named_parameters():
            if named.setdefault(name, param) is not param:
                raise ValueError(
                    f"two model chunks have a parameter called {name!r}; names must be global (decoder.layers.7…, not "
                    f"numbered from 0 in every chunk), or checkpoints would mix them up."
                )
    # A weight that two chunks share goes by its first name.
    once = {id(param): (name, param) for name, param in reversed(named.items()) if param.requires_grad}
    return dict(reversed(once.values()))


def _by_patterns(given: tuple[str, ...]) -> Callable[[str, nn.Parameter], bool]:
    excluded = [pattern[1:] for pattern in given if pattern.startswith("!")]
    selected = [pattern for pattern in given if not pattern.startswith("!")] or ["*"]

    def decayed(name: str, param: nn.Parameter) -> bool:
        matches = [any(fnmatchcase(name, pattern) for pattern in some) for some in (selected, excluded)]
        return matches[0] and not matches[1]

    return decayed


def _combine(name: str, param: nn.Parameter, overrides: Overrides) -> dict[str, Any]:
    combined: dict[str, Any] = {}
    by: dict[str, ParamKey] = {}
    for key, settings in overrides.items():
        if not key.matches(param, name):
            continue
        for setting, value in settings.items():
            setting = {"max_lr": "lr"}.get(setting, setting)
            value = tuple(value) if isinstance(value, list) else value
            if setting in combined and combined[setting] != value:
                raise ValueError(
                    f"{name}: override '{by[setting]}' sets {setting}={combined[setting]!r} and override '{key}' sets "
                    f"{setting}={value!r}; make one of them match less."
                )
            combined[setting] = value
            by[setting] = key
    return combined


def _check_matches(
    named: Mapping[str, nn.Parameter], overrides: Sequence[ParamKey], groups: ProcessGroupCollection
) -> None:
    here = [any(key.matches(param, name) for name, param in named.items()) for key in overrides]
    stages = groups.domain((groups.axis("pp"),)).gather(here)
    for key, *matched in zip(overrides, *stages, strict=True):
        if not any(matched):
            example = next(iter(named), "none")
            raise ValueError(
                f"override '{key}' matches no parameter of the model; names look like {example!r}, patterns are globs "
                f"(decoder.layers.*.mlp.*)."
            )


def _group_settings(config: OptimizerConfig, settings: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    if config.weight_decay_method is not None:
        settings.setdefault(METHOD, config.weight_decay_method)
    decay = settings.pop("weight_decay", config.weight_decay) * settings.get("wd_mult", 1.0)
    lr = settings.pop("lr", config.lr) * settings.get("lr_mult", 1.0)
    return tuple(sorted({**settings, "weight_decay": decay, "lr": lr}.items()))
