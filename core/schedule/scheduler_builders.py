"""Builders, which make a schedule in learning rates out of a config. Their names and curves are eFormer's, and optax's."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

from .rates import cosine_rate, linear_rate
from .registry import get_scheduler
from .scheduler_config import SchedulerConfig

RateSchedule = Callable[[int], float]
"""Function from the number of finished steps to a learning rate."""

FIRST_RATE = 1e-8
"""Learning rate at the start of a warm-up."""


@dataclass
class SchedulerBuilder(ABC):
    """Base of builders; register a subclass to choose it by ``scheduler_type``::

        @register_scheduler("mine")
        class MineBuilder(SchedulerBuilder):
            def build(self): ...

    An instance is also a schedule as `make_schedule` makes them, with a factor of ``config.learning_rate`` for each step.

    Attributes:
        config: The settings.
    """

    config: SchedulerConfig

    @abstractmethod
    def build(self) -> RateSchedule:
        """The schedule: a function from the number of finished steps to a learning rate."""

    @cached_property
    def _rate(self) -> RateSchedule:
        return self.build()

    def __call__(self, step: int) -> float:
        """The learning rate after ``step`` finished steps, divided by ``config.learning_rate``; 0 if that is 0."""
        return self._rate(step) / self.config.learning_rate if self.config.learning_rate else 0.0


@dataclass
class ConstantSchedulerBuilder(SchedulerBuilder):
    """``learning_rate`` at every step; a warm-up has no effect."""

    def build(self) -> RateSchedule:
        """As in the base class."""
        rate = self.config.learning_rate
        return lambda step: rate


@dataclass
class LinearSchedulerBuilder(SchedulerBuilder):
    """A line from 1e-8 to ``learning_rate`` in the warm-up, if there is one, then one to ``learning_rate_end`` at ``steps``."""

    def build(self) -> RateSchedule:
        """As in the base class.

        Raises:
            ValueError: for a config without ``learning_rate_end`` or ``steps``.
        """
        c, total = self.config, _steps(self.config)
        if c.learning_rate_end is None:
            raise ValueError(
                "learning_rate_end is None, but linear needs it; give the learning rate of the last step, or 0."
            )
        warmup, last = c.warmup_steps or 0, c.learning_rate_end
        return partial(linear_rate, warmup=warmup, total=total, first=FIRST_RATE, peak=c.learning_rate, last=last)


@dataclass
class CosineSchedulerBuilder(SchedulerBuilder):
    """As :class:`LinearSchedulerBuilder`, with half a cosine to ``learning_rate_end`` (None: 0).

    ``exponent`` is the exponent of the cosine after a warm-up. Without one it has no effect, as in eFormer; ``build`` warns.
    """

    def build(self) -> RateSchedule:
        """As in the base class.

        Raises:
            ValueError: for a config without ``steps``, or with a ``learning_rate_end`` and neither a learning rate above 0 nor a
                warm-up.
        """
        c, total = self.config, _steps(self.config)
        if not c.warmup_steps and c.learning_rate_end is not None and c.learning_rate <= 0:
            raise ValueError(
                f"learning_rate is {c.learning_rate}; it must be above 0 when learning_rate_end is set ({c.learning_rate_end})."
            )
        if not c.warmup_steps and c.exponent != 1:
            warnings.warn(f"exponent={c.exponent} has no effect without a warm-up; set warmup_steps.", stacklevel=2)
        return partial(
            cosine_rate,
            warmup=c.warmup_steps or 0,
            total=total,
            first=FIRST_RATE,
            peak=c.learning_rate,
            last=(c.learning_rate_end or 0.0) if c.learning_rate else 0.0,
            exponent=c.exponent if c.warmup_steps else 1.0,
        )


_BUILDERS: dict[str | None, type[SchedulerBuilder]] = {
    None: ConstantSchedulerBuilder,
    "constant": ConstantSchedulerBuilder,
    "linear": LinearSchedulerBuilder,
    "cosine": CosineSchedulerBuilder,
}


def build_scheduler(config: SchedulerConfig) -> RateSchedule:
    """The schedule that ``config.scheduler_type`` names.

    Raises:
        ValueError: for a type that is neither built in nor the registered name of a :class:`SchedulerBuilder`; for a warm-up
            without a type; and for settings that the builder refuses.
    """
    kind = config.scheduler_type
    if kind in (None, "constant") and config.warmup_steps:
        raise ValueError(
            f"warmup_steps is {config.warmup_steps}, but a constant learning rate has no warm-up; give a scheduler_type, "
            f"'linear' or 'cosine', or make_schedule('constant', warmup={config.warmup_steps})."
        )
    builder = _BUILDERS.get(kind) or get_scheduler(str(kind))
    if not (isinstance(builder, type) and issubclass(builder, SchedulerBuilder)):
        raise ValueError(
            f"scheduler_type {kind!r} is a schedule in factors, which no config in learning rates describes; possible: linear, "
            f"cosine, constant, and registered SchedulerBuilders. make_schedule({kind!r}, ...) makes it."
        )
    return builder(config).build()


def _steps(config: SchedulerConfig) -> int:
    if config.steps is None:
        raise ValueError("steps is None; give the number of steps of the run.")
    return config.steps
