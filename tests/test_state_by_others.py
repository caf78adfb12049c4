"""Whatever torch lets others do to an optimizer between two steps works as in torch, or is refused; hooks decide too."""

import copy
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR

from core.optimizer.early_step import EarlyStep
from core.optimizer.emerging_optimizers import get_optimizer, list_optimizers
from core.optimizer.optimizer_config import OptimizerConfig
from core.optimizer.rules.adam import AdamW
from core.optimizer.rules.lion import Lion
from core.optimizer.speculative_step import SpeculativeStep
from core.optimizer.steps.bookkeeping import pending


def fill(params: Any, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=random, dtype=torch.float64).to(p.dtype)


def clear(o: Any) -> None:
    o.state.clear()


def assign(o: Any) -> None:
    o.state = defaultdict(dict)


def delete(o: Any) -> None:
    for group in o.param_groups:
        for p in group["params"]:
            del o.state[p]


def load_empty(o: Any) -> None:
    o.load_state_dict({"state": {}, "param_groups": o.state_dict()["param_groups"]})


def of_members(o: Any) -> None:
    for member in o.optimizers:
        member.state = defaultdict(dict)


def build(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4, bias=False))
    return model, get_optimizer(OptimizerConfig(optimizer=name, lr=0.01), model)


def step(model: nn.Module, optimizer: Any, seed: int) -> list[torch.Tensor]:
    fill(model.parameters(), seed)
    optimizer.train()
    optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", list_optimizers())
def test_every_optimizer_begins_anew_where_its_state_is_gone(name):
    for reset in (clear, assign, delete, load_empty, of_members):
        model, optimizer = build(name)
        for seed in range(2):
            step(model, optimizer, seed)
        optimizer.train()
        fresh_model, fresh = build(name)
        fresh_model.load_state_dict(model.state_dict())
        reset(optimizer)
        torch.testing.assert_close(
            step(model, optimizer, 9),
            step(fresh_model, fresh, 9),
            rtol=0,
            atol=0,
            msg=reset.__name__,
        )
        assert not pending(optimizer.optimizers), "an ordinary step has nothing to make or take over"
        saved, expected = optimizer.state_dict()["state"], fresh.state_dict()["state"]
        assert {i: set(held) for i, held in saved.items()} == {i: set(held) for i, held in expected.items()}


@pytest.mark.parametrize("name", list_optimizers())
def test_a_state_of_some_parameters_is_the_state_of_those_and_a_part_of_one_is_refused(name):
    model, optimizer = build(name)
    step(model, optimizer, 0)
    other_model, other = build(name)
    other_model.load_state_dict(model.state_dict())
    saved = copy.deepcopy(optimizer.state_dict())
    some = {i: held for i, held in saved["state"].items() if i % 2}
    other.load_state_dict({**saved, "state": some})
    names = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(names):
        if i % 2 == 0:
            del optimizer.state[p]
    torch.testing.assert_close(step(model, optimizer, 1), step(other_model, other, 1), rtol=0, atol=0)

    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    parted = [(i, slot) for i, held in saved["state"].items() for slot in held if len(held) > 1]
    if not parted:
        return
    i, slot = parted[-1]  # the last, so that what comes before it could have been changed
    broken = copy.deepcopy(saved)
    for held in broken["state"].values():
        for value in held.values():
            value.add_(1)
    del broken["state"][i][slot]
    with pytest.raises(ValueError, match=rf"lacks \['{slot}'\]"):
        optimizer.load_state_dict(broken)
    torch.testing.assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)
    weights = [p.detach().clone() for p in model.parameters()]
    del optimizer.state[names[i]][slot]
    fill(model.parameters(), 3)
    with pytest.raises(ValueError, match=rf"lacks \['{slot}'\]"):
        optimizer.step()
    assert all(map(torch.equal, weights, model.parameters()))


class TestHooks:
    @pytest.mark.parametrize("name", ["adamw", "muon", "soap", "adafactor"])
    def test_a_post_hook_decides(self, name):
        model, optimizer = build(name)
        step(model, optimizer, 0)
        saved = copy.deepcopy(optimizer.state_dict())

        def doubled(o: Any) -> None:
            for held in o.state.values():
                for slot, value in held.items():
                    if value.ndim > 1:
                        held[slot] = value * 2

        optimizer.register_load_state_dict_post_hook(doubled)
        optimizer.load_state_dict(saved)
        for i, held in optimizer.state_dict()["state"].items():
            for slot, value in held.items():
                torch.testing.assert_close(value, saved["state"][i][slot] * (2 if value.ndim > 1 else 1))

    def test_a_pre_hook_decides_and_keeps_the_dtype_of_the_state(self):
        p = nn.Parameter(torch.ones(3, 3, dtype=torch.bfloat16))
        optimizer = AdamW([p], lr=0.1)
        p.grad = torch.full_like(p, 0.3)
        optimizer.step()
        third = torch.full((3, 3), 1 / 3)

        def replaced(o: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            return {**state_dict, "state": {0: {**state_dict["state"][0], "exp_avg": third}}}

        optimizer.register_load_state_dict_pre_hook(replaced)
        optimizer.load_state_dict(optimizer.state_dict())
        assert torch.equal(optimizer.state[p]["exp_avg"], third)
        third.zero_()
        assert optimizer.state[p]["exp_avg"].any(), "what was loaded is a copy"

    def test_what_a_cleared_optimizer_loads_keeps_the_dtype_of_the_state(self):
        p = nn.Parameter(torch.ones(3, 3, dtype=torch.bfloat16))
        optimizer = Lion([p], lr=0.1)
        p.grad = torch.full_like(p, 0.3)
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][0]["exp_avg"].fill_(1 / 3)
        optimizer.state.clear()
        optimizer.load_state_dict(saved)
        assert torch.equal(optimizer.state[p]["exp_avg"], saved["state"][0]["exp_avg"])

    def test_a_post_hook_that_fails_does_not_mix_two_states(self):
        model, optimizer = build("muon")
        step(model, optimizer, 0)
        saved = copy.deepcopy(optimizer.state_dict())
        step(model, optimizer, 1)

        def fails(o: Any) -> None:
            raise OSError("no")

        optimizer.register_load_state_dict_post_hook(fails)
        with pytest.raises(OSError, match="no"):
            optimizer.load_state_dict(saved)
        torch.testing.assert_close(optimizer.state_dict()["state"], saved["state"])


class TestGroups:
    def test_names_follow_parameters(self):
        model, optimizer = build("adamw")
        group = max(optimizer.param_groups, key=lambda g: len(g["params"]))
        named = {id(p): n for n, p in model.named_parameters()}
        group["params"] = group["params"][1:][::-1]
        assert {n: id(p) for n, p, _ in optimizer.entries()} == {
            named[id(p)]: id(p) for g in optimizer.param_groups for p in g["params"]
        }
        assert group["param_names"] == [named[id(p)] for p in group["params"]]

    def test_a_group_of_two_members_is_refused(self):
        model, optimizer = build("muon")
        step(model, optimizer, 0)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.param_groups = [{**optimizer.param_groups[0], "params": params}]
        with pytest.raises(ValueError, match="parameters of adamw and muon; give each of them a group of its own"):
            optimizer.step()

    def test_a_new_group_says_whose_it_is(self):
        _, optimizer = build("muon")
        new = nn.Parameter(torch.ones(4, 4))
        with pytest.raises(ValueError, match=r"'optimizer': '.*'}\. Possible: "):
            optimizer.add_param_group({"params": [new]})
        with pytest.raises(ValueError, match="did you mean 'muon'"):
            optimizer.add_param_group({"params": [new], "optimizer": "moun"})
        assert len(optimizer.entries()) == 5
        schedule = LambdaLR(optimizer, lambda k: 0.5)
        optimizer.add_param_group({"params": [new], "optimizer": "muon"})
        assert "momentum_buffer" in optimizer.state[new]
        assert optimizer.param_groups[-1]["lr"] == 0.01
        before = new.detach().clone()
        fill([new], 0)
        optimizer.step()
        assert not torch.equal(new, before)
        assert optimizer.param_groups[0]["lr"] == 0.005
        assert schedule.get_last_lr()[0] == 0.005

    def test_a_group_that_lacks_settings_is_refused(self):
        p, q = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
        optimizer = AdamW([p], lr=0.1)
        optimizer.param_groups.append({"params": [q], "lr": 0.1})
        fill([p, q], 0)
        with pytest.raises(ValueError, match=r"parameter group 1 of AdamW lacks the settings \[.*'betas'"):
            optimizer.step()
        assert torch.equal(p, torch.ones(2, 2))

    def test_what_is_done_to_a_member_reaches_the_chain(self):
        _, optimizer = build("muon")
        muon = optimizer.members["muon"]
        new = nn.Parameter(torch.ones(4, 4))
        muon.add_param_group({"params": [("new", new)]})
        assert [n for n, p, _ in optimizer.entries() if p is new] == ["new"]
        muon.param_groups = muon.param_groups[:-1]
        assert not [n for n, p, _ in optimizer.entries() if p is new]

    def test_a_members_state_dict_leaves_the_others_alone(self):
        model, optimizer = build("muon")
        step(model, optimizer, 0)
        held = {id(p): set(s) for p, s in optimizer.state.items()}
        optimizer.members["adamw"].state_dict()
        optimizer.members["adamw"].step()
        assert {id(p): set(s) for p, s in optimizer.state.items()} == held


@pytest.mark.parametrize("name", ["adamw", "muon", "soap", "lamb", "sgd"])
def test_data_of_another_shape_needs_another_state(name):
    model, optimizer = build(name)
    step(model, optimizer, 0)
    p = model[0].weight
    p.data, p.grad = torch.ones(10, 6), torch.ones(10, 6)
    if any(x.ndim for x in optimizer.state[p].values()):
        with pytest.raises(ValueError, match="shape"):
            optimizer.step()
    optimizer.state.clear()
    optimizer.step()
    assert all(x.isfinite().all() for x in optimizer.state[p].values())


class TestOtherSteps:
    @pytest.mark.parametrize("name", ["adamw", "muon", "soap"])
    @pytest.mark.parametrize("reset", [clear, assign])
    def test_an_early_step_begins_anew(self, name, reset):
        results = []
        for early in (False, True):
            model, optimizer = build(name)
            ahead = EarlyStep(optimizer)
            step(model, optimizer, 0)
            reset(optimizer)
            optimizer.param_groups = [{**group, "lr": 0.02} for group in optimizer.param_groups]
            optimizer.zero_grad()
            x = torch.linspace(-1, 1, 12).reshape(2, 6)
            if early:
                with ahead:
                    model(x).square().sum().backward()
            else:
                model(x).square().sum().backward()
                optimizer.step()
            results.append([p.detach() for p in model.parameters()])
        torch.testing.assert_close(*results, rtol=0, atol=0)

    @pytest.mark.parametrize("name", ["adamw", "muon", "soap", "lamb"])
    @pytest.mark.parametrize("reset", [clear, assign])
    def test_a_speculative_step_after_a_reset_is_undone(self, name, reset):
        model, optimizer = build(name)
        ahead = SpeculativeStep(optimizer)
        step(model, optimizer, 0)
        reset(optimizer)
        before = [p.detach().clone() for p in model.parameters()]
        fill(model.parameters(), 1)
        ahead.step()
        ahead.undo()
        torch.testing.assert_close([p.detach() for p in model.parameters()], before, rtol=0, atol=0)
        optimizer.step()
        fresh_model, fresh = build(name)
        with torch.no_grad():
            for p, x in zip(fresh_model.parameters(), before, strict=True):
                p.copy_(x)
        step(fresh_model, fresh, 1)
        torch.testing.assert_close(list(model.parameters()), list(fresh_model.parameters()), rtol=0, atol=0)


class TestSchedulers:
    @pytest.mark.parametrize("name", ["muon", "adamw", "sgd", "adaptive_muon"])
    def test_momentum_is_cycled_in_every_member(self, name):
        model, optimizer = build(name)
        for make in (
            lambda o: OneCycleLR(o, 0.1, total_steps=10, base_momentum=0.5, max_momentum=0.9),
            lambda o: CyclicLR(o, 0.01, 0.1, 3, base_momentum=0.5, max_momentum=0.9),
        ):
            make(optimizer)
            step(model, optimizer, 0)
            for group in optimizer.param_groups:
                assert (group["betas"][0] if "betas" in group else group["momentum"]) == 0.9
                assert not {"betas", "momentum"} <= group.keys()

    def test_a_tensor_learning_rate_makes_one_group(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        lr = torch.tensor(0.1)
        optimizer = get_optimizer(OptimizerConfig(optimizer="adamw", lr=lr), model)
        assert len(optimizer.param_groups) == 2  # with and without weight decay
        schedule = LambdaLR(optimizer, lambda k: 0.5**k)
        step(model, optimizer, 0)
        schedule.step()
        assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.05, 0.05])
