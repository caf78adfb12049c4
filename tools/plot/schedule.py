"""Draws the learning rate of a run as a PNG: ``python -m tools.plot.schedule [flags of tools.pretrain] -o schedule.png``.

It takes all flags of the main job, ``--config`` too, and draws the schedule that they describe, without training:
``python -m tools.plot.schedule --lr-decay-style WSD --train-iters 1000 --lr-warmup-iters 50 --min-lr 1e-5``.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.schedule import Phase, Schedule, make_schedule

from ..pretrain.arguments import Arguments, parse_arguments
from ..pretrain.schedule import (
    BEGINS,
    check_schedule,
    configured_start,
    decay_start,
    momentum_of_run,
    phases_of_run,
    settings_of_run,
)
from ..pretrain.schedule_flags import ScheduleArguments
from ..usage import UsageError, refuse

POINTS = 2000
"""Number of points of a curve, besides the borders of phases."""
NARROW = 0.035
"""Smallest share of the picture's width at which a phase is named; below ``WIDE`` the name stands upright."""
WIDE = 0.12
MANY = 100
"""Largest number of phases that are marked; more would be a grey area."""


def plot_schedule(args: ScheduleArguments, start: int, out: Path) -> list[Phase]:
    """Draw the learning rate, and the momentum if the schedule moves it, over steps; write ``out`` in the format of its suffix.

    Args:
        args: Flags of the schedule.
        start: Step at which the decay begins, from :func:`decay_start`.
        out: Picture to write.

    Returns:
        The phases of the schedule.

    Raises:
        UsageError: The flags do not fit each other.
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    schedule = make_schedule(args.lr_decay_style, **settings_of_run(args, args.lr, args.min_lr, start))
    parts, momentum = phases_of_run(args, start, args.train_iters), momentum_of_run(args)
    steps = _steps(args.train_iters, parts)
    figure, axes = plt.subplots(figsize=(9, 4.5))
    (line,) = axes.plot(steps, [args.lr * schedule(step) for step in steps], label="learning rate")
    axes.set(xlabel="step", ylabel="learning rate", xlim=(0, args.train_iters), ylim=(0, args.lr * 1.15))
    axes.grid(alpha=0.3)
    for i, part in enumerate(parts if len(parts) <= MANY else ()):
        axes.axvspan(part.start, part.end, color=line.get_color(), alpha=0.04 + 0.08 * (i % 2), linewidth=0)
        if (width := (part.end - part.start) / args.train_iters) >= NARROW:
            middle, turn = (part.start + part.end) / 2, 0 if width >= WIDE else 90
            axes.text(middle, args.lr * 1.13, part.name, ha="center", va="top", fontsize=8, rotation=turn)
    if momentum:
        other = axes.twinx()
        (second,) = other.plot(steps, [momentum(step) for step in steps], "--", color="tab:orange", label="momentum")
        other.set(ylabel="momentum", ylim=(0, max(map(momentum, steps)) * 1.15))
        axes.legend(handles=[line, second], loc="center right")
    axes.set_title(f"--lr-decay-style {args.lr_decay_style}")
    figure.tight_layout()
    figure.savefig(out, dpi=150)
    plt.close(figure)
    return parts


def describe(parts: Sequence[Phase], schedule: Schedule, lr: float) -> list[str]:
    """A line for each phase: its steps, and the learning rates at both ends."""
    return [
        f"{part.name}: steps {part.start:g} to {part.end:g}, "
        f"{lr * schedule(round(part.start)):.3g} to {lr * schedule(max(round(part.start), round(part.end) - 1)):.3g}"
        for part in parts
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; the module's docstring describes it."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.plot.schedule", description=__doc__, allow_abbrev=False, add_help=False
    )
    parser.add_argument(
        "-h", "--help", action="help", help="show this; tools.pretrain --help shows the flags of the schedule"
    )
    parser.add_argument("-o", "--out", type=Path, default=Path("schedule.png"), help="picture (default: schedule.png)")
    parser.add_argument(
        "--decay-from", metavar="STEP", help="draw what --start-decay or --start-annealing do at this step"
    )
    options, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    try:
        args = parse_arguments(rest)
        start = configured_start(args)
        if options.decay_from is not None:
            args, start = _decaying_from(args, options.decay_from)
        check_schedule(args)
        try:
            parts = plot_schedule(args, start, options.out)
        except ImportError:
            problem = "drawing needs matplotlib"
            raise UsageError("--out", str(options.out), problem, hint="pip install matplotlib") from None
        except (OSError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            problem = f"cannot be written: {error}"
            raise UsageError("--out", str(options.out), problem, possible=".png, .pdf, .svg") from None
        schedule = make_schedule(args.lr_decay_style, **settings_of_run(args, args.lr, args.min_lr, start))
    except UsageError as error:
        refuse(error, rank=0, program="plot.schedule")
    print("\n".join([*describe(parts, schedule, args.lr), f"wrote {options.out}"]))


def _decaying_from(args: Arguments, step: str) -> tuple[Arguments, int]:
    flag = BEGINS.get(args.lr_decay_style)
    if flag is None:
        problem = f"--lr-decay-style {args.lr_decay_style} cannot begin to decay on resuming"
        raise UsageError("--decay-from", step, problem, possible=f"with {', '.join(BEGINS)}", hint="leave it out")
    if not step.isdecimal():
        raise UsageError("--decay-from", step, "is not a step", possible="a whole number >= 0")
    begins: dict[str, Any] = {flag: True}
    args = dataclasses.replace(args, **begins)
    return args, decay_start(args, int(step), {})


def _steps(last: int, parts: Sequence[Phase]) -> list[int]:
    """Steps to draw: evenly spaced ones, and both sides of each border of phases."""
    borders = [step for part in parts for step in (round(part.start) - 1, round(part.start))]
    even = [round(i * last / POINTS) for i in range(POINTS + 1)]
    return sorted(step for step in {*even, *borders} if 0 <= step <= last)


if __name__ == "__main__":
    main()
