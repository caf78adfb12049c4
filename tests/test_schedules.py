"""Schedules against torch's and Megatron-Core's own."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR

from core.schedule import DECAY_STYLES, WSD_DECAY_STYLES, make_schedule

PEAK, LOWEST = 0.02, 0.002


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)


def lrs(scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[float]:
    got = []
    for _ in range(steps):
        got += scheduler.get_last_lr()
        scheduler.optimizer.step()
        scheduler.step()
    return got


@pytest.mark.parametrize(
    ("style", "theirs"),
    [
        ("linear", lambda opt: LinearLR(opt, start_factor=1.0, end_factor=LOWEST / PEAK, total_iters=20)),
        ("cosine", lambda opt: CosineAnnealingLR(opt, T_max=20, eta_min=LOWEST)),
    ],
)
def test_equals_torch_without_warmup(style, theirs):
    ours = LambdaLR(optimizer(), make_schedule(style, warmup=0, total=20, floor=LOWEST / PEAK))
    torch.testing.assert_close(lrs(ours, 21), lrs(theirs(optimizer()), 21), rtol=1e-9, atol=0)


def test_wsd_decays_to_the_floor_over_its_last_part():
    schedule = make_schedule("WSD", warmup=4, total=20, floor=0.1, wsd_decay=5, wsd_anneal="linear")
    factors = [schedule(step) for step in range(25)]
    assert factors[:4] == [0.0, 0.25, 0.5, 0.75]
    assert factors[4:16] == [1.0] * 12
    torch.testing.assert_close(factors[16:20], [0.82, 0.64, 0.46, 0.28])
    torch.testing.assert_close(factors[20:], [0.1] * 5)


@pytest.mark.filterwarnings("ignore")  # Megatron-Core's own, at import and without a process group
@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize(
    ("style", "anneal"),
    [(style, "linear") for style in DECAY_STYLES if style != "WSD"] + [("WSD", anneal) for anneal in WSD_DECAY_STYLES],
)
def test_equals_megatron(style, anneal, warmup):
    megatron = pytest.importorskip("megatron.core.optimizer_param_scheduler", reason="needs megatron-core")
    group = {"lr": PEAK}
    theirs = megatron.OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]),
        init_lr=0.0,
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
    ours = make_schedule(style, warmup=warmup, total=30, floor=LOWEST / PEAK, wsd_decay=8, wsd_anneal=anneal)
    for step in range(40):
        assert math.isclose(PEAK * ours(step), group["lr"], rel_tol=1e-12, abs_tol=1e-15), f"step {step}"
        theirs.step(1)


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ({"style": "cosin", "warmup": 0, "total": 10}, "unknown decay style 'cosin'"),
        ({"style": "cosine", "warmup": 10, "total": 10}, "0 <= warmup < total"),
        ({"style": "cosine", "warmup": 0, "total": 10, "floor": 1.5}, r"possible: \[0, 1\]"),
        ({"style": "WSD", "warmup": 2, "total": 10}, "needs the length of its decay"),
        ({"style": "WSD", "warmup": 2, "total": 10, "wsd_decay": 9}, r"possible: 1\.\.8"),
        ({"style": "WSD", "warmup": 2, "total": 10, "wsd_decay": 3, "wsd_anneal": "steep"}, "unknown WSD decay style"),
    ],
)
def test_wrong_lengths_are_refused(lengths, said):
    with pytest.raises(ValueError, match=said):
        make_schedule(**lengths)
