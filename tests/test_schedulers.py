"""Schedulers on optimizers: groups, tensors, states, what is decided on resuming"""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.optimizer_config import OptimizerConfig, ParamKey
from core.schedule import (
    CosineLRScheduler,
    InfiniteLRScheduler,
    ScheduleLR,
    WSDScheduler,
    for_groups,
    make_schedule,
)

BASE = 0.02


def sgd(*groups: dict, lr: float | torch.Tensor = BASE, **more: float) -> torch.optim.SGD:
    each = [{"params": [torch.nn.Parameter(torch.zeros(1))], **group} for group in groups or ({},)]
    return torch.optim.SGD(each, lr=lr, **more)


def advance(scheduler, steps: int) -> list[float]:
    """The learning rate of the first group before each of ``steps`` steps."""
    got = []
    for _ in range(steps):
        got.append(float(scheduler.optimizer.param_groups[0]["lr"]))
        scheduler.optimizer.step()
        scheduler.step()
    return got


class TestScheduleLR:
    def test_groups_have_their_own_peak_and_floor(self):
        optimizer = sgd({}, {"lr": 0.5, "min_lr": 0.1}, {"max_lr": 0.4, "lr_mult": 0.5, "min_lr": 0.04}, {"lr": 0.0})
        ours = ScheduleLR(optimizer, for_groups(optimizer, "linear", total=4, floor=0.25))
        for _ in range(2):
            optimizer.step()
            ours.step()
        expected = [BASE * 0.625, 0.3, 0.2 * (1 + 0.04 / 0.2) / 2, 0.0]
        torch.testing.assert_close([group["lr"] for group in optimizer.param_groups], expected)
        optimizer = sgd({"min_lr": 0.1})
        with pytest.raises(ValueError, match=r"group 0 has min_lr 0.1, above its peak 0.02; possible: 0 to 0.02"):
            for_groups(optimizer, "linear", total=4)
        with pytest.raises(ValueError, match="constant has no floor"):
            for_groups(optimizer, "constant", floor=0.5)

    def test_multipliers_of_a_built_optimizer_are_not_applied_twice(self):
        net = torch.nn.Linear(3, 2)
        config = OptimizerConfig(optimizer="adamw", lr=0.1, weight_decay=0.5)
        rule = {"lr_mult": 0.5, "wd_mult": 0.25}
        optimizer = get_optimizer(config, [net], None, {ParamKey(name="weight"): rule})
        ScheduleLR(optimizer, make_schedule("constant"))
        assert {(g["lr"], g["weight_decay"]) for g in optimizer.param_groups} == {(0.05, 0.125), (0.1, 0.0)}

    def test_a_tensor_is_written_in_place(self):
        lr = torch.tensor(BASE, dtype=torch.float64)
        optimizer = sgd(lr=lr)
        held = optimizer.param_groups[0]["lr"]
        ours = ScheduleLR(optimizer, make_schedule("cosine", total=10))
        plain = ScheduleLR(sgd(), make_schedule("cosine", total=10))
        assert advance(ours, 12) == advance(plain, 12)
        assert optimizer.param_groups[0]["lr"] is held
        assert ours.get_last_lr()[0] is not held

    def test_a_resumed_scheduler_goes_on(self):
        whole = advance(ScheduleLR(sgd(), make_schedule("cosine", warmup=3, total=12)), 12)
        first = ScheduleLR(sgd(), make_schedule("cosine", warmup=3, total=12))
        advance(first, 5)
        second = ScheduleLR(sgd(), make_schedule("cosine", warmup=3, total=12))
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        assert advance(second, 7) == whole[5:]
        third = ScheduleLR(sgd({"initial_lr": BASE}), make_schedule("cosine", warmup=3, total=12), last_epoch=4)
        assert advance(third, 7) == whole[5:]

    def test_what_does_not_fit_changes_nothing(self):
        optimizer = sgd({}, {})
        with pytest.raises(ValueError, match="3 schedules for 2 parameter groups"):
            ScheduleLR(optimizer, [make_schedule("constant", warmup=2)] * 3)
        with pytest.raises(ValueError, match="group 0 of SGD has neither betas nor a momentum above 0"):
            ScheduleLR(optimizer, make_schedule("constant", warmup=2), momentum=lambda step: 0.9)
        with pytest.raises(ValueError, match="group 0 has neither initial_lr nor max_lr"):
            ScheduleLR(optimizer, make_schedule("constant"), last_epoch=4)
        assert [(g["lr"], "initial_lr" in g) for g in optimizer.param_groups] == [(BASE, False)] * 2
        ours = ScheduleLR(optimizer, make_schedule("constant"))
        for state, said in (({}, "no last_epoch"), ({"last_epoch": 3, "base_lrs": [1.0]}, "of 1 parameter groups")):
            with pytest.raises(ValueError, match=said):
                ours.load_state_dict(state)
        assert ours.last_epoch == 0


def harmonic(share: float, low: float, high: float) -> float:
    return 1 / (min(share, 1) * (1 / low) + (1 - min(share, 1)) * (1 / high))


def resumed(first, **changed):
    """A scheduler of the same class with other arguments, which loads the state of ``first``."""
    second = type(first)(sgd(), **changed)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    return second


class TestWSDScheduler:
    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 6), st.integers(1, 9), st.integers(-1, 20), st.floats(1e-6, BASE))
    def test_is_the_published_formula(self, warmup, decay, start, low):
        start = start if start >= warmup else -1
        ours = WSDScheduler(sgd(), warmup, low, decay, decay_start_step=start)
        for n, got in enumerate(advance(ours, 32)):
            stable = start < 0 or n < start
            expected = BASE * n / warmup if n < warmup else BASE if stable else harmonic((n - start) / decay, low, BASE)
            assert math.isclose(got, expected, rel_tol=1e-9), n

    def test_any_stable_state_can_be_decayed_afterwards(self):
        first = WSDScheduler(sgd(), warmup_steps=2)
        assert advance(first, 7)[2:] == [BASE] * 5
        second = resumed(first, start_decay=True, decay_steps=4, min_lr=1e-3)
        assert (second.decay_start_step, second.warmup_steps, second.decay_steps) == (7, 2, 4)
        expected = [harmonic(k / 4, 1e-3, BASE) for k in range(6)]
        torch.testing.assert_close(advance(second, 6), expected, rtol=1e-12, atol=0)

    def test_what_is_decided_on_resuming(self):
        first = WSDScheduler(sgd(), warmup_steps=2)
        advance(first, 7)
        decaying = resumed(first, start_decay=True, decay_steps=4)
        advance(decaying, 2)
        assert resumed(decaying, start_decay=True, decay_steps=9).decay_start_step == 7  # it goes on
        assert resumed(decaying).decay_start_step == -1  # back to stable
        assert float(resumed(decaying).get_last_lr()[0]) == BASE
        assert resumed(decaying, decay_start_step=30).decay_start_step == 30
        assert resumed(first, decay_start_step=30, start_decay=True).decay_start_step == 7

    def test_some_keys_are_of_the_constructor_alone(self):
        scheduler = WSDScheduler(sgd(), 2, 1e-5, 4, start_decay=True)
        state = scheduler.state_dict()
        assert not {"start_decay", "min_lr", "decay_steps", "optimizer"} & state.keys()
        assert {"warmup_steps", "decay_start_step", "last_epoch", "base_lrs"} <= state.keys()
        scheduler.load_state_dict(state | {"min_lr": 9.0, "decay_steps": 77, "start_decay": False})
        assert (scheduler.min_lr, scheduler.decay_steps, scheduler.start_decay) == (1e-5, 4, True)


class TestInfiniteLRScheduler:
    def test_anneals_only_from_where_it_is_told(self):
        lengths = {"warmup_steps": 2, "cooldown_steps": 4, "constant_lr": 0.01}
        first = InfiniteLRScheduler(sgd(), **lengths)
        torch.testing.assert_close(
            advance(first, 10)[2:],
            [BASE, 0.01 + 0.005 * (1 + 0.5**0.5), 0.015] + [0.01 + 0.005 * (1 - 0.5**0.5)] + [0.01] * 4,
        )
        rsqrt = resumed(first, start_annealing=True, annealing_type="rsqrt", annealing_steps=5, min_lr=1e-3)
        assert (rsqrt.checkpoint_step, rsqrt.cooldown_steps, rsqrt.constant_lr) == (10, 4, 0.01)
        expected = [harmonic(k / 5, 1e-3, 0.01) for k in range(8)]
        torch.testing.assert_close(advance(rsqrt, 8), expected, rtol=1e-9, atol=0)
        exponential = resumed(first, start_annealing=True, min_lr=1e-3)
        expected = [0.01 * 0.1 ** (k / (1e4 + 10)) for k in range(8)]
        torch.testing.assert_close(advance(exponential, 8), expected, rtol=1e-9, atol=0)
        assert resumed(exponential, start_annealing=True).checkpoint_step == 10
        assert resumed(exponential).checkpoint_step == -1
        unfit = InfiniteLRScheduler(sgd(), min_lr=0.015, start_annealing=True)
        before = unfit.state_dict()
        with pytest.raises(ValueError, match=r"min_lr is 0.015, above the constant_lr 0.01 of the state"):
            unfit.load_state_dict(first.state_dict())
        assert unfit.state_dict() == before

    def test_some_keys_are_of_the_constructor_alone(self):
        state = InfiniteLRScheduler(sgd(), annealing_type="rsqrt", annealing_steps=3).state_dict()
        assert not {"start_annealing", "annealing_type", "annealing_steps", "min_lr"} & state.keys()
        assert {"warmup_steps", "cooldown_steps", "constant_lr", "tau", "checkpoint_step"} <= state.keys()

    def test_without_a_cooldown_the_constant_phase_is_the_peak(self):
        assert advance(InfiniteLRScheduler(sgd(), warmup_steps=2), 6) == [0, BASE / 2, *[BASE] * 4]


def test_cosine_stays_at_its_minimum_or_goes_on():
    def formula(n: int) -> float:
        return 1e-3 + (BASE - 1e-3) * 0.5 * (1 + math.cos(math.pi * (n - 3) / 7))

    rising = [BASE * n / 3 for n in range(3)]
    clamped = advance(CosineLRScheduler(sgd(), 10, 3, 1e-3), 16)
    torch.testing.assert_close(clamped, [*rising, *map(formula, range(3, 10)), *[1e-3] * 6], rtol=1e-12, atol=1e-15)
    free = advance(CosineLRScheduler(sgd(), 10, 3, 1e-3, clamp=False), 16)
    torch.testing.assert_close(free, [*rising, *map(formula, range(3, 16))], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda opt: CosineLRScheduler(opt, 5, 5), "0 <= warmup < total"),
        (lambda opt: CosineLRScheduler(opt, 5, min_lr=0.1), "min_lr is 0.1, above the learning rate 0.02"),
        (lambda opt: WSDScheduler(opt, decay_steps=0), "decay_steps is 0"),
        (lambda opt: WSDScheduler(opt, 5, decay_start_step=3), "decay_start_step is 3; possible: -1 for never, or 5"),
        (lambda opt: WSDScheduler(opt, min_lr=0.0), "floor is 0"),
        (lambda opt: InfiniteLRScheduler(opt, 5, 5, checkpoint_step=9), "begins at step 9"),
        (lambda opt: InfiniteLRScheduler(opt, tau=0), "tau is 0"),
        (lambda opt: InfiniteLRScheduler(opt, annealing_type="rsqrt"), "rsqrt annealing needs"),
        (lambda opt: InfiniteLRScheduler(opt, annealing_type="linear"), "unknown infinite anneal 'linear'"),
    ],
)
def test_bad_arguments_change_nothing(make, said):
    optimizer = sgd()
    with pytest.raises(ValueError, match=said):
        make(optimizer)
    assert optimizer.param_groups[0]["lr"] == BASE
    assert "initial_lr" not in optimizer.param_groups[0]


class TestGroupsThatChange:
    def test_an_added_group_gets_the_schedule_of_all(self):
        p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
        optimizer = torch.optim.AdamW([p], lr=0.4)
        scheduler = ScheduleLR(optimizer, lambda k: 0.5**k)
        optimizer.step()
        scheduler.step()
        optimizer.add_param_group({"params": [q], "lr": 0.1})
        optimizer.step()
        scheduler.step()
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.025])
        state = scheduler.state_dict()
        again = ScheduleLR(optimizer, lambda k: 0.5**k)
        again.load_state_dict(state)
        assert again.get_last_lr() == pytest.approx([0.1, 0.025])

    @pytest.mark.parametrize("add", [True, False])
    def test_other_groups_than_the_schedules_are_refused(self, add):
        params = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
        optimizer = torch.optim.AdamW([{"params": [params[0]]}, {"params": [params[1]]}], lr=0.4)
        scheduler = ScheduleLR(optimizer, [lambda k: 0.5**k] * 2)
        optimizer.step()
        if add:
            optimizer.add_param_group({"params": [params[2]]})
        else:
            optimizer.param_groups.pop()
        with pytest.raises(
            ValueError, match=r"has [13] parameter groups, and this scheduler was made for 2; make a new one"
        ):
            scheduler.step()
