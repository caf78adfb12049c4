"""The first step compared with the unsharded one: it passes on every layout, and stops when a mode is broken on purpose."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.optimizer_config import OptimizerConfig
from core.optimizer.probe import ProbeError, probe
from core.optimizer.probe_bound import entry_bounds
from core.optimizer.registry import entry_of
from core.optimizer.rules.tensor_parallel_muon import TensorParallelMuon
from core.optimizer.steps.base import ShardedStep
from core.process_groups_config import ProcessGroupCollection
from core.sharding.layout import Layout
from core.sharding.tp_modes import TP_MODES
from tests.support.small_run import CUTS, Cut, Run

KINDS: dict[str, dict[str, Any]] = {
    "elementwise": {"optimizer": "adamw"},
    "stacked": {"optimizer": "lamb"},
    "scaled by a norm over the model": {"optimizer": "mars", "mars_max_grad_norm": 1e-3},
    "whole tensors": {"optimizer": "soap"},
    "random": {"optimizer": "quad"},
    **{mode: {"optimizer": "muon", "muon_tp_mode": mode} for mode, entry in TP_MODES.items() if entry.exact},
}
LAYOUTS = [
    pytest.param(cut, id=name, marks=pytest.mark.mpi(min_size=size))
    for size, cuts in ((2, {**CUTS[2], "fsdp": Cut(dp=2, fsdp=True)}), (4, CUTS[4]))
    for name, cut in cuts.items()
]


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("cut", LAYOUTS)
def test_exact_modes_pass_on_every_layout(world, cut, settings):
    run = Run(world, cut, {"dtype": torch.float64, **settings})
    torch.manual_seed(0)
    for _ in range(2):  # the second step begins with state
        one = probe(run.optimizer)
        run.train(1)
        assert one.rows
        assert all(row.share <= 1 for row in one.rows)
        assert "The first step is the unsharded one" in one.report
    kinds = {(row.optimizer, row.layout) for row in one.rows}
    assert kinds == {(a.optimizer, f"{a.sharding}, {a.mode}") for a in world_assignments(world, run.optimizer)}


def world_assignments(world: Any, optimizer: Any) -> list[Any]:
    gathered: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(gathered, optimizer.assignments())
    return [a for rank in gathered for a in rank]


@pytest.mark.mpi(min_size=4)
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("mode", ["owner", "distributed", "auto"])
def test_fully_shard_over_tensor_parallelism_passes(world, mode):
    mesh = world.mesh((2, 2), ("dp", "tp"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 12)).double()
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    config = OptimizerConfig(optimizer="muon", lr=0.1, muon_tp_mode=mode, muon_auto_rates=(1e11, 1e10, 1e-5, 1e9))
    chain = get_optimizer(config, model, ProcessGroupCollection.from_mesh(mesh))
    one = probe(chain)
    model(torch.ones(3, 12, dtype=torch.float64)).square().sum().backward()
    chain.step()
    assert {row.optimizer for row in one.rows} == {"muon", "adamw"}


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("settings", [KINDS["stacked"], KINDS["whole tensors"], KINDS["distributed"]])
def test_training_is_not_changed(world, settings):
    def trained(*, probed: bool) -> list[torch.Tensor]:
        run = Run(world, Cut(tp=2), settings)
        torch.manual_seed(0)
        if probed:
            probe(run.optimizer)
        run.train(3)
        return [p.detach().clone() for p in run.chunks[0].parameters()]

    for a, b in zip(trained(probed=True), trained(probed=False), strict=True):
        assert torch.equal(a, b)


def stopped(run: Run) -> str:
    torch.manual_seed(0)  # or ranks draw other gradients
    probe(run.optimizer)
    with pytest.raises(ProbeError, match="not the unsharded step") as error:
        run.train(1)
    return str(error.value)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtensor", [False, True])
def test_a_mode_that_takes_shards_for_matrices_is_stopped(world, monkeypatch, dtype, dtensor):
    monkeypatch.setitem(TP_MODES, "duplicated", replace(TP_MODES["duplicated"], run=TP_MODES["blockwise"].run))
    settings = {"optimizer": "muon", "muon_tp_mode": "duplicated", "dtype": dtype}
    text = stopped(Run(world, Cut(tp=2, dtensor=dtensor), settings))
    lines = text.splitlines()
    assert re.split(r"\s{2,}", lines[1]) == ["parameter", "optimizer", "largest difference", "bound", "layout"]
    differing = [line for line in lines[2:] if line.endswith("differs")]
    assert len(differing) >= 2
    assert all("muon" in line and "tp 2, duplicated" in line for line in differing)
    assert any("adamw" in line for line in lines[2:])


@pytest.mark.mpi(min_size=2)
def test_a_norm_of_the_shard_is_stopped(world, monkeypatch):
    reduce = Layout._reduce
    monkeypatch.setattr(Layout, "_reduce", lambda *args: replace(reduce(*args), groups=()))
    run = Run(world, Cut(tp=2), {"optimizer": "lamb", "dtype": torch.float64})
    assert "dim -2 / tp 2" in stopped(run)


@pytest.mark.mpi(min_size=2)
def test_gradients_that_differ_between_copies_are_stopped(world):
    run = Run(world, Cut(dp=2), {"optimizer": "adamw"})
    probe(run.optimizer)
    for p in run.chunks[0].parameters():
        p.grad = torch.full_like(p, 1.0 - 2 * world.rank)
    with pytest.raises(ProbeError, match="gradients are summed over all ranks"):
        run.optimizer.step()


@pytest.mark.mpi(min_size=4)
def test_all_stages_stop_when_one_differs(world, monkeypatch):
    run = Run(world, Cut(pp=2, tp=2), {"optimizer": "lamb", "dtype": torch.float64})
    if world.rank >= 2:  # the second stage
        reduce = Layout._reduce
        monkeypatch.setattr(Layout, "_reduce", lambda *args: replace(reduce(*args), groups=()))
    # A rank that leaves out a reduction must not leave the other ranks of its group waiting: both of the stage leave it out.
    assert "layers.1." in stopped(run)


@pytest.mark.mpi(min_size=2)
def test_blockwise_is_said_not_to_be_compared(world):
    run = Run(world, Cut(tp=2), {"optimizer": "muon", "muon_tp_mode": "blockwise"})
    torch.manual_seed(0)
    one = probe(run.optimizer)
    with pytest.warns(UserWarning, match=r"8 parameters were not compared .*not the unsharded step by definition"):
        run.train(1)
    assert {row.layout for row in one.rows if row.optimizer == "muon"} == {
        "whole, blockwise"
    }  # the adapters are not cut
    said: list[str] = []
    probe(run.optimizer, tell=said.append)
    run.train(1)
    assert len(said) == 1
    assert "blockwise" in said[0]


@pytest.mark.mpi(min_size=2)
def test_a_reference_that_fails_leaves_nobody_waiting(world, monkeypatch):
    run = Run(world, Cut(tp=2), {"optimizer": "soap"})
    torch.manual_seed(0)
    probe(run.optimizer)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("core.optimizer.probe_sample.step_unsharded", fail)
    with pytest.raises(ProbeError, match=r"could not be compared .*RuntimeError: out of memory"):
        run.train(1)
    world.check_in_step()


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))


def muon(model: nn.Module, **settings: Any) -> Any:
    return get_optimizer(OptimizerConfig(**{"optimizer": "muon", "lr": 0.1, **settings}), model)


def test_frozen_parameters_and_those_without_a_gradient_are_left_out():
    model = small()
    model[1].weight.requires_grad = False
    chain = muon(model)
    one = probe(chain)
    model(torch.ones(3, 6)).sum().backward()
    model[0].weight.grad = None
    chain.step()
    assert [row.parameter for row in one.rows] == ["1.bias"]  # the smaller of the two biases


def test_a_step_that_changes_nothing_is_passed_over():
    model = small()
    chain = muon(model)
    one = probe(chain)
    chain.step()  # no gradient
    model(torch.ones(3, 6)).sum().backward()
    for group in chain.param_groups:
        group["lr"] = 0.0
    chain.step()
    assert not one.rows
    for group in chain.param_groups:
        group["lr"] = 0.1
    chain.step()
    assert {row.optimizer for row in one.rows} == {"muon", "adamw"}
    rows = one.rows
    chain.step()
    assert one.rows is rows


@pytest.mark.parametrize("by_name", [False, True])
def test_gradients_of_a_closure_are_seen(by_name):
    model = small()
    chain = muon(model)
    one = probe(chain)

    def closure() -> torch.Tensor:
        chain.zero_grad()
        loss = model(torch.ones(3, 6)).square().sum()
        loss.backward()
        chain.clip_grad_norm_(1e-3)
        return loss

    assert (chain.step(closure=closure) if by_name else chain.step(closure)) > 0
    assert one.rows


def test_parameters_without_names_and_random_rules():
    params = [nn.Parameter(torch.ones(4, n)) for n in (6, 3)]
    optimizer: Any = entry_of("quad").optimizer_cls([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}], lr=0.1)
    one = probe(optimizer)
    for p in params:
        p.grad = torch.rand_like(p)
    optimizer.step()
    assert {row.parameter for row in one.rows} == {"parameter 0", "parameter 1"}
    assert all(row.difference == 0 for row in one.rows)


def test_one_optimizer_and_classes_of_torch():
    p = nn.Parameter(torch.ones(4, 6))
    p.grad = torch.rand(4, 6)
    optimizer = TensorParallelMuon([("weight", p)])
    one = probe(optimizer)
    optimizer.step()
    assert [(row.parameter, row.optimizer) for row in one.rows] == [("weight", "TensorParallelMuon")]
    with pytest.raises(TypeError, match="SGD is no optimizer of this package"):
        probe(torch.optim.SGD([p]))
    assert isinstance(optimizer, ShardedStep)


@pytest.mark.mpi(min_size=2)
def test_a_class_of_torch_that_steps_shards_of_matrices_is_stopped(world):
    from core.optimizer.chained import ChainedOptimizer

    groups = ProcessGroupCollection.from_mesh(world.mesh((2,), ("tp",)))
    p: Any = nn.Parameter(torch.ones(4, 6))
    p.tensor_model_parallel, p.partition_dim = True, 0
    chain = ChainedOptimizer({"theirs": torch.optim.Muon([("weight", p)], lr=0.1)}, groups)
    probe(chain)
    p.grad = torch.rand(4, 6, generator=torch.Generator().manual_seed(world.rank))
    with pytest.raises(ProbeError, match=r"weight +theirs .* dim -2 / tp 2, as it is  differs"):
        chain.step()


def test_the_bound_follows_the_arithmetic():
    class Of:
        fp32_matmul_prec = "medium"

    before = torch.zeros(2, 3, dtype=torch.float64)
    after = before + 2.0
    after[0, 0] = 0.0
    for mode, dtype, share in (
        ("owner", torch.float64, 2.0**-52 * 2**14),
        ("owner", torch.float32, 2.0**-23 * 2**14),
        ("distributed", torch.float64, 2.0**-52 * 2**14),
        ("distributed", torch.float32, 1 / 3),
        ("auto: distributed, 0.1 ms", torch.float32, 1 / 3),
    ):
        bounds = entry_bounds(before.to(dtype), after.to(dtype), Of(), mode)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(bounds[0, :2], torch.tensor([share * 2, share * 2 + 2 * eps], dtype=dtype))
    stored = entry_bounds(before.bfloat16(), after.bfloat16(), Of(), "owner")
    torch.testing.assert_close(stored[1], torch.full((3,), 2 * 2.0**-7 + 2 * 2.0**-9))
