"""From the flags to the scheduler of a run, new or resumed."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch.optim import Optimizer

from core.schedule import (
    LR_STYLES,
    Phase,
    Schedule,
    ScheduleLR,
    make_schedule,
    one_cycle_momentum,
    phases,
    resumed_start,
    schedule_parameters,
)

from ..usage import UsageError
from .schedule_flags import MEGATRONS, TAKEN, ScheduleArguments

BEGINS = {"WSD": "start_decay", "infinite": "start_annealing"}
"""Styles whose decay can begin when a run is resumed, and the flag that says so."""
DECAY_START = "decay_start"
"""Key of a checkpoint's schedule that holds the step at which the decay began."""


def check_schedule(args: ScheduleArguments) -> None:
    """Check the flags of the schedule against each other.

    Raises:
        UsageError: a flag that the style does not take, or values that do not fit each other.
    """
    total, warmup = args.lr_decay_iters or args.train_iters, args.lr_warmup_iters
    if args.min_lr > args.lr:
        raise UsageError("--min-lr", args.min_lr, f"is above --lr {args.lr}", possible=f"0 to {args.lr}")
    if args.lr_warmup_init > args.lr:
        raise UsageError(
            "--lr-warmup-init", args.lr_warmup_init, f"is above --lr {args.lr}", possible=f"0 to {args.lr}"
        )
    if warmup >= total:
        name = "--lr-decay-iters" if args.lr_decay_iters else "--train-iters"
        raise UsageError("--lr-warmup-iters", warmup, f"leaves nothing of {name} {total}", possible=f"0 to {total - 1}")
    if args.lr_wsd_decay_iters and args.lr_wsd_decay_iters > total - warmup:
        problem = f"the warm-up leaves only {total - warmup} steps"
        raise UsageError("--lr-wsd-decay-iters", args.lr_wsd_decay_iters, problem, possible=f"1 to {total - warmup}")
    _check_taken(args)
    if args.constant_lr is not None and args.constant_lr > args.lr:
        raise UsageError("--constant-lr", args.constant_lr, f"is above --lr {args.lr}", possible=f"up to {args.lr}")
    if (args.constant_lr is None) != (args.lr_cooldown_iters == 0):
        flag, other = "--constant-lr", "--lr-cooldown-iters"
        flag, other = (flag, other) if args.constant_lr is not None else (other, flag)
        raise UsageError(flag, None, f"the way there needs {other}, too", hint="give both, or none for a constant --lr")
    settings_of_run(args, args.lr, args.min_lr, configured_start(args))


def _check_taken(args: ScheduleArguments) -> None:
    style = args.lr_decay_style
    if style not in TAKEN:
        return  # a style that the user registered
    for field in dataclasses.fields(ScheduleArguments):
        name, value = field.name, getattr(args, field.name)
        if value == field.default or name in ("train_iters", "lr", "lr_decay_style", *TAKEN[style]):
            continue
        if name in MEGATRONS and style in LR_STYLES:
            continue
        takers = [other for other, taken in TAKEN.items() if name in taken]
        raise UsageError(
            "--" + name.replace("_", "-"),
            None if isinstance(value, bool) else value,
            f"has no part in --lr-decay-style {style}",
            possible=f"with {', '.join(takers)}",
            hint="leave it out",
        )


def configured_start(args: ScheduleArguments) -> int:
    """Step at which the flags alone make the decay of WSD or infinite begin; -1 for never."""
    if args.lr_decay_style == "WSD":
        return (args.lr_decay_iters or args.train_iters) - _wsd_decay(args)
    if args.lr_decay_style == "infinite" and args.lr_annealing_start_iter is not None:
        return args.lr_annealing_start_iter
    return -1


def decay_start(args: ScheduleArguments, done: int, saved: Mapping[str, Any] | None) -> int:
    """Step at which the decay of this run begins; -1 for never.

    Args:
        done: Number of finished steps.
        saved: Schedule of the checkpoint from which the run resumes; None for a run that begins at step 0.

    Raises:
        UsageError: the decay is to begin on resuming, and there is nothing to resume, or the warm-up is not over.
    """
    configured, flag = configured_start(args), BEGINS.get(args.lr_decay_style)
    if flag is None or not getattr(args, flag):
        return configured
    option = "--" + flag.replace("_", "-")
    if saved is None:
        raise UsageError(
            option, None, "the run begins at step 0", hint="resume a checkpoint with --load, or leave it out"
        )
    start = resumed_start(True, configured=configured, loaded=saved.get(DECAY_START, -1), now=done)
    if start < (ready := args.lr_warmup_iters + args.lr_cooldown_iters):
        problem = f"the checkpoint is of step {start}, and warm-up and cooldown take until {ready}"
        raise UsageError(
            option, None, problem, possible=f"checkpoints of step {ready} and later", hint="train on first"
        )
    return start


def tell_decay(args: ScheduleArguments, start: int) -> list[str]:
    """A line for the user if a flag makes the decay begin where the run resumes; else nothing."""
    flag = BEGINS.get(args.lr_decay_style)
    if flag is None or not getattr(args, flag):
        return []
    parts = phases_of_run(args, start, 2**31)
    decay = next(phase for phase in parts if phase.start == start)
    ends = f", and ends at {decay.end:.0f}" if decay is not parts[-1] else ""
    high = args.constant_lr or args.lr
    return [f"{decay.name} from {high:g} to {args.min_lr:g} begins at step {start}{ends}"]


def begun(start: int, done: int) -> dict[str, int]:
    """Entry of the schedule in a checkpoint of step ``done``: ``start``, or -1 if the decay begins only later."""
    return {DECAY_START: start if 0 <= start <= done else -1}


def settings_of_run(args: ScheduleArguments, peak: float, lowest: float, start: int) -> dict[str, Any]:
    """Settings of ``make_schedule`` for parameters with these highest and lowest learning rates.

    Args:
        start: Step at which the decay begins, from :func:`decay_start`.

    Raises:
        UsageError: The settings do not fit each other.
    """
    known = schedule_parameters(args.lr_decay_style)
    settings = _settings(args, start) | {"floor": (lowest / peak) if peak else args.min_lr / args.lr}
    settings = {name: value for name, value in settings.items() if name in known}
    try:
        make_schedule(args.lr_decay_style, **settings)
    except ValueError as error:
        raise UsageError("--lr-decay-style", args.lr_decay_style, str(error)) from None
    return settings


def _settings(args: ScheduleArguments, start: int) -> dict[str, Any]:
    total = args.lr_decay_iters or args.train_iters
    warm = {"warmup": args.lr_warmup_iters, "init": args.lr_warmup_init / args.lr}
    interval = args.lr_gamma_iters or max(1, (total - args.lr_warmup_iters) // 3)
    match args.lr_decay_style:
        case "constant":
            return warm
        case "cosine":
            return {**warm, "total": total, "exponent": args.lr_cosine_exponent, "clamp": args.lr_cosine_clamp}
        case "WSD":
            decay = _wsd_decay(args)
            return {**warm, "total": start + decay, "decay": decay, "anneal": args.lr_wsd_decay_style}
        case "polynomial":
            return {**warm, "total": total, "power": args.lr_polynomial_power}
        case "cosine-with-restarts":
            return {**warm, "t_0": args.lr_restart_iters, "t_mult": args.lr_restart_mult}
        case "exponential":
            return {**warm, "gamma": args.lr_gamma, "interval": interval, "staircase": args.lr_gamma_staircase}
        case "step":
            return {**warm, "gamma": args.lr_gamma, "interval": interval}
        case "one-cycle":
            divisors = {
                "div_factor": args.lr_one_cycle_div_factor,
                "final_div_factor": args.lr_one_cycle_final_div_factor,
            }
            return {**_cycle(args), **divisors}
        case "infinite":
            return {
                **warm,
                "cooldown": args.lr_cooldown_iters,
                "constant": 1.0 if args.constant_lr is None else args.constant_lr / args.lr,
                "begin": start,
                "anneal": args.lr_annealing_style,
                "tau": args.lr_annealing_tau,
                "decay": args.lr_annealing_iters or max(1, args.train_iters - max(start, 0)),
            }
        case _:
            return {**warm, "total": total}


def _cycle(args: ScheduleArguments) -> dict[str, Any]:
    return {
        "total": args.lr_decay_iters or args.train_iters,
        "pct_start": args.lr_one_cycle_pct_start,
        "anneal": args.lr_one_cycle_style,
        "three_phase": args.lr_one_cycle_three_phase,
    }


def momentum_of_run(args: ScheduleArguments) -> Schedule | None:
    """The function from step to momentum if the schedule moves the momentum; else None."""
    if args.lr_decay_style != "one-cycle" or not args.lr_one_cycle_momentum:
        return None
    ends = {"base_momentum": args.lr_one_cycle_base_momentum, "max_momentum": args.lr_one_cycle_max_momentum}
    settings: dict[str, Any] = _cycle(args) | ends
    return partial(one_cycle_momentum, **settings)


def phases_of_run(args: ScheduleArguments, start: int, steps: int) -> list[Phase]:
    """The parts of the run's schedule, up to ``steps``."""
    settings = settings_of_run(args, args.lr, args.min_lr, start)
    return phases(args.lr_decay_style, steps, **settings)


def make_scheduler(args: ScheduleArguments, optimizer: Optimizer, done: int, start: int) -> ScheduleLR:
    """The schedule of every parameter group after ``done`` steps; a group's ``min_lr``, from a rule, wins over the flag.

    Args:
        start: Step at which the decay begins, from :func:`decay_start`.

    Raises:
        UsageError: A group's lowest learning rate is above its highest, or it has no momentum to move.
    """
    schedules = []
    for group in optimizer.param_groups:
        group["initial_lr"] = peak = group["lr"]
        lowest = group.get("min_lr", args.min_lr * peak / args.lr)
        if "min_lr" in group and args.lr_decay_style == "one-cycle":
            problem, hint = "one-cycle ends at --lr-one-cycle-final-div-factor", "leave it out"
            raise UsageError("--param-override", f"min_lr:{lowest}", problem, hint=hint)
        if lowest > peak:
            problem = f"is above the lr {peak} of the same parameters"
            value = f"min_lr:{lowest}"
            raise UsageError("--param-override", value, problem, possible=f"0 to {peak}", hint="give both in one rule")
        schedules.append(make_schedule(args.lr_decay_style, **settings_of_run(args, peak, lowest, start)))
    try:
        return ScheduleLR(optimizer, schedules, momentum=momentum_of_run(args), last_epoch=done - 1)
    except ValueError as error:
        raise UsageError(
            "--lr-decay-style", args.lr_decay_style, str(error), hint="--no-lr-one-cycle-momentum"
        ) from None


def _wsd_decay(args: ScheduleArguments) -> int:
    total = args.lr_decay_iters or args.train_iters
    return args.lr_wsd_decay_iters or -(-(total - args.lr_warmup_iters) // 5)
