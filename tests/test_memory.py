"""What the state of every optimizer takes is what it declares."""

from dataclasses import replace

import pytest
import torch

from core.optimizer.emerging_optimizers import OptimizerConfig, get_optimizer, list_optimizers
from core.optimizer.memory import memory_report
from core.optimizer.registry import entry_of
from core.optimizer.steps.whole_tensor import WholeStep
from tests.support.sharding import CUTS, sharded_optimizer


def linear() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(40, 24), torch.nn.Linear(24, 40))


@pytest.mark.parametrize("name", list_optimizers())
def test_state_takes_what_is_declared(name):
    optimizer = get_optimizer(OptimizerConfig(optimizer=name, lr=1e-3), [linear()])
    report = memory_report(optimizer)
    assert report.parameters == 2 * 40 * 24 + 64
    assert report.measured == report.predicted == sum(row.whole for row in report.rows)
    assert str(report).count("\n") == len(report.rows) + 1


def test_adamw_keeps_two_moments():
    model = torch.nn.Linear(40, 24, bias=False)
    report = memory_report(get_optimizer(OptimizerConfig(optimizer="adamw", lr=1e-3), [model]))
    assert report.bytes_per_parameter == 8 + 4 / 960


def test_an_optimizer_that_declares_nothing_is_refused():
    with pytest.raises(ValueError, match="Adagrad does not declare its state"):
        memory_report(torch.optim.Adagrad(linear().parameters()))


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("name", list_optimizers())
@pytest.mark.parametrize("cut", ["rows", "tp rows, dp columns"])
def test_a_rank_keeps_what_is_declared_of_its_shards(world, name, cut):
    dtype = torch.float32 if getattr(entry_of(name).optimizer_cls, "float32_only", False) else torch.float64
    whole = replace(CUTS[4][cut], dtype=dtype)
    optimizer = sharded_optimizer(name, whole, world)
    report = memory_report(optimizer)
    assert report.measured == report.predicted
    if not issubclass(entry_of(name).optimizer_cls, WholeStep):
        return
    report = memory_report(sharded_optimizer(name, whole, world, tp_mode="owner"))
    everyone = [None] * 4
    torch.distributed.all_gather_object(everyone, report.measured)
    assert sum(everyone) == sum(row.whole for row in report.rows)
