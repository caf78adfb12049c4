"""Routing: the choice of an optimizer and its settings for each parameter of a model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .. import module_names
from ..process_groups_config import ProcessGroupCollection
from .optimizer_config import OptimizerConfig
from .param_key import ParamKey, ParamWithNamePredicate
from .steps.argument_checks import unknown
from .steps.weight_decay import METHOD
from .weight_decay_mask import ByPattern, Mask, without_trees

Overrides = Mapping[ParamKey, Mapping[str, Any]]


@dataclass(frozen=True)
class Routed:
    """One parameter with the optimizer and settings chosen for it.

    Attributes:
        name: Global name of the parameter.
        param: The parameter.
        optimizer: Name of its optimizer.
        settings: Settings of its parameter group besides the optimizer's own defaults; ``lr`` before ``lr_mult``.
        reason: Why it goes to this optimizer, in words.
    """

    name: str
    param: nn.Parameter
    optimizer: str
    settings: tuple[tuple[str, Any], ...]
    reason: str = ""


def route(
    config: OptimizerConfig,
    model_chunks: Sequence[nn.Module],
    defaults: Overrides,
    overrides: Overrides,
    groups: ProcessGroupCollection,
    mask: Mask | None = None,
) -> list[Routed]:
    """Choose an optimizer and settings for every parameter that requires a gradient.

    Setting by setting, ``overrides`` win over ``mask``, and ``mask`` over ``defaults``; 1-D parameters get no weight decay
    unless one of these sets it. Settings of an override: ``optimizer``; ``lr`` (or Megatron's ``max_lr``), ``min_lr``,
    ``lr_mult``, ``wd_mult``, ``weight_decay``, ``weight_decay_method``; any other is an argument that the optimizer keeps per
    group.

    Raises:
        ValueError: when two overrides disagree, when an override or a pattern of ``mask`` matches no parameter of any pipeline
            stage, when a tree of ``mask`` does not fit the parameters, or when names collide.
        TypeError: for a ``mask`` of another kind than :data:`~.weight_decay_mask.Mask`.
    """
    every = named_parameters(model_chunks)
    named = {name: param for name, param in every if param.requires_grad}
    frozen = [name for name, param in every if not param.requires_grad]
    masked, patterns = ({}, []) if mask is None else mask_overrides(without_trees(mask, named, frozen, groups))
    _check_matches(named, [*overrides, *patterns], groups)
    routed = []
    for name, param in named.items():
        settings: dict[str, Any] = {} if param.ndim > 1 else {"wd_mult": 0.0}
        reason = "it is a matrix" if defaults else f"{config.optimizer} takes every parameter"
        if getattr(param, "use_muon", None) is True and defaults:
            reason = "use_muon=True"
        for source, said in ((defaults, ""), (masked, ""), (overrides, "override ")):
            combined, by = _combine(name, param, source)
            settings |= combined
            if "optimizer" in combined:
                reason = f"{said}{by['optimizer'].why(param, name)}"
        optimizer = settings.pop("optimizer", config.optimizer)
        routed.append(Routed(name, param, optimizer, _group_settings(config, settings), reason))
    return routed


def param_groups(routed: Sequence[Routed]) -> list[dict[str, Any]]:
    """Parameter groups with parameter names, one group for each distinct combination of settings."""
    by_settings: dict[tuple[tuple[str, Any], ...], list[tuple[str, nn.Parameter]]] = {}
    for r in routed:
        by_settings.setdefault(r.settings, []).append((r.name, r.param))
    groups = [{"params": params, **dict(settings)} for settings, params in by_settings.items()]
    for group in groups:
        if group.get("lr_mult", 1.0) != 1.0:
            group["lr"] = group["lr"] * group["lr_mult"]
    return groups


def mask_overrides(mask: ByPattern) -> tuple[dict[ParamKey, dict[str, float]], list[ParamKey]]:
    """``mask`` as overrides that set ``wd_mult`` to 1 where it holds and to 0 elsewhere; and keys of its patterns.

    A pattern selects parameters to decay; a pattern that begins with ``!`` excludes parameters: ``("!*.bias", "!*norm*")``
    decays all but these. A parameter is decayed if no excluding pattern matches it and a selecting one does; without
    selecting patterns, all are selected.
    """
    patterns = () if callable(mask) else mask
    decayed = mask if callable(mask) else _by_patterns(patterns)
    yes = ParamWithNamePredicate("weight_decay_mask", lambda param, name: bool(decayed(name, param)))
    no = ParamWithNamePredicate("not weight_decay_mask", lambda param, name: not decayed(name, param))
    masked = {ParamKey(with_name_predicate=yes): {"wd_mult": 1.0}, ParamKey(with_name_predicate=no): {"wd_mult": 0.0}}
    return masked, [ParamKey(name=pattern.removeprefix("!")) for pattern in patterns]


SETTINGS = ("lr", "min_lr", "lr_mult", "wd_mult", "weight_decay", METHOD, "start_wd", "end_wd")
"""Keys that any parameter group may have, because schedules or Megatron's scheduler read them."""


def check_settings(name: str, optimizer: Optimizer) -> None:
    """Refuse group settings that ``optimizer``, registered as ``name``, would ignore.

    Raises:
        ValueError: names the setting, the first parameter it was meant for, and what is possible.
    """
    possible = (*optimizer.defaults, *SETTINGS)
    for group in optimizer.param_groups:
        for setting in group:
            if setting not in (*possible, "params", "param_names"):
                raise ValueError(f"{group['param_names'][0]}: {unknown(f'setting of {name}', setting, possible)}")


def named_parameters(model_chunks: Sequence[nn.Module]) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter of every parameter of this rank, each once, frozen ones too.

    Raises:
        ValueError: when two chunks have different parameters of one name.
    """
    named: dict[str, nn.Parameter] = {}
    for chunk in model_chunks:
        for name, param in module_names.named_parameters([chunk]):
            if named.setdefault(name, param) is not param:
                raise ValueError(
                    f"two model chunks have a parameter called {name!r}; names must be global (decoder.layers.7…, not "
                    f"numbered from 0 in every chunk), or checkpoints would mix them up."
                )
    # A weight that two chunks share keeps its first name.
    once = {id(param): (name, param) for name, param in reversed(named.items())}
    return list(reversed(once.values()))


def _by_patterns(patterns: tuple[str, ...]) -> Callable[[str, nn.Parameter], bool]:
    excluded = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    selected = [pattern for pattern in patterns if not pattern.startswith("!")] or ["*"]

    def decayed(name: str, param: nn.Parameter) -> bool:
        is_selected, is_excluded = (any(fnmatchcase(name, pattern) for pattern in ps) for ps in (selected, excluded))
        return is_selected and not is_excluded

    return decayed


def _combine(name: str, param: nn.Parameter, overrides: Overrides) -> tuple[dict[str, Any], dict[str, ParamKey]]:
    """The settings of all ``overrides`` that select the parameter, and for each the first of them that sets it."""
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
            by.setdefault(setting, key)
    return combined, by


def _check_matches(
    named: Mapping[str, nn.Parameter], overrides: Sequence[ParamKey], groups: ProcessGroupCollection
) -> None:
    matches = [any(key.matches(param, name) for name, param in named.items()) for key in overrides]
    stages = groups.domain((groups.axis("pp"),)).gather(matches)
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
    return tuple(sorted({"lr": config.lr, **settings, "weight_decay": decay}.items()))
