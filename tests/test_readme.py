"""The library examples of the README run as they stand."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tools import optimizer_table

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.mpi(min_size=2)
def test_examples_run(world, monkeypatch):
    monkeypatch.setattr(dist, "init_process_group", lambda backend: None)
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
        exec(compile(code, "README.md", "exec"), names)
    assert [a.optimizer for a in names["optimizer"].assignments()].count("muon") == 2
    assert torch.isfinite(names["weight"]).all()


@pytest.mark.mpi(min_size=2)
@pytest.mark.timeout(300)
def test_table_of_optimizers_is_the_registrys(world):
    assert optimizer_table.written() == optimizer_table.table(dist.group.WORLD), (
        "run torchrun --nproc-per-node 2 -m tools.optimizer_table --write"
    )
