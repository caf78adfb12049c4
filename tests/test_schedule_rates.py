"""Schedules in learning rates: eFormer's and trustformers' configs and builders, against optax's formulas written down here."""

import math
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.optimizer_config import OptimizerConfig, ParamKey
from core.schedule import (
    ConstantSchedulerBuilder,
    CosineAnnealingWarmRestarts,
    CosineSchedulerBuilder,
    LinearScheduler,
    LinearSchedulerBuilder,
    ScheduleLR,
    SchedulerBuilder,
    SchedulerConfig,
    WarmRestartConfig,
    build_scheduler,
    for_groups,
    get_lr,
    make_schedule,
    register_scheduler,
    registry,
    set_lr,
)

RATES = st.floats(1e-9, 1.0)


def optax_linear(init: float, end: float, steps: int, count: int) -> float:
    """optax.linear_schedule: a polynomial of power 1."""
    count = min(max(count, 0), steps)
    return (init - end) * (1 - count / steps) + end


def optax_cosine(init: float, steps: int, alpha: float, exponent: float, count: int) -> float:
    """optax.cosine_decay_schedule."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(count, steps) / steps))
    return init * ((1 - alpha) * cosine**exponent + alpha)


def test_the_defaults_are_the_source_s():
    names = ("scheduler_type", "learning_rate", "learning_rate_end", "warmup_steps", "steps", "exponent")
    assert [(f.name, f.default) for f in fields(SchedulerConfig)] == list(
        zip(names, (None, 5e-5, None, None, None, 1.0), strict=True)
    )
    config = WarmRestartConfig()
    assert (config.t_0, config.t_mult, config.eta_min, config.warmup_steps) == (1000, 2, 1e-6, 100)


@given(peak=RATES, end=RATES, steps=st.integers(1, 60), warmup=st.integers(0, 59), step=st.integers(0, 90))
@settings(max_examples=60, deadline=None)
def test_linear_is_optax_s(peak, end, steps, warmup, step):
    warmup %= steps
    config = SchedulerConfig("linear", peak, end, warmup or None, steps)
    if warmup and step < warmup:
        wanted = optax_linear(1e-8, peak, warmup, step)
    else:
        wanted = optax_linear(peak, end, steps - warmup, step - warmup)
    assert LinearSchedulerBuilder(config).build()(step) == pytest.approx(wanted, rel=1e-12, abs=1e-15)
    assert build_scheduler(config)(step) == pytest.approx(wanted, rel=1e-12, abs=1e-15)


@given(
    peak=RATES,
    end=st.none() | RATES,
    steps=st.integers(1, 60),
    warmup=st.integers(0, 59),
    exponent=st.floats(0.5, 3),
    step=st.integers(0, 90),
)
@settings(max_examples=60, deadline=None)
def test_cosine_is_optax_s(peak, end, steps, warmup, exponent, step):
    warmup %= steps
    config = SchedulerConfig("cosine", peak, end, warmup, steps, exponent if warmup else 1.0)
    alpha = (end or 0.0) / peak
    if warmup and step < warmup:
        wanted = optax_linear(1e-8, peak, warmup, step)
    else:
        wanted = optax_cosine(peak, steps - warmup, alpha, config.exponent, step - warmup)
    assert CosineSchedulerBuilder(config).build()(step) == pytest.approx(wanted, rel=1e-12, abs=1e-15)
    assert build_scheduler(config)(step) == pytest.approx(wanted, rel=1e-12, abs=1e-15)


def test_constant_has_no_warm_up():
    assert ConstantSchedulerBuilder(SchedulerConfig(learning_rate=2e-3, warmup_steps=5, steps=10)).build()(0) == 2e-3
    assert build_scheduler(SchedulerConfig())(10**6) == 5e-5
    with pytest.raises(ValueError, match="constant learning rate has no warm-up; give a scheduler_type"):
        build_scheduler(SchedulerConfig(warmup_steps=5, steps=10))


def test_a_cosine_without_a_warm_up_has_no_exponent_and_says_so():
    config = SchedulerConfig("cosine", 1.0, steps=10, exponent=2.0)
    with pytest.warns(UserWarning, match="exponent=2.0 has no effect without a warm-up"):
        assert build_scheduler(config)(5) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"scheduler_type": "linear", "steps": 10}, "learning_rate_end is None, but linear needs it"),
        ({"scheduler_type": "linear", "learning_rate_end": 0.0}, "steps is None"),
        ({"scheduler_type": "cosine"}, "steps is None"),
        ({"warmup_steps": 5}, "steps is None"),
        ({"scheduler_type": "cosine", "steps": 5, "warmup_steps": 5}, "warmup_steps is 5 of 5 steps; possible: 0 to 4"),
        ({"scheduler_type": "cosine", "steps": 5.5}, "steps is 5.5; possible: whole numbers"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; possible: numbers >= 0"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
        ({"learning_rate_end": -1.0}, "learning_rate_end is -1.0"),
        ({"exponent": 0.0}, "exponent is 0.0"),
        ({"steps": 5, "num_training_steps": 6}, "steps is 5, and by its other name 6"),
        ({"scheduler_type": "cosine", "steps": 5, "learning_rate": 0.0, "learning_rate_end": 1e-5}, "must be above 0"),
        ({"scheduler_type": "sine", "steps": 5}, "unknown decay style 'sine'"),
        ({"scheduler_type": "WSD", "steps": 5}, "'WSD' is a schedule in factors"),
    ],
)
def test_settings_that_fit_no_schedule_are_refused(settings: dict[str, Any], text: str):
    with pytest.raises(ValueError, match=text):
        build_scheduler(SchedulerConfig(**settings))
    if settings.get("scheduler_type") == "linear":
        with pytest.raises(ValueError, match=text):
            LinearSchedulerBuilder(SchedulerConfig(**{**settings, "scheduler_type": None})).build()


def test_a_registered_builder_is_found_by_its_name_and_is_a_schedule(monkeypatch):
    monkeypatch.setattr(registry, "_SCHEDULERS", dict(registry._SCHEDULERS))

    @register_scheduler("halving")
    @dataclass
    class Halving(SchedulerBuilder):
        config: SchedulerConfig

        def build(self):
            return lambda step: self.config.learning_rate * 0.5**step

    config = SchedulerConfig("halving", 0.4, steps=8)
    assert build_scheduler(config)(2) == 0.1
    factor = make_schedule("halving", config=config)
    assert [factor(step) for step in range(3)] == [1.0, 0.5, 0.25]


@given(peak=RATES, steps=st.integers(2, 60), warmup=st.integers(0, 59), step=st.integers(0, 90))
@settings(max_examples=40, deadline=None)
def test_trustformers_linear_goes_from_0_to_0(peak, steps, warmup, step):
    warmup %= steps
    config = SchedulerConfig(learning_rate=peak, num_warmup_steps=warmup, num_training_steps=steps)
    assert (config.warmup_steps, config.steps) == (warmup, steps)
    wanted = peak * step / warmup if step < warmup else peak * max(0.0, (steps - step) / (steps - warmup))
    scheduler = LinearScheduler(config)
    assert scheduler.get_lr(step) == scheduler(step) == pytest.approx(wanted, rel=1e-12)


@given(peak=st.floats(1e-5, 1.0), t_0=st.integers(1, 9), t_mult=st.integers(1, 3), step=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_restarts_have_an_absolute_eta_min(peak, t_0, t_mult, step):
    config = WarmRestartConfig(t_0, t_mult, 1e-6, warmup_steps=4, learning_rate=peak)
    if step < 4:
        wanted = peak * step / 4
    else:  # SGDR, equation 5, with T_i = t_0 t_mult^i
        at, length = step - 4, t_0
        while at >= length:
            at, length = at - length, length * t_mult
        wanted = 1e-6 + 0.5 * (peak - 1e-6) * (1 + math.cos(math.pi * at / length))
    assert CosineAnnealingWarmRestarts(config).get_lr(step) == pytest.approx(wanted, rel=1e-12)
    with pytest.raises(ValueError, match=r"eta_min is 2.0, above the learning_rate"):
        WarmRestartConfig(eta_min=2.0, learning_rate=peak)


def test_an_absolute_lowest_rate_for_every_group():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.5})
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.5, "min_lr": 0.2})
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.0})
    ours = ScheduleLR(optimizer, for_groups(optimizer, "cosine-with-restarts", t_0=4, min_lr=1e-3))
    for _ in range(3):
        optimizer.step()
        ours.step()
    share = 0.5 * (1 + math.cos(math.pi * 3 / 4))
    wanted = [low + (high - low) * share for high, low in ((0.1, 1e-3), (0.5, 1e-3), (0.5, 0.2), (0.0, 0.0))]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(wanted)
    with pytest.raises(ValueError, match=r"floor is 0.1 and min_lr 0.001, which say the same"):
        for_groups(optimizer, "linear", total=4, floor=0.1, min_lr=1e-3)
    with pytest.raises(ValueError, match=r"constant has no floor, and 0\.001 was given"):
        for_groups(optimizer, "constant", min_lr=1e-3)


def test_the_learning_rate_of_an_optimizer_is_read_and_written():
    model = torch.nn.Linear(4, 4)
    config = OptimizerConfig(optimizer="muon", lr=torch.tensor(0.1))
    optimizer = get_optimizer(config, model, None, {ParamKey(name="bias"): {"lr_mult": 0.5}})
    scheduler = LinearScheduler(SchedulerConfig(learning_rate=0.2, num_training_steps=4))
    for step in (0, 3, 4, 1):
        set_lr(optimizer, scheduler.get_lr(step))
        assert get_lr(optimizer) == pytest.approx(0.2 * (1 - step / 4))
        for group in optimizer.param_groups:
            assert float(group["lr"]) == pytest.approx(0.2 * (1 - step / 4) * group.get("lr_mult", 1.0))
    optimizer.param_groups[0]["lr"] = 0.3
    for use in (lambda: get_lr(optimizer), lambda: set_lr(optimizer, 0.1)):
        with pytest.raises(ValueError, match=r"learning rates \[0\.3.*, not one; read and write lr"):
            use()


@given(peak=RATES, end=st.none() | RATES, warmup=st.none() | st.integers(0, 9), kind=st.sampled_from((None, "cosine")))
@settings(max_examples=30, deadline=None)
def test_a_config_survives_json(peak, end, warmup, kind):
    config = SchedulerConfig(kind, peak, end, warmup, 10)
    assert SchedulerConfig.from_json(config.to_json()) == SchedulerConfig.from_dict(config.to_dict()) == config


def test_unknown_keys_warn():
    with pytest.warns(UserWarning, match=r"SchedulerConfig has no learning_rat, .*Did you mean learning_rate\?"):
        assert SchedulerConfig.from_dict({"learning_rat": 1.0}) == SchedulerConfig()
    with pytest.raises(ValueError, match="the text holds a list"):
        SchedulerConfig.from_json("[1]")
