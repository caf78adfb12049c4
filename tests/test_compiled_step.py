"""``torch.compile`` around a training step: the optimizer runs eagerly, and gives what it gives without."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from core.faults import Guard
from core.optimizer.early_step import EarlyStep
from core.optimizer.emerging_optimizers import get_optimizer, list_optimizers
from core.optimizer.functional.as_functions import FunctionalOptimizer
from core.optimizer.optimizer_config import OptimizerConfig
from core.optimizer.rules.micro_adam import MicroAdam
from core.optimizer.speculative_step import SpeculativeStep
from core.process_groups_config import ProcessGroupCollection
from core.schedule import ScheduleLR

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(function, backend="eager")


def build(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 5, bias=False))
    return model, get_optimizer(OptimizerConfig(optimizer=name, lr=0.01), model)


def train(name: str, how: str, wrap: Callable[..., Any]) -> list[torch.Tensor]:
    model, optimizer = build(name)
    schedule, ahead = ScheduleLR(optimizer, lambda k: 1 - k / 8), SpeculativeStep(optimizer)
    guard = Guard(optimizer)
    x = torch.linspace(-1, 1, 24).reshape(4, 6)

    def loss() -> torch.Tensor:
        return model(x).square().mean()

    def step() -> None:
        optimizer.step()

    def training_step() -> None:
        optimizer.zero_grad()
        loss().backward()
        if guard.judge(1, 1.0, max_norm=0.1).take:
            optimizer.step()
        schedule.step()

    def early() -> None:
        optimizer.zero_grad()
        with EarlyStep(optimizer):
            loss().backward()

    def speculative() -> None:
        optimizer.zero_grad()
        loss().backward()
        ahead.step()
        ahead.undo()
        optimizer.step()

    function = wrap({"step": step, "training step": training_step, "early": early, "speculative": speculative}[how])
    for _ in range(3):
        if how == "step":
            optimizer.zero_grad()
            loss().backward()
        function()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", list_optimizers())
def test_a_compiled_step_is_the_plain_step(name):
    expected = train(name, "step", lambda f: f)
    torch.testing.assert_close(train(name, "step", compiled), expected, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["training step", "early", "speculative"])
@pytest.mark.parametrize("name", ["adamw", "muon", "soap", "micro_adam", "lamb"])
def test_a_compiled_training_step_is_the_plain_one(name, how):
    # The tracer may round the model's own loss otherwise.
    torch.testing.assert_close(train(name, how, compiled), train(name, how, lambda f: f))


def test_the_bound_method_and_a_class_alone_are_not_traced():
    expected, found = (nn.Parameter(torch.ones(4, 6)) for _ in range(2))
    for p, wrap in ((expected, lambda f: f), (found, compiled)):
        optimizer = MicroAdam([p], lr=0.1)
        step = wrap(optimizer.step)
        for i in range(3):
            p.grad = torch.full((4, 6), 0.1 * (i + 1))
            step()
    assert torch.equal(expected, found)


def test_a_graph_that_must_be_whole_is_refused_by_torch():
    model, optimizer = build("adamw")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.compiler.reset()
    with pytest.raises(Exception, match="shardstep communicates and keeps books in Python"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()


def test_a_functional_optimizer_is_not_traced():
    results = []
    for wrap in (lambda f: f, compiled):
        made = FunctionalOptimizer(lambda params: MicroAdam(params.items(), lr=0.1))
        params = {"w": torch.ones(4, 6)}
        state = made.init(params)
        update = wrap(lambda g, s, p, update=made.update: update(g, s, p))
        for i in range(3):
            params, state = update({"w": torch.full((4, 6), 0.1 * (i + 1))}, state, params)
        results.append(params["w"])
    assert torch.equal(*results)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("mode", ["owner", "duplicated", "distributed"])
def test_modes_are_not_traced(world, mode):
    groups = ProcessGroupCollection.from_mesh(world.mesh((2,), ("tp",)))
    results = []
    for wrap in (lambda f: f, compiled):
        torch.manual_seed(world.rank)
        model = nn.Linear(6, 8, bias=False)
        model.weight.tensor_model_parallel, model.weight.partition_dim = True, 0
        config = OptimizerConfig(optimizer="muon", lr=0.1, muon_tp_mode=mode)
        optimizer = get_optimizer(config, model, groups)
        step = wrap(optimizer.step)
        for i in range(2):
            model.weight.grad = torch.full((8, 6), 1.0).cumsum(0) * (i + 1 + world.rank)
            step()
        results.append(model.weight.detach())
    assert torch.equal(*results)
