"""Phases of a schedule, for plots and for tests of their borders."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .one_cycle import one_cycle_ends
from .registry import schedule_parameters
from .schedules import cycle_lengths


@dataclass(frozen=True)
class Phase:
    """A range of steps in which a schedule follows one curve.

    Attributes:
        name: Name of the phase, ``warm-up`` or ``decay``, for example.
        start: Step at which the phase begins.
        end: Step at which the next phase begins; not always a whole number.
    """

    name: str
    start: float
    end: float


def phases(name: str, steps: int, **settings: Any) -> list[Phase]:
    """The phases of the schedule ``name`` with these settings, between step 0 and ``steps``, in order.

    A schedule that is not of this package has a warm-up, if it has such a setting, and one more phase.

    Raises:
        ValueError: when no schedule has this name.
    """
    parameters = schedule_parameters(name)
    settings = {setting: p.default for setting, p in parameters.items() if p.default is not p.empty} | settings
    warmup = settings.get("warmup", 0)
    out = [Phase("warm-up", 0, warmup)] if name != "one-cycle" else []
    for label, end in _after_warmup(name, settings, steps):
        start = out[-1].end if out else 0
        out.append(Phase(label, start, min(max(end, 0), steps)))
    return [phase for phase in out if phase.start < phase.end]


def _after_warmup(name: str, settings: dict[str, Any], steps: int) -> Iterator[tuple[str, float]]:
    """Name and end of each phase after the warm-up."""
    warmup, total = settings.get("warmup", 0), settings.get("total", steps)
    match name.lower():
        case "wsd":
            yield from (("stable", total - settings["decay"]), (f"{settings['anneal']} decay", total), ("floor", steps))
        case "linear" | "polynomial" | "inverse-square-root":
            yield from (("decay", total), ("floor", steps))
        case "cosine":
            yield from (("decay", total), ("floor" if settings["clamp"] else "the cosine goes on", steps))
        case "one-cycle":
            labels = ("up", "down", "out") if settings["three_phase"] else ("up", "down")
            ends = one_cycle_ends(total, settings["pct_start"], settings["three_phase"])
            yield from (*zip(labels, ends, strict=True), ("last value", steps))
        case "cosine-with-restarts":
            end = warmup
            for cycle, length in enumerate(cycle_lengths(settings["t_0"], settings["t_mult"]), 1):
                end += length
                yield f"cycle {cycle}", end
                if end >= steps:
                    break
        case "step":
            for i, end in enumerate(
                range(warmup + settings["interval"], steps + settings["interval"], settings["interval"])
            ):
                yield f"x {settings['gamma'] ** i:.3g}", end
        case "infinite":
            yield "cooldown", warmup + settings["cooldown"]
            begin = settings["begin"] if settings["begin"] >= 0 else steps
            yield "constant", begin
            if settings["anneal"] == "rsqrt":
                yield "rsqrt annealing", begin + settings["decay"]
                yield "floor", steps
            yield "exponential annealing", steps
        case _:
            yield "constant" if name == "constant" else "decay", steps
