"""A scheduler like Megatron-Core's: learning rate and weight decay of every group, by the number of samples seen."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from .curves import COEFFICIENTS
from .scheduler import write_lr

LR_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
WD_STYLES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "linear": lambda share: share,
    "cosine": lambda share: 0.5 * (math.cos(math.pi * (1 - share)) + 1.0),
}
"""Style → share of the increase of weight decay, as a function of the share of its steps that is over."""

# Name in a state → what older versions of Megatron-LM called it.
_FORMER_NAMES = {
    "max_lr": ("start_lr",),
    "lr_warmup_steps": ("warmup_iter", "warmup_steps"),
    "lr_decay_steps": ("end_iter", "decay_steps"),
    "lr_decay_style": ("decay_style",),
    "num_steps": ("num_iters",),
}
_LR_KEYS = ("max_lr", "min_lr", "lr_warmup_steps", "lr_decay_steps", "lr_decay_style")
_WD_KEYS = ("start_wd", "end_wd", "wd_incr_steps", "wd_incr_style")


class HasParamGroups(Protocol):
    """An optimizer of torch or Megatron-Core."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Settings of each parameter group."""


class OptimizerParamScheduler:
    """Sets ``lr`` and ``weight_decay`` of every parameter group, as the class of this name in Megatron-Core 0.19 does.

    All lengths are numbers of samples, or of whatever `step` counts. A group's ``max_lr``, ``min_lr``, ``start_wd`` and
    ``end_wd`` win over the arguments; ``lr_mult`` and ``wd_mult`` multiply what comes out. A learning rate that is a tensor is
    written in place.

    Args:
        optimizer: Optimizer whose parameter groups are overwritten, by the constructor and by every `step`.
        init_lr: Learning rate at the start of the warm-up.
        max_lr: Learning rate at the end of the warm-up, after ``lr_warmup_steps``.
        min_lr: Learning rate at the end of the decay, at ``lr_decay_steps``.
        lr_decay_style: One of ``LR_STYLES``.
        start_wd: Weight decay at the start; ``end_wd`` after ``wd_incr_steps``.
        wd_incr_style: One of ``WD_STYLES``; with ``constant``, ``start_wd`` and ``end_wd`` must be equal.
        use_checkpoint_opt_param_scheduler: Settings of a loaded state win over the arguments.
        override_opt_param_scheduler: The arguments win over a loaded state. With neither flag, both must be equal.
        wsd_decay_steps: Length of the decay of ``WSD``, which ends at ``lr_decay_steps``.
        lr_wsd_decay_style: Curve of the decay of ``WSD``, one of ``curves.COEFFICIENTS``.

    Raises:
        ValueError: for settings that are out of range or do not fit each other; nothing is changed then.

    Source: Megatron-Core 0.19.2, ``megatron.core.optimizer_param_scheduler``, whose states it loads and which loads its states.
    """

    def __init__(
        self,
        optimizer: HasParamGroups,
        init_lr: float,
        max_lr: float,
        min_lr: float,
        lr_warmup_steps: float,
        lr_decay_steps: float,
        lr_decay_style: str,
        start_wd: float,
        end_wd: float,
        wd_incr_steps: int,
        wd_incr_style: str,
        use_checkpoint_opt_param_scheduler: bool | None = True,
        override_opt_param_scheduler: bool | None = False,
        wsd_decay_steps: int | None = None,
        lr_wsd_decay_style: str | None = None,
    ) -> None:
        if override_opt_param_scheduler and use_checkpoint_opt_param_scheduler:
            raise ValueError(
                "override_opt_param_scheduler and use_checkpoint_opt_param_scheduler are both set; choose whose settings win."
            )
        self.optimizer = optimizer
        self.init_lr, self.max_lr, self.min_lr = init_lr, float(max_lr), min_lr
        self.lr_warmup_steps, self.lr_decay_steps, self.lr_decay_style = lr_warmup_steps, lr_decay_steps, lr_decay_style
        self.wsd_decay_steps, self.lr_wsd_decay_style = wsd_decay_steps, lr_wsd_decay_style
        self.start_wd, self.end_wd = start_wd, end_wd
        self.wd_incr_steps, self.wd_incr_style = wd_incr_steps, wd_incr_style
        self.override_opt_param_scheduler = override_opt_param_scheduler
        self.use_checkpoint_opt_param_scheduler = use_checkpoint_opt_param_scheduler
        self.num_steps = 0
        self._check(self.state_dict())
        self.step(0)

    def step(self, increment: int) -> None:
        """Count ``increment`` more samples, and set ``lr`` and ``weight_decay`` of every group, empty ones too."""
        self.num_steps += increment
        for group in self.optimizer.param_groups:
            write_lr(group, self.get_lr(group))
            group["weight_decay"] = self.get_wd(group) * group.get("wd_mult", 1.0)

    def get_lr(self, param_group: Mapping[str, Any]) -> float:
        """Current learning rate of a group."""
        high, low = param_group.get("max_lr", self.max_lr), param_group.get("min_lr", self.min_lr)
        return float(self._lr(high, low) * param_group.get("lr_mult", 1.0))

    def _lr(self, high: float, low: float) -> float:
        steps, warmup, total = self.num_steps, self.lr_warmup_steps, self.lr_decay_steps
        if warmup > 0 and steps <= warmup:
            return self.init_lr + ((high - self.init_lr) * float(steps) / float(warmup))
        if self.lr_decay_style == "constant":
            return high
        if steps > total:
            return low
        if self.lr_decay_style == "inverse-square-root":
            return float(max(low, high * max(warmup, 1) ** 0.5 / max(steps, 1) ** 0.5))
        shape, start = self.lr_decay_style, warmup
        if self.lr_decay_style == "WSD":
            assert self.wsd_decay_steps is not None and self.lr_wsd_decay_style is not None
            shape, start = self.lr_wsd_decay_style, total - self.wsd_decay_steps
        coefficient = COEFFICIENTS[shape]((steps - start) / (total - start)) if steps > start else 1.0
        return low + coefficient * (high - low)

    def get_wd(self, param_group: Mapping[str, Any] | None = None) -> float:
        """Current weight decay of a group before its ``wd_mult``; without a group, by the constructor's arguments."""
        group = param_group or {}
        start, end = group.get("start_wd", self.start_wd), group.get("end_wd", self.end_wd)
        if self.num_steps > self.wd_incr_steps or self.wd_incr_style == "constant":
            return float(end)
        return float(start + WD_STYLES[self.wd_incr_style](self.num_steps / self.wd_incr_steps) * (end - start))

    def state_dict(self) -> dict[str, Any]:
        """Settings and the number of samples seen, under Megatron-Core's keys."""
        return {name: getattr(self, name) for name in (*_LR_KEYS, "num_steps", *_WD_KEYS)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state of this class or of Megatron-Core's, and set the learning rates and weight decays of its step.

        Raises:
            ValueError: when a setting is missing, when one differs from the argument and no flag says which one wins, or when the
                settings of the state do not fit each other. Nothing is changed then.
        """
        state = dict(state_dict)
        for name, formers in _FORMER_NAMES.items():
            for former in formers:
                if former in state_dict:
                    state[name] = state_dict[former]
                    break
        current = self.state_dict()
        # States from before Megatron-LM increased weight decay have none of its settings.
        missing = [
            name for name in (*_LR_KEYS, "num_steps", *(_WD_KEYS if "start_wd" in state else ())) if name not in state
        ]
        if missing:
            raise ValueError(f"this is no state of OptimizerParamScheduler: it lacks {', '.join(missing)}.")
        loaded = current | {name: self._choose(name, current[name], state[name]) for name in current if name in state}
        self._check(loaded)
        for name, value in loaded.items():
            setattr(self, name, value)
        self.step(0)

    def _choose(self, name: str, current: Any, saved: Any) -> Any:
        if name == "num_steps" or self.use_checkpoint_opt_param_scheduler:
            return saved
        if not self.override_opt_param_scheduler and current != saved:
            raise ValueError(
                f"{name} is {current} here and {saved} in the state; set override_opt_param_scheduler to go on with "
                f"{current}, or use_checkpoint_opt_param_scheduler to go on with {saved}."
            )
        return current

    def _check(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings (the entries of a state) that do not fit each other or the groups.

        Raises:
            ValueError: names the settings that do not fit.
        """
        style, warmup, total = settings["lr_decay_style"], settings["lr_warmup_steps"], settings["lr_decay_steps"]
        _one_of("lr_decay_style", style, LR_STYLES)
        _one_of("wd_incr_style", settings["wd_incr_style"], WD_STYLES)
        if not 0 <= warmup < total:
            raise ValueError(
                f"lr_warmup_steps is {warmup} and lr_decay_steps {total}; possible: 0 <= lr_warmup_steps < lr_decay_steps."
            )
        if style == "WSD":
            _one_of("lr_wsd_decay_style", self.lr_wsd_decay_style, COEFFICIENTS)
            if self.wsd_decay_steps is None or not 0 < self.wsd_decay_steps <= total:
                raise ValueError(
                    f"wsd_decay_steps is {self.wsd_decay_steps}; possible: 1..{total}, within lr_decay_steps."
                )
        if settings["wd_incr_style"] != "constant" and settings["wd_incr_steps"] <= 0:
            raise ValueError(f"wd_incr_steps is {settings['wd_incr_steps']}; possible: 1 and more.")
        for group in ({}, *self.optimizer.param_groups):
            self._check_group(settings, group)

    def _check_group(self, settings: Mapping[str, Any], group: Mapping[str, Any]) -> None:
        low, high = group.get("min_lr", settings["min_lr"]), group.get("max_lr", settings["max_lr"])
        if not 0 <= low <= high or (not group and self.init_lr > high):
            raise ValueError(
                f"init_lr is {self.init_lr}, min_lr {low} and max_lr {high}; possible: 0 <= min_lr <= max_lr and "
                f"init_lr <= max_lr."
            )
        start, end = group.get("start_wd", settings["start_wd"]), group.get("end_wd", settings["end_wd"])
        if not 0 <= start <= end or (settings["wd_incr_style"] == "constant" and start != end):
            raise ValueError(
                f"start_wd is {start} and end_wd {end}; possible: 0 <= start_wd <= end_wd, and equal values "
                f"for wd_incr_style constant."
            )


def _one_of(name: str, value: Any, possible: Any) -> None:
    if value not in possible:
        raise ValueError(f"{name} is {value!r}; possible: {', '.join(possible)}.")
