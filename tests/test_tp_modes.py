"""The table of tensor-parallel modes: a new mode is one entry and one cost, and everything else follows."""

from collections.abc import Iterator
from dataclasses import replace
from math import prod

import pytest
import torch
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

from core import engine
from core.cost.cheapest import choose
from core.cost.model import COSTS, Cost, Link, Machine, Matrices, alone, exact_costs, predict, unpriced_modes
from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.optimizer_config import OptimizerConfig
from core.optimizer.rules.tensor_parallel_muon import TensorParallelMuon
from core.optimizer.steps.whole_tensor import WholeStep
from core.process_groups_config import ProcessGroupCollection
from core.sharding.tp_modes import TP_MODES, TpMode, exact_modes, tp_mode_names, work_at
from tests.support.sharding import (
    CUTS,
    Weights,
    cutter,
    sharded,
    sharded_optimizer,
    unsharded,
    whole_gradient,
    whole_parameters,
)
from tools.bench.cases import Candidate
from tools.plan.command import main as plan
from tools.pretrain.arguments import parse_arguments
from tools.usage import UsageError

MACHINE = Machine(1e12, 1e12, Link(1e-6, 1e10), device="cpu")
SHAPES = ((24, 64), (64, 24), (32, 32), (16, 8), (40, 16))


def to_the_first(fn, x, lay, cost):
    """The first rank of the tensor-parallel group gathers each whole matrix, works, and sends the shards back."""
    return (yield work_at(0, lambda wholes: fn(wholes, lay.at_owner), x, lay))


def brought_to_the_first(lay) -> int:
    return 0 if lay.is_whole else prod(lay.shape)


def cost_of_the_first(matrices, machine, iterations, wave) -> Cost:
    compute = sum(kind.count * alone(kind, machine, iterations) for kind in matrices)
    received = float(sum(kind.count * kind.payload for kind in matrices))
    moved = 2 * (machine.link.latency + received / machine.link.bandwidth)
    return Cost(compute, moved, received, collectives=2)


@pytest.fixture
def first(monkeypatch) -> Iterator[str]:
    """A mode that does not exist, registered as a new one would be: one entry, one cost."""
    monkeypatch.setitem(
        TP_MODES,
        "first",
        TpMode("the first rank does it all", exact=True, run=to_the_first, brings=brought_to_the_first),
    )
    monkeypatch.setitem(COSTS, "first", cost_of_the_first)
    yield "first"
    monkeypatch.undo()
    assert "first" not in (*TP_MODES, *COSTS)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("cut", ["rows", "columns", "uneven columns", "qkv", "gate/up stride", "copies"])
def test_a_new_mode_takes_the_unsharded_step(world, first, cut):
    got, shard = sharded("muon", CUTS[2][cut], 5, world, tp_mode=first)
    for local, whole in zip(got, unsharded("muon", CUTS[2][cut], 5), strict=True):
        torch.testing.assert_close(local, shard(whole), rtol=1e-9, atol=1e-9 * float(whole.abs().mean()))


@pytest.mark.mpi(min_size=2)
def test_a_new_mode_trains_by_config(world, first):
    cut = CUTS[2]["rows"]
    parameter, shard, groups = cutter(cut, world)

    def trained(groups: ProcessGroupCollection | None, local) -> list[torch.Tensor]:
        params = {}
        for i, whole in enumerate(whole_parameters(cut.shapes)):
            piece = local(whole)
            params[f"layer{i}.weight"] = nn.Parameter(piece)
            vars(params[f"layer{i}.weight"]).update(vars(piece))
        model = Weights(params)
        config = OptimizerConfig(optimizer="muon", lr=0.1, muon_tp_mode=first)
        optimizer = get_optimizer(config, [model], groups)
        for step in range(3):
            for i, p in enumerate(params.values()):
                g = whole_gradient(i, step, cut.shapes[i])
                p.grad = None if g is None else local(g)
            optimizer.step()
        return [p.detach() for p in params.values()]

    for local, whole in zip(trained(groups, parameter), trained(None, torch.clone), strict=True):
        torch.testing.assert_close(local, shard(whole), rtol=1e-9, atol=1e-9 * float(whole.abs().mean()))


@pytest.mark.mpi(min_size=2)
def test_what_a_new_mode_brings_is_counted_in_waves(world, first, monkeypatch):
    optimizer = sharded_optimizer("muon", replace(CUTS[2]["rows"], shapes=SHAPES), world, tp_mode=first)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p in params:
        p.grad = torch.ones_like(p)
    assert optimizer.traffic(optimizer.layout(params[0]))[1] == 24 * 64
    counts = {}
    for wave in (1, 1600, 10**9):
        monkeypatch.setenv(engine.WAVE, str(wave))
        with CommDebugMode() as calls:
            optimizer.step()
        counts[wave] = calls.get_total_counts()
    assert counts[10**9] == 2 < counts[1600] < counts[1] == 2 * len(params)
    kinds = [Matrices(1, *shape, tp=2, itemsize=8) for shape in SHAPES]
    assert predict(first, kinds, MACHINE).collectives == counts[10**9]


@pytest.mark.mpi(min_size=2)
def test_auto_takes_a_new_mode_that_is_predicted_to_be_the_fastest(world, first, monkeypatch):
    monkeypatch.setitem(COSTS, first, lambda *_: Cost())
    rates = (1e12, 1e12, 1e-6, 1e10)
    cut = CUTS[2]["rows"]
    optimizer = sharded_optimizer("muon", cut, world, tp_mode="auto", auto_rates=rates)
    labels = [optimizer.mode_of(p) for group in optimizer.param_groups for p in group["params"]]
    assert all(label.startswith("auto: first, ") for label in labels)
    got, shard = sharded("muon", cut, 3, world, tp_mode="auto", auto_rates=rates)
    for local, whole in zip(got, unsharded("muon", cut, 3), strict=True):
        torch.testing.assert_close(local, shard(whole), rtol=1e-9, atol=1e-9 * float(whole.abs().mean()))


def test_a_new_mode_is_priced_and_planned(first, capsys):
    kinds = [Matrices(4, 8, 16, tp=4)]
    cost = predict(first, kinds, MACHINE)
    assert cost.bytes == 4 * 512 and cost.compute > predict("owner", kinds, MACHINE).compute
    assert first in exact_costs()
    plan(["--preset", "1B", "--world-size", "8", "--tp", "4"])
    assert "\nfirst " in capsys.readouterr().out


def test_a_mode_without_a_cost_is_not_chosen_and_the_planner_says_so(first, monkeypatch, capsys):
    monkeypatch.delitem(COSTS, first)
    kinds = [Matrices(4, 8, 16, tp=4)]
    with pytest.raises(ValueError, match=r"'first' has no predicted cost; possible: owner, team, .*Add its cost to"):
        predict(first, kinds, MACHINE)
    assert unpriced_modes() == (first,) and first not in exact_costs()
    assert all(mode != first for mode, _ in choose(kinds, MACHINE))
    plan(["--preset", "1B", "--world-size", "8", "--tp", "4"])
    out = capsys.readouterr().out
    assert "\nfirst " not in out and "Not planned, because core.cost.model.COSTS has no cost of them: first." in out


def test_an_inexact_mode_is_neither_chosen_nor_called_exact(first, monkeypatch):
    monkeypatch.setitem(TP_MODES, first, replace(TP_MODES[first], exact=False))
    assert first not in exact_modes() and first not in exact_costs()
    assert not Candidate("shardstep first", None, []).exact and Candidate("shardstep owner", None, []).exact


def test_all_that_list_modes_list_a_new_one(first):
    p = nn.Parameter(torch.ones(4, 4))
    possible = "duplicated, distributed, owner, blockwise, first, auto"
    with pytest.raises(ValueError, match=f"tp_mode='last' is unknown; possible: {possible}"):
        TensorParallelMuon([p], tp_mode="last")
    with pytest.raises(UsageError) as refused:
        parse_arguments(["--muon-tp-mode", "last"])
    assert possible in str(refused.value)
    assert parse_arguments(["--muon-tp-mode", first]).muon_tp_mode == first


def test_what_is_offered_is_what_the_table_has():
    assert TensorParallelMuon.modes == exact_modes() == ("duplicated", "distributed", "owner")
    assert tp_mode_names() == ("duplicated", "distributed", "owner", "blockwise", "auto")
    assert WholeStep.modes == ("duplicated", "owner")
    assert not unpriced_modes()
