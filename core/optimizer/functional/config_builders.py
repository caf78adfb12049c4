"""Builders of the optimizers that the configs of :mod:`.configs` describe, under eFormer's names.

``build(scheduler)`` gives the optimizer with the weight decay that it has by itself. ``weight_decay`` and ``weight_decay_mask``
of ``make_transformation`` and ``build_mpmd`` add another one to it; that mask is of that one alone. No mask means all parameters
here, 1-D ones too.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from ...process_groups_config import ProcessGroupCollection
from ..emerging_optimizers import get_optimizer
from ..optimizer_config import OptimizerConfig
from ..param_key import ParamKey, ParamWithNamePredicate
from ..routing import Overrides, mask_overrides
from ..weight_decay_mask import Mask, without_trees
from .builders import Named, RegistryBuilder
from .configs import (
    AdafactorConfig,
    AdamWConfig,
    Config,
    LionConfig,
    MarsConfig,
    MuonConfig,
    RMSPropConfig,
    WhiteKronConfig,
)


class ConfigBuilder(RegistryBuilder):
    """Base of the builders of this module.

    Args:
        config: A ``config_cls``.
        pg_collection: Process groups, as for :class:`RegistryBuilder`.
        param_overrides: Overrides, as for ``get_optimizer``.
        donate: Whether tensors are reused, as for :class:`~.as_functions.FunctionalOptimizer`.

    Attributes:
        config_cls: Class of the config.
        name: Registered name of the optimizer.

    Raises:
        TypeError: for a config of another class.
        ValueError: for a value out of range.
        NotImplementedError: for a field whose value our optimizer cannot follow.
    """

    config_cls: ClassVar[type[Config]]
    name: ClassVar[str]

    def __init__(
        self,
        config: Config,
        *,
        pg_collection: ProcessGroupCollection | None = None,
        param_overrides: Overrides | None = None,
        donate: bool = False,
    ) -> None:
        if not isinstance(config, self.config_cls):
            raise TypeError(
                f"{type(self).__name__} is given a {type(config).__name__}; give it a {self.config_cls.__name__}."
            )
        settings = OptimizerConfig.from_dict(
            {"optimizer": self.name, "weight_decay": 0.0, **config.settings(self.name)}
        )
        super().__init__(settings, pg_collection=pg_collection, param_overrides=param_overrides, donate=donate)
        self.config = config

    def with_weight_decay(self, weight_decay: float | None, weight_decay_mask: Mask | None) -> RegistryBuilder:
        """As in the base class; in addition to the optimizer's own weight decay.

        Raises:
            ValueError: for a mask without a weight decay from outside.
        """
        if weight_decay is None and weight_decay_mask is not None and not self.settings.weight_decay:
            raise ValueError(
                f"weight_decay_mask is given without weight_decay; it masks only what is added to the weight decay that "
                f"{self.config_cls.__name__} has. Give weight_decay too."
            )
        return super().with_weight_decay(weight_decay, weight_decay_mask)

    def optimizer_for(self, params: dict[str, nn.Parameter]) -> Optimizer:
        """As in the base class; each parameter's weight decay is the sum of the optimizer's own and that from outside."""
        masks = [_overrides(mask, params, self.pg_collection) for mask in (self.config.own_decay_mask, self._mask)]
        (own, own_patterns), (outside, outside_patterns) = masks
        decay = {
            id(p): self.config.own_decay(p) * own.matches(p, name)
            + self.settings.weight_decay * outside.matches(p, name)
            for name, p in params.items()
        }
        # Keys of patterns that set nothing, for the check that each of them matches a parameter.
        overrides: dict[ParamKey, Mapping[str, Any]] = {key: {} for key in (*own_patterns, *outside_patterns)}
        for stage in self.pg_collection.domain((self.pg_collection.axis("pp"),)).gather(sorted({*decay.values()})):
            overrides |= {_with_decay(decay, value): {"weight_decay": value} for value in stage}
        overrides |= self._overrides
        return get_optimizer(self.settings, [Named(params)], self.pg_collection, overrides, _everything)


def _overrides(
    mask: Mask | None, params: dict[str, nn.Parameter], groups: ProcessGroupCollection
) -> tuple[ParamKey, list[ParamKey]]:
    """The key that selects what ``mask`` selects, which is all for None; and keys of the mask's patterns."""
    masked, patterns = mask_overrides(_everything if mask is None else without_trees(mask, params, (), groups))
    return next(key for key, settings in masked.items() if settings["wd_mult"]), patterns


def _with_decay(decay: Mapping[int, float], value: float) -> ParamKey:
    return ParamKey(
        with_name_predicate=ParamWithNamePredicate(f"weight decay {value}", lambda p, name: decay[id(p)] == value)
    )


def _everything(name: str, param: nn.Parameter) -> bool:
    return True


class AdamWOptimizer(ConfigBuilder):
    """AdamW; ``build`` gives it without weight decay."""

    config_cls, name = AdamWConfig, "adamw"


class AdafactorOptimizer(ConfigBuilder):
    """Adafactor in optax's form."""

    config_cls, name = AdafactorConfig, "adafactor"


class LionOptimizer(ConfigBuilder):
    """Lion, with a weight decay of 1e-3 of its own."""

    config_cls, name = LionConfig, "lion"


class RMSPropOptimizer(ConfigBuilder):
    """RMSProp in optax's form."""

    config_cls, name = RMSPropConfig, "rmsprop"


class MuonOptimizer(ConfigBuilder):
    """Muon in optax's form; the registry calls it ``muon_optax``."""

    config_cls, name = MuonConfig, "muon_optax"


class QuadOptimizer(ConfigBuilder):
    """PSGD-QUAD on blocks."""

    config_cls, name = WhiteKronConfig, "quad"


class SkewOptimizer(ConfigBuilder):
    """PSGD-PRO on blocks."""

    config_cls, name = WhiteKronConfig, "skew"


class MarsOptimizer(ConfigBuilder):
    """MARS; ``build`` gives it without weight decay."""

    config_cls, name = MarsConfig, "mars"
