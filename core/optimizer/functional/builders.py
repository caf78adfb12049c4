"""Builders, which make a functional optimizer with a step for pipeline stages out of settings and a schedule."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from ...process_groups_config import ProcessGroupCollection
from ..emerging_optimizers import get_optimizer, register_optimizer
from ..optimizer_config import OptimizerConfig
from ..registry import entry_of
from ..routing import Overrides
from ..weight_decay_mask import Mask
from .as_functions import FunctionalOptimizer, Schedule
from .stage_local import (
    StageLocalApplyFn,
    StageLocalGradientTransformation,
    StageLocalOptimizerMetadata,
    make_stage_local_gradient_transformation,
    make_unsupported_stage_local_gradient_transformation,
    stage_local_step,
)
from .transformations import Accumulated, Clipped, Transformation, optimizer_of

__all__ = ["OptimizerBuilder", "RegistryBuilder", "make_transformation", "register_optimizer"]

IN_METADATA = ("weight_decay", "weight_decay_mask", "gradient_accumulation_steps", "clip_grad")
"""Arguments of ``build_mpmd`` that are fields of the metadata; others are put into its ``extra_kwargs``."""

READ = ("none_grads", "pg_collection")
"""Entries of ``extra_kwargs`` that the step of a stage reads."""


class OptimizerBuilder:
    """Base of builders; register a subclass to build an optimizer in another way than :class:`RegistryBuilder`::

        @register_optimizer("mine")
        class MineBuilder(OptimizerBuilder):
            optimizer_cls = Mine

            def build(self, scheduler): ...

    Args:
        config: Settings; its ``optimizer`` is the registered name.

    Attributes:
        optimizer_cls: The ``torch.optim.Optimizer`` class that ``get_optimizer`` builds for this name.
    """

    optimizer_cls: ClassVar[type[Optimizer] | None] = None

    def __init__(self, config: Any) -> None:
        self.config = config

    def validate(self) -> None:
        """Raise ValueError for invalid settings."""

    def build(self, scheduler: Schedule) -> Transformation:
        """Build the optimizer alone, without clipping or accumulation.

        Args:
            scheduler: Number of finished steps → learning rate.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement build(scheduler).")

    def build_mpmd(
        self, scheduler: Schedule, *, optimizer: Transformation, **tx_kwargs: Any
    ) -> StageLocalGradientTransformation:
        """Give ``optimizer`` a step for pipeline stages.

        Args:
            scheduler: The schedule, as for :meth:`build`.
            optimizer: The result of :meth:`build`, possibly wrapped for clipping and accumulation.
            tx_kwargs: ``weight_decay``, ``weight_decay_mask``, ``gradient_accumulation_steps``, ``clip_grad`` and others.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not implement build_mpmd(...); override it to step pipeline stages one by one."
        )

    def with_weight_decay(self, weight_decay: float | None, weight_decay_mask: Mask | None) -> "OptimizerBuilder":
        """The builder of the same optimizer with this weight decay, which :meth:`build` includes; None keeps what it has.

        Raises:
            ValueError: if the builder cannot do that.
        """
        raise ValueError(
            f"{type(self).__name__} takes no weight decay from outside (weight_decay={weight_decay}); set it in the builder's "
            f"config, or override with_weight_decay(weight_decay, weight_decay_mask)."
        )


def _build_metadata_mpmd_optimizer(
    config: Any,
    scheduler: Schedule,
    *,
    optimizer: Transformation,
    stage_local_apply: StageLocalApplyFn,
    **tx_kwargs: Any,
) -> StageLocalGradientTransformation:
    """Give ``optimizer`` the step ``stage_local_apply`` for pipeline stages, with metadata of a config and of arguments.

    Args:
        config: Settings; ``b1``, ``b2``, ``eps``, ``eps_root`` and ``mu_dtype`` are put into the metadata if it has them.
        scheduler: Number of finished steps → learning rate.
        optimizer: The functional optimizer; its ``init`` and ``update`` do not change.
        stage_local_apply: The step; see :data:`~.stage_local.StageLocalApplyFn`.
        tx_kwargs: :data:`IN_METADATA`; all others become ``extra_kwargs`` of the metadata.
    """
    metadata = StageLocalOptimizerMetadata(
        scheduler,
        weight_decay=float(tx_kwargs.get("weight_decay", 0.0)),
        weight_decay_mask=tx_kwargs.get("weight_decay_mask"),
        gradient_accumulation_steps=int(tx_kwargs.get("gradient_accumulation_steps", 1)),
        clip_grad=tx_kwargs.get("clip_grad"),
        **_adam_settings(config),
        optimizer_config=config,
        extra_kwargs={k: v for k, v in tx_kwargs.items() if k not in IN_METADATA},
    )
    return make_stage_local_gradient_transformation(optimizer, metadata, stage_local_apply)


def _adam_settings(config: Any) -> dict[str, Any]:
    """The fields of the metadata that begin with ``adamw_``."""
    names = ("b1", "b2", "eps", "eps_root", "mu_dtype")
    if not isinstance(config, OptimizerConfig):
        return {f"adamw_{name}": getattr(config, name, None) for name in names}
    if config.optimizer not in ("adam", "adamw"):
        return {}
    root, dtype = config.settings.get("adam_eps_root", 0.0), config.settings.get("adam_mu_dtype")
    values = (config.adam_beta1, config.adam_beta2, config.adam_eps, root, dtype)
    return {f"adamw_{name}": value for name, value in zip(names, values, strict=True)}


class RegistryBuilder(OptimizerBuilder):
    """The builder of every optimizer in the registry.

    Args:
        config: Optimizer name and settings. Under a schedule, learning rates of parameter groups keep their ratio to its
            ``lr``; None means 1.
        pg_collection: Process groups, as for ``get_optimizer``; ``init`` communicates over them, and a step only if the
            optimizer or the clipping does.
        param_overrides: Overrides, as for ``get_optimizer``.
        weight_decay_mask: Mask, as for ``get_optimizer``.
        donate: Whether tensors are reused, as for :class:`FunctionalOptimizer`.

    Attributes:
        pg_collection: The process groups.
        settings: What ``get_optimizer`` is given; here the config.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        *,
        pg_collection: ProcessGroupCollection | None = None,
        param_overrides: Overrides | None = None,
        weight_decay_mask: Mask | None = None,
        donate: bool = False,
    ) -> None:
        self.settings: OptimizerConfig = config if config.lr is not None else replace(config, lr=1.0)
        super().__init__(self.settings)
        self.pg_collection = _collection(pg_collection)
        self._overrides, self._mask = dict(param_overrides or {}), weight_decay_mask
        self._donate = donate

    def validate(self) -> None:
        """Raise ValueError for an unknown optimizer, or for settings that its constructor refuses."""
        probe = nn.Parameter(torch.empty(1024, 1024, dtype=torch.float32, device="meta"))
        get_optimizer(self.settings, [Named({"probe": probe})])

    def with_weight_decay(self, weight_decay: float | None, weight_decay_mask: Mask | None) -> "RegistryBuilder":
        """As in the base class."""
        other = copy(self)
        if weight_decay is not None:
            other.settings = replace(self.settings, weight_decay=weight_decay)
            other.config = other.settings if self.config is self.settings else self.config
        if weight_decay_mask is not None:
            other._mask = weight_decay_mask
        return other

    def build(self, scheduler: Schedule) -> FunctionalOptimizer:
        """As in the base class; the optimizer includes weight decay, by parameter group."""
        assert self.settings.lr is not None
        return FunctionalOptimizer(self.optimizer_for, scheduler, lr=self.settings.lr, donate=self._donate)

    def optimizer_for(self, params: dict[str, nn.Parameter]) -> Optimizer:
        """The ``torch.optim.Optimizer`` of these parameters."""
        return get_optimizer(self.settings, [Named(params)], self.pg_collection, self._overrides, self._mask)

    def build_mpmd(
        self, scheduler: Schedule, *, optimizer: Transformation, **tx_kwargs: Any
    ) -> StageLocalGradientTransformation:
        """As in the base class.

        A ``weight_decay`` or ``weight_decay_mask`` that is not None and differs from the builder's affects only the stage-local
        step; ``optimizer.update`` stays as it is. One more argument is ``none_grads`` (:data:`.as_functions.NoneGrads`);
        others are put into the metadata and have no effect.

        Raises:
            ValueError: for an argument whose name is almost that of a known one.
            NotImplementedError: when ``optimizer`` was not made by :meth:`build`.
        """
        possible = (*IN_METADATA, *READ)
        for name in tx_kwargs.keys() - {*possible}:
            if near := get_close_matches(name, possible, n=1, cutoff=0.75):
                raise ValueError(
                    f"build_mpmd does not read {name!r}; did you mean {near[0]!r}? It reads {', '.join(possible)}."
                )
        inner = optimizer_of(optimizer)
        if inner is None:
            raise NotImplementedError(f"{type(optimizer).__name__} holds no optimizer that build(scheduler) made.")
        decay, mask = (tx_kwargs.get(name) for name in ("weight_decay", "weight_decay_mask"))
        decay = self.settings.weight_decay if decay is None else decay
        mask = self._mask if mask is None else mask
        if (decay, mask) != (self.settings.weight_decay, self._mask):
            inner = self.with_weight_decay(decay, mask).build(scheduler)
        given = {"pg_collection": self.pg_collection, **tx_kwargs, "weight_decay": decay, "weight_decay_mask": mask}
        return _build_metadata_mpmd_optimizer(
            self.config, scheduler, optimizer=optimizer, stage_local_apply=stage_local_step(inner), **given
        )


def make_transformation(
    config: OptimizerConfig | OptimizerBuilder,
    scheduler: Schedule,
    *,
    weight_decay: float | None = None,
    weight_decay_mask: Mask | None = None,
    gradient_accumulation_steps: int = 1,
    clip_grad: float | None = None,
    pg_collection: ProcessGroupCollection | None = None,
    param_overrides: Overrides | None = None,
    donate: bool = False,
    **extra_kwargs: Any,
) -> StageLocalGradientTransformation:
    """The optimizer that ``config`` names, as functions, with a step for pipeline stages.

    ``update`` averages the gradients of ``gradient_accumulation_steps`` calls, clips the mean and steps, including weight
    decay; ``apply_gradients_stage_local`` clips and steps.

    Args:
        config: Optimizer name and settings; or a builder, such as those of :mod:`.config_builders`.
        scheduler: Number of finished steps → learning rate.
        weight_decay: Coefficient that replaces ``config.weight_decay``; None keeps that one.
        weight_decay_mask: Parameters to decay, as for ``get_optimizer``.
        gradient_accumulation_steps: Micro-steps per step; a stage-local step raises if there are several.
        clip_grad: Largest global norm of the gradients; None or 0: no clipping.
        pg_collection: Process groups of the model; a builder has its own.
        param_overrides: Overrides, as for ``get_optimizer``; a builder has its own.
        donate: Whether tensors are reused, as for :class:`FunctionalOptimizer`; a builder has its own.
        extra_kwargs: Further arguments of the builder's ``build_mpmd``.

    Raises:
        ValueError: for invalid settings.
        TypeError: for an argument that the given builder has already.
    """
    if isinstance(config, OptimizerBuilder):
        if pg_collection is not None or param_overrides is not None or donate:
            raise TypeError(
                f"pg_collection, param_overrides and donate belong to the builder; give them to {type(config).__name__}(...)."
            )
        builder, name = config, type(config).__name__
        if weight_decay is not None or weight_decay_mask is not None:
            builder = builder.with_weight_decay(weight_decay, weight_decay_mask)
    else:
        config = config if weight_decay is None else replace(config, weight_decay=weight_decay)
        builder, name = _builder_of(config, pg_collection, param_overrides, weight_decay_mask, donate), config.optimizer
    groups = getattr(builder, "pg_collection", None) or _collection(pg_collection)
    builder.validate()
    tx = builder.build(scheduler)
    if clip_grad:
        tx = Clipped(tx, clip_grad, groups)
    if gradient_accumulation_steps != 1:
        tx = Accumulated(tx, gradient_accumulation_steps)
    if not isinstance(builder, RegistryBuilder):  # those know their weight decay
        coefficient = weight_decay if isinstance(config, OptimizerBuilder) else config.weight_decay
        extra_kwargs |= {"weight_decay": coefficient or 0.0, "weight_decay_mask": weight_decay_mask}
    try:
        return builder.build_mpmd(
            scheduler,
            optimizer=tx,
            gradient_accumulation_steps=gradient_accumulation_steps,
            clip_grad=clip_grad,
            **extra_kwargs,
        )
    except NotImplementedError as error:
        return make_unsupported_stage_local_gradient_transformation(tx, optimizer_type=name, reason=str(error))


def _builder_of(
    config: OptimizerConfig,
    pg_collection: ProcessGroupCollection | None,
    param_overrides: Overrides | None,
    mask: Mask | None,
    donate: bool,
) -> OptimizerBuilder:
    own = entry_of(config.optimizer).builder
    if own is not None:
        built: OptimizerBuilder = own(config)
        return built
    return RegistryBuilder(
        config,
        pg_collection=pg_collection,
        param_overrides=param_overrides,
        weight_decay_mask=mask,
        donate=donate,
    )


def _collection(pg_collection: Any) -> ProcessGroupCollection:
    """Convert process groups; call it once per optimizer, because the result keeps the joint groups made of its axes."""
    return ProcessGroupCollection() if pg_collection is None else ProcessGroupCollection.from_any(pg_collection)


class Named(nn.Module):
    """A module whose parameters have arbitrary names, also such as torch does not allow for registered ones.

    Where names are paths of modules, these modules exist, so that parameters are routed as those of the model are.
    """

    def __init__(self, params: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self._named: Sequence[tuple[str, nn.Parameter]] = list(params.items())
        for name, p in self._named:
            *path, last = name.split(".")
            # torch has no modules or parameters of some names; such parameters are known by their names alone.
            with suppress(KeyError):
                module: nn.Module = self
                for part in path:
                    if part not in module._modules:
                        module.add_module(part, nn.Module())
                    module = module.get_submodule(part)
                if path:
                    module.register_parameter(last, p)

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters with their names."""
        return iter(self._named)
