"""Schedules in learning rates: functions from the number of finished steps to a learning rate, not to a factor of one."""

from .curves import fall
from .registry import make_schedule
from .scheduler_config import SchedulerConfig, WarmRestartConfig


def linear_rate(step: int, *, warmup: int, total: int, first: float, peak: float, last: float) -> float:
    """A straight line from ``first`` to ``peak`` in ``warmup`` steps, and one to ``last`` at step ``total``, where it stays."""
    if step < warmup:
        return first + (peak - first) * step / warmup
    return fall("linear", min((step - warmup) / (total - warmup), 1.0), peak, last)


def cosine_rate(
    step: int, *, warmup: int, total: int, first: float, peak: float, last: float, exponent: float = 1.0
) -> float:
    """As :func:`linear_rate`, with half a cosine to the power of ``exponent`` in place of the second line."""
    if step < warmup:
        return first + (peak - first) * step / warmup
    return float(last + (peak - last) * fall("cosine", min((step - warmup) / (total - warmup), 1.0)) ** exponent)


class LinearScheduler:
    """Learning rate from 0 to ``learning_rate`` in the warm-up, then to ``learning_rate_end`` (None: 0) at ``steps``.

    An instance is a function of the number of finished steps, as :meth:`get_lr` is. ``scheduler_type`` and ``exponent`` of the
    config have no effect.

    Raises:
        ValueError: for a config without ``steps``.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        if config.steps is None:
            raise ValueError("steps is None; give the number of steps of the run, as steps or num_training_steps.")
        self.config = config

    def get_lr(self, step: int) -> float:
        """The learning rate after ``step`` finished steps."""
        c = self.config
        assert c.steps is not None
        last = c.learning_rate_end or 0.0
        return linear_rate(step, warmup=c.warmup_steps or 0, total=c.steps, first=0.0, peak=c.learning_rate, last=last)

    __call__ = get_lr


class CosineAnnealingWarmRestarts:
    """Learning rate from 0 in the warm-up, then cosines from ``learning_rate`` to ``eta_min``, each longer than the one before.

    An instance is a function of the number of finished steps, as :meth:`get_lr` is; see :func:`.schedules.cosine_with_restarts`.
    """

    def __init__(self, config: WarmRestartConfig) -> None:
        self.config = config
        floor = config.eta_min / config.learning_rate if config.learning_rate else 0.0
        lengths = {"warmup": config.warmup_steps, "t_0": config.t_0, "t_mult": config.t_mult}
        self._factor = make_schedule("cosine-with-restarts", floor=floor, **lengths)

    def get_lr(self, step: int) -> float:
        """The learning rate after ``step`` finished steps."""
        return self.config.learning_rate * self._factor(step)

    __call__ = get_lr
