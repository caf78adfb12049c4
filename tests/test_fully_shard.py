"""Models that torch itself shards: by fully_shard (FSDP2), alone and after parallelize_module."""

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.optimizer_config import OptimizerConfig
from core.process_groups_config import ProcessGroupCollection
from core.sharding.parameter_layout import layout_of, local

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
WHOLE = StateDictOptions(full_state_dict=True)


def build() -> nn.Sequential:
    """18 rows cut over 2 x 2 ranks, and 7 over 2, leave uneven shards; one row leaves empty ones."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 18), nn.GELU(), nn.Linear(18, 7, bias=False), nn.LayerNorm(7), nn.Linear(7, 7), nn.Linear(7, 1)
    )
    model[4].weight.requires_grad_(False)
    return model.double()


def sharded(world, tp: int) -> tuple[nn.Sequential, int, int]:
    """The model over all ranks; index and number of the parts that a batch is cut in."""
    mesh = world.mesh((world.size // tp, tp), ("data", "tp"))
    model = build()
    if tp > 1:
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan, src_data_rank=None)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    return model, mesh.get_local_rank("data"), world.size // tp


def make(model, name="muon", **settings):
    return get_optimizer(OptimizerConfig.from_dict({"optimizer": name, "lr": 0.05, **settings}), model)


def train(model, optimizer, part=0, parts=1, steps=range(3)) -> list[float]:
    """Gradient norms of the steps; the learning rate falls."""
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 4)
    norms = []
    for step in steps:
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        model(x.chunk(parts)[part]).square().mean().backward()
        norms.append(optimizer.clip_grad_norm_(0.5))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return norms


def check_same(model, reference) -> None:
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-9, atol=1e-11)


def check_trains_as_unsharded(world, tp, name, settings) -> None:
    reference = build()
    model, part, parts = sharded(world, tp)
    norms = train(model, make(model, name, **settings), part, parts)
    assert norms == pytest.approx(train(reference, make(reference, name, **settings)), rel=1e-9)
    check_same(model, reference)


RULES = [
    ("adamw", {}),
    ("muon", {"muon_tp_mode": "owner"}),
    ("muon", {"muon_tp_mode": "distributed"}),
    ("adafactor", {}),
    ("shampoo", {}),
    ("adaptive_muon", {}),
]


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize(("name", "settings"), RULES, ids=str)
def test_a_dim_that_is_cut_twice_trains_as_unsharded(world, name, settings):
    check_trains_as_unsharded(world, 2, name, settings)


@pytest.mark.mpi(min_size=2)
def test_fully_sharded_trains_as_unsharded(world):
    check_trains_as_unsharded(world, 1, "muon", {})


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("order", [[Shard(0), Shard(0)], [Shard(1), Shard(1)], [Shard(0), Shard(1)]], ids=str)
def test_several_shards_of_one_dim_hold_what_torch_says(world, order):
    whole = torch.arange(99.0).reshape(11, 9)
    p = distribute_tensor(whole, world.mesh((2, 2), ("data", "tp")), order, src_data_rank=None)
    lay = layout_of(p, ProcessGroupCollection())
    rows, cols = (
        torch.cat([torch.arange(lo, hi) for lo, hi in (split.held[split.axis.index] if split else ((0, size),))])
        if lay.local_shape[dim]
        else torch.arange(0)
        for dim, (size, split) in enumerate(zip(lay.shape, lay.splits, strict=True))
    )
    assert torch.equal(local(p), whole[rows][:, cols])


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_torchs_state_dict_is_the_unsharded_one_and_loads_elsewhere(world, name):
    reference = build()
    expected = make(reference, name)
    train(reference, expected)
    model, part, parts = sharded(world, 2)
    optimizer = make(model, name)
    train(model, optimizer, part, parts)
    saved = get_optimizer_state_dict(model, optimizer, options=WHOLE)
    if world.rank == 0:
        whole = get_optimizer_state_dict(reference, expected, options=WHOLE)
        torch.testing.assert_close(saved["state"], whole["state"], rtol=1e-9, atol=1e-11)
    other, part, parts = sharded(world, 1)
    for p, q in zip(other.parameters(), reference.parameters(), strict=True):
        local(p.detach()).copy_(local(distribute_tensor(q.detach(), p.device_mesh, p.placements, src_data_rank=None)))
    resumed = make(other, name)
    broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(other, resumed, saved, options=broadcast)
    for group in resumed.param_groups:
        group["lr"] = 0.05
    for group in expected.param_groups:
        group["lr"] = 0.05
    for group in (*resumed.param_groups, *expected.param_groups):
        group.pop("initial_lr", None)
    train(other, resumed, part, parts, range(3, 5))
    train(reference, expected, steps=range(3, 5))
    check_same(other, reference)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", ["adamw", "muon", "shampoo"])
def test_parameters_may_be_exchanged_before_the_first_step(world, name):
    """As accelerate does, which builds the optimizer first and shards the model then."""
    reference = build()
    train(reference, make(reference, name))
    model = build()
    optimizer = make(model, name)
    before = {id(p): n for n, p in model.named_parameters()}
    mesh = world.mesh((2, 1), ("data", "tp"))["data"]
    names = [[before[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    fully_shard(model, mesh=mesh)
    now = dict(model.named_parameters())
    for group, mine in zip(optimizer.param_groups, names, strict=True):
        group["params"] = [now[n] for n in mine]
    optimizer.state_dict()
    assert all(isinstance(p, DTensor) for p in optimizer.state), "state of parameters that are gone"
    train(model, optimizer, mesh.get_local_rank(), 2)
    check_same(model, reference)


@pytest.mark.mpi(min_size=4)
def test_a_norm_over_axes_that_overlap_is_refused(world):
    model = nn.Module()
    model.a = nn.Parameter(distribute_tensor(torch.ones(8, 8), world.mesh((4,), ("all",)), [Shard(0)]))
    model.b = nn.Parameter(distribute_tensor(torch.ones(8, 8), world.mesh((2, 2), ("data", "tp"))["data"], [Shard(0)]))
    optimizer = make(model, "adamw")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(NotImplementedError, match=r"all 4, data 2"):
        optimizer.clip_grad_norm_(1.0)


def test_a_module_needs_no_list():
    model = build()
    train(model, make(model))
    assert len(make(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), "adamw").entries()) == 4
