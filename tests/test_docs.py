"""The README and the pages of docs/: their Python runs as it stands, and the table of optimizers is the registry's."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import core
from tools import optimizer_table

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.fixture
def shardstep(monkeypatch):
    """The installed name of the package stands for the checkout's, so that no module is loaded twice."""
    monkeypatch.setitem(sys.modules, "shardstep", core)
    for name in [name for name in sys.modules if name == "core" or name.startswith("core.")]:
        monkeypatch.setitem(sys.modules, f"shardstep.{name}", sys.modules[name])


@pytest.mark.mpi(min_size=2)
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.stem)
def test_examples_run(world, shardstep, monkeypatch, page):
    monkeypatch.setattr(dist, "init_process_group", lambda backend: None)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    if page == README:
        names["model"] = a_sharded_model(world)
    for code in python_blocks(page):
        exec(compile(code, page.name, "exec"), names)
    check = {"README": check_readme, "library": check_library}.get(page.stem)
    if check:
        check(names)


def a_sharded_model(world: Any) -> nn.Module:
    """What the README's first lines are given: matrices, biases and gradients on FSDP2's shards."""
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    fully_shard(model, mesh=world.mesh((world.size,), ("data",)))
    model(torch.ones(4, 16)).square().mean().backward()
    return model


def check_readme(names: dict[str, Any]) -> None:
    """torch's Muon on shards takes the step that it takes on the whole matrices."""
    params = [p for p in names["model"].parameters() if p.ndim == 2]
    wholes = [nn.Parameter(p.full_tensor().detach().clone()) for p in params]
    for p, whole in zip(params, wholes, strict=True):
        assert p.grad is not None
        whole.grad = p.grad.full_tensor()
    torch.optim.Muon(wholes, lr=1e-3).step()
    names["optimizer"].step()
    for p, whole in zip(params, wholes, strict=True):
        assert torch.equal(p.full_tensor(), whole)


def check_library(names: dict[str, Any]) -> None:
    assert [a.optimizer for a in names["optimizer"].assignments()].count("muon") == 2
    assert torch.isfinite(names["weight"]).all()


@pytest.mark.mpi(min_size=2)
@pytest.mark.timeout(300)
def test_table_of_optimizers_is_the_registrys(world):
    assert optimizer_table.written() == optimizer_table.table(dist.group.WORLD), (
        "run torchrun --nproc-per-node 2 -m tools.optimizer_table --write"
    )


def test_the_front_door_leads_into_the_checkout(shardstep):
    assert importlib.import_module("shardstep").get_optimizer is core.get_optimizer
