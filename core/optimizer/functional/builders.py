"""Builders, which make a functional optimizer with a step for pipeline stages out of settings and a schedule."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
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
    StageLocalGradientTransformation,
    StageLocalOptimizerMetadata,
    make_stage_local_gradient_transformation,
    make_unsupported_stage_local_gradient_transformation,
    stage_local_step,
)
from .transformations import Accumulated, Clipped, Transformation, optimizer_of

__all__ = ["OptimizerBuilder", "RegistryBuilder", "make_transformation", "register_optimizer"]

EXTRA = ("none_grads",)
"""Arguments of ``RegistryBuilder.build_mpmd`` besides the fields of the metadata."""


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
        super().__init__(config if config.lr is not None else replace(config, lr=1.0))
        self._groups = _collection(pg_collection)
        self._overrides, self._mask = param_overrides, weight_decay_mask
        self._donate = donate

    def validate(self) -> None:
        """Raise ValueError for an unknown optimizer, or for settings that its constructor refuses."""
        probe = nn.Parameter(torch.empty(1024, 1024, dtype=torch.float32, device="meta"))
        get_optimizer(self.config, [_Named({"probe": probe})])

    def build(self, scheduler: Schedule) -> FunctionalOptimizer:
        """As in the base class; the optimizer includes weight decay, by parameter group."""
        return self._functional(scheduler, self.config, self._mask)

    def build_mpmd(
        self, scheduler: Schedule, *, optimizer: Transformation, **tx_kwargs: Any
    ) -> StageLocalGradientTransformation:
        """As in the base class.

        A ``weight_decay`` or ``weight_decay_mask`` that differs from the builder's affects only the stage-local step;
        ``optimizer.update`` stays as it is. One more argument is ``none_grads`` (:data:`.as_functions.NoneGrads`).

        Raises:
            ValueError: for an unknown argument.
            NotImplementedError: when ``optimizer`` was not made by :meth:`build`.
        """
        known = ("weight_decay", "weight_decay_mask", "gradient_accumulation_steps", "clip_grad")
        if unknown := sorted(tx_kwargs.keys() - {*known, *EXTRA}):
            raise ValueError(f"build_mpmd does not know {unknown}; possible: {', '.join((*known, *EXTRA))}.")
        inner = optimizer_of(optimizer)
        if inner is None:
            raise NotImplementedError(f"{type(optimizer).__name__} holds no optimizer that build(scheduler) made.")
        decay = tx_kwargs.get("weight_decay", self.config.weight_decay)
        mask = tx_kwargs.get("weight_decay_mask", self._mask)
        if (decay, mask) != (self.config.weight_decay, self._mask):
            inner = self._functional(scheduler, replace(self.config, weight_decay=decay), mask)
        config, is_adam = self.config, self.config.optimizer in ("adam", "adamw")
        metadata = StageLocalOptimizerMetadata(
            scheduler,
            decay,
            mask,
            tx_kwargs.get("gradient_accumulation_steps", 1),
            tx_kwargs.get("clip_grad"),
            adamw_b1=config.adam_beta1 if is_adam else None,
            adamw_b2=config.adam_beta2 if is_adam else None,
            adamw_eps=config.adam_eps if is_adam else None,
            adamw_eps_root=config.settings.get("adam_eps_root", 0.0) if is_adam else None,
            adamw_mu_dtype=config.settings.get("adam_mu_dtype") if is_adam else None,
            optimizer_config=config,
            extra_kwargs={k: v for k, v in tx_kwargs.items() if k in EXTRA} | {"pg_collection": self._groups},
        )
        return make_stage_local_gradient_transformation(optimizer, metadata, stage_local_step(inner))

    def _functional(self, scheduler: Schedule, config: OptimizerConfig, mask: Mask | None) -> FunctionalOptimizer:
        def make(params: dict[str, nn.Parameter]) -> Optimizer:
            return get_optimizer(config, [_Named(params)], self._groups, self._overrides, mask)

        assert config.lr is not None
        return FunctionalOptimizer(make, scheduler, lr=config.lr, donate=self._donate)


def make_transformation(
    config: OptimizerConfig,
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
        config: Optimizer name and settings.
        scheduler: Number of finished steps → learning rate.
        weight_decay: Coefficient that replaces ``config.weight_decay``; None keeps that one.
        weight_decay_mask: Parameters to decay, as for ``get_optimizer``.
        gradient_accumulation_steps: Micro-steps per step; a stage-local step raises if there are several.
        clip_grad: Largest global norm of the gradients; None or 0: no clipping.
        pg_collection: Process groups of the model.
        param_overrides: Overrides, as for ``get_optimizer``.
        donate: Whether tensors are reused, as for :class:`FunctionalOptimizer`.
        extra_kwargs: Further arguments of the builder's ``build_mpmd``.

    Raises:
        ValueError: for invalid settings.
    """
    groups = _collection(pg_collection)
    if weight_decay is not None:
        config = replace(config, weight_decay=weight_decay)
    own = entry_of(config.optimizer).builder
    builder: OptimizerBuilder = (
        own(config)
        if own is not None
        else RegistryBuilder(
            config,
            pg_collection=groups,
            param_overrides=param_overrides,
            weight_decay_mask=weight_decay_mask,
            donate=donate,
        )
    )
    builder.validate()
    tx = builder.build(scheduler)
    if clip_grad:
        tx = Clipped(tx, clip_grad, groups)
    if gradient_accumulation_steps != 1:
        tx = Accumulated(tx, gradient_accumulation_steps)
    try:
        return builder.build_mpmd(
            scheduler,
            optimizer=tx,
            weight_decay=config.weight_decay,
            weight_decay_mask=weight_decay_mask,
            gradient_accumulation_steps=gradient_accumulation_steps,
            clip_grad=clip_grad,
            **extra_kwargs,
        )
    except NotImplementedError as error:
        return make_unsupported_stage_local_gradient_transformation(
            tx, optimizer_type=config.optimizer, reason=str(error)
        )


def _collection(pg_collection: Any) -> ProcessGroupCollection:
    """Convert process groups; call it once per optimizer, because the result keeps the joint groups made of its axes."""
    return ProcessGroupCollection() if pg_collection is None else ProcessGroupCollection.from_any(pg_collection)


class _Named(nn.Module):
    """A module whose parameters have arbitrary names, also such as torch does not allow for registered ones."""

    def __init__(self, params: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self._named: Sequence[tuple[str, nn.Parameter]] = list(params.items())

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters with their names."""
        return iter(self._named)
