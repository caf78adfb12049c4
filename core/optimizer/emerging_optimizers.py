"""Counterpart of Megatron-Core's module of this name, with the names it exports; :func:`get_optimizer` builds an optimizer.

To add an optimizer, see :mod:`.registry`.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..linalg.coefficients import COEFFICIENT_SETS
from ..process_groups_config import ProcessGroupCollection
from ..sharding.parameter_layout import layout_of
from .chained import ChainedOptimizer
from .expectation import Choice, check_expected
from .optimizer_config import OptimizerConfig
from .registry import (
    _EMERGING_OPTIMIZERS,
    EmergingOptimizerEntry,
    _adaptive_muon_config_to_kwargs,
    _default_adam_based_eopt_config_to_kwargs,
    _default_param_overrides_factory,
    _eopt_init_state_fn,
    _get_qkv_split_shapes,
    _is_nonlinear_or_embedding,
    _kwargs_from_config,
    _muon_config_to_kwargs,
    entry_of,
    list_optimizers,
    missing_optimizers,
    needs_l2,
    register_optimizer,
)
from .roles import structural_overrides
from .routing import Overrides, Routed, check_settings, named_parameters, param_groups, route
from .rules.adaptive_muon import TensorParallelAdaptiveMuon
from .rules.parts.ns_coefficients import CUSTOM
from .rules.tensor_parallel_muon import TensorParallelMuon
from .steps.weight_decay import METHOD
from .weight_decay_mask import Mask

__all__ = [
    "_EMERGING_OPTIMIZERS",
    "EmergingOptimizerEntry",
    "TensorParallelAdaptiveMuon",
    "TensorParallelMuon",
    "_adaptive_muon_config_to_kwargs",
    "_create_emerging_optimizer",
    "_default_adam_based_eopt_config_to_kwargs",
    "_default_param_overrides_factory",
    "_eopt_init_state_fn",
    "_get_qkv_split_shapes",
    "_is_nonlinear_or_embedding",
    "_kwargs_from_config",
    "_muon_config_to_kwargs",
    "get_optimizer",
    "get_supported_coefficient_types",
    "list_optimizers",
    "logger",
    "missing_optimizers",
    "register_optimizer",
    "validate_coefficient_type",
]


logger = logging.getLogger(__name__)
"""Logs, at level INFO, how many parameters of this rank each optimizer is given."""


def get_supported_coefficient_types() -> tuple[str, ...]:
    """Names of the sets of Newton-Schulz coefficients, and ``custom``."""
    return (*COEFFICIENT_SETS, CUSTOM)


def validate_coefficient_type(coefficient_type: str) -> None:
    """Raise ValueError, naming the supported types, unless ``coefficient_type`` is among them."""
    supported = get_supported_coefficient_types()
    if coefficient_type not in supported:
        raise ValueError(f"Unsupported muon coefficient type '{coefficient_type}'. Supported types: {supported}")


def _create_emerging_optimizer(
    config: Any, param_groups: Any, eopt_name: str, model_chunks: Sequence[nn.Module], pg_collection: Any
) -> tuple[Optimizer, Callable[..., None]]:
    """Build the optimizer called ``eopt_name`` for ``param_groups``; returns it and the function that makes its state."""
    entry = entry_of(eopt_name)
    to_kwargs = entry.config_to_kwargs or partial(_default_adam_based_eopt_config_to_kwargs, eopt_name)
    return entry.optimizer_cls(param_groups, **to_kwargs(config, model_chunks, pg_collection)), entry.init_state_fn


def get_optimizer(
    config: OptimizerConfig,
    model_chunks: nn.Module | Sequence[nn.Module],
    pg_collection: ProcessGroupCollection | None = None,
    param_overrides: Overrides | None = None,
    weight_decay_mask: Mask | None = None,
    expect: int | str | None = None,
) -> ChainedOptimizer:
    """Build the optimizer of a model; ``config.optimizer``, its entry's overrides and ``param_overrides`` select it by parameter.

    Args:
        config: Optimizer name and settings.
        model_chunks: This rank's module or modules; parameter names must be global.
        pg_collection: Process groups, ours or Megatron-Core's. Pipeline stages and plain tensors with Megatron's attributes
            need them; DTensors (``fully_shard``, ``parallelize_module``) do not, since each carries its mesh.
        param_overrides: Settings for the parameters that a key selects, ``{"optimizer": "adamw", "lr": 1e-3}``; they win
            over the entry's own.
        weight_decay_mask: Which parameters get weight decay (:data:`~.weight_decay_mask.Mask`): ``mask(name, param)``; patterns
            of names, of which ``"!*.bias"`` excludes; or True or False by name, as a flat or nested mapping, or as a function of
            all parameters that returns one. None: those that are not 1-D. Overrides that set ``wd_mult`` win over it.
        expect: Least number of matrices that must go to an optimizer of matrices, over all pipeline stages; or a glob pattern of
            the names that must. An optimizer of matrices is one that leaves other parameters to Adam.

    Raises:
        ValueError: for an unknown name, a missing learning rate, a model without trainable parameters, or overrides that
            contradict each other or match nothing; for a mask that does not fit the parameters.
        UnexpectedRoutingError: on all ranks, when parameters do not go where ``expect`` says; lists them, and why. It is a
            ValueError too.
        TypeError: for a mask of another kind.
    """
    if config.lr is None:
        raise ValueError("config.lr is None; give the learning rate.")
    model_chunks = [model_chunks] if isinstance(model_chunks, nn.Module) else model_chunks
    groups = ProcessGroupCollection() if pg_collection is None else ProcessGroupCollection.from_any(pg_collection)
    defaults = entry_of(config.optimizer).default_param_overrides
    if defaults:
        # The keys that stand first give the reasons.
        defaults = {**structural_overrides(model_chunks, groups), **defaults}
    routed = route(config, model_chunks, defaults, param_overrides or {}, groups, weight_decay_mask)
    decoupled = {"adam": "adamw"} if config.decoupled_weight_decay else {}
    routed = [replace(r, optimizer=decoupled.get(r.optimizer, r.optimizer)) for r in routed]
    if expect is not None:
        choices = groups.domain((groups.axis("pp"),)).gather(_choices(model_chunks, routed, groups))
        check_expected(expect, list({choice.name: choice for stage in choices for choice in stage}.values()))
    members: dict[str, Optimizer] = {}
    stages = groups.domain((groups.axis("pp"),)).gather(list(dict.fromkeys(r.optimizer for r in routed)))
    # All stages use one order, because a norm over the whole model is a collective of its own.
    for name in dict.fromkeys(name for stage in stages for name in stage):
        member_groups = param_groups([r for r in routed if r.optimizer == name])
        # A stage with no parameter for an optimizer of other stages takes part in its collectives.
        member_groups = member_groups or [{"params": [], "param_names": [], "lr": config.lr}]
        if needs_l2(name, config):
            member_groups = [{METHOD: "l2", **group} for group in member_groups]
        optimizer, init_state = _create_emerging_optimizer(config, member_groups, name, model_chunks, groups)
        check_settings(name, optimizer)
        init_state(optimizer, config)
        members[name] = optimizer
        logger.info("%s steps %d parameters of this rank", name, sum(len(group["params"]) for group in member_groups))
    if not members:
        raise ValueError(
            "no parameter of the model, on any pipeline stage, requires a gradient; call requires_grad_(True) on those that are "
            "to be trained, before the optimizer is built."
        )
    reasons = {r.name: r.reason for r in routed}
    return ChainedOptimizer(members, groups, bystanders=named_parameters(model_chunks), reasons=reasons)


def _choices(
    model_chunks: Sequence[nn.Module], routed: Sequence[Routed], groups: ProcessGroupCollection
) -> list[Choice]:
    """What was chosen for each parameter of this rank; nothing for those that are frozen."""
    chosen = {id(r.param): r for r in routed}
    choices = []
    for name, p in named_parameters(model_chunks):
        shape = layout_of(p, groups, name=name).shape
        if (r := chosen.get(id(p))) is None:
            choices.append(Choice(name, shape, "no optimizer", "it requires no gradient", False))
        else:
            by_matrix = p.ndim == 2 and bool(entry_of(r.optimizer).default_param_overrides)
            choices.append(Choice(r.name, shape, r.optimizer, r.reason, by_matrix))
    return choices
