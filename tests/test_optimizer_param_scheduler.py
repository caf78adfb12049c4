"""The scheduler with Megatron-Core's semantics, against Megatron-Core's own."""

import copy
from types import SimpleNamespace

import pytest
import torch

from core.schedule import COEFFICIENTS, LR_STYLES, OptimizerParamScheduler

BASE = 0.02
GROUPS = [
    {"lr": 1.0},
    {"lr": 1.0, "max_lr": 0.3, "min_lr": 0.01, "wd_mult": 0.0},
    {"lr": 1.0, "start_wd": 0.2, "end_wd": 0.2, "wd_mult": 0.5},
    {"lr": torch.tensor(1.0, dtype=torch.float64), "min_lr": 0.0},
]
ARGUMENTS = dict(
    init_lr=1e-4, max_lr=BASE, min_lr=0.002, lr_warmup_steps=32, lr_decay_steps=200, lr_decay_style="cosine"
) | dict(start_wd=0.01, end_wd=0.1, wd_incr_steps=150, wd_incr_style="linear")


def fake(groups: list[dict] = GROUPS) -> SimpleNamespace:
    return SimpleNamespace(param_groups=[copy.deepcopy(group) for group in groups])


def seen(scheduler) -> list[tuple[float, float]]:
    return [(float(group["lr"]), group["weight_decay"]) for group in scheduler.optimizer.param_groups]


@pytest.fixture
def megatrons():
    module = pytest.importorskip("megatron.core.optimizer_param_scheduler", reason="needs megatron-core")
    return module.OptimizerParamScheduler


@pytest.mark.filterwarnings("ignore")  # Megatron-Core's own, at import and without a process group
class TestOptimizerParamScheduler:
    @pytest.mark.parametrize("warmup", [0, 32])
    @pytest.mark.parametrize("wd", ["constant", "linear", "cosine"])
    @pytest.mark.parametrize(
        ("style", "anneal"), [(s, None) for s in LR_STYLES if s != "WSD"] + [("WSD", a) for a in COEFFICIENTS]
    )
    def test_every_number_is_megatrons(self, megatrons, style, anneal, wd, warmup):
        more = {"wsd_decay_steps": 50, "lr_wsd_decay_style": anneal} if anneal else {}
        more |= {"start_wd": 0.1} if wd == "constant" else {}
        given = ARGUMENTS | {"lr_decay_style": style, "wd_incr_style": wd, "lr_warmup_steps": warmup, **more}
        ours, reference = OptimizerParamScheduler(fake(), **given), megatrons(fake(), **given)
        for increment in (0, 1, 15, 16, 1, 7, 100, 10, 9, 30, 10, 1, 1, 60):
            ours.step(increment)
            reference.step(increment)
            assert seen(ours) == seen(reference)
        assert ours.state_dict() == reference.state_dict()

    @pytest.mark.parametrize("who", ["use_checkpoint", "override"])
    def test_states_go_both_ways(self, megatrons, who):
        other = ARGUMENTS | {"max_lr": 0.05, "min_lr": 0.001, "lr_decay_steps": 300, "lr_decay_style": "linear"}
        other |= {"start_wd": 0.02, "wd_incr_style": "cosine"}
        flags = {f"{name}_opt_param_scheduler": name == who for name in ("use_checkpoint", "override")}
        for saver, loader in ((megatrons, OptimizerParamScheduler), (OptimizerParamScheduler, megatrons)):
            saved = saver(fake(), **ARGUMENTS)
            saved.step(90)
            made = [loader(fake(), **other, **flags), megatrons(fake(), **other, **flags)]
            for scheduler in made:
                scheduler.load_state_dict(saved.state_dict())
                scheduler.step(16)
            assert seen(made[0]) == seen(made[1])
            assert made[0].state_dict() == made[1].state_dict()

    def test_settings_that_differ_are_refused_unless_someone_wins(self):
        ours = OptimizerParamScheduler(fake(), **ARGUMENTS, use_checkpoint_opt_param_scheduler=False)
        ours.step(5)
        before, state = seen(ours), ours.state_dict()
        with pytest.raises(ValueError, match=r"end_wd is 0.1 here and 0.7 in the state; set override_opt_param"):
            ours.load_state_dict(state | {"end_wd": 0.7, "num_steps": 9})
        with pytest.raises(ValueError, match="it lacks min_lr"):
            ours.load_state_dict({name: value for name, value in state.items() if name != "min_lr"})
        assert (seen(ours), ours.state_dict()) == (before, state)

    def test_a_state_that_is_loaded_sets_weight_decay_at_once(self):
        saved = OptimizerParamScheduler(fake(), **ARGUMENTS | {"end_wd": 0.4})
        saved.step(90)
        ours = OptimizerParamScheduler(fake(), **ARGUMENTS)
        ours.load_state_dict(saved.state_dict())
        assert seen(ours) == seen(saved)

    def test_former_names_in_old_states(self):
        ours = OptimizerParamScheduler(fake(), **ARGUMENTS)
        old = {
            "start_lr": 0.04,
            "min_lr": 0.0,
            "warmup_iter": 3,
            "end_iter": 50,
            "decay_style": "linear",
            "num_iters": 10,
        }
        ours.load_state_dict(old)
        assert seen(ours)[0][0] == pytest.approx(0.04 * 40 / 47)
        assert (ours.num_steps, ours.end_wd) == (10, 0.1)

    def test_lr_mult_multiplies(self):
        ours = OptimizerParamScheduler(fake([{"lr": 1.0, "lr_mult": 0.5}]), **ARGUMENTS)
        ours.step(32)
        assert seen(ours)[0][0] == BASE / 2

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            ({"min_lr": 0.03}, "possible: 0 <= min_lr <= max_lr"),
            ({"init_lr": 0.03}, "init_lr <= max_lr"),
            ({"lr_warmup_steps": 200}, "0 <= lr_warmup_steps < lr_decay_steps"),
            ({"lr_decay_style": "wavy"}, "lr_decay_style is 'wavy'; possible: constant"),
            ({"lr_decay_style": "WSD", "lr_wsd_decay_style": "linear"}, "wsd_decay_steps is None"),
            ({"lr_decay_style": "WSD", "wsd_decay_steps": 5}, "lr_wsd_decay_style is None"),
            ({"end_wd": 0.001}, "start_wd <= end_wd"),
            ({"wd_incr_style": "constant"}, "equal values for wd_incr_style constant"),
            ({"wd_incr_steps": 0}, "wd_incr_steps is 0"),
            ({"override_opt_param_scheduler": True}, "both set"),
        ],
    )
    def test_bad_settings_change_nothing(self, wrong, said):
        optimizer = fake()
        with pytest.raises(ValueError, match=said):
            OptimizerParamScheduler(optimizer, **ARGUMENTS | wrong)
        assert [float(group["lr"]) for group in optimizer.param_groups] == [1.0] * 4
