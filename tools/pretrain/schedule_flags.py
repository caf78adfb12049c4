"""The flags of the learning-rate schedule, and which of them each style takes."""

from dataclasses import dataclass

from core.schedule import WSD_DECAY_STYLES, list_schedulers

from .flags import NOT_NEGATIVE, POSITIVE, SHARE, Range, count, number, switch, text

AT_LEAST_ONE = Range(at_least=1)


@dataclass(frozen=True)
class ScheduleArguments:
    """Flags of the schedule; those that Megatron has too have Megatron's names."""

    train_iters: int = count(200, "steps of the whole run")
    lr: float = number(2e-3, "peak learning rate", POSITIVE, hint="write it like 3e-4 or 0.0003")
    min_lr: float = number(0.0, "learning rate at the end of the decay", NOT_NEGATIVE, hint="at most --lr")
    lr_decay_style: str = text("cosine", "schedule of the learning rate", list_schedulers)
    lr_warmup_iters: int = count(0, "steps of linear warm-up", at_least=0)
    lr_warmup_init: float = number(0.0, "learning rate that the warm-up begins at", NOT_NEGATIVE, hint="at most --lr")
    lr_decay_iters: int | None = count(None, "step at which the decay ends (default: --train-iters)")
    lr_wsd_decay_iters: int | None = count(None, "length of WSD's last part (default: a fifth of what follows warm-up)")
    lr_wsd_decay_style: str = text("exponential", "shape of WSD's last part", WSD_DECAY_STYLES)
    start_decay: bool = switch(False, "with --load: WSD's last part begins at the step of the checkpoint, or goes on")
    lr_cosine_exponent: float = number(1.0, "power of the cosine", POSITIVE, hint="1 is the plain cosine")
    lr_cosine_clamp: bool = switch(True, "stay at --min-lr after the cosine's end; otherwise the cosine goes on")
    lr_restart_iters: int = count(1000, "length of the first cycle of cosine-with-restarts")
    lr_restart_mult: float = number(2.0, "length of a cycle by that of the one before", AT_LEAST_ONE, hint="2 is usual")
    lr_polynomial_power: float = number(1.0, "power of polynomial", POSITIVE, hint="1 is a straight line")
    lr_gamma: float = number(0.1, "factor of step and exponential", Range(above=0, at_most=1), hint="0.1 is usual")
    lr_gamma_iters: int | None = count(None, "steps between these factors (default: a third of what follows warm-up)")
    lr_gamma_staircase: bool = switch(False, "exponential falls at once after --lr-gamma-iters, not a little each step")
    lr_cooldown_iters: int = count(0, "infinite: steps from --lr to --constant-lr", at_least=0)
    constant_lr: float | None = number(None, "infinite: learning rate of the constant phase", POSITIVE, hint="<= --lr")
    lr_annealing_style: str = text("exponential", "shape of infinite's annealing", ("exponential", "rsqrt"))
    lr_annealing_tau: float = number(
        1e4, "slowness of its exponential annealing, in steps", POSITIVE, hint="1e4 is usual"
    )
    lr_annealing_iters: int | None = count(None, "steps of its rsqrt annealing (default: what --train-iters leaves)")
    lr_annealing_start_iter: int | None = count(None, "step at which annealing begins (default: never)", at_least=0)
    start_annealing: bool = switch(False, "with --load: annealing begins at the step of the checkpoint, or goes on")
    lr_one_cycle_pct_start: float = number(
        0.3, "share of the steps that go up", Range(at_least=0, at_most=1), hint="0.3"
    )
    lr_one_cycle_style: str = text("cosine", "shape of one-cycle's ways", ("cosine", "linear"))
    lr_one_cycle_div_factor: float = number(25.0, "--lr by one-cycle's first", AT_LEAST_ONE, hint="25 is usual")
    lr_one_cycle_final_div_factor: float = number(1e4, "its first by its last", AT_LEAST_ONE, hint="1e4 is usual")
    lr_one_cycle_three_phase: bool = switch(False, "one-cycle goes down as fast as up, and then to its last")
    lr_one_cycle_momentum: bool = switch(True, "one-cycle moves momentum, or the first beta, the other way")
    lr_one_cycle_base_momentum: float = number(0.85, "momentum at the peak", SHARE, hint="0.85 is usual")
    lr_one_cycle_max_momentum: float = number(0.95, "momentum at both ends", SHARE, hint="0.95 is usual")


FLOORED = ("min_lr", "lr_warmup_iters", "lr_warmup_init")
TAKEN: dict[str, tuple[str, ...]] = {
    "cosine": ("lr_cosine_exponent", "lr_cosine_clamp", "lr_decay_iters", *FLOORED),
    "linear": ("lr_decay_iters", *FLOORED),
    "inverse-square-root": ("lr_decay_iters", *FLOORED),
    "WSD": ("lr_wsd_decay_iters", "lr_wsd_decay_style", "start_decay", "lr_decay_iters", *FLOORED),
    "polynomial": ("lr_polynomial_power", "lr_decay_iters", *FLOORED),
    "constant": ("lr_warmup_iters", "lr_warmup_init"),
    "cosine-with-restarts": ("lr_restart_iters", "lr_restart_mult", *FLOORED),
    "exponential": ("lr_gamma", "lr_gamma_iters", "lr_gamma_staircase", "lr_decay_iters", *FLOORED),
    "step": ("lr_gamma", "lr_gamma_iters", "lr_decay_iters", *FLOORED),
    "infinite": (
        "lr_cooldown_iters",
        "constant_lr",
        "lr_annealing_style",
        "lr_annealing_tau",
        "lr_annealing_iters",
        "lr_annealing_start_iter",
        "start_annealing",
        *FLOORED,
    ),
    "one-cycle": (
        "lr_one_cycle_pct_start",
        "lr_one_cycle_style",
        "lr_one_cycle_div_factor",
        "lr_one_cycle_final_div_factor",
        "lr_one_cycle_three_phase",
        "lr_one_cycle_momentum",
        "lr_one_cycle_base_momentum",
        "lr_one_cycle_max_momentum",
        "lr_decay_iters",
    ),
}
"""The flags that each style takes, besides ``--lr`` and ``--train-iters``."""

MEGATRONS = ("min_lr", "lr_decay_iters", "lr_wsd_decay_iters", "lr_wsd_decay_style")
"""Flags that Megatron accepts with each of its own styles, whether the style uses them or not."""
