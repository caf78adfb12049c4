"""Schedules as pure functions: against torch's and Megatron-Core's own, published formulas, and what must hold of all."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler as theirs

from core.schedule import (
    COEFFICIENTS,
    LR_STYLES,
    ScheduleLR,
    list_schedulers,
    make_schedule,
)

PEAK, LOWEST = 0.02, 0.002


def optimizer(momentum: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK, momentum=momentum)


def lrs(scheduler: theirs.LRScheduler, steps: int) -> list[float]:
    got = []
    for _ in range(steps):
        got += scheduler.get_last_lr()
        scheduler.optimizer.step()
        scheduler.step()
    return got


TORCHS = {
    "linear": (
        {"total": 20, "floor": LOWEST / PEAK},
        lambda opt: theirs.LinearLR(opt, start_factor=1.0, end_factor=LOWEST / PEAK, total_iters=20),
    ),
    "cosine": (
        {"total": 20, "floor": LOWEST / PEAK},
        lambda opt: theirs.CosineAnnealingLR(opt, T_max=20, eta_min=LOWEST),
    ),
    "cosine unclamped": (
        {"total": 8, "floor": LOWEST / PEAK, "clamp": False},
        lambda opt: theirs.CosineAnnealingLR(opt, T_max=8, eta_min=LOWEST),
    ),
    "cosine-with-restarts": (
        {"t_0": 3, "t_mult": 2, "floor": LOWEST / PEAK},
        lambda opt: theirs.CosineAnnealingWarmRestarts(opt, 3, 2, eta_min=LOWEST),
    ),
    "cosine-with-restarts of one length": (
        {"t_0": 5, "t_mult": 1},
        lambda opt: theirs.CosineAnnealingWarmRestarts(opt, 5),
    ),
    "polynomial": ({"total": 15, "power": 2.5}, lambda opt: theirs.PolynomialLR(opt, 15, power=2.5)),
    "step": ({"gamma": 0.3, "interval": 4}, lambda opt: theirs.StepLR(opt, 4, gamma=0.3)),
    "exponential": ({"gamma": 0.9}, lambda opt: theirs.ExponentialLR(opt, 0.9)),
    "exponential staircase": (
        {"gamma": 0.3, "interval": 4, "staircase": True},
        lambda opt: theirs.StepLR(opt, 4, gamma=0.3),
    ),
}


@pytest.mark.parametrize("case", TORCHS)
def test_equals_torch_without_warmup(case):
    given, make = TORCHS[case]
    ours = ScheduleLR(optimizer(), make_schedule(case.split()[0], **given))
    torch.testing.assert_close(lrs(ours, 21), lrs(make(optimizer()), 21), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in list_schedulers() if name not in ("one-cycle", "infinite")])
def test_after_a_warmup_it_is_the_schedule_without_one(name):
    given = {
        "WSD": {"total": 12, "decay": 4},
        "cosine-with-restarts": {"t_0": 3},
        "exponential": {"gamma": 0.8},
        "step": {"interval": 2},
        "constant": {},
    }.get(name, {"total": 12})
    shifted = given | ({"total": 17} if "total" in given else {})
    plain, warmed = make_schedule(name, **given), make_schedule(name, warmup=5, init=0.1, **shifted)
    torch.testing.assert_close([warmed(step) for step in range(6)], [0.1, 0.28, 0.46, 0.64, 0.82, 1.0])
    if name == "inverse-square-root":  # its curve hangs on the warm-up
        assert [warmed(step) for step in (10, 17, 18)] == [math.sqrt(5 / 10), math.sqrt(5 / 17), 0.0]
    else:
        assert [warmed(step + 5) for step in range(15)] == [plain(step) for step in range(15)]


def test_the_exponent_of_the_cosine():
    schedule = make_schedule("cosine", total=10, floor=0.2, exponent=3)
    expected = [0.2 + 0.8 * ((1 + math.cos(math.pi * step / 10)) / 2) ** 3 for step in range(11)]
    torch.testing.assert_close([schedule(step) for step in range(11)], expected, rtol=1e-12, atol=0)
    assert schedule(25) == 0.2


def test_wsd_decays_to_the_floor_over_its_last_part():
    schedule = make_schedule("wsd", warmup=4, total=20, floor=0.1, decay=5, anneal="linear")
    factors = [schedule(step) for step in range(25)]
    assert factors[:4] == [0.0, 0.25, 0.5, 0.75]
    assert factors[4:16] == [1.0] * 12
    torch.testing.assert_close(factors[16:20], [0.82, 0.64, 0.46, 0.28])
    torch.testing.assert_close(factors[20:], [0.1] * 5)


@pytest.mark.filterwarnings("ignore")  # Megatron-Core's own, at import and without a process group
@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize(
    ("style", "anneal"),
    [(style, "linear") for style in LR_STYLES if style != "WSD"] + [("WSD", anneal) for anneal in COEFFICIENTS],
)
def test_equals_megatron(style, anneal, warmup):
    megatron = pytest.importorskip("megatron.core.optimizer_param_scheduler", reason="needs megatron-core")
    group = {"lr": PEAK}
    reference = megatron.OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]),
        init_lr=PEAK / 4,
        max_lr=PEAK,
        min_lr=LOWEST,
        lr_warmup_steps=warmup,
        lr_decay_steps=30,
        lr_decay_style=style,
        wsd_decay_steps=8,
        lr_wsd_decay_style=anneal,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=1,
        wd_incr_style="constant",
    )
    ends = {} if style == "constant" else {"total": 30, "floor": LOWEST / PEAK}
    ours = make_schedule(
        style, warmup=warmup, init=0.25, **ends, **({"decay": 8, "anneal": anneal} if style == "WSD" else {})
    )
    for step in range(40):
        assert math.isclose(PEAK * ours(step), group["lr"], rel_tol=1e-12, abs_tol=1e-15), f"step {step}"
        reference.step(1)


@pytest.mark.parametrize("anneal", ["cosine", "linear"])
@pytest.mark.parametrize(
    ("pct_start", "three_phase"), [(0.3, False), (0.25, True), (0.0, False), (1.0, False), (0.5, True)]
)
@pytest.mark.parametrize("adam", [False, True])
def test_one_cycle_moves_momentum_the_other_way_as_torchs(anneal, pct_start, three_phase, adam):
    from core.schedule import one_cycle_momentum

    def build() -> torch.optim.Optimizer:
        weights = [torch.nn.Parameter(torch.zeros(1))]
        return torch.optim.Adam(weights, lr=PEAK) if adam else torch.optim.SGD(weights, lr=PEAK, momentum=0.9)

    def read(opt: torch.optim.Optimizer) -> tuple[float, float]:
        group = opt.param_groups[0]
        return group["lr"], group["betas"][0] if adam else group["momentum"]

    way = {"pct_start": pct_start, "three_phase": three_phase}
    reference = theirs.OneCycleLR(build(), PEAK, 20, anneal_strategy=anneal.replace("cosine", "cos"), **way)
    shape = {"total": 20, "anneal": anneal, **way}
    ours = ScheduleLR(
        build(), make_schedule("one-cycle", **shape), momentum=lambda step: one_cycle_momentum(step, **shape)
    )
    for step in range(20):
        torch.testing.assert_close(
            read(ours.optimizer), read(reference.optimizer), rtol=1e-9, atol=1e-12, msg=str(step)
        )
        for scheduler in (ours, reference):
            scheduler.optimizer.step()
            if step < 19:
                scheduler.step()
    end = ours.get_last_lr()
    ours.step()  # torch's raises here; this one stays where it is
    assert ours.get_last_lr() == end


FACTORS = st.floats(1e-4, 1.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(1, 9), FACTORS, FACTORS, st.floats(1, 1e4), st.integers(-1, 60), st.booleans())
def test_infinite_is_the_published_formula(warmup, cooldown, a, b, tau, begin, rsqrt):
    """Equation 1 of arXiv 2503.02844, and the line through inverse learning rates of arXiv 2410.05192."""
    low, const = sorted((a, b))
    begin = -1 if begin < warmup + cooldown else begin
    kind = {"anneal": "rsqrt", "decay": 12} if rsqrt else {"tau": tau}
    schedule = make_schedule(
        "infinite", warmup=warmup, cooldown=cooldown, constant=const, floor=low, begin=begin, **kind
    )
    for n in range(90):
        if n < warmup:
            expected = n / warmup
        elif n < warmup + cooldown:
            expected = const + (1 - const) / 2 * (1 + math.cos(math.pi * (n - warmup) / cooldown))
        elif begin < 0 or n < begin:
            expected = const
        elif rsqrt:
            share = min(1, (n - begin) / 12)
            expected = 1 / (share * (1 / low) + (1 - share) * (1 / const))
        else:
            expected = max(low, const * math.exp(math.log(low / const) * (n - begin) / (tau + begin)))
        assert math.isclose(schedule(n), expected, rel_tol=1e-9), n
