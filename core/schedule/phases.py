"""The parts of a schedule, for pictures and for tests of its borders."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .one_cycle import one_cycle_ends
from .registry import settings_of
from .schedules import cycle_lengths


@dataclass(frozen=True)
class Phase:
    """Steps of a schedule that follow one curve.

    Attributes:
        name: What happens in it.
        start: The step that it begins at.
        end: The step that the next one begins at; not always a whole number.
    """

    name: str
    start: float
    end: float


def phases(name: str, steps: int, **settings: Any) -> list[Phase]:
    """The parts of the schedule ``name`` with these settings, between step 0 and ``steps``, in order.

    A schedule that is not of this package has a warm-up, if one is given, and one part more.

    Raises:
        ValueError: no schedule has this name.
    """
    known = settings_of(name)
    given = {setting: p.default for setting, p in known.items() if p.default is not p.empty} | settings
    warmup = given.get("warmup", 0)
    found = [Phase("warm-up", 0, warmup)] if name != "one-cycle" else []
    for label, end in _after_warmup(name, given, steps):
        start = found[-1].end if found else 0
        found.append(Phase(label, start, min(max(end, 0), steps)))
    return [phase for phase in found if phase.start < phase.end]


def _after_warmup(name: str, given: dict[str, Any], steps: int) -> Iterator[tuple[str, float]]:
    """What each part is called, and its end."""
    warmup, total = given.get("warmup", 0), given.get("total", steps)
    match name.lower():
        case "wsd":
            yield from (("stable", total - given["decay"]), (f"{given['anneal']} decay", total), ("floor", steps))
        case "linear" | "polynomial" | "inverse-square-root":
            yield from (("decay", total), ("floor", steps))
        case "cosine":
            yield from (("decay", total), ("floor" if given["clamp"] else "the cosine goes on", steps))
        case "one-cycle":
            labels = ("up", "down", "out") if given["three_phase"] else ("up", "down")
            ends = one_cycle_ends(total, given["pct_start"], given["three_phase"])
            yield from (*zip(labels, ends, strict=True), ("last value", steps))
        case "cosine-with-restarts":
            end = warmup
            for cycle, length in enumerate(cycle_lengths(given["t_0"], given["t_mult"]), 1):
                end += length
                yield f"cycle {cycle}", end
                if end >= steps:
                    break
        case "step":
            for i, end in enumerate(range(warmup + given["interval"], steps + given["interval"], given["interval"])):
                yield f"x {given['gamma'] ** i:.3g}", end
        case "infinite":
            yield "cooldown", warmup + given["cooldown"]
            begin = given["begin"] if given["begin"] >= 0 else steps
            yield "constant", begin
            if given["anneal"] == "rsqrt":
                yield "rsqrt annealing", begin + given["decay"]
                yield "floor", steps
            yield "exponential annealing", steps
        case _:
            yield "constant" if name == "constant" else "decay", steps
