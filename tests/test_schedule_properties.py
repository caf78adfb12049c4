"""What must hold of every schedule, whatever its settings; and how they are registered and refused."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.schedule import WSD_DECAY_STYLES, list_schedulers, make_schedule, phases, register_scheduler
from core.schedule.registry import _CHECKS, _SCHEDULERS

FACTORS = st.floats(1e-4, 1.0)


@st.composite
def schedules(draw):
    """Name and settings of any schedule whose factor is continuous between steps but for its restarts and stairs."""
    name = draw(st.sampled_from([n for n in list_schedulers() if n in BUILT_IN]))
    warmup, length = draw(st.integers(0, 30)), draw(st.integers(2, 60))
    given = {"warmup": warmup, "floor": draw(FACTORS)}
    match name:
        case "constant":
            given.pop("floor")
        case "WSD":
            given |= {"total": warmup + length, "decay": draw(st.integers(1, length))}
            given |= {"anneal": draw(st.sampled_from(WSD_DECAY_STYLES))}
        case "infinite":
            cooldown = draw(st.integers(1, 20))
            given |= {
                "cooldown": cooldown,
                "constant": draw(st.floats(given["floor"], 1.0)),
                "tau": draw(st.floats(1, 50)),
            }
            given |= {
                "begin": draw(st.sampled_from([-1, warmup + cooldown, warmup + cooldown + length])),
                "decay": length,
            }
            given |= {"anneal": draw(st.sampled_from(["exponential", "rsqrt"]))}
        case "one-cycle":
            three = draw(st.booleans())
            given = {"total": length, "three_phase": three, "pct_start": draw(st.floats(0.1, 0.5 if three else 1.0))}
        case "cosine-with-restarts":
            given |= {"t_0": length, "t_mult": draw(st.floats(1, 3))}
        case "exponential":
            given |= {"gamma": draw(FACTORS), "interval": length, "staircase": draw(st.booleans())}
        case "step":
            given |= {"gamma": draw(FACTORS), "interval": length}
        case "polynomial":
            given |= {"total": warmup + length, "power": draw(st.floats(0.5, 3))}
        case "cosine":
            given |= {"total": warmup + length, "exponent": draw(st.floats(0.5, 3))}
        case _:
            given |= {"total": warmup + length}
    return name, given


BUILT_IN = frozenset(list_schedulers())


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_phases_follow_each_other_without_a_jump_and_each_goes_one_way(case):
    name, given = case
    schedule, last = make_schedule(name, **given), 150
    factors = [schedule(step) for step in range(last + 1)]
    warmup = given.get("warmup", 0)
    floor = given.get("floor", 1 / 25e4 if name == "one-cycle" else 1.0)
    assert all(floor - 1e-12 <= f <= 1 + 1e-12 for f in factors[warmup:])
    assert all(0 <= f <= 1 + 1e-12 for f in factors)
    parts = phases(name, last, **given)
    assert parts[0].start == 0 and parts[-1].end == last
    for part, after in pairwise(parts):
        assert part.end == after.start
    for part in parts:
        inside = factors[math.ceil(part.start) : math.floor(part.end)]
        sign = 1 if part.name in ("warm-up", "up") else -1
        assert all(sign * (after - before) >= -1e-12 for before, after in pairwise(inside)), part
    if name in ("linear", "cosine", "polynomial", "infinite", "WSD"):
        for border in [round(part.start) for part in parts[1:]]:
            before, at = make_finer(name, given, border)
            assert abs(before - at) < 0.05, (border, before, at)


def make_finer(name: str, given: dict, border: int, times: int = 4000) -> tuple[float, float]:
    """The factors around a border of the same schedule over ``times`` as many steps: only a jump stays as large as it is."""
    lengths = ("warmup", "total", "decay", "cooldown", "tau")
    fine = {k: v * times if k in lengths or (k == "begin" and v > 0) else v for k, v in given.items()}
    schedule = make_schedule(name, **fine)
    return schedule(border * times - 1), schedule(border * times)


def test_names_are_registered_once_and_whatever_is_registered_is_made():
    def halves(step: int, *, every: int = 2, total: float = 0.5) -> float:
        return 0.5 ** (step // every)

    class Waves:
        def __init__(self, depth: float) -> None:
            self.depth = depth

        def __call__(self, step: int) -> float:
            return 1 - self.depth * (step % 2)

    try:
        assert register_scheduler("halves")(halves) is halves
        assert register_scheduler("waves")(Waves) is Waves
        assert [make_schedule("halves", every=3)(step) for step in (0, 3, 6)] == [1, 0.5, 0.25]
        assert [make_schedule("Waves", depth=0.1)(step) for step in (0, 1)] == [1, 0.9]
        for name in ("halves", "wsd", "Cosine"):
            with pytest.raises(ValueError, match=f"'{name}' is already registered"):
                register_scheduler(name)
        with pytest.raises(ValueError, match="waves needs depth"):
            make_schedule("waves")
    finally:
        for name in ("halves", "waves"):
            _SCHEDULERS.pop(name, None)
            _CHECKS.pop(name, None)


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("cosin", {"total": 10}, "unknown decay style 'cosin'.*Did you mean 'cosine'"),
        ("cosine", {"warmup": 10, "total": 10}, "0 <= warmup < total"),
        ("cosine", {"total": 10, "floor": 1.5}, r"possible: \[0, 1\]"),
        ("cosine", {"total": 10, "flor": 0.5}, "no setting 'flor'.*Did you mean 'floor'"),
        ("cosine", {"total": 10.5}, "total is 10.5; possible: whole numbers >= 1"),
        ("cosine", {"total": 10, "init": math.nan}, "init is nan"),
        ("cosine", {}, "cosine needs total"),
        ("WSD", {"warmup": 2, "total": 10}, "needs decay"),
        ("WSD", {"warmup": 2, "total": 10, "decay": 9}, r"possible: 1\.\.8"),
        (
            "WSD",
            {"warmup": 2, "total": 10, "decay": 3, "anneal": "lineal"},
            "unknown WSD anneal.*Did you mean 'linear'",
        ),
        ("WSD", {"total": 10, "decay": 3, "anneal": "harmonic"}, "floor is 0, and harmonic"),
        ("infinite", {"floor": 0.5, "constant": 0.4, "begin": 3}, "above the constant"),
        (
            "infinite",
            {"floor": 0.1, "warmup": 3, "cooldown": 4, "begin": 6},
            "begins at step 6; possible: -1 .* 7 and later",
        ),
        ("infinite", {"floor": 0.1, "anneal": "rsqrt"}, "rsqrt annealing needs"),
        ("one-cycle", {"total": 9, "three_phase": True, "pct_start": 0.7}, "three phases"),
        ("cosine-with-restarts", {"t_mult": 0.5}, "t_mult is 0.5; possible: >= 1"),
        ("step", {"interval": 0}, "interval is 0"),
    ],
)
def test_wrong_settings_are_refused(name, given, said):
    with pytest.raises(ValueError, match=said):
        make_schedule(name, **given)
