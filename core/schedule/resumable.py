"""Schedulers whose decay can be started when a run is resumed: any checkpoint of the stable phase can be annealed later."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch.optim import Optimizer

from .registry import Schedule, get_scheduler, make_schedule
from .scheduler import ScheduleLR, peak_of
from .schedules import Annealing


def resumed_start(begin_now: bool, *, configured: int, loaded: int, now: int) -> int:
    """The step at which a resumed run's decay begins; negative for never.

    Args:
        begin_now: Whether this run is to decay.
        configured: Start of the decay in this run's arguments; negative for never.
        loaded: Start of the decay in the checkpoint; negative for never.
        now: Number of finished steps.

    Returns:
        ``configured`` without ``begin_now``, whatever the checkpoint says. With it, ``loaded`` where the saved run had a start,
        and else ``now``.
    """
    if not begin_now:
        return configured
    return now if loaded < 0 else loaded


class _InLearningRates(ScheduleLR):
    """A scheduler whose arguments are learning rates instead of factors.

    They hold for all groups, but a group's own ``min_lr`` wins. A group whose learning rate is 0 stays at 0.
    """

    min_lr: float

    def __init__(self, optimizer: Optimizer, last_epoch: int) -> None:
        for i, group in enumerate(optimizer.param_groups):
            peak, lowest = float(group.get("initial_lr", peak_of(group))), group.get("min_lr", self.min_lr)
            if peak and lowest > peak:
                raise ValueError(
                    f"min_lr is {lowest}, above the learning rate {peak} of parameter group {i}; possible: 0 to {peak}."
                )
            if peak:
                self._check(peak, lowest)
        super().__init__(optimizer, [lambda step: 1.0] * len(optimizer.param_groups), last_epoch=last_epoch)

    def _check(self, peak: float, lowest: float) -> None:
        """Raise ValueError when the arguments do not fit a group with this peak and this lowest learning rate."""
        name, settings = self._settings(peak, lowest)
        make_schedule(name, **settings)

    def factor(self, group: int) -> float:
        peak = float(self.base_lrs[group])
        return self._schedule(peak, self.optimizer.param_groups[group])(self.last_epoch) if peak else 1.0

    def _schedule(self, peak: float, group: Mapping[str, Any]) -> Schedule:
        name, settings = self._settings(peak, group.get("min_lr", self.min_lr))
        return partial(get_scheduler(name), **settings)

    def _settings(self, peak: float, lowest: float) -> tuple[str, dict[str, Any]]:
        """Name of the schedule, and its settings for a group with this peak and this lowest learning rate."""
        raise NotImplementedError


class CosineLRScheduler(_InLearningRates):
    """Warm-up from 0, then half a cosine to ``min_lr`` at ``total_steps``, where it stays; see `schedules.cosine`.

    Args:
        clamp: Whether to stay at ``min_lr``; otherwise the cosine goes on after ``total_steps``, and the learning rate rises.

    Raises:
        ValueError: for lengths or learning rates that do not fit each other; nothing is changed then.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int = 0,
        min_lr: float = 0.0,
        last_epoch: int = -1,
        *,
        clamp: bool = True,
    ) -> None:
        self.total_steps, self.warmup_steps, self.decay_steps = total_steps, warmup_steps, total_steps - warmup_steps
        self.min_lr, self.clamp = min_lr, clamp
        super().__init__(optimizer, last_epoch)

    def _settings(self, peak: float, lowest: float) -> tuple[str, dict[str, Any]]:
        lengths = {"warmup": self.warmup_steps, "total": self.total_steps}
        return "cosine", {**lengths, "floor": lowest / peak, "clamp": self.clamp}


class WSDScheduler(_InLearningRates):
    """Warm-up from 0, then constant, until a harmonic decay to ``min_lr`` begins, if ever; see `schedules.wsd`.

    ``start_decay``, ``min_lr`` and ``decay_steps`` are never saved and never loaded. When a state is loaded, ``start_decay``
    makes the decay begin at its step, or go on if it had begun; without it, ``decay_start_step`` is the constructor's.

    Args:
        decay_steps: Number of steps of the decay.
        decay_start_step: Step at which the decay begins, after the warm-up; -1 for never.
        start_decay: Whether a loaded state makes the decay begin, as described above; has no effect until then.

    Raises:
        ValueError: for lengths or learning rates that do not fit each other; nothing is changed then.

    Source: https://arxiv.org/abs/2410.05192
    """

    unsaved = ScheduleLR.unsaved | frozenset({"start_decay", "min_lr", "decay_steps"})

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 0,
        min_lr: float = 1e-8,
        decay_steps: int = 1,
        decay_start_step: int = -1,
        start_decay: bool = False,
        last_epoch: int = -1,
    ) -> None:
        if not isinstance(decay_steps, int) or decay_steps < 1:
            raise ValueError(f"decay_steps is {decay_steps!r}; possible: 1 and more.")
        if 0 <= decay_start_step < warmup_steps:
            raise ValueError(
                f"decay_start_step is {decay_start_step}; possible: -1 for never, or {warmup_steps} and later: the warm-up comes "
                f"first."
            )
        self.warmup_steps, self.decay_start_step = warmup_steps, decay_start_step
        self.min_lr, self.decay_steps, self.start_decay = min_lr, decay_steps, start_decay
        super().__init__(optimizer, last_epoch)

    def _take(self, state: Mapping[str, Any]) -> None:
        configured = self.decay_start_step
        super()._take(state)
        self.decay_start_step = resumed_start(
            self.start_decay, configured=configured, loaded=self.decay_start_step, now=self.last_epoch
        )

    def _check(self, peak: float, lowest: float) -> None:
        # Also check the decay where it is not planned yet: loading a state may start it.
        make_schedule("WSD", **self._decay(max(self.decay_start_step, self.warmup_steps), lowest / peak))

    def _settings(self, peak: float, lowest: float) -> tuple[str, dict[str, Any]]:
        if self.decay_start_step < 0:
            return "constant", {"warmup": self.warmup_steps}
        return "WSD", self._decay(self.decay_start_step, lowest / peak)

    def _decay(self, start: int, floor: float) -> dict[str, Any]:
        lengths = {"warmup": self.warmup_steps, "total": start + self.decay_steps, "decay": self.decay_steps}
        return {**lengths, "anneal": "harmonic", "floor": floor}


class InfiniteLRScheduler(_InLearningRates):
    """Warm-up from 0, cooldown to ``constant_lr``, then constant, until annealing begins, if ever; see `schedules.infinite`.

    ``start_annealing``, ``annealing_type``, ``annealing_steps`` and ``min_lr`` are never saved and never loaded. When a state
    is loaded, ``start_annealing`` makes annealing begin at its step, or go on if it had begun; without it, ``checkpoint_step`` is
    the constructor's.

    Args:
        constant_lr: Learning rate of the constant phase, and the one at which annealing begins. With ``cooldown_steps`` 0 the
            constant phase is at the group's learning rate instead.
        tau: Time constant of exponential annealing, which reaches ``min_lr`` after ``tau + checkpoint_step`` steps and stays
            there.
        checkpoint_step: Step at which annealing begins, after the cooldown; -1 for never.
        start_annealing: Whether a loaded state makes annealing begin, as described above; has no effect until then.
        annealing_type: ``exponential`` or ``rsqrt``.
        annealing_steps: Number of steps of ``rsqrt`` annealing.

    Raises:
        ValueError: for lengths or learning rates that do not fit each other; nothing is changed then.

    Source: https://arxiv.org/abs/2503.02844, equation 1
    """

    unsaved = ScheduleLR.unsaved | frozenset({"start_annealing", "annealing_type", "annealing_steps", "min_lr"})

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 0,
        cooldown_steps: int = 0,
        constant_lr: float = 3.75e-5,
        min_lr: float = 1e-8,
        tau: float = 1e4,
        checkpoint_step: int = -1,
        start_annealing: bool = False,
        annealing_type: Annealing = "exponential",
        annealing_steps: int = 0,
        last_epoch: int = -1,
    ) -> None:
        self.warmup_steps, self.cooldown_steps, self.constant_lr = warmup_steps, cooldown_steps, constant_lr
        self.tau, self.checkpoint_step, self.min_lr = tau, checkpoint_step, min_lr
        self.start_annealing, self.annealing_type, self.annealing_steps = (
            start_annealing,
            annealing_type,
            annealing_steps,
        )
        super().__init__(optimizer, last_epoch)

    def _take(self, state: Mapping[str, Any]) -> None:
        configured = self.checkpoint_step
        super()._take(state)
        self.checkpoint_step = resumed_start(
            self.start_annealing, configured=configured, loaded=self.checkpoint_step, now=self.last_epoch
        )
        if self.checkpoint_step >= 0 and self.min_lr > self.constant_lr:
            raise ValueError(
                f"min_lr is {self.min_lr}, above the constant_lr {self.constant_lr} of the state; lower it."
            )

    def _settings(self, peak: float, lowest: float) -> tuple[str, dict[str, Any]]:
        return "infinite", {
            "warmup": self.warmup_steps,
            "cooldown": self.cooldown_steps,
            "constant": self.constant_lr / peak,
            "begin": self.checkpoint_step,
            "anneal": self.annealing_type,
            "tau": self.tau,
            "decay": self.annealing_steps,
            "floor": lowest / peak,
        }
