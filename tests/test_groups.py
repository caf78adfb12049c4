"""Parameter groups, loading and failing, for optimizers of every kind."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from core.optimizer.emerging_optimizers import get_optimizer, list_optimizers
from core.optimizer.memory import memory_report
from core.optimizer.optimizer_config import OptimizerConfig, ParamKey
from core.optimizer.registry import entry_of
from core.optimizer.steps.torch_class import on_whole_tensors
from core.process_groups_config import ProcessGroupCollection

NAMES = list_optimizers()


def weight(seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(8, 12, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("name", NAMES)
def test_a_group_that_is_added_later_is_like_the_others(name):
    cls: Any = entry_of(name).optimizer_cls
    together, apart = [weight(0), weight(1)], [weight(0), weight(1)]
    one = cls([("a", together[0]), ("b", together[1])], lr=0.01)
    two = cls([("a", apart[0])], lr=0.01)
    two.add_param_group({"params": [("b", apart[1])]})
    assert memory_report(two).measured == memory_report(one).measured
    for p, q in zip(together, apart, strict=True):
        p.grad = q.grad = torch.ones(8, 12)
    one.step()
    two.step()
    for p, q in zip(together, apart, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles_are_refused_with_a_way_out(name):
    optimizer = entry_of(name).optimizer_cls([weight()], lr=0.01)
    for how in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="load_state_dict"):
            how(optimizer)


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("adamw", {"betas": (0.9, 1.0)}, r"betas\[1\]"),
        ("sgd", {"momentum": 1.5}, "momentum"),
        ("bge_adam", {"variant": "papre"}, "papre"),
        ("shampoo", {"precondition_frequency": 0}, "precondition_frequency"),
        ("shampoo", {"precondition_frequency": 2.5}, "precondition_frequency"),
        ("came", {"eps": 1e-8}, "Came"),
        ("schedule_free_sgd", {"momentum": 0.0}, "momentum"),
        ("quad", {"block_size": 2}, "all parameters alike"),
        ("eo_muon", {"num_ns_steps": 1}, "all parameters alike"),
        ("lamb", {"max_grad_norm": 1.0}, "all parameters alike"),
    ],
)
def test_settings_of_a_group_are_checked(name, settings, match):
    with pytest.raises(ValueError, match=match):
        entry_of(name).optimizer_cls([{"params": [weight()], **settings}], lr=0.01)


@pytest.mark.parametrize(("name", "shape"), [("apollo", (2, 12)), ("muon", (5,)), ("shampoo", (5,)), ("scion", (5,))])
def test_a_group_that_is_refused_leaves_nothing_behind(name, shape):
    cls: Any = entry_of(name).optimizer_cls
    optimizer = cls([("a", weight())], lr=0.1, **({"rank": 3} if name == "apollo" else {}))
    odd = nn.Parameter(torch.ones(shape))
    with pytest.raises(ValueError, match="odd"):
        optimizer.add_param_group({"params": [("odd", odd)]})
    assert len(optimizer.param_groups) == 1
    assert odd not in optimizer.state


def test_state_of_torchs_own_class_loads():
    p, q = weight(), weight()
    theirs = torch.optim.AdamW([p], lr=0.01)
    p.grad = q.grad = torch.ones(8, 12)
    theirs.step()
    with torch.no_grad():
        q.copy_(p)
    ours: Any = entry_of("adamw").optimizer_cls([q], lr=0.5)
    ours.load_state_dict(theirs.state_dict())
    theirs.step()
    ours.step()
    torch.testing.assert_close(q, p, rtol=0, atol=0)


def test_a_step_that_is_a_number_loads():
    ours: Any = entry_of("adamw").optimizer_cls([weight()], lr=0.5)
    saved = copy.deepcopy(ours.state_dict())
    saved["state"][0]["step"] = 7
    ours.load_state_dict(saved)
    assert float(next(iter(ours.state.values()))["step"]) == 7


@pytest.mark.parametrize("name", ["lamb", "mars", "hn_adam", "adafactor", "came", "muon"])
def test_a_model_may_change_its_dtype(name):
    model = nn.Sequential(nn.Linear(12, 8, bias=False))
    optimizer = entry_of(name).optimizer_cls(list(model.named_parameters()), lr=0.01)
    model.double()
    model[0].weight.grad = torch.ones(8, 12, dtype=torch.float64)
    optimizer.step()
    assert model[0].weight.isfinite().all()


class Warm(torch.optim.Optimizer):
    """Keeps a state that begins as its group says."""

    def __init__(self, params: Any, lr: float = 0.1, start: float = 1.0, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "start": start, "weight_decay": weight_decay})

    def _init_group(self, group: Any, skip_non_grad_params: bool = True) -> None:
        for p in group["params"]:
            if not self.state[p]:
                self.state[p]["sum"] = torch.full_like(p, group["start"])

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            self._init_group(group)
            for p in group["params"]:
                self.state[p]["sum"] += p.grad.square()
                p.data -= group["lr"] * p.grad / self.state[p]["sum"].sqrt()


def test_a_library_class_begins_as_its_group_says():
    def trained(cls: Any) -> list[nn.Parameter]:
        params = [weight(0), weight(1)]
        optimizer = cls([{"params": params[:1]}, {"params": params[1:], "start": 9.0}])
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        return params

    for mine, theirs in zip(trained(on_whole_tensors(Warm)), trained(Warm), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_is_not_a_number_shows(name):
    if name in ("lion", "eo_lion", "sophia"):
        pytest.skip("takes signs or clamps, of which NaN has none: says so in its docstring")
    p = weight()
    optimizer = entry_of(name).optimizer_cls([p], lr=0.01)
    for _ in range(3):
        p.grad = torch.full((8, 12), torch.nan)
        optimizer.step()
    assert p.isnan().any()


class Stages(nn.Module):
    """Two layers on each stage; only those of the first are called ``first``."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({("first", "second")[stage]: nn.Linear(4, 4), f"common{stage}": nn.Linear(4, 4)})


@pytest.mark.mpi(min_size=2)
def test_members_stand_in_one_order_on_all_stages(world):
    groups = ProcessGroupCollection.from_mesh(world.mesh((2,), ("pp",)))
    config = OptimizerConfig(optimizer="lamb", lr=0.1)
    keys = ("*first*weight", "*common0*bias", "*common1*weight")
    overrides = {ParamKey(name=key): {"optimizer": "mars"} for key in keys}
    assert list(get_optimizer(config, [Stages(world.rank)], groups, overrides).members) == ["mars", "lamb"]


@pytest.mark.mpi(min_size=2)
def test_an_owner_that_fails_leaves_nobody_waiting(world, monkeypatch):
    groups = ProcessGroupCollection.from_mesh(world.mesh((2,), ("tp",)))
    p = nn.Parameter(torch.ones(4, 6))
    p.tensor_model_parallel, p.partition_dim = True, 0
    optimizer = entry_of("shampoo").optimizer_cls([("w", p)], lr=0.1, pg_collection=groups)
    p.grad = torch.ones(4, 6)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(optimizer, "update_whole_", fail)
    if world.rank == 0:  # the owner: the first of equals
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step()
    else:
        optimizer.step()
    world.check_in_step()


def test_a_weight_decay_that_cannot_be_had_is_refused():
    config = OptimizerConfig(optimizer="scion", lr=0.1, decoupled_weight_decay=False)
    with pytest.raises(ValueError, match="Scion has a weight decay of its own that cannot be turned off"):
        get_optimizer(config, [nn.Linear(4, 4)])


@pytest.mark.parametrize("name", ["adam", "adamw", "lion", "radam", "sgd", "muon", "adaptive_muon", "mars", "eo_lion"])
def test_weight_decay_can_be_added_to_the_gradient(name):
    config = OptimizerConfig(optimizer=name, lr=0.1, weight_decay=1.0, decoupled_weight_decay=False)
    model = nn.Linear(4, 4, bias=False)
    optimizer: Any = get_optimizer(config, [model])
    before = model.weight.detach().clone()
    model.weight.grad = -before  # what weight decay adds to it is its opposite
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before)
