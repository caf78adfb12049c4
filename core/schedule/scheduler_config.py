"""Configs of schedules in learning rates, not in factors. Names and defaults are those of eFormer and trustformers."""

import math
from dataclasses import InitVar, dataclass

from ..serializable import SerializationMixin
from .setting_ranges import check_ranges


@dataclass
class SchedulerConfig(SerializationMixin):
    """Settings of a schedule; ``scheduler_builders`` and ``rates`` hold what is built from it.

    Attributes:
        scheduler_type: ``linear``, ``cosine``, ``constant``, or the registered name of a ``SchedulerBuilder``; None for a
            constant learning rate.
        learning_rate: Highest learning rate.
        learning_rate_end: Learning rate at ``steps``; None for the builder's default.
        warmup_steps: Steps in which the learning rate rises; None for none.
        steps: Step at which the schedule ends, counted from the first step of the warm-up.
        exponent: Exponent of the cosine.
        num_warmup_steps: Another name of ``warmup_steps`` (trustformers').
        num_training_steps: Another name of ``steps`` (trustformers').

    Raises:
        ValueError: for settings that are out of range or do not fit each other.
    """

    scheduler_type: str | None = None
    learning_rate: float = 5e-5
    learning_rate_end: float | None = None
    warmup_steps: int | None = None
    steps: int | None = None
    exponent: float = 1.0
    num_warmup_steps: InitVar[int | None] = None
    num_training_steps: InitVar[int | None] = None

    def __post_init__(self, num_warmup_steps: int | None, num_training_steps: int | None) -> None:
        self.warmup_steps = _one_of("warmup_steps", self.warmup_steps, num_warmup_steps)
        self.steps = _one_of("steps", self.steps, num_training_steps)
        _check_rate("learning_rate", self.learning_rate)
        if self.learning_rate_end is not None:
            _check_rate("learning_rate_end", self.learning_rate_end)
        check_ranges({"exponent": self.exponent})
        for name, length, least in (("warmup_steps", self.warmup_steps, 0), ("steps", self.steps, 1)):
            if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < least):
                raise ValueError(f"{name} is {length!r}; possible: whole numbers >= {least}, or None.")
        if self.steps is None and (self.scheduler_type not in (None, "constant") or self.warmup_steps):
            raise ValueError(
                f"steps is None; scheduler_type {self.scheduler_type!r} with warmup_steps {self.warmup_steps} needs it. Give the "
                f"number of steps of the run."
            )
        if self.steps is not None and self.warmup_steps and self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} of {self.steps} steps; possible: 0 to {self.steps - 1}. Shorten it."
            )
        if self.scheduler_type == "linear" and self.learning_rate_end is None:
            raise ValueError(
                "learning_rate_end is None, but linear needs it; give the learning rate of the last step, or 0."
            )


@dataclass
class WarmRestartConfig(SerializationMixin):
    """Settings of :class:`~.rates.CosineAnnealingWarmRestarts`.

    Attributes:
        t_0: Steps of the first cycle.
        t_mult: How much longer each cycle is than the one before.
        eta_min: Learning rate at the end of each cycle.
        warmup_steps: Steps in which the learning rate rises from 0, before the first cycle.
        learning_rate: Learning rate at the start of each cycle.

    Raises:
        ValueError: for settings that are out of range or do not fit each other.
    """

    t_0: int = 1000
    t_mult: float = 2
    eta_min: float = 1e-6
    warmup_steps: int = 100
    learning_rate: float = 5e-5

    def __post_init__(self) -> None:
        check_ranges({"t_0": self.t_0, "t_mult": self.t_mult, "warmup": self.warmup_steps})
        _check_rate("learning_rate", self.learning_rate)
        _check_rate("eta_min", self.eta_min)
        if self.eta_min > self.learning_rate:
            raise ValueError(
                f"eta_min is {self.eta_min}, above the learning_rate {self.learning_rate}; possible: 0 to {self.learning_rate}."
            )


def _one_of(name: str, value: int | None, other: int | None) -> int | None:
    if value is not None and other is not None and value != other:
        raise ValueError(f"{name} is {value}, and by its other name {other}; give it once.")
    return other if value is None else value


def _check_rate(name: str, rate: float) -> None:
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not (math.isfinite(rate) and rate >= 0):
        raise ValueError(f"{name} is {rate!r}; possible: numbers >= 0. It is a learning rate, not a share of one.")
