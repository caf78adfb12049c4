"""A pipeline stage or a rank with nothing to train goes on with the others, and the others train as if it were not there."""

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import core.checkpoint as checkpoint
from core.faults import Guard, check_state
from core.optimizer.early_step import EarlyStep
from core.optimizer.emerging_optimizers import get_optimizer, list_optimizers
from core.optimizer.optimizer_config import OptimizerConfig, ParamKey
from core.process_groups_config import ProcessGroupCollection
from core.sharding.parameter_layout import local

SETTINGS: dict[str, dict[str, Any]] = {"apollo": {"apollo_rank": 2}}


def stage(index: int) -> nn.ModuleDict:
    torch.manual_seed(index)
    return nn.ModuleDict({f"layer{index}": nn.Linear(6, 4), f"narrow{index}": nn.Linear(4, 6, bias=False)})


def make(name: str, model: nn.Module, groups: ProcessGroupCollection | None = None, overrides: Any = None) -> Any:
    config = OptimizerConfig.from_dict({"optimizer": name, "lr": 0.01, **SETTINGS.get(name, {})})
    return get_optimizer(config, model, groups, overrides)


def fill(model: nn.Module, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=random)


def train(model: nn.Module, optimizer: Any, steps: range = range(3)) -> list[float]:
    norms = []
    for seed in steps:
        fill(model, seed)
        norms.append(optimizer.clip_grad_norm_(0.5))
        optimizer.train()
        optimizer.step()
    return norms


def check_as_alone(name: str, model: nn.Module, norms: list[float], steps: range = range(3)) -> None:
    """Compare with the first stage alone, in one process."""
    alone = stage(0)
    assert norms == pytest.approx(train(alone, make(name, alone), steps))
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", list_optimizers())
def test_a_frozen_stage_trains_on_with_the_other(world, name):
    groups = ProcessGroupCollection.from_mesh(world.mesh((2,), ("pp",)))
    model = stage(world.rank)
    model.requires_grad_(world.rank == 0)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = make(name, model, groups)
    norms = train(model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.01, "schedules and logs find a learning rate on every stage"
    if world.rank == 0:
        check_as_alone(name, model, norms)
    else:
        assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", ["muon", "lamb", "mars", "soap", "adamw"])
def test_a_stage_without_gradients_trains_on_with_the_other(world, name):
    groups = ProcessGroupCollection.from_mesh(world.mesh((2,), ("pp",)))
    model = stage(world.rank)
    optimizer = make(name, model, groups)
    norms = []
    for seed in range(2):
        if world.rank == 0:
            fill(model, seed)
        norms.append(optimizer.clip_grad_norm_(0.5))
        optimizer.step()
        optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    assert optimizer.clip_grad_norm_(0.5) == 0
    optimizer.step()  # nobody has a gradient
    assert all(map(torch.equal, model.parameters(), before))
    if world.rank == 0:
        check_as_alone(name, model, norms, range(2))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", ["mars", "lamb"])
def test_a_clip_over_the_model_takes_part_where_its_optimizer_has_no_parameter(world, name):
    groups = ProcessGroupCollection.from_mesh(world.mesh((2,), ("pp",)))
    model = stage(world.rank)
    optimizer = make("adamw", model, groups, {ParamKey(name="layer0*"): {"optimizer": name}})
    assert sorted(optimizer.members) == sorted([name, "adamw"])
    both = nn.ModuleDict({**stage(0), **stage(1)})
    reference = make("adamw", both, None, {ParamKey(name="layer0*"): {"optimizer": name}})
    for seed in range(3):
        fill(both, seed)
        for p, q in zip(
            model.parameters(), both.parameters() if world.rank == 0 else [*both.parameters()][3:], strict=False
        ):
            p.grad = q.grad.clone()
        assert optimizer.clip_grad_norm_(0.5) == pytest.approx(reference.clip_grad_norm_(0.5))
        optimizer.step()
        reference.step()
    wanted = dict(both.named_parameters())
    for n, p in model.named_parameters():
        torch.testing.assert_close(p, wanted[n])


@pytest.mark.mpi(min_size=4)
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("name", ["muon", "lamb", "mars"])
def test_a_frozen_stage_of_fully_sharded_layers_takes_part_in_norms(world, name):
    mesh = world.mesh((2, 2), ("pp", "data"))
    at, _ = mesh.get_coordinate()
    model = stage(at)
    model.requires_grad_(at == 0)
    for layer in model.values():
        fully_shard(layer, mesh=mesh["data"])
    optimizer = make(name, model, ProcessGroupCollection(pp=mesh["pp"].get_group(), dp=mesh["data"].get_group()))
    alone = stage(0)
    reference = make(name, alone)
    for seed in range(2):
        fill(alone, seed)
        if at == 0:
            for p, q in zip(model.parameters(), alone.parameters(), strict=True):
                rows = q.grad.chunk(2)[mesh.get_local_rank("data")]
                p.grad = torch.zeros_like(p)
                local(p.grad).copy_(rows)
        assert optimizer.clip_grad_norm_(0.5) == pytest.approx(reference.clip_grad_norm_(0.5))
        optimizer.step()
        reference.step()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True) if at == 0 else ():
        torch.testing.assert_close(p.full_tensor(), q)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", ["muon", "mars"])
def test_what_goes_with_a_step_works_on_a_frozen_stage(world, tmp_path_factory, name):
    groups = ProcessGroupCollection.from_mesh(world.mesh((2,), ("pp",)))
    model = stage(world.rank)
    model.requires_grad_(world.rank == 0)
    optimizer = make(name, model, groups)
    guard = Guard(optimizer, on_non_finite="skip")
    fill(model, 0)
    assert guard.judge(1, 1.0, max_norm=0.5).take
    with EarlyStep(optimizer):
        if world.rank == 0:
            sum(p.square().sum() for p in model.parameters()).backward()
    check_state(optimizer, 1)
    folder = world_folder(world, tmp_path_factory)
    path = checkpoint.save(folder, step=1, model_chunks=[model], optimizer=optimizer)
    assert all(group["parameters"] for group in json.loads((path / "shardstep.json").read_text())["groups"])
    other = stage(world.rank)
    other.requires_grad_(world.rank == 0)
    again = make(name, other, groups)
    checkpoint.load(folder, model_chunks=[other], optimizer=again)
    train(model, optimizer)
    train(other, again)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def world_folder(world: Any, factory: Any) -> Any:
    """One folder for all ranks."""
    folders: list[Any] = [factory.mktemp("saved")] if world.rank == 0 else [None]
    torch.distributed.broadcast_object_list(folders)
    return folders[0]


def test_a_model_with_nothing_to_train_is_refused():
    model = stage(0)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter .* requires a gradient; call requires_grad_"):
        make("adamw", model)
