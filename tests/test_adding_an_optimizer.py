"""The worked example of docs/adding-an-optimizer.md: its three places are all that it takes."""

import re
from pathlib import Path

import pytest
import pytorch_optimizer
import torch

from core.optimizer import registry
from core.optimizer.emerging_optimizers import get_optimizer
from core.optimizer.optimizer_config import OptimizerConfig
from tests.support.sharding import CUTS, sharded, unsharded

PAGE = Path(__file__).parents[1] / "docs/adding-an-optimizer.md"


@pytest.fixture
def signum(monkeypatch):
    """What the blocks of the page define, with the optimizer in the registry."""
    text = PAGE.read_text()
    rule, oracle = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (line,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    names = {"__name__": "core.optimizer.rules.signum", "__package__": "core.optimizer.rules"}
    exec(compile(rule, str(PAGE), "exec"), names)
    names |= {"pytorch_optimizer": pytorch_optimizer}
    exec(compile(oracle, str(PAGE), "exec"), names)
    # As the module makes its entries of the table.
    for name, cls in eval(f"{{{line}}}", names).items():
        monkeypatch.setitem(registry._EMERGING_OPTIMIZERS, name, registry.entry_for(name, cls))
    return names


def test_the_oracle_agrees(signum):
    signum["test_signum_is_pytorch_optimizers"]()


def test_settings_come_from_the_constructor(signum):
    assert registry.settings_of("signum").keys() == {"signum_momentum"}
    config = OptimizerConfig(optimizer="signum", lr=0.1, signum_momentum=0.5)
    chain = get_optimizer(config, torch.nn.Linear(3, 4))
    assert list(chain.members) == ["signum"]
    assert {group["momentum"] for group in chain.param_groups} == {0.5}
    with pytest.raises(ValueError, match=r"signum_momentun.*did you mean 'signum_momentum'"):
        OptimizerConfig(optimizer="signum", signum_momentun=0.5)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("cut", ["rows", "dtensor columns", "any shape, dim 0"])
def test_two_ranks_train_as_one(world, signum, cut):
    cut = CUTS[world.size][cut]
    got, shard = sharded("signum", cut, 6, world)
    for p, wanted in zip(got, unsharded("signum", cut, 6), strict=True):
        torch.testing.assert_close(p, shard(wanted), rtol=1e-9, atol=1e-12)
