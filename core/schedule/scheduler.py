"""The ``LRScheduler`` that sets the learning rates of any optimizer by any schedule."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..eager import runs_eagerly
from .registry import Schedule, make_schedule, schedule_parameters


class ScheduleLR(LRScheduler):
    """Sets the learning rate of every parameter group to its peak times a function of the finished steps.

    A group's peak is its ``max_lr * lr_mult`` where it has a ``max_lr``, as groups of Megatron-Core do, and otherwise the ``lr``
    that it has (`get_optimizer` has put ``lr_mult`` into it, and ``wd_mult`` into ``weight_decay``, which stays). A learning rate
    that is a tensor is written in place, so that compiled steps and captured graphs see it.

    Args:
        optimizer: Optimizer whose groups' ``lr`` is overwritten, by the constructor and by every `step`.
        schedule: Function ``step -> factor`` for all groups, or one for each. See `make_schedule`, `for_groups`.
        momentum: Function ``step -> momentum``, written to the first of a group's ``betas``, or to its ``momentum``.
        last_epoch: Number of finished steps minus one; -1 for a new run.

    Raises:
        ValueError: when the numbers of schedules and groups differ, a group has no momentum to set, or the peak of a group is not
            known in a resumed run.
    """

    unsaved: frozenset[str] = frozenset({"optimizer", "schedules", "momentum", "_for_all"})
    """Attributes that are never saved and never loaded."""

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Schedule | Sequence[Schedule],
        *,
        momentum: Schedule | None = None,
        last_epoch: int = -1,
    ) -> None:
        groups = optimizer.param_groups
        self._for_all = schedule if callable(schedule) else None
        self.schedules = [schedule] * len(groups) if callable(schedule) else [*schedule]
        if len(self.schedules) != len(groups):
            raise ValueError(
                f"{len(self.schedules)} schedules for {len(groups)} parameter groups; give one, or one for each."
            )
        self.momentum = momentum
        for i, group in enumerate(groups):
            if momentum and "betas" not in group and not group.get("momentum"):
                raise ValueError(
                    f"parameter group {i} of {type(optimizer).__name__} has neither betas nor a momentum above 0; leave "
                    f"momentum as it is, or give it one."
                )
            if last_epoch >= 0 and "initial_lr" not in group and group.get("max_lr") is None:
                raise ValueError(
                    f"parameter group {i} has neither initial_lr nor max_lr, and its lr of step {last_epoch} is no peak; load "
                    f"the optimizer's state first, or set initial_lr."
                )
        for group in groups:
            group.setdefault("initial_lr", peak_of(group))
        super().__init__(optimizer, last_epoch)
        # Plain numbers, so that a step reads nothing back from a device.
        self.base_lrs: list[float | Tensor] = [float(base) for base in self.base_lrs]

    def get_lr(self) -> list[float | Tensor]:
        self._follow_groups()
        return [float(base) * self.factor(i) for i, base in enumerate(self.base_lrs)]

    def _follow_groups(self) -> None:
        """Give groups that were added since the last step the schedule of all groups, with their ``lr`` as the peak.

        Raises:
            ValueError: when each group has a schedule of its own, or a group was removed.
        """
        groups, known = self.optimizer.param_groups, len(self.base_lrs)
        if len(groups) < known or (len(groups) > known and self._for_all is None):
            raise ValueError(
                f"the optimizer has {len(groups)} parameter groups, and this scheduler was made for {known}; make a new one, "
                f"with a schedule for each group and last_epoch={self.last_epoch}."
            )
        for group in groups[known:]:
            assert self._for_all is not None
            group.setdefault("initial_lr", peak_of(group))
            self.base_lrs.append(float(group["initial_lr"]))
            self.schedules.append(self._for_all)

    def factor(self, group: int) -> float:
        """Factor of the peak of parameter group number ``group`` at the present step."""
        return self.schedules[group](self.last_epoch)

    @runs_eagerly
    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        self._set_momentum()

    def state_dict(self) -> dict[str, Any]:
        """All attributes but the optimizer and those that only the constructor sets (`unsaved`)."""
        return {name: value for name, value in super().state_dict().items() if name not in self.unsaved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a result of `state_dict`, and set the learning rates of its step.

        Raises:
            ValueError: when it has another number of parameter groups, is not the state of a scheduler, or does not fit the
                constructor's arguments. Nothing is changed then.
        """
        if "last_epoch" not in state_dict:
            raise ValueError(f"this is no state of {type(self).__name__}: it has no last_epoch, only {[*state_dict]}.")
        if len(state_dict.get("base_lrs", self.base_lrs)) != len(self.base_lrs):
            saved, current = len(state_dict["base_lrs"]), len(self.base_lrs)
            raise ValueError(
                f"the state is of {saved} parameter groups, and this optimizer has {current}; load a state that was saved with "
                f"the same groups."
            )
        before = dict(vars(self))
        try:
            self._take(state_dict)
            lrs = self.get_lr()
        except ValueError:
            vars(self).update(before)
            raise
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            write_lr(group, lr)
        self._last_lr: list[float | Tensor] = [_copy(group["lr"]) for group in self.optimizer.param_groups]
        self._set_momentum()

    def _take(self, state: Mapping[str, Any]) -> None:
        vars(self).update({name: value for name, value in state.items() if name not in self.unsaved})

    def _set_momentum(self) -> None:
        for group in self.optimizer.param_groups if self.momentum else ():
            assert self.momentum is not None
            momentum = self.momentum(self.last_epoch)
            if "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            else:
                group["momentum"] = momentum


def for_groups(
    optimizer: Optimizer, name: str, *, floor: float = 0.0, min_lr: float | None = None, **settings: Any
) -> list[Schedule]:
    """The schedule ``name`` for each parameter group.

    Args:
        optimizer: The optimizer; not changed.
        name: Registered name of a schedule.
        floor: Lowest learning rate of a group, divided by its peak.
        min_lr: Lowest learning rate itself (torch's ``eta_min``), in place of ``floor``. A group's own ``min_lr`` wins over both.
            A group whose learning rate is 0 has neither and stays at 0.
        settings: Other settings of the schedule.

    Raises:
        ValueError: when `make_schedule` raises it, when ``floor`` and ``min_lr`` are both given, or when the lowest learning rate
            of a group is above its peak.
    """
    if floor and min_lr is not None:
        raise ValueError(f"floor is {floor} and min_lr {min_lr}, which say the same; give one of them.")
    schedules = []
    for i, group in enumerate(optimizer.param_groups):
        peak, own = float(group.get("initial_lr", peak_of(group))), {}
        if "floor" in schedule_parameters(name):
            lowest = group.get("min_lr")
            if lowest is None and peak:
                lowest = min_lr
            if lowest is not None and lowest > peak:
                raise ValueError(
                    f"parameter group {i} has min_lr {lowest}, above its peak {peak}; possible: 0 to {peak}."
                )
            own["floor"] = floor if lowest is None or not peak else lowest / peak
        elif floor or min_lr:
            raise ValueError(f"{name} has no floor, and {floor or min_lr} was given; leave it out.")
        schedules.append(make_schedule(name, **own, **settings))
    return schedules


def peak_of(group: dict[str, Any]) -> float | Tensor:
    """The highest learning rate of a parameter group that no scheduler has changed yet."""
    if group.get("max_lr") is not None:
        return float(group["max_lr"]) * float(group.get("lr_mult", 1.0))
    return _copy(group["lr"])


def get_lr(optimizer: Optimizer) -> float:
    """The learning rate of all parameter groups, before their ``lr_mult``.

    Raises:
        ValueError: when groups differ in it.
    """
    rates = [float(group["lr"]) / mult for group in optimizer.param_groups if (mult := group.get("lr_mult", 1.0))]
    if not rates or not all(math.isclose(rate, rates[0], rel_tol=1e-6) for rate in rates):
        raise ValueError(
            f"the parameter groups have the learning rates {rates}, not one; read and write lr in each of param_groups, give "
            f"groups an lr_mult, or let ScheduleLR keep their ratios."
        )
    return float(rates[0])


def set_lr(optimizer: Optimizer, lr: float | Tensor) -> None:
    """Give all parameter groups the learning rate ``lr``, times their ``lr_mult``. One that is a tensor is written in place.

    Raises:
        ValueError: when groups have learning rates of their own, which would be lost (:func:`get_lr`); nothing is changed then.
    """
    get_lr(optimizer)
    for group in optimizer.param_groups:
        write_lr(group, lr * group.get("lr_mult", 1.0))


def write_lr(group: dict[str, Any], lr: float | Tensor) -> None:
    """Write ``lr`` into a parameter group; in place where it holds a tensor."""
    if isinstance(group.get("lr"), Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def _copy(lr: float | Tensor) -> float | Tensor:
    return lr.clone() if isinstance(lr, Tensor) else lr
